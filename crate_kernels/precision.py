"""Which dtype an operator's products take their operands in, and which one they are computed in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _dtypes_the_cpu_multiplies() -> tuple[torch.dtype, ...]:
    """16-bit dtypes this CPU has matrix instructions for. Known of x86 on Linux; elsewhere nothing is claimed."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            flags = next((set(line.split()) for line in cpuinfo if line.startswith("flags")), set())
    except OSError:
        return ()
    instructions = {torch.bfloat16: {"amx_bf16", "avx512_bf16"}, torch.float16: {"amx_fp16", "avx512_fp16"}}
    return tuple(dtype for dtype, names in instructions.items() if flags & names)


CPU_PRODUCT_DTYPES = _dtypes_the_cpu_multiplies()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the operands of an operator on ``x``: the autocast dtype where autocast is on, else x's own.

    As in PyTorch's own rules, float64 is left alone by autocast.
    """
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products of operands like ``x`` are best computed in by PyTorch's own calls.

    ``x.dtype``, except for 16-bit operands on a CPU without 16-bit matrix instructions, where PyTorch emulates them:
    there float32 is 3 times (bfloat16) to 100 times (float16) faster, and no less accurate.
    """
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and x.dtype not in CPU_PRODUCT_DTYPES:
        return torch.float32
    return x.dtype


def undisturbed(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``function`` with its first tensor's device current, and autocast off: operands come in the dtype to multiply in.

    Needed in backwards too: ``loss.backward()`` may be called inside an autocast block.
    """

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch.autocast(args[0].device.type, enabled=False), torch.cuda.device_of(args[0]):
            return function(*args, **kwargs)

    return run


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` in x's dtype, with the weights cast to it, computed where it is fastest."""
    dtype = arithmetic_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    return F.linear(x.to(dtype), weight.to(dtype), bias).to(x.dtype)
