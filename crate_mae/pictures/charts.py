"""The few charts that the summary of a run needs, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

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


class Canvas:
    """A white picture, drawn at twice its size so that lines and letters come out smooth."""

    def __init__(self, width: int, height: int) -> None:
        self._image = Image.new("RGB", (2 * width, 2 * height), "white")
        self._draw = ImageDraw.Draw(self._image)

    def finished(self) -> Image.Image:
        return self._image.reduce(2)

    def text(
        self, at: tuple[float, float], words: str, size: float = 15, colour: str = INK, anchor: str = "ls"
    ) -> None:
        """Words at a point; `anchor` as Pillow has it: l, m or r, then a, m or s."""
        font = ImageFont.load_default(2 * size)
        self._draw.text((2 * at[0], 2 * at[1]), words, fill=colour, font=font, anchor=anchor)

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
                    ends = [(centre, peak - spread * height), (centre, peak + spread * height)]
                    self.line(ends, INK, 1.5)
                    for _, y in ends:
                        self.line([(centre - 5, y), (centre + 5, y)], INK, 1.5)
                self.text((centre, peak - 5 - spread * height), label, 14, INK, "ms")
            self.text((middle, bottom + 7), name, 14, INK, "ma")
        self.line([(left, bottom), (right, bottom)], FAINT)


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, ... times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
