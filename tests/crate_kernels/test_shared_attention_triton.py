"""The Triton path of shared-QKV attention against the formula in float64; without a GPU, in Triton's interpreter.

One rule decides every comparison: the kernel's error against float64, relative in norm, is at most 1.5 times that of
the same formula composed of eager operations in the tensor's own dtype, plus two roundings of that dtype. The gradient
has one more allowance, which only counts in float32: eager keeps the probabilities, while the kernel recomputes
exp(score - lse) from a float32 lse. Summing lse in base 2, changing it to base e and back, and subtracting it round
four times, by eps/2 * |lse| each, which moves a probability by a factor of up to 1 + 2 * eps * |lse|.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import a_few_roundings
from torch import Tensor

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:  # where nothing can be installed, as on some GPU machines
    given = None

pytest.importorskip("triton")

from crate_kernels import tiles
from crate_kernels.shared_attention.triton import backward, backward_from_delta, forward, split_features, tail

# The interpreter multiplies bfloat16 wrongly, so that dtype is proved on a GPU.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

SHAPES = [
    (2, 3, 1, 16),  # one token: the softmax is 1, a tile is all tail
    (2, 2, 50, 64),  # a 112 px image; several heads and images, one tile with a tail
    (1, 2, 63, 48),  # one short of a tile; the head width of CRATE-MAE-Small, in parts of 32 and 16
    (1, 1, 65, 80),  # one past a tile; 64 + 16
    (1, 1, 65, 72),  # half of the second part is empty; token stride that is no multiple of 16
    (1, 1, 50, 96),  # 64 + 32
    (1, 1, 33, 128),
    (1, 1, 197, 64),  # CRATE-MAE-Base at 224 px
]


def attention(w: Tensor, scale: float, is_causal: bool, lengths: Tensor | None, factors: Tensor | None) -> Tensor:
    position = torch.arange(w.shape[2], device=w.device)
    scores = w @ w.mT * scale
    if is_causal:
        scores = scores.masked_fill(position > position[:, None], -math.inf)
    if lengths is not None:
        scores = scores.masked_fill((position >= lengths[:, None])[:, None, None], -math.inf)
    weights = scores.softmax(-1)
    if factors is not None:
        weights = weights * factors.to(w)
    out = weights @ w
    return out if lengths is None else out.masked_fill((position >= lengths[:, None])[:, None, :, None], 0.0)


def attention_and_gradient(
    w: Tensor, grad_out: Tensor, dtype: torch.dtype, *arguments: float | bool | Tensor | None
) -> tuple[Tensor, Tensor]:
    w = w.detach().to(dtype).requires_grad_()
    out = attention(w, *arguments)
    (dw,) = torch.autograd.grad(out, w, grad_out.to(dtype))
    return out.detach(), dw


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def check(
    w: Tensor,
    grad_out: Tensor,
    scale: float,
    is_causal: bool = False,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels on ``w`` and ``grad_out`` as they are and hold them to the rule; their results."""
    random = (dropout, torch.tensor([seed]))
    out, lse = forward(w, scale, is_causal, True, lengths, *random)
    dw = backward(grad_out, w, out, lse, scale, is_causal, lengths, *random)
    factors = dropout_factors(w.shape, dropout, seed).to(w.device) if dropout else None
    truth = attention_and_gradient(w, grad_out, torch.float64, scale, is_causal, lengths, factors)
    eager = attention_and_gradient(w, grad_out, w.dtype, scale, is_causal, lengths, factors)
    recomputing = 2 * torch.finfo(torch.float32).eps * lse[lse.isfinite()].abs().max().item()
    margins = (0.0, recomputing)
    for name, kernel, exact, composed, margin in zip(("out", "dw"), (out, dw), truth, eager, margins, strict=True):
        assert kernel.dtype == w.dtype and kernel.shape == w.shape
        assert kernel.transpose(1, 2).is_contiguous(), f"{name} is not token-major"
        allowed = 1.5 * relative_error(composed, exact) + a_few_roundings(w.dtype) + margin
        assert relative_error(kernel, exact) <= allowed, name
    return out, lse, dw


