"""README and docs/: every command is parsed, every Python snippet runs at toy size, every link leads somewhere.

The snippets of a page share one namespace and run in their order, in a folder that has what they name: a run,
photographs, official weights. A snippet that cannot run here has a comment ``<!-- not run: why -->`` on the line
above it.

(Some commands are also run: those on sharing here, others in test_many_gpus, test_sources, test_recipes and test_makefile.)
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import official
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("jsonargparse")  # lacking where nothing can be installed, as on some GPU machines

from tiny_runs import TINY, tiny_config, write_photographs

import crate_mae
from crate_mae.cli import OTHERS, TRAINING, main

ROOT = Path(__file__).resolve().parents[1]
README, PAGES = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))


class Block(NamedTuple):
    """A fenced block, and why it is not run, if it is not."""

    language: str
    text: str
    not_run: str | None


def blocks(text: str) -> list[Block]:
    found = re.findall(r"^(?:<!-- not run: (.+?) -->\n)?^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [Block(language, body, why or None) for why, language, body in found]


def lines(text: str) -> list[str]:
    """Those of all blocks that are not Python, without the comments behind them."""
    return [
        line.partition("   #")[0].strip()
        for block in blocks(text)
        if block.language != "python"
        for line in block.text.splitlines()
    ]


def commands(text: str) -> list[str]:
    """Those of crate-mae, torchrun's too: whole lines of blocks, and code in sentences that has options."""
    inline = re.findall(r"`(crate-mae \w+ --[^`\n]+)`", text)
    told = [re.sub(r"^torchrun .*-m crate_mae ", "crate-mae ", line) for line in lines(text)]
    return [line for line in [*told, *inline] if line.startswith("crate-mae ")]


# README


def test_the_readme_is_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 700
    assert text.count("\n```") == 2 * 4, "four snippets"
    assert text.count("<!-- headline: begin -->") == text.count("<!-- headline: end -->") == 1


@pytest.mark.parametrize("start", [README, ROOT / "docs" / "index.md"], ids=lambda page: page.name)
def test_every_page_is_linked_from(start: Path) -> None:
    linked = {(start.parent / link.partition("#")[0]).resolve() for link in links(start)}
    assert not {page for page in PAGES if page != start} - linked


