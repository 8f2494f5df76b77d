"""Measures and inputs that several test files use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from crate_mae import Classifier, CrateMAE, classifier_of, create_model

SMALL = dict(embed_dim=32, depth=1, num_heads=2, decoder_depth=1, decoder_num_heads=2, patch_size=4, img_size=16)


# Of gradients that attention passes on: exp(score - lse) is as far off, relatively, as its float32 argument is absolutely: half
# a unit (4 eps) each of two numbers of up to 16, which sqrt(head_dim), the score of a random token with itself, does not pass.
# The official order subtracts the maximum instead.
LOG_SUM_EXP_ROUNDING = 8 * torch.finfo(torch.float32).eps


def error(found: Tensor, truth: Tensor) -> float:
    """Norm-relative error; NaN never passes a comparison with it."""
    found, truth = found.detach().cpu().double(), truth.detach().cpu().double()
    assert found.shape == truth.shape, f"shape {tuple(found.shape)}, expected {tuple(truth.shape)}"
    return ((found - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def a_few_roundings(dtype: torch.dtype) -> float:
    """A norm-relative margin for what differs by luck between two orders of the same operations.

    One rounding of a stored tensor is an error of 0.29 eps in norm. In 16 bits that is all there should be, and twice it
    is the margin; in float32 sums of hundreds of terms round too.
    """
    return torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 0.5)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output of ``function`` on fresh leaves made of ``inputs``, and its gradients for ``upstream``."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    out = function(*leaves)
    out.backward(upstream.to(out))
    return [out, *(leaf.grad for leaf in leaves)]


def pairs_hidden(
    batch: int,
    tokens: int,
    *,
    is_causal: bool = False,
    window: int | None = None,
    lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """True [batch, 1, tokens, tokens] where token i does not attend to j: pair by pair, as ``shared_qkv_attention`` says it."""
    found = torch.zeros(batch, 1, tokens, tokens, dtype=torch.bool)
    ends = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    sequence = [sum(end <= i for end in ends) for i in range(tokens)]
    for b, i, j in itertools.product(range(batch), range(tokens), range(tokens)):
        length = ends[-1] if lengths is None else int(lengths[b])
        found[b, 0, i, j] = (
            (is_causal and j > i)
            or (window is not None and abs(i - j) > window)
            or max(i, j) >= length
            or (key_mask is not None and not key_mask[b, j])
            or sequence[i] != sequence[j]
        )
    return found


def awkward_gradients(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Iterator[tuple[str, Tensor]]:
    """Gradients as they arrive in practice, by name: not only contiguous ones."""
    yield "contiguous", torch.randn(shape, dtype=dtype, device=device)
    yield "expanded from one number", torch.randn((), dtype=dtype, device=device).expand(shape)
    yield "transposed", torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype, device=device).transpose(-1, -2)
    yield "every second feature", torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device)[..., ::2]


def small_model(**overrides: object) -> CrateMAE:
    """A CRATE-MAE of one layer each way on images of 4 x 4 patches."""
    return create_model("crate_mae_tiny", **{**SMALL, **overrides})


SMALL_CLASSIFIER = dict(img_size=16, patch_size=4, embed_dim=32, num_heads=2, depth=2, num_classes=5)


def small_classifier(family: str, **overrides: Any) -> Classifier:
    """A classifier of two layers on images of 4 x 4 patches, its head no smaller than others where the family's is."""
    settings = SMALL_CLASSIFIER | overrides
    if family != "crate_mae":
        return create_model({"crate": "crate_tiny", "crate_alpha": "crate_alpha_base"}[family], **settings)
    classes, pool = settings.pop("num_classes"), settings.pop("pool", None)
    model = classifier_of(small_model(**settings), classes, pool=pool)
    torch.nn.init.normal_(model.head.weight)
    return model
