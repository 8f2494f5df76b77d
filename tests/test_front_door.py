"""What newcomers are told to do works: the worked example of an operator, and the public CI's and pre-commit's commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = re.compile(r"```py\n# (\S+?)(, added)?\n(.*?)```", re.DOTALL)


def test_the_worked_example_of_an_operator_works(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    shutil.copytree(ROOT / "crate_kernels", tmp_path / "crate_kernels")
    for name in ("pyproject.toml", "tests/conftest.py", "tests/quick_interpreter.py", "tests/support.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    written = FILES.findall((ROOT / "docs/adding-an-operator.md").read_text())
    assert len(written) == 8
    for name, added, text in written:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        assert file.exists() == bool(added), name
        file.write_text(file.read_text() + text if added else text)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/crate_kernels/test_hard_threshold.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_public_ci_and_pre_commit_run_what_the_makefile_runs() -> None:
    """The workflow makes what .ci/run makes; the hooks are the lines of `make lint`, without what they are run on."""
    yaml = pytest.importorskip("yaml")  # lacking where nothing can be installed, as on some GPU machines
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step.get("run", "").split() for job in workflow["jobs"].values() for step in job["steps"]]
    made = [words[:2] for words in steps if words[:1] == ["make"]]
    assert made == [line.split() for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("make ")]
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    lines = [line.strip().removesuffix(" .").replace("$(BIN)", ".venv/bin") for line in lint.splitlines()[1:]]
    assert [hook["entry"] for hook in repo["hooks"]] == lines
