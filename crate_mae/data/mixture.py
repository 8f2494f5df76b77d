"""Several sources in one, each with its share of the samples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from crate_mae.data.source import Source, shuffled


class Mixture(Source):
    """The images of several sources, one source after the other; an epoch samples them in proportion to their weights.

    A weight is a share of the samples, not of the images: with weights 2 and 1, two samples of three come from the first source,
    however many images it has. An epoch has as many samples as all sources have images. Each source goes on with its own passes
    in the next epoch, so that its images are visited equally often, whatever its weight.

    Args:
        sources: of any kind, also mixtures. Classes with the same name are the same class.
        weights: positive, in any unit.

    Raises:
        ValueError: there is no source, not one weight a source, a weight that is not positive and finite, or one so small that
            an epoch would hold none of the source's images.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        if not sources or len(sources) != len(weights):
            raise ValueError(
                f"weights: expected one for each of {len(sources)} sources, at least one, got {len(weights)}"
            )
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights: expected positive, finite numbers, got {list(weights)}")
        self.sources, self.weights = list(sources), list(weights)
        self._ends = np.cumsum([len(source) for source in sources])
        self.shares = shares(len(self), weights)
        if 0 in self.shares:
            raise ValueError(
                f"weights: an epoch's {len(self)} visits would hold no image of source {self.shares.index(0) + 1} "
                f"of {len(weights)} with weights {list(weights)}"
            )
        self.classes = sorted({name for source in sources for name in source.classes})

    def __len__(self) -> int:
        return int(self._ends[-1])

    def image(self, index: int) -> Image.Image:
        source, own = self._place(index)
        return source.image(own)

    def name(self, index: int) -> str:
        source, own = self._place(index)
        return source.name(own)

    def fingerprint(self) -> str:
        parts = [f"{share} {source.fingerprint()}" for share, source in zip(self.shares, self.sources, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate([
            np.searchsorted(self.classes, source.classes).astype(np.int32)[source.labels] for source in self.sources
        ])  # fmt: skip

    def files(self) -> Iterable[Path]:
        return (path for source in self.sources for path in source.files())

    def remarks(self) -> list[str]:
        return [remark for source in self.sources for remark in source.remarks()]

    def epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Source.epoch`. Visit v to a source, counted over all epochs, is visit v % len(source) of the source's own epoch
        v // len(source). The visits of an epoch to all sources are shuffled.
        """
        passes, indices = np.empty(len(self), np.uint32), np.empty(len(self), np.uint32)
        filled = 0
        for source, share, end in zip(self.sources, self.shares, self._ends, strict=True):
            visit, last = epoch * share, (epoch + 1) * share
            while visit < last:
                own_epoch, first = divmod(visit, len(source))
                count = min(last - visit, len(source) - first)
                own_passes, own_indices = source.epoch(seed, own_epoch)
                passes[filled : filled + count] = own_passes[first : first + count]
                indices[filled : filled + count] = own_indices[first : first + count] + np.uint32(end - len(source))
                visit, filled = visit + count, filled + count
        # Other random numbers than those of a source's own order: the same permutation twice would not shuffle fairly.
        order = shuffled(len(self), np.random.default_rng(np.random.SeedSequence((seed, epoch), spawn_key=(0,))))
        return passes[order], indices[order]

    def split(self, fraction: float, seed: int) -> tuple[Source, Source]:
        """As `Source.split`, for each source separately: the first part has these weights, the second has each image once.

        With the same seed, the same images are held out of two equal sources.
        """
        kept, held_out = zip(*(source.split(fraction, seed) for source in self.sources), strict=True)
        return Mixture(kept, self.weights), Mixture(held_out, [len(source) for source in held_out])

    def _place(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        return source, index - int(self._ends[number]) + len(source)


def shares(count: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers with the sum `count`, in proportion to the weights: rounded down, and one more for the largest remainders."""
    total = sum(map(Fraction, weights))
    exact = [count * Fraction(weight) / total for weight in weights]
    found = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: found[k] - exact[k])
    for k in by_remainder[: count - sum(found)]:
        found[k] += 1
    return found
