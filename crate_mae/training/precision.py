"""Where a run computes, on how many threads and in which precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from crate_kernels.cpu import CPU_PRODUCT_DTYPES
from crate_kernels.dispatch import choose
from crate_mae.compilation import obstacle_to_compiling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str, option: str = "--run.device", rank: int | None = None) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one, else the CPU.

    Args:
        option: what messages call it.
        rank: which of several processes on this machine this is; each has the CUDA device of that number.

    Raises:
        ValueError: a run cannot use the device, or this machine has none of that name, or too few.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if rank is not None and name in ("auto", "cuda") and count:
        if rank >= count:
            raise ValueError(f"torchrun: expected at most {count} processes on this machine, one for each CUDA device")
        return torch.device("cuda", rank)
    if rank is not None and name.startswith("cuda:"):
        raise ValueError(f"{option}: expected auto, cuda or cpu, of which each process takes its own, got {name!r}")
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    there = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if name not in there:
        found = "" if count else "; torch finds no CUDA device"
        raise ValueError(f"{option}: expected auto or one of {', '.join(there)}, got {name!r}{found}")
    return torch.device(name)


def check_implementation(device: torch.device, precision: str) -> None:
    """Refuse an implementation of the operators, forced on the whole run, that cannot run there.

    Raises:
        ValueError: it cannot.
    """
    try:
        choose("training", torch.empty(0, device=device), DTYPES[precision])
    except RuntimeError as error:
        raise ValueError(f"environment variable CRATE_KERNELS_IMPL: {error}") from error


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where torch.compile cannot.

    Raises:
        ValueError: this machine lacks something it needs.
    """
    if obstacle := obstacle_to_compiling(device):
        raise ValueError(f"--run.compile: {obstacle}")


def choose_precision(name: str, device: torch.device) -> str:
    """ "auto" made definite: bfloat16 where the hardware multiplies it, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.bfloat16 in CPU_PRODUCT_DTYPES
    return "bfloat16" if native else "float32"


def check_threads(count: int) -> None:
    """Refuse more threads than CPUs: they only wait for each other, and the library under torch dies of many.

    Raises:
        ValueError: there are fewer CPUs than `count`, or it is below 0.
    """
    cpus = os.cpu_count() or 1
    if not 0 <= count <= cpus:
        raise ValueError(f"--run.threads: expected 0 to {cpus}, the CPUs of this machine, got {count}")


def check_workers(count: int | str) -> None:
    """Refuse more loader processes than a machine could feed: each takes memory, and their start minutes.

    Raises:
        ValueError: there are more than 8 for each CPU.
    """
    most = 8 * (os.cpu_count() or 1)
    if count != "auto" and int(count) > most:
        raise ValueError(f"--images.num_workers: expected 0 to {most}, 8 for each CPU of this machine, got {count}")


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute on `count` CPU threads inside the block; 0 changes nothing."""
    check_threads(count)
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    return nullcontext() if precision == "float32" else torch.autocast(device.type, dtype=DTYPES[precision])
