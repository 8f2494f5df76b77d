"""Sheets of pictures: rows and columns of cells under a title, which says what is seen and what colours mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFont

from crate_mae.pictures.charts import FAINT, INK, Canvas
from crate_mae.pictures.colours import SCALE

CELL = 160
"""The width that cells have, unless told otherwise: of images that differ in size, too."""

_MARGIN, _GAP, _NAMES = 28, 8, 150
_NARROWEST = 900
_TALLEST = 1.5
"""Height of a cell over its width; what is taller is made narrower."""
_LINE, _BAR = 16, 10


class Column(NamedTuple):
    """What stands over a column: a title, of several lines where it has line breaks, and what its colours range over."""

    title: str
    colour: str = INK
    scale: tuple[str, str] | None = None


class Row(NamedTuple):
    """Cells, of the size that ``cell_size`` says, the name on their left, and a note under each where there are notes."""

    name: str
    details: Sequence[str]
    cells: Sequence[Image.Image | None]
    notes: Sequence[str] = ()


def cell_size(shape: tuple[int, int], width: int = CELL) -> tuple[int, int]:
    """(height, width) of the cell of an image of a shape (height, width), in pixels of twice the sheet's resolution."""
    scale = min(2 * width / shape[1], 2 * width * _TALLEST / shape[0])
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def sheet(
    title: str,
    lines: Sequence[str],
    columns: Sequence[Column],
    rows: Sequence[Row],
    *,
    width: int = CELL,
    scale: tuple[str, str] | None = None,
) -> Image.Image:
    """The picture.

    Args:
        lines: under the title, each broken where it is too long.
        width: of the cells.
        scale: what the colours of all columns range over, told once, under the title.
    """
    total = max(_NARROWEST, 2 * _MARGIN + _NAMES + len(columns) * (width + _GAP))
    texts = [part for line in lines for part in wrapped(line, 14, total - 2 * _MARGIN)]
    head = 2 * _MARGIN + 24 + 19 * len(texts) + (26 if scale else 0)
    titles = [[part for line in column.title.split("\n") for part in wrapped(line, 13, width)] for column in columns]
    top = head + _LINE * max(map(len, titles)) + (_BAR + 20 if any(column.scale for column in columns) else 0)
    labels = [
        (
            wrapped(row.name, 13, _NAMES - 12, most=3),
            [part for line in row.details for part in wrapped(line, 12, _NAMES - 12)],
        )
        for row in rows
    ]
    heights = [
        max(
            *(cell.height / 2 + (_LINE if row.notes else 0) for cell in row.cells if cell),
            _LINE * sum(map(len, label)),
        )
        + _GAP
        for row, label in zip(rows, labels, strict=True)
    ]
    canvas = Canvas(total, round(top + sum(heights) + _MARGIN))

    canvas.text((_MARGIN, _MARGIN + 18), title, 22)
    for number, text in enumerate(texts):
        canvas.text((_MARGIN, _MARGIN + 44 + 19 * number), text, 14, FAINT)
    if scale:
        _draw_scale(canvas, (_MARGIN, head - _MARGIN - 8), 260, scale, beside=True)
    for number, (column, words) in enumerate(zip(columns, titles, strict=True)):
        left = _MARGIN + _NAMES + number * (width + _GAP)
        below = top - 6 - (_BAR + 20 if any(each.scale for each in columns) else 0)
        for place, line in enumerate(reversed(words)):
            canvas.text((left + width / 2, below - _LINE * place), line, 13, column.colour, "ms")
        if column.scale:
            _draw_scale(canvas, (left, top - _BAR - 22), width, column.scale)
    for row, (name, details), height in zip(rows, labels, heights, strict=True):
        for place, line in enumerate(name):
            canvas.text((_MARGIN, top + 12 + _LINE * place), line, 13)
        for place, line in enumerate(details, len(name)):
            canvas.text((_MARGIN, top + 12 + _LINE * place), line, 12, FAINT)
        for number, cell in enumerate(row.cells):
            if cell is None:
                continue
            middle = _MARGIN + _NAMES + number * (width + _GAP) + width / 2
            canvas.paste(cell, (middle - cell.width / 4, top, middle + cell.width / 4, top + cell.height / 2))
            if row.notes:
                canvas.text((middle, top + cell.height / 2 + 12), row.notes[number], 11, FAINT, "ms")
        top += height
    return canvas.finished()


def wrapped(words: str, size: float, width: float, *, most: int | None = None) -> list[str]:
    """The words in lines no wider than ``width``, broken at blanks and, where a word is longer than that, within it.

    Past ``most`` lines, the last of these ends in dots.
    """
    font = ImageFont.load_default(size)
    lines, line = [], ""
    for word in words.split():
        if line and font.getlength(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while font.getlength(line) > width and len(line) > 1:
            kept = next(end for end in range(len(line) - 1, 0, -1) if end == 1 or font.getlength(line[:end]) <= width)
            lines.append(line[:kept])
            line = line[kept:]
    lines.append(line)
    if most is not None and len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1][:-2]}..."]
    return lines


def _draw_scale(
    canvas: Canvas, at: tuple[float, float], width: float, ends: tuple[str, str], *, beside: bool = False
) -> None:
    """The scale of colours as a bar, with what its ends mean beside it or under it."""
    left, top = at
    least, most = ends
    if beside:
        left += ImageFont.load_default(13).getlength(least) + 8
    bar = Image.fromarray(np.ascontiguousarray(np.broadcast_to(SCALE, (2 * _BAR, 256, 3))))
    canvas.paste(bar, (left, top, left + width, top + _BAR))
    if beside:
        canvas.text((left - 8, top + _BAR), least, 13, FAINT, "rs")
        canvas.text((left + width + 8, top + _BAR), most, 13, FAINT)
    else:
        canvas.text((left, top + _BAR + 13), least, 12, FAINT)
        canvas.text((left + width, top + _BAR + 13), most, 12, FAINT, "rs")
