"""How every benchmark measures: outputs checked before timing, providers timed interleaved.

A provider is a callable without arguments that does the work once. All providers of a comparison are timed in one run, in
turns, so that a drift of the clock or a neighbour's load meets all of them, and ratios are taken within each turn.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.records import Record, in_one_line

Result = TypeVar("Result")
Provider = Callable[[], object]

# The names of dtypes in rows. "tf32": float32 tensors whose products are taken in TF32.
DTYPES = ("float32", "tf32", "float16", "bfloat16")


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
        """The percentiles of a single value, as rows hold them."""
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
    providers: Mapping[str, Provider],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of each provider in each of ``rounds`` turns; each turn starts with another provider.

    On a GPU, CUDA events take the time. The device is idle when a call begins, so the time includes host work that no kernel
    hides. On a CPU ``clock`` takes it, in seconds.
    """
    names = list(providers)
    timed = _time_on_cuda if device.type == "cuda" else partial(_time_on_host, clock=clock)
    for _ in range(warmup):
        for provider in providers.values():
            timed(provider)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append(timed(providers[name]))
        names = names[1:] + names[:1]
    return times


def _time_on_host(provider: Provider, clock: Callable[[], float]) -> float:
    begin = clock()
    provider()
    return (clock() - begin) * 1e3


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


def captured(run: Callable[[], Result], device: torch.device) -> tuple[Callable[[], Result], str]:
    """``run``, on a GPU captured in a CUDA graph where that succeeds, and how it is timed: "CUDA graph", "events", "host clock".

    A graph leaves out the host's time. Everything that is captured, backwards included, must run on one ``side_stream``.
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

    def replay(inputs: Callable[[], Result] = run) -> Result:
        # The graph reads tensors that ``run`` holds and writes those in ``kept``: this function keeps both alive.
        graph.replay()
        return kept

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


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of one of ``DTYPES``, with float32 products set to be taken as the name says."""
    float32_products("high" if name == "tf32" else "highest")
    return torch.float32 if name == "tf32" else getattr(torch, name)


def float32_products(precision: str) -> None:
    """ "highest" or, in TF32, "high"; convolutions too."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def clean(device: torch.device) -> None:
    """Release what earlier measurements left: memory, and compiled code, of which torch.compile keeps a limited number."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast where the dtype has 16 bits: the official order is defined under it."""
    return torch.autocast(device.type, dtype) if dtype.itemsize == 2 else nullcontext()


@dataclass(frozen=True)
class Ceilings:
    """The rates that one large product and one large copy reached in this process; bytes count once read and once written."""

    tflops: float
    gigabytes_per_second: float

    def rates(self, ms: float, flops: float, nbytes: float | None = None) -> dict[str, float | None]:
        """A row's rates and its percentage of the roofline; without bytes, of the product rate."""
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
    side, elements, warmup = (8192, 2**29, 10) if device.type == "cuda" else (1024, 2**22, 3)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    providers = {"product": lambda: torch.mm(left, right), "copy": lambda: target.copy_(source)}
    times = time_interleaved(providers, device, rounds=rounds, warmup=warmup)
    ms = {mode: Spread.of(sample) for mode, sample in times.items()}
    # A neighbour's load only ever makes them slower: the better times are nearer to what the device can do.
    tflops = 2 * side**3 / ms["product"].p20 / 1e9
    gigabytes = 2 * source.nbytes / ms["copy"].p20 / 1e6
    common = {"operator": "ceilings", "dtype": dtype_name, "provider": "library", "rounds": rounds}
    record.add(**common, mode="product", ms=asdict(ms["product"]), tflops=tflops)
    record.add(**common, mode="copy", ms=asdict(ms["copy"]), gigabytes_per_second=gigabytes)
    return Ceilings(tflops, gigabytes)
