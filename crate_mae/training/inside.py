"""The white-box view of a model in training, on the same few images each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from crate_mae.analysis import Analysis, analyze
from crate_mae.data import CentreCropped, Normalization, readable_items, spread
from crate_mae.model import CrateMAE

IMAGES = 32
"""The most images: enough to compare epochs by their means, and few enough to take no time."""


class LookInside:
    """Measures what each layer does to the tokens of images held out: `crate_mae.analysis.analyze`, in float32."""

    def __init__(
        self, images: CentreCropped, normalization: Normalization, batch_size: int, say: Callable[[str], None]
    ) -> None:
        self.images, self.normalization, self.batch_size, self.say = images, normalization, batch_size, say
        self._pixels: torch.Tensor | None = None

    def __call__(self, model: CrateMAE) -> Analysis | None:
        """The measurements; None if the model's values are not finite, which a line says.

        Raises:
            UnreadableImage: no image can be read.
        """
        if self._pixels is None:
            self._pixels = readable_items(self.images, spread(len(self.images), IMAGES))
        device = next(model.parameters()).device
        batches = (self.normalization(pixels.to(device)) for pixels in self._pixels.split(self.batch_size))
        try:
            return analyze(model, batches)
        except ValueError as error:
            self.say(f"not looked inside: {error}")
            return None


def values_of(analysis: Analysis) -> dict[str, Any]:
    """Means over the images for a row of metrics.jsonl: by stack and measure a list over the layers, without measures by head."""
    return {
        stack: {name: measured.mean for name, measured in measures.items() if not name.endswith("_by_head")}
        for stack, measures in analysis.stacks.items()
    }


def layers_in_words(analysis: Analysis) -> str:
    """A line on the first and the last layer of each stack."""
    parts = []
    for stack, measures in analysis.stacks.items():
        rates, zeros = measures["coding_rate_after"].mean, measures["zeros"].mean
        said = f"{stack}: R^c after MSSA {_ends(rates, '.1f')}"
        parts.append(said + (f", zeros {_ends(zeros, '.1%')}" if stack == "encoder" else ""))
    return "; ".join(parts)


def _ends(values: Sequence[float], form: str) -> str:
    first, last = format(values[0], form), format(values[-1], form)
    return f"{first} to {last} in its {len(values)} layers" if len(values) > 1 else first
