"""The settings of runs: those that all kinds share, and those of pre-training. Docstrings of fields are help texts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from crate_mae.config import ClassifierConfig, ModelConfig, fits_float32, grid_of
from crate_mae.data import IMAGENET_MEAN, IMAGENET_STD, absolute
from crate_mae.training.sinks import PLACES

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ImagesConfig:
    """Images: normalisation, augmentation, loading"""

    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, of pixels in [0, 1]; taken off the input."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each channel; the input is divided by it."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Least and largest fraction of an image's area that a random crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest width / height of a random crop."""
    flip: bool = True
    """Mirror half of the training images."""
    blur: float = 0.0
    """Fraction of the training images that a Gaussian blurs, with a width of 0.1 to 2 pixels."""
    solarize: float = 0.0
    """Fraction of the training images whose brighter half is inverted."""
    val_fraction: float = 0.1
    """Fraction of the images held out for validation where no folder for it is given; 0 for none."""
    cache_mb: int = 512
    """Decode images once and keep them, if they are at most 5,000 and take less than this many MiB; 0 decodes them each time (of
    large JPEGs no more than a crop needs, which rounds otherwise)."""
    num_workers: int | Literal["auto"] = "auto"
    """Processes that load images beside the training one; "auto" takes the cores that nothing else computes on, at most 16."""
    max_unreadable: float = 0.01
    """Fraction of the images that may turn out unreadable before the run stops, rounded up to a whole image; others stand in."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer: AdamW"""

    base_lr: float = 1.5e-4
    """Peak learning rate for a batch of 256; the rate used is base_lr * batch_size / 256."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    weight_decay: float = 0.05
    """Weight decay of matrices; biases, norms and tokens have none."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient, longer ones are shortened to it; 0 never shortens."""
    average: float = 0.0
    """Decay of a moving average of the weights, such as 0.9999, which is then what is validated, drawn and exported; 0: none."""


@dataclass(frozen=True)
class CommonSchedule:
    """Schedule: linear warm-up, then cosine, changing at every step"""

    epochs: int = 800
    """Passes over the training images."""
    warmup_epochs: float = 40.0
    """Epochs in which the learning rate climbs from 0 to its peak."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    batch_size: int | Literal["auto"] = 64
    """Images a step, of all devices together; "auto" takes as many as fit on them."""
    accumulate: int | Literal["auto"] = 1
    """Parts that a device's share of a step is computed in, one after the other, which need so much less memory; "auto" takes the
    fewest with which it fits."""


@dataclass(frozen=True)
class ScheduleConfig(CommonSchedule):
    """Schedule: linear warm-up, then cosine, changing at every step"""

    mask_ratio: float = 0.75
    """Fraction of the patches removed from an image."""


@dataclass(frozen=True)
class CommonRun:
    """Run: device, precision, what is written and when"""

    device: str = "auto"
    """"auto" (CUDA where there is one), or a torch device such as "cpu" or "cuda:1"."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """How the processes of torchrun share the model: each has all of it, or a part of each parameter, of its gradient and of the
    optimizer's means (not with run.compile); of one process, neither."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"bfloat16" is autocast; "auto" takes it on CUDA and on CPUs with bfloat16 instructions. "float16" is autocast with a loss
    that is scaled, for GPUs without bfloat16; metrics.jsonl has the scale and the steps skipped for it."""
    stream: Literal["float32", "16bit"] = "float32"
    """Tokens between layers; "16bit", under autocast, halves their memory and traffic, at the price of more rounding."""
    recompute: bool = False
    """Do projection and attention again in the backward: half the memory between layers, more time."""
    compile: bool = False
    """Train under torch.compile: a few per cent faster on a CPU, for a minute at the start; needs a compiler."""
    threads: int = 0
    """CPU threads that compute; 0 leaves the number to torch."""
    seed: int = 0
    """Fixes initial weights, order, crops, masks and all else that is drawn."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every: int = 10
    """Epochs between validations, after each of which the run is saved."""
    save_minutes: float = 30.0
    """Minutes since the last save after which the run is saved in the middle of an epoch, too; 0 for never."""
    keep_states: int = 2
    """States to resume from that are kept: so many of the last ones, and that of the best validation."""
    keep_every: int = 0
    """Epochs between states that are kept besides, while this setting is; 0 keeps none."""
    log_to: tuple[str, ...] = ()
    """Where the lines of metrics.jsonl go as well: any of csv, tensorboard, wandb, mlflow."""
    norms_every: int = 0
    """Steps between rows of metrics.jsonl with the norm of the gradient of each part of the model; 0 for none."""
    profile: int = 0
    """Steps to profile when the run has begun: a trace and a table of the longest operations, in profile/; 0 for none."""


