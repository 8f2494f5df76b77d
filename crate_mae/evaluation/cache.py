"""Features on disk: computed once for a model and its images, and found again by a fingerprint of all they depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from crate_mae.backbone import Backbone
from crate_mae.data import CentreCropped, Normalization, Source
from crate_mae.data.index_files import read_index, save_index
from crate_mae.evaluation.features import FeatureSpec
from crate_mae.files import make_folder

_MADE_BY = 1
"""To be counted up with each change of code by which the same images and weights give other features."""

_METADATA = "made_of"


class Features(NamedTuple):
    """Features, float32 [readable, width], and the indices of their images, int64 [readable]."""

    values: Tensor
    indices: Tensor


def cached(path: Path, fingerprint: str, make: Callable[[], Features]) -> tuple[Features, bool]:
    """The features in a file, where it has this fingerprint; else they are computed and written there.

    Returns:
        The features, and whether they were in the file.

    Raises:
        OSError: they cannot be written.
    """
    about = {_METADATA: fingerprint}
    found = read_index(path)
    if found is not None and found[1] == about:
        return Features(*(torch.from_numpy(found[0][name]) for name in Features._fields)), True
    made = make()
    make_folder(path.parent)
    save_index(path, {name: value.numpy() for name, value in made._asdict().items()}, about)
    return made, False


def fingerprint_of(
    model: Backbone, images: CentreCropped, normalization: Normalization, spec: FeatureSpec, precision: str
) -> str:
    """The SHA-256 of all that features depend on: weights, buffers and configuration, the images and how they are cut and
    standardised, which features, the precision.

    Images are told apart by their names, their source's own fingerprint, and size and times of change of the files they lie in.
    """
    digest = hashlib.sha256()
    for name, value in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    settings = {
        "made_by": _MADE_BY,
        "model": [type(model).__name__, dataclasses.asdict(model.config)],
        "features": dataclasses.asdict(spec),
        "size": list(images.size),
        "channels": images.channels,
        "mean": normalization.mean.flatten().tolist(),
        "std": normalization.std.flatten().tolist(),
        "precision": precision,
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    _add_images(digest, images.source)
    return digest.hexdigest()


def _add_images(digest: hashlib._Hash, source: Source) -> None:
    last = len(source) - 1
    digest.update("\n".join([source.fingerprint(), source.name(0), source.name(last), str(last)]).encode())
    for path in source.files():
        try:
            status = os.stat(path)
            # The time of change of the entry, too: files that trade names may agree in the other two.
            digest.update(f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
        except OSError:  # it cannot be read, then, and is left out
            digest.update(b"none\n")
