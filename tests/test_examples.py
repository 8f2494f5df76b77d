"""The examples: each runs in a process of its own, as a reader would start it, and says and writes what it promises."""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from support import small_model

import crate_mae
from crate_mae.data import FLOWERS, IMAGENET_STD

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))

NO_NETWORK = """
import sys

def refuse(event, arguments):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        raise OSError(f"an example wants the network: {event} {arguments[1:]}")

sys.addaudithook(refuse)
"""
"""Every process of an example comes by this when it starts."""


class Case(NamedTuple):
    """Arguments that make an example small, with {flowers} and {run} for what the fixtures make, and what is asserted of what it
    said and wrote."""

    arguments: str
    check: Callable[[str, Path], None]


def accelerated(said: str, folder: Path) -> None:
    assert "swapped 4 modules, left 0 alone" in said
    assert 0 < number("largest difference is ([^ ]+) of the norm", said) < 1e-4
    theirs, ours = (number(f"{name} ([0-9.]+) ms", said) for name in ("official", "accelerated"))
    slack = 0.01 + 0.06 * (1 / theirs + 1 / ours) * theirs / ours  # of three rounded numbers
    assert number("ms: ([0-9.]+) times as fast", said) == pytest.approx(theirs / ours, abs=slack)
    assert "made of the official classes again" in said


def learnt(said: str, folder: Path) -> None:
    losses = [float(loss) for loss in re.findall("loss ([0-9.]+)", said)]
    shares = [float(share) for share in re.findall("right at ([0-9.]+)%", said)]
    assert losses[0] > 0.5 and shares[0] < 70, "there was nothing to learn"
    assert losses[-1] < 0.1 and shares[-1] > 99.5
    assert said.rstrip().endswith("It has learnt to look back and count.")


def not_learnt(said: str, folder: Path) -> None:
    assert said.rstrip().endswith("It is not there yet: give it more --steps.")


def pretrained(said: str, folder: Path) -> None:
    errors = [row["val_loss"] for row in rows(folder / "runs/callback") if "val_loss" in row]
    assert len(errors) == 2
    assert f"went from {errors[0]:.4f} to {errors[-1]:.4f}" in said
    zeros = [int(share) for share in re.findall("after [0-9]+ steps ([0-9]+)% of the photograph's code", said)]
    assert len(zeros) == 2 and all(0 < share < 100 for share in zeros)
    with Image.open(folder / "runs/callback/photograph.png") as picture:
        shown = np.asarray(picture.convert("RGB"))
    assert shown.shape[1] > 3 * shown.shape[0] and len(np.unique(shown.reshape(-1, 3), axis=0)) > 1000


