"""Every operator as a function of tensors alone, for the tests that go through all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from crate_kernels import (
    AttentionWeights,
    Norm,
    decoder_layer,
    encoder_layer,
    ista,
    mssa,
    norm_linear,
    overcomplete_ista,
    shared_qkv_attention,
)

WIDTH, CODES, LENGTHS = 6, 12, torch.tensor([3, 4])
KEY_MASK = torch.tensor([[True, False, True, True], [False, False, True, False]])
V, M, D = (WIDTH,), (WIDTH, WIDTH), (WIDTH, CODES)
ATTENTION = [M, M, V, V, V]  # qkv, out, bias; gamma, beta
LEARNED = [(), ()]  # step_size, lambd


class Call(NamedTuple):
    """A function of x [2, tokens, WIDTH] and of tensors of these shapes; numbers of shape () lie above zero."""

    function: Callable[..., Tensor]
    shapes: list[tuple[int, ...]]

    def inputs(self, dtype: torch.dtype, tokens: int = 4) -> list[Tensor]:
        """Leaves: x, then the others."""
        matrices = (torch.randn(shape) / (2 if len(shape) == 2 else 1) for shape in [(2, tokens, WIDTH), *self.shapes])
        return [(value if value.ndim else value.abs() / 4 + 0.1).to(dtype).requires_grad_() for value in matrices]


def _attention(x: Tensor, **options: object) -> Tensor:
    return shared_qkv_attention(x.unflatten(-1, (2, -1)).transpose(1, 2), **options)


def _mssa(x: Tensor, qkv: Tensor, out: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, **options: object) -> Tensor:
    return mssa(x, qkv, out, bias, num_heads=2, norm_weight=gamma, norm_bias=beta, skip=x, **options)


def _ista(x: Tensor, dictionary: Tensor, step_size: Tensor, lambd: Tensor, *norm: Tensor, soft: bool = False) -> Tensor:
    options = dict(zip(("norm_weight", "norm_bias"), norm, strict=False))
    return ista(x, dictionary, step_size=step_size, lambd=lambd, threshold="soft" if soft else "relu", **options)


def _overcomplete(
    x: Tensor, dictionary: Tensor, out: Tensor, step_size: Tensor, lambd: Tensor, gamma: Tensor
) -> Tensor:
    return overcomplete_ista(x, dictionary, out, step_size=step_size, lambd=lambd, norm_weight=gamma, skip=x)


def _encoder(x: Tensor, qkv: Tensor, out: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, matrix: Tensor) -> Tensor:
    norm, attention = Norm(gamma, beta), AttentionWeights(qkv, out, bias)
    return encoder_layer(x, norm, attention, norm, matrix, num_heads=2, step_size=0.3, lambd=0.2)


def _decoder(x: Tensor, qkv: Tensor, out: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, matrix: Tensor) -> Tensor:
    norm, attention = Norm(gamma, beta), AttentionWeights(qkv, out, bias)
    return decoder_layer(x, norm, matrix, norm, attention, num_heads=2)


CALLS = {
    "shared_qkv_attention": Call(_attention, []),
    "mssa": Call(_mssa, ATTENTION),
    "ista": Call(_ista, [M, *LEARNED]),
    "norm_linear": Call(lambda x, w, b, gamma: norm_linear(x, w, b, norm_weight=gamma), [M, V, V]),
    "overcomplete_ista": Call(_overcomplete, [D, D, *LEARNED, V]),
    "encoder_layer": Call(_encoder, [*ATTENTION, M]),
    "decoder_layer": Call(_decoder, [*ATTENTION, M]),
}
# The same with other settings.
VARIANTS = {
    "shared_qkv_attention, padded": Call(lambda x: _attention(x, is_causal=True, lengths=LENGTHS), []),
    "mssa, padded": Call(lambda *a: _mssa(*a, subtract=True, is_causal=True, lengths=LENGTHS), ATTENTION),
    "shared_qkv_attention, masked": Call(
        lambda x, s: _attention(x, scale=s.square() + 0.1, window=1, key_mask=KEY_MASK), [(2,)]
    ),
    "mssa, masked": Call(lambda *a: _mssa(*a, is_causal=True, window=2, key_mask=KEY_MASK), ATTENTION),
    "mssa, recomputed": Call(lambda *a: _mssa(*a, recompute=True), ATTENTION),
    "ista, soft": Call(lambda *a: _ista(*a, soft=True), [M, *LEARNED, V, V]),
    "ista, few tokens": Call(lambda x, *a: _ista(x[:1], *a), [M, *LEARNED, V, V]),
}
