"""Which classes a model's features tell apart: the accuracy of each method, and its confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np
from PIL import Image

from crate_mae.evaluation.classes import TITLES
from crate_mae.evaluation.scores import Scores
from crate_mae.pictures.charts import FAINT, INK, Bar, Canvas, Level, text_width
from crate_mae.pictures.colours import scaled
from crate_mae.pictures.sheet import wrapped

_RUN, _UNTRAINED = "#1766a6", "#b9b9b9"

_WIDTH, _MARGIN, _HEAD, _BARS, _SQUARE, _GAP = 1600, 40, 110, 320, 700, 60
_NAMES = 110
"""Pixels left of and below a confusion matrix for the names of its classes."""

_MOST_NAMED = 40
"""The most classes whose names have room beside a matrix; more classes are shown by number."""


def classes_picture(
    runs: Mapping[str, Mapping[str, Scores]],
    untrained: Mapping[str, Mapping[str, Scores]],
    classes: Sequence[str],
    *,
    caption: str,
) -> Image.Image:
    """Bars of top-1, and for each method a square: of each class (row) the shares that are taken for each class (column).

    Squares are of all runs together. Shares are told by colour, from dark (none) to bright (all), so that a method that
    finds all has one bright diagonal.

    Args:
        runs, untrained: scores of each method, by the name of the model; bars are their means, whiskers their standard
            deviations.
        classes: their names, in the order of their numbers.
        caption: a line under the title.
    """
    methods = list(next(iter(runs.values())))
    texts = wrapped(caption, 15, _WIDTH - 2 * _MARGIN)
    squares = _HEAD + 20 * len(texts) + _BARS + 90
    rows = (len(methods) + 1) // 2
    canvas = Canvas(_WIDTH, squares + rows * (_SQUARE + _GAP))
    canvas.text((_MARGIN, 52), "Classes told apart by the features of a model", 30)
    for number, line in enumerate(texts):
        canvas.text((_MARGIN, 82 + 20 * number), line, 15, FAINT)

    top = _HEAD + 20 * len(texts)
    chance = 1 / len(classes)
    groups = []
    for method in methods:
        bars = []
        for models, colour in ((untrained, _UNTRAINED), (runs, _RUN)):
            values = [of[method].top1 for of in models.values()]
            if values:
                mean, spread = fmean(values), stdev(values) if len(values) > 1 else 0.0
                bars.append(Bar(mean, colour, f"{mean:.1%}", spread))
        groups.append((TITLES[method], bars))
    highest = 1.2 * max(chance, *(bar.value + bar.spread for _, bars in groups for bar in bars))
    canvas.text((_MARGIN, top + 14), "Test images whose class is found (top-1)", 17)
    if untrained:
        canvas.text((_WIDTH - _MARGIN, top + 14), f"grey: random weights, {len(untrained)} seeds", 13, FAINT, "rs")
    canvas.bars(
        (_MARGIN, top + 30, _WIDTH - _MARGIN, top + _BARS),
        groups,
        highest=highest,
        level=Level(chance, FAINT, "chance"),
    )

    for number, method in enumerate(methods):
        left = _MARGIN + (number % 2) * (_SQUARE + _GAP + 40)
        at = squares + (number // 2) * (_SQUARE + _GAP)
        confusion = np.sum([of[method].confusion.numpy() for of in runs.values()], axis=0)
        _square(
            canvas, (left, at), confusion, classes, f"{TITLES[method]}: true classes (rows) and what they are taken for"
        )
    return canvas.finished()


def _square(canvas: Canvas, at: tuple[float, float], confusion: np.ndarray, classes: Sequence[str], title: str) -> None:
    left, top = at
    canvas.text((left, top), title, 16)
    count, named = len(classes), len(classes) <= _MOST_NAMED
    beside = _NAMES if named else 30  # and as much under it, with the title
    side = _SQUARE - beside
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    x, y = left + beside, top + 16
    canvas.paste(Image.fromarray(scaled(shares)), (x, y, x + side, y + side), smooth=False)
    cell = side / count
    if not named:
        for number in (0, count - 1):
            canvas.text((x - 6, y + cell * (number + 0.5)), str(number + 1), 12, FAINT, "rm")
            canvas.text((x + cell * (number + 0.5), y + side + 6), str(number + 1), 12, FAINT, "ma")
        return
    size = min(13.0, 0.8 * cell)
    for number, name in enumerate(classes):
        short = wrapped(name, size, beside - 10, most=1)[0]
        canvas.text((x - 6, y + cell * (number + 0.5)), short, size, INK, "rm")
        if text_width(short, size) < cell - 2 or count <= 12:
            below = wrapped(name, size, cell - 2, most=1)[0]
            canvas.text((x + cell * (number + 0.5), y + side + 6), below, size, INK, "ma")
    if cell >= 30:
        for row in range(count):
            for column in range(count):
                share = shares[row, column]
                middle = (x + cell * (column + 0.5), y + cell * (row + 0.5))
                canvas.text(middle, f"{share:.0%}", min(13.0, cell / 3), "#ffffff" if share < 0.6 else INK, "mm")
