"""Benchmarks of crate_kernels and crate_mae: one harness, one result format, one module a question.

kernels/             how long does each operator take, beside its peers?
training_step.py     how long does a whole training step take?
memory.py            how much memory does a step take, and which batch fits?
memory_per_rank.py   how much does each rank take under DDP and FSDP2?
data_loading.py      how many images does one core load?
ahead_of_time/       what do the kernels use, and within which bounds, compiled without a GPU?
gpu/                 unattended runs on a GPU: a check, and all measurements that the targets need
report/              tables and plots from stored results
test_*.py            `pytest benchmarks`: small regressions, by pytest-benchmark

harness.py           checks outputs, then times providers in turns
peers.py             what ours is compared with
records.py           the format of results
command_line.py      arguments that programs share
results/             stored rows, a folder a device; NOTES.md says what was learnt from them
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
