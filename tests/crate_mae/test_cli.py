"""The crate-mae command."""

from __future__ import annotations

import copy
import dataclasses
import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("jsonargparse")  # lacking where nothing can be installed, as on some GPU machines

import crate_mae
import crate_mae.__main__
from crate_mae.cli import COMMANDS, main
from crate_mae.cli.errors import outcome
from crate_mae.config import ModelConfig
from crate_mae.data import ImageFolder, LostWorkers
from crate_mae.data.reading import open_file, part
from crate_mae.model import CrateMAE
from crate_mae.preprocessing import read_normalization
from crate_mae.training import (
    PretrainConfig,
    RunConfig,
    RunStopped,
    ScheduleConfig,
    Validation,
    build_optimizer,
    demo_config,
)
from crate_mae.training.interrupts import EndedAtOnce
from crate_mae.training.precision import check_workers
from crate_mae.training.run_folder import has_state
from crate_mae.training.states import saved_states

SMALLEST = ModelConfig(
    img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, decoder_depth=1, decoder_num_heads=2
)
TINY = [
    *("--model.img_size", "32", "--model.patch_size", "8", "--model.embed_dim", "32"),
    *("--model.depth", "1", "--model.num_heads", "2", "--model.decoder_depth", "1", "--model.decoder_num_heads", "2"),
    *("--schedule.epochs", "2", "--schedule.warmup_epochs", "1", "--schedule.batch_size", "4"),
    *("--run.device", "cpu", "--run.precision", "float32", "--run.threads", "1"),
    *("--run.save_every", "1", "--run.pictures", "1", "--images.num_workers", "0"),
]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    for index in range(8):
        path = folder / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(autouse=True)
def few_encoders_with_random_weights(monkeypatch):
    """The demo's end takes most of its time for them."""
    monkeypatch.setattr("crate_mae.demo.RANDOM_SEEDS", range(2))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def run(photographs: Path, out: Path):
    def run_pretrain(*more: str) -> int:
        folders = ["--data", str(photographs), "--val", str(photographs), "--out", str(out)]
        return main(["pretrain", *folders, *TINY, *more])

    return run_pretrain


def saved_config(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())


def test_pretrains_and_says_where_and_how_well(run, out, capsys):
    assert run() == 0
    printed = capsys.readouterr().out
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert str(out / "reconstructions.png") in printed
    assert f"{last['val_loss']:.4f}" in printed
    assert f"{last['mean_fill_loss']:.4f}" in printed
    assert f"{last['blur_loss']:.4f}   (sigma {last['blur_sigma']:g} pixels)" in printed
    assert f"{last['val_loss'] / last['blur_loss'] - 1:+.0%}" in printed
    assert not (out / "summary.png").exists()


@pytest.mark.parametrize("classes", [True, False], ids=["classes", "no classes"])
def test_the_demo_ends_with_what_was_learnt(photographs, out, capsys, classes):
    train = photographs if classes else photographs / "class0"
    assert main(["demo", "--data", str(train), "--val", str(photographs), "--out", str(out), *TINY]) == 0
    printed = capsys.readouterr().out
    assert ("photographs in 2 classes" in printed) == ("linear probe" in printed) == classes
    page = Image.open(out / "summary.png")
    assert page.width == 1600
    # The charts are on the right, the first original from (40, 132).
    shown = np.asarray(page)[140:280, 50:190].astype(float)
    original = np.asarray(Image.open(photographs / "class0" / "0.png").crop((2, 0, 38, 36)).resize((164, 164)))
    assert abs(shown.mean() - original.mean()) < 20 and shown.std() > 20
    assert len({tuple(pixel) for pixel in np.asarray(page)[200:400, 900:1500].reshape(-1, 3)}) > 3
    analysis = json.loads((out / "analysis.json").read_text())
    assert analysis["images"]["count"] == len(ImageFolder(photographs)) and {*analysis["models"]} == {
        "trained",
        "untrained",
    }
    zeros = analysis["models"]["trained"]["encoder"]["zeros"]["mean"]
    assert f"{zeros[0]:.1%}" in printed and str(out / "analysis.png") in printed
    assert "0.png" in (out / "inside" / "index.html").read_text() and str(out / "inside" / "index.html") in printed
    (out / "inside" / ".path_9.png.partial").write_bytes(b"of one that was killed")
    (out / "inside" / "notes.txt").write_bytes(b"of the user")
    assert main(["demo", "--out", str(out), "--data", str(train), "--val", str(photographs), *TINY, "--overwrite"]) == 0
    assert [path.name for path in (out / "inside").iterdir() if path.suffix not in (".png", ".html")] == ["notes.txt"]


def test_the_demo_ends_without_images_that_it_did_not_come_to(photographs, out):
    shutil.copytree(photographs, val := out.parent / "val")
    images = ImageFolder(photographs)
    images.path(images.epoch(0, 0)[1][-1]).write_bytes(b"spoilt")
    steps = ["--schedule.epochs=1", "--schedule.warmup_epochs=0", "--schedule.batch_size=7", "--run.seed=0"]
    assert main(["demo", "--data", str(photographs), "--val", str(val), "--out", str(out), *TINY, *steps]) == 0
    assert (out / "summary.png").exists() and not (out / "unreadable.txt").exists()