@dataclass(frozen=True)
class RunConfig(CommonRun):
    """Run: device, precision, what is written and when"""

    graph: Literal["auto", "on", "off"] = "auto"
    """Capture a whole step in a CUDA graph, which the device then repeats without waiting for the host; "auto" does where that
    can be (on CUDA, in one process, not with float16 or run.compile), and says why where it cannot. Small batches gain most."""
    analyze_every: int = 0
    """Epochs between looks inside: rows of metrics.jsonl with coding rate, sparsity, rank... of each layer on 32 validation
    images, as `crate-mae analyze` measures them; 0 for none."""
    pictures: int = 8
    """Validation images shown in reconstructions.png."""


MAX_SEED = 2**64 - 1
"""The largest seed that torch's generators take."""

Limit = tuple[Callable[[Any], bool], str]
"""A test of a setting's value, and what it expects, in words."""

POSITIVE: Limit = (lambda value: value > 0, "above 0")
NOT_NEGATIVE: Limit = (lambda value: value >= 0, "0 or more")
AT_LEAST_ONE: Limit = (lambda value: value >= 1, "1 or more")
FRACTION: Limit = (lambda fraction: 0 <= fraction <= 1, "0 to 1")

_LIMITS: dict[str, Limit] = {
    "images.crop_scale": (lambda scale: 0 < scale[0] <= scale[1] <= 1, "0 < least <= largest <= 1"),
    "images.crop_ratio": (lambda ratio: 0 < ratio[0] <= ratio[1], "0 < least <= largest"),
    "images.val_fraction": (lambda fraction: 0 <= fraction < 1, "at least 0 and below 1"),
    "images.cache_mb": (lambda size: 0 <= size < 2**31, "0 or more, and below 2**31"),
    "images.num_workers": (lambda count: count == "auto" or count >= 0, "auto, or 0 or more"),
    "images.max_unreadable": FRACTION,
    "images.blur": FRACTION,
    "images.solarize": FRACTION,
    "optimizer.base_lr": POSITIVE,
    "optimizer.betas": (lambda betas: all(0 <= beta < 1 for beta in betas), "two values, at least 0 and below 1"),
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.clip_grad": NOT_NEGATIVE,
    "optimizer.average": (lambda decay: 0 <= decay < 1, "at least 0 and below 1"),
    "schedule.epochs": (lambda epochs: 1 <= epochs <= 10**6, "1 to a million"),
    "schedule.warmup_epochs": NOT_NEGATIVE,
    "schedule.min_lr": NOT_NEGATIVE,
    "schedule.batch_size": (lambda size: size == "auto" or 1 <= size < 2**31, "auto, or 1 or more, and below 2**31"),
    "schedule.accumulate": (lambda parts: parts == "auto" or parts >= 1, "auto, or 1 or more"),
    "run.threads": NOT_NEGATIVE,
    "run.seed": (lambda seed: 0 <= seed <= MAX_SEED, "0 to 2**64 - 1"),
    "run.log_every": AT_LEAST_ONE,
    "run.save_every": AT_LEAST_ONE,
    "run.save_minutes": NOT_NEGATIVE,
    "run.keep_states": AT_LEAST_ONE,
    "run.keep_every": NOT_NEGATIVE,
    "run.log_to": (
        lambda names: len(set(names)) == len(names) and set(names) <= set(PLACES),
        f"some of {', '.join(PLACES)}, each once",
    ),
    "run.norms_every": NOT_NEGATIVE,
    "run.profile": NOT_NEGATIVE,
}


