"""Shared-QKV attention: composed path, boundary and errors. Its kernels: test_shared_attention_triton.py."""

from __future__ import annotations

import pytest
import torch
from support import awkward_gradients, error, gradients
from torch import Tensor

import crate_kernels
from crate_kernels import shared_qkv_attention
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


def test_slices_of_rows_and_heads_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences are cut into slices and their probabilities computed again; nothing changes but rounding."""
    w, upstream = torch.randn(2, 3, 37, 16, dtype=torch.float64), torch.randn(2, 3, 37, 16, dtype=torch.float64)
    whole = gradients(lambda w: shared_qkv_attention(w, is_causal=True), [w], upstream)
    for budget in (1, 37 * 5, 37 * 37 * 2):
        monkeypatch.setattr(composed, "_SCORES_ON_CPU", budget)
        monkeypatch.setattr(composed, "keeps_probabilities", lambda w: False)
        for a, b in zip(
            gradients(lambda w: shared_qkv_attention(w, is_causal=True), [w], upstream), whole, strict=True
        ):
            assert error(a, b) < 1e-13


def test_probabilities_are_kept_for_a_backward_and_short_sequences_only() -> None:
    w = torch.randn(2, 3, 9, 16)

    def kept(w: Tensor, keep: bool) -> Tensor:
        return torch.ops.crate_kernels.shared_attention_forward(w, 0.5, False, keep, "composed")[1]

    assert error(kept(w, True), (w @ w.mT * 0.5).softmax(-1).flatten(0, 1)) < 1e-6
    assert kept(w, False).numel() == kept(torch.randn(1, 1, 513, 4), True).numel() == 0


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
