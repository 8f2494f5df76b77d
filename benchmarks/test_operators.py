"""Operators and layers at the width of CRATE-MAE-Tiny, float32, forward without a graph and backward alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import crate_kernels
from benchmarks.conftest import IMPLEMENTATIONS
from crate_kernels import AttentionWeights, Norm

BATCH, TOKENS, WIDTH, HEADS = 4, 197, 384, 6


def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH)


def weight() -> Tensor:
    return torch.randn(WIDTH, WIDTH) * WIDTH**-0.5


def norm() -> list[Tensor]:
    return [1 + 0.1 * torch.randn(WIDTH), 0.1 * torch.randn(WIDTH)]


def attention(x: Tensor) -> Tensor:
    out = crate_kernels.shared_qkv_attention(x.unflatten(-1, (HEADS, -1)).transpose(1, 2))
    assert isinstance(out, Tensor)
    return out


def ista(x: Tensor, dictionary: Tensor) -> Tensor:
    return crate_kernels.ista(x, dictionary, step_size=0.1, lambd=0.5)


def mssa(x: Tensor, qkv: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    return crate_kernels.mssa(x, qkv, out, bias, num_heads=HEADS)


def encoder_layer(
    x: Tensor, g: Tensor, b: Tensor, qkv: Tensor, out: Tensor, bias: Tensor, g2: Tensor, b2: Tensor, dictionary: Tensor
) -> Tensor:
    attention = AttentionWeights(qkv, out, bias)
    return crate_kernels.encoder_layer(x, Norm(g, b), attention, Norm(g2, b2), dictionary, num_heads=HEADS, lambd=0.5)


def decoder_layer(
    x: Tensor, g: Tensor, b: Tensor, step: Tensor, g2: Tensor, b2: Tensor, qkv: Tensor, out: Tensor, bias: Tensor
) -> Tensor:
    attention = AttentionWeights(qkv, out, bias)
    return crate_kernels.decoder_layer(x, Norm(g, b), step, Norm(g2, b2), attention, num_heads=HEADS)


# Each with what draws its inputs, all of which get a gradient.
OPERATORS: dict[Callable[..., Tensor], Callable[[], list[Tensor]]] = {
    attention: lambda: [tokens()],
    ista: lambda: [tokens(), weight()],
    mssa: lambda: [tokens(), weight(), weight(), torch.randn(WIDTH)],
    encoder_layer: lambda: [
        tokens(), *norm(), weight(), weight(), torch.randn(WIDTH), *norm(), weight(),
    ],
    decoder_layer: lambda: [tokens(), *norm(), weight(), *norm(), weight(), weight(), torch.randn(WIDTH)],
}  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_operator(compare, device, operator, mode, implementation):
    inputs = [value.to(device) for value in OPERATORS[operator]()]
    upstream = torch.randn_like(operator(*inputs))

    def outputs(implementation: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in inputs]
        with crate_kernels.use(implementation):
            out = operator(*leaves)
            gradients = torch.autograd.grad(out, leaves, upstream.to(dtype))
        return {"out": out.detach()} | {f"gradient {index}": value for index, value in enumerate(gradients)}

    leaves = [value.clone().requires_grad_() for value in inputs]
    with crate_kernels.use(implementation):
        out = operator(*leaves)
    works = {
        "forward": torch.no_grad()(lambda: operator(*inputs)),
        "backward": lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True),
    }
    compare(f"{operator.__name__}, {mode}", outputs, works[mode], implementation)
