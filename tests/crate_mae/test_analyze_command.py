"""The analyze command: its numbers, its page, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageColor

pytest.importorskip("jsonargparse")  # lacking where nothing can be installed, as on some GPU machines

from tiny_runs import TINY, tiny_config, write_photographs

import crate_mae
from crate_mae.analysis import MEASURES, Analysis, Measured, analyze
from crate_mae.analyzing import analysis_lines, random_model, write_analysis
from crate_mae.cli import main
from crate_mae.data import CentreCropped, ImageFolder
from crate_mae.model import CrateMAE
from crate_mae.pictures.charts import Canvas, Series
from crate_mae.pictures.layers import layers_picture
from crate_mae.preprocessing import read_normalization
from crate_mae.training import pretrain


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of 3 epochs with states of all of them, moved after its end."""
    folder = tmp_path_factory.mktemp("analyze")
    config = tiny_config(folder / "run", write_photographs(folder / "photographs"))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, keep_states=3))
    pretrain(config)
    return (folder / "run").rename(folder / "moved")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def photographs_of(trained: Path) -> Path:
    return trained.parent / "photographs"


def test_the_numbers_are_those_of_the_models(trained, run, tmp_path, capsys):
    """Untrained, of two states and trained, on 5 of the 12 photographs; one state is damaged, and one is the trained model."""
    (run / "states" / "step_4.pt").write_bytes(b"")
    out = tmp_path / "new" / "folder"
    assert main(["analyze", str(run), "--states", "--images", "5", "--out", str(out), "--batch_size", "2"]) == 0
    printed = capsys.readouterr().out
    assert f"passed over {run}/states/step_4.pt: cannot read" in printed
    assert f"passed over {run}/states/step_12.pt: it is the trained model itself" in printed
    assert "5 of the 12 images that the run validated on" in printed and "trained for 3 of 3 epochs" in printed

    def no_number(text: str) -> None:
        raise AssertionError(text)

    written = json.loads((out / "analysis.json").read_text(), parse_constant=no_number)
    source = ImageFolder(photographs_of(trained))
    chosen = [0, 3, 6, 8, 11]
    assert written["images"]["names"] == [source.name(index) for index in chosen]
    assert written["definitions"] == {"measures": MEASURES, "eps": 0.01, "lambda": 0.1}
    assert written["versions"] == {"crate_mae": crate_mae.__version__, "torch": torch.__version__}

    cropped = CentreCropped(source, (32, 32))
    images = read_normalization(run)(torch.stack([cropped[index] for index in chosen]))
    model = crate_mae.load_model(run)
    of_state = CrateMAE(model.config)
    of_state.load_state_dict(torch.load(run / "states" / "step_8.pt", weights_only=True)["model"])
    models = {"untrained": random_model(model), "epoch 2": of_state, "trained": model}
    assert list(written["models"]) == list(models)
    for name, each in models.items():
        expected = analyze(each, [images]).to_dict()
        found = written["models"][name]
        assert found["images"] == 5
        for stack in ("encoder", "decoder"):
            assert found[stack].keys() == expected[stack].keys()
            for measure, values in expected[stack].items():
                for moment in ("mean", "std"):
                    np.testing.assert_allclose(found[stack][measure][moment], values[moment], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("{run}/nowhere", "RUN: expected the folder of a run, got {run}/nowhere, which is not there"),
        ("{other}/config.json", "RUN: expected the folder of a run, got {other}/config.json, a file"),
        ("{unsaved}", "RUN: {unsaved} has no model.safetensors: its run has not saved yet"),
        ("{run}/best", "{run}/best holds a model alone, without images: name some by --data"),
        ("{run}/best --data {photographs} --states", "{run}/best holds a model alone, without states"),
        ("{run} --data {run}/nowhere", "--data: no such folder of images"),
        ("{run} --data {run}/states", "--data: "),
        ("{run} --images 0", "--images: expected 1 or more, got 0"),
        ("{run} --batch_size 0", "--batch_size: expected 1 or more, got 0"),
        ("{run} --out {run}/config.json", "--out {run}/config.json: {run}/config.json is a file"),
        ("{run} --device cuda:77", "--device: expected auto or one of cpu"),
        ("{run} --state", "did you mean --states?"),
        ("{large} --data {photographs}", "{large}: the trained model: blocks.0.layers.0: "),
        ("{other} --data {photographs}", "{other}/model.safetensors: "),
    ],
)
def test_mistakes_are_one_line(trained, tmp_path, capsys, arguments, says):
    model = CrateMAE(TINY)
    shift = dict(mean=[0.5] * 3, std=[0.5] * 3)
    crate_mae.save_model(model, tmp_path / "other", **shift)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["model"]["depth"] = 2
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with torch.no_grad():  # finite, and with products that are not
        model.blocks[0].layers[0][0].fn.qkv.weight.fill_(3e38)
    crate_mae.save_model(model, tmp_path / "large", **shift)
    shutil.copytree(tmp_path / "other", tmp_path / "unsaved", ignore=shutil.ignore_patterns("model.*"))
    names = dict(run=trained, photographs=photographs_of(trained))
    names |= {name: tmp_path / name for name in ("large", "other", "unsaved")}
    assert main(["analyze", *arguments.format(**names).split()]) == 2
    error = capsys.readouterr().err
    assert says.format(**names) in error and error.count("\n") == 1
    assert not (trained / "analysis.json").exists()


