"""``python -m crate_kernels`` prints what belongs at the top of a bug report: versions, devices, and which implementation of the
operators runs on them, and why.

Something missing or broken does not end it: its line then says what went wrong.
"""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from crate_kernels import tiles
from crate_kernels._version import __version__
from crate_kernels.cpu import CPU, arithmetic_dtype
from crate_kernels.dispatch import choose, obstacle_to_kernels, use
from crate_kernels.library_products import ONEDNN_IS_FASTER
from crate_kernels.shared_attention.api import WIDEST_HEAD, obstacle_to_triton
from crate_kernels.tiles import cache

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# CPU instructions, by Linux's names, that decide how products are computed.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
ALWAYS_SAID = ("CRATE_KERNELS_IMPL", "TRITON_INTERPRET")
SAID_WHERE_SET = (cache.VARIABLE, "ONEDNN_MAX_CPU_ISA", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def torch_line() -> Iterator[str]:
    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    yield f"{torch.__version__}, built for {', '.join(f'{name} {of}' for name, of in builds.items() if of) or 'CPUs alone'}"


def version(name: str) -> Iterator[str]:
    yield metadata.version(name)


def triton_line() -> Iterator[str]:
    """Imports it: it is distributed under several names, and the bug may be that the import fails."""
    yield importlib.import_module("triton").__version__


def python_line() -> Iterator[str]:
    yield f"{platform.python_version()} on {platform.platform()}"


def environment() -> Iterator[str]:
    variables = (*ALWAYS_SAID, *(name for name in SAID_WHERE_SET if name in os.environ))
    yield ", ".join(f"{name}={os.environ[name]}" if name in os.environ else f"{name} not set" for name in variables)


def cpu() -> Iterator[str]:
    has = [name for name in INSTRUCTIONS if name in CPU.flags]
    yield f"{_cpu_name()}, {torch.get_num_threads()} threads; {' '.join(has) or 'no instructions known'}"
    computed = {dtype: arithmetic_dtype(torch.empty(0, dtype=dtype)) for dtype in DTYPES}
    widened = [f"{_name(dtype)} in {_name(by)}" for dtype, by in computed.items() if by != dtype]
    library = "oneDNN" if ONEDNN_IS_FASTER else "torch.mm's library"
    yield f"products of float32 by {library}; of {', '.join(widened) or 'all dtypes in their own'}"


def _cpu_name() -> str:
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpus() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield "torch finds none"
        return
    for line, count in Counter(_gpu(index) for index in range(torch.cuda.device_count())).items():
        yield f"{count} x {line}"
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if torch.version.cuda:
        printed = subprocess.run(driver, capture_output=True, text=True, check=True, timeout=30).stdout
        yield f"driver {printed.splitlines()[0]}"


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, {tiles.family(torch.device('cuda', index))}, {found.total_memory / 2**30:.1f} GiB"


def taken_on(device: str) -> Iterator[str]:
    """For each dtype, the implementation that ``auto`` chooses there and, if it is not triton, why, in ``dispatch``'s words."""
    if device == "cuda" and not torch.cuda.is_available():
        yield "nothing, without such a device"
        return
    cases: dict[str, tuple[Tensor, str | None]] = {
        _name(dtype): (torch.empty(0, dtype=dtype, device=device), None) for dtype in DTYPES
    }
    cases[f"heads wider than {WIDEST_HEAD}"] = cases["float32"][0], obstacle_to_triton(WIDEST_HEAD + 1)
    by_reason: dict[str, list[str]] = {}
    for name, (tensor, obstacle) in cases.items():
        by_reason.setdefault(_choice(tensor, obstacle), []).append(name)
    for choice, names in by_reason.items():
        yield f"{', '.join(names)}: {choice}"


def forced() -> Iterator[str]:
    try:
        yield f"float32 on CPUs: {choose('an operator', torch.empty(0, device='cpu'), torch.float32)}"
    except RuntimeError as refusal:
        yield f"float32 on CPUs: {refusal}"


def _choice(tensor: Tensor, obstacle: str | None) -> str:
    with use("auto"):
        chosen = choose("an operator", tensor, tensor.dtype, obstacle)
    if chosen == "triton":
        return chosen
    reason = obstacle or obstacle_to_kernels(tensor, tensor.dtype)
    return f"{chosen}; {reason or 'triton runs where it is forced'}"


def tile_tables() -> Iterator[str]:
    device = tiles.this_device()
    file = cache.location(device)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        sources = Counter(source for source, _ in tiles.in_force(device).values())
    counts = ", ".join(f"{count} from {source}" for source, count in sorted(sources.items()))
    yield f"{tiles.family(device)}: {counts}; fingerprint {tiles.fingerprint(device)}"
    yield f"cache {file}: {'there' if file.exists() else 'there is none'}"
    yield from (str(warning.message) for warning in warned)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "torch": torch_line,
    "triton": triton_line,
    "numpy": lambda: version("numpy"),
    "einops": lambda: version("einops"),
    "python": python_line,
    "environment": environment,
    "CPU": cpu,
    "GPUs": gpus,
    "auto, on CPUs": lambda: taken_on("cpu"),
    "auto, on CUDA": lambda: taken_on("cuda"),
    **({"forced": forced} if "CRATE_KERNELS_IMPL" in os.environ else {}),
    "tiles": tile_tables,
}


def report() -> Iterator[str]:
    """Yields the lines to print."""
    yield f"{'crate_kernels':14} {__version__}"
    for name, tell in PARTS.items():
        heading = name
        try:
            for line in tell():
                yield f"{heading:14} {line}"
                heading = ""
        except Exception as problem:  # reports are written when something does not work
            yield f"{heading:14} not known: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}"


if __name__ == "__main__":
    print("\n".join(report()))
    sys.exit(0)
