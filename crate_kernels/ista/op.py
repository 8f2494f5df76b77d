"""PyTorch operators of ISTA: schemas, shapes, FLOP counts. Imports torch only.

``implementation`` is an argument, so that a traced graph says which one runs and the backward takes the forward's. ``kept`` is
what the backward needs besides x and y. From ``composed``: the matrix that the tokens, or their residual, were multiplied with,
and without a LayerNorm, x in ``dtype`` where that is not its own (the backward takes it for x); with one, its backward computes
it again. From ``triton``, in the one-product form with a LayerNorm: mean and rstd of each token; G and the operand of eta * G
came as arguments. In the two-product form nothing.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crate_kernels import dispatch
from crate_kernels.ista.form import one_product
from crate_kernels.precision import undisturbed
from crate_kernels.products.operand import Norm, Operand
from crate_kernels.schemas import empty_gradient, or_empty


class ISTAArguments(NamedTuple):
    """What both operators take, in the order of their schemas."""

    dictionary: Tensor
    combined: Tensor | None  # G = W - W^T W, where it was made before
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    matrix: Tensor | None  # the operand of eta * G, for the kernels
    column_sum: Tensor | None
    offset: Tensor | None
    norm_eps: float
    step_size: Tensor
    lambd: Tensor
    soft: bool
    dtype: torch.dtype
    implementation: str

    @property
    def norm(self) -> Norm | None:
        return None if self.norm_weight is None else Norm(self.norm_weight, self.norm_bias, self.norm_eps)

    def one_product(self, tokens: int) -> bool:
        return self.combined is not None or one_product(tokens, self.dictionary.shape[0])

    def settings(self, path: ModuleType) -> tuple[Norm | None, Any]:
        """The LayerNorm, and the kernels' ``Step``."""
        return self.norm, path.Step(self.step_size, self.lambd, self.soft)


_ARGUMENTS = (
    "Tensor dictionary, Tensor? combined, Tensor? norm_weight, Tensor? norm_bias, Tensor? matrix, Tensor? column_sum, "
    "Tensor? offset, float norm_eps, Tensor step_size, Tensor lambd, bool soft, ScalarType dtype, str implementation"
)
torch.library.define(
    "crate_kernels::ista_forward", f"(Tensor x, ScalarType out_dtype, {_ARGUMENTS}) -> (Tensor y, Tensor[] kept)"
)
torch.library.define(
    "crate_kernels::ista_backward",
    f"(Tensor grad_y, Tensor x, Tensor y, Tensor[] kept, bool need_x, bool need_weight, {_ARGUMENTS}) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor grad_norm_weight, Tensor grad_norm_bias)",
)


