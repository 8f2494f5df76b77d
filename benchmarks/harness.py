"""What every benchmark shares: outputs checked before timing, providers timed interleaved, one format of results.

A provider is a callable without arguments that does the work once. All providers of a comparison are timed in one run, in
turns, so that a drift of the clock or a neighbour's load meets all of them, and ratios are taken within each turn.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

Provider = Callable[[], object]

# As rows name them: tf32 is float32 tensors whose products are taken in TF32.
DTYPES = ("float32", "tf32", "float16", "bfloat16")

ROOT = Path(__file__).resolve().parent.parent
_WRITTEN_BY_BENCHMARKS = (":!benchmarks/results", ":!README.md")


class Row(TypedDict, total=False):
    """One line of a results file. Every row has every key, None where it has no meaning, except ``unavailable``.

    From ``seed`` on they say where, when and with what it was measured. A peer that this machine lacks, or that cannot do the
    work, has a row too: ``unavailable`` says why, and there are no times.
    """

    operator: str  # "attention", ...; "training_step", "memory"; "ceilings": what the device reaches
    model: str  # of a whole step
    overrides: dict[str, Any]  # of the model's configuration
    shape: dict[str, int] | list[int]  # batch, tokens, width, heads; of images [batch, channels, height, width]
    dtype: str  # of ``DTYPES``; under autocast where it has 16 bits
    mode: str  # "forward", "backward", "forward+backward", ...; of memory "peak", "saved for backward", "largest batch"
    provider: str
    baseline: str  # the provider that ``ratio`` compares with
    timed_by: str  # "CUDA graph", "events", "host clock"
    input_sets: int  # that take turns, so that the L2 cache is cold
    rounds: int  # timed turns
    ms: dict[str, float]  # p20, p50, p80 of one pass over one input set
    tflops: float  # 10^12 floating-point operations a second, of the least that the work takes
    gigabytes_per_second: float  # 10^9, of the least bytes: every input, output and gradient once
    roofline_percent: float  # of min(product rate, copy rate x intensity) that the same process measured
    peak_bytes: int  # of a kernel, more than before it; of a step, with the model
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
    dirty: bool  # something other than results and README differed from the commit
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
        """What ends a run in which no provider took part.

        Raises:
            SystemExit: every row but the ceilings is of an absent provider; why each is.
        """
        rows = [row for row in self.rows if row["operator"] != "ceilings"]
        if all("unavailable" in row for row in rows):
            reasons = dict.fromkeys(f"{row['provider']}: {row['unavailable']}" for row in rows)
            raise SystemExit(f"nothing was measured; {'; '.join(reasons)}")


def device_named(name: str) -> torch.device:
    """The device that ``--device`` asks for.

    Raises:
        SystemExit: it is neither the CPU nor a CUDA device that torch finds.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise SystemExit(f"--device {name}: expected cpu, cuda or cuda:NUMBER")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(f"--device {name}: torch finds no CUDA device; --device cpu measures this machine's CPU")
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise SystemExit(f"--device {name}: expected a number below {count}, which is how many torch finds")
    return device


