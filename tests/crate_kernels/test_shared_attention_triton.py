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
from crate_kernels.shared_attention import triton as attention_launchers
from crate_kernels.shared_attention.mask import NO_MASK, Mask, spans_of
from crate_kernels.shared_attention.triton import attend, gradient, launches, row_pairs, split_features, tail

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


CAUSAL = Mask(is_causal=True)


def attended(mask: Mask, batch: int, tokens: int) -> Tensor:
    """True [batch, 1, tokens, tokens] where token i attends to token j, pair by pair as ``Mask`` says."""
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    pairs = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool)
    if mask.is_causal:
        pairs = pairs & (j <= i)
    if mask.window is not None:
        pairs = pairs & ((i - j).abs() <= mask.window)
    if mask.spans is not None:
        first, end = mask.spans.cpu()
        pairs = pairs & (j >= first[:, None]) & (j < end[:, None])
    if mask.lengths is not None:
        present = j < mask.lengths.cpu()[:, None]
        pairs = pairs & present[:, None, None] & present[:, None, :, None]
    return pairs if mask.key_mask is None else pairs & mask.key_mask.cpu()[:, None, None]


def attention(w: Tensor, scale: float | Tensor, mask: Mask, factors: Tensor | None) -> Tensor:
    pairs = attended(mask, w.shape[0], w.shape[2]).to(w.device)
    factor = scale if isinstance(scale, float) else scale.to(w)[:, None, None]
    scores = (w @ w.mT * factor).masked_fill(~pairs, torch.finfo(w.dtype).min)
    weights = scores.softmax(-1).masked_fill(~pairs, 0.0)  # a row may attend to nothing
    if factors is not None:
        weights = weights * factors.to(w)
    return weights @ w


def attention_and_gradient(
    w: Tensor, grad_out: Tensor, dtype: torch.dtype, *arguments: float | Tensor | Mask | None
) -> tuple[Tensor, Tensor]:
    w = w.detach().to(dtype).requires_grad_()
    out = attention(w, *arguments)
    (dw,) = torch.autograd.grad(out, w, grad_out.to(dtype))
    return out.detach(), dw


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def run(
    w: Tensor,
    grad_out: Tensor,
    scale: float | Tensor,
    mask: Mask = NO_MASK,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, log-sum-exp and dw of the kernels."""
    out, lse = attend(w, scale, mask, dropout, seed)
    return out, lse, gradient(grad_out, w, row_pairs(grad_out, out, lse, scale), scale, mask, dropout, seed)


def check(
    w: Tensor, grad_out: Tensor, scale: float | Tensor, mask: Mask = NO_MASK, dropout: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels on ``w`` and ``grad_out`` as they are and hold them to the rule; their results."""
    out, lse, dw = run(w, grad_out, scale, mask, dropout, torch.tensor([seed]))
    factors = dropout_factors(w.shape, dropout, seed).to(w.device) if dropout else None
    truth = attention_and_gradient(w, grad_out, torch.float64, scale, mask, factors)
    eager = attention_and_gradient(w, grad_out, w.dtype, scale, mask, factors)
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
    check(w, grad_out, shape[-1] ** -0.5, Mask(is_causal))


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
    _, lse = attend(w, scale, Mask(is_causal))

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
    out, _ = attend(w, 1e-30, dropout=0.3, seed=torch.tensor([seed]))
    found, expected = out[..., :50] > 0, dropout_factors(w.shape, 0.3, seed) > 0
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 50, 48), (1, 1, 65, 72)], ids=str)
def test_dropout(shape: tuple[int, ...], dtype: torch.dtype, is_causal: bool, device: str) -> None:
    w, grad_out = randn(*shape, dtype=dtype, device=device), randn(*shape, dtype=dtype, device=device).flip(-1)
    check(w, grad_out, shape[-1] ** -0.5, Mask(is_causal), dropout=0.4, seed=2**40 + 3)


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
    mask = Mask(is_causal, lengths=lengths)
    out, lse, dw = check(w, grad_out, 0.2, mask, dropout)
    padding = (torch.arange(70, device=device) >= lengths[:, None])[:, None]
    assert not out[padding.expand_as(lse)].any() and not dw[padding.expand_as(lse)].any()
    assert torch.equal(lse == -math.inf, padding.expand_as(lse))

    w, grad_out = (tensor.masked_fill(padding[..., None], math.nan) for tensor in (w, grad_out))
    again = run(w, grad_out, 0.2, mask, dropout, torch.tensor([0]))
    assert all(torch.equal(one, other) for one, other in zip(again, (out, lse, dw), strict=True))