def philox(seed: int, *counter: np.ndarray) -> list[np.ndarray]:
    """Philox4x32-10 of Salmon et al. (SC 2011): four 32-bit words of a counter of four, the key a 64-bit seed."""
    word = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (part.astype(np.uint64) for part in np.broadcast_arrays(*counter))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ np.uint64(k0), b & word, (a >> shift) ^ c3 ^ np.uint64(k1), a & word
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def dropout_factors(shape: tuple[int, ...], dropout: float, seed: int) -> Tensor:
    """What the kernels multiply the weights with, [batch, heads, tokens, tokens], from their description alone."""
    batch, heads, tokens, _ = shape
    head = np.arange(batch * heads)[:, None, None]
    query, key = np.arange(tokens)[:, None], np.arange(tokens)
    first, second, _, _ = philox(seed, np.minimum(query, key), np.maximum(query, key), head, np.zeros(1))
    uniform = (np.where(query <= key, first, second) >> np.uint64(8)).astype(np.float64) / 2**24
    return torch.from_numpy((uniform >= np.float32(dropout)) / (1 - dropout)).view(batch, heads, tokens, tokens)


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


def test_the_generator_of_these_tests_is_philox() -> None:
    """A known answer of the authors' own test vectors."""
    zero = np.zeros(1)
    assert [int(word[0]) for word in philox(0, zero, zero, zero, zero)] == [
        0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8,
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 12345, 2**63 - 1])
def test_the_mask_of_dropout(seed: int, device: str) -> None:
    """Of an identity matrix with equal weights, attention is the mask."""
    w = torch.eye(50, 64, device=device).expand(2, 3, 50, 64)
    out, _ = forward(w, 1e-30, False, dropout=0.3, seed=torch.tensor([seed]))
    found, expected = out[..., :50] > 0, dropout_factors(w.shape, 0.3, seed) > 0
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 50, 48), (1, 1, 65, 72)], ids=str)
def test_dropout(shape: tuple[int, ...], dtype: torch.dtype, is_causal: bool, device: str) -> None:
    w, grad_out = randn(*shape, dtype=dtype, device=device), randn(*shape, dtype=dtype, device=device).flip(-1)
    check(w, grad_out, shape[-1] ** -0.5, is_causal, dropout=0.4, seed=2**40 + 3)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(dtype: torch.dtype, is_causal: bool, dropout: float, device: str) -> None:
    """One token, all, ends inside and at the end of tiles, whole tiles of padding; and garbage where padding is stored."""
    lengths = torch.tensor([1, 70, 33, 64], dtype=torch.int32, device=device)
    w, grad_out = (
        randn(4, 1, 70, 48, dtype=dtype, device=device),
        randn(4, 1, 70, 48, dtype=dtype, device=device).flip(-1),
    )
    out, lse, dw = check(w, grad_out, 0.2, is_causal, lengths, dropout)
    padding = (torch.arange(70, device=device) >= lengths[:, None])[:, None]
    assert not out[padding.expand_as(lse)].any() and not dw[padding.expand_as(lse)].any()
    assert torch.equal(lse == -math.inf, padding.expand_as(lse))

    random = (lengths, dropout, torch.tensor([0]))
    w, grad_out = (tensor.masked_fill(padding[..., None], math.nan) for tensor in (w, grad_out))
    again, lse_again = forward(w, 0.2, is_causal, True, *random)
    assert torch.equal(again, out) and torch.equal(lse_again, lse)
    assert torch.equal(backward(grad_out, w, out, lse, 0.2, is_causal, *random), dw)


def test_lengths_out_of_range_are_clamped(device: str) -> None:
    """A device's lengths are not checked; they must not lead out of the tensor."""
    w = amid_nan(randn(3, 1, 37, 16, device=device))
    out, lse = forward(w, 0.2, False, lengths=torch.tensor([2**40, 38, 12], device=device))
    dw = backward(w, w, out, lse, 0.2, False, torch.tensor([2**40, 38, 12], device=device))
    expected_out, expected_lse, expected_dw = check(w, w, 0.2, lengths=torch.tensor([37, 37, 12], device=device))
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse) and torch.equal(dw, expected_dw)
    nothing, lse = forward(w, 0.2, False, lengths=torch.tensor([0, -1, -(2**40)], device=device))
    assert not nothing.any() and (lse == -math.inf).all()


@pytest.mark.parametrize("family", ["default", "sm_90"])
@pytest.mark.parametrize("tokens", [16, 32, 65, 84, 100, 128])
def test_walks_of_whole_tiles_and_a_tail(tokens: int, family: str, device: str) -> None:
    """Remainders of none, at most 16, at most 32, and more; in the tiles of other devices too."""
    if device == "cuda" and family == "default":
        pytest.skip("interpreted only: a device runs its own tiles")
    w = randn(1, 1, tokens, 16, dtype=torch.float16, device=device)
    with tiles.pretend(family):
        check(w, w.flip(-1), 0.25)
        check(w, w.flip(-1), 0.25, lengths=torch.tensor([tokens - 3], device=device))