def test_a_runs_config_repeats_it_and_options_go_over_it(run, out, tmp_path):
    assert run("--model.lambd", "0.3", "--optimizer.base_lr", "1e-3") == 0
    again = tmp_path / "again"
    config = str(out / "config.json")
    assert main(["pretrain", "--config", config, "--out", str(again), "--run.seed", "0"]) == 0
    assert saved_config(again) == {**saved_config(out), "out": str(again)}
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert crate_mae.load_model(again).config.lambd == 0.3


@pytest.fixture
def chosen(monkeypatch) -> list[PretrainConfig]:
    """The configurations that commands come to, with which nothing is run."""
    configs = []
    monkeypatch.setattr("crate_mae.cli.pretraining.pretrain", lambda config, **_: configs.append(config))
    monkeypatch.setattr("crate_mae.cli.pretraining._report", lambda result: "")
    monkeypatch.setattr("crate_mae.cli.pretraining.summarise", lambda result, config: [])
    return configs


def test_an_architecture_is_where_sizes_start(tmp_path, chosen, photographs):
    arguments = ["pretrain", "--out", str(tmp_path / "run"), "--data", str(photographs)]
    assert main([*arguments, "--architecture", "crate_mae_small", "--model.lambd", "0.2"]) == 0
    assert main(arguments) == 0
    small, default = (config.model for config in chosen)
    assert (small.embed_dim, small.num_heads, small.lambd) == (576, 12, 0.2)
    assert default == crate_mae.ModelConfig()


def write_config(folder: Path, **settings) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder / "config.json")


def test_an_architecture_in_a_config_is_where_sizes_start(chosen, tmp_path):
    config = write_config(tmp_path / "a", out="run", architecture="crate_mae_tiny", model={"depth": 3})
    assert main(["pretrain", "--config", config]) == 0
    assert (chosen[0].model.embed_dim, chosen[0].model.depth, chosen[0].model.decoder_depth) == (384, 3, 12)
    first = write_config(tmp_path / "b", out="run", architecture="crate_mae_base", model={"lambd": 0.2})
    last = write_config(tmp_path / "c", architecture="crate_mae_small")
    assert main(["pretrain", "--config", first, "--config", last]) == 0
    assert (chosen[1].model.embed_dim, chosen[1].model.lambd) == (576, 0.2)


@pytest.mark.parametrize("resume", [False, True], ids=["config", "resume"])
def test_an_architecture_that_a_config_would_hide_is_refused(chosen, tmp_path, capsys, resume):
    config = write_config(tmp_path / "a", out="run", model={"embed_dim": 96, "depth": 12})
    options = ["--out", str(tmp_path / "a"), "--resume"] if resume else ["--config", config]
    assert main(["pretrain", *options, "--architecture", "crate_mae_tiny"]) == 2
    assert f"model.embed_dim 384, but {config} has 96" in capsys.readouterr().err
    assert main(["pretrain", *options, "--architecture", "crate_mae_tiny", "--model.embed_dim", "384"]) == 0
    assert [config.model.embed_dim for config in chosen] == [384]


@pytest.mark.parametrize("options", [[], ["--schedule.epochs", "70"]], ids=["alone", "under an option"])
def test_a_section_that_is_none_is_refused(chosen, tmp_path, capsys, options):
    config = write_config(tmp_path / "a", out="run", schedule=5)
    assert main(["pretrain", "--config", config, *options]) == 2
    assert "schedule: expected a section of settings, got 5" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [None, "", '{"model'], ids=["missing", "empty", "cut short"])
def test_a_config_lost_since_is_named(run, out, capsys, broken):
    assert run() == 0
    (out / "config.json").unlink()
    if broken is not None:
        (out / "config.json").write_text(broken)
    assert run("--resume") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(out / "config.json") in error and "--resume needs it: mend it, or start anew with --overwrite" in error


def test_a_folder_named_from_here_is_found_from_elsewhere(out, photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--data", photographs.name, "--val", photographs.name, "--out", "run", *TINY]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["pretrain", "--out", str(out), "--resume", "--schedule.epochs", "3"]) == 0
    assert saved_config(out)["data"] == str(photographs)


def test_without_a_terminal_it_says_what_it_does(run, out, capsys):
    assert run("--run.precision", "float32") == 0
    opening = capsys.readouterr().out.splitlines()[0]
    parameters = sum(p.numel() for p in crate_mae.load_model(out).parameters())
    for said in (f"{parameters:,} parameters", "8 images to train on and 8 to validate", "float32 on cpu"):
        assert said in opening
    for said in ("2 steps an epoch", "2 epochs", str(out)):
        assert said in opening


def test_the_demo_has_its_own_settings(tmp_path, chosen, monkeypatch):
    monkeypatch.chdir(tmp_path)  # away from the demo that whoever runs this may have run
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert main(["demo"]) == 0
    assert chosen == [demo_config(tmp_path), demo_config(Path("runs/demo"))]


def test_resume_starts_from_the_runs_own_settings(run, out):
    assert run() == 0
    assert main(["pretrain", "--out", str(out), "--resume", "--schedule.epochs", "3"]) == 0
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["epoch"]) == (6, 3)


