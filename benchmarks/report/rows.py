"""Stored results: JSON lines, each with the file and line it stands in, the newest for each question."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import records

Row = dict[str, Any]

# Compiled without a device: another format, with a report of its own.
NOT_A_DEVICE = "ahead_of_time"

# Two rows that agree in these keys answer the same question, and the newer one counts.
QUESTION = ("operator", "model", "overrides", "shape", "dtype", "mode", "provider")


@dataclass(frozen=True)
class Results:
    """The rows of one device in one folder, which may hold those of several devices."""

    folder: Path
    device: str
    on_cuda: bool
    rows: list[Row]

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower().replace("(r)", "")).strip("-")


def device_folders(root: Path) -> list[Path]:
    """The folders of ``root`` that hold results of a device."""
    return sorted(path for path in root.iterdir() if path.name != NOT_A_DEVICE and any(path.glob("*.jsonl")))


def read(folder: Path) -> list[Row]:
    """All rows of a device's folder, each with ``file`` and ``line``, counted from 1.

    Raises:
        ValueError: a line is no JSON object with an operator and a provider.
    """
    rows = []
    for file in sorted(folder.glob("*.jsonl")):
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(text)
            except json.JSONDecodeError as problem:
                raise ValueError(f"{file}:{number}: expected a JSON object, got {text[:40]!r}") from problem
            if not isinstance(row, dict) or not row.get("operator") or not row.get("provider"):
                raise ValueError(f"{file}:{number}: expected an object with an operator and a provider")
            rows.append(row | {"file": file.name, "line": number})
    return rows


def by_device(folder: Path, rows: Iterable[Row]) -> list[Results]:
    """The newest of the rows, apart for each device (on a CPU, and number of threads), named in alphabetical order."""
    rows = list(rows)
    on_cuda = {row.get("device") for row in rows if _shows_cuda(row)}
    devices: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        name, cuda = row.get("device"), row.get("device") in on_cuda
        label = (name or "a device without a name") + ("" if cuda else f", {row.get('threads')} threads")
        devices.setdefault((label, cuda), []).append(row)
    return [Results(folder, label, cuda, newest(found)) for (label, cuda), found in sorted(devices.items())]


def _shows_cuda(row: Row) -> bool:
    # On tensors without memory: no device did anything.
    counted = (row.get("mode") or "").startswith("saved") or row["operator"] == "memory_per_rank"
    return bool(row.get("driver")) or (row["provider"].startswith("triton") and not absent(row) and not counted)


def newest(rows: Sequence[Row]) -> list[Row]:
    """The newest row for each question, in stored order; of rows with equal dates the last.

    A peer reported absent for all modes at once is present after all where a later row of it has times.
    """
    latest: dict[str, Row] = {}
    for row in sorted(rows, key=date):
        latest[_question(row)] = row
    kept = [row for row in rows if latest[_question(row)] is row]
    last_seen: dict[str, str] = {}
    for row in kept:
        whole = _question(row | {"mode": None})
        if "unavailable" not in row:
            last_seen[whole] = max(last_seen.get(whole, ""), date(row))
    return [
        row
        for row in kept
        if not (absent(row) and row.get("mode") is None and last_seen.get(_question(row), "") > date(row))
    ]


def _question(row: Row) -> str:
    # The largest batch that fits is found, not asked for.
    asked = row | {"shape": None} if row.get("mode") == "largest batch" else row
    return json.dumps([asked.get(key) or None for key in QUESTION], sort_keys=True)


def date(row: Row) -> str:
    return row.get("date") or ""


def absent(row: Row) -> bool:
    return bool(row.get("unavailable"))


def size(row: Row, name: str) -> int | None:
    """``batch``, ``tokens``, ``width``, ``heads`` or ``head_dim`` of what was measured; None where it has none."""
    shape = row.get("shape")
    if isinstance(shape, dict):
        if name == "head_dim":
            return shape["width"] // shape["heads"] if shape.get("heads") else None
        return shape.get(name)
    return shape[0] if shape and name == "batch" else None


SIZES = ("batch", "tokens", "width", "heads", "head_dim")


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows, absent ones included, that have these values; sizes are found in the shape."""

    def value(row: Row, key: str) -> Any:
        return size(row, key) if key in SIZES else row.get(key)

    return [row for row in rows if all(value(row, key) == want for key, want in wanted.items())]


def describe_shape(row: Row) -> str:
    """The shape in words, without sizes that are None."""
    shape = row.get("shape") or []
    if isinstance(shape, dict):
        words = {"batch": "batch {}", "tokens": "{} tokens", "width": "width {}", "heads": "{} heads"}
        sizes = [words.get(name, f"{name} {{}}").format(value) for name, value in shape.items() if value is not None]
    else:
        batch, image = shape[:1], shape[2:]
        sizes = [f"batch {count}" for count in batch if count is not None]
        sizes += [" x ".join(map(str, image)) + " px"] * bool(image)
    return ", ".join(sizes)


def describe_model(row: Row) -> str:
    """The model with what differs from its published size, in words; for a rival, the model that it is compared with."""
    if row["provider"].startswith("vit-mae"):
        return "crate_mae_base"
    return records.describe_model(row)
