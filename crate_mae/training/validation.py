"""The reconstruction error on images held out, and the error of a guess that any model must beat."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from crate_mae.data import ImageFolder, ImageLoader, Normalization, centre_crop, image_to_tensor
from crate_mae.data.transforms import Size
from crate_mae.model import CrateMAE
from crate_mae.pictures import predicted_patches
from crate_mae.training.precision import autocast


class ValidationErrors(NamedTuple):
    """Mean squared errors on removed patches, in normalised pixels.

    Attributes:
        val_loss: of the model. With `norm_pix_loss` its prediction is first brought back to pixels with the mean and
            deviation of the true patch, so that the number can be held against `mean_fill_loss`.
        mean_fill_loss: of filling the removed patches of an image with the mean of its visible ones; the better of the
            mean patch (pixel by pixel) and the mean colour.
    """

    val_loss: float
    mean_fill_loss: float


class CentreCropped(Dataset[torch.Tensor]):
    """The images of a folder, uncut by chance: uint8 [channels, height, width]."""

    def __init__(self, folder: ImageFolder, size: Size) -> None:
        self.folder, self.size = folder, size

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> torch.Tensor:
        return image_to_tensor(centre_crop(self.folder.image(index), self.size))


class Validation:
    """Measures a model on the same images with the same masks each time, so that epochs can be compared."""

    def __init__(
        self,
        images: Dataset[torch.Tensor],
        normalization: Normalization,
        *,
        patches: int,
        mask_ratio: float,
        batch_size: int,
        seed: int,
        precision: str = "float32",
        num_workers: int = 0,
    ) -> None:
        self.images = images
        self.normalization = normalization
        self.mask_ratio = mask_ratio
        self.precision = precision
        self.noise = torch.rand(len(images), patches, generator=torch.Generator().manual_seed(seed))
        self._loader = ImageLoader(
            images, batch_size=batch_size, num_workers=num_workers, generator=torch.Generator().manual_seed(seed)
        )

    @torch.no_grad()
    def __call__(self, model: CrateMAE) -> ValidationErrors:
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        removed = 0.0
        for pixels, noise in zip(self._loader, self.noise.split(self._loader.batch_size), strict=True):
            images = self.normalization(pixels.to(device))
            with autocast(self.precision, device):
                output = model(images, mask_ratio=self.mask_ratio, noise=noise.to(device))
            target = model.patchify(images)
            guesses = (
                predicted_patches(model, images, output.pred),
                mean_visible_patch(target, output.mask),
                mean_visible_colour(target, output.mask, channels=images.shape[1]),
            )
            errors = [(((guess - target) ** 2).mean(-1) * output.mask).sum() for guess in guesses]
            sums += torch.stack(errors).double().cpu()
            removed += output.mask.sum().item()
        model.train(was_training)
        val_loss, patch_fill_loss, colour_fill_loss = (sums / removed).tolist()
        return ValidationErrors(val_loss, min(patch_fill_loss, colour_fill_loss))


def mean_visible_patch(target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[batch, 1, values]: the mean of each image's visible patches, value by value; mask is 1 where removed."""
    visible = (1 - mask).unsqueeze(-1)
    return (target * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)


def mean_visible_colour(target: torch.Tensor, mask: torch.Tensor, *, channels: int) -> torch.Tensor:
    """[batch, 1, values]: the mean colour of each image's visible patches, at every pixel of a patch."""
    patch = mean_visible_patch(target, mask).unflatten(-1, (-1, channels))
    return patch.mean(-2, keepdim=True).expand_as(patch).flatten(-2)
