"""Features of whole images: one vector an image."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from crate_mae.backbone import Backbone
from crate_mae.data import CentreCropped, ImageLoader, Normalization, Source, UnreadableImage, in_order


@dataclass(frozen=True)
class FeatureSpec:
    """Which features of an image are taken.

    Attributes:
        pool: the mean of the patch tokens, the class token, or both, concatenated.
        layer: the encoder layer, counted from 0; negative numbers count back from the last.
        last: how many layers, ending with ``layer``; their features are concatenated, first to last.
        norm: whether tokens go through the model's final norm.
    """

    pool: Literal["mean", "cls", "both"] = "mean"
    layer: int = -1
    last: int = 1
    norm: bool = True

    def layers(self, depth: int) -> list[int]:
        """The layers, counted from 0, of an encoder of ``depth`` layers.

        Raises:
            ValueError: it has not got them.
        """
        if not -depth <= self.layer < depth:
            raise ValueError(f"layer: expected {-depth} to {depth - 1} of {depth} layers, got {self.layer}")
        end = self.layer % depth + 1
        if not 1 <= self.last <= end:
            raise ValueError(f"last: expected 1 to {end}, the layers up to layer {self.layer}, got {self.last}")
        return list(range(end - self.last, end))

    def width(self, tokens: int) -> int:
        """The width of an image's features, for tokens of this width."""
        return tokens * self.last * (2 if self.pool == "both" else 1)

    def in_words(self) -> str:
        pooled = {"mean": "the mean patch token", "cls": "the class token", "both": "class token and mean patch token"}
        number = self.layer + 1 if self.layer >= 0 else self.layer  # as options and pictures number them
        layer = "the last layer" if self.layer == -1 else f"layer {number}"
        layers = layer if self.last == 1 else f"the {self.last} layers up to {layer}"
        return f"{pooled[self.pool]} of {layers}, {'after' if self.norm else 'before'} the final norm"


@torch.no_grad()
def features_of(model: Backbone, images: Tensor, spec: FeatureSpec = FeatureSpec()) -> Tensor:
    """Features of whole images, float32 [batch, ``spec.width`` of the tokens' width].

    Args:
        images: [batch, channels, height, width], standardised, where the model is.

    Raises:
        ValueError: the model has not got the layers.
    """
    pooled = []
    for tokens in model._layer_outputs(images, spec.layers(len(model.encoder_layers)), norm=spec.norm)[1]:
        pooled += [tokens[:, 0]] if spec.pool != "mean" else []
        pooled += [tokens[:, 1:].mean(1)] if spec.pool != "cls" else []
    return torch.cat(pooled, -1).float()


def pooled_features(
    model: Backbone, images: CentreCropped | Sequence[Tensor], normalization: Normalization, *, batch_size: int = 50
) -> Tensor:
    """The mean of an image's patch tokens after the encoder, no patch removed: float32 [images, width], on the CPU.

    Args:
        images: uint8 [channels, height, width] each.
    """
    return torch.cat(
        [features_of(model, batch).cpu() for batch in standardised(model, images, normalization, batch_size)]
    )


def standardised(
    model: nn.Module, images: CentreCropped | Sequence[Tensor], normalization: Normalization, batch_size: int
) -> Iterator[Tensor]:
    """Standardised batches of the images, in their order, on the model's device."""
    device = next(model.parameters()).device
    for pixels in ImageLoader(images, in_order(len(images), batch_size)):
        yield normalization(pixels.to(device))


class Readable(Dataset[tuple[Tensor, Tensor]]):
    """Batches of ``(pixels, indices)`` without unreadable images: a substitute could be of another class."""

    def __init__(self, images: CentreCropped) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, keys: Sequence[int], met: list[UnreadableImage]) -> tuple[Tensor, Tensor]:
        """uint8 [readable, channels, height, width] and int64 [readable]; ``met`` gets the others."""
        pixels, indices = [], []
        for key in keys:
            try:
                pixels.append(self.images[key])
                indices.append(key)
            except UnreadableImage as error:
                met.append(error)
        shape = (0, self.images.channels, *self.images.size)
        return torch.stack(pixels) if pixels else torch.empty(shape, dtype=torch.uint8), torch.tensor(indices).long()


def of_batches(
    forward: Callable[[Tensor], Tensor],
    images: CentreCropped,
    normalization: Normalization,
    device: torch.device,
    batches: Sequence[Sequence[int]],
    *,
    num_workers: int = 0,
    unreadable: Callable[[Sequence[UnreadableImage]], None],
) -> Generator[tuple[Tensor | None, Tensor]]:
    """For each batch its features, float32 [readable, width], and the images' indices, int64 [readable], on the CPU. The features
    are None where no image of the batch can be read.

    Args:
        forward, unreadable: as of ``extract``; ``unreadable`` is called before the batch comes.
        batches: numbers of the images of each.
    """
    loader = ImageLoader(
        Readable(images), batches, num_workers=num_workers, pin_memory=device.type == "cuda", unreadable=unreadable
    )
    for pixels, indices in loader:
        features = forward(normalization(pixels.to(device, non_blocking=True))).cpu() if len(indices) else None
        yield features, indices


def extract(
    forward: Callable[[Tensor], Tensor],
    images: CentreCropped,
    normalization: Normalization,
    device: torch.device,
    *,
    batch_size: int,
    num_workers: int = 0,
    unreadable: Callable[[Sequence[UnreadableImage]], None],
    done: Callable[[int], None] = lambda images: None,
) -> tuple[Tensor, Tensor]:
    """Features of a whole source, float32 [readable, width], and the images' indices, int64 [readable], on the CPU.

    Args:
        forward: from standardised images to their features, such as ``features_of`` of a model.
        unreadable: told of the images that cannot be read, which are left out.
        done: told how many images each batch had.

    Raises:
        ValueError: no image can be read, or a feature is not finite.
    """
    batches = in_order(len(images), batch_size)
    made = of_batches(forward, images, normalization, device, batches, num_workers=num_workers, unreadable=unreadable)
    found, numbers = [], []
    for keys, (features, indices) in zip(batches, made, strict=True):
        if features is not None:
            found.append(features)
            numbers.append(indices)
        done(len(keys))
    if not found:
        raise none_readable(len(images))
    features, indices = torch.cat(found), torch.cat(numbers)
    refuse_not_finite(features, indices, images.source)
    return features, indices


def none_readable(images: int) -> ValueError:
    """The error for a source of so many images, none of which can be read."""
    return ValueError(f"none of the {images:,} images can be read; crate-mae check says why")


def refuse_not_finite(features: Tensor, indices: Tensor, source: Source) -> None:
    """Raise a ValueError that names an image where its features are not finite."""
    if not (finite := features.isfinite().all(1)).all():
        first = source.name(int(indices[~finite][0]))
        raise ValueError(f"features of {int((~finite).sum()):,} images are not finite, those of {first} for one")
