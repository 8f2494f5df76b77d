"""Runs side by side on one page: losses, errors and gradients over steps, over images and over hours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from crate_mae.comparing import ComparedRun, Comparison, Reading
from crate_mae.pictures.charts import FAINT, INK, Axis, Canvas, Line, Mark, Shape, blend, text_width
from crate_mae.pictures.sheet import wrapped

COLOURS = ("#1766a6", "#d9730d", "#2a8c3c", "#8e44ad", "#17a2a8", "#c2378f", "#8a5a2b", "#5c6470")
"""Of runs, in their order. Red is for what went wrong."""

_BAD = "#d01c1c"

_WIDTH, _MARGIN, _AXIS, _GAP, _TITLES, _NUMBERS = 1760, 40, 58, 34, 56, 64

_POINTS = 400
"""A column has room for: of longer runs means are drawn, over so many rows that they are no more."""

_MARKERS = 40
"""Of a run's validations: of more, some have none."""

_DECADES, _PEAKS = 3, 5.0
"""A logarithmic axis spans so many decades at most, and goes up to so many times the smallest peak of a run."""


class _Panel(NamedTuple):
    """A row of the page: `thin`, a value of the rows of steps, and `thick`, one of validations, each where it is named."""

    title: str
    detail: str
    height: float
    thin: str = ""
    thick: str = ""
    logarithmic: bool = True


_ERRORS = {
    "pretrain": "Training loss (pale) and validation error, mean squared on removed patches",
    "finetune": "Training loss (pale) and validation error, cross-entropy in nats",
}
_TOP1 = _Panel("Validation top-1", "fraction of images whose class has the largest logit", 240, "", "val_top1", False)
_GRADIENTS = _Panel("Gradient norm", "before it is shortened", 150, "grad_norm")

_Across = Callable[[Reading], float]
"""What a column is over."""


def comparison_picture(comparison: Comparison) -> Image.Image:
    """The page, 1760 pixels wide: columns over steps, images and hours, each row of charts with one y axis.

    Losses and gradients have logarithmic axes that a run which diverges does not stretch: what is beyond them is cut off, and
    the page says so.

    Raises:
        ValueError: there are more runs than `COLOURS`.
    """
    runs = comparison.runs
    if len(runs) > len(COLOURS):
        raise ValueError(f"expected at most {len(COLOURS)} runs, which have colours that differ, got {len(runs)}")
    panels = _panels(comparison)
    axes = [_y_axis(panel, runs) for panel in panels]
    beyond = [line for panel, axis in zip(panels, axes, strict=True) for line in _beyond(panel, axis, runs)]
    lines = [part for line in (*comparison.remarks, *beyond) for part in wrapped(line, 15, _WIDTH - 2 * _MARGIN)]
    names = [wrapped(run.name, 15, 500, most=1)[0] for run in runs]
    entries = list(zip(names, COLOURS, strict=False))
    legend = Canvas(1, 1).legend((_MARGIN, 96), entries, _WIDTH - _MARGIN)
    signs = _signs(runs)
    top = legend + (28 if signs else 0) + (8 + 21 * len(lines) if lines else 0)

    canvas = Canvas(_WIDTH, round(top + sum(_TITLES + panel.height + _NUMBERS for panel in panels) + 16))
    canvas.text((_MARGIN, 54), "CRATE-MAE: " + (f"{len(runs)} runs" if runs[1:] else "a run") + f" of {comparison.kind}", 30)
    canvas.legend((_MARGIN, 96), entries, _WIDTH - _MARGIN)
    across = _MARGIN + 15.0
    for shape, colour, words in signs:
        canvas.marker((across, legend + 23), shape, colour, 4.5)
        canvas.text((across + 15, legend + 28), words, 15, FAINT)
        across += 15 + text_width(words, 15) + 34
    for place, line in enumerate(lines, 1):
        canvas.text((_MARGIN, top - 21 * (len(lines) - place)), line, 15, FAINT)

    width = (_WIDTH - 2 * _MARGIN - _AXIS - 2 * _GAP) / 3
    for panel, y in zip(panels, axes, strict=True):
        canvas.text((_MARGIN, top + 36), panel.title, 19)
        canvas.text((_WIDTH - _MARGIN, top + 36), panel.detail, 14, FAINT, "rs")
        for column, (label, over) in enumerate(_columns(runs)):
            left = _MARGIN + _AXIS + column * (width + _GAP)
            box = (left, top + _TITLES, left + width, top + _TITLES + panel.height)
            x = Axis(0.0, max(over(reading) for run in runs for reading in _readings(run)), label)
            coloured = list(zip(runs, COLOURS, strict=False))
            curves = [line for run, colour in coloured for line in _lines(run, colour, panel, over)]
            told = column == 0 and panel is panels[0]
            marks = [mark for run, colour in coloured for mark in _marks(run, colour, panel, over, told=told)]
            # Thin ones first, so that none lies over a thick one.
            canvas.plot(box, sorted(curves, key=lambda line: line.width), marks, x, y, numbered=column == 0)
        top += _TITLES + panel.height + _NUMBERS
    return canvas.finished()


