"""Images for pre-training: folders of photographs, augmentation, batches, and the photographs shipped along."""

from __future__ import annotations

from crate_mae.data.batches import BatchSampler, ImageLoader, PretrainImages, epoch_order, pretrain_loader
from crate_mae.data.folder import COLOUR_MODES, FLOWERS, IMAGE_SUFFIXES, ImageFolder, UnreadableImage, read_image
from crate_mae.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Normalization,
    centre_crop,
    image_to_tensor,
    random_resized_crop,
)

__all__ = [
    "COLOUR_MODES",
    "FLOWERS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "IMAGE_SUFFIXES",
    "BatchSampler",
    "ImageFolder",
    "ImageLoader",
    "Normalization",
    "PretrainImages",
    "UnreadableImage",
    "centre_crop",
    "epoch_order",
    "image_to_tensor",
    "pretrain_loader",
    "random_resized_crop",
    "read_image",
]
