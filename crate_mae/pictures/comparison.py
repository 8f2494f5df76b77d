"""Runs side by side on one page: losses, errors and gradients over steps, over images and over hours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from PIL import Image

from crate_mae.comparing import ComparedRun, Comparison, Reading
from crate_mae.pictures.charts import FAINT, INK, Axis, Canvas, Line, Mark, Shape, blend, text_width
from crate_mae.pictures.sheet import wrapped

COLOURS = ("#1766a6", "#d9730d", "#2a8c3c", "#8e44ad", "#17a2a8", "#c2378f", "#8a5a2b", "#5c6470")
"""The colours of the runs, in their order. Red is kept for what went wrong."""

_BAD = "#d01c1c"

_WIDTH, _MARGIN, _AXIS, _GAP, _TITLES, _NUMBERS = 1760, 40, 58, 46, 56, 64

_POINTS = 400
"""The most points of a curve. Longer runs are drawn as means over several rows."""

_MARKERS = 40
"""The most validations of a run that get a marker."""

_DECADES, _PEAKS = 3, 5.0
"""A logarithmic axis spans at most `_DECADES`, and goes up to `_PEAKS` times the lowest of the runs' maxima."""


class _Panel(NamedTuple):
    """A row of the page: `thin`, a value of the rows of steps, and `thick`, one of validations, each where it is named."""

    title: str
    detail: str
    height: float
    thin: str = ""
    thick: str = ""
    logarithmic: bool = True
    marked: bool = True


_ERRORS = {
    "pretrain": "Training loss (pale) and validation error, mean squared on removed patches",
    "finetune": "Training loss (pale) and validation error, cross-entropy in nats",
}
_STANDARDISED = "training losses with model.norm_pix_loss are of standardised patches; "
_TOP1 = _Panel("Validation top-1", "fraction of images whose class has the largest logit", 240, "", "val_top1", False)
_GRADIENTS = _Panel("Gradient norm", "before it is shortened; logarithmic", 150, "grad_norm", marked=False)

_Across = Callable[[Reading], float]
"""The x value of a reading in one column of panels, such as its step."""

_Points = list[tuple[Reading, float]]
"""Readings, and the value that a panel shows of each."""


class _Curve(NamedTuple):
    """The curve of one run in a panel."""

    run: ComparedRun
    colour: str
    thin: _Points
    thick: _Points

    @property
    def points(self) -> _Points:
        return self.thin + self.thick


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
    curves = [[_curve(run, colour, panel) for run, colour in zip(runs, COLOURS, strict=False)] for panel in panels]
    axes = [_y_axis(panel, of_panel) for panel, of_panel in zip(panels, curves, strict=True)]
    beyond = [line for each in zip(panels, axes, curves, strict=True) for line in _beyond(*each)]
    lines = [part for line in (*comparison.remarks, *beyond) for part in wrapped(line, 15, _WIDTH - 2 * _MARGIN)]
    entries = [(wrapped(run.name, 15, 500, most=1)[0], colour) for run, colour in zip(runs, COLOURS, strict=False)]
    legend = Canvas(1, 1).legend((_MARGIN, 96), entries, _WIDTH - _MARGIN)
    signs = _signs(runs)
    top = legend + (28 if signs else 0) + (8 + 21 * len(lines) if lines else 0)

    canvas = Canvas(_WIDTH, round(top + sum(_TITLES + panel.height + _NUMBERS for panel in panels) + 16))
    canvas.text((_MARGIN, 54), f"CRATE-MAE: {f'{len(runs)} runs' if runs[1:] else 'a run'} of {comparison.kind}", 30)
    canvas.legend((_MARGIN, 96), entries, _WIDTH - _MARGIN)
    across = _MARGIN + 15.0
    for shape, colour, words in signs:
        canvas.marker((across, legend + 23), shape, colour, 4.5)
        canvas.text((across + 15, legend + 28), words, 15, FAINT)
        across += 15 + text_width(words, 15) + 34
    for place, line in enumerate(lines, 1):
        canvas.text((_MARGIN, top - 21 * (len(lines) - place)), line, 15, FAINT)

    width = (_WIDTH - 2 * _MARGIN - _AXIS - 2 * _GAP) / 3
    for panel, y, of_panel in zip(panels, axes, curves, strict=True):
        canvas.text((_MARGIN, top + 36), panel.title, 19)
        canvas.text((_WIDTH - _MARGIN, top + 36), panel.detail, 14, FAINT, "rs")
        for column, (label, over) in enumerate(_columns(runs)):
            left = _MARGIN + _AXIS + column * (width + _GAP)
            box = (left, top + _TITLES, left + width, top + _TITLES + panel.height)
            x = Axis(
                0.0, max(over(reading) for run in runs for reading in (*run.steps, *run.validations)) or 1.0, label
            )
            drawn = [line for curve in of_panel for line in _lines(curve, over)]
            told = column == 0 and panel is panels[0]
            marks = [mark for curve in of_panel for mark in _marks(curve, over, told=told, alone=not panel.marked)]
            # Thin lines first, so that none covers a thick one.
            canvas.plot(box, sorted(drawn, key=lambda line: line.width), marks, x, y, numbered=column == 0)
        top += _TITLES + panel.height + _NUMBERS
    return canvas.finished()


