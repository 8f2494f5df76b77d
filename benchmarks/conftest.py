"""``pytest benchmarks``: CPU regressions, timed by pytest-benchmark, each implementation beside the official order.

They are small and run one after another, to notice a loss of speed while working; what is reported is measured by the programs,
which interleave.
"""

from __future__ import annotations

import pytest
import torch

import crate_kernels
from benchmarks import harness
from benchmarks.training_step import THRESHOLD_CROSSINGS

IMPLEMENTATIONS = ["reference", "composed", *["triton"] * torch.cuda.is_available()]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def compare(benchmark, device):
    """``compare(group, outputs, work, implementation)`` checks outputs, then times ``work`` within its group of the table.

    ``outputs(implementation, dtype)`` gives tensors by name, and must agree with the official order in float64 about as closely
    as the official order itself; ``work()`` is timed under the implementation.
    """

    def run(group, outputs, work, implementation, rounds=10):
        truth = outputs("reference", torch.float64)
        own = outputs("reference", torch.float32)
        tolerances = {
            name: 1.5 * harness.relative_error(own[name], truth[name]) + THRESHOLD_CROSSINGS for name in truth
        }
        harness.check_agreement({implementation: outputs(implementation, torch.float32)}, truth, tolerances)

        def timed():
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = group
        with crate_kernels.use(implementation):
            benchmark.pedantic(timed, rounds=rounds, warmup_rounds=2)

    return run
