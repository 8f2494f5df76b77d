"""Sheets of pictures: rows and columns of cells under a title, which says what is seen and what colours mean."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFont

from crate_mae.pictures.charts import FAINT, INK, Canvas
from crate_mae.pictures.colours import SCALE

CELL = 160
"""The width that cells have, unless told otherwise: of images that differ in size, too."""

_MARGIN, _GAP, _NAMES = 28, 8, 150
_NARROWEST, _NARROWEST_CELL = 900, 16
_LINE, _BAR, _SCALE_HEIGHT = 16, 10, 32


class Column(NamedTuple):
    """The title over a column, of several lines where it has line breaks."""

    title: str
    colour: str = INK


class Row(NamedTuple):
    """Cells, of the size that ``cell_size`` says, and the name on their left.

    Where there are notes, one is under each cell; where there are scales, what a cell's colours range over, from here down, is
    above it.
    """

    name: str
    details: Sequence[str]
    cells: Sequence[Image.Image | None]
    notes: Sequence[str] = ()
    scales: Sequence[tuple[str, str] | None] = ()


def cell_size(shape: Sequence[int], width: int = CELL, tallest: float = 1.5) -> tuple[int, int]:
    """(height, width) of the cell of an image of a shape (height, width), in pixels of twice the sheet's resolution.

    It is as wide as cells are, or as high as that times ``tallest`` and narrower; a strip is made broad enough to be seen.
    """
    scale = min(2 * width / shape[1], 2 * width * tallest / shape[0])
    return max(_NARROWEST_CELL, round(shape[0] * scale)), max(_NARROWEST_CELL, round(shape[1] * scale))


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
    lefts = [_MARGIN + _NAMES + number * (width + _GAP) for number in range(len(columns))]
    heading = wrapped(title, 22, total - 2 * _MARGIN)
    texts = [part for line in lines if line for part in wrapped(line, 14, total - 2 * _MARGIN)]
    titles = [[part for line in column.title.split("\n") for part in wrapped(line, 13, width)] for column in columns]
    labels = [_label(row) for row in rows]
    heights = [_height(row, label) for row, label in zip(rows, labels, strict=True)]
    head = 2 * _MARGIN + 28 * len(heading) + 19 * len(texts) + (26 if scale else 0)
    top: float = head + _LINE * max(map(len, titles))
    canvas = Canvas(total, round(top + sum(heights) + _MARGIN))

    for number, line in enumerate(heading):
        canvas.text((_MARGIN, _MARGIN + 18 + 28 * number), line, 22)
    for number, line in enumerate(texts):
        canvas.text((_MARGIN, _MARGIN + 16 + 28 * len(heading) + 19 * number), line, 14, FAINT)
    if scale:
        _draw_scale(canvas, (_MARGIN, head - _MARGIN - 10), 260, scale, beside=True)
    for column, words, left in zip(columns, titles, lefts, strict=True):
        for place, line in enumerate(reversed(words)):
            canvas.text((left + width / 2, top - 6 - _LINE * place), line, 13, column.colour, "ms")
    for row, label, height in zip(rows, labels, heights, strict=True):
        begin = top + (_SCALE_HEIGHT if row.scales else 0)
        for place, (line, size, colour) in enumerate(label):
            canvas.text((_MARGIN, begin + 12 + _LINE * place), line, size, colour)
        for left, ends in zip(lefts, row.scales, strict=False):
            if ends:
                _draw_scale(canvas, (left, top + 2), width, ends)
        for number, (left, cell) in enumerate(zip(lefts, row.cells, strict=True)):
            if cell:
                middle, below = left + width / 2, begin + cell.height / 2
                canvas.paste(cell, (middle - cell.width / 4, begin, middle + cell.width / 4, below))
                if row.notes:
                    canvas.text((middle, below + 12), row.notes[number], 11, FAINT, "ms")
        top += height
    return canvas.finished()


def _label(row: Row) -> list[tuple[str, int, str]]:
    """The lines beside a row, with their size and colour."""
    names = [(line, 13, INK) for line in wrapped(row.name, 13, _NAMES - 12, most=3)]
    return names + [(line, 12, FAINT) for detail in row.details for line in wrapped(detail, 12, _NAMES - 12)]


def _height(row: Row, label: Sequence[object]) -> float:
    of_cells = max(cell.height / 2 for cell in row.cells if cell) + (_LINE if row.notes else 0)
    return max(of_cells, _LINE * len(label)) + _GAP + (_SCALE_HEIGHT if row.scales else 0)


def wrapped(words: str, size: float, width: float, *, most: int | None = None) -> list[str]:
    """The words in lines no wider than ``width``, broken at blanks and, where a word is longer than that, within it.

    Past ``most`` lines, the last of these ends in dots. What Pillow's own font has no letters for is written without accents, or
    as a question mark.
    """
    font = ImageFont.load_default(size)
    bare = (each for each in unicodedata.normalize("NFKD", words) if not unicodedata.combining(each))
    words = "".join(bare).encode("ascii", "replace").decode()
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
