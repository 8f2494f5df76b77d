"""README: every command of crate-mae in it is one that the parsers take; the section on sharing runs as it stands, at toy size.

(Those of other sections run in the tests of what they are of: test_many_gpus, test_sources, test_recipes, test_makefile.)
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import official
import pytest
import torch
from PIL import Image

pytest.importorskip("jsonargparse")  # lacking where nothing can be installed, as on some GPU machines

from tiny_runs import tiny_config, write_photographs

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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands of the section on sharing are given: there are a run, photographs and an official checkpoint."""
    config = tiny_config(tmp_path / "runs" / "base", write_photographs(tmp_path / "photos"))
    crate_mae.pretrain(config)
    trained = crate_mae.create_model("crate_mae_tiny", depth=1, decoder_depth=1)
    torch.save({"model": trained.state_dict(), "epoch": 800}, tmp_path / "official.pth")
    monkeypatch.chdir(tmp_path)
    Path("shared").mkdir()
    Path("models").mkdir()
    return tmp_path


def test_commands_and_snippets_on_sharing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All, in their order; the hub's place takes a folder, ``sent``."""
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("onnxruntime")

    def upload_folder(api: object, *, repo_id: str, folder_path: Path, **options: object) -> str:
        shutil.copytree(folder_path, folder / "sent" / repo_id, dirs_exist_ok=True)
        return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(hub.HfApi, "create_repo", lambda api, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    for command in commands(SHARING):
        assert main(shlex.split(command)[1:]) == 0, command
    sharing, exported, _ = re.findall(r"```python\n(.*?)```", SHARING, re.DOTALL)
    names: dict[str, Any] = {}
    exec(sharing, names)
    assert names["transform"](Image.open(next(Path("photos").iterdir()))).shape == (3, 32, 32)
    assert Path("shared/again/README.md").read_text().count("## ") == 4  # use, data, recipe, curves
    assert len(crate_mae.read_embeddings("photos.npz").names) == 12
    assert crate_mae.load_model("models/official").config.lambd == 0.5
    assert {path.name for path in Path("sent/user/crate-mae-base").iterdir()} == {
        path.name for path in Path("shared/base").iterdir()
    }
    crate_mae.export("runs/base", format="onnx")
    images = torch.randn(2, 3, 32, 48)
    names = {"images": images}
    exec(exported, names)
    expected = crate_mae.load_model("runs/base").encode(images).detach()
    assert abs(names["tokens"] - expected.numpy()).max() < 1e-5 * max(1.0, expected.abs().max().item())
    assert json.loads(names["about"])["patch_size"] == 8


def test_without_installing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("kernels")
    *_, snippet = re.findall(r"```python\n(.*?)```", SHARING, re.DOTALL)
    [told] = re.findall(r"python (-m tools\.hub_kernel --out) (runs/hub_kernel)", snippet)
    subprocess.run([sys.executable, *told[0].split(), folder / told[1]], cwd=ROOT, check=True)
    names: dict[str, Any] = {"official_model": official.Model()}
    exec(snippet.replace("path/of/this/repository", str(ROOT)).replace("crate_mae_base", "crate_mae_tiny"), names)
    assert type(names["model"]) is crate_mae.CrateMAE
    assert "swapped 6 modules, left 0 alone" in capsys.readouterr().out
