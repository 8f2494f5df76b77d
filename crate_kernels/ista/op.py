"""PyTorch operators of ISTA: schemas, shapes, FLOP counts. Imports no Triton.

``implementation`` is an argument, so that a traced graph says which one runs, and the backward takes the same as the forward.

``kept`` is what the backward needs besides x and y:

    composed    [matrix], what the tokens or their residual were multiplied with. Without a LayerNorm, and if x is not in
                ``dtype``, [matrix, x in dtype], and the backward takes the second for its x.
    triton      [moments], those of each token, in the one-product form with a LayerNorm; else nothing. G and the operand of
                eta * G are arguments.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crate_kernels import dispatch
from crate_kernels.definitions import empty_gradients, or_empty, register
from crate_kernels.ista.form import one_product
from crate_kernels.private_torch import unsafe_view
from crate_kernels.products.norm_folding import Norm, Operand, as_norm


class ISTAArguments(NamedTuple):
    """What both operators take last, in the order of their schemas."""

    dictionary: Tensor
    combined: Tensor | None  # G = W - W^T W, if it was made before
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
        return as_norm(self.norm_weight, self.norm_bias, self.norm_eps)

    @property
    def operand(self) -> Operand | None:
        return None if self.matrix is None else Operand(self.matrix, self.column_sum, self.offset)

    def one_product(self, tokens: int) -> bool:
        return self.combined is not None or one_product(tokens, self.dictionary.shape[0])

    def step(self, path: ModuleType) -> Any:
        """The kernels' ``Step``."""
        return path.Step(self.step_size, self.lambd, self.soft)


def forward(x: Tensor, out_dtype: torch.dtype, given: ISTAArguments) -> tuple[Tensor, list[Tensor]]:
    return forward_in_layer(x, out_dtype, given)


def forward_in_layer(
    x: Tensor, out_dtype: torch.dtype, given: ISTAArguments, parts: Any = None
) -> tuple[Tensor, list[Tensor]]:
    """``forward`` from the moments of x in parts (``products.launchers``), if they are known."""
    path, shape, x = dispatch.load("ista", given.implementation), x.shape, _rows(x)
    kept: list[Tensor] = []
    if given.implementation == "composed":
        numbers = float(given.step_size), float(given.lambd), given.soft
        y, kept = path.forward(x, given.norm, out_dtype, given.dictionary, given.combined, *numbers, given.dtype)
        kept[1:] = (operand.view(shape) for operand in kept[1:])
    elif given.one_product(x.shape[0]):
        y, moments = path.forward(x, given.operand, given.norm, given.step(path), out_dtype, parts)
        kept = [] if moments is None else [moments]
    else:
        y = path.forward_two_products(x, given.dictionary, given.step(path), given.dtype, out_dtype)
    # Autograd must not take it for a view, or callers could not change it in place.
    return unsafe_view(y, shape), kept


def backward(
    grad_y: Tensor, x: Tensor, y: Tensor, kept: list[Tensor], need_x: bool, need_weights: bool, given: ISTAArguments
) -> list[Tensor]:
    path, shape = dispatch.load("ista", given.implementation), y.shape
    grad_y, x, y = map(_rows, (grad_y, x, y))
    dictionary, combined, norm, needs = given.dictionary, given.combined, given.norm, (need_x, need_weights)
    grads: tuple[Tensor | None, ...]
    if given.implementation == "composed":
        grads = path.backward(grad_y, x, norm, dictionary, combined, y, kept[0], float(given.step_size), *needs)
    elif given.one_product(x.shape[0]):
        moments = kept[0] if kept else None
        grads = path.backward(
            grad_y, x, y, dictionary, combined, given.operand, moments, norm, given.step(path), *needs
        )
    else:
        pair = path.backward_two_products(grad_y, x, y, dictionary, given.step(path), given.dtype, *needs)
        grads = *pair, None, None
    grads = None if grads[0] is None else grads[0].view(shape), *grads[1:]
    return or_empty(grads, _likes(x, y, given))


def _rows(x: Tensor) -> Tensor:
    """Tokens [..., width] as [tokens, width]. Inside the operator, as autograd adds gradients in place only where there is no
    view."""
    return x.reshape(-1, x.shape[-1])


def _likes(x: Tensor, y: Tensor, given: ISTAArguments) -> tuple[Tensor | None, ...]:
    """What each gradient is like: x's is like y if ``composed`` may have kept a cast of x, which it does without a LayerNorm."""
    tokens = y if given.implementation == "composed" and given.norm is None else x
    return tokens, given.dictionary, given.norm_weight, given.norm_bias


def forward_fake(x: Tensor, out_dtype: torch.dtype, given: ISTAArguments) -> tuple[Tensor, list[Tensor]]:
    y, kept = x.new_empty(x.shape, dtype=out_dtype), []
    tokens = x.numel() // x.shape[-1]  # torch.Size.numel would tie a compiled graph to one batch
    if given.implementation == "composed":
        kept.append(given.dictionary.new_empty(given.dictionary.shape, dtype=given.dtype))
        if given.norm is None and x.dtype != given.dtype:
            kept.append(x.new_empty(x.shape, dtype=given.dtype))
    elif given.norm is not None and given.one_product(tokens):
        kept.append(x.new_empty((2, tokens), dtype=torch.float32))
    return y, kept


def backward_fake(
    grad_y: Tensor, x: Tensor, y: Tensor, kept: Any, need_x: bool, need_weights: bool, given: ISTAArguments
) -> list[Tensor]:
    return empty_gradients(_likes(x, y, given), (need_x, *[need_weights] * 3))


def forward_flops(x_shape: tuple[int, ...], out_dtype: Any, given: ISTAArguments) -> int:
    tokens, width = math.prod(x_shape[:-1]), x_shape[-1]
    large, small = 2 * tokens * width**2, 2 * width**3
    if given.combined is not None:
        return large
    return large + small if one_product(tokens, width) else 2 * large


def backward_flops(
    grad_shape: tuple[int, ...], x: Any, y: Any, kept: Any, need_x: bool, need_weights: bool, given: ISTAArguments
) -> int:
    tokens, width = math.prod(grad_shape[:-1]), grad_shape[-1]
    large, small = 2 * tokens * width**2, 2 * width**3
    if given.combined is not None or one_product(tokens, width):
        return large * need_x + (large + small) * need_weights
    # Both gradients need dr. The weight's also computes the residual again, and multiplies twice.
    return large * (need_x or need_weights) + large * need_x + 3 * large * need_weights


register("ista_forward", forward, fake=forward_fake, flops=forward_flops, replayed=True)
register("ista_backward", backward, fake=backward_fake, flops=backward_flops, replayed=True)