def _panels(comparison: Comparison) -> list[_Panel]:
    validated = any(run.validations for run in comparison.runs)
    title = _ERRORS[comparison.kind] if validated else _ERRORS[comparison.kind].replace(" (pale) and validation error", "")
    panels = [_Panel(title, "logarithmic", 400, "loss", "val_loss")]
    if any("val_top1" in reading.values for run in comparison.runs for reading in run.validations):
        panels.append(_TOP1)
    return [*panels, _GRADIENTS]


def _columns(runs: Sequence[ComparedRun]) -> list[tuple[str, _Across]]:
    longest = max(run.hours for run in runs)
    unit, hours = next(each for each in (("hours", 1.0), ("minutes", 1 / 60), ("seconds", 0.0)) if longest > 2 * each[1])
    hours = hours or 1 / 3600
    training = f"{unit} of training{' (estimated)' if any(run.hours_estimated for run in runs) else ''}"
    return [
        ("steps", lambda reading: reading.step),
        ("images", lambda reading: reading.images),
        (training, lambda reading: reading.hours / hours),
    ]


def _readings(run: ComparedRun) -> Sequence[Reading]:
    return (*run.steps, *run.validations)


Points = list[tuple[Reading, float]]
"""Readings, and the value that a panel shows of each."""


def _thin(panel: _Panel, run: ComparedRun) -> Points:
    return _placed(run.steps, panel.thin, panel)


def _thick(panel: _Panel, run: ComparedRun) -> Points:
    return _placed(run.validations, panel.thick, panel)


def _both(panel: _Panel, run: ComparedRun) -> Points:
    return _thin(panel, run) + _thick(panel, run)


def _placed(readings: Sequence[Reading], name: str, panel: _Panel) -> Points:
    """Those that have a place on the panel's axis."""
    found = [(reading, reading.values.get(name, math.nan)) for reading in readings]
    return [each for each in found if math.isfinite(each[1]) and (each[1] > 0 or not panel.logarithmic)]


def _y_axis(panel: _Panel, runs: Sequence[ComparedRun]) -> Axis:
    """Around the values of runs while they do not diverge; where they all do, around all."""
    of_runs = [[value for reading, value in _both(panel, run) if not reading.diverging] for run in runs]
    values = [each for each in of_runs if each] or [[value for run in runs for _, value in _both(panel, run)] or [1.0]]
    lowest, highest = min(map(min, values)), max(map(max, values))
    if not panel.logarithmic:
        room = 0.06 * (highest - lowest) or 0.05
        return Axis(max(0.0, lowest - room), highest + room)
    highest = min(highest, _PEAKS * min(map(max, values))) * 1.1
    return Axis(max(lowest * 0.92, highest / 10**_DECADES), highest, logarithmic=True)


