"""What `--data` names, and runs over every kind of it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import assert_same_weights, saved_steps, tiny_config, weights, write_photographs

from crate_mae.cli import main
from crate_mae.data import ImageFolder, Mixture, SyntheticImages, TarShards, absolute, open_source
from crate_mae.data.specification import is_folder
from crate_mae.training import PretrainConfig, pretrain

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    return write_photographs(tmp_path / "photographs")


@pytest.fixture
def shards(photographs: Path, tmp_path: Path) -> Path:
    """Of 5, 5 and 2 photographs."""
    largest = max(path.stat().st_size for path in photographs.iterdir())
    size = 5 * (512 + (largest + 511) // 512 * 512) + 1024
    assert main(["pack", str(photographs), str(tmp_path / "shards"), f"--shard_size={size}", "--workers=0"]) == 0
    return tmp_path / "shards"


class TestNames:
    def test_each_form_is_its_source(self, photographs, shards):
        shutil.copy(shards / "images-000002.tar", photographs)  # which images lie beside
        for what, kind, images in (
            (photographs, ImageFolder, 12),
            (shards, TarShards, 12),
            (f"{shards}/images-{{000000..000001}}.tar", TarShards, 10),
            (f"{shards}/images-000002.tar", TarShards, 2),
            ("synthetic:7,size=20x30", SyntheticImages, 7),
            (f"2 {photographs} + 0.5 synthetic:8", Mixture, 20),
        ):
            source = open_source(what)
            assert type(source) is kind and len(source) == images
            assert is_folder(what) == (kind is ImageFolder)
        assert open_source("synthetic:7,size=20x30").image(3).size == (30, 20)

    @pytest.mark.parametrize(
        ("what", "says"),
        [
            ("nowhere", "no such folder of images: nowhere"),
            ("phtographs", r"no such folder of images: phtographs; did you mean photographs\?"),
            ("", "expected a folder of images .* got nothing"),
            ("beans.parquet", r"is a file; .* is named hf:beans\.parquet"),
            ("tables", "no images under tables .* is named hf:tables"),
            ("https://x.org/photos", "nothing is read from other machines"),
            ("unfinished", r"packing stopped after 3 of 12 images; the same crate-mae pack command goes on"),
            ("synthetic:4 + synthetic:5", r"a positive weight and a blank .*, got 'synthetic:4'"),
            ("-1 synthetic:4 + 1 synthetic:5", r"a positive weight and a blank .*, got '-1 synthetic:4'"),
            ("nowhere-{000..001}.tar", "no such shard: nowhere-000.tar"),
            ("images.tar.gz", r"images\.tar\.gz"),
            ("synthetic:0", "a number of images, 1 or more"),
            ("synthetic:5,size=5", r"size=HEIGHTxWIDTH in pixels, got '5'"),
            ("synthetic:5,sides=5x5", "expected size=... after a comma, got 'sides=5x5'"),
            ("hf:", "expected a name after the colon"),
            ("hf:a,splits=b", "expected split=..., name=..., column=... after a comma, got 'splits=b'"),
            ("2 synthetic:4 + synthetic:5", r"expected a positive weight .*, got 'synthetic:5'"),
            ("0 synthetic:4 + 1 synthetic:5", "positive, finite numbers"),
        ],
    )
    def test_what_is_none_is_refused_by_name(self, what, says, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "images.tar.gz").write_bytes(b"\x1f\x8b")
        for folder in ("photographs", "tables", "unfinished"):
            (tmp_path / folder).mkdir()
        for file in ("beans.parquet", "tables/beans.parquet", "unfinished/images-000000.tar"):
            (tmp_path / file).touch()
        journal = {"source": {"images": 12}, "shards": [{"last": 2}]}
        (tmp_path / "unfinished" / "pack.json").write_text(json.dumps(journal))
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            open_source(what)

    def test_what_is_there_is_meant_whatever_it_looks_like(self, photographs, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("2 a + 1 b", "synthetic", "hf"):
            photographs.rename(tmp_path / name)
            assert len(open_source(name)) == 12 and absolute(name) == str(tmp_path / name)
            photographs = tmp_path / name

    def test_paths_mean_the_same_anywhere(self, photographs, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert absolute("photographs") == str(photographs)
        assert absolute("a-{0..1}.tar") == f"{tmp_path}/a-{{0..1}}.tar"
        assert absolute("1234567 photographs + .1234567 synthetic:3") == f"1234567 {photographs} + .1234567 synthetic:3"
        assert absolute("hf:org/name,split=x") == "hf:org/name,split=x"
        assert absolute("hf:photographs,split=x") == f"hf:{photographs},split=x"


class TestRuns:
    @pytest.mark.parametrize("form", ["shards", "shards/images-{000000..000002}.tar", "2 photographs + 1 shards"])
    def test_over_other_sources_than_folders(self, photographs, shards, tmp_path, monkeypatch, form):
        monkeypatch.chdir(tmp_path)
        config = dataclasses.replace(tiny_config(tmp_path / "run", photographs), data=form, val="synthetic:5")
        result = pretrain(config)
        assert result.errors is not None
        assert pretrain(config, resume=True) == result
        assert not (config.out / "images.safetensors").exists()

    def test_packed_images_are_those_of_the_folder(self, photographs, shards, tmp_path):
        config = tiny_config(tmp_path / "run", photographs)
        pretrain(config)
        pretrain(other := dataclasses.replace(config, out=tmp_path / "other", data=str(shards), val=str(shards)))
        assert_same_weights(weights(config.out), weights(other.out))

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_killed_inside_a_shard_it_goes_on_as_if_it_had_not_been(self, photographs, shards, tmp_path, num_workers):
        config = tiny_config(tmp_path / "run", photographs)
        config = dataclasses.replace(config, data=str(shards), val=None)
        config = dataclasses.replace(
            config,
            images=dataclasses.replace(config.images, num_workers=num_workers, val_fraction=0.0),
            run=dataclasses.replace(config.run, save_minutes=1e-9),
        )
        pretrain(whole := dataclasses.replace(config, out=tmp_path / "whole"))
        killed = _killed_after_a_state(config, beyond=5)
        assert killed.returncode == -signal.SIGKILL and 5 < saved_steps(config.out)[0] < 12
        pretrain(config, resume=True)
        assert_same_weights(weights(whole.out), weights(config.out))

    def test_parts_count_in_mixtures_too_and_are_packed_one_by_one(self, photographs, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        for part in ("train", "val", "test"):
            (tmp_path / "set" / part).mkdir(parents=True)
            for path in list(photographs.iterdir())[: 3 if part == "test" else 4]:
                path.rename(tmp_path / "set" / part / path.name)
        config = dataclasses.replace(
            tiny_config(tmp_path / "run", photographs), data="1 set + 1 synthetic:4", val="set"
        )
        pretrain(config)
        said = capsys.readouterr().out
        assert "8 images to train on and 4 to validate on" in said
        assert "of set, train/ to train on, val/ left out, test/ left out" in said
        assert main(["pack", "set", "packed"]) == 2
        assert (
            "it holds train, val, test; pack each by itself, such as set/train into packed/train"
            in capsys.readouterr().err
        )
        assert main(["pack", "set/train", "set/train"]) == 2
        assert "expected another folder than SOURCE" in capsys.readouterr().err

    def test_a_folder_of_parts_may_hold_shards(self, shards, tmp_path, capsys):
        (tmp_path / "set").mkdir()
        for part in ("train", "val"):
            os.symlink(shards, tmp_path / "set" / part)
        config = dataclasses.replace(tiny_config(tmp_path / "run", shards), data=str(tmp_path / "set"), val=None)
        pretrain(config)
        assert "train/ to train on, val/ to validate on" in capsys.readouterr().out


def _killed_after_a_state(config: PretrainConfig, beyond: int) -> subprocess.CompletedProcess:
    """The run in a process of its own, which is killed by SIGKILL in the step after the first state beyond a step."""
    text = f"""
