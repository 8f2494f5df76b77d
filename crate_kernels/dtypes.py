"""The dtype of an operator's operands, autocast, and the precision of float32 products in Triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


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
