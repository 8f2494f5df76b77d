"""The Makefile's targets for machines with a GPU: which Python they take, and what they say where it has no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(root: Path, *arguments: str, **pythons: str) -> subprocess.CompletedProcess[str]:
    """make in a folder with nothing but the Makefile and these Pythons, which are shell scripts: at_hand, venv, named."""
    shutil.copy(ROOT / "Makefile", root)
    places = {"at_hand": "bin/python3", "venv": ".venv/bin/python", "named": "named"}
    for name, script in pythons.items():
        path = root / places[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    variables["PATH"] = os.pathsep.join([str(root / "bin"), variables["PATH"]])
    return subprocess.run(["make", "--silent", *arguments], cwd=root, env=variables, capture_output=True, text=True)


TARGETS = pytest.mark.parametrize("target", ["gpu-all", "gpu-check", "gpu-bench", "gpu-bench-full"])


@TARGETS
@pytest.mark.parametrize("there", [["at_hand"], ["at_hand", "venv"], ["at_hand", "venv", "named"]], ids=lambda t: t[-1])
def test_the_python_named_or_of_the_environment_or_at_hand(tmp_path: Path, target: str, there: list[str]) -> None:
    named = ["PYTHON=./named"] if "named" in there else []
    result = make(tmp_path, target, *named, **{name: f"echo {name} $@" for name in there})
    program = f"-m benchmarks.{target[:9].replace('-', ' ')}" + " --full" * target.endswith("full")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == f"{there[-1]} {program}"


@TARGETS
def test_a_missing_torch_is_one_line(tmp_path: Path, target: str) -> None:
    result = make(tmp_path, target, at_hand="echo Traceback >&2; exit 1")
    said = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert result.returncode != 0 and len(said) == 1, result.stderr
    assert "python3 cannot import torch" in said[0]


def test_make_test_says_how_long_it_takes() -> None:
    planned = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True).stdout
    assert planned.index("minutes on two idle cores") < planned.index("-m pytest")