def test_without_other_states_it_says_what_keeps_them(run, capsys):
    for step in (4, 8):
        (run / "states" / f"step_{step}.pt").unlink()
    assert main(["analyze", str(run), "--states", "--images", "2", "--untrained", "false"]) == 0
    assert f"there is no other state in {run}/states to show; --run.save_every" in capsys.readouterr().out


def test_a_model_alone_and_images_that_cannot_be_read(trained, tmp_path, capsys):
    photographs = shutil.copytree(photographs_of(trained), tmp_path / "photographs")
    (photographs / "03.png").write_bytes(b"no image")
    model = shutil.copytree(trained / "best", tmp_path / "model")
    arguments = ["analyze", str(model), "--data", str(photographs), "--untrained", "false"]
    assert main(arguments) == 0
    assert "1 of 12 images cannot be read (1 no image) and are left out" in capsys.readouterr().out
    written = json.loads((model / "analysis.json").read_text())
    assert list(written["models"]) == ["trained"] and written["models"]["trained"]["images"] == 11
    assert written["images"]["unreadable"] == 1
    for path in photographs.iterdir():
        path.write_bytes(b"")
    assert main(arguments) == 2
    assert "--data: 12 of 12 images cannot be read (12 empty)" in capsys.readouterr().err
    assert json.loads((model / "analysis.json").read_text()) == written


def analysis_of(depth: int, decoder_depth: int, heads: int, *, images: int = 2) -> Analysis:
    sizes = dict(depth=depth, decoder_depth=decoder_depth, num_heads=heads, decoder_num_heads=heads)
    torch.manual_seed(depth)
    return analyze(CrateMAE(dataclasses.replace(TINY, **sizes)), [torch.randn(images, 3, 16, 16)])


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ((2, 1, 2), ["untrained", "epoch 1", "step 7", "trained"]),
        ((1, 0, 1), ["trained"]),
        ((0, 1, 2), ["mine"]),
        ((24, 2, 32), ["trained"]),
    ],
    ids=str,
)
def test_each_model_has_a_colour(sizes, names):
    """Also of one image, which has no deviation, of one head, and of one layer, which no line joins."""
    analyses = {name: analysis_of(*sizes, images=1 + place) for place, name in enumerate(names)}
    pixels = np.asarray(layers_picture(analyses, caption="a caption of any length " * 20))
    colours = {
        "trained": "#1766a6",
        "untrained": "#8a8a8a",
        "mine": "#1766a6",
        "epoch 1": "#cfe0ee",
        "step 7": "#73a3ca",
    }
    for name in names:
        of_name = (pixels == ImageColor.getrgb(colours[name])).all(-1)
        assert of_name[150:].any(), name  # below the legend


