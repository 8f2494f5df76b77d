"""Runs survive what `faults.py` does to them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).with_name("faults.py")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes that use PyTorch, as Linux can")


def bring_about(count: int, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, FAULTS, f"--count={count}", *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_no_fault_costs_a_run_or_a_row():
    done = bring_about(int(os.environ.get("CRATE_MAE_FAULTS", "12")))
    assert done.returncode == 0, done.stdout + done.stderr


# Of files, whichever is met first: config.json, or a state.
@pytest.mark.parametrize(
    "unsynced, damage", [("files", "is missing or broken|none of the states can be read"), ("folders", "run lost")]
)
def test_the_harness_finds_what_is_not_synced(unsynced, damage):
    done = bring_about(8, f"--unsynced={unsynced}", "--stop")
    assert done.returncode == 1
    assert re.search(damage, done.stdout), done.stdout + done.stderr
