"""The dtype of an operator's operands, autocast, and the precision of float32 products in Triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that an operator on ``x`` multiplies in: the autocast dtype where autocast is on, else that of x.

    Autocast leaves float64 alone, as in PyTorch's own rules.
    """
    if x.dtype != torch.float64 and is_autocast(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; never on the meta device, which has no autocast."""
    device = x.device.type
    # Not torch.amp.is_autocast_available, which torch.compile cannot trace in torch 2.11.
    return device != "meta" and torch.is_autocast_enabled(device)


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A block in which autocast is off for the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


def dot_precision(x: Tensor) -> str:
    """Triton's ``input_precision`` for products of operands like ``x``: "ieee" (exact float32) or "tf32".

    For float32 operands PyTorch's own setting decides. 16-bit operands are multiplied exactly whatever is returned.
    """
    return "tf32" if x.dtype != torch.float32 else float32_precision()


def float32_precision() -> str:
    """``dot_precision`` of float32 operands."""
    try:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # set through the newer attribute, which the older function refuses to read
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
