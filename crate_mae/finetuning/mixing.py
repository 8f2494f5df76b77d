"""Mixup and CutMix: images of two classes in one, and targets that say how much of each."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crate_mae.finetuning.config import AugmentConfig

_KEY = (1,)
"""Sets these draws apart from those of the orders of epochs, which are of (seed, epoch)."""


class Mix(NamedTuple):
    """How the images of a batch are mixed, each with the one as far from the batch's other end.

    Attributes:
        share: of an image in what it becomes; 1 where nothing is mixed.
        box: (top, left, bottom, right) of what is taken from the other, in pixels; None where the two are blended.
    """

    share: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(config: AugmentConfig, seed: int, step: int, size: tuple[int, int]) -> Mix:
    """What is done in a step: a function of the seed and the step alone.

    Which of the two is done, how much and where is drawn once a batch, as timm's ``Mixup`` does in its mode "batch": CutMix with
    probability ``switch`` where both are on. Its rectangle has the image's shape and the area 1 - lambda around a uniform place;
    what would lie outside is cut off, and the share is that of the pixels left.

    Args:
        size: (height, width) in pixels.
    """
    rng = np.random.default_rng(np.random.SeedSequence((seed, step), spawn_key=_KEY))
    is_cut = config.cutmix > 0 and (config.mixup == 0 or rng.random() < config.switch)
    alpha = config.cutmix if is_cut else config.mixup
    if alpha == 0:
        return Mix(1.0)
    share = float(rng.beta(alpha, alpha))
    if not is_cut:
        return Mix(share)
    (top, bottom), (left, right) = (_span(rng, side, math.sqrt(1 - share)) for side in size)
    height, width = size
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, left, bottom, right))


def _span(rng: np.random.Generator, side: int, part: float) -> tuple[int, int]:
    length, centre = int(side * part), int(rng.integers(side))
    return max(0, centre - length // 2), min(side, centre + length // 2)


def mixed(images: Tensor, mix: Mix) -> Tensor:
    """The images [batch, channels, height, width], mixed; the batch's last with its first, and so on."""
    if mix.share == 1:
        return images
    if mix.box is None:
        return mix.share * images + (1 - mix.share) * images.flip(0)
    top, left, bottom, right = mix.box
    images = images.clone()
    images[..., top:bottom, left:right] = images[..., top:bottom, left:right].flip(0)
    return images


def mixed_targets(labels: Tensor, classes: int, mix: Mix, smoothing: float) -> Tensor:
    """Targets float32 [batch, classes], which sum to 1: of each image its share of its class and the rest of the other's, and of
    all of that ``smoothing`` spread over all classes.

    Args:
        labels: int64 [batch].
    """
    own = torch.nn.functional.one_hot(labels, classes).float()
    return (mix.share * own + (1 - mix.share) * own.flip(0)) * (1 - smoothing) + smoothing / classes
