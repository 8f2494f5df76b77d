"""Images for pre-training: folders of photographs, augmentation, batches, and the photographs shipped along."""

from __future__ import annotations

from crate_mae.data.batches import (
    STOPPING,
    BatchSampler,
    ImageLoader,
    LostWorkers,
    PretrainImages,
    epoch_order,
    in_order,
)
from crate_mae.data.folder import COLOUR_MODES, FLOWERS, ImageFolder, compare, read_image
from crate_mae.data.reading import IMAGE_SUFFIXES
from crate_mae.data.source import UnreadableImage
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
    "STOPPING",
    "BatchSampler",
    "ImageFolder",
    "ImageLoader",
    "LostWorkers",
    "Normalization",
    "PretrainImages",
    "UnreadableImage",
    "centre_crop",
    "compare",
    "epoch_order",
    "image_to_tensor",
    "in_order",
    "random_resized_crop",
    "read_image",
]
