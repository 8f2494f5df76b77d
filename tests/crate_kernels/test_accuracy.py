"""Error against float64 no larger than the official order's at equal storage dtypes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from support import error, gradients
from torch import Tensor

import crate_kernels
from crate_kernels import cpu, ista, shared_qkv_attention

CASES = [
    pytest.param("composed", torch.float16, id="composed-float16"),
    pytest.param("composed", torch.bfloat16, id="composed-bfloat16"),
    pytest.param("triton", torch.float16, id="triton-float16"),
    pytest.param("triton", torch.bfloat16, id="triton-bfloat16", marks=pytest.mark.gpu),
]


def _compare(
    operator: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor, implementation: str, names: list[str]
) -> None:
    """Errors of one implementation and of the official order against float64, from the same stored inputs."""
    with crate_kernels.use("reference"):
        truth = gradients(operator, [value.double() for value in inputs], upstream.double())
        official = gradients(operator, inputs, upstream)
    with crate_kernels.use(implementation):
        ours = gradients(operator, inputs, upstream)
    compared = [results[: len(names)] for results in (ours, official, truth)]
    for name, found, plain, exact in zip(names, *compared, strict=True):
        assert found.dtype == plain.dtype == inputs[0].dtype
        print(f"{name}: {error(found, exact):.2e}, official order {error(plain, exact):.2e}")
        # Equal results give equal errors, up to the order in which the norm itself is summed.
        assert error(found, exact) <= error(plain, exact) * (1 + 1e-9), name


@pytest.fixture(params=[(), (torch.float16, torch.bfloat16)], ids=["products in float32", "in 16 bits"], autouse=True)
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composed products in float32, and in the operands' own dtype as on CPUs with instructions for it."""
    monkeypatch.setattr(cpu, "CPU_PRODUCT_DTYPES", request.param)


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["weights as initialised", "weights twice as large"])
@pytest.mark.parametrize(("tokens", "width"), [(197, 96), (50, 96)], ids=["one product", "two products"])
@pytest.mark.parametrize(("implementation", "dtype"), CASES)
def test_ista(implementation: str, dtype: torch.dtype, tokens: int, width: int, scale: float, device: str) -> None:
    weight = torch.empty(width, width).uniform_(-1, 1) * (6 / width) ** 0.5 * scale
    inputs = [torch.randn(tokens, width).to(device, dtype), weight.to(device, dtype)]
    # Where rounding alone decides on which side of the threshold an element falls, its gradient is all or nothing in either
    # order, by luck: no gradient comes from there.
    x, w = (value.double() for value in inputs)
    distance = (x + 0.1 * (x @ w - x @ w.T @ w) - 0.05).abs()
    upstream = torch.randn_like(inputs[0]) * (distance > 0.05)
    assert (upstream != 0).double().mean() > 0.9
    _compare(lambda x, w: ista(x, w, lambd=0.5), inputs, upstream, implementation, ["y", "dx", "dW"])


@pytest.mark.parametrize("shape", [(1, 2, 197, 64), (1, 2, 50, 48)], ids=str)
@pytest.mark.parametrize(("implementation", "dtype"), CASES)
def test_shared_attention(implementation: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    w = torch.randn(shape).to(device, dtype)
    _compare(shared_qkv_attention, [w], torch.randn_like(w), implementation, ["out", "dw"])


@pytest.mark.parametrize("option", ["causal", "window", "packed", "keys", "scales"])
@pytest.mark.parametrize(("implementation", "dtype"), CASES)
def test_masked_attention(implementation: str, dtype: torch.dtype, option: str, device: str) -> None:
    options = {
        "causal": dict(is_causal=True),
        "window": dict(window=24),
        "packed": dict(cu_seqlens=torch.tensor([0, 50, 99, 180], device=device)),
        "scales": dict(scale=torch.tensor([0.1, 0.2], device=device)),
        "keys": dict(key_mask=torch.arange(197, device=device)[None] % 3 > 0),
    }
    w = torch.randn(1, 2, 197, 64).to(device, dtype)
    attend = functools.partial(shared_qkv_attention, **options[option])
    _compare(attend, [w], torch.randn_like(w), implementation, ["out", "dw"])
