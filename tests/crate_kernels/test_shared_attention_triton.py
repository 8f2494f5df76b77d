"""The Triton path of shared-QKV attention against the formula in float64; without a GPU, in Triton's interpreter.

One rule decides every comparison: the kernel's error against float64, relative in norm, is at most 1.5 times that of
the same formula composed of eager operations in the tensor's own dtype, plus two roundings of that dtype. The gradient
has one more allowance, which only counts in float32: eager keeps the probabilities, while the kernel recomputes
exp(score - lse) from a float32 lse. Summing lse in base 2, changing it to base e and back, and subtracting it round
four times, by eps/2 * |lse| each, which moves a probability by a factor of up to 1 + 2 * eps * |lse|.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import a_few_roundings
from torch import Tensor

pytest.importorskip("triton")

from crate_kernels.shared_attention.triton import backward, forward

# The interpreter multiplies bfloat16 wrongly, so that dtype is proved on a GPU.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

SHAPES = [
    (2, 3, 1, 16),  # one token: the softmax is 1, a tile is all tail
    (2, 2, 50, 64),  # a 112 px image; several heads and images, one tile with a tail
    (1, 2, 63, 48),  # one short of a tile; the head width of CRATE-MAE-Small, padded to 64
    (1, 1, 65, 80),  # one past a tile; padded to 128
    (1, 1, 65, 72),  # token stride that is no multiple of 16
    (1, 1, 197, 64),  # CRATE-MAE-Base at 224 px
]


def attention(w: Tensor, scale: float, is_causal: bool) -> Tensor:
    scores = w @ w.mT * scale
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=w.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores.softmax(-1) @ w


def attention_and_gradient(
    w: Tensor, grad_out: Tensor, scale: float, is_causal: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    w = w.detach().to(dtype).requires_grad_()
    out = attention(w, scale, is_causal)
    (dw,) = torch.autograd.grad(out, w, grad_out.to(dtype))
    return out.detach(), dw


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def check(w: Tensor, grad_out: Tensor, scale: float, is_causal: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels on ``w`` and ``grad_out`` as they are and hold them to the rule; their results."""
    out, lse = forward(w, scale, is_causal)
    dw = backward(grad_out, w, out, lse, scale, is_causal)
    truth = attention_and_gradient(w, grad_out, scale, is_causal, torch.float64)
    eager = attention_and_gradient(w, grad_out, scale, is_causal, w.dtype)
    recomputing = 2 * torch.finfo(torch.float32).eps * lse.abs().max().item()
    margins = (0.0, recomputing)
    for name, kernel, exact, composed, margin in zip(("out", "dw"), (out, dw), truth, eager, margins, strict=True):
        assert kernel.dtype == w.dtype and kernel.shape == w.shape
        assert kernel.transpose(1, 2).is_contiguous(), f"{name} is not token-major"
        allowed = 1.5 * relative_error(composed, exact) + a_few_roundings(w.dtype) + margin
        assert relative_error(kernel, exact) <= allowed, name
    return out, lse, dw


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    seed = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=seed).to(dtype).to(device)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, is_causal: bool, device: str) -> None:
    w, grad_out = randn(*shape, dtype=dtype, device=device), randn(*shape, dtype=dtype, device=device).flip(-1)
    check(w, grad_out, shape[-1] ** -0.5, is_causal)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tf32_where_pytorch_may_use_it(shape: tuple[int, ...], device: str) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        check(randn(*shape, device=device), randn(*shape, device=device).flip(-1), shape[-1] ** -0.5)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_log_sum_exp(is_causal: bool, device: str) -> None:
    w, scale = randn(1, 2, 65, 16, device=device), 0.25
    _, lse = forward(w, scale, is_causal)

    def log_sum_exp(w: Tensor) -> Tensor:
        scores = w @ w.mT * scale
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        return scores.logsumexp(-1)

    exact = log_sum_exp(w.double())
    assert lse.dtype == torch.float32 and lse.shape == w.shape[:-1] and lse.is_contiguous()
    allowed = 1.5 * relative_error(log_sum_exp(w), exact) + 2 * torch.finfo(torch.float32).eps
    assert relative_error(lse, exact) <= allowed


def heads_side_by_side(w: Tensor) -> Tensor:
    """As a projection writes them: a transposed view of [batch, tokens, heads * head_dim]."""
    batch, heads, tokens, head_dim = w.shape
    return w.transpose(1, 2).reshape(batch, tokens, -1).unflatten(-1, (heads, head_dim)).transpose(1, 2)


def every_other_feature(w: Tensor) -> Tensor:
    return w.repeat_interleave(2, -1)[..., ::2]


