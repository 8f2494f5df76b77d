"""MSSA: projection, attention, projection, with its LayerNorm and residual."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import LOG_SUM_EXP_ROUNDING, a_few_roundings, error, gradients
from torch import Tensor

import crate_kernels
from crate_kernels import MSSA, mssa
from crate_kernels.layer_norm import layer_norm


def parameters(width: int = 12, heads: int = 3, head_dim: int = 4, **options: object) -> dict[str, Tensor]:
    inner = heads * head_dim
    return dict(
        qkv_weight=torch.randn(inner, width, **options) / width**0.5,
        out_weight=torch.randn(width, inner, **options) / inner**0.5,
        out_bias=torch.randn(width, **options),
    )


def truth(
    x: Tensor, qkv: Tensor, out: Tensor | None, bias: Tensor | None, heads: int, is_causal: bool = False
) -> Tensor:
    """Head by head: softmax(w w^T / sqrt(d)) w, side by side, projected."""
    parts = []
    for projection in qkv.chunk(heads):
        w = x @ projection.T
        scores = w @ w.mT / projection.shape[0] ** 0.5
        if is_causal:
            scores = scores + torch.full_like(scores[0], float("-inf")).triu(1)
        parts.append(scores.softmax(-1) @ w)
    merged = torch.cat(parts, dim=-1)
    return merged if out is None else merged @ out.T + (0 if bias is None else bias)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "composed"])
def test_agrees_with_the_formula_in_float64(implementation: str, is_causal: bool) -> None:
    p = parameters(dtype=torch.float64)
    x, upstream = torch.randn(2, 7, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    inputs = [x, p["qkv_weight"], p["out_weight"], p["out_bias"]]
    with crate_kernels.use(implementation):
        found = gradients(lambda *a: mssa(*a, num_heads=3, is_causal=is_causal), inputs, upstream)
    expected = gradients(lambda *a: truth(*a, 3, is_causal), inputs, upstream)
    assert max(map(error, found, expected)) < 1e-12


@pytest.mark.parametrize("residual", ["none", "x", "another"])
@pytest.mark.parametrize(
    ("norm", "subtract", "is_causal"), [(False, False, True), (True, False, False), (True, True, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton(dtype: torch.dtype, norm: bool, subtract: bool, is_causal: bool, residual: str, device: str) -> None:
    """Three launches forward, with all that rides along, and every gradient; width, tokens and heads that no tile divides."""
    if subtract and residual == "none":
        pytest.skip("there is nothing to subtract from")
    p = parameters(40, 2, 24)
    inputs = [torch.randn(2, 37, 40), *p.values(), 1 + torch.randn(40) / 4, torch.randn(40) / 4, torch.randn(2, 37, 40)]
    inputs = [value.to(device, dtype) for value in inputs]
    upstream = torch.randn(2, 37, 40).to(device, dtype)

    def operator(x, qkv, out, bias, gamma, beta, other):
        arguments = dict(norm_weight=gamma, norm_bias=beta) if norm else {}
        past = {"none": None, "x": x, "another": other}[residual]
        return mssa(x, qkv, out, bias, num_heads=2, is_causal=is_causal, skip=past, subtract=subtract, **arguments)

    with crate_kernels.use("reference"):
        truth = gradients(operator, [value.double() for value in inputs], upstream.double())
        official = gradients(operator, inputs, upstream)
    with crate_kernels.use("triton"):
        found = gradients(operator, inputs, upstream)
    through_attention = (1, 2, 5, 6)  # of x, of the projection before it, and of the LayerNorm
    for place, (ours, plain, exact) in enumerate(zip(found, official, truth, strict=True)):
        assert (ours is None) == (exact is None)
        if exact is not None:
            assert ours.dtype == dtype
            margin = a_few_roundings(dtype) + LOG_SUM_EXP_ROUNDING * (place in through_attention)
            assert error(ours, exact) <= 1.25 * error(plain, exact) + margin


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["x", "weights"])
def test_triton_computes_only_the_gradients_asked_for(wanted: tuple[bool, bool], device: str) -> None:
    p, x = parameters(32, 2, 16, device=device), torch.randn(2, 7, 32, device=device)
    x.requires_grad_(wanted[0])
    for parameter in p.values():
        parameter.requires_grad_(wanted[1])
    with crate_kernels.use("triton"):
        mssa(x, *p.values(), num_heads=2, skip=x).sum().backward()
    assert (x.grad is not None, *(v.grad is not None for v in p.values())) == (wanted[0], *[wanted[1]] * 3)
    for value in (x, *p.values()):
        value.requires_grad_()
    expected = gradients(
        lambda *a: a[0] + truth(*a, 2), [v.double() for v in (x, *p.values())], torch.ones_like(x).double()
    )
    for value, exact in zip((x, *p.values()), expected[1:], strict=True):
        assert value.grad is None or error(value.grad, exact) < 1e-5


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "composed"])
def test_layer_norm_before_and_residual_after(implementation: str, subtract: bool) -> None:
    p = parameters(dtype=torch.float64)
    x, gamma, beta = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 12), (12,), (12,)))
    upstream = torch.randn_like(x)

    def ours(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        norm = dict(norm_weight=gamma, norm_bias=beta, norm_eps=1e-3)
        return mssa(x, *p.values(), num_heads=3, **norm, skip=x, subtract=subtract)

    def plain(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gamma + beta
        return x + (-1 if subtract else 1) * truth(normed, *p.values(), 3)

    with crate_kernels.use(implementation):
        found = gradients(ours, [x, gamma, beta], upstream)
    assert max(map(error, found, gradients(plain, [x, gamma, beta], upstream))) < 1e-12


@pytest.mark.parametrize("implementation", ["reference", "composed", "triton"])
def test_padding_is_passed_by(implementation: str) -> None:
    """Each sample as if it were alone and as long as its length says; gradients too."""
    dtype = torch.float32 if implementation == "triton" else torch.float64
    p, x = parameters(32, 2, 16, dtype=dtype), torch.randn(3, 9, 32, dtype=dtype)
    lengths, upstream = torch.tensor([9, 1, 6]), torch.randn(3, 9, 32, dtype=dtype)
    real = torch.arange(9) < lengths[:, None]
    upstream = upstream * real[..., None]
    inputs = [x, *p.values()]
    with crate_kernels.use(implementation):
        found = gradients(lambda *a: mssa(*a, num_heads=2, lengths=lengths), inputs, upstream)

    def alone(x: Tensor, *weights: Tensor) -> Tensor:
        rows = [truth(x[i : i + 1, :n], *weights, 2) for i, n in enumerate(lengths)]
        return torch.cat([F.pad(row, (0, 0, 0, 9 - row.shape[1])) for row in rows])

    expected = gradients(alone, [value.double() for value in inputs], upstream.double())
    assert error(found[0] * real[..., None], expected[0]) < 1e-6
    for value, exact in zip(found[1:], expected[1:], strict=True):
        assert error(value, exact) < 1e-5


HIDING = {
    "window": dict(window=3),
    "keys": dict(key_mask=torch.arange(11)[None].expand(2, 11) % 4 > 1, is_causal=True),
    "packed": dict(cu_seqlens=torch.tensor([0, 4, 4, 9])),
    "padded window": dict(window=2, lengths=torch.tensor([11, 6])),
    "a scale for each head": dict(scale=torch.tensor([0.2, 0.6])),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("options", HIDING.values(), ids=HIDING.keys())
@pytest.mark.parametrize("implementation", ["composed", "triton"])
def test_masks(implementation: str, options: dict, recompute: bool, device: str) -> None:
    """What attention's own tests prove of masks reaches it, in the one operator too, with all that rides along."""
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()} | {"recompute": recompute}
    batch = 1 if "cu_seqlens" in options else 2
    gamma, beta = 1 + torch.randn(32) / 4, torch.randn(32) / 4
    inputs = [one.to(device) for one in (torch.randn(batch, 11, 32), *parameters(32, 2, 16).values(), gamma, beta)]
    upstream = torch.randn(batch, 11, 32, device=device)

    def operator(x, qkv, out, bias, gamma, beta):
        norm = dict(norm_weight=gamma, norm_bias=beta)
        return mssa(x, qkv, out, bias, num_heads=2, skip=x, subtract=True, **norm, **options)

    with crate_kernels.use("reference"):
        exact = gradients(operator, [value.double() for value in inputs], upstream.double())
    with crate_kernels.use(implementation):
        found = gradients(operator, inputs, upstream)
    for ours, theirs in zip(found, exact, strict=True):
        assert error(ours, theirs) < 5e-6