def packed(sizes: tuple[int, ...], tokens: int, device: str, **others: object) -> Mask:
    """Sequences of these sizes, one after another."""
    ends = torch.tensor([0, *sizes], device=device).cumsum(0)
    return Mask(lengths=ends[-1:], spans=spans_of(ends, tokens), **others)


WINDOWS = {  # one for oneself, within a tile, a tile, across tiles, more than there are tokens
    f"{window}{' causal' * is_causal}": Mask(is_causal, window)
    for window in (0, 5, 32, 70, 500)
    for is_causal in (False, True)
}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", WINDOWS.values(), ids=WINDOWS.keys())
def test_windows(mask: Mask, dtype: torch.dtype, dropout: float, device: str) -> None:
    w = randn(1, 2, 150, 48, dtype=dtype, device=device)
    check(w, w.flip(-1), 0.2, mask, dropout)
    check(w, w.flip(-1), 0.2, mask._replace(lengths=torch.tensor([131], device=device)))


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(150,), (64, 64, 22), (1, 0, 63, 1, 70), (3,) * 50, (10, 100)],
    ids=lambda sizes: "+".join(map(str, sizes))[:16],
)
def test_packed_sequences(sizes: tuple[int, ...], dtype: torch.dtype, is_causal: bool, device: str) -> None:
    """One, on the borders of tiles and just beside them, many within a tile, and with room left behind the last."""
    w, grad_out = (
        randn(1, 2, 150, 48, dtype=dtype, device=device),
        randn(1, 2, 150, 48, dtype=dtype, device=device).flip(-1),
    )
    mask = packed(sizes, 150, device, is_causal=is_causal)
    out, lse, dw = check(w, grad_out, 0.2, mask)
    check(w, grad_out, 0.2, mask._replace(window=4), dropout=0.2)
    end = sum(sizes)
    assert not out[:, :, end:].any() and not dw[:, :, end:].any() and (lse[:, :, end:] == -math.inf).all()
    for tensor in (w, grad_out):
        tensor[:, :, end:] = math.nan
    assert all(torch.equal(one, other) for one, other in zip(run(w, grad_out, 0.2, mask), (out, lse, dw), strict=True))
    if dtype == torch.float32:  # each by itself, to rounding
        begin = sum(sizes[:1])
        alone = run(w[:, :, :begin], grad_out[:, :, :begin], 0.2, Mask(is_causal))
        for one, other in zip(alone, (out, lse, dw), strict=True):
            assert relative_error(one, other[:, :, :begin].double()) < 1e-6


def test_spans_out_of_range_are_clamped(device: str) -> None:
    """A device's boundaries are not checked; they must not lead out of the tensor."""
    w = amid_nan(randn(1, 2, 70, 16, device=device))
    spans = torch.tensor([[-(2**31)] * 30 + [30] * 40, [30] * 30 + [2**31 - 1] * 40], dtype=torch.int32, device=device)
    wild = Mask(lengths=torch.tensor([99], device=device), spans=spans)
    tame = Mask(lengths=torch.tensor([70], device=device), spans=spans.clamp(0, 70))
    for one, other in zip(run(w, w, 0.2, wild), check(w, w, 0.2, tame), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "causal", "window", "padded"])