@contextmanager
def ctrl_c_in_step(monkeypatch, step: int, times: int = 1, then=lambda: None):
    """Ctrl-C so many times in the middle of a step, counted from 1; `then` is called before the step goes on."""
    forward, calls = CrateMAE.forward, itertools.count(1)

    def interrupted_forward(self, *args, **kwargs):
        if self.training and next(calls) == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            then()
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CrateMAE, "forward", interrupted_forward)
        yield


def test_ctrl_c_answers_at_once_and_saves(run, out, capfd, monkeypatch):
    said = []
    with ctrl_c_in_step(monkeypatch, 1, then=lambda: said.append(capfd.readouterr().err)):
        assert run() == 130
    assert "stopping after this step" in said[0] and "a second Ctrl-C" in said[0]
    assert "stopped at step 1 of 4" in capfd.readouterr().err
    assert run("--resume") == 0


def test_a_second_ctrl_c_ends_it_now_and_keeps_what_was_saved(run, out, capfd, monkeypatch):
    monkeypatch.setattr("crate_mae.training.interrupts.ONE_REQUEST", -1)  # seconds
    with ctrl_c_in_step(monkeypatch, 3, times=2):  # saved after the first epoch, of two steps
        assert run() == 130
    assert "what was saved before is kept" in capfd.readouterr().err
    assert [state.step for state in saved_states(out / "states")] == [2]
    assert run("--resume") == 0


@pytest.fixture
def demo(monkeypatch, photographs, out):
    """`crate-mae demo` with a model and images that take no time."""
    settings = PretrainConfig(
        out=out,
        data=photographs,
        val=photographs,
        model=SMALLEST,
        schedule=ScheduleConfig(epochs=2, warmup_epochs=1, batch_size=4),
        run=RunConfig(device="cpu", precision="float32", threads=1, save_every=1, pictures=1),
    )
    monkeypatch.setattr(
        "crate_mae.cli.pretraining.demo_config", lambda folder: dataclasses.replace(settings, out=folder)
    )
    return lambda *more: main(["demo", "--out", str(out), *more])


def test_an_interrupted_demo_goes_on_and_a_finished_one_shows_its_results(demo, out, capfd, monkeypatch):
    with ctrl_c_in_step(monkeypatch, 1):  # in the first epoch, of two steps
        assert demo() == 130
    assert "stopped at step 1 of 4" in capfd.readouterr().err
    with ctrl_c_in_step(monkeypatch, 2):  # of those that are left: in the second epoch
        assert demo() == 130
    again = capfd.readouterr()
    assert "from step 1" in again.out and "stopped at step 3 of 4" in again.err
    assert demo() == 0
    assert "from step 3" in capfd.readouterr().out
    weights = (out / "model.safetensors").read_bytes()
    assert demo() == 0
    again = capfd.readouterr()
    assert "make demo ARGS=--overwrite" in again.out and "reconstruction  " in again.out
    assert "nothing left to do" in again.err
    assert (out / "model.safetensors").read_bytes() == weights
    assert demo("--overwrite") == 0
    assert "from the start" in capfd.readouterr().out
    assert (out / "model.safetensors").read_bytes() == weights, "interruption and a new start change no bit"


def test_a_demo_killed_before_its_first_save_starts_anew(demo, out, capfd, monkeypatch):
    monkeypatch.setattr("crate_mae.training.interrupts.ONE_REQUEST", -1)  # seconds
    with ctrl_c_in_step(monkeypatch, 1, times=2):
        assert demo() == 130
    assert not has_state(out)
    assert demo() == 0


