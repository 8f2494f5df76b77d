"""The fine-tuning run: a classifier is trained end to end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from crate_mae.checkpoints import CONFIG_FILE
from crate_mae.classifiers import Classifier
from crate_mae.data import LabelledCentreCropped
from crate_mae.finetuning.classes import classes_of, labels_among
from crate_mae.finetuning.config import FinetuneConfig
from crate_mae.finetuning.mixing import draw_mix, mixed, mixed_targets
from crate_mae.finetuning.optimizer import build_layerwise_optimizer
from crate_mae.finetuning.scoring import Scores, ScoreWatch, Scoring
from crate_mae.finetuning.starting import starting_classifier
from crate_mae.registry import count_parameters
from crate_mae.training.callbacks import Callback
from crate_mae.training.config import of_section
from crate_mae.training.image_sets import of_option
from crate_mae.training.planning import Plan, planned
from crate_mae.training.run import Resume, Run, train


class FinetuneResult(NamedTuple):
    """How a fine-tuning ended.

    Attributes:
        out: its folder, with the last model, and the best one in ``best/``.
        steps, epochs: optimizer steps, and passes over the images.
        train_images, val_images: how many images were trained on, and validated on.
        classes: their names, in the order of the logits.
        scores: of the last model; None if there were no images to validate on.
        best, best_epoch: scores and epoch of the validation with the highest top-1; among equals, with the least loss.
    """

    out: Path
    steps: int
    epochs: float
    train_images: int
    val_images: int
    classes: tuple[str, ...]
    scores: Scores | None
    best: Scores | None
    best_epoch: float | None


def finetune(
    config: FinetuneConfig, *, resume: Resume = False, overwrite: bool = False, callbacks: Sequence[Callback] = ()
) -> FinetuneResult:
    """Train a classifier end to end, from a trained encoder or from random weights; its files are left in `config.out`.

    The recipe is that of MAE's fine-tuning (arXiv 2111.06377, appendix A.1, table 9; facebookresearch/mae, FINETUNE.md), with the
    numbers of its code for ViT-Base: AdamW with a layer-wise learning rate, warm-up and cosine, mixup and CutMix, label
    smoothing, stochastic depth. Crops and flips are those of pre-training; there is no RandAugment and no random erasing.
    Validation is on whole images, and the best model is the one with the highest top-1.

    A run is a function of its configuration and its images, and can be interrupted and resumed, as for `training.pretrain`.

    Args:
        config: the settings; `model` has the family and sizes of the model in `init` (``classifier_config(read_config(init))``).
        resume, overwrite, callbacks: as of `training.pretrain`.

    Raises:
        ValueError: images have no classes, or validation images have others; or as of `training.pretrain`.
        Exception: all others as of `training.pretrain`.
    """
    run = train(FinetuneRun, config, resume, overwrite, callbacks)
    per_epoch, watch = run.steps_per_epoch, run.record.watch
    assert isinstance(watch, ScoreWatch)
    return FinetuneResult(
        out=config.out,
        steps=run.step,
        epochs=run.step / per_epoch,
        train_images=len(run.train_images),
        val_images=len(run.val_images or ()),
        classes=run.classes,
        scores=run.errors,
        best=watch.best,
        best_epoch=None if watch.best_step is None else watch.best_step / per_epoch,
    )


def plan(config: FinetuneConfig, *, resume: Resume = False, overwrite: bool = False) -> Plan:
    """What `finetune` with the same arguments would do; see `training.plan`."""
    return planned(FinetuneRun, config, resume, overwrite)


class FinetuneRun(Run[FinetuneConfig, Classifier, Scores]):
    """Fine-tuning: images are classified. Beside the pixels, the loss takes the classes.

    Attributes:
        classes: the names of the classes, in the order of the logits.
        labels, val_labels: the class of each image to train on and to validate on, by its place among these.
    """

    beside = "label"
    watch = ScoreWatch

    classes: tuple[str, ...]
    labels: np.ndarray
    val_labels: np.ndarray | None

    def _settled(self, resumed: bool) -> FinetuneConfig:
        config, classes = self.config, self.config.classes
        if resumed:
            classes = _of_run(config)
            if config.classes not in (None, classes):
                raise ValueError(f"classes: a resumed run keeps those it has, {', '.join(classes)}")
        with of_option("--data"):
            self.classes = classes or classes_of(self.train_images, self.val_images)
            self.labels = labels_among(self.train_images, self.classes)
        with of_option("--val" if config.val else "--data"):
            self.val_labels = labels_among(self.val_images, self.classes) if self.val_images else None
        with of_section("model"):
            model = dataclasses.replace(config.model, num_classes=len(self.classes))
        return dataclasses.replace(config, classes=self.classes, model=model)

    def _model(self, resumed: bool) -> Classifier:
        try:
            model = starting_classifier(self.config.model, None if resumed else self.config.init)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"--init: {error}") from error
        model.set_drop_path(self.config.augment.drop_path)
        return model

    def _optimizer(self) -> torch.optim.Optimizer:
        return build_layerwise_optimizer(self.model, self.config.optimizer, self.batch_size)

    def _of_samples(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def _validation(self) -> Scoring | None:
        if self.val_images is None or self.val_labels is None:
            return None
        model = self.config.model
        return Scoring(
            LabelledCentreCropped(self.val_images, self.val_labels, model.image_shape, model.in_chans),
            self.normalization,
            **self._measuring(),
        )

    def _loss(self, forward: Callable[..., Any], images: torch.Tensor, beside: torch.Tensor, step: int) -> torch.Tensor:
        augment, model = self.config.augment, self.config.model
        mix = draw_mix(augment, self.config.run.seed, step, model.image_shape)
        targets = mixed_targets(beside, model.num_classes, mix, augment.label_smoothing)
        return F.cross_entropy(forward(mixed(images, mix)).float(), targets)

    def _said_of(self, errors: Scores) -> str:
        return f"validation top-1 {errors.val_top1:.2%}, top-5 {errors.val_top5:.2%}, loss {errors.val_loss:.4f}"

    def _opening_line(self) -> str:
        model, drop = self.config.model, self.config.augment.drop_path
        return (
            f"finetune: {count_parameters(self.model)[0]:,} parameters ({model.family}, {model.depth} layers of width "
            f"{model.embed_dim}, drop path {drop:g}), {model.num_classes} classes, {self._computed_by()}"
        )


def _of_run(config: FinetuneConfig) -> tuple[str, ...]:
    """The classes of the run in the folder, by its config.json."""
    file = config.out / CONFIG_FILE
    classes = json.loads(file.read_text(encoding="utf-8")).get("classes")
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError(f"{file}: classes: expected a list of names, and --resume needs it: mend it, or --overwrite")
    return tuple(classes)