def test_key_masks(kind: str, dtype: torch.dtype, dropout: float, device: str) -> None:
    """Keys here and there, none in the first two tiles, one alone, and none at all."""
    place = torch.arange(100, device=device)
    key_mask = torch.stack([place % 3 == 1, place >= 70, place == 50, place < 0])
    mask = {
        "plain": Mask(key_mask=key_mask),
        "causal": Mask(True, key_mask=key_mask),
        "window": Mask(window=6, key_mask=key_mask),
        "padded": Mask(lengths=torch.tensor([100, 71, 40, 9], device=device), key_mask=key_mask),
    }[kind]
    w, grad_out = (
        randn(4, 1, 100, 48, dtype=dtype, device=device),
        randn(4, 1, 100, 48, dtype=dtype, device=device).flip(-1),
    )
    out, lse, dw = check(w, grad_out, 0.2, mask, dropout)
    blind = ~attended(mask, 4, 100).any(-1).to(device)
    assert torch.equal(lse == -math.inf, blind) and not out[blind.expand_as(lse)].any()
    assert not out[3].any() and not dw[3].any()
    apart = mask._replace(key_mask=key_mask.repeat_interleave(2, 1)[:, ::2])
    again = run(w, grad_out, 0.2, apart, dropout, torch.tensor([0]))
    assert all(torch.equal(one, other) for one, other in zip(again, (out, lse, dw), strict=True))