def test_the_walks_of_tf32(device: str) -> None:
    """They are not those of exact float32. In the interpreter TF32 products are exact."""
    if device == "cuda":
        pytest.skip("on a device: test_tf32_where_pytorch_may_use_it")
    w = randn(1, 1, 70, 48, device=device)
    torch.set_float32_matmul_precision("high")
    try:
        check(w, w.flip(-1), 0.2)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_parts_of_a_head() -> None:
    widths = {1: (16, 0), 16: (16, 0), 17: (32, 0), 32: (32, 0), 33: (32, 16), 48: (32, 16), 49: (64, 0), 64: (64, 0)}
    widths |= {65: (64, 16), 72: (64, 16), 80: (64, 16), 81: (64, 32), 96: (64, 32), 97: (128, 0), 128: (128, 0)}
    assert {head_dim: split_features(head_dim) for head_dim in widths} == widths


def test_tail() -> None:
    tails = {197: 16, 208: 16, 209: 32, 224: 32, 225: 64, 256: 64, 257: 16, 50: 64, 1: 16}
    assert {tokens: tail(64, tokens, False, False, "tf32") for tokens in tails} == tails
    assert tail(64, 197, False, True, "tf32") == 32
    assert tail(64, 197, True, False, "tf32") == tail(64, 197, False, False, "ieee") == 64


def test_backward_from_a_delta_that_is_there_already(device: str) -> None:
    w, grad_out = randn(2, 2, 37, 24, device=device), randn(2, 2, 37, 24, device=device).flip(-1)
    out, lse = forward(w, 0.2, False)
    delta = (grad_out * out).sum(-1)
    dw = backward_from_delta(grad_out, w, lse, delta, 0.2, False)
    assert relative_error(dw, backward(grad_out, w, out, lse, 0.2, False).double()) < 1e-6
    # Raising delta by one takes scale * (P + P^T) w away.
    p = (w.double() @ w.double().mT * 0.2).softmax(-1)
    difference = dw - backward_from_delta(grad_out, w, lse, delta + 1, 0.2, False)
    assert relative_error(difference, 0.2 * (p + p.mT) @ w.double()) < 1e-5


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


if given is not None:

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_any_shape_layout_and_option(data: st.DataObject) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        shape = [
            data.draw(st.integers(1, most), label=name) for name, most in zip("bhnd", (2, 2, 70, 100), strict=True)
        ]
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16]), label="dtype")
        layout = data.draw(st.sampled_from(LAYOUTS), label="layout of w")
        grad_layout = data.draw(st.sampled_from([one_value, *LAYOUTS]), label="layout of the gradient")
        is_causal = data.draw(st.booleans(), label="causal")
        lengths = data.draw(st.none() | st.lists(st.integers(1, shape[2]), min_size=shape[0], max_size=shape[0]))
        dropout = data.draw(st.sampled_from([0.0, 0.25]), label="dropout")
        w, grad_out = (
            layout(randn(*shape, dtype=dtype, device=device)),
            randn(*shape, dtype=dtype, device=device).flip(-1),
        )
        lengths = None if lengths is None else torch.tensor(lengths, device=device)
        check(w, grad_layout(grad_out), shape[-1] ** -0.5, is_causal, lengths, dropout, seed=sum(shape))


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exps_hundreds_apart(dtype: torch.dtype, device: str) -> None:
    """Rows from tiny to huge: of each pair of probabilities that one score gives, one is 1 and the other exp(-300) or less."""
    w = randn(1, 2, 40, 16, dtype=dtype, device=device) * torch.linspace(0, 12, 40, device=device)[:, None].to(dtype)
    _, lse, _ = check(w, w.flip(-1), 0.25)
    assert lse.max() - lse.min() > 300


def test_first_token_sees_itself_alone_under_a_causal_mask(device: str) -> None:
    w = randn(1, 2, 40, 16, device=device)
    out, _ = forward(w, 0.25, True)
    assert torch.equal(out[:, :, 0], w[:, :, 0])


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_same_bits_every_time(is_causal: bool, device: str) -> None:
    w, grad_out = randn(1, 1, 40, 32, device=device), randn(1, 1, 40, 32, device=device).flip(-1)
    for random in ((None, 0.0, None), (torch.tensor([33], device=device), 0.1, torch.tensor([3]))):
        out, lse = forward(w, 0.2, is_causal, True, *random)
        dw = backward(grad_out, w, out, lse, 0.2, is_causal, *random)
        again, lse_again = forward(w, 0.2, is_causal, True, *random)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)
        assert torch.equal(dw, backward(grad_out, w, again, lse_again, 0.2, is_causal, *random))


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
