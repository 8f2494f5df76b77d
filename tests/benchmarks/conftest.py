"""What the rehearsals of the unattended runs share."""

from __future__ import annotations

import io
import runpy
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import parts
from benchmarks.gpu.parts import RESULTS, Attempt, Part, Runner


@pytest.fixture(autouse=True)
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the unattended runs put their archives."""
    monkeypatch.setenv("OUT", str(tmp_path / "archives"))
    return tmp_path / "archives"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """Parts run as ``python -m`` would run them, without a new process, which would import all of torch again."""

    def attempt(self: Runner, part: Part, tests: Sequence[str] = ()) -> Attempt:
        python, option, module, *words = part.command
        assert (python, option, tests) == (sys.executable, "-m", [])
        results, output, begin, status = Path(self.scratch, f"{time.time_ns()}.jsonl"), io.StringIO(), time.time(), 0
        results.touch()
        with (
            monkeypatch.context() as patch,
            redirect_stdout(output),
            redirect_stderr(output),
            warnings.catch_warnings(),
        ):
            patch.setattr(sys, "argv", [module, *(str(results) if word == RESULTS else word for word in words)])
            patch.delenv("TRITON_INTERPRET", raising=False)
            warnings.filterwarnings("ignore", ".*found in sys.modules.*", RuntimeWarning)
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except (Exception, SystemExit) as problem:
                traceback.print_exc()
                status = 0 if isinstance(problem, SystemExit) and not problem.code else 1
        return Attempt(parts.ending(status), status, time.time() - begin, parts.read_lines(results), output.getvalue())

    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(Runner, "attempt", attempt)
