"""Benchmarks of crate_kernels and crate_mae: one harness, one result format, one module a question."""
