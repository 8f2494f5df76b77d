"""Pre-training runs that take no time, and what can happen to them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import crate_mae
from crate_mae.config import ModelConfig
from crate_mae.data import ImageFolder
from crate_mae.model import CrateMAE
from crate_mae.training import ImagesConfig, OptimizerConfig, PretrainConfig, RunConfig, ScheduleConfig
from crate_mae.training.states import saved_states

TINY = ModelConfig(
    img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, decoder_depth=1, decoder_num_heads=2, lambd=0.1
)


def write_photographs(folder: Path, count: int = 12) -> Path:
    """Small smooth pictures; of 12, 4 batches of 3."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        corners = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        corners.resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{index:02}.png")
    return folder


def write_classes(folder: Path) -> Path:
    """Three classes of noisy colours, 8 images each to learn from and 4 to test on, each class under another first letter."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for name, colour in (("brick", (150, 60, 50)), ("grass", (60, 140, 60)), ("water", (60, 90, 150))):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = (np.array(colour) + generator.normal(0, 25, (32, 32, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


def tiny_config(out: Path, photographs: Path) -> PretrainConfig:
    return PretrainConfig(
        out=out,
        data=str(photographs),
        val=str(photographs),
        model=TINY,
        images=ImagesConfig(num_workers=0),
        optimizer=OptimizerConfig(base_lr=0.2),
        schedule=ScheduleConfig(epochs=3, warmup_epochs=1, batch_size=3),
        run=RunConfig(device="cpu", precision="float32", threads=1, log_every=2, save_every=1, pictures=2),
    )


def uneven_config(folder: Path) -> PretrainConfig:
    """12 steps, each with a row, and a state every other one. Of two ranks, one has 3 images of a batch and the other 2, and one
    has the last image that is validated on."""
    config = tiny_config(folder / "run", write_photographs(folder / "photographs"))
    return dataclasses.replace(
        config,
        val=str(write_photographs(folder / "held out", 13)),
        schedule=ScheduleConfig(epochs=6, warmup_epochs=1, batch_size=5),
        run=dataclasses.replace(config.run, log_every=1, keep_every=1, pictures=1),
    )


def with_run(config: PretrainConfig, out: Path | None = None, **settings: object) -> PretrainConfig:
    """The same with other settings of the section run, and perhaps in another folder."""
    return dataclasses.replace(config, out=out or config.out, run=dataclasses.replace(config.run, **settings))


def visited(config: PretrainConfig, epoch: int) -> list[Path]:
    """The photographs in the order in which an epoch comes to them."""
    folder = ImageFolder(config.data)
    return [Path(folder.name(index)) for index in folder.epoch(config.run.seed, epoch)[1]]


def metric_lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return crate_mae.load_model(out).state_dict()


def saved_steps(out: Path) -> list[int]:
    return [state.step for state in saved_states(out / "states")]


def assert_same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """The signal arrives in the middle of the step after `step`."""
    calls = iter(range(10**9))
    forward = CrateMAE.forward

    def interrupted_forward(self, *args, **kwargs):
        if self.training and next(calls) == step:
            signal.raise_signal(number)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CrateMAE, "forward", interrupted_forward)


def die_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The step after `step` ends the run without a chance to save anything."""
    forward, calls = CrateMAE.forward, itertools.count()

    def dying_forward(self, *args, **kwargs):
        if self.training and next(calls) == step:
            raise MemoryError
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CrateMAE, "forward", dying_forward)
