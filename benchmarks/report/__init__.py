"""What stored results say: tables, plots, the README's numbers. ``python -m benchmarks.report``."""