def _beyond(panel: _Panel, axis: Axis, runs: Sequence[ComparedRun]) -> Iterator[str]:
    """What of a panel is not to be seen, in words."""
    for word, furthest, is_beyond in (
        ("above", max, lambda value: value > axis.highest),
        ("below", min, lambda value: value < axis.lowest),
    ):
        values = {run.name: [value for _, value in _both(panel, run) if is_beyond(value)] for run in runs}
        if told := [f"{name}, which reaches {furthest(found):.3g}" for name, found in values.items() if found]:
            edge = axis.highest if word == "above" else axis.lowest
            yield f"{panel.title.partition(' (')[0]}: cut off {word} {edge:.3g}: {'; '.join(told)}."


def _lines(run: ComparedRun, colour: str, panel: _Panel, over: _Across) -> list[Line]:
    """The thin line, strong where there is no thick one, then the thick one."""
    thick = [(over(reading), value) for reading, value in _thick(panel, run)]
    thin = [(over(reading), value) for reading, value in _thin(panel, run)]
    parts = np.array_split(np.array(thin).reshape(-1, 2), min(_POINTS, max(1, len(thin))))
    means = [tuple(part.mean(0).tolist()) for part in parts if len(part)]
    pale = blend("#ffffff", colour, 0.45 if thick else 0.8)
    lines = [Line(means, pale, width=1.5), Line(thick, colour, width=3)]
    return [line for line in lines if len(line.points) > 1]


def _marks(run: ComparedRun, colour: str, panel: _Panel, over: _Across, *, told: bool) -> list[Mark]:
    """Validations, and where the run was resumed, diverged and broke down.

    Args:
        told: with words beside what went wrong.
    """
    thin, thick = _thin(panel, run), _thick(panel, run)
    curve = thin or thick
    if not curve:
        return []
    marks = [Mark((over(reading), value), _BAD, radius=2.5) for reading, value in _some(thin) if reading.diverging]
    marks += [
        Mark((over(reading), value), _BAD if reading.diverging else colour, radius=4.5) for reading, value in _some(thick)
    ]
    if len(thin) == 1:
        marks += [Mark((over(thin[0][0]), thin[0][1]), colour, "ring")]
    steps = [reading.step for reading, _ in curve]
    for step in run.resumed_at:
        at = [float(np.interp(step, steps, values)) for values in ([over(reading) for reading, _ in curve], [v for _, v in curve])]
        marks.append(Mark((at[0], at[1]), colour, "triangle", 5))
    if run.diverged_at is not None:
        reading, value = next((each for each in curve if each[0].step >= run.diverged_at), curve[-1])
        marks.append(Mark((over(reading), value), _BAD, "ring", 6, f"diverged at step {run.diverged_at:,}" if told else ""))
    if run.broke_down_at is not None:
        reading, value = curve[-1]
        marks.append(Mark((over(reading), value), _BAD, "cross", 6, f"broke down at step {run.broke_down_at:,}" if told else ""))
    return marks


def _some(points: Points) -> Points:
    """So many of them as there is room for markers, the last among them."""
    every = -(-len(points) // _MARKERS) or 1
    return points[::-1][::every]


def _signs(runs: Sequence[ComparedRun]) -> list[tuple[Shape, str, str]]:
    """What the marks mean that there are."""
    signs: list[tuple[Shape, str, str, bool]] = [
        ("round", INK, "validation", any(run.validations for run in runs)),
        ("triangle", INK, "resumed", any(run.resumed_at for run in runs)),
        ("round", _BAD, "diverging", any(reading.diverging for run in runs for reading in _readings(run))),
        ("cross", _BAD, "broke down", any(run.broke_down_at is not None for run in runs)),
    ]
    return [(shape, colour, words) for shape, colour, words, is_there in signs if is_there]
