"""The crate-mae command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("jsonargparse")  # lacking where nothing can be installed, as on some GPU machines

import crate_mae
from crate_mae.cli import main
from crate_mae.model import CrateMAE
from crate_mae.training import demo_config

TINY = [
    *("--model.img_size", "32", "--model.patch_size", "8", "--model.embed_dim", "32"),
    *("--model.depth", "1", "--model.num_heads", "2", "--model.decoder_depth", "1", "--model.decoder_num_heads", "2"),
    *("--schedule.epochs", "2", "--schedule.warmup_epochs", "1", "--schedule.batch_size", "4"),
    *("--run.device", "cpu", "--run.precision", "float32", "--run.threads", "1"),
    *("--run.save_every", "1", "--run.pictures", "1"),
]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    for index in range(8):
        path = folder / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)
    return folder


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
    assert f"{last['val_loss'] / last['mean_fill_loss']:.3f}" in printed


def test_a_runs_config_repeats_it_and_options_go_over_it(run, out, tmp_path):
    assert run("--model.lambd", "0.3", "--optimizer.base_lr", "1e-3") == 0
    again = tmp_path / "again"
    config = str(out / "config.json")
    assert main(["pretrain", "--config", config, "--out", str(again), "--run.seed", "0"]) == 0
    assert saved_config(again) == {**saved_config(out), "out": str(again)}
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert crate_mae.load_model(again).config.lambd == 0.3


def test_an_architecture_is_where_sizes_start(tmp_path, monkeypatch, photographs):
    configs = []
    monkeypatch.setattr("crate_mae.cli.pretrain", lambda config, **_: configs.append(config))
    monkeypatch.setattr("crate_mae.cli._report", lambda result: "")
    arguments = ["pretrain", "--out", str(tmp_path / "run"), "--data", str(photographs)]
    assert main([*arguments, "--architecture", "crate_mae_small", "--model.lambd", "0.2"]) == 0
    assert main(arguments) == 0
    small, default = (config.model for config in configs)
    assert (small.embed_dim, small.num_heads, small.lambd) == (576, 12, 0.2)
    assert default == crate_mae.ModelConfig()


def test_the_demo_has_its_own_settings(tmp_path, monkeypatch):
    configs = []
    monkeypatch.setattr("crate_mae.cli.pretrain", lambda config, **_: configs.append(config))
    monkeypatch.setattr("crate_mae.cli._report", lambda result: "")
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert main(["demo"]) == 0
    assert configs == [demo_config(tmp_path), demo_config(Path("runs/demo"))]


def test_resume_starts_from_the_runs_own_settings(run, out):
    assert run() == 0
    assert main(["pretrain", "--out", str(out), "--resume", "--schedule.epochs", "3"]) == 0
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["epoch"]) == (6, 3)


def test_ctrl_c_saves_and_says_so(run, out, capsys, monkeypatch):
    forward = CrateMAE.forward

    def interrupted_forward(self, *args, **kwargs):
        if self.training:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CrateMAE, "forward", interrupted_forward)
        assert run() == 130
    assert "stopped at step 1 of 4" in capsys.readouterr().err
    assert run("--resume") == 0


def test_divergence_is_reported(run, capsys):
    assert run("--optimizer.base_lr", "1e38", "--optimizer.clip_grad", "0") == 1
    assert "base_lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "pretrain"),
        ("pretrain", "out"),
        ("pretrain --out {out} --data {out}/nowhere", "nowhere"),
        ("pretrain --out {out} --config {out}/nowhere.json", "nowhere.json"),
        ("pretrain --out {out} --no_such_option 1", "no_such_option"),
        ("pretrain --out {out} --run.seed many", "run.seed"),
        ("pretrain --out {out} --run.seed -1", "run.seed"),
        ("pretrain --out {out} --model.num_heads 7", "num_heads"),
        ("pretrain --out {out} --model.img_size 30", "patch_size"),
        ("pretrain --out {out} --architecture crate_mae_vast", "crate_mae_vast"),
        ("pretrain --out {out} --images.mean [0.5]", "mean"),
        ("pretrain --out {out} --resume", "nothing to resume"),
        ("demo --out {out} --schedule.batch_size 5000", "batch_size"),
    ],
)
def test_a_users_mistake_is_one_line(arguments, says, out, capsys):
    assert main(arguments.format(out=out).split()) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("crate-mae: ") and error.count("\n") == 1
    assert not out.exists()


def test_a_broken_image_is_named(run, photographs, capsys):
    (photographs / "broken.jpg").write_bytes(b"not an image")
    assert run() == 2
    assert "broken.jpg" in capsys.readouterr().err


def test_a_run_is_not_overwritten_by_accident(run, capsys):
    assert run() == 0
    assert run() == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("--overwrite") == 0


def test_help_explains_the_options():
    command = [sys.executable, "-m", "crate_mae", "pretrain", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Fraction of the patches removed" in printed
    assert "the rate used is base_lr * batch_size / 256" in " ".join(printed.split())
