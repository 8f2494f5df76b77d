"""What this CPU can do: its instructions, and the dtype that they multiply 16-bit operands in fastest."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

# The values of oneDNN's variable ONEDNN_MAX_CPU_ISA, each allowing more than the one before, and Linux's name for what it adds.
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
    """Instructions that oneDNN was told not to use. It then emulates products in 16 bits, as on a CPU without them."""
    most, names = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), list(_INSTRUCTIONS)
    return {_INSTRUCTIONS[name] for name in names[names.index(most) + 1 :]} if most in names else set()


class _CPU(NamedTuple):
    """An x86 CPU's vendor and instructions by /proc/cpuinfo, without those that oneDNN may not use; empty on other systems."""

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
_INSTRUCTIONS_OF_DTYPE = {torch.bfloat16: {"amx_bf16", "avx512_bf16"}, torch.float16: {"amx_fp16", "avx512_fp16"}}
CPU_PRODUCT_DTYPES = tuple(dtype for dtype, names in _INSTRUCTIONS_OF_DTYPE.items() if CPU.flags & names)


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which PyTorch's own calls multiply operands like ``x`` fastest.

    That is ``x.dtype``, except for 16-bit operands on a CPU without 16-bit matrix instructions. PyTorch emulates them there,
    and float32 is 3 times (bfloat16) to 100 times (float16) faster, and no less accurate.
    """
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and x.dtype not in CPU_PRODUCT_DTYPES:
        return torch.float32
    return x.dtype
