"""The reconstruction error on images held out, and the errors of simple guesses that any model must beat."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import Dataset

from crate_mae.data import CentreCropped, Normalization, part_of
from crate_mae.evaluation import BLUR_SIGMAS, blurred_visible, mean_visible_colour, mean_visible_patch
from crate_mae.model import CrateMAE, MAEOutput
from crate_mae.pictures import predicted_patches
from crate_mae.training.held_out import HeldOut
from crate_mae.training.precision import autocast


class ValidationErrors(NamedTuple):
    """Mean squared errors on removed patches, in normalised pixels; all on the same images and masks.

    Attributes:
        val_loss: error of the model. With `norm_pix_loss` its prediction is first brought back to pixels with the mean and
            deviation of the true patch, so that it can be compared with the other errors.
        mean_fill_loss: error of filling removed patches with a mean of the image's visible ones: the mean patch (pixel by pixel)
            or the mean colour, whichever is better.
        blur_loss: error of the best Gaussian blur of the visible pixels, `evaluation.blurred_visible`.
        blur_sigma: the standard deviation of that blur, in pixels.
    """

    val_loss: float
    mean_fill_loss: float
    blur_loss: float
    blur_sigma: float

    @property
    def guess(self) -> tuple[str, float]:
        """The name and the error of the guess with which `DivergenceWatch` compares."""
        return "mean fill", self.mean_fill_loss


class Validation(HeldOut[CrateMAE, ValidationErrors]):
    """Measures a model on the same images with the same masks each time, so that epochs can be compared.

    Args:
        images: uint8 [channels, height, width] each.
        patches: of an image.
        mask_ratio: fraction of them that is removed.
        seed: fixes which.
        **measuring: as of `HeldOut`.
    """

    def __init__(
        self,
        images: CentreCropped | Sequence[torch.Tensor],
        normalization: Normalization,
        *,
        patches: int,
        mask_ratio: float,
        seed: int,
        **measuring: Any,
    ) -> None:
        dataset = cast("Dataset[torch.Tensor]", images)  # the loader takes items by their numbers, and nothing else
        super().__init__(dataset, len(images), normalization, **measuring)
        self.images, self.mask_ratio, self.patches, self.seed = images, mask_ratio, patches, seed
        self._fill_errors: dict[str | float, float] = {}

    @property
    def noise(self) -> torch.Tensor:
        """The noise of all images, see `mask_noise`."""
        return mask_noise(len(self.images), self.patches, self.seed)

    @torch.no_grad()
    def unless(self, model: CrateMAE, stopped: Callable[[], object]) -> ValidationErrors | None:
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        first = not self._fill_errors  # no model changes them, so they are measured once
        sums: defaultdict[str | float, float] = defaultdict(float)
        removed = 0.0
        generator = torch.Generator().manual_seed(
            self.seed
        )  # batch by batch: for millions of images the noise is large
        for pixels, size in zip(self._loader, self._sizes, strict=True):
            noise = part_of(torch.rand(size, self.patches, generator=generator), self.ranks.rank, self.ranks.count)
            if stopped():
                model.train(was_training)
                return None
            images = self.normalization(pixels.to(device))
            with autocast(self.precision, device):
                output = model(images, mask_ratio=self.mask_ratio, noise=noise.to(device))
            if self.ranks.rank >= size:  # this rank has no image of this batch
                continue
            target = model.patchify(images)
            guesses: dict[str | float, torch.Tensor] = {"model": predicted_patches(model, images, output.pred)}
            if first:
                guesses |= _fills(model, images, output)
            for name, guess in guesses.items():
                sums[name] += float((((guess - target) ** 2).mean(-1) * output.mask).sum())
            removed += float(output.mask.sum())
        model.train(was_training)
        of_ranks = self.ranks.gathered((sums, removed))
        removed = math.fsum(each for _, each in of_ranks)
        errors = {name: math.fsum(each[name] for each, _ in of_ranks) / removed for name in of_ranks[0][0]}
        val_loss = errors.pop("model")
        self._fill_errors.update(errors)
        fills = self._fill_errors
        sigma = min((name for name in fills if isinstance(name, float)), key=fills.__getitem__)
        return ValidationErrors(val_loss, min(fills["patch"], fills["colour"]), fills[sigma], sigma)


def mask_noise(images: int, patches: int, seed: int) -> torch.Tensor:
    """The noise [images, patches] that fixes the masks of validation images, for `model(images, mask_ratio, noise)`."""
    return torch.rand(images, patches, generator=torch.Generator().manual_seed(seed))


def _fills(model: CrateMAE, images: torch.Tensor, output: MAEOutput) -> dict[str | float, torch.Tensor]:
    """Guesses at all patches, [batch, patches or 1, patch values], by name; blurs by their sigma in pixels."""
    target, side = model.patchify(images), model.config.patch_size
    grid = (images.shape[-2] // side, images.shape[-1] // side)
    visible = model.unpatchify((1 - output.mask).unsqueeze(-1).expand_as(target), grid=grid)
    return {
        "patch": mean_visible_patch(target, output.mask),
        "colour": mean_visible_colour(target, output.mask, channels=images.shape[1]),
    } | {
        sigma: model.patchify(blurred_visible(images, visible, sigma))
        for sigma in (side * relative for relative in BLUR_SIGMAS)
    }