def test_a_demo_leaves_other_runs_alone(demo, run, out, capsys):
    assert run("--model.lambd", "0.3") == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert demo() == 2
    assert "holds a run already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_passes_arguments_to_the_demo():
    root = Path(__file__).resolve().parents[2]
    command = ["make", "--dry-run", "--old-file=.venv/.installed", "demo", "ARGS=--overwrite", "OUT=elsewhere"]
    printed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert "crate-mae demo --out elsewhere --overwrite" in printed


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_one_of_several_processes_is_refused(run, out, capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    assert run() == 2
    assert f"environment variable {variable}: expected 1 process, got 2" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")  # what sbatch sets for a script that it runs once
    assert run() == 0


@pytest.mark.parametrize(
    ("written", "model", "mean"),
    [
        ("--images.mean 0.5 0.25 .5 --model.img_size 160 224", (160, 224), (0.5, 0.25, 0.5)),
        ("--images.mean 0.5,0.25,0.5 --model.img_size 160,224", (160, 224), (0.5, 0.25, 0.5)),
        ("--images.mean=[0.5, 0.25, 5e-1] --model.img_size=[160,224]", (160, 224), (0.5, 0.25, 0.5)),
        ("--model.img_size 96 --images.mean (0.5,0.25,0.5)", 96, (0.5, 0.25, 0.5)),
    ],
)
def test_lists_are_taken_as_people_write_them(chosen, out, written, model, mean):
    assert main(["pretrain", "--out", str(out), *written.split(), "--run.seed", "3"]) == 0
    (config,) = chosen
    assert (config.model.img_size, config.images.mean, config.run.seed) == (model, mean, 3)


class TestInit:
    @pytest.fixture
    def trained(self, run, out) -> Path:
        assert run("--model.lambd", "0.3", "--images.mean", "0.5", "0.5", "0.5") == 0
        return out

    @pytest.fixture
    def start(self, trained, photographs, tmp_path):
        def start(*options: str) -> int:
            schedule = ["--schedule.epochs=2", "--schedule.warmup_epochs=1", "--schedule.batch_size=4"]
            folders = ["--data", str(photographs), "--val", str(photographs), "--out", str(tmp_path / "second")]
            return main(["pretrain", *folders, *schedule, *TINY[-10:], *options])

        return start

    def test_starts_from_the_weights(self, start, trained, monkeypatch):
        begun = {}
        monkeypatch.setattr(
            "crate_mae.training.loop.build_optimizer",
            lambda model, *settings: (
                begun.update(copy.deepcopy(model.state_dict())) or build_optimizer(model, *settings)
            ),
        )
        assert start("--init", str(trained)) == 0
        assert all(
            torch.equal(begun[name], value) for name, value in crate_mae.load_model(trained).state_dict().items()
        )

    def test_is_recorded_and_resumed_without_the_run_it_came_from(self, start, trained, tmp_path, capfd, monkeypatch):
        assert start("--init", str(trained)) == 0
        assert f"from the weights of {trained}" in capfd.readouterr().out
        second = tmp_path / "second"
        saved, weights = saved_config(second), (second / "model.safetensors").read_bytes()
        assert saved["init"] == str(trained)
        assert saved["model"] == saved_config(trained)["model"]
        assert saved["images"]["mean"] == [0.5, 0.5, 0.5]
        with ctrl_c_in_step(monkeypatch, 3):
            assert start("--init", str(trained), "--overwrite") == 130
        trained.rename(tmp_path / "moved")
        assert main(["pretrain", "--out", str(second), "--resume"]) == 0
        assert (second / "model.safetensors").read_bytes() == weights
        assert main(["pretrain", "--out", str(second), "--resume", "--init", str(tmp_path / "moved")]) == 2
        assert "init: the run in" in capfd.readouterr().err

    @pytest.mark.parametrize("size", ["--model.img_size=64", "--model.img_size=32,64"])
    def test_images_may_have_another_size(self, start, trained, tmp_path, size):
        assert start("--init", str(trained), size) == 0

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ("--init {run} --model.embed_dim 64", "--init: {run}: the model there has embed_dim 32, and this one 64"),
            ("--init {run} --model.num_heads 4", "the model there has num_heads 2, and this one 4"),
            (
                "--init {run} --architecture crate_mae_tiny",
                "architecture: its embed_dim is 384, but the model in --init",
            ),
            ("--init {run}/model.safetensors", "mean nothing without --model.lambd and --model.step_size"),
            ("--init {run}/model.safetensors --model.lambd 0.5 --model.step_size 0.1", "its tokens are 32 wide"),
            ("--init {run}/nowhere", "--init: {run}/nowhere: no such file"),
            (
                "--init {run}/metrics.jsonl --model.lambd 0.5 --model.step_size 0.1",
                "metrics.jsonl: expected a file that",
            ),
            ("--init {run} --out {run}", "init: expected another run than the one in out"),
        ],
    )
    def test_what_does_not_fit_is_named(self, start, trained, tmp_path, capsys, options, says):
        assert start(*options.format(run=trained).split()) == 2
        assert says.format(run=trained) in capsys.readouterr().err
        assert not (tmp_path / "second").exists()


