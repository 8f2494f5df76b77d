"""Input checks shared by the operators: every message names the argument, what came and what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter


def describe(value: object) -> str:
    """A tensor's shape, dtype and device in words; the type of anything else."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__}"
    return f"shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')} on {value.device}"


def tensor(name: str, value: object, dims: str) -> None:
    """``value`` is a floating-point tensor with one dimension for each name in ``dims`` ("batch tokens width").

    A leading "..." stands for any number of dimensions, none included.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor [{', '.join(dims.split())}], got {describe(value)}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {describe(value)}")
    names = dims.split()
    least = len(names) - (names[0] == "...")
    if value.ndim and value.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one element in its last dimension, got {describe(value)}")
    if value.ndim < least or (names[0] != "..." and value.ndim > least):
        raise ValueError(f"{name}: expected [{', '.join(names)}], got {describe(value)}")


def shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """``value`` has exactly the ``expected`` shape; ``meaning`` says in words what that shape is."""
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: expected {meaning} {expected}, got {describe(value)}")


def same_device_and_dtype(mixed_dtypes: bool, **tensors: Tensor | None) -> None:
    """All tensors live on one device and bear one dtype, unless ``mixed_dtypes`` are fine (autocast will cast them)."""
    present = {name: value for name, value in tensors.items() if value is not None}
    first_name, first = next(iter(present.items()))
    for name, value in present.items():
        if value.device != first.device:
            raise ValueError(f"{name}: expected it on {first.device} like {first_name}, got {describe(value)}")
        if value.dtype != first.dtype and not mixed_dtypes:
            raise TypeError(
                f"{name}: expected {first.dtype} like {first_name}, got {describe(value)} (mixed dtypes need torch.autocast)"
            )


def number(name: str, value: float, *, positive: bool = False) -> None:
    """``value`` is a finite number, not negative (or, if asked for, above zero)."""
    if isinstance(value, Tensor) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not 0 <= value < math.inf or (positive and value == 0):
        raise ValueError(f"{name}: expected a finite number {'above' if positive else 'of at least'} zero, got {value}")


def number_or_tensor(name: str, value: float | Tensor, *, positive: bool = False) -> None:
    """``value`` is such a number, or a floating-point tensor of one element, whose value is looked at on the CPU only."""
    if not isinstance(value, Tensor):
        return number(name, value, positive=positive)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(f"{name}: expected a number or a floating-point tensor of one element, got {describe(value)}")
    if type(value) in (Tensor, Parameter) and value.device.type == "cpu" and not torch.compiler.is_compiling():
        number(name, float(value.detach()), positive=positive)
    return None


def layer_norm(width: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """The parameters of an optional LayerNorm over ``width`` features."""
    if weight is None:
        if bias is not None:
            raise ValueError("norm_bias: given without norm_weight; pass both, or neither for no LayerNorm")
        return
    tensor("norm_weight", weight, "width")
    shape("norm_weight", weight, (width,), "[width]")
    if bias is not None:
        tensor("norm_bias", bias, "width")
        shape("norm_bias", bias, (width,), "[width]")
    number("norm_eps", eps)