@pytest.mark.parametrize("mask", [NO_MASK, CAUSAL, Mask(window=7)], ids=["full", "causal", "window"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_scale_for_each_head(dropout: float, dtype: torch.dtype, mask: Mask, device: str) -> None:
    """Its gradient too, by rows: the kernels' is scale * dS w w^T, row by row."""
    w, grad_out = (
        randn(2, 3, 70, 48, dtype=dtype, device=device),
        randn(2, 3, 70, 48, dtype=dtype, device=device).flip(-1),
    )
    scales, seed = torch.tensor([0.05, 0.15, 0.3], device=device), torch.tensor([0])
    out, lse, dw = check(w, grad_out, scales, mask, dropout)
    rows = torch.full_like(lse, math.nan)
    again = gradient(grad_out, w, row_pairs(grad_out, out, lse, scales), scales, mask, dropout, seed, rows)
    assert torch.equal(again, dw)
    factors = dropout_factors(w.shape, dropout, 0).to(device) if dropout else None
    found = rows.sum((0, 2)) / scales

    def of_scales(dtype: torch.dtype) -> Tensor:
        leaf = scales.to(dtype).requires_grad_()
        return torch.autograd.grad(attention(w.to(dtype), leaf, mask, factors), leaf, grad_out.to(dtype))[0]

    exact = of_scales(torch.float64)
    allowed = 1.5 * relative_error(of_scales(dtype), exact) + 8 * torch.finfo(torch.float32).eps
    assert relative_error(found, exact) <= allowed


@pytest.mark.parametrize("kind", ["full", "causal", "window", "key mask"])
def test_scores_of_ten_thousands(kind: str, device: str) -> None:
    w = randn(1, 1, 65, 16, device=device) * 50
    every_other = Mask(key_mask=torch.arange(65, device=device)[None] % 2 == 0)
    mask = {"full": NO_MASK, "causal": CAUSAL, "window": Mask(window=7), "key mask": every_other}[kind]
    scores = w @ w.mT
    assert scores.max() > 1e4 and scores.min() < -1e4
    check(w, w.flip(-1), 1.0, mask)


def test_lengths_out_of_range_are_clamped(device: str) -> None:
    """A device's lengths are not checked; they must not lead out of the tensor."""
    w = amid_nan(randn(3, 1, 37, 16, device=device))
    found = run(w, w, 0.2, Mask(lengths=torch.tensor([2**40, 38, 12], device=device)))
    expected = check(w, w, 0.2, Mask(lengths=torch.tensor([37, 37, 12], device=device)))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    nothing, lse = attend(w, 0.2, Mask(lengths=torch.tensor([0, -1, -(2**40)], device=device)))
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
        check(w, w.flip(-1), 0.25, Mask(lengths=torch.tensor([tokens - 3], device=device)))


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
    tails = {197: 16, 208: 16, 209: 32, 224: 32, 225: 64, 256: 16, 257: 16, 50: 64, 1: 16, 300: 32}
    assert {tokens: tail(64, tokens, False, False, "tf32") for tokens in tails} == tails
    assert tail(64, 197, False, True, "tf32") == 32
    assert tail(64, 197, True, False, "tf32") == tail(64, 197, False, False, "ieee") == 64


@pytest.mark.parametrize("kind", ["full", "padded", "causal", "keys", "dropped"])
@pytest.mark.parametrize("tokens", [65, 80, 197])
def test_few_last_rows_in_a_launch_of_their_own(
    tokens: int, kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on sm_90, where there are many heads; in one launch where more than 16 rows are left, heads are few, or where more
    than padding is masked or dropped."""
    mask = {
        "full": NO_MASK, "causal": CAUSAL, "dropped": NO_MASK,
        "padded": Mask(lengths=torch.tensor([tokens - 3], device=device)),
        "keys": Mask(key_mask=torch.arange(tokens, device=device)[None] % 3 == 0),
    }[kind]  # fmt: skip
    w = randn(1, 2, tokens, 48, dtype=torch.float16, device=device)
    monkeypatch.setattr(attention_launchers, "MANY_HEADS", 2)
    seen: list[tuple[int, int, int]] = []
    real = attention_launchers._launch

    def noting(kernel, w: Tensor, arguments: tuple, strided: tuple, options: dict, first: int, end: int) -> None:
        seen.append((first, end, options["BLOCK_ROWS"]))
        real(kernel, w, arguments, strided, options, first, end)

    monkeypatch.setattr(attention_launchers, "_launch", noting)
    with tiles.pretend("sm_90"):
        check(w, w.flip(-1), 0.2, mask, 0.2 if kind == "dropped" else 0.0)
        whole = tokens // 64 * 64
        rows = [(0, whole, 64), (whole, tokens, 16)] if kind in ("full", "padded") else [(0, tokens, 64)]
        assert seen == [*rows, (0, tokens, 64), *rows]  # the pairs of rows between them
        assert [one[:2] for one in launches("forward_kernel", {"BLOCK_ROWS": 64}, randn(1, 2, 81, 48).half())] == [
            (0, 81)
        ]
        assert [one[:2] for one in launches("forward_kernel", {"BLOCK_ROWS": 64}, randn(1, 2, 10, 48).half())] == [
            (0, 10)
        ]
        assert [one[:2] for one in launches("forward_kernel", {"BLOCK_ROWS": 64}, randn(1, 2, 128, 48).half())] == [
            (0, 128)
        ]
        assert [one[:2] for one in launches("forward_kernel", {"BLOCK_ROWS": 64}, randn(1, 1, 65, 48).half())] == [
            (0, 65)
        ]
        assert [one[:2] for one in launches("forward_kernel", {"BLOCK_ROWS": 64}, randn(1, 2, 65, 48))] == [(0, 65)]
    assert [one[:2] for one in launches("forward_kernel", {"BLOCK_ROWS": 64}, randn(1, 2, 65, 48).half())] == [(0, 65)]


@pytest.mark.parametrize("scale", [0.2, (0.2, 0.5)], ids=["one", "each"])
def test_row_pairs(scale: float | tuple[float, ...], device: str) -> None:
    w, grad_out = randn(2, 2, 37, 24, device=device), randn(2, 2, 37, 24, device=device).flip(-1)
    factor: float | Tensor = torch.tensor(scale, device=device) if isinstance(scale, tuple) else scale
    out, lse = attend(w, factor, Mask(lengths=torch.tensor([37, 20], device=device)))
    exponents, deltas = row_pairs(grad_out, out, lse, factor).unbind(-1)
    assert torch.equal(exponents[1, :, 20:], torch.zeros_like(exponents[1, :, 20:]))
    torch.testing.assert_close(
        exponents, (lse.double() * math.log2(math.e)).nan_to_num(neginf=0).float(), atol=0, rtol=3e-7
    )
    each = factor[:, None] if isinstance(factor, Tensor) else factor
    torch.testing.assert_close(deltas, ((grad_out.double() * out).sum(-1) * each).float(), atol=1e-6, rtol=1e-6)


def test_backward_from_a_delta_that_is_off(device: str) -> None:
    """In float32 it is taken as it is: raising it by one takes scale * (P + P^T) w away."""
    w, grad_out = randn(2, 2, 37, 24, device=device), randn(2, 2, 37, 24, device=device).flip(-1)
    out, lse, expected = run(w, grad_out, 0.2)
    pairs = row_pairs(grad_out, out, lse, 0.2)
    dw = gradient(grad_out, w, pairs, 0.2)
    assert torch.equal(dw, expected)
    p = (w.double() @ w.double().mT * 0.2).softmax(-1)
    difference = dw - gradient(grad_out, w, pairs + torch.tensor([0, 0.2], device=device), 0.2)
    assert relative_error(difference, 0.2 * (p + p.mT) @ w.double()) < 1e-5


MASKS = {
    "full": {}, "causal": {"is_causal": True}, "window": {"window": 9}, "lengths": {"lengths": [83, 30]}, "keys": {},
    "causal keys": {"is_causal": True}, "dropped": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKS)
def test_backward_in_16_bits_corrects_delta_at_the_diagonal(kind: str, device: str) -> None:
    """Where delta_j is off by e_j, as that of a rounded output is, so is what the pair (j, j) adds as key and as query. Sums of
    the gradients of scores say by how much: that part is taken away again."""
    options = {
        name: torch.tensor(value, device=device) if name == "lengths" else value for name, value in MASKS[kind].items()
    }
    if "keys" in kind:
        options["key_mask"] = torch.arange(166, device=device).view(2, 83) % 3 > 0
    mask = Mask(**options)
    w, grad_out = (randn(2, 1, 83, 24, dtype=torch.float16, device=device) for _ in range(2))
    grad_out = grad_out.flip(-1)
    more = mask, 0.2 if kind == "dropped" else 0.0, torch.tensor([3])
    out, lse = attend(w, 0.4, *more)
    pairs, e = row_pairs(grad_out, out, lse, 0.4), randn(2, 1, 83, 1, device=device).flip(2)
    off = pairs + torch.cat([torch.zeros_like(e), 0.4 * e], -1)
    dw, other = (gradient(grad_out, w, one, 0.4, *more).double() for one in (pairs, off))
    allowed = attended(mask, 2, 83).to(device)
    scores = (w.double() @ w.double().mT * 0.4).masked_fill(~allowed, -math.inf)
    p = scores.softmax(-1).masked_fill(~allowed, 0)
    plain = 0.4 * (p.mT @ (e * w.double()) + e * (p @ w.double()))
    own = 0.8 * e * p.diagonal(dim1=-2, dim2=-1)[..., None] * w.double()
    # Roundings of both results, and of the factors of both products that make the difference.
    rounding = 2.0**-11 * (dw.norm() + other.norm() + plain.norm() + own.norm())
    assert (dw - other - plain + own).norm() < rounding < 0.02 * own.norm()


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
        window = data.draw(st.none() | st.integers(0, shape[2]), label="window")
        key_mask = None
        if data.draw(st.booleans(), label="key mask"):
            keys = st.lists(st.booleans(), min_size=shape[0] * shape[2], max_size=shape[0] * shape[2])
            key_mask = torch.tensor(data.draw(keys), device=device).view(shape[0], shape[2])
        mask = Mask(is_causal, window, lengths, key_mask=key_mask)
        check(w, grad_layout(grad_out), shape[-1] ** -0.5, mask, dropout, seed=sum(shape))


def test_out_of_any_strides(device: str) -> None:
    w, grad_out = randn(1, 2, 37, 24, device=device), randn(1, 2, 37, 24, device=device).flip(-1)
    out, lse = attend(w, 0.2)
    assert torch.equal(row_pairs(grad_out, amid_nan(out), lse, 0.2), row_pairs(grad_out, out, lse, 0.2))


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
    out, _ = attend(w, 0.25, CAUSAL)
    assert torch.equal(out[:, :, 0], w[:, :, 0])


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_same_bits_every_time(is_causal: bool, device: str) -> None:
    w, grad_out = randn(1, 1, 40, 32, device=device), randn(1, 1, 40, 32, device=device).flip(-1)
    key_mask = torch.arange(40, device=device)[None] % 3 > 0
    hiding = Mask(is_causal, 9, torch.tensor([33], device=device), packed((5, 20, 8), 40, device).spans, key_mask)
    for options in ((Mask(is_causal),), (hiding, 0.1, torch.tensor([3]))):
        first, second = (run(w, grad_out, 0.2, *options) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 0, 5, 16), (2, 2, 0, 16)], ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, ...], device: str) -> None:
    w = torch.zeros(shape, device=device)
    out, lse, dw = run(w, w, 0.25)
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