def make_folder(argument: str, folder: Path) -> None:
    """Make the folder of an argument where it is missing, and write to it once.

    Raises:
        SystemExit: that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        raise SystemExit(
            f"{argument}: expected a folder that can be written, got {folder}: {problem.strerror}"
        ) from None


def positive(text: str) -> int:
    """The type of an argument that counts something.

    Raises:
        ArgumentTypeError: it is no whole number of at least 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def in_one_line(problem: BaseException) -> str:
    """What went wrong: its kind and the beginning of its message."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}".removesuffix(": ")


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

    @classmethod
    def single(cls, value: float) -> dict[str, float]:
        """As a row has it, of something that does not vary or was measured once."""
        return asdict(cls(value, value, value))


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
    """Milliseconds of each provider, if any, in each of ``rounds`` turns; each turn starts with another provider.

    The device is idle when a call begins, so on a GPU (CUDA events) the time includes what the host fails to hide.
    """
    names = list(providers)
    timed = _time_on_cuda if device.type == "cuda" else _time_on_host
    for _ in range(warmup):
        for provider in providers.values():
            timed(provider)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append(timed(providers[name]))
        names = names[1:] + names[:1]
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


def ratios_to(baseline: Sequence[float] | None, times: Sequence[float]) -> dict[str, float] | None:
    """``ratios`` as a row has them; None where the baseline was not measured."""
    return None if baseline is None else asdict(ratios(baseline, times))


def captured(run: Provider, device: torch.device) -> tuple[Provider, str]:
    """``run`` without the host's time where that can be had, and how its time is taken: "CUDA graph", "events" or "host clock".

    On a GPU all must happen on one ``side_stream``, backwards included.
    """
    if device.type != "cuda":
        return run, "host clock"
    for _ in range(3):  # compiles, chooses algorithms, allocates workspaces
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            kept = run()
    except RuntimeError as problem:
        return run, f"events (no CUDA graph: {in_one_line(problem)})"

    def replay() -> object:
        graph.replay()
        return kept  # the graph's results, whose memory lives as long as this function

    return replay, "CUDA graph"


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Autograd runs a backward where its forward ran, and the default stream cannot be captured."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def added_bytes(run: Provider, device: torch.device) -> int | None:
    """The most memory that is allocated while it runs, above what was before; None where the device does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of one of ``DTYPES``, with float32 products set to be taken as the name says."""
    float32_products("high" if name == "tf32" else "highest")
    return torch.float32 if name == "tf32" else getattr(torch, name)


def float32_products(precision: str) -> None:
    """ "highest" or, in TF32, "high"; convolutions too."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def clean(device: torch.device) -> None:
    """Nothing left of what was measured before: neither memory nor compiled code, which counts towards a limit."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast where the dtype has 16 bits: the official order is defined under it."""
    return torch.autocast(device.type, dtype) if dtype.itemsize == 2 else nullcontext()


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this process: one large product, one large copy counting bytes read and written."""

    tflops: float
    gigabytes_per_second: float

    def rates(self, ms: float, flops: float, nbytes: float | None = None) -> dict[str, float | None]:
        """Of a row: both rates, and the percentage of the roofline; of the product rate alone where no bytes are given."""
        tflops, roof = flops / ms / 1e9, self.tflops
        if nbytes is not None:
            roof = min(roof, self.gigabytes_per_second * flops / nbytes / 1e3)
        return {
            "tflops": tflops,
            "gigabytes_per_second": None if nbytes is None else nbytes / ms / 1e6,
            "roofline_percent": 100 * tflops / roof,
        }


def ceilings(record: Record, device: torch.device, dtype_name: str) -> Ceilings:
    """Measure them in this dtype, on random data, and record them."""
    dtype, rounds = torch_dtype(dtype_name), 20
    side, elements = (8192, 2**29) if device.type == "cuda" else (512, 2**22)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    providers = {"product": lambda: torch.mm(left, right), "copy": lambda: target.copy_(source)}
    times = time_interleaved(providers, device, rounds=rounds, warmup=10 if device.type == "cuda" else 1)
    ms = {mode: Spread.of(sample) for mode, sample in times.items()}
    tflops = 2 * side**3 / ms["product"].p50 / 1e9
    gigabytes = 2 * source.nbytes / ms["copy"].p50 / 1e6
    common = {"operator": "ceilings", "dtype": dtype_name, "provider": "library", "rounds": rounds}
    record.add(**common, mode="product", ms=asdict(ms["product"]), tflops=tflops)
    record.add(**common, mode="copy", ms=asdict(ms["copy"]), gigabytes_per_second=gigabytes)
    return Ceilings(tflops, gigabytes)


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a result was measured: enough to know whether two results may be compared."""
    on_cuda = device.type == "cuda"
    # A copy of the tree that has no repository with it, on a machine for the measurement alone, says what it is a copy of.
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    copied = os.environ.get("CRATE_KERNELS_COMMIT") if commit is None else None
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
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(distribution: str) -> str | None:
    """Of an installed distribution; None where it is not."""
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
