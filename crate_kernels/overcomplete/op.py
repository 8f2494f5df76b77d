"""PyTorch operators of the overcomplete step on the Triton path: schemas, shapes, FLOP counts. Imports no Triton.

The backward needs x and the two codes z1 and z2 [tokens, codes] in ``dtype``. The composed path has no operator of its own:
autograd differentiates its products.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from crate_kernels import dispatch
from crate_kernels.definitions import empty_gradients, or_empty, register


class OvercompleteArguments(NamedTuple):
    """What both operators take last, in the order of their schemas."""

    dictionary: Tensor
    out_dictionary: Tensor | None
    step_size: Tensor
    lambd: Tensor
    dtype: torch.dtype

    def load(self) -> tuple[ModuleType, Any]:
        """The kernels' module, and its ``Step``."""
        kernels = dispatch.load("overcomplete", "triton")
        return kernels, kernels.Step(*self[:4])


def _forward(
    x: Tensor, skip: Tensor | None, out_dtype: torch.dtype, given: OvercompleteArguments
) -> tuple[Tensor, Tensor, Tensor]:
    kernels, weights = given.load()
    return kernels.forward(x, weights, skip, given.dtype, out_dtype)


def _backward(
    grad: Tensor, x: Tensor, z1: Tensor, z2: Tensor, needs: list[bool], given: OvercompleteArguments
) -> list[Tensor]:
    """``needs``: whether gradients are asked for of x, of the dictionary, of the out_dictionary, and of the two numbers."""
    kernels, weights = given.load()
    return or_empty(kernels.backward(grad, x, z1, z2, weights, kernels.Needs(*needs)), (x, *given[:4]))


def _forward_fake(
    x: Tensor, skip: Tensor | None, out_dtype: torch.dtype, given: OvercompleteArguments
) -> tuple[Tensor, Tensor, Tensor]:
    z1, z2 = (x.new_empty(x.shape[0], given.dictionary.shape[1], dtype=given.dtype) for _ in range(2))
    return x.new_empty(x.shape, dtype=out_dtype), z1, z2


class _Shapes(Protocol):
    """What FLOP formulas read of ``OvercompleteArguments``, whose tensors come to them as shapes."""

    dictionary: tuple[int, int]
    out_dictionary: tuple[int, int] | None


def _product(x_shape: tuple[int, ...], given: _Shapes) -> int:
    """FLOPs of one product; all of them are of tokens, width and codes."""
    width, codes = given.dictionary
    return 2 * x_shape[0] * width * codes


def _backward_flops(grad: Any, x_shape: tuple[int, ...], z1: Any, z2: Any, needs: list[bool], given: _Shapes) -> int:
    need_x, need_dictionary, need_out_dictionary, need_numbers = needs
    down_to_codes = 3 * (need_x or need_dictionary or need_numbers)
    # dD takes the residual again and three products; dD1 takes one, which a coupled dD includes.
    for_dictionaries = 4 * need_dictionary + (need_dictionary if given.out_dictionary is None else need_out_dictionary)
    return (down_to_codes + need_x + for_dictionaries) * _product(x_shape, given)


register(
    "overcomplete_forward",
    _forward,
    fake=_forward_fake,
    flops=lambda x, skip, out_dtype, given: 4 * _product(x, given),
    replayed=True,
)
register(
    "overcomplete_backward",
    _backward,
    fake=lambda grad, x, z1, z2, needs, given: empty_gradients((x, *given[:4]), (*needs, needs[3])),
    flops=_backward_flops,
    replayed=True,
)