def _panels(comparison: Comparison) -> list[_Panel]:
    validated = any(run.validations for run in comparison.runs)
    title = (
        _ERRORS[comparison.kind] if validated else _ERRORS[comparison.kind].replace(" (pale) and validation error", "")
    )
    detail = _STANDARDISED if any(run.settings.get("model.norm_pix_loss") for run in comparison.runs) else ""
    panels = [_Panel(title, f"{detail}logarithmic", 400, "loss", "val_loss")]
    if any("val_top1" in reading.values for run in comparison.runs for reading in run.validations):
        panels.append(_TOP1)
    return [*panels, _GRADIENTS]


def _columns(runs: Sequence[ComparedRun]) -> list[tuple[str, _Across]]:
    longest = max(run.hours for run in runs)
    unit, hours = next(
        each for each in (("hours", 1.0), ("minutes", 1 / 60), ("seconds", 0.0)) if longest > 2 * each[1]
    )
    hours = hours or 1 / 3600
    training = f"{unit} of training{' (estimated)' if any(run.hours_estimated for run in runs) else ''}"
    return [
        ("steps", lambda reading: reading.step),
        ("images", lambda reading: reading.images),
        (training, lambda reading: reading.hours / hours),
    ]


def _curve(run: ComparedRun, colour: str, panel: _Panel) -> _Curve:
    thin, thick = _placed(run.steps, panel.thin, panel), _placed(run.validations, panel.thick, panel)
    parts = np.array_split(np.arange(len(thin)), min(_POINTS, max(1, len(thin))))
    means = [_mean([thin[number] for number in part]) for part in parts if len(part)]
    return _Curve(run, colour, means, thick)


def _placed(readings: Sequence[Reading], name: str, panel: _Panel) -> _Points:
    """The points that have a place on the panel's axis."""
    found = [(reading, reading.values.get(name, math.nan)) for reading in readings]
    return [each for each in found if math.isfinite(each[1]) and (each[1] > 0 or not panel.logarithmic)]


def _mean(points: _Points) -> tuple[Reading, float]:
    """One point for several: their mean value at the place of the last; diverging where one of them is."""
    last, _ = points[-1]
    return last._replace(diverging=any(reading.diverging for reading, _ in points)), fmean(value for _, value in points)


def _y_axis(panel: _Panel, curves: Sequence[_Curve]) -> Axis:
    """The axis around all values of runs that do not diverge there; around all values where all diverge."""
    of_runs = [[value for reading, value in curve.points if not reading.diverging] for curve in curves]
    values = [each for each in of_runs if each] or [[value for curve in curves for _, value in curve.points] or [1.0]]
    lowest, highest = min(map(min, values)), max(map(max, values))
    if not panel.logarithmic:
        room = 0.06 * (highest - lowest) or 0.05
        return Axis(max(0.0, lowest - room), highest + room)
    highest = 1.1 * min(highest, _PEAKS * min(map(max, values)))
    return Axis(max(0.92 * lowest, highest / 10**_DECADES), highest, logarithmic=True)


