"""Benchmarks of crate_kernels and crate_mae: one harness, one result format, one module a question."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