@pytest.mark.parametrize("implementation", ["reference", "composed", "triton"])
def test_dropout_in_training_only_and_by_the_seed(implementation: str) -> None:
    module, x = MSSA(32, heads=2, dim_head=16, dropout=0.25), torch.randn(2, 9, 32)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(x)

    with crate_kernels.use(implementation), torch.no_grad():
        assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
        zeros = (run(3) == 0).float().mean()
        assert 0.1 < zeros < 0.4, "after the projection a quarter is dropped"
        plain = mssa(x, module.qkv.weight, module.to_out[0].weight, module.to_out[0].bias, num_heads=2)
        mean = torch.stack([run(seed) for seed in range(24)]).mean(
            0
        )  # off by sqrt(0.25 / 0.75 / 24), a bare mask by 0.27
        assert error(mean, plain) < 0.2, "what is kept is scaled up, so that the mean stays"
        module.eval()
        assert torch.equal(run(1), plain)


def test_identity_projection_of_one_head_as_wide_as_the_model() -> None:
    x, qkv = torch.randn(2, 5, 8), torch.randn(8, 8) / 3
    assert error(mssa(x, qkv, None, num_heads=1), truth(x.double(), qkv.double(), None, None, 1)) < 1e-6


def test_autocast_gives_the_autocast_dtype_and_keeps_a_float32_residual() -> None:
    p, x = parameters(), torch.randn(2, 5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert mssa(x, *p.values(), num_heads=3).dtype == torch.bfloat16
        assert mssa(x, *p.values(), num_heads=3, skip=x).dtype == torch.float32


def test_layer_norm_of_16_bit_tokens_before_a_product_is_the_official_one() -> None:
    """Under a CPU's autocast a LayerNorm module reads and writes 16 bits; between products ours does, bit for bit."""
    inputs = [(3 + torch.randn(2, 9, 48)).bfloat16(), torch.randn(48), torch.randn(48)]
    upstream = torch.randn(2, 9, 48).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(lambda *a: layer_norm(*a, 1e-5, before=torch.bfloat16), inputs, upstream)
        official = gradients(lambda x, gamma, beta: F.layer_norm(x, (48,), gamma, beta), inputs, upstream)
        assert layer_norm(*inputs, 1e-5).dtype == torch.float32
    assert found[0].dtype == torch.bfloat16
    assert all(map(torch.equal, found, official))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(num_heads=5), ValueError, "num_heads: expected a divisor of the projected width 12, got 5"),
        (dict(num_heads=3.0), TypeError, "num_heads: expected an int, got float"),
        (dict(x=torch.randn(2, 0, 12)), ValueError, "x: expected at least one token"),
        (dict(num_heads=0), ValueError, "num_heads: expected a divisor"),
        (dict(x=torch.randn(5, 12)), ValueError, r"x: expected \[batch, tokens, width\], got shape \(5, 12\)"),
        (dict(qkv_weight=torch.randn(12, 11)), ValueError, r"qkv_weight: expected \[heads_width, width\] \(12, 12\)"),
        (dict(out_weight=torch.randn(12, 11)), ValueError, r"out_weight: expected"),
        (dict(out_bias=torch.randn(11)), ValueError, r"out_bias: expected \[out_width\] \(12,\), got shape \(11,\)"),
        (dict(out_weight=None), ValueError, "out_bias: given without out_weight"),
        (dict(skip=torch.randn(2, 5, 11)), ValueError, "skip: expected"),
        (dict(subtract=True), ValueError, "subtract: given without a skip"),
        (dict(qkv_weight=torch.randn(12, 12).half()), TypeError, "qkv_weight: expected torch.float32 like x"),
    ],
)
def test_bad_input_names_the_argument(change: dict, kind: type[Exception], message: str) -> None:
    arguments = {"x": torch.randn(2, 5, 12), **parameters(), "num_heads": 3, **change}
    with pytest.raises(kind, match=message):
        mssa(**arguments)


def test_triton_takes_an_empty_batch_and_a_float64_residual(device: str) -> None:
    p, x = parameters(32, 2, 16, device=device), torch.randn(2, 7, 32, device=device)
    with crate_kernels.use("triton"):
        assert mssa(x[:0], *p.values(), num_heads=2).shape == (0, 7, 32)
        past = torch.randn(2, 7, 32, dtype=torch.float64, device=device)
        found = gradients(lambda x, past: mssa(x, *p.values(), num_heads=2, skip=past), [x, past], past)
    assert found[0].dtype == found[2].dtype == torch.float64
    assert error(found[2], past) == 0


def test_triton_takes_a_skip_of_fewer_bits(device: str) -> None:
    p, x = parameters(32, 2, 16, device=device), torch.randn(2, 7, 32, device=device)
    past = torch.randn(2, 7, 32, device=device).half()
    with crate_kernels.use("triton"):
        found = mssa(x, *p.values(), num_heads=2, skip=past)
    assert found.dtype == torch.float32
    assert error(found, mssa(x, *p.values(), num_heads=2) + past) < 1e-6