def _beyond(panel: _Panel, axis: Axis, curves: Sequence[_Curve]) -> Iterator[str]:
    """Which runs a panel's axis cuts off, in words."""
    for word, edge, furthest, sign in (("above", axis.highest, max, 1), ("below", axis.lowest, min, -1)):
        reached = {curve.run.name: furthest((value for _, value in curve.points), default=edge) for curve in curves}
        if told := [f"{name}, which reaches {at:.3g}" for name, at in reached.items() if sign * at > sign * edge]:
            yield f"{panel.title.partition(' (')[0]}: cut off {word} {edge:.3g}: {'; '.join(told)}."


def _lines(curve: _Curve, over: _Across) -> list[Line]:
    """The thin line, strong where there is no thick one, then the thick one."""
    pale = blend("#ffffff", curve.colour, 0.45 if curve.thick else 0.8)
    lines = [
        Line([(over(reading), value) for reading, value in points], colour, width=width)
        for points, colour, width in ((curve.thin, pale, 1.5), (curve.thick, curve.colour, 3))
    ]
    return [line for line in lines if len(line.points) > 1]


def _marks(curve: _Curve, over: _Across, *, told: bool, alone: bool) -> list[Mark]:
    """A reading that no line leads to or from, validations, and where the run was resumed, diverged and broke down.

    Args:
        told: with words beside what went wrong.
        alone: only the first of these.
    """
    run, run_colour, thin, thick = curve
    points = thin or thick

    def mark(point: tuple[Reading, float], colour: str, shape: Shape, radius: float, words: str = "") -> Mark:
        return Mark((over(point[0]), point[1]), colour, shape, radius, words if told else "", run_colour)

    marks = [mark(thin[0], run_colour, "ring", 4)] if len(thin) == 1 else []
    if alone or not points:
        return marks
    marks += [mark(point, _BAD, "round", 2.5) for point in _some(thin) if point[0].diverging]
    marks += [mark(point, _BAD if point[0].diverging else run_colour, "round", 4.5) for point in _some(thick)]
    steps, places, values = zip(*((reading.step, over(reading), value) for reading, value in points), strict=True)
    for step in run.resumed_at:
        at = float(np.interp(step, steps, places)), float(np.interp(step, steps, values))
        marks.append(Mark(at, run_colour, "triangle", 5))
    if run.diverged_at is not None:
        first = next((point for point in points if point[0].step >= run.diverged_at), points[-1])
        marks.append(mark(first, _BAD, "ring", 6, f"diverged at step {run.diverged_at:,}"))
    if run.broke_down_at is not None:
        marks.append(mark(points[-1], _BAD, "cross", 6, f"broke down at step {run.broke_down_at:,}"))
    return marks


def _some(points: _Points) -> _Points:
    """At most `_MARKERS` of the points, evenly spaced, the last among them."""
    return points[:: -max(1, -(-len(points) // _MARKERS))]


def _signs(runs: Sequence[ComparedRun]) -> list[tuple[Shape, str, str]]:
    """Shape, colour and meaning of the marks that these runs have."""
    diverging = any(reading.diverging for run in runs for reading in (*run.steps, *run.validations))
    signs: list[tuple[Shape, str, str, bool]] = [
        ("round", INK, "validation", any(run.validations for run in runs)),
        ("triangle", INK, "resumed", any(run.resumed_at for run in runs)),
        ("round", _BAD, "diverging", diverging),
        ("cross", _BAD, "broke down", any(run.broke_down_at is not None for run in runs)),
    ]
    return [(shape, colour, words) for shape, colour, words, is_there in signs if is_there]
