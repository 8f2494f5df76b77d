"""A run on one page: what it reconstructs, how its error fell, which classes its encoder finds, how sparse its layers are."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from PIL import Image

from crate_mae.data import Normalization
from crate_mae.evaluation import ClassAccuracies, blurred_visible
from crate_mae.evaluation.classes import TITLES
from crate_mae.model import CrateMAE
from crate_mae.pictures.charts import FAINT, Bar, Box, Canvas, Level, Line
from crate_mae.pictures.reconstructions import reconstruct, to_image

_MODEL, _TRAINING, _RANDOM, _BLUR, _FILL = "#1766a6", "#a9cbe6", "#b9b9b9", "#d9730d", "#8a8a8a"

_WIDTH, _MARGIN, _TOP, _CELL, _GAP = 1600, 40, 132, 164, 6


class Classes(NamedTuple):
    """Accuracies of the encoder and, for each of some seeds, of one with random weights."""

    names: Sequence[str]
    images: int
    trained: ClassAccuracies
    random: Sequence[ClassAccuracies]


class Sparsity(NamedTuple):
    """Fractions of zeros after each encoder layer, of the model and of one with random weights."""

    trained: Sequence[float]
    random: Sequence[float]


class Curves(NamedTuple):
    """(epoch, error) of the training steps and of the validations, and what the validation errors are held against."""

    training: Sequence[tuple[float, float]]
    validation: Sequence[tuple[float, float]]
    mean_fill: float
    blur: float
    blur_sigma: float


def summary_picture(
    model: CrateMAE,
    pixels: torch.Tensor,
    normalization: Normalization,
    *,
    mask_ratio: float,
    noise: torch.Tensor,
    curves: Curves,
    sparsity: Sparsity,
    classes: Classes | None,
    caption: str,
) -> Image.Image:
    """The page, 1600 pixels wide.

    Args:
        pixels, mask_ratio, noise: the images to show and their masks, as `reconstruction_sheet` takes them.
        classes: None where the images have no classes; that chart is then left out.
        caption: a line under the title.
    """
    cell_height = round(_CELL * pixels.shape[-2] / pixels.shape[-1])
    bottom = _TOP + max(len(pixels) * (cell_height + _GAP), 720)
    canvas = Canvas(_WIDTH, bottom + _MARGIN)
    canvas.text((_MARGIN, 54), "CRATE-MAE: masked photographs, reconstructed by white-box layers", 30)
    canvas.text((_MARGIN, 82), caption, 16, FAINT)

    shown = reconstruct(model, pixels, normalization, mask_ratio=mask_ratio, noise=noise)
    images = normalization(pixels)
    blurred = torch.where(shown.removed, blurred_visible(images, ~shown.removed, curves.blur_sigma), images)
    columns = {
        "original": shown.original,
        f"{mask_ratio:.0%} removed": shown.masked,
        "best blur": normalization.inverse(blurred),
        "CRATE-MAE": shown.pasted,
    }
    for column, (title, cells) in enumerate(columns.items()):
        left = _MARGIN + column * (_CELL + _GAP)
        canvas.text((left + _CELL / 2, _TOP - 10), title, 16, anchor="ms")
        for row, cell in enumerate(cells):
            top = _TOP + row * (cell_height + _GAP)
            canvas.paste(to_image(cell), (left, top, left + _CELL, top + cell_height), smooth=column != 1)

    left, right = _MARGIN + 4 * (_CELL + _GAP) + 80, _WIDTH - _MARGIN
    charts = 3 if classes else 2
    height = (bottom - _TOP) / charts
    boxes = [
        (left, edge, right, edge + height - 96) for edge in (_TOP + 14 + height * number for number in range(charts))
    ]
    _draw_curves(canvas, boxes[0], curves)
    _draw_sparsity(canvas, boxes[-1], sparsity)
    if classes:
        _draw_classes(canvas, boxes[1], classes)
    return canvas.finished()


def _draw_curves(canvas: Canvas, box: Box, curves: Curves) -> None:
    _draw_title(canvas, box, "Error on removed patches", "mean squared, in normalised pixels; validation photographs")
    errors = [error for _, error in curves.validation]
    # Where each image has one colour, the mean and the blur make no error.
    highest = 1.1 * (max(curves.mean_fill, curves.blur) or max(errors) or 1.0)
    lowest = 0.9 * min(*errors, curves.blur)
    canvas.curves(
        box,
        [
            Line(curves.training, _TRAINING, "", 1.5),
            Line(curves.validation, _MODEL, f"CRATE-MAE {errors[-1]:.3f}", 3),
        ],
        [
            Level(curves.mean_fill, _FILL, f"mean of the visible patches {curves.mean_fill:.3f}"),
            Level(curves.blur, _BLUR, f"best Gaussian blur {curves.blur:.3f}"),
        ],
        lowest=lowest,
        highest=highest,
        x_label="epoch (pale: training)",
    )


def _draw_sparsity(canvas: Canvas, box: Box, sparsity: Sparsity) -> None:
    _draw_title(canvas, box, "Zeros in the tokens after each layer's sparse step (ISTA)", "grey: random weights")
    groups = [
        (f"layer {layer}", [Bar(before, _RANDOM, f"{before:.0%}"), Bar(after, _MODEL, f"{after:.0%}")])
        for layer, (after, before) in enumerate(zip(*sparsity, strict=True), 1)
    ]
    canvas.bars(box, groups, highest=1.0, level=None)


def _draw_classes(canvas: Canvas, box: Box, classes: Classes) -> None:
    chance = 1 / len(classes.names)
    _draw_title(
        canvas,
        box,
        f"Classes found in {classes.images} photographs",
        f"{', '.join(classes.names)}; grey: {len(classes.random)} with random weights",
    )
    groups = []
    for method, after in classes.trained._asdict().items():
        before = [getattr(each, method) for each in classes.random]
        mean, deviation = fmean(before), stdev(before)
        random = Bar(mean, _RANDOM, f"{mean:.0%}", deviation)
        groups.append((TITLES[method], [random, Bar(after, _MODEL, f"{after:.0%}")]))
    highest = 1.25 * max(chance, *(bar.value for _, bars in groups for bar in bars))
    canvas.bars(box, groups, highest=highest, level=Level(chance, _FILL, "chance"))


def _draw_title(canvas: Canvas, box: Box, title: str, detail: str) -> None:
    left, top, right, _ = box
    canvas.text((left, top - 24), title, 17)
    canvas.text((right, top - 24), detail, 12, FAINT, "rs")
