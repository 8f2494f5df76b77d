"""The settings of a fine-tuning. Docstrings of fields are help texts of the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from crate_mae.config import ClassifierConfig
from crate_mae.training.config import (
    FRACTION,
    NOT_NEGATIVE,
    CommonRun,
    CommonSchedule,
    ImagesConfig,
    Limit,
    OptimizerConfig,
    TrainingConfig,
)


@dataclass(frozen=True)
class FinetuneOptimizerConfig(OptimizerConfig):
    """Optimizer: AdamW, with a lower rate for lower layers"""

    base_lr: float = 5e-4
    """Peak learning rate of the head for a batch of 256; the rate used is base_lr * batch_size / 256."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    weight_decay: float = 0.05
    """Weight decay of matrices; biases, norms, tokens and positions have none."""
    clip_grad: float = 0.0
    """Largest norm of the whole gradient, longer ones are shortened to it; 0 never shortens."""
    layer_decay: float = 0.65
    """Learning rate of a layer as a multiple of that of the layer above it, down from the head; 1 gives all the same."""


@dataclass(frozen=True)
class FinetuneScheduleConfig(CommonSchedule):
    """Schedule: linear warm-up, then cosine, changing at every step"""

    epochs: int = 100
    """Passes over the training images."""
    warmup_epochs: float = 5.0
    """Epochs in which the learning rate climbs from 0 to its peak."""
    min_lr: float = 1e-6
    """Learning rate of the head at the end."""


@dataclass(frozen=True)
class FinetuneRunConfig(CommonRun):
    """Run: device, precision, what is written and when"""

    save_every: int = 5
    """Epochs between validations, after each of which the run is saved."""


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation beside crops and flips, which are those of pre-training: no RandAugment, no random erasing"""

    mixup: float = 0.8
    """Two images are blended by a share drawn from Beta(mixup, mixup) (arXiv 1710.09412); 0 for never."""
    cutmix: float = 1.0
    """A rectangle of one image is put into another, its area drawn from Beta(cutmix, cutmix) (arXiv 1905.04899); 0 for never."""
    switch: float = 0.5
    """Fraction of the batches that have cutmix, where both are on; the others have mixup."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes alike."""
    drop_path: float = 0.1
    """Stochastic depth: share of the samples for which the last layer's residual branch is left out; less in lower layers."""


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """What to learn classes from and where to keep the result"""

    kind: ClassVar[str] = "finetune"
    limits: ClassVar[dict[str, Limit]] = TrainingConfig.limits | {
        "optimizer.layer_decay": (lambda decay: 0 < decay <= 1, "above 0 and at most 1"),
        "augment.mixup": NOT_NEGATIVE,
        "augment.cutmix": NOT_NEGATIVE,
        "augment.switch": FRACTION,
        "augment.label_smoothing": (lambda share: 0 <= share < 1, "at least 0 and below 1"),
        "augment.drop_path": (lambda rate: 0 <= rate < 1, "at least 0 and below 1"),
    }
    kept: ClassVar[tuple[str, ...]] = (
        *(f"model.{each.name}" for each in dataclasses.fields(ClassifierConfig) if each.name != "num_classes"),
        *TrainingConfig.kept,
    )

    data: str | None = None
    """Labelled images to train on: a folder with a sub-folder for each class, of train/ and val/ in which one is for each; CIFAR,
    Flowers-102 or Pets as they are distributed; tar shards, name-{000000..000099}.tar or a folder of them; hf:NAME, a data set of
    Hugging Face; several with weights, "2 photos + 1 shards". Without it, the photographs shipped along."""
    val: str | None = None
    """Labelled images to validate on, likewise; without it, a part of the training images is held out."""
    classes: tuple[str, ...] | None = None
    """Names of the classes, in the order of the logits; without it, those of the training images, in theirs."""
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    """Its ``num_classes`` is that of the classes, whatever it says."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    optimizer: FinetuneOptimizerConfig = field(default_factory=FinetuneOptimizerConfig)
    schedule: FinetuneScheduleConfig = field(default_factory=FinetuneScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    run: FinetuneRunConfig = field(default_factory=FinetuneRunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes is None:
            return
        object.__setattr__(self, "classes", tuple(self.classes))
        if len(set(self.classes)) != len(self.classes) or len(self.classes) < 2:
            raise ValueError(f"classes: expected two different names or more, got {list(self.classes)}")

    @property
    def meaning(self) -> dict[str, Any]:
        return super().meaning | {"classes": self.classes}
