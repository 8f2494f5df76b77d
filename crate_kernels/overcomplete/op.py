"""PyTorch operators of the overcomplete step on the Triton path: schemas, shapes, FLOP counts. Imports torch only.

The backward needs x and the two codes z1 and z2 [tokens, codes] in ``dtype``. The composed path has no operator of its own: it
is the library's products under autograd.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crate_kernels import dispatch
from crate_kernels.precision import undisturbed
from crate_kernels.schemas import empty_gradient, or_empty


class OvercompleteArguments(NamedTuple):
    """What both operators take, in the order of their schemas."""

    dictionary: Tensor
    out_dictionary: Tensor | None
    step_size: Tensor
    lambd: Tensor
    dtype: torch.dtype

    def load(self) -> tuple[ModuleType, Any]:
        """The kernels' module, and its ``Step``."""
        kernels = dispatch.load("overcomplete", "triton")
        return kernels, kernels.Step(*self[:4])


_ARGUMENTS = "Tensor dictionary, Tensor? out_dictionary, Tensor step_size, Tensor lambd, ScalarType dtype"
torch.library.define(
    "crate_kernels::overcomplete_forward",
    f"(Tensor x, Tensor? skip, ScalarType out_dtype, {_ARGUMENTS}) -> (Tensor out, Tensor z1, Tensor z2)",
)
# needs: of x, the dictionary, the out_dictionary, and the two numbers.
torch.library.define(
    "crate_kernels::overcomplete_backward",
    f"(Tensor grad, Tensor x, Tensor z1, Tensor z2, bool[] needs, {_ARGUMENTS}) -> (Tensor grad_x, "
    "Tensor grad_dictionary, Tensor grad_out_dictionary, Tensor grad_step_size, Tensor grad_lambd)",
)


@torch.library.impl("crate_kernels::overcomplete_forward", "CompositeExplicitAutograd")
@undisturbed
def _forward(x: Tensor, skip: Tensor | None, out_dtype: torch.dtype, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = OvercompleteArguments(*arguments)
    kernels, weights = given.load()
    return kernels.forward(x, weights, skip, given.dtype, out_dtype)


@torch.library.impl("crate_kernels::overcomplete_backward", "CompositeExplicitAutograd")
@undisturbed
def _backward(
    grad: Tensor, x: Tensor, z1: Tensor, z2: Tensor, needs: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    given = OvercompleteArguments(*arguments)
    kernels, weights = given.load()
    found = kernels.backward(grad, x, z1, z2, weights, kernels.Needs(*needs))
    return tuple(map(or_empty, found, (x, *given[:4])))


@torch.library.register_fake("crate_kernels::overcomplete_forward")
def _forward_fake(
    x: Tensor, skip: Tensor | None, out_dtype: torch.dtype, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    given = OvercompleteArguments(*arguments)
    z1, z2 = (x.new_empty(x.shape[0], given.dictionary.shape[1], dtype=given.dtype) for _ in range(2))
    return x.new_empty(x.shape, dtype=out_dtype), z1, z2


@torch.library.register_fake("crate_kernels::overcomplete_backward")
def _backward_fake(
    grad: Tensor, x: Tensor, z1: Tensor, z2: Tensor, needs: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    *needs_of_matrices, numbers = needs
    return tuple(map(empty_gradient, (x, *arguments[:4]), (*needs_of_matrices, numbers, numbers)))


@register_flop_formula(torch.ops.crate_kernels.overcomplete_forward)
def _forward_flops(
    x_shape: tuple[int, ...], skip: Any, out_dtype: Any, dictionary_shape: tuple[int, ...], *_: Any, **__: Any
) -> int:
    return 4 * _product_flops(x_shape, dictionary_shape)


@register_flop_formula(torch.ops.crate_kernels.overcomplete_backward)
def _backward_flops(
    grad: Any,
    x_shape: tuple[int, ...],
    z1: Any,
    z2: Any,
    needs: list[bool],
    dictionary_shape: tuple[int, ...],
    out_dictionary_shape: tuple[int, ...] | None,
    *_: Any,
    **__: Any,
) -> int:
    need_x, need_dictionary, need_out_dictionary, need_numbers = needs
    down_to_codes = 3 * (need_x or need_dictionary or need_numbers)
    # The residual again, and three products; that of D1 comes with them where it is D.
    of_dictionaries = 4 * need_dictionary + (need_dictionary if out_dictionary_shape is None else need_out_dictionary)
    return (down_to_codes + need_x + of_dictionaries) * _product_flops(x_shape, dictionary_shape)


def _product_flops(x_shape: tuple[int, ...], dictionary_shape: tuple[int, ...]) -> int:
    """Every product here is of tokens, width and codes."""
    width, codes = dictionary_shape
    return 2 * x_shape[0] * width * codes
