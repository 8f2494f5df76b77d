"""Input checks shared by the operators: every message names the argument, what came and what was expected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from crate_kernels.dtypes import is_autocast
from crate_kernels.private_torch import is_transformed


def describe(value: object) -> str:
    """A tensor's shape, dtype and device in words; the type of anything else."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__}"
    return f"shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')} on {value.device}"


def tensors(
    *,
    norm: tuple[Tensor | None, Tensor | None, float] = (None, None, 0.0),
    any_dtype: str = "",
    **given: tuple[Tensor | None, str],
) -> None:
    """Checks that tensors fit together: each comes with the names of its dimensions, and one name is one size in all of them.

    All must be on the device of the first and have its dtype, unless autocast is on and will cast them; the tensor called
    ``any_dtype`` may have any. Optional tensors may be None, all but the first.
    ``norm``: weight and bias [width] of an optional LayerNorm, and its epsilon.
    """
    weight, bias, eps = norm
    if weight is not None:
        number("norm_eps", eps)
    elif bias is not None:
        raise ValueError("norm_bias: given without norm_weight; pass both, or neither for no LayerNorm")
    given.update(norm_weight=(weight, "width"), norm_bias=(bias, "width"))
    layout = None if torch.compiler.is_compiling() else _layout(any_dtype, given)
    if layout in _fitting:
        return
    sizes: dict[str, Any] = {}
    (first_name, (value, dims)), *others = given.items()
    first = tensor(first_name, value, dims, sizes)
    dtype, device, mixed = first.dtype, first.device, is_autocast(first)
    for name, (value, dims) in others:
        if value is None:
            continue
        tensor(name, value, dims, sizes)
        if value.device != device:
            raise ValueError(f"{name}: expected it on {device} like {first_name}, got {describe(value)}")
        if not mixed and value.dtype != dtype and name != any_dtype:
            raise TypeError(
                f"{name}: expected {dtype} like {first_name}, got {describe(value)} (mixed dtypes need torch.autocast)"
            )
    if layout is not None and len(_fitting) < _MOST_LAYOUTS:
        _fitting.add(layout)


# What ``tensors`` found to fit: the same arguments come at every step, and to compare them takes longer than to look them up.
_fitting: set[tuple] = set()
_MOST_LAYOUTS = 4096


def _layout(any_dtype: str, given: dict[str, tuple[Tensor | None, str]]) -> tuple | None:
    """All that ``tensors`` looks at; None for what is no plain tensor, whose sizes may be symbols."""
    layout: list[Any] = [any_dtype]
    for name, (value, dims) in given.items():
        if value is None:
            layout.append(name)
        elif type(value) in (Tensor, Parameter):
            layout.append((name, dims, value.shape, value.dtype, value.device))
        else:
            return None
    (first, _), *_ = given.values()
    return None if first is None else (is_autocast(first), *layout)


def tensor(name: str, value: object, dims: str, sizes: dict[str, Any] | None = None) -> Tensor:
    """Returns ``value`` if it is a floating-point tensor with one dimension for each name in ``dims`` ("batch tokens width").

    A leading "..." stands for any number of dimensions, none included. ``sizes`` holds the sizes that are known, by name:
    ``value`` must have them, and sizes that it is the first to show are added.
    """
    names = dims.split()
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor [{', '.join(names)}], got {describe(value)}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {describe(value)}")
    found: tuple[Any, ...] = value.shape
    if found and found[-1] == 0:
        raise ValueError(f"{name}: expected at least one element in its last dimension, got {describe(value)}")
    if names[0] == "...":
        leading = len(found) - len(names) + 1
        found = (found[:leading], *found[leading:])
    if len(found) != len(names):
        raise ValueError(f"{name}: expected [{', '.join(names)}], got {describe(value)}")
    sizes = {} if sizes is None else sizes
    for dim, size in zip(names, found, strict=True):
        if sizes.setdefault(dim, size) != size:
            known = [sizes.get(*pair) for pair in zip(names, found, strict=True)]
            expected = (*known[0], *known[1:]) if names[0] == "..." else tuple(known)
            raise ValueError(f"{name}: expected [{', '.join(names)}] {expected}, got {describe(value)}")
    return value


def number(name: str, value: float, *, positive: bool = False) -> None:
    """Checks that ``value`` is a finite number of at least zero, or above zero if it must be ``positive``."""
    if isinstance(value, Tensor) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not 0 <= value < math.inf or (positive and value == 0):
        raise ValueError(f"{name}: expected a finite number {'above' if positive else 'of at least'} zero, got {value}")


def number_or_tensor(name: str, value: float | Tensor, *, positive: bool = False) -> None:
    """As ``number``, but ``value`` may be a floating-point tensor of one element; its value is checked on the CPU only."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name}: expected a number or a floating-point tensor of one element, got {describe(value)}"
            )
        if type(value) not in (Tensor, Parameter) or not shows_values(value):
            return
        value = float(value.detach())
    number(name, value, positive=positive)


def shows_values(value: Tensor) -> bool:
    """Whether the values of a tensor may be read: on a GPU that would wait for the device, and a traced tensor has none."""
    has_values = value.device.type == "cpu" and not isinstance(value, FakeTensor)
    return has_values and not torch.compiler.is_compiling() and not is_transformed()
