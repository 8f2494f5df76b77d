"""What every test shares: the device, poisoned memory, and the material beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from quick_interpreter import quicken

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
quicken()

# Each of several processes has one core; without this their threads would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start
    torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run in this session: "cuda", or "cpu" in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every ``torch.empty`` with NaN, so that an element that a kernel forgets to write cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden numbers and test photographs that is handed out beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared folder with golden numbers and test photographs beside the repository")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