class TestReconstruct:
    @pytest.mark.parametrize("norm_pix_loss", ["false", "true"])
    def test_shows_images_with_their_errors(self, run, out, photographs, tmp_path, capsys, monkeypatch, norm_pix_loss):
        """The mean over the images, each as often masked, is what pre-training reports."""
        assert run("--schedule.mask_ratio", "0.6", "--model.norm_pix_loss", norm_pix_loss) == 0
        capsys.readouterr()
        monkeypatch.chdir(tmp_path)
        images = sorted(photographs.rglob("*.png"))
        assert main(["reconstruct", str(out), *map(str, images), "--seed", "5"]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
        assert [row[2] for row in rows] == [str(image) for image in images]
        model, normalization = crate_mae.load_model(out), read_normalization(out)
        for index, row in enumerate(rows):
            pixels = [part(open_file(images[index]), (2, 0, 38, 36), (32, 32), 3, "")]
            validation = Validation(pixels, normalization, patches=16, mask_ratio=0.6, batch_size=1, seed=5 + index)
            assert row[:2] == [f"{error:.4f}" for error in validation(model)[:2]]
        assert Image.open("reconstructed.png").height > 8 * 128

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ("{run}/nowhere {image}", "RUN: expected the folder of a run, got {run}/nowhere, which is not there"),
            ("{run} {run}/nowhere.jpg", "cannot read the image {run}/nowhere.jpg"),
            ("{run} {run}", "Is a directory"),
            ("{run} {run}/metrics.jsonl", "cannot read the image"),
            ("{run}", "images"),
            ("{run} {image} --out {image}", "--out: {image} is one of the images"),
            ("{run} {image} --out picture.foo", "--out: expected a name"),
            ("{run} {image} --out {run}/nowhere/a.png", "--out {run}/nowhere/a.png: there is no folder"),
            (
                "{run} {image} --mask_ratio 0.95",
                "--mask_ratio: expected above 0, and to leave one patch of 16 of an image visible",
            ),
            ("{run} {image} --mask_ratio 1e-300", "--mask_ratio: expected above 0"),
            ("{run} {image} --seed -1", "--seed: expected 0 to 2**64 - 1"),
            ("{run} {image} --seed 18446744073709551616", "--seed: expected 0 to 2**64 - 1"),
            ("{run} {image} --sed 1", "did you mean --seed?"),
            ("{run} {image} --device meta", "--device: expected auto or one of cpu"),
        ],
    )
    def test_mistakes_are_one_line(self, out, photographs, capsys, monkeypatch, tmp_path, arguments, says):
        monkeypatch.chdir(tmp_path)
        crate_mae.save_model(CrateMAE(SMALLEST), out, mean=[0.5] * 3, std=[0.5] * 3)
        (out / "metrics.jsonl").write_text("{}")
        names = dict(run=out, image=photographs / "class0" / "0.png")
        assert main(["reconstruct", *arguments.format(**names).split()]) == 2
        error = capsys.readouterr().err
        assert says.format(**names) in error and error.count("\n") == 1
        assert not list(tmp_path.glob("*.png"))


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"crate-mae {crate_mae.__version__}\n"