def searched(said: str, folder: Path) -> None:
    from crate_mae.embedding import read_embeddings

    embeddings = read_embeddings(folder / "runs/search/embeddings.npz")
    features = embeddings.features / np.linalg.norm(embeddings.features, axis=1, keepdims=True)
    names = ["/".join(Path(name).parts[-2:]) for name in embeddings.names]
    assert len(names) == 10
    query = "sunflowers/14266917699_91b207888e.jpg"
    assert f"Most like {query}:" in said
    cosines = dict(zip(names, features @ features[names.index(query)], strict=True))
    del cosines[query]
    wanted = sorted(cosines, key=cosines.get, reverse=True)[:3]
    assert re.findall(r"^  ([-0-9.]+)  (.+)$", said, re.MULTILINE) == [
        (f"{cosines[name]:.4f}", name) for name in wanted
    ]
    with Image.open(folder / "runs/search/neighbours.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 1000


def finetuned(said: str, folder: Path) -> None:
    out = folder / "runs/finetuned"
    top1 = [row["val_top1"] for row in rows(out) if "val_top1" in row][-1]
    assert f"Top-1 on 10 images not trained on: {top1:.1%}; chance is 20.0%." in said
    model, transform = crate_mae.load_model(out).eval(), crate_mae.load_transform(out)
    with Image.open(FLOWERS / "val/sunflowers/14266917699_91b207888e.jpg") as image, torch.no_grad():
        best, number = model(transform(image)[None]).softmax(-1)[0].max(0)
    found = re.findall(r"^ +([0-9.]+)%  ([a-z]+)$", said, re.MULTILINE)
    assert found[0][1] == sorted(path.name for path in (FLOWERS / "val").iterdir())[number]
    assert float(found[0][0]) == pytest.approx(100 * best.item(), abs=0.06)
    assert len({name for _, name in found}) == 3


def finetuned_from_random(said: str, folder: Path) -> None:
    assert said.startswith("No --init: from random weights")
    finetuned(said, folder)


def finetuned_from_run(said: str, folder: Path) -> None:
    assert "No --init" not in said and "from the weights of" in said
    settings = json.loads((folder / "runs/finetuned/config.json").read_text())
    assert settings["model"]["embed_dim"] == 32 and settings["images"]["mean"] == [0.5, 0.5, 0.5]
    finetuned(said, folder)


CASES = {
    "accelerate_official.py": [
        Case("--dim 64 --depth 2 --heads 2 --tokens 50 --batch 2 --repeats 1", accelerated),
    ],
    "own_model.py": [Case("", learnt), Case("--steps 1 --width 16 --depth 1", not_learnt)],
    "pretrain_with_callback.py": [Case("--data {flowers} --epochs 2", pretrained)],
    "embed_and_search.py": [Case("--epochs 1 --data {flowers}/val --count 3", searched)],
    "finetune.py": [
        Case("--data {flowers} --epochs 1", finetuned_from_random),
        Case("--data {flowers} --epochs 1 --init {run}", finetuned_from_run),
    ],
}
"""Of every example; one without an entry fails."""


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of the shipped photographs to learn from and two to validate on, of each class."""
    folder = tmp_path_factory.mktemp("flowers")
    for part, count in (("train", 4), ("val", 2)):
        for kind in sorted((FLOWERS / part).iterdir()):
            (folder / part / kind.name).mkdir(parents=True)
            photographs = sorted(
                kind.iterdir(), key=lambda path: (path.name != "14266917699_91b207888e.jpg", path.name)
            )
            for photograph in photographs[:count]:
                shutil.copy(photograph, folder / part / kind.name)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, saved with numbers by which no other example standardises images."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(0)
    crate_mae.save_model(small_model(), folder, mean=(0.5, 0.5, 0.5), std=IMAGENET_STD)
    return folder


@pytest.mark.parametrize(
    ("script", "number"),
    [(script, number) for script in SCRIPTS for number in range(len(CASES.get(script.name, "?")))],
    ids=lambda value: value.stem if isinstance(value, Path) else str(value),
)
def test_an_example_does_what_it_says(script: Path, number: int, flowers: Path, run: Path, tmp_path: Path) -> None:
    assert script.name in CASES, f"{script.name}: write a case for it in {Path(__file__).name}"
    case = CASES[script.name][number]
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(NO_NETWORK)
    folder = tmp_path / "work"
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (tmp_path / "site", EXAMPLES.parent)))
    arguments = [each.format(flowers=flowers, run=run) for each in shlex.split(case.arguments)]
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    case.check(done.stdout, folder)


def test_there_is_a_case_for_every_example_and_none_for_others() -> None:
    assert set(CASES) == {script.name for script in SCRIPTS}


def test_the_table_names_every_example() -> None:
    assert {command[1] for command in commands(EXAMPLES / "README.md")} == {f"examples/{each.name}" for each in SCRIPTS}


@pytest.mark.parametrize("file", [EXAMPLES / "README.md", *SCRIPTS], ids=lambda path: path.name)
def test_commands_that_are_told_are_understood(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Understood(Exception):
        pass

    def parse_and_stop(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise Understood

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    found = commands(file)
    assert found, f"{file.name} tells no command"
    for _, script, *arguments in found:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(Understood):
            runpy.run_path(str(EXAMPLES.parent / script), run_name="__main__")


def test_the_callback_ends_a_run_whose_error_no_longer_falls() -> None:
    watch = runpy.run_path(str(EXAMPLES / "pretrain_with_callback.py"))["Watch"](torch.zeros(1, 3, 16, 16))
    model = small_model()
    assert watch(5, {"loss": 1.0}, model) is False and watch.errors == []
    ended = [
        watch(step, {"val_loss": error}, model) for step, error in enumerate([3.0, 2.0, 2.1, 2.2, 1.9, 2.0, 2.0, 1.9])
    ]
    assert ended == [False] * 7 + [True]


def commands(file: Path) -> list[list[str]]:
    """Those that a page or a docstring tells, split as a shell splits them."""
    return [shlex.split(line, comments=True) for line in re.findall("python examples/[^`\n]+", file.read_text())]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def number(pattern: str, said: str) -> float:
    found = re.search(pattern, said)
    assert found, f"{pattern} is not in: {said}"
    return float(found[1])
