"""Mixup and CutMix: an image is made of two, and its target has a share of the class of each."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crate_mae.finetuning.config import AugmentConfig

_KEY = (1,)
"""Makes these random numbers independent of those for the order of images, which depend on (seed, epoch)."""


class Mix(NamedTuple):
    """How the images of a batch are mixed: the first with the last, the second with the last but one, and so on.

    Attributes:
        share: the share of an image itself in the mixed one; 1 if nothing is mixed.
        box: (top, left, bottom, right) in pixels of the rectangle taken from the other image; None if the two are blended.
    """

    share: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(config: AugmentConfig, seed: int, step: int, size: tuple[int, int]) -> Mix:
    """Draw how the batch of a step is mixed; a function of seed and step alone.

    One draw serves the whole batch, as in timm's ``Mixup`` in its mode "batch". If both mixup and CutMix are on, CutMix has
    probability ``switch``. Its rectangle has the image's proportions and the area 1 - lambda, around a uniformly drawn centre;
    what would lie outside the image is cut off, and the share is computed from the pixels that are left.

    Args:
        config: how often and how strongly images are mixed.
        seed, step: of the run.
        size: (height, width) of the images in pixels.
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
    """The images [batch, channels, height, width], mixed with the batch in reverse order."""
    if mix.share == 1:
        return images
    if mix.box is None:
        return mix.share * images + (1 - mix.share) * images.flip(0)
    top, left, bottom, right = mix.box
    images = images.clone()
    images[..., top:bottom, left:right] = images[..., top:bottom, left:right].flip(0)
    return images


def mixed_targets(labels: Tensor, classes: int, mix: Mix, smoothing: float) -> Tensor:
    """Targets of mixed images, float32 [batch, classes]; each sums to 1.

    A target is the mix's share of the image's own class and the rest of the other image's; then a fraction ``smoothing`` of it is
    spread over all classes.

    Args:
        labels: the classes, int64 [batch].
        classes: how many there are.
        mix: how the images are mixed.
        smoothing: at least 0 and below 1.
    """
    own = torch.nn.functional.one_hot(labels, classes).float()
    return (mix.share * own + (1 - mix.share) * own.flip(0)) * (1 - smoothing) + smoothing / classes
