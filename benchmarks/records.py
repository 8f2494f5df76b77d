"""The one format of results: what a row holds, and how rows are made, written and printed."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import torch

from benchmarks import ROOT

_WRITTEN_BY_BENCHMARKS = (":!benchmarks/results", ":!README.md", ":!docs/results.md")

# The provider that all others are compared with: the published code's order of operations.
BASELINE = "reference"
# What a row's mode says of the memory that one layer keeps for its backward.
SAVED_BY = {layer: f"saved by one {layer.replace('_', ' ')}" for layer in ("encoder_layer", "decoder_layer")}


class Row(TypedDict, total=False):
    """One line of a results file. Every row has every key but ``unavailable``; a key without meaning is None.

    The keys from ``seed`` on say where, when and with what it was measured. A peer that this machine lacks, or that cannot do
    the work, has a row too: ``unavailable`` says why, and there are no times.
    """

    # "attention", ...; "training_step", "memory", "memory_per_rank", "data_loading"; "ceilings": what the device reaches
    operator: str
    model: str  # of a whole step
    overrides: dict[str, Any]  # of the model's configuration
    shape: dict[str, int] | list[int]  # batch, tokens, width, heads; of images [batch, channels, height, width]
    dtype: str  # of ``harness.DTYPES``; under autocast where it has 16 bits
    # "forward", "backward", "forward+backward", ...; of memory "peak", "saved for backward", "largest batch"; of memory a rank
    # "one process", "FSDP2, 8 ranks"; of data loading "one process", "2 workers".
    mode: str
    data: str  # the files that images were loaded from, in words
    provider: str
    baseline: str  # the provider that ``ratio`` compares with
    timed_by: str  # "CUDA graph", "events", "host clock", "processor time"
    input_sets: int  # that take turns, so that the L2 cache is cold
    rounds: int  # timed turns
    ms: dict[str, float]  # p20, p50, p80 of one pass over one input set
    # 10^12 floating-point operations a second, of the least that the work takes; of library products, of their own.
    tflops: float
    gigabytes_per_second: float  # 10^9, of the least bytes: every input, output and gradient once
    # Percent of min(product rate, copy rate x intensity), both measured by the same process; where the bytes are unknown, of
    # the product rate.
    roofline_percent: float
    peak_bytes: int  # of a kernel, more than before it; of a step, with the model; of a rank, the sum of its parts
    ranks: int  # processes that share a step
    parts: dict[str, int]  # bytes of what a rank needs memory for
    ratio: dict[str, float]  # p20, p50, p80: how many times better than the baseline, within each turn
    images_per_second: float
    loss: float
    error: dict[str, float]  # relative, ||found - truth|| / ||truth||
    unavailable: str
    seed: int
    device: str
    driver: str
    torch: str
    triton: str
    python: str
    threads: int
    commit: str
    dirty: bool  # something other than results and pages that show them differed from the commit
    date: str


class Record:
    """The rows of a run: each is complete, written and announced as soon as it is there.

    Raises:
        SystemExit: the file of ``--json`` cannot be written; what is measured must not be lost.
    """

    def __init__(self, device: torch.device, seed: int | None, file: str | Path | None) -> None:
        if file:
            try:
                write_json_lines(file, [])
            except OSError as problem:
                raise SystemExit(f"--json {file}: expected a file that can be written: {problem.strerror}") from None
        self.surroundings = {"seed": seed, **environment(device)}
        self.file = file
        self.rows: list[dict[str, Any]] = []

    def add(self, **values: Any) -> None:
        """One row of these values.

        Raises:
            TypeError: a value that ``Row`` does not know.
        """
        unknown = values.keys() - Row.__annotations__.keys()
        if unknown:
            raise TypeError(f"{', '.join(sorted(unknown))}: no such key of Row")
        keys = (key for key in Row.__annotations__ if key != "unavailable")
        row = {**dict.fromkeys(keys), **values, **self.surroundings}
        self.rows.append(row)
        if self.file:
            write_json_lines(self.file, [row])
        cells = [str(cell) for cell in line(row) if cell != ""]
        print(f"{time.strftime('%H:%M:%S')} {'  '.join(cells)}", file=sys.stderr, flush=True)

    def show(self) -> None:
        if self.rows:
            print(", ".join(f"{name} {value}" for name, value in self.surroundings.items()))
            print(table_of(self.rows))

    def refuse_nothing(self) -> None:
        """End a run in which no provider took part.

        Raises:
            SystemExit: every row but the ceilings is of an absent provider; why each is.
        """
        rows = [row for row in self.rows if row["operator"] != "ceilings"]
        if all("unavailable" in row for row in rows):
            reasons = dict.fromkeys(f"{row['provider']}: {row['unavailable']}" for row in rows)
            raise SystemExit(f"nothing was measured; {'; '.join(reasons)}")


def in_one_line(problem: BaseException) -> str:
    """An exception's type and the beginning of its message; for torch.compile's own, those of its cause."""
    while type(problem).__module__.startswith("torch._dynamo") and problem.__cause__ is not None:
        problem = problem.__cause__
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}".removesuffix(": ")


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and date: enough to know whether two results may be compared."""
    on_cuda = device.type == "cuda"
    # The variable names the commit of a copy that has no repository, as on a machine lent for a measurement.
    copied = os.environ.get("CRATE_KERNELS_COMMIT")
    commit = None if copied else _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", *_WRITTEN_BY_BENCHMARKS)
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_cuda else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": commit or copied,
        "dirty": None if commit is None else bool(changes),  # who knows, in a copy without its repository
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def slug(device_name: str) -> str:
    """The name of a device as a folder of results bears it."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


def _cpu_name() -> str:
    """The CPU's name. Where oneDNN is told to use fewer instructions, the name says so: results stand for another CPU."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return _model_name() + (f", as {limit}" if limit else "")