class _Sections:
    """The sections that every kind of run has. Each kind makes fields of them, with its own defaults and in its own order."""

    model: ModelConfig | ClassifierConfig
    images: ImagesConfig
    optimizer: OptimizerConfig
    schedule: CommonSchedule
    run: CommonRun


@dataclass(frozen=True)
class TrainingConfig(_Sections):
    """What to learn from and where to keep the result: the settings that all kinds of runs have."""

    kind: ClassVar[str]
    """The command whose settings these are."""
    limits: ClassVar[dict[str, Limit]] = _LIMITS
    """Limits of settings, by section.name; a kind of run adds its own."""
    kept: ClassVar[tuple[str, ...]] = ("schedule.batch_size", "run.seed")
    """Settings, or whole sections, that a resumed run must keep, beside `init`."""

    out: Path
    """Folder for metrics.jsonl, config.json, model.safetensors, states/ and best/."""
    data: str | None = None
    """Images to train on: a folder, flat or with class sub-folders, of train/ and val/ in which one is for each; tar shards,
    name-{000000..000099}.tar or a folder of them; hf:NAME, a data set of Hugging Face; synthetic:COUNT; several with weights,
    "2 photos + 1 shards". Without it, the photographs shipped along."""
    val: str | None = None
    """Images to validate on, likewise; without it, a part of the training images is held out."""
    init: Path | None = None
    """Folder of a run, or file of weights, to start from; without it, from random weights. A run also gives the model's sizes."""

    def __post_init__(self) -> None:
        for name in ("out", "init"):  # from Python, strings will do
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path))
        for name, value in _numbers(self):
            if not fits_float32(value):
                raise ValueError(f"{name}: expected finite numbers, in float32, too, got {value}")
        for name, (holds, expected) in self.limits.items():
            value = attrgetter(name)(self)
            if not holds(value):
                raise ValueError(f"{name}: expected {expected}, got {value}")
        if self.init and os.path.abspath(self.out) in map(os.path.abspath, (self.init, self.init.parent)):
            raise ValueError(
                f"init: expected another run than the one in out, got {self.init}; --resume goes on with that"
            )
        for name in ("data", "val"):
            folder = getattr(self, name)
            if folder is not None and not isinstance(folder, str):
                object.__setattr__(self, name, folder := os.fspath(folder))
            if folder is not None and os.path.realpath(folder) == os.path.realpath(self.out):
                raise ValueError(
                    f"out: expected another folder than {name}, got {self.out}; a run's pictures are no photographs"
                )
        epochs, warmup = self.schedule.epochs, self.schedule.warmup_epochs
        if warmup >= epochs:
            raise ValueError(
                f"schedule.warmup_epochs: expected fewer than the {epochs} of schedule.epochs, got {warmup:g}; "
                "the peak learning rate would never be reached"
            )
        if self.schedule.batch_size == "auto":  # checked again when it has become a number, before training
            return
        peak = self.peak_lr
        if not fits_float32(peak, peak * self.optimizer.weight_decay):
            raise ValueError(
                f"optimizer.base_lr: expected a peak learning rate, optimizer.base_lr * schedule.batch_size / 256, and its "
                f"product with optimizer.weight_decay that are finite in float32, got {self.optimizer.base_lr:g}"
            )
        if self.schedule.min_lr > peak:
            raise ValueError(
                f"schedule.min_lr: expected at most the peak learning rate {peak:g} "
                f"(optimizer.base_lr * schedule.batch_size / 256), got {self.schedule.min_lr:g}"
            )

    def with_schedule(self, **changes: Any) -> Self:
        """These settings with others in their section `schedule`."""
        sections: dict[str, Any] = {"schedule": dataclasses.replace(self.schedule, **changes)}
        return dataclasses.replace(self, **sections)

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.optimizer.base_lr * int(self.schedule.batch_size) / 256

    @property
    def meaning(self) -> dict[str, Any]:
        """What is needed to use the model, beside its weights; arguments of `save_model`."""
        return {"mean": self.images.mean, "std": self.images.std}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json, which `--config` takes. Paths are absolute, so that they mean the same in any folder."""
        values = json.loads(json.dumps(dataclasses.asdict(self), default=os.path.abspath))
        return values | {name: absolute(values[name]) for name in ("data", "val") if values[name] is not None}


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """What to learn from and where to keep the result"""

    kind: ClassVar[str] = "pretrain"
    limits: ClassVar[dict[str, Limit]] = TrainingConfig.limits | {
        "schedule.mask_ratio": (lambda ratio: 0 < ratio < 1, "above 0 and below 1"),
        "run.analyze_every": NOT_NEGATIVE,
        "run.pictures": AT_LEAST_ONE,
    }
    kept: ClassVar[tuple[str, ...]] = ("model", *TrainingConfig.kept)

    out: Path
    """Folder for metrics.jsonl, config.json, model.safetensors, states/, best/ and reconstructions.png."""
    model: ModelConfig = field(default_factory=ModelConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        patches, ratio = math.prod(grid_of(self.model.image_shape, self.model.patch_size)), self.schedule.mask_ratio
        if int(patches * (1 - ratio)) == patches:
            raise ValueError(f"schedule.mask_ratio: {ratio} leaves no patch of {patches} to reconstruct")


def _numbers(config: TrainingConfig) -> Iterator[tuple[str, float]]:
    """The floating-point numbers among the settings, by section.name."""
    for section, fields in dataclasses.asdict(config).items():
        for name, value in fields.items() if isinstance(fields, dict) else ():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float):
                    yield f"{section}.{name}", number


@contextmanager
def of_section(name: str, **named_otherwise: str) -> Iterator[None]:
    """Put a section in front of the setting at the head of a ValueError's message: "mean: ..." -> "images.mean: ...".

    Args:
        name: of the section.
        named_otherwise: setting=name, for settings that messages call by another name.
    """
    try:
        yield
    except ValueError as error:
        said, colon, rest = str(error).partition(":")
        setting = {message: setting for setting, message in named_otherwise.items()}.get(said, said)
        raise ValueError(f"{name}.{setting}{colon}{rest}") from None


def demo_config(out: Path) -> PretrainConfig:
    """A CRATE-MAE small enough to learn the shipped photographs on two CPU cores within four minutes.

    Other settings that were tried, and their results, are in benchmarks/results/cpu/demo_trials.md.
    """
    return PretrainConfig(
        out=out,
        model=ModelConfig(
            img_size=64,
            patch_size=8,
            embed_dim=128,
            depth=3,
            num_heads=4,
            decoder_depth=1,
            decoder_num_heads=4,
            lambd=0.1,
        ),
        # In so few steps a model learns large crops of each photograph better than many small ones. One loader process makes
        # them, which saves the computing process a tenth of its time.
        images=ImagesConfig(crop_scale=(0.5, 1.0), crop_ratio=(1.0, 1.0), num_workers=1),
        # Models this small do best with a far higher learning rate and smaller batches than those of the published recipes.
        optimizer=OptimizerConfig(base_lr=0.024, weight_decay=0.2),
        schedule=ScheduleConfig(epochs=110, warmup_epochs=11, batch_size=16),
        # On a CPU, casting narrow layers costs more time than bfloat16 saves, and a second thread gains little; if something else
        # needs its core, the two threads wait for each other and are many times slower than one.
        run=RunConfig(precision="bfloat16" if torch.cuda.is_available() else "float32", threads=1),
    )
