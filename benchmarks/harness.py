"""What every benchmark shares: outputs checked before timing, providers timed interleaved, results with their surroundings.

A provider is a callable without arguments that does the work once. All providers of a comparison are timed in one run, in
turns, so that a drift of the clock or a neighbour's load meets all of them, and ratios are taken within each turn.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Provider = Callable[[], object]

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Spread:
    """The 20th, 50th and 80th percentile of a sample."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        if len(sample) == 1:
            return cls(sample[0], sample[0], sample[0])
        p20, _, _, p80 = statistics.quantiles(sample, n=5, method="inclusive")
        return cls(p20, statistics.median(sample), p80)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth||, in float64."""
    truth = truth.double()
    return ((found.double() - truth).norm() / truth.norm()).item()


def check_agreement(
    outputs: Mapping[str, Mapping[str, Tensor]], truth: Mapping[str, Tensor], tolerances: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Relative errors of every provider's outputs; a time is worth nothing before this has passed.

    ``outputs`` is ``{provider: {name: tensor}}``; ``truth`` and ``tolerances`` have the same names.

    Raises:
        ValueError: an output is not finite, or further from the truth than its tolerance.
    """
    errors: dict[str, dict[str, float]] = {}
    for provider, tensors in outputs.items():
        errors[provider] = {}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{provider}: {name} is not finite")
            error = errors[provider][name] = relative_error(tensor, truth[name])
            if not error <= tolerances[name]:
                raise ValueError(f"{provider}: {name} is {error:.1e} off, relative; allowed are {tolerances[name]:.1e}")
    return errors


def time_interleaved(
    providers: Mapping[str, Provider], device: torch.device, *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of each provider in each of ``rounds`` turns; each turn starts with another provider.

    The device is idle when a call begins, so on a GPU (CUDA events) the time includes what the host fails to hide.
    """
    names = list(providers)
    timed = _time_on_cuda if device.type == "cuda" else _time_on_host
    for _ in range(warmup):
        for provider in providers.values():
            timed(provider)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timed(providers[name]))
    return times


def _time_on_host(provider: Provider) -> float:
    begin = time.perf_counter()
    provider()
    return (time.perf_counter() - begin) * 1e3


def _time_on_cuda(provider: Provider) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    provider()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def ratios(baseline: Sequence[float], times: Sequence[float]) -> Spread:
    """How many times faster than the baseline, from the pairs measured in the same turn."""
    return Spread.of([slow / fast for slow, fast in zip(baseline, times, strict=True)])


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a result was measured: enough to know whether two results may be compared."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_cuda else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": _output("git", "-C", str(_ROOT), "rev-parse", "HEAD"),
        "dirty": bool(_output("git", "-C", str(_ROOT), "status", "--porcelain")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
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