def _model_name() -> str:
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(distribution: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line a command prints; None where it is missing, fails or prints nothing."""
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(printed.splitlines()), None)


def write_json_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a line, so that a file may gather several runs."""
    with open(path, "a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as aligned text: numbers to the right, words to the left."""
    rows = [list(row) for row in rows]
    cells = [list(columns), *([str(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def _percentiles(key: str) -> Callable[[Mapping[str, Any]], str]:
    def text(row: Mapping[str, Any]) -> str:
        values = row.get(key)
        return f"{values['p50']:.4g} ({values['p20']:.4g}-{values['p80']:.4g})" if values else ""

    return text


def _number(key: str, unit: float = 1) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{row[key] / unit:.4g}" if row.get(key) else ""


def _shape(row: Mapping[str, Any]) -> str:
    shape = row.get("shape") or []
    return "x".join(map(str, shape.values() if isinstance(shape, dict) else shape))


def describe_model(row: Mapping[str, Any]) -> str:
    """The model with what differs from its published size, in words; nothing where there is no model."""
    overrides = row.get("overrides") or {}
    return " ".join([row.get("model") or "", *(f"{name}={value}" for name, value in overrides.items())]).strip()


# How rows are printed.
COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "operator": lambda row: row["operator"],
    "model": describe_model,
    "shape": _shape,
    "dtype": lambda row: row.get("dtype") or "",
    "mode": lambda row: row.get("mode") or "",
    "provider": lambda row: row["provider"],
    "ms (p20-p80)": _percentiles("ms"),
    "TFLOP/s": _number("tflops"),
    "GB/s": _number("gigabytes_per_second"),
    "% of roof": _number("roofline_percent"),
    "images/s": _number("images_per_second"),
    "peak MiB": _number("peak_bytes", 2**20),
    "ratio (p20-p80)": _percentiles("ratio"),
    "timed by": lambda row: row.get("timed_by") or "",
    "unavailable": lambda row: row.get("unavailable") or "",
}


def line(row: Mapping[str, Any]) -> list[str]:
    """A row as it is printed, a cell a column."""
    return [text(row) for text in COLUMNS.values()]


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table, without columns that none of them fills."""
    lines = [line(row) for row in rows]
    used = [index for index in range(len(COLUMNS)) if any(cells[index] for cells in lines)]
    return table([list(COLUMNS)[index] for index in used], ([cells[index] for index in used] for cells in lines))