import os, pickle, signal, sys
from crate_mae.model import CrateMAE
from crate_mae.training import pretrain
from crate_mae.training.states import saved_states
config, forward = pickle.load(sys.stdin.buffer), CrateMAE.forward
def mortal(self, *args, **kwargs):
    if any(state.step > {beyond} for state in saved_states(config.out / "states")):
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *args, **kwargs)
CrateMAE.forward = mortal
pretrain(config)
"""
    import pickle

    return subprocess.run([sys.executable, "-c", text], input=pickle.dumps(config), capture_output=True, timeout=120)


def _told_commands() -> list[str]:
    """The lines of docs/data.md that are commands."""
    blocks = re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("   #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("crate-mae ")]


@pytest.mark.parametrize("command", _told_commands())
def test_commands_of_the_page(command, tmp_path, monkeypatch):
    """At toy size: the same words, and settings behind them that make the model small."""
    monkeypatch.chdir(tmp_path)
    if "hf:" in command:
        pytest.importorskip("datasets")
        _write_parquet(tmp_path / "beans.parquet")
    rng = np.random.default_rng(0)
    for index in range(40):
        path = tmp_path / "photos" / f"class{index % 2}" / f"{index:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    if "shards" in command and " pack " not in command:
        assert main(["pack", "photos", "shards", "--short_side=16", "--shard_size=20KB", "--workers=0"]) == 0
    [name, *words] = shlex.split(command)
    assert name == "crate-mae"
    words = [re.sub(r"\{000000\.\.\d+\}", "{000000..000001}", word) for word in words]
    if words[0] == "pretrain":
        words += [
            *("--model.img_size=16", "--model.patch_size=8", "--model.embed_dim=16", "--model.depth=1"),
            *("--model.num_heads=2", "--model.decoder_depth=1", "--model.decoder_num_heads=2", "--run.device=cpu"),
            *("--schedule.epochs=1", "--schedule.warmup_epochs=0", "--schedule.batch_size=4", "--run.threads=1"),
        ]
    assert main(words) == 0


def _write_parquet(path: Path) -> None:
    import datasets

    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(12)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(str(path))