def test_divergence_is_reported(run, capsys):
    assert run("--optimizer.base_lr", "1e38", "--optimizer.clip_grad", "0") == 1
    assert "base_lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "pretrain"),
        ("pretrain", "out"),
        ("pretrain --out {out} --data {out}/nowhere", "--data: no such folder"),
        ("pretrain --out {out} --val {out}/nowhere", "--val: no such folder"),
        ("pretrain --out {out} --data {out}/../{out.name}", "out: expected another folder than data"),
        ("pretrain --out {out} --arch crate_mae_tiny", "--arch"),
        ("pretrain --out {out} --schedule.epoch 3", "--schedule.epoch"),
        ("pretrain --out {out} --resu", "--resu"),
        ("pretrain --out {out} --run.device meta", "--run.device: expected auto or one of cpu"),
        ("pretrain --out {out} --run.device cuda:77", "--run.device: expected auto or one of cpu"),
        ("pretrain --out {out} --run.threads 100000", "--run.threads"),
        (
            "pretrain --out {out} --optimizer.betas [0.9,1.5]",
            "optimizer.betas: expected two values, at least 0 and below 1",
        ),
        ("pretrain --out {out} --schedule.min_lr 1", "schedule.min_lr: expected at most the peak"),
        ("pretrain --out {out} --config {out}/nowhere.json", "nowhere.json"),
        ("pretrain --out {out} --no_such_option 1", "no_such_option"),
        ("pretrain --out {out} --run.seed many", "run.seed"),
        ("pretrain --out {out} --run.seed -1", "run.seed"),
        ("pretrain --out {out} --model.num_heads 7", "model.num_heads: expected"),
        ("pretrain --out {out} --model.img_size 30", "model.img_size: expected height and width divisible"),
        ("pretrain --out {out} --architecture crate_mae_vast", "crate_mae_vast"),
        ("pretrain --out {out} --images.mean [0.5]", "images.mean: expected 3"),
        ("pretrain --out {out} --images.mean 0.5 x 0.5", "--images.mean: expected a number for each channel"),
        ("pretrain --out {out} --optimizer.betas 0.9", "--optimizer.betas: expected two numbers, got 0.9"),
        ("pretrain --out {out} --model.img_size big", "--model.img_size: expected a whole number of pixels, or two"),
        ("pretrain --out {out} --resume", "nothing to resume"),
        ("demo --out {out} --schedule.batch_size 5000", "lower --schedule.batch_size"),
        (
            "pretrian --out {out}",
            "expected a command, one of pretrain, demo, finetune, reconstruct, analyze, visualize, evaluate, embed, compare,",
        ),
        ("pretrain --out {out} --optimzer.base_lr 1", "--optimzer.base_lr 1; did you mean --optimizer.base_lr?"),
        ("pretrain --out {out} --optimizer.baselr 1", "did you mean --optimizer.base_lr?"),
        ("pretrain --out {out} --batch_size 4", "did you mean --schedule.batch_size?"),
        (
            "pretrain --out {out} --run.precision bf16",
            "expected one of auto, float32, bfloat16, float16, got bf16; did you mean bfl",
        ),
        ("pretrain --out {out} --architecture crate_mae_bse", "did you mean crate_mae_base?"),
        ("pretrain --out {out} --config optimizer:{{baselr:1}}", "is no file of settings"),
        (
            'pretrain --out {out} --config {{"optimizer":{{"baselr":1}}}}',
            "no such setting; did you mean optimizer.base_lr?",
        ),
        ('pretrain --out {out} --config {{"modle":{{}}}}', "modle: no such setting; did you mean model?"),
        ('pretrain --out {out} --config {{"architecture":"crate_mae_bse"}}', "did you mean crate_mae_base?"),
        ('pretrain --out {out} --config {{"run":{{"seed":1,"seed":2}}}}', "seed is given twice"),
        ('pretrain --out {out} --config {{"run":{{"seed":null}}}}', "run.seed: expected a value, got None"),
        ('pretrain --out {out} --config {{"resume":true}}', "resume: expected on the command line alone"),
        ('pretrain --out {out} --config {{"init":5}}', "init: expected the name of a file or folder"),
        ("pretrain --out= --data {out}", "--out: expected the name of a file or folder, in UTF-8, got ''"),
        ("pretrain --out {out} --data=", "--data: expected the name of a file or folder, in UTF-8, got ''"),
        ("pretrain --out {out}\0", "--out: expected the name of a file or folder"),
        (
            "pretrain --out {out} --init /dev/zero --model.lambd 1 --model.step_size 1",
            "--init /dev/zero: expected the folder",
        ),
        ("pretrain --out {out} --config /dev/zero", "/dev/zero' is no file of settings"),
        ("pretrain --out {out} --run /dev/zero", "/dev/zero' is no file of settings"),
        ("pretrain --out {out} --run.device " + 9999 * "x", "run.device: expected auto or one of cpu"),
        (
            "pretrain --out {out} --schedule.mask_ratio 1e-300",
            "mask_ratio: 1e-300 leaves no patch of 196 to reconstruct",
        ),
        ("pretrain --out {out} --resume bset", "--resume: expected nothing, best or the number of a step"),
        ("pretrain --out {out} --resume=0", "--resume: expected nothing, best or the number of a step"),
        ("pretrain --out {out} --resume -5", "--resume: expected nothing, best or the number of a step"),
    ],
)
def test_a_users_mistake_is_one_line(arguments, says, out, capsys):
    assert main(arguments.format(out=out).split(" ") if arguments else []) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("crate-mae: ") and error.count("\n") == 1 and len(error) <= 620
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("run.seed", 2**64),
        ("optimizer.base_lr", 1e300),
        ("optimizer.base_lr", 10**400),
        ("optimizer.base_lr", float("nan")),
        ("optimizer.weight_decay", float("inf")),
        ("optimizer.clip_grad", float("inf")),
        ("schedule.warmup_epochs", float("nan")),
        ("run.save_minutes", float("inf")),
        ("schedule.epochs", 10**30),
        ("schedule.batch_size", 10**400),
        ("images.cache_mb", 10**30),
        ("images.mean", [1e39, 0, 0]),
        ("images.std", [10**400, 1, 1]),
        ("model.lambd", float("nan")),
        ("model.step_size", float("inf")),
        ("model.embed_dim", 12 * 10**30),
        ("model.depth", 10**30),
        ("model.img_size", 16 * 10**30),
    ],
)
@pytest.mark.parametrize("resumed", [False, True], ids=["option", "config.json"])
def test_numbers_beyond_all_use_are_refused_by_name(chosen, tmp_path, out, capsys, option, value, resumed):
    section, name = option.split(".")
    if resumed:
        write_config(out, **{section: {name: value}})
        options = ["--resume"]
    else:
        text = json.dumps(value).replace("NaN", ".nan").replace("Infinity", ".inf")
        options = [f"--{option}={text}"]
    assert main(["pretrain", "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert f"{option}: expected" in error and error.count("\n") == 1 and len(error) <= 620
    assert not chosen


def test_a_rate_that_float32_cannot_hold_is_refused(chosen, out, capsys):
    rate = ["--optimizer.base_lr", "1e38", "--schedule.warmup_epochs", "0"]
    assert main(["pretrain", "--out", str(out), *rate, "--schedule.batch_size", "2048"]) == 2
    assert main(["pretrain", "--out", str(out), *rate, "--optimizer.weight_decay", "100"]) == 2
    assert capsys.readouterr().err.count("optimizer.base_lr: expected a peak learning rate") == 2
    assert main(["pretrain", "--out", str(out), *rate]) == 0


def test_the_variance_of_one_value_is_no_target():
    with pytest.raises(ValueError, match="norm_pix_loss: expected patches of two values or more"):
        ModelConfig(patch_size=1, in_chans=1, norm_pix_loss=True)
    assert ModelConfig(patch_size=1, in_chans=2, norm_pix_loss=True).norm_pix_loss


def test_more_workers_than_a_machine_could_feed_are_refused():
    most = 8 * os.cpu_count()
    check_workers(most)
    with pytest.raises(ValueError, match=f"--images.num_workers: expected 0 to {most}, .*, got {most + 1}"):
        check_workers(most + 1)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(9 * ['*' + before])}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [*a]", "*a refers to itself"),
        ("&a {run: *a}", "*a refers to itself"),
        ("run: &b {seed: [1, &c {x: *b}]}", "*b refers to itself"),
        (BOMB, "more than 10,000 values"),
        ("[" * 100_000, "nested more than 20 deep"),
        ('{"run":' * 100_000, "nested more than 20 deep"),
    ],
    ids=["list", "mapping", "far", "bomb", "lists", "JSON"],
)
def test_endless_settings_are_refused(chosen, out, tmp_path, capsys, text, says):
    out.mkdir()
    (out / "config.json").write_text(text)
    file, elsewhere = str(out / "config.json"), ["pretrain", "--out", str(tmp_path / "elsewhere")]
    for named, arguments in [
        (file, [*elsewhere, "--config", file]),
        (file, [*elsewhere, "--init", str(out)]),
        (file, ["pretrain", "--out", str(out), "--resume"]),
        (file, ["reconstruct", str(out), "image.png"]),
        ("--config", [*elsewhere, "--config", text]),
        ("--run.seed", [*elsewhere, "--run.seed", text]),
        ("--run", [*elsewhere, f"--run={text}"]),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert named in error and says in error and error.count("\n") == 1
    assert not chosen


def test_what_is_no_file_is_not_waited_for(chosen, out, photographs, tmp_path, capsys):
    """A pipe that nobody writes to would be read without end."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    crate_mae.save_model(CrateMAE(SMALLEST), out, mean=[0.5] * 3, std=[0.5] * 3)
    pretrain, weights = ["pretrain", "--out", str(tmp_path / "run2")], ["--model.lambd=1", "--model.step_size=1"]
    assert main([*pretrain, "--config", str(pipe)]) == main([*pretrain, "--init", str(pipe), *weights]) == 2
    assert main(["reconstruct", str(out), str(pipe), "--out", str(tmp_path / "picture.png")]) == 2
    (out / "config.json").unlink()
    os.mkfifo(out / "config.json")
    assert main(["reconstruct", str(out), str(pipe)]) == main([*pretrain, "--init", str(out)]) == 2
    assert main(["pretrain", "--out", str(out), "--resume"]) == 2
    assert capsys.readouterr().err.count("\n") == 6
    assert not chosen


@pytest.mark.parametrize(
    ("options", "resume"),
    [
        ([], False),
        (["--resume"], True),
        (["--resume", "--run.seed", "3"], True),
        (["--resume", "best", "--run.seed", "3"], "best"),
        (["--resume=best"], "best"),
        (["--run.seed", "3", "--resume", "120"], 120),
    ],
)
def test_what_to_resume_from(out, monkeypatch, options, resume):
    asked = []
    monkeypatch.setattr("crate_mae.cli.pretraining.pretrain", lambda config, **how: asked.append((config, how)))
    monkeypatch.setattr("crate_mae.cli.pretraining._report", lambda result: "")
    write_config(out, schedule={"epochs": 70})
    assert main(["pretrain", "--out", str(out), *options]) == 0
    ((config, how),) = asked
    assert how == {"resume": resume, "overwrite": False} and type(how["resume"]) is type(resume)
    assert config.schedule.epochs == (70 if resume else 800), "a resumed run has the settings that it has"
    assert config.run.seed == 3 * ("--run.seed" in options)
    assert not {"resume", "overwrite", "config"} & config.to_dict().keys()


def test_a_run_in_a_folder_of_any_script_is_resumed(chosen, tmp_path):
    out = tmp_path / "\N{SEEDLING} Läufe"
    write_config(out, **dataclasses.replace(demo_config(out), data=out / "\N{TULIP}").to_dict())
    assert main(["pretrain", "--out", str(out), "--resume"]) == 0
    assert chosen[0].data == str(out / "\N{TULIP}")


class TestExitStatus:
    @pytest.fixture
    def failing(self, monkeypatch, out, capfd):
        def failing(error: BaseException, *more: str) -> tuple[int, str]:
            def pretrain(config, **how):
                raise error

            monkeypatch.setattr("crate_mae.cli.pretraining.pretrain", pretrain)
            status = main(["pretrain", "--out", str(out), *more])
            return status, capfd.readouterr().err

        return failing

    @pytest.mark.parametrize(
        ("error", "status", "says"),
        [
            (KeyError("images"), 70, "KeyError: 'images'; this is a bug: --debug shows where"),
            (RecursionError("too deep"), 70, "RecursionError: too deep; this is a bug"),
            (RuntimeError("two\nlines"), 70, "RuntimeError: two lines; this is a bug"),
            (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 1, "a lower --schedule.batch_size needs less"),
            (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 1, "--run.recompute true"),
            (MemoryError(), 1, "--run.stream 16bit"),
            (OSError(errno.ENOSPC, "No space left on device", "state.pt"), 1, "No space left on device"),
            (OSError(errno.EROFS, "Read-only file system", "state.pt"), 1, "Read-only file system"),
            (PermissionError("cannot write state.pt: Permission denied"), 1, "cannot write state.pt"),
            (FileNotFoundError(errno.ENOENT, "No such file", "state.pt"), 2, "No such file"),
            (ValueError("schedule: \x1b[31mred\x00"), 2, "schedule: \\x1b[31mred\\x00"),
            (RunStopped("stopped at step 1 of 4", signal.SIGTERM), 143, "stopped at step 1 of 4; --resume goes on"),
            (RunStopped("stopped at step 1 of 4", signal.SIGUSR1), 138, "stopped at step 1 of 4; --resume goes on"),
            (LostWorkers("lost 3 times in a row"), 1, "lost 3 times in a row"),
            (EndedAtOnce(signal.SIGTERM), 143, "interrupted"),
            (KeyboardInterrupt(), 130, "interrupted"),
        ],
    )
    def test_of_each_error(self, failing, error, status, says):
        ended, printed = failing(error)
        assert ended == status
        assert says in printed
        assert printed.startswith("crate-mae: ") and printed.count("\n") == 1

    @pytest.mark.parametrize("command", ["analyze", "visualize", "pretrain"])
    def test_what_needs_less_memory_is_an_option_of_the_command(self, command, capsys):
        options = re.findall(r"--[\w.]+", outcome(MemoryError(), command)[0])
        with pytest.raises(SystemExit):
            main([command, "--help"])
        explained = capsys.readouterr().out
        assert options and all(f"{option} " in explained for option in options)

    @pytest.mark.parametrize(
        "error", [KeyError("images"), ValueError("run.seed: expected"), RunStopped("stopped", signal.SIGTERM)]
    )
    def test_debug_shows_where_and_ends_the_same(self, failing, error):
        ended, line = failing(error)
        again, printed = failing(error, "--debug", "--run.seed", "3")
        assert again == ended
        assert "Traceback (most recent call last)" in printed and "test_cli.py" in printed
        assert printed.endswith("\n" + line)

    def test_memory_that_there_is_not(self, failing):
        """In the allocator's own words, which may change."""
        with pytest.raises(RuntimeError) as error:
            torch.empty(2**60, dtype=torch.uint8)
        status, printed = failing(error.value)
        assert status == 1
        assert "out of memory: a lower --schedule.batch_size" in printed and f"allocate {2**60} bytes" in printed

    @pytest.mark.parametrize("place", [0, 1, 3])
    def test_debug_may_stand_anywhere(self, out, capsys, place):
        arguments = ["pretrain", "--out", str(out), "--run.seed", "many"]
        assert main([*arguments[:place], "--debug", *arguments[place:]]) == 2
        error = capsys.readouterr().err
        assert error.startswith("Traceback")
        assert error.splitlines()[-1] == "crate-mae: run.seed: expected a whole number, got many"


@pytest.mark.parametrize("command", ["pretrain", "demo"])
def test_images_of_one_colour_are_learnt_too(photographs, tmp_path, out, capsys, command):
    """Filled or blurred, they have no error: there is nothing to compare with."""
    grey = tmp_path / "grey"
    grey.mkdir()
    for name in "ab":
        Image.new("RGB", (40, 36), (0, 0, 0)).save(grey / f"{name}.png")
    std = ["--images.mean", "0,0,0", "--images.std", "1,1,1"]  # so that the colour is a number that means no rounding
    assert main([command, "--data", str(photographs), "--val", str(grey), "--out", str(out), *TINY, *std]) == 0
    assert "(n/a and n/a)" in capsys.readouterr().out
    assert (out / "summary.png").exists() == (command == "demo")
    assert main(["reconstruct", str(out), str(grey / "a.png"), "--out", str(tmp_path / "picture.png")]) == 0


def test_a_broken_image_is_named(run, photographs, capsys):
    (photographs / "broken.jpg").write_bytes(b"not an image")
    assert run() == 0
    assert "broken.jpg (no image: " in capsys.readouterr().out
    assert run("--overwrite", "--images.max_unreadable", "0") == 1
    assert "1 of " in capsys.readouterr().err


def test_a_run_is_not_overwritten_by_accident(run, capsys):
    assert run() == 0
    assert run() == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("--overwrite") == 0


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ImportError("libc.so:\nno such file"), 70, "ImportError: libc.so: no such file; --debug shows where"),
    ],
)
def test_what_ends_the_imports_is_one_line(monkeypatch, capsys, error, status, says):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "crate_mae.cli":
                raise error

    monkeypatch.delitem(sys.modules, "crate_mae.cli")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert crate_mae.__main__.main() == status
    assert capsys.readouterr().err == f"crate-mae: {says}\n"


def test_a_terminal_without_the_letters_of_a_path_is_written_to(chosen, out, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("crate_mae.cli.pretraining._report", lambda result: "runs/\N{TULIP}")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["pretrain", "--out", str(out)]) == 0
    sys.stdout.flush()
    assert written.getvalue() == b"runs/\\U0001f337\n"


def test_an_implementation_that_cannot_run_is_one_line(out):
    environment = {**os.environ, "CRATE_KERNELS_IMPL": "triton", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "crate_mae", "pretrain", "--out", str(out), "--run.device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("crate-mae: environment variable CRATE_KERNELS_IMPL") and done.stderr.count("\n") == 1


def test_it_starts_without_what_only_sharded_runs_need():
    code = "import sys, crate_mae.cli; print({'torch.distributed.tensor', 'sympy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_is_in_words(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert "--debug" in printed and "<locals>" not in printed and " at 0x" not in printed


def test_help_explains_the_options():
    command = [sys.executable, "-m", "crate_mae", "pretrain", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Fraction of the patches removed" in printed
    assert "the rate used is base_lr * batch_size / 256" in " ".join(printed.split())