def tokens_innermost(w: Tensor) -> Tensor:
    return w.mT.contiguous().mT


def amid_nan(w: Tensor) -> Tensor:
    """Whatever lies around the tensor in memory: a read past a tail or a head's width shows."""
    batch, heads, tokens, head_dim = w.shape
    around = w.new_full((batch + 1, heads + 1, tokens + 5, head_dim + 3), math.nan)
    around[:batch, :heads, :tokens, :head_dim] = w
    return around[:batch, :heads, :tokens, :head_dim]


def one_value(w: Tensor) -> Tensor:
    """What ``out.sum().backward()`` hands over: one element, all strides 0."""
    return w.new_ones(()).expand(w.shape)


LAYOUTS = [heads_side_by_side, every_other_feature, tokens_innermost, amid_nan]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_w_of_any_strides(layout, device: str) -> None:
    w, grad_out = randn(2, 2, 37, 24, device=device), randn(2, 2, 37, 24, device=device).flip(-1)
    strided = layout(w)
    assert torch.equal(strided, w)
    before = strided.clone()
    check(strided, grad_out, 0.2)
    assert torch.equal(strided, before), "the kernels wrote into w"


@pytest.mark.parametrize("layout", [one_value, *LAYOUTS], ids=lambda layout: layout.__name__)
def test_incoming_gradient_of_any_strides(layout, device: str) -> None:
    w = randn(2, 2, 37, 24, device=device)
    grad_out = layout(randn(2, 2, 37, 24, device=device).flip(-1))
    before = grad_out.clone()
    check(w, grad_out, 0.2)
    assert torch.equal(grad_out, before), "the kernels wrote into the incoming gradient"


def test_out_of_any_strides(device: str) -> None:
    w, grad_out = randn(1, 2, 37, 24, device=device), randn(1, 2, 37, 24, device=device).flip(-1)
    out, lse = forward(w, 0.2, False)
    expected = backward(grad_out, w, out, lse, 0.2, False)
    assert torch.equal(backward(grad_out, w, amid_nan(out), lse, 0.2, False), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 2.0, 30.0])
def test_scores_from_flat_to_one_that_dominates(scale: float, dtype: torch.dtype, device: str) -> None:
    # At 30 the scores reach 1000: exponentials overflow unless each row's maximum is taken off first.
    w = randn(1, 1, 65, 16, dtype=dtype, device=device)
    check(w, w.flip(-1), scale)


def test_first_token_sees_itself_alone_under_a_causal_mask(device: str) -> None:
    w = randn(1, 2, 40, 16, device=device)
    out, _ = forward(w, 0.25, True)
    assert torch.equal(out[:, :, 0], w[:, :, 0])


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_same_bits_every_time(is_causal: bool, device: str) -> None:
    w, grad_out = randn(1, 1, 40, 32, device=device), randn(1, 1, 40, 32, device=device).flip(-1)
    out, lse = forward(w, 0.2, is_causal)
    dw = backward(grad_out, w, out, lse, 0.2, is_causal)
    again, lse_again = forward(w, 0.2, is_causal)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)
    assert torch.equal(dw, backward(grad_out, w, again, lse_again, 0.2, is_causal))


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 0, 5, 16), (2, 2, 0, 16)], ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, ...], device: str) -> None:
    w = torch.zeros(shape, device=device)
    out, lse = forward(w, 0.25, False)
    dw = backward(out, w, out, lse, 0.25, False)
    assert out.shape == dw.shape == w.shape and lse.shape == w.shape[:-1]


@pytest.mark.gpu
def test_more_heads_than_a_grid_axis_holds(device: str) -> None:
    w = randn(66000, 1, 2, 16, dtype=torch.float16, device=device)
    check(w, w.flip(-1), 0.25)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 1, 65, 16), (2**31, 1040, 16, 1)),
        ((1, 2, 65, 16), (1040, 2**31, 16, 1)),
        ((1, 1, 65, 16), (1040, 1040, 2**25, 1)),  # tokens before images in memory: one token's step spans the batch
        ((1, 1, 65, 16), (1040, 1040, 1, 2**31 // 15 + 1)),
    ],
    ids=["batch", "head", "token", "feature"],
)
def test_offsets_past_32_bits(shape: tuple[int, ...], strides: tuple[int, ...], device: str) -> None:
    w = torch.empty(2**31 + 2**12, dtype=torch.float16, device=device).as_strided(shape, strides)
    w.copy_(randn(*shape))
    check(w, randn(*shape, dtype=torch.float16, device=device).flip(-1), 0.25)
