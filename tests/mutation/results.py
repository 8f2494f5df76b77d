"""Tries all mutants and writes what became of them, a row a module and a column a kind, on the standard output.

python tests/mutation/results.py > tests/mutation/RESULTS.md
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]  # as pytest has it

import pytest  # noqa: E402
import torch  # noqa: E402
from mutation.cases import CASES, ready  # noqa: E402

KINDS = (
    "signs", "terms", "accumulation", "factors", "masks", "comparisons", "branches", "flags", "operands", "order", "names",
    "functions", "casts", "walks",
)  # fmt: skip


def row(case: str) -> str:
    """Of each kind how many are killed; after "=" how many compute the same; after "-" how many live of those that no probe has
    to kill: they change memory, work or rounding, or another test asks for what they change (`cases.py` says which); after "!"
    all others that live, which no row may have."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    tried = set(CASES[case].mutants)
    with pytest.MonkeyPatch.context() as monkeypatch:
        ready(monkeypatch)
        for found in CASES[case].hunt(CASES[case].source.mutants):
            lives = "=" if found.reason else "!" if found.mutant in tried else "-"
            counts[found.mutant.kind]["" if found.killed else lives] += 1
    counts["all"] = sum(counts.values(), Counter())
    cells = [
        " ".join(f"{sign}{count[sign]}" for sign in ("", "=", "-", "!") if count[sign]) for count in counts.values()
    ]
    return f"| {case} | {' | '.join(cells)} |"


if __name__ == "__main__":
    heads = ["module", *KINDS, "all"]
    print(f"# What became of all mutants\n\n{inspect.getdoc(row)}\n")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    with ProcessPoolExecutor(int(os.environ.get("PROCESSES", 2))) as pool:
        print(*pool.map(row, CASES), sep="\n")