@torch.library.impl("crate_kernels::ista_forward", "CompositeExplicitAutograd")
@undisturbed
def _forward(x: Tensor, out_dtype: torch.dtype, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    given = ISTAArguments(*arguments)
    y, kept = _forward_of_rows(_rows(x), out_dtype, given)
    if given.implementation == "composed":
        kept[1:] = (operand.view(x.shape) for operand in kept[1:])
    # Not a view, which autograd would not let a caller change in place.
    return torch.ops.aten._unsafe_view(y, x.shape), kept


def _forward_of_rows(x: Tensor, out_dtype: torch.dtype, given: ISTAArguments) -> tuple[Tensor, list[Tensor]]:
    path = dispatch.load("ista", given.implementation)
    if given.implementation == "composed":
        numbers = float(given.step_size), float(given.lambd), given.soft
        return path.forward(x, given.norm, out_dtype, given.dictionary, given.combined, *numbers, given.dtype)
    norm, step = given.settings(path)
    if not given.one_product(x.shape[0]):
        return path.forward_two_products(x, given.dictionary, step, given.dtype, out_dtype), []
    operand = Operand(given.matrix, given.column_sum, given.offset)
    y, stats = path.forward(x, operand, norm, step, out_dtype)
    return y, [] if stats is None else [stats]


@torch.library.impl("crate_kernels::ista_backward", "CompositeExplicitAutograd")
@undisturbed
def _backward(
    grad_y: Tensor, x: Tensor, y: Tensor, kept: list[Tensor], need_x: bool, need_weight: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    given, shape = ISTAArguments(*arguments), y.shape
    grad_y, x, y = map(_rows, (grad_y, x, y))
    path = dispatch.load("ista", given.implementation)
    grads_of_norm = [None, None]
    needs = need_x, need_weight
    if given.implementation == "composed":
        matrix, step_size = kept[0], float(given.step_size)
        grad_x, grad_weight, *grads_of_norm = path.backward(
            grad_y, x, given.norm, given.dictionary, given.combined, y, matrix, step_size, *needs
        )
    elif given.one_product(x.shape[0]):
        operand, stats = Operand(given.matrix, given.column_sum, given.offset), kept[0] if kept else None
        grad_x, grad_weight, *grads_of_norm = path.backward(
            grad_y, x, y, given.dictionary, given.combined, operand, stats, *given.settings(path), *needs
        )
    else:
        step = given.settings(path)[1]
        grad_x, grad_weight = path.backward_two_products(grad_y, x, y, given.dictionary, step, given.dtype, *needs)
    likes = _tokens(x, y, given), given.dictionary, given.norm_weight, given.norm_bias
    grad_x, *grads = map(or_empty, (grad_x, grad_weight, *grads_of_norm), likes)
    return grad_x.view(shape) if need_x else grad_x, *grads


def _rows(x: Tensor) -> Tensor:
    """Tokens [..., width] as [tokens, width]. Here and not around the operator: autograd adds no gradient to a view in place."""
    return x.reshape(-1, x.shape[-1])


def _tokens(x: Tensor, y: Tensor, given: ISTAArguments) -> Tensor:
    """The tokens as the forward took them, or what has their dtype: what ``composed`` keeps without a LayerNorm may be a cast."""
    return y if given.implementation == "composed" and given.norm is None else x


@torch.library.register_fake("crate_kernels::ista_forward")
def _forward_fake(x: Tensor, out_dtype: torch.dtype, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    given = ISTAArguments(*arguments)
    if given.implementation == "composed":
        matrix = given.dictionary.new_empty(given.dictionary.shape, dtype=given.dtype)
        as_it_came = given.norm is not None or x.dtype == given.dtype
        kept = [matrix] if as_it_came else [matrix, x.new_empty(x.shape, dtype=given.dtype)]
        return x.new_empty(x.shape, dtype=out_dtype), kept
    tokens = x.numel() // x.shape[-1]  # torch.Size.numel would tie a compiled graph to one batch
    keeps = given.norm is not None and given.one_product(tokens)
    kept = [x.new_empty((2, tokens), dtype=torch.float32)] if keeps else []
    return x.new_empty(x.shape, dtype=out_dtype), kept


@torch.library.register_fake("crate_kernels::ista_backward")
def _backward_fake(
    grad_y: Tensor, x: Tensor, y: Tensor, kept: list[Tensor], need_x: bool, need_weight: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    given = ISTAArguments(*arguments)
    return (
        empty_gradient(_tokens(x, y, given), need_x),
        empty_gradient(given.dictionary, need_weight),
        empty_gradient(given.norm_weight, need_weight),
        empty_gradient(given.norm_bias, need_weight),
    )


@register_flop_formula(torch.ops.crate_kernels.ista_forward)
def _forward_flops(x_shape: tuple[int, ...], out_dtype: Any, *arguments: Any, **_: Any) -> int:
    tokens, width = math.prod(x_shape[:-1]), x_shape[-1]
    large, small = 2 * tokens * width**2, 2 * width**3
    if ISTAArguments(*arguments).combined is not None:
        return large
    return large + small if one_product(tokens, width) else 2 * large


@register_flop_formula(torch.ops.crate_kernels.ista_backward)
def _backward_flops(
    grad_shape: tuple[int, ...], x: Any, y: Any, kept: Any, need_x: bool, need_weight: bool, *arguments: Any, **_: Any
) -> int:
    tokens, width = math.prod(grad_shape[:-1]), grad_shape[-1]
    large, small = 2 * tokens * width**2, 2 * width**3
    if ISTAArguments(*arguments).combined is not None or one_product(tokens, width):
        return large * need_x + (large + small) * need_weight
    # dr serves both; the weight's gradient computes the residual again and multiplies twice.
    return large * (need_x or need_weight) + large * need_x + 3 * large * need_weight