def test_every_page_is_in_the_navigation() -> None:
    def names(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for part in (entry.values() if isinstance(entry, dict) else entry) for name in names(part)]

    assert sorted(names(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == [page.name for page in PAGES]


# Links


def prose(page: Path) -> str:
    """The page without code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[\[\]()]", "", code[0]), text)


def links(page: Path) -> list[str]:
    """The relative ones."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not re.match(r"\w+:", link)]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MkDocs name them."""
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ (.*)$", prose(page), re.M)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_link_leads_to_a_file_and_a_heading_or_line_of_it() -> None:
    listing = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not in a git repository, whose files are looked through")
    broken, count = [], 0
    for page in (ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()):
        for link in links(page):
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            count += 1
            if not target.exists():
                found = False
            elif target.suffix == ".md":
                found = not anchor or anchor in anchors(target)
            else:
                line = re.fullmatch(r"L(\d+)", anchor)
                found = not anchor or (line and 0 < int(line[1]) <= len(target.read_text().splitlines()))
            if not found:
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert count > 100 and not broken, "\n".join(broken)


# Commands


def test_names_said_to_be_in_a_file_are_there() -> None:
    """As "[file](path): `name`, `name`", and "`name` ([file](path))"."""
    listed, told = r"\]\((\S+?\.py)\): ((?:`\w+`(?:, )?)+)", r"(`\w+`) \(\[[^]]*\]\((\S+?\.py)\)"
    said = [
        (page, page.parent / file, name)
        for page in [README, *PAGES]
        for file, names in [
            *re.findall(listed, page.read_text()),
            *(found[::-1] for found in re.findall(told, page.read_text())),
        ]
        for name in re.findall(r"\w+", names)
    ]
    assert len(said) > 20
    assert [one for one in said if not re.search(rf"\b{one[2]}\b", one[1].read_text())] == []


@pytest.fixture(scope="module")
def of_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what commands are parsed against: the settings and weights of a run."""
    folder = tmp_path_factory.mktemp("parsed")
    config = tiny_config(folder / "runs" / "base", folder / "photos")
    (folder / "runs" / "base" / "states").mkdir(parents=True)
    crate_mae.save_model(crate_mae.CrateMAE(config.model), config.out)
    (config.out / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


ALL_COMMANDS = sorted({command for page in [README, *PAGES] for command in commands(page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_every_command_is_parsed(command: str, of_a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(of_a_run)
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


def test_other_commands_name_targets_and_modules_that_exist() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in [README, *PAGES])
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    modules = set(re.findall(r"python -m ([\w.]+)", text))
    assert {"demo", "test"} <= set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= targets
    assert modules and not {name for name in modules if importlib.util.find_spec(name) is None}


# Snippets


def pretrain_briefly(config: crate_mae.PretrainConfig, **options: Any) -> None:
    """``crate_mae.pretrain`` of the same settings, but for a small model and few steps."""
    small = tiny_config(config.out, Path(config.data))
    run = dataclasses.replace(config.run, device="cpu", precision="float32", threads=1, pictures=2)
    crate_mae.training.pretrain(
        dataclasses.replace(config, model=TINY, schedule=small.schedule, images=small.images, run=run), **options
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, photographs, and official weights, of models of the published widths with one layer."""
    folder = tmp_path_factory.mktemp("made")
    config = tiny_config(folder / "runs" / "base", write_photographs(folder / "photos"))
    crate_mae.training.pretrain(dataclasses.replace(config, model=dataclasses.replace(TINY, depth=2)))
    shutil.copytree(folder / "runs" / "base", folder / "runs" / "demo")
    shutil.copy(folder / "photos" / "00.png", folder / "photo.jpg")
    official_mae = crate_mae.create_model("crate_mae_base", depth=1, decoder_depth=1)
    torch.save({"model": official_mae.state_dict(), "epoch": 800}, folder / "official.pth")
    torch.save({"model": crate_mae.create_model("crate_base", depth=1).state_dict()}, folder / "crate_base.pth")
    for place in ("shared", "models", "path/of/this"):
        (folder / place).mkdir(parents=True)
    (folder / "path/of/this/repository").symlink_to(ROOT)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the snippets of a page run: what was made is there, and all models have one layer."""
    for models, depths in ((crate_mae.MODELS, ("depth", "decoder_depth")), (crate_mae.CLASSIFIERS, ("depth",))):
        for name, config in models.items():
            monkeypatch.setitem(models, name, dataclasses.replace(config, **dict.fromkeys(depths, 1)))
    monkeypatch.setattr(crate_mae, "pretrain", pretrain_briefly)
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "folder", symlinks=True))
    return Path.cwd()


def of_operators() -> dict[str, Any]:
    heads, width = 12, 24
    norms = {f"{name}{number}": torch.ones(width) for name in ("gamma", "beta") for number in ("", 1, 2, 3, 4)}
    weights = {
        "qkv_weight": torch.randn(width, width) / width**0.5,
        "out_weight": torch.randn(width, width) / width**0.5,
        "weight": torch.randn(width, width) / width**0.5,
        "D": torch.randn(width, 4 * width) / width**0.5,
        "D1": torch.randn(width, 4 * width) / width**0.5,
    }
    tokens = {"x": torch.randn(2, 5, width), "w": torch.randn(2, heads, 5, 2), "lengths": torch.tensor([5, 3])}
    tokens |= {
        "visible": torch.rand(2, 5) > 0.3,
        "ends": torch.tensor([0, 2, 5]),
        "temperature": torch.rand(heads) + 0.1,
    }
    return {**tokens, **weights, **norms, "out_bias": torch.randn(width)}


def of_sharing() -> dict[str, Any]:
    kernel = ["-m", "tools.hub_kernel", "--out", Path("runs/hub_kernel").resolve()]
    subprocess.run([sys.executable, *kernel], cwd=ROOT, check=True, capture_output=True)
    crate_mae.export("runs/base", format="onnx")
    return {"images": torch.randn(2, 3, 32, 48), "official_model": official.Model()}


def of_inside() -> dict[str, Any]:
    pixels = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    model = crate_mae.load_model("runs/demo")
    return {"w": torch.randn(2, 4, 9, 8), "model": model, "images": torch.randn(2, 3, 32, 48), "pixels": pixels}


# What the snippets of a page take for granted.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": lambda: {"model": official.Model(), "images": torch.randn(2, 3, 32, 32)},
    "adopting.md": lambda: {"model": official.Model()},
    "operators.md": of_operators,
    "models.md": lambda: {"images": torch.randn(2, 3, 224, 224)},
    "inside.md": of_inside,
    "sharing.md": of_sharing,
}
NEEDS = {"sharing.md": ("huggingface_hub", "kernels", "onnxruntime")}


def check_readme(names: dict[str, Any], printed: str) -> None:
    assert names["tokens"].shape == (2, 1 + 16, TINY.embed_dim)
    check_adopting(names, printed)


def check_adopting(names: dict[str, Any], printed: str) -> None:
    assert "swapped 6 modules, left 0 alone" in printed and not names["swapped"].swapped


def check_operators(names: dict[str, Any], printed: str) -> None:
    assert names["y"].shape == names["a"].shape == (2, 5, 24) and names["y"].isfinite().all()
    assert names["out"].shape == names["w"].shape and names["out"].isfinite().all()


def check_models(names: dict[str, Any], printed: str) -> None:
    assert names["logits"].shape == (2, 10) and names["model"].num_classes == 100


def check_pre_training(names: dict[str, Any], printed: str) -> None:
    assert len(names["errors"]) == 3 and Path("runs/mine/metrics.csv").exists()


def check_inside(names: dict[str, Any], printed: str) -> None:
    rates = crate_mae.analysis.coding_rate(names["w"].double())
    assert names["rates"].shape == (2, 4) and torch.equal(names["rates"], rates)
    assert names["colours"].min() >= 0 and names["colours"].max() <= 1


def check_sharing(names: dict[str, Any], printed: str) -> None:
    assert names["transform"](Image.open("photo.jpg")).shape == (3, 32, 32)
    assert Path("shared/again/README.md").read_text().count("## ") == 4  # use, data, recipe, curves
    assert len(names["names"]) == 12
    assert crate_mae.load_model("models/official").config.lambd == 0.5
    sent = {path.name for path in Path("sent/user/crate-mae-base").iterdir()}
    assert sent == {path.name for path in Path("shared/base").iterdir()}
    expected = crate_mae.load_model("runs/base").encode(names["images"]).detach()
    assert abs(names["tokens"] - expected.numpy()).max() < 1e-5 * max(1.0, expected.abs().max().item())
    assert json.loads(names["about"])["patch_size"] == 8
    assert type(names["model"]) is crate_mae.CrateMAE
    assert "swapped 6 modules, left 0 alone" in printed


CHECKS: dict[str, Callable[[dict[str, Any], str], None]] = {
    "README.md": check_readme,
    "adopting.md": check_adopting,
    "operators.md": check_operators,
    "models.md": check_models,
    "pre-training.md": check_pre_training,
    "inside.md": check_inside,
    "sharing.md": check_sharing,
}


def take_uploads(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """A folder in the hub's place."""

    def upload_folder(api: object, *, repo_id: str, folder_path: Path, **options: object) -> str:
        shutil.copytree(folder_path, place / repo_id, dirs_exist_ok=True)
        return f"https://huggingface.co/{repo_id}/commit/1"

    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda api, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)


WITH_PYTHON = [page for page in [README, *PAGES] if any(b.language == "python" for b in blocks(page.read_text()))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_snippets_run(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the page on sharing the commands, too, which write what its snippets read."""
    for module in NEEDS.get(page.name, ()):
        pytest.importorskip(module)
    text = page.read_text(encoding="utf-8")
    names = GIVEN.get(page.name, dict)()
    if page.name == "sharing.md":
        take_uploads(monkeypatch, folder / "sent")
        for command in commands(text):
            assert main(shlex.split(command)[1:]) == 0, command
    for number, block in enumerate(each for each in blocks(text) if each.language == "python" and not each.not_run):
        exec(compile(block.text, f"{page.name}, snippet {number + 1}", "exec"), names)
    if page.name in CHECKS:
        CHECKS[page.name](names, capsys.readouterr().out)


def test_few_snippets_are_not_run() -> None:
    assert blocks("<!-- not run: no GPU -->\n```python\n1 / 0\n```\n") == [Block("python", "1 / 0\n", "no GPU")]
    texts = [page.read_text(encoding="utf-8") for page in [README, *PAGES]]
    found = [block for text in texts for block in blocks(text)]
    assert sum(text.count("```python") for text in texts) == sum(block.language == "python" for block in found)
    assert sum(block.not_run is not None for block in found) <= 5
