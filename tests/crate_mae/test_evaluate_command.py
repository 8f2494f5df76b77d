"""The evaluate command: its numbers, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("jsonargparse")  # lacking where nothing can be installed, as on some GPU machines

from tiny_runs import TINY, write_classes

import crate_mae
from crate_mae.analyzing import random_model
from crate_mae.classifiers import classifier_of
from crate_mae.cli import main
from crate_mae.data import CentreCropped, Normalization, labelled_parts
from crate_mae.evaluation import FeatureSpec, features_of, linear_probe, nearest_neighbours
from crate_mae.model import CrateMAE

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    return write_classes(tmp_path_factory.mktemp("evaluate") / "classes")


@pytest.fixture
def run(tmp_path) -> Path:
    torch.manual_seed(1)
    crate_mae.save_model(CrateMAE(TINY), tmp_path / "run", mean=MEAN, std=STD)
    return tmp_path / "run"


def written(out: Path) -> dict:
    return json.loads((out / "evaluation.json").read_text(), parse_constant=pytest.fail)


def test_the_numbers_are_those_of_the_features(run, classes, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    options = ["--data", str(classes), "--pool", "both", "--norm", "false", "--precision", "float32", "--seeds", "2"]
    assert main(["evaluate", str(run), *options, "--out", str(out), "--batch_size", "5"]) == 0
    printed = capsys.readouterr().out
    parts, normalization = labelled_parts(classes), Normalization(MEAN, STD, 3)
    spec = FeatureSpec("both", norm=False)

    def of(model: CrateMAE) -> list[torch.Tensor]:
        made = []
        for source in (parts.train, parts.test):
            images = CentreCropped(source, (32, 32))
            made.append(features_of(model, normalization(torch.stack([images[i] for i in range(len(images))])), spec))
            made.append(torch.from_numpy(source.labels).long())
        return made

    found, model = written(out), crate_mae.load_model(run)
    models = {("runs", str(run)): model} | {("untrained", f"seed {s}"): random_model(model, s) for s in range(2)}
    for (kind, name), each in models.items():
        for method, compute in (("knn", nearest_neighbours), ("linear", linear_probe)):
            # Batches of 5 round otherwise than all at once, which may turn a vote; of 12 images none did.
            assert found[kind][name][method]["top1"] == compute(*of(each)).top1
    assert [each["class"] for each in found["runs"][str(run)]["knn"]["classes"]] == ["brick", "grass", "water"]
    assert np.sum(found["runs"][str(run)]["linear"]["confusion"]) == 12
    assert found["images"] == {"train": 24, "test": 12}
    assert "24 images to learn from and 12 to test on, 3 classes" in printed and "top-1 untrained" in printed
    assert "brick" in printed and f"Look at {out}/evaluation.png" in printed
    with Image.open(out / "evaluation.png") as picture:
        assert picture.size[0] == 1600 and len(picture.convert("RGB").getcolors(2**24)) > 50


def test_features_are_kept_and_made_anew_where_anything_changed(run, classes, tmp_path, monkeypatch, capsys):
    times = []
    monkeypatch.setattr("crate_mae.evaluating.features_of", lambda *given: times.append(1) or features_of(*given))
    data = shutil.copytree(classes, tmp_path / "classes")
    command = ["evaluate", str(run), "--data", str(data), "--method", "knn", "--baseline", "none"]

    def batches(*more: str) -> int:
        times.clear()
        assert main([*command, *more]) == 0
        return len(times)

    assert [batches(), batches(), batches("--pool", "cls"), batches(), batches("--cache", "false")] == [2, 0, 2, 0, 2]
    (data / "test" / "brick" / "0.png").write_bytes(b"no image")
    capsys.readouterr()
    assert batches() == 1  # of the test images alone
    assert "1 of 12 images cannot be read (1 no image) and are left out" in capsys.readouterr().out
    assert batches() == 0
    assert "1 of 12 images cannot be read" in capsys.readouterr().out
    found = written(run)["runs"][str(run)]["knn"]["classes"]
    assert [each["images"] for each in found] == [3, 4, 4]


def test_several_runs_and_classifiers(run, classes, tmp_path, capsys):
    other = tmp_path / "other"
    classifier = classifier_of(crate_mae.load_model(run), 5)
    crate_mae.save_model(classifier, other, mean=MEAN, std=STD)
    command = ["evaluate", str(run), str(other), "--data", str(classes / "train"), "--test", str(classes / "test")]
    assert (
        main([*command, "--method", "linear", "--baseline", "none", "--norm", "false", "--out", str(tmp_path / "out")])
        == 0
    )
    assert "standard deviation over 2 runs" in capsys.readouterr().out
    found = written(tmp_path / "out")
    first, second = (found["runs"][str(each)]["linear"]["top1"] for each in (run, other))
    assert first == second and found["summary"]["linear"]["runs"]["standard_deviation"] == 0  # one encoder


def test_fine_tuning_is_taken_up_where_nothing_changed(run, classes, tmp_path, capfd):
    out = tmp_path / "out"
    command = ["evaluate", str(run), "--data", str(classes), "--method", "finetune", "--seeds", "1", "--out", str(out)]
    command += ["--base_lr", "0.02", "--num_workers", "0", "--precision", "float32", "--epochs"]

    def steps(epochs: int) -> list[int]:
        """Of what went before, where each of the two began."""
        capfd.readouterr()
        assert main([*command, str(epochs)]) == 0
        said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("finetune:")]
        return [int(line.split("from step ")[1].split()[0]) if "from step " in line else 0 for line in said]

    assert steps(12) == [0, 0]
    found = written(out)
    assert found["runs"][str(run)]["finetune"]["top1"] > 0.9  # three colours
    assert np.sum(found["runs"][str(run)]["finetune"]["confusion"]) == 12
    assert found["untrained"]["seed 0"]["finetune"]["chosen"] == {"epochs": 12}
    assert steps(12) == [12, 12]
    assert written(out) == found
    assert steps(2) == [0, 0]
    torch.manual_seed(2)
    crate_mae.save_model(CrateMAE(TINY), run)  # other weights in the same place
    assert steps(12) == [0, 12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "holds a model alone: name images with classes"),
        (["--data", "{classes}/train"], "no part to test on"),
        (["--data", "{classes}", "--layer", "2"], "--layer: expected 1 to 1, or -1 to -1 from the end, got 2"),
        (["--data", "{classes}", "--last", "2"], "--last: expected 1 to 1, the layers up to --layer -1, got 2"),
        (["--data", "{classes}", "--seeds", "0"], "--seeds: expected 1 or more, got 0"),
        (["--data", "{classes}", "--method", "svm"], "method: expected one of knn, linear, "),
        (
            ["--data", "{classes}", "--num_workers", "many"],
            "--num_workers: expected a whole number, or auto, got 'many'",
        ),
        (["{run}/", "--data", "{classes}", "--out", "{run}"], "the same one is given twice"),
        (["{classes}", "--data", "{classes}"], "--out: expected a folder for what is found of several runs"),
    ],
)
def test_mistakes_are_one_line(run, classes, arguments, message, capsys):
    assert main(["evaluate", str(run), *(each.format(run=run, classes=classes) for each in arguments)]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1
    assert not (run / "evaluation.json").exists()
