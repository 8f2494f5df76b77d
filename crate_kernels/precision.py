"""Which dtype an operator's products take their operands in, and which one they are computed in."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# What oneDNN's variable ONEDNN_MAX_CPU_ISA may say, in its order, and the instructions that come with it, as Linux names them.
_INSTRUCTIONS = {
    "SSE41": "",
    "AVX": "",
    "AVX2": "",
    "AVX2_VNNI": "",
    "AVX2_VNNI_2": "",
    "AVX512_CORE": "avx512f",
    "AVX512_CORE_VNNI": "",
    "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_FP16": "avx512_fp16",
    "AVX512_CORE_AMX": "amx_bf16",
    "AVX512_CORE_AMX_FP16": "amx_fp16",
}


def _withheld() -> set[str]:
    """Instructions that oneDNN was told not to use: products in 16 bits are emulated then, as on a CPU without them."""
    most, names = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), list(_INSTRUCTIONS)
    return {_INSTRUCTIONS[name] for name in names[names.index(most) + 1 :]} if most in names else set()


class _CPU(NamedTuple):
    """What /proc/cpuinfo says of an x86 CPU, less what oneDNN may not use; elsewhere nothing is known, and nothing claimed."""

    vendor: str
    flags: frozenset[str]

    @classmethod
    def this(cls, said_in: str = "/proc/cpuinfo") -> _CPU:
        said: dict[str, str] = {}
        with suppress(OSError), open(said_in, errors="replace") as cpuinfo:
            # Up to an empty line: the other processors, hundreds on a server, say the same.
            for name, _, value in (line.partition(":") for line in takewhile(str.strip, cpuinfo)):
                said[name.strip()] = value.strip()
        return cls(said.get("vendor_id", ""), frozenset(said.get("flags", "").split()) - _withheld())


CPU = _CPU.this()
# 16-bit dtypes this CPU has matrix instructions for.
_OF_DTYPES = {torch.bfloat16: {"amx_bf16", "avx512_bf16"}, torch.float16: {"amx_fp16", "avx512_fp16"}}
CPU_PRODUCT_DTYPES = tuple(dtype for dtype, names in _OF_DTYPES.items() if CPU.flags & names)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the operands of an operator on ``x``: the autocast dtype where autocast is on, else x's own.

    As in PyTorch's own rules, float64 is left alone by autocast.
    """
    if x.dtype != torch.float64 and is_autocast(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def is_autocast(x: Tensor) -> bool:
    """Autocast is on for the device of ``x``; it never is on devices that have none, such as meta."""
    device = x.device.type
    # Not torch.amp.is_autocast_available, which torch.compile cannot trace in torch 2.11.
    return device != "meta" and torch.is_autocast_enabled(device)


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A block in which autocast is off for the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, before: torch.dtype | None = None
) -> Tensor:
    """LayerNorm over the last dimension, in float32 under autocast on every device; x itself where weight is None.

    ``before`` names the dtype that the result will be rounded to next, by a product. Where x has it too, a CPU reads and writes
    16 bits, as PyTorch's own autocast has it there: a third of the memory traffic.
    """
    if weight is None:
        return x
    dtype = layer_norm_dtype(x, before)
    with no_autocast(x):
        operands = norm_operands(x, weight, bias, dtype)
        return F.layer_norm(operands[0], x.shape[-1:], *operands[1:], eps)


def layer_norm_dtype(x: Tensor, before: torch.dtype | None = None) -> torch.dtype:
    """The dtype that ``layer_norm`` computes x in, and returns."""
    if not is_autocast(x) or (before == x.dtype and x.device.type == "cpu"):
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def norm_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What PyTorch's LayerNorm takes for a result in ``dtype``: x in it, and weight and bias too or in at least float32."""
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        wide = torch.promote_types(dtype, torch.float32)
        weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    return x.to(dtype), weight, bias


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products of operands like ``x`` are best computed in by PyTorch's own calls.

    ``x.dtype``, except for 16-bit operands on a CPU without 16-bit matrix instructions, where PyTorch emulates them:
    there float32 is 3 times (bfloat16) to 100 times (float16) faster, and no less accurate.
    """
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and x.dtype not in CPU_PRODUCT_DTYPES:
        return torch.float32
    return x.dtype


def dot_precision(x: Tensor) -> str:
    """Triton's ``input_precision`` for products of operands like ``x``: "ieee" for exact float32, else "tf32".

    Float32 follows PyTorch's own setting; 16-bit operands are not affected.
    """
    if x.dtype != torch.float32:
        return "tf32"
    try:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # set through the newer attribute, which the older function refuses to read
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
