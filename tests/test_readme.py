"""README: every command of crate-mae in it is one that the parsers take; the section on sharing runs as it stands, at toy size.

(Those of other sections run in the tests of what they are of: test_many_gpus, test_sources, test_recipes, test_makefile.)
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")  # lacking where nothing can be installed, as on some GPU machines

from tiny_runs import tiny_config

import crate_mae
from crate_mae.cli import OTHERS, TRAINING, main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHARING = README.partition("\n## Share and reuse")[2].partition("\n## ")[0]


def commands(text: str, program: str = "crate-mae") -> list[str]:
    """The lines of its blocks that give the command, without what follows a #."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [line.partition("   #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(f"{program} ")]


@pytest.mark.parametrize("command", commands(README))
def test_every_command_is_parsed(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path / "runs" / "base", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    Path("runs/base/states").mkdir(parents=True)
    crate_mae.save_model(crate_mae.CrateMAE(config.model), "runs/base")
    Path("runs/base/config.json").write_text(json.dumps(config.to_dict()))
    parsed = []
    for module in {*OTHERS.values(), *TRAINING.values()}:
        monkeypatch.setattr(module, "run", lambda parser, chosen: parsed.append(chosen.subcommand))
    _, *words = shlex.split(command)
    if "--help" in words:
        with pytest.raises(SystemExit, match=r"^0$"):
            main(words)
    else:
        assert main(words) == 0
        assert parsed == [words[0]]
