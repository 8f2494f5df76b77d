"""Every mistake that can be made in a kernel, a composed path or a module by itself is noticed by a small run of it.

``make test`` tries every eighth mutant of each kind of each module; ``CRATE_KERNELS_MUTANTS=all`` tries all of them, and
``python tests/mutation/results.py`` writes their table, ``RESULTS.md``.
"""

from __future__ import annotations

import os

import pytest
import torch
from mutation.cases import CASES, ready

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="looks into Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # mutants overflow
]

EVERY = 1 if os.environ.get("CRATE_KERNELS_MUTANTS") == "all" else 8
FUNCTIONS = [(case, function) for case in CASES for function in CASES[case].source.functions]


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    ready(monkeypatch)


@pytest.mark.parametrize(("case", "function"), FUNCTIONS, ids=["-".join(of) for of in FUNCTIONS])
def test_mutants_are_killed(case: str, function: str) -> None:
    mutants = [mutant for mutant in CASES[case].sample(EVERY) if mutant.function == function]
    wrong = []
    for found in CASES[case].hunt(mutants):
        print(found)
        if not found.is_right:
            wrong.append(found)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("case", CASES)
def test_every_function_is_run_and_every_exception_is_one(case: str) -> None:
    """A probe runs each function; each pattern of mutants that compute the same, or that none has to kill, fits one."""
    assert all(CASES[case].runs.values()), [name for name, probes in CASES[case].runs.items() if not probes]
    assert not CASES[case].stale()
