"""PyTorch operators of whole layers on the Triton path: one a direction, since each operator costs the host tens of microseconds.

They do what the operators of the layer's two steps do, one after the other, on the same kernels; only that the first step also
finds the moments of its result, which the LayerNorm of the second would read all tokens for. ``kept`` is what the backward needs
besides x (and y, the encoder's result): the tokens between the two steps, then what each step keeps, in the order of the layer.
Imports no Triton.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crate_kernels.definitions import or_empty, register
from crate_kernels.ista import op as ista
from crate_kernels.ista.op import ISTAArguments
from crate_kernels.mssa import op as mssa
from crate_kernels.mssa.op import MSSAArguments
from crate_kernels.norm_linear import op as norm_linear
from crate_kernels.norm_linear.op import NormLinearArguments


def _encoder_forward(x: Tensor, attention: MSSAArguments, step: ISTAArguments) -> tuple[Tensor, list[Tensor]]:
    z, of_attention, parts = mssa.forward_in_layer(x, None, x.dtype, attention, parts_for=step.dtype)
    y, of_step = ista.forward_in_layer(z, x.dtype, step, parts)
    return y, [z, *of_attention, *of_step]


def _encoder_backward(
    grad: Tensor, x: Tensor, y: Tensor, kept: list[Tensor], needs: list[bool], attention: MSSAArguments, step: ISTAArguments
) -> list[Tensor]:  # fmt: skip
    """``needs``: the gradients of x, of qkv and its LayerNorm, of out and its bias, of the dictionary and its LayerNorm."""
    (z, *of_attention, moments), (*needs_of_attention, need_dictionary) = kept, needs
    grad_z, *grads = ista.backward(grad, z, y, [moments], any(needs_of_attention), need_dictionary, step)
    if not any(needs_of_attention):
        return [*or_empty([None] * 6, (x, *attention[:5])), *grads]
    return [*mssa.backward(grad_z, x, of_attention, needs_of_attention, attention), *grads]


def _encoder_forward_fake(x: Tensor, attention: MSSAArguments, step: ISTAArguments) -> tuple[Tensor, list[Tensor]]:
    z, of_attention = mssa.forward_fake(x, None, x.dtype, attention)
    y, of_step = ista.forward_fake(z, x.dtype, step)
    return y, [z, *of_attention, *of_step]


def _encoder_backward_fake(
    grad: Tensor, x: Tensor, y: Tensor, kept: Any, needs: list[bool], attention: MSSAArguments, step: ISTAArguments
) -> list[Tensor]:
    *needs_of_attention, need_dictionary = needs
    _, *grads = ista.backward_fake(grad, y, y, None, False, need_dictionary, step)
    return [*mssa.backward_fake(grad, x, None, needs_of_attention, attention), *grads]


def _encoder_backward_flops(
    grad: tuple[int, ...], x: tuple[int, ...], y: Any, kept: Any, needs: list[bool], attention: Any, step: Any
) -> int:
    *needs_of_attention, need_dictionary = needs
    of_step = ista.backward_flops(grad, x, y, None, any(needs_of_attention), need_dictionary, step)
    return of_step + mssa.backward_flops(grad, x, None, needs_of_attention, attention)


def _decoder_forward(x: Tensor, step: NormLinearArguments, attention: MSSAArguments) -> tuple[Tensor, list[Tensor]]:
    g, of_step, parts = norm_linear.forward_in_layer(x.reshape(-1, x.shape[-1]), step, attention.qkv_matrix.dtype)
    y, of_attention, _ = mssa.forward_in_layer(g.view(x.shape), None, g.dtype, attention, parts)
    return y, [g, *of_step, *of_attention]


def _decoder_backward(
    grad: Tensor, x: Tensor, kept: list[Tensor], needs: list[bool], step: NormLinearArguments, attention: MSSAArguments
) -> list[Tensor]:
    """``needs``: the gradients of x, of the linear map and its LayerNorm, of qkv and its LayerNorm, of out and its bias."""
    (g, moments, *of_attention), (need_x, need_weight, *needs_of_attention) = kept, needs
    tokens, need_g = x.reshape(-1, x.shape[-1]), need_x or need_weight
    grad_g, *grads = mssa.backward(grad, g.view(x.shape), of_attention, [need_g, *needs_of_attention], attention)
    if not need_g:
        return [*or_empty([None] * 5, (x, *step[:4])), *grads]
    of_step = norm_linear.backward(grad_g.flatten(0, 1), tokens, [g, moments], need_x, need_weight, step)
    return [of_step[0].view(x.shape) if need_x else of_step[0], *of_step[1:], *grads]


def _decoder_forward_fake(
    x: Tensor, step: NormLinearArguments, attention: MSSAArguments
) -> tuple[Tensor, list[Tensor]]:
    g, of_step = norm_linear.forward_fake(x.reshape(-1, x.shape[-1]), step)
    y, of_attention = mssa.forward_fake(x, None, g.dtype, attention)
    return y, [g, *of_step, *of_attention]


def _decoder_backward_fake(
    grad: Tensor, x: Tensor, kept: Any, needs: list[bool], step: NormLinearArguments, attention: MSSAArguments
) -> list[Tensor]:
    need_x, need_weight, *needs_of_attention = needs
    _, *grads = mssa.backward_fake(grad, grad, None, [False, *needs_of_attention], attention)
    return [*norm_linear.backward_fake(grad, x, None, need_x, need_weight, step), *grads]


def _decoder_backward_flops(
    grad: tuple[int, ...], x: tuple[int, ...], kept: Any, needs: list[bool], step: Any, attention: Any
) -> int:
    need_x, need_weight, *needs_of_attention = needs
    needs_of_attention = [need_x or need_weight, *needs_of_attention]
    of_attention = mssa.backward_flops(grad, x, None, needs_of_attention, attention)
    return of_attention + norm_linear.backward_flops(grad, (x[0] * x[1], x[2]), None, need_x, need_weight, step)


register(
    "encoder_layer_forward",
    _encoder_forward,
    fake=_encoder_forward_fake,
    flops=lambda x, attention, step: mssa.forward_flops(x, None, None, attention) + ista.forward_flops(x, None, step),
    replayed=True,
)
register(
    "encoder_layer_backward",
    _encoder_backward,
    fake=_encoder_backward_fake,
    flops=_encoder_backward_flops,
    replayed=True,
)
register(
    "decoder_layer_forward",
    _decoder_forward,
    fake=_decoder_forward_fake,
    flops=lambda x, step, attention: (
        norm_linear.forward_flops((x[0] * x[1], x[2]), step) + mssa.forward_flops(x, None, None, attention)
    ),
    replayed=True,
)
register(
    "decoder_layer_backward",
    _decoder_backward,
    fake=_decoder_backward_fake,
    flops=_decoder_backward_flops,
    replayed=True,
)
