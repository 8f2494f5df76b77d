"""metrics.csv, for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from crate_mae.files import append, remove, replaced, sync
from crate_mae.training.sinks.sink import Sink, scalars_of

_LINES_AT_ONCE = 10_000


class CSVSink(Sink):
    """A line for each row, and a column for each number that any row has; a cell is empty if its row lacks the number.

    Floats are written with all their digits. For a new number the file is rewritten, with a new column at the end."""

    name, place, in_files = "csv", "metrics.csv", True

    def __init__(self, out: Path, config: dict[str, Any], identity: str | None, say: Callable[[str], None]) -> None:
        super().__init__(out, config, identity, say)
        self.path = out / self.place
        self._columns: dict[str, None] = {}
        if identity is None:
            remove(self.path)
        elif self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                self._columns = dict.fromkeys(next(csv.reader(file), ()))
        self.goes_on = bool(self._columns)

    def row(self, step: int, scalars: dict[str, float]) -> None:
        values = {"step": step, **scalars}
        if not values.keys() <= self._columns.keys():
            self._widen(values)
        append(self.path, _text([self._cells(values)]))

    def fill(self, rows: Iterable[dict[str, Any]]) -> None:
        rows = list(rows)
        if not rows:
            return
        self._columns = {"step": None}
        for row in rows:
            self._columns |= dict.fromkeys(scalars_of(row))
        self._write(self._cells({"step": row["step"], **scalars_of(row)}) for row in rows)

    def close(self, ended: str) -> None:
        if self.path.exists():
            sync(self.path)

    def _cells(self, values: dict[str, float]) -> list[float | str]:
        return [values.get(name, "") for name in self._columns]

    def _widen(self, names: Iterable[str]) -> None:
        had = len(self._columns)
        self._columns |= dict.fromkeys(names)
        if not had:
            self._write(iter(()))
            return
        more = [""] * (len(self._columns) - had)
        with open(self.path, newline="", encoding="utf-8") as file:
            self._write([*cells, *more] for cells in islice(csv.reader(file), 1, None))

    def _write(self, lines: Iterator[Sequence[Any]]) -> None:
        """Write the file anew: a heading with the names of the columns, then the lines."""
        lines = chain([list(self._columns)], lines)
        with replaced(self.path) as file:
            while some := list(islice(lines, _LINES_AT_ONCE)):
                file.write(_text(some).encode())


def _text(lines: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
