"""Images to train on: their sources, reading and cropping, batches, and the photographs that the package ships."""

from __future__ import annotations

from crate_mae.data.augmentation import augmented
from crate_mae.data.batches import BatchSampler, in_order, part_of
from crate_mae.data.decoded import decoded_if_small
from crate_mae.data.folder import FLOWERS, ImageFolder, compare
from crate_mae.data.huggingface import HuggingFaceImages
from crate_mae.data.labelled import LabelledParts, labelled_parts
from crate_mae.data.loader import STOPPING, ImageLoader, LostWorkers
from crate_mae.data.mixture import Mixture
from crate_mae.data.parts import parts_of
from crate_mae.data.reading import COLOUR_MODES, IMAGE_SUFFIXES, open_file, open_image, part, shown_size, whole
from crate_mae.data.samples import (
    CentreCropped,
    LabelledCentreCropped,
    PretrainImages,
    Sample,
    readable,
    readable_items,
    spread,
)
from crate_mae.data.shards import TarShards, shard_paths
from crate_mae.data.source import MissingLibrary, Source, Subset, UnreadableImage
from crate_mae.data.specification import absolute, open_source
from crate_mae.data.synthetic import SyntheticImages
from crate_mae.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Normalization, centred_box, draw_box

__all__ = [
    "COLOUR_MODES",
    "FLOWERS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "IMAGE_SUFFIXES",
    "STOPPING",
    "BatchSampler",
    "CentreCropped",
    "HuggingFaceImages",
    "ImageFolder",
    "ImageLoader",
    "LabelledCentreCropped",
    "LabelledParts",
    "LostWorkers",
    "MissingLibrary",
    "Mixture",
    "Normalization",
    "PretrainImages",
    "Sample",
    "Source",
    "Subset",
    "SyntheticImages",
    "TarShards",
    "UnreadableImage",
    "absolute",
    "augmented",
    "centred_box",
    "compare",
    "decoded_if_small",
    "draw_box",
    "in_order",
    "labelled_parts",
    "open_file",
    "open_image",
    "open_source",
    "part",
    "part_of",
    "parts_of",
    "readable",
    "readable_items",
    "shard_paths",
    "shown_size",
    "spread",
    "whole",
]
