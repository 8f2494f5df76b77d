"""The few charts that pictures of runs and models need, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

from PIL import Image, ImageColor, ImageDraw, ImageFont

INK, FAINT, GRID = "#222222", "#707070", "#e4e4e4"

Box = tuple[float, float, float, float]
"""(left, top, right, bottom)"""


class Line(NamedTuple):
    """Points (x, y) joined by a line; `label` is written at its last point."""

    points: Sequence[tuple[float, float]]
    colour: str
    label: str = ""
    width: float = 2.5


class Level(NamedTuple):
    """A dashed line across a chart, with its label above it."""

    value: float
    colour: str
    label: str


class Bar(NamedTuple):
    """A bar; `spread` above 0 is drawn as a whisker either way."""

    value: float
    colour: str
    label: str
    spread: float = 0.0


Shape = Literal["round", "square", "ring", "triangle", "cross"]
"""The shape of a marker; a ring is an empty circle."""


class Mark(NamedTuple):
    """A marker at a point of a plot, and what is written beside it, in the colour `ink`."""

    at: tuple[float, float]
    colour: str
    shape: Shape = "round"
    radius: float = 4.0
    label: str = ""
    ink: str = INK


class Axis(NamedTuple):
    """The range of a plot along x or y, `lowest` < `highest`; both above 0 where it is logarithmic."""

    lowest: float
    highest: float
    label: str = ""
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """The position of a value between `lowest` (0) and `highest` (1); values beyond them are below 0 or above 1."""
        ends = value, self.lowest, self.highest
        at, start, end = map(math.log, ends) if self.logarithmic else ends
        return (at - start) / (end - start)

    def ticks(self, most: int) -> list[float]:
        """Round values on it, up to about so many; of a logarithmic one that spans decades, 1, 2 and 5 or powers of ten alone."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.lowest)), math.ceil(math.log10(self.highest)) + 1)
            for digits in ((1, 2, 5), (1,)):
                values = [digit * 10.0**power for power in powers for digit in digits]
                shown = [value for value in values if self.lowest <= value <= self.highest]
                if 3 <= len(shown) <= 2 * most:
                    return shown
        step = _round_step((self.highest - self.lowest) / most)
        first, last = math.ceil(self.lowest / step - 1e-9), math.floor(self.highest / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


class Series(NamedTuple):
    """One value for each layer, at markers that a line joins.

    Attributes:
        spreads: drawn as whiskers either way, where they are above 0; none of no whiskers.
        origins: from each of which a pale bar leads to its marker; none of no bars.
    """

    values: Sequence[float]
    spreads: Sequence[float]
    colour: str
    shape: Shape = "round"
    joined: bool = True
    origins: Sequence[float] = ()


class Canvas:
    """A white picture, drawn at twice its size so that lines and letters come out smooth."""

    def __init__(self, width: int, height: int) -> None:
        self._image = Image.new("RGB", (2 * width, 2 * height), "white")
        self._draw = ImageDraw.Draw(self._image)

    def finished(self) -> Image.Image:
        return self._image.reduce(2)

    def text(
        self,
        at: tuple[float, float],
        words: str,
        size: float = 15,
        colour: str = INK,
        anchor: str = "ls",
        *,
        over_lines: bool = False,
    ) -> None:
        """Words at a point; `anchor` as Pillow has it: l, m or r, then a, m or s. Over lines, they have a white rim."""
        font, rim = ImageFont.load_default(2 * size), 5 if over_lines else 0
        place = 2 * at[0], 2 * at[1]
        self._draw.text(place, words, fill=colour, font=font, anchor=anchor, stroke_width=rim, stroke_fill="white")

    def paste(self, image: Image.Image, box: Box, *, smooth: bool = True) -> None:
        """An image, fitted into the box."""
        left, top, right, bottom = (round(2 * edge) for edge in box)
        how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
        self._image.paste(image.resize((right - left, bottom - top), how), (left, top))

    def rectangle(self, box: Box, colour: str) -> None:
        self._draw.rectangle([2 * edge for edge in box], fill=colour)

    def line(
        self, points: Sequence[tuple[float, float]], colour: str, width: float = 1, *, dashed: bool = False
    ) -> None:
        if dashed:
            (x, y), (end, _) = points
            for start in range(round(x), round(end), 9):
                self.line([(start, y), (min(start + 5, end), y)], colour, width)
            return
        doubled = [(2 * x, 2 * y) for x, y in points]
        self._draw.line(doubled, fill=colour, width=round(2 * width), joint="curve")

    def marker(self, at: tuple[float, float], shape: Shape, colour: str, radius: float = 4) -> None:
        x, y = (2 * place for place in at)
        box = [x - 2 * radius, y - 2 * radius, x + 2 * radius, y + 2 * radius]
        if shape == "square":
            self._draw.rectangle(box, fill=colour)
        elif shape == "triangle":
            self._draw.regular_polygon((x, y, 2.6 * radius), 3, fill=colour, outline="white")
        elif shape == "cross":
            left, top, right, bottom = box
            for ends in ([left, top, right, bottom], [left, bottom, right, top]):
                self._draw.line(ends, fill=colour, width=round(1.4 * radius))
        else:
            self._draw.ellipse(box, fill="white" if shape == "ring" else colour, outline=colour, width=3)

    def whisker(self, x: float, top: float, bottom: float, colour: str, cap: float = 5) -> None:
        """An error bar, with a cap at each end."""
        self.line([(x, top), (x, bottom)], colour, 1.5)
        for y in (top, bottom):
            self.line([(x - cap, y), (x + cap, y)], colour, 1.5)

    def legend(self, at: tuple[float, float], entries: Sequence[tuple[str, str]], right: float) -> float:
        """Names behind swatches of their colours, in lines between a point and `right`; returns the y of the last line."""
        x, y = at
        for name, colour in entries:
            width = 40 + text_width(name, 15) + 24
            if x > at[0] and x + width > right:
                x, y = at[0], y + 24
            self.line([(x, y - 5), (x + 30, y - 5)], colour, 3)
            self.marker((x + 15, y - 5), "round", colour, 5)
            self.text((x + 40, y), name)
            x += width
        return y

    def profiles(self, box: Box, stacks: Mapping[str, Sequence[Series]], *, together: bool = True) -> None:
        """Series over the layers of stacks side by side, each stack named under its part of the box.

        Args:
            together: over one y axis; otherwise each stack has its own.
        """
        left, top, right, bottom = box
        layers = [max(len(series.values) for series in stack) for stack in stacks.values()]
        common = _limits([series for stack in stacks.values() for series in stack])
        parts = _parts(left, right, layers, gap=18.0 if together else 66.0)
        for place, ((name, stack), (start, end)) in enumerate(zip(stacks.items(), parts, strict=True)):
            lowest, highest = common if together else _limits(stack)
            level = partial(_level, lowest=lowest, highest=highest, top=top, bottom=bottom)
            step = _round_step((highest - lowest) / 7)
            decimals = max(0, -math.floor(math.log10(step) + 1e-9))
            for number in range(math.ceil(lowest / step), math.floor(highest / step) + 1):
                y = level(number * step)
                self.line([(start, y), (end, y)], GRID)
                if place == 0 or not together:
                    self.text((start - 8, y), f"{number * step:,.{decimals}f}", 12, FAINT, "rm")
            self.line([(start, bottom), (end, bottom)], FAINT)
            room = (end - start) / layers[place]
            for number in _numbered(layers[place], room):
                self.text((start + room * (number - 0.5), bottom + 6), str(number), 12, FAINT, "ma")
            self.text(((start + end) / 2, bottom + 22), name, 13, FAINT, "ma")
            for series in stack:
                places = [start + room * (number + 0.5) for number in range(len(series.values))]
                self._draw_series(series, places, level, radius=min(4.5, max(2.0, room / 4)))

    def _draw_series(
        self, series: Series, places: Sequence[float], level: Callable[[float], float], *, radius: float
    ) -> None:
        points = [(x, level(value)) for x, value in zip(places, series.values, strict=True)]
        for (x, y), origin in zip(points, series.origins, strict=False):
            self.line([(x, level(origin)), (x, y)], blend("#ffffff", series.colour, 0.35), radius)
        if series.joined and len(points) > 1:
            self.line(points, series.colour, 2)
        for x, value, spread in zip(places, series.values, series.spreads, strict=False):
            if spread:
                self.whisker(x, level(value + spread), level(value - spread), series.colour, radius)
        for point in points:
            self.marker(point, series.shape, series.colour, radius)

    def curves(
        self, box: Box, lines: Sequence[Line], levels: Sequence[Level], *, lowest: float, highest: float, x_label: str
    ) -> None:
        """Lines over a common x axis that begins at 0, y from `lowest` to `highest`; what lies above is cut off."""
        left, top, right, bottom = box
        last = max(x for line in lines for x, _ in line.points)

        def place(x: float, y: float) -> tuple[float, float]:
            share = (min(y, highest) - lowest) / (highest - lowest)
            return left + x / last * (right - left), bottom - share * (bottom - top)

        step = _round_step((highest - lowest) / 5)
        for number in range(math.ceil(lowest / step), math.floor(highest / step) + 1):
            y = place(0, number * step)[1]
            self.line([(left, y), (right, y)], GRID)
            self.text((left - 8, y), f"{number * step:.1f}", 13, FAINT, "rm")
        step = _round_step(last / 6)
        for number in range(math.floor(last / step) + 1):
            self.text((place(number * step, 0)[0], bottom + 8), f"{number * step:g}", 13, FAINT, "ma")
        self.text(((left + right) / 2, bottom + 26), x_label, 13, FAINT, "ma")
        for value, colour, label in levels:
            y = place(0, value)[1]
            self.line([(left, y), (right, y)], colour, 2, dashed=True)
            self.text((right, y - 6), label, 14, colour, "rs")
        for points, colour, label, width in lines:
            placed = [place(*point) for point in points]
            self.line(placed, colour, width)
            self.text((placed[-1][0], placed[-1][1] + 8), label, 14, colour, "ra")

    def plot(self, box: Box, lines: Sequence[Line], marks: Sequence[Mark], x: Axis, y: Axis, *, numbered: bool) -> None:
        """Lines and markers over any axes. Lines are cut off at the edges of the box, markers beyond them stand on them.

        Args:
            numbered: whether the y axis has numbers.
        """
        left, top, right, bottom = box

        def place(point: tuple[float, float]) -> tuple[float, float]:
            return left + x.share(point[0]) * (right - left), bottom - y.share(point[1]) * (bottom - top)

        for tick in y.ticks(6 if bottom - top > 200 else 3):
            height = place((x.lowest, tick))[1]
            self.line([(left, height), (right, height)], GRID)
            if numbered:
                self.text((left - 8, height), short(tick), 13, FAINT, "rm")
        self.line([(left, bottom), (right, bottom)], FAINT)
        for tick in x.ticks(6):
            across = place((tick, y.lowest))[0]
            self.line([(across, bottom), (across, bottom + 4)], FAINT)
            self.text((across, bottom + 9), short(tick), 13, FAINT, "ma")
        self.text(((left + right) / 2, bottom + 28), x.label, 14, FAINT, "ma")
        with self._within(box):
            for points, colour, _, width in lines:
                self.line([place(point) for point in points], colour, width)
        placed = [(place(mark.at), mark) for mark in marks]
        placed = [((min(max(x, left), right), min(max(y, top), bottom)), mark) for (x, y), mark in placed]
        for at, mark in placed:
            self.marker(at, mark.shape, mark.colour, mark.radius)
        self._label([(at, mark.label, mark.ink) for at, mark in placed if mark.label], right, top)

    def _label(self, labels: Sequence[tuple[tuple[float, float], str, str]], right: float, top: float) -> None:
        """Words beside points, each in its colour, within a box that ends there; one below the other where they would overlap."""
        written: list[tuple[float, float, float]] = []
        for (x, y), words, colour in labels:
            width = text_width(words, 14)
            start = x + 10 if x + 10 + width < right else x - 10 - width
            base = y + (-8 if y > top + 24 else 22)
            while any(
                start < end and begin < start + width and abs(base - other) < 17 for begin, end, other in written
            ):
                base += 17
            written.append((start, start + width, base))
            self.text((start, base), words, 14, colour, over_lines=True)

    @contextmanager
    def _within(self, box: Box) -> Iterator[None]:
        """A block in which drawing is cut off at the edges of the box."""
        left, top, right, bottom = (round(2 * edge) for edge in box)
        whole, inside = self._image, (left, top, right + 1, bottom + 1)
        self._image = whole.copy()
        self._draw = ImageDraw.Draw(self._image)
        try:
            yield
        finally:
            whole.paste(self._image.crop(inside), inside)
            self._image, self._draw = whole, ImageDraw.Draw(whole)

    def bars(
        self, box: Box, groups: Sequence[tuple[str, Sequence[Bar]]], *, highest: float, level: Level | None
    ) -> None:
        """Groups of bars side by side, from 0 to `highest`, each group named under it and each bar above it."""
        left, top, right, bottom = box
        height = (bottom - top) / highest
        if level:
            y = bottom - level.value * height
            self.line([(left, y), (right, y)], level.colour, 2, dashed=True)
            self.text((right, y - 5), level.label, 13, level.colour, "rs")
        room = (right - left) / max(1, len(groups))
        for number, (name, group) in enumerate(groups):
            middle = left + room * (number + 0.5)
            width = min(64.0, 0.74 * room / len(group))
            for place, (value, colour, label, spread) in enumerate(group):
                centre = middle + (place - (len(group) - 1) / 2) * width
                peak = bottom - value * height
                self.rectangle((centre - 0.44 * width, peak, centre + 0.44 * width, bottom), colour)
                if spread:
                    self.whisker(centre, peak - spread * height, peak + spread * height, INK)
                self.text((centre, peak - 5 - spread * height), label, 14, INK, "ms")
            self.text((middle, bottom + 7), name, 14, INK, "ma")
        self.line([(left, bottom), (right, bottom)], FAINT)


def text_width(words: str, size: float) -> float:
    """The width in pixels of words that `Canvas.text` writes."""
    return ImageFont.load_default(2 * size).getlength(words) / 2


def short(value: float) -> str:
    """A number on an axis: such as 0.05, 2,500, 20k, 1.5M."""
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10.0 ** max(power, 4):
            return f"{round(value / 10.0**power, 6):g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 12):g}"


def blend(one: str, other: str, share: float) -> str:
    """The colour at a share of the way from one to the other."""
    pairs = zip(ImageColor.getrgb(one), ImageColor.getrgb(other), strict=True)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


def _limits(series: Iterable[Series]) -> tuple[float, float]:
    """The least and the largest value of all series, with some room around them, also where all values are equal."""
    ends: list[float] = []
    for each in series:
        spreads = each.spreads or [0.0] * len(each.values)
        ends += [value + spread for value, spread in zip(each.values, spreads, strict=True)]
        ends += [value - spread for value, spread in zip(each.values, spreads, strict=True)]
        ends += each.origins
    lowest, highest = min(ends), max(ends)
    room = 0.06 * (highest - lowest)
    if room <= 1e-9 * max(abs(lowest), abs(highest)):  # rounding is no difference
        room = 0.1 * abs(highest) or 1.0
    return lowest - room, highest + room


def _level(value: float, *, lowest: float, highest: float, top: float, bottom: float) -> float:
    """The y coordinate of a value."""
    return bottom - (value - lowest) / (highest - lowest) * (bottom - top)


def _parts(left: float, right: float, layers: Sequence[int], *, gap: float) -> Iterator[tuple[float, float]]:
    """The left and right end of each stack on the x axis: in proportion to its layers, and at least as wide as its name."""
    whole = right - left - gap * (len(layers) - 1)
    least = 0.3 * whole if len(layers) > 1 else 0.0
    for count in layers:
        width = least + (whole - least * len(layers)) * count / sum(layers)
        yield left, left + width
        left += width + gap


def _numbered(layers: int, room: float) -> list[int]:
    """The numbers of layers that are written, counted from 1: as many as have room."""
    step = next(step for step in (1, 2, 3, 4, 6, 10, 12, 20, 50, 100, layers + 1) if step * room >= 20 or step > layers)
    numbers = list(range(step, layers + 1, step))
    return numbers if step == 1 else [1, *(number for number in numbers if (number - 1) * room >= 20)]


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, ... times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
