"""What stands in for PyTorch's undocumented calls where these are gone: the same results."""

from __future__ import annotations

import pytest
import torch
from support import error

import crate_kernels
from crate_kernels import dispatch, library_products, private_torch
from crate_kernels.shared_attention import op


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch that has none of them."""
    for name in [name for name in vars(private_torch) if "HAS_" in name]:
        monkeypatch.setattr(private_torch, name, False)
    monkeypatch.setattr(op, "HAS_CPU_FLASH_ATTENTION", private_torch.HAS_CPU_FLASH_ATTENTION)
    monkeypatch.setattr(library_products, "ONEDNN_IS_FASTER", private_torch.HAS_ONEDNN_LINEAR)


def gone(*_: object, **__: object) -> None:
    raise AssertionError("called what is gone")


def test_operators(without: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for holder, name in (
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"),
        (torch.ops.aten, "_unsafe_view"),
        (torch, "_softmax_backward_data"),
    ):
        monkeypatch.setattr(holder, name, gone)
    w = torch.randn(2, 3, 300, 8, requires_grad=True)  # long enough for flash attention
    z, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    calls = {
        "attention": (lambda w: crate_kernels.shared_qkv_attention(w), [w]),
        "ista": (lambda z, weight: crate_kernels.ista(z, weight, step_size=0.1, lambd=0.1), [z, weight]),
        "mssa": (lambda z, weight: crate_kernels.mssa(z, weight, weight, num_heads=2), [z, weight]),
    }
    for name, (call, leaves) in calls.items():
        found = torch.autograd.grad(call(*leaves).square().sum(), leaves)
        with crate_kernels.use("reference"):
            exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
            wanted = torch.autograd.grad(call(*exact).square().sum(), exact)
        for one, other in zip(found, wanted, strict=True):
            assert error(one, other) < 1e-5, name


def test_softmax_backward(without: None) -> None:
    scores = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(scores)
    (wanted,) = torch.autograd.grad(scores.softmax(-1), scores, upstream)
    found = private_torch.softmax_backward_(upstream.clone(), scores.detach().softmax(-1))
    torch.testing.assert_close(found, wanted)


def test_a_forced_implementation_holds_in_its_thread(without: None) -> None:
    with crate_kernels.use("reference"):
        assert dispatch.choose("ista", torch.zeros(1), torch.float32) == "reference"
    assert dispatch.choose("ista", torch.zeros(1), torch.float32) == "composed"
