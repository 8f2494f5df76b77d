"""Shared-QKV attention: composed path, boundary and errors. Its kernels: test_shared_attention_triton.py."""

from __future__ import annotations

import pytest
import torch
from support import awkward_gradients, error, gradients
from torch import Tensor

import crate_kernels
from crate_kernels import precision, shared_qkv_attention
from crate_kernels.shared_attention import composed

SHAPES = [
    (2, 3, 1, 16),  # one token attends to itself
    (2, 12, 50, 64),  # a masked encoder's 50 tokens
    (1, 2, 197, 48),  # CRATE-MAE-Small's head width
    (1, 2, 65, 80),  # CRATE-MAE's largest named head width, odd tokens
    (0, 2, 5, 16),  # an empty batch
]


def truth(w: Tensor, scale: float, is_causal: bool) -> Tensor:
    """softmax(scale * w w^T) w, row by row, in float64."""
    rows = []
    for i in range(w.shape[2]):
        keys = w[:, :, : i + 1] if is_causal else w
        scores = torch.einsum("bhd,bhjd->bhj", w[:, :, i], keys) * scale
        rows.append(torch.einsum("bhj,bhjd->bhd", scores.softmax(-1), keys))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "composed"])
def test_agrees_with_the_formula_in_float64(implementation: str, shape: tuple[int, ...], is_causal: bool) -> None:
    w = torch.randn(shape, dtype=torch.float64)
    upstream = torch.randn(shape, dtype=torch.float64)
    with crate_kernels.use(implementation):
        found = gradients(lambda w: shared_qkv_attention(w, is_causal=is_causal), [w], upstream)
    for value, expected in zip(
        found, gradients(lambda w: truth(w, shape[3] ** -0.5, is_causal), [w], upstream), strict=True
    ):
        assert error(value, expected) < 1e-12


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kept", ["probabilities", "nothing"])
@pytest.mark.parametrize("budget", [1, 37 * 5, 37 * 37 * 2, 2**22])
def test_slices_of_rows_and_heads_add_up(
    monkeypatch: pytest.MonkeyPatch, budget: int, kept: str, is_causal: bool
) -> None:
    """The batched products, which other devices and CPUs that multiply in 16 bits run, whole and cut into slices."""
    monkeypatch.setattr(composed, "_SCORES_ON_CPU", budget)
    monkeypatch.setattr(composed, "composed_keeps", lambda *_: kept)
    monkeypatch.setattr(composed, "takes_flash_attention", lambda *_: False)
    w, upstream = torch.randn(2, 3, 37, 16, dtype=torch.float64), torch.randn(2, 3, 37, 16, dtype=torch.float64)
    found = gradients(lambda w: shared_qkv_attention(w, is_causal=is_causal), [w], upstream)
    for a, b in zip(found, gradients(lambda w: truth(w, 0.25, is_causal), [w], upstream), strict=True):
        assert error(a, b) < 1e-13


def test_what_is_kept_for_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(w: Tensor, keep: bool = True) -> Tensor:
        return torch.ops.crate_kernels.shared_attention_forward(w, 0.5, False, keep, "composed")[1]

    w = torch.randn(2, 3, 9, 16)
    assert error(kept(w), (w @ w.mT * 0.5).logsumexp(-1)) < 1e-6

    monkeypatch.setattr(precision, "CPU_PRODUCT_DTYPES", (torch.bfloat16,))
    w = w.bfloat16()
    assert error(kept(w), (w.float() @ w.float().mT * 0.5).softmax(-1)) < 1e-2
    assert kept(w, keep=False).numel() == kept(torch.randn(1, 1, 513, 4).bfloat16()).numel() == 0


@pytest.mark.parametrize("layout", ["features apart", "tokens apart", "one row for all", "overlapping rows"])
def test_any_strides(layout: str) -> None:
    """Flash attention takes rows of adjacent features; everything else has to reach it as a copy."""
    w = {
        "features apart": torch.randn(2, 3, 16, 7).mT,
        "tokens apart": torch.randn(7, 2, 3, 32).permute(1, 2, 0, 3)[..., ::2],
        "one row for all": torch.randn(2, 3, 1, 16).expand(2, 3, 7, 16),
        "overlapping rows": torch.randn(2, 3, 30).unfold(-1, 16, 2)[:, :, :7],
    }[layout]
    upstream = torch.randn(2, 3, 7, 16)
    with torch.no_grad():
        out, kept = torch.ops.crate_kernels.shared_attention_forward(w, 0.25, False, True, "composed")
        grad = torch.ops.crate_kernels.shared_attention_backward(upstream, w, out, kept, 0.25, False, "composed")
    expected = gradients(lambda w: truth(w, 0.25, False), [w.double().contiguous()], upstream.double())
    assert error(out, expected[0]) < 1e-6
    assert error(grad, expected[1]) < 1e-5


def test_heads_viewed_from_tokens_are_not_copied_back() -> None:
    tokens = torch.randn(2, 9, 3 * 16)
    out = shared_qkv_attention(tokens.unflatten(-1, (3, 16)).transpose(1, 2))
    merged = out.transpose(1, 2).flatten(2)
    assert merged.data_ptr() == out.data_ptr()


def test_gradients_as_they_arrive() -> None:
    w = torch.randn(1, 2, 7, 16)
    for name, upstream in awkward_gradients((1, 2, 7, 16), torch.float32, "cpu"):
        kept = upstream.clone()
        found = gradients(shared_qkv_attention, [w], upstream)[1]
        expected = gradients(lambda w: truth(w, 0.25, False), [w.double()], kept.double())[1]
        assert error(found, expected) < 1e-5, name
        assert torch.equal(upstream, kept), f"{name}: the gradient was written to"


def test_second_derivative_is_refused() -> None:
    w = torch.randn(1, 1, 3, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(shared_qkv_attention(w).square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            dict(w=torch.randn(2, 3, 4)),
            ValueError,
            r"w: expected \[batch, heads, tokens, head_dim\], got shape \(2, 3, 4\)",
        ),
        (dict(w=torch.ones(1, 1, 2, 4, dtype=torch.long)), TypeError, "w: expected a floating-point dtype"),
        (dict(w=[1.0]), TypeError, "w: expected a tensor"),
        (dict(w=torch.randn(1, 1, 0, 4)), ValueError, "w: expected at least one token"),
        (
            dict(w=torch.randn(1, 1, 2, 4), scale=-1.0),
            ValueError,
            "scale: expected a finite number above zero, got -1.0",
        ),
        (dict(w=torch.randn(1, 1, 2, 4), scale=float("nan")), ValueError, "scale: .* got nan"),
        (dict(w=torch.randn(1, 1, 2, 4), scale="big"), TypeError, "scale: expected a number, got str"),
    ],
)
def test_bad_input_names_the_argument(arguments: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        shared_qkv_attention(**arguments)