@pytest.mark.parametrize("together", [True, False])
def test_markers_are_where_the_values_are(together):
    canvas = Canvas(300, 200)
    colours = ("#ff0000", "#00ff00", "#0000ff")
    first = [Series([value], (), colour, "square") for value, colour in zip((0.0, 100.0, 50.0), colours, strict=True)]
    canvas.profiles((20, 20, 280, 140), {"one": first, "two": [Series([0.0], [8.0], "#000000")]}, together=together)
    pixels = np.asarray(canvas.finished())
    low, high, middle = (np.argwhere((pixels == ImageColor.getrgb(colour)).all(-1)).mean(0)[0] for colour in colours)
    assert low - middle == pytest.approx(middle - high, abs=1)
    span = 108 if together else 100  # of all values and whiskers
    assert low - high == pytest.approx(120 * 100 / (1.12 * span), abs=1)


def test_what_is_said_follows_the_numbers():
    def made(after: list[float], zeros: list[float]) -> Analysis:
        names = ("coding_rate_after", "token_coding_rate", "effective_rank", "coherence")
        values = dict.fromkeys(names, after) | {"coding_rate_before": [4.0] * len(after), "zeros": zeros}
        spread = [0.0] * len(after)
        return Analysis(1, {"encoder": {name: Measured(value, spread) for name, value in values.items()}})

    down, up, one = made([3, 5, 1], [0.1, 0.2, 0.3]), made([2, 3, 6], [0.3, 0.1, 0.3]), made([5], [0.5])
    said = analysis_lines({"trained": down, "untrained": up})
    assert said[-2] == (
        "In the trained encoder MSSA lowers R^c in 2 of 3 layers; from layer 1 to 3, R^c after MSSA falls from 3.0 to 1.0 "
        "(in 1 of 2 steps), and the share of zeros rises from 10.0% to 30.0% (in 2 of 2 steps)."
    )
    assert "R^c after MSSA rises from 2.0 to 6.0 (in 2 of 2 steps), and the share of zeros ends as it began" in said[-1]
    assert [line.split()[:4] for line in said[1:3]] == [
        ["encoder", "layer", "1", "trained"],
        ["untrained", "4.0", "2.0", "2.0"],
    ]
    assert analysis_lines({"mine": one})[-1] == (
        "In the mine encoder MSSA lowers R^c in 0 of 1 layers; one layer has no trend with depth."
    )


def test_two_may_write_at_once(tmp_path, monkeypatch):
    """The second comes while the first writes."""
    analyses, second = {"trained": analysis_of(1, 0, 2)}, iter([True])

    class Picture:
        def save(self, file, format):
            if next(second, False):
                write_analysis(tmp_path, analyses, caption="", about={"which": 2})
            file.write(b"picture")

    monkeypatch.setattr("crate_mae.analyzing.layers_picture", lambda *_, **__: Picture())
    numbers, picture = write_analysis(tmp_path, analyses, caption="", about={"which": 1})
    assert json.loads(numbers.read_text())["which"] == 1 and picture.read_bytes() == b"picture"
    assert sorted(tmp_path.iterdir()) == [numbers, picture]


def test_what_is_no_number_is_not_written(tmp_path):
    good, bad = analysis_of(1, 0, 2), analysis_of(1, 0, 2)
    paths = write_analysis(tmp_path, {"trained": good}, caption="", about={})
    before = [path.read_bytes() for path in paths]
    bad.stacks["encoder"]["l1"].mean[0] = math.nan
    with pytest.raises(ValueError, match="JSON"):
        write_analysis(tmp_path, {"trained": bad}, caption="", about={})
    assert [path.read_bytes() for path in paths] == before
