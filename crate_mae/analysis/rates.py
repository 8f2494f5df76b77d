"""How much space tokens take up: coding rates, sparsity, rank, and how far subspaces are apart.

Definitions and constants are those of the official CRATE code (``vis_utils``) and papers: White-Box Transformers via Sparse Rate
Reduction (arXiv 2306.01129), section 2, and Masked Completion via Structured Diffusion with White-Box Transformers (arXiv
2404.02446). All is computed in float64, whatever comes in, as the log-determinant of half-precision products easily becomes NaN,
and with the smaller of the two Gram matrices, which have the same determinant. Tokens that are all equal or all zero, and a
single token, have a value, too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

OFFICIAL_EPS = 0.01
"""The official code's quantisation error, which the papers write as epsilon squared."""

_LARGE = 1e8
"""Above this trace of d / (n eps) Z Z^T, the identity that is added to it is lost in rounding. For tokens of unit norm the trace
is d / eps."""


def coding_rate(tokens: Tensor, *, eps: float = OFFICIAL_EPS, normalize: bool = True) -> Tensor:
    """R(Z) = 1/2 logdet(I + d / (n eps) Z Z^T): nats that tokens need at a precision, as if they were Gaussian.

    The papers' R^c(Z; U_[K]) is ``coding_rate(w).sum(-1)``, where w [batch, K, n, d / K] are the projections of the tokens onto
    the subspaces of K heads.

    Args:
        tokens: Z, [..., n, d], floating point of any precision.
        eps: as the official code has it, 0.01.
        normalize: bring each token to unit norm first, as the official code does. A token of zeros stays one.

    Returns:
        float64 [...], 0 or more. On the device of ``tokens``, or on the CPU where that has no float64.

    Raises:
        TypeError: tokens are no floating-point tensor.
        ValueError: they are no [..., n, d], are not finite, or eps is not above 0.
    """
    z = _exact("tokens", tokens)
    if not eps > 0:
        raise ValueError(f"eps: expected a number above 0, got {eps}")
    count, width = z.shape[-2:]
    if count == 0 or width == 0:
        return z.new_zeros(z.shape[:-2])
    if normalize:
        z = _in_proportion(z, -1)
        z = z / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(1.0)  # 1 or more, or the token is zero
    scale = width / (count * eps)
    gram = _smaller_gram(z) * scale
    if (
        gram.diagonal(dim1=-2, dim2=-1).sum(-1) > _LARGE
    ).any():  # only for tokens that are not normalised, or a tiny eps
        singular = torch.linalg.svdvals(z)
        floor = singular.amax(-1, keepdim=True) * (max(count, width) * torch.finfo(z.dtype).eps)
        singular = torch.where(singular > floor, singular, 0.0) * math.sqrt(scale)
        return torch.hypot(singular, torch.ones_like(singular)).log().sum(-1)
    factor = torch.linalg.cholesky(gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def sparse_rate_reduction(
    tokens: Tensor, projected: Tensor, *, lambd: float = 0.0, eps: float = OFFICIAL_EPS
) -> Tensor:
    """R(Z) - R^c(Z; U_[K]) - lambda ||Z||_0, the objective that CRATE's layers ascend (arXiv 2306.01129, eq. 1).

    Args:
        tokens: Z, [batch, n, d].
        projected: onto the subspaces of the heads, [batch, heads, n, head_dim]; ``projections`` makes it.
        lambd: lambda, the weight of the number of entries that are not zero; 0 leaves the rate reduction.

    Returns:
        float64 [batch]. Errors as of ``coding_rate``.
    """
    nonzeros = (tokens != 0).sum((-2, -1))
    rates = coding_rate(tokens, eps=eps) - coding_rate(projected, eps=eps).sum(-1)
    return rates - lambd * nonzeros.to(rates)


def projections(tokens: Tensor, weight: Tensor, heads: int) -> Tensor:
    """U_k^T Z of each head: tokens [batch, n, d] times ``weight`` [heads * head_dim, d], as [batch, heads, n, head_dim].

    Raises:
        ValueError: the rows of weight are not divisible by heads.
    """
    if heads < 1 or weight.shape[0] % heads:
        raise ValueError(f"heads: expected a divisor of the {weight.shape[0]} rows of weight, got {heads}")
    return F.linear(tokens, weight).unflatten(-1, (heads, -1)).transpose(-3, -2)


def zero_fraction(tokens: Tensor) -> Tensor:
    """The fraction of entries of tokens [..., n, d] that are exactly zero: float64 [...], the official code's sparsity.

    The papers plot the fraction of the others, ||Z||_0 / (d n). Without tokens it is 0. Errors as of ``coding_rate``.
    """
    zeros = (_exact("tokens", tokens) == 0).double()
    return zeros.sum((-2, -1)) / max(1, math.prod(zeros.shape[-2:]))


def effective_rank(tokens: Tensor) -> Tensor:
    """exp(H(p)) with p the singular values of tokens [..., n, d] over their sum: float64 [...] (Roy & Vetterli, 2007).

    From 1 to min(n, d), the number of dimensions if all are used equally; 0 for tokens that are all zero. Errors as of
    ``coding_rate``.
    """
    z = _exact("tokens", tokens)
    if 0 in z.shape[-2:]:
        return z.new_zeros(z.shape[:-2])
    z = _in_proportion(z, (-2, -1))
    squares = torch.linalg.eigvalsh(_smaller_gram(z))
    floor = squares.amax(-1, keepdim=True) * (squares.shape[-1] * torch.finfo(z.dtype).eps)
    singular = torch.where(squares > floor, squares, 0).clamp_min(0).sqrt()
    total = singular.sum(-1, keepdim=True)
    shares = singular / total.clamp_min(torch.finfo(z.dtype).tiny)
    return torch.where(total[..., 0] > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)


def subspace_coherence(weight: Tensor, heads: int) -> Tensor:
    """How far the subspaces of heads overlap: float64 [heads, heads], the mean squared cosine of their principal angles.

    It is ||Q_k^T Q_l||_F^2 / min(dim k, dim l), with Q_k an orthonormal basis of the span of U_k: 0 for orthogonal subspaces,
    which the papers assume, 1 where one contains the other, and about head_dim / d for random ones. A subspace of dimension 0
    has coherence 0 with all subspaces, itself included.

    Args:
        weight: of the projection, [heads * head_dim, d]: the U_k^T one below the other, ``qkv.weight``.

    Raises:
        TypeError, ValueError: as of ``coding_rate`` and ``projections``.
    """
    rows = _exact("weight", weight)
    if rows.ndim != 2 or heads < 1 or rows.shape[0] % heads:
        raise ValueError(
            f"heads: expected a divisor of the rows of weight [heads * head_dim, d] {tuple(rows.shape)}, got {heads}"
        )
    bases = [_orthonormal_rows(subspace) for subspace in rows.chunk(heads)]
    coherence = rows.new_zeros(heads, heads)
    for k, first in enumerate(bases):
        for other, second in enumerate(bases):
            coherence[k, other] = (first @ second.mT).square().sum() / max(1, min(len(first), len(second)))
    return coherence.clamp_max(1.0)


def mean_coherence(weight: Tensor, heads: int) -> float:
    """The mean of ``subspace_coherence`` over pairs of different heads; 0 where there is one head."""
    if heads == 1:
        return 0.0
    coherence = subspace_coherence(weight, heads)
    return (coherence.sum() - coherence.trace()).item() / (heads * (heads - 1))


def relative_update(before: Tensor, after: Tensor) -> Tensor:
    """||after - before||_F / ||before||_F of tokens [..., n, d]: float64 [...].

    0 where nothing changed, also where all tokens are zero; 1 where only ``before`` is all zero.

    Raises:
        TypeError, ValueError: as of ``coding_rate``; or the two have other shapes.
    """
    old, new = _exact("before", before), _exact("after", after)
    if old.shape != new.shape:
        raise ValueError(f"after: expected the shape of before, {tuple(old.shape)}, got {tuple(new.shape)}")
    if 0 in old.shape[-2:]:
        return old.new_zeros(old.shape[:-2])
    old, new = _in_proportion(torch.stack([old, new]), (0, -2, -1))
    norm, change = torch.linalg.matrix_norm(old), torch.linalg.matrix_norm(new - old)
    return torch.where(norm > 0, change / torch.where(norm > 0, norm, 1.0), (change > 0).to(change))


def _orthonormal_rows(subspace: Tensor) -> Tensor:
    """An orthonormal basis of the span of the rows [p, d]: [rank, d]."""
    _, singular, right = torch.linalg.svd(subspace, full_matrices=False)
    if singular.numel() == 0:
        return right
    return right[singular > singular.max() * (max(subspace.shape) * torch.finfo(subspace.dtype).eps)]


def _in_proportion(z: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """z, scaled so that the largest entry along ``dim`` is 1: squares of huge and of tiny entries stay within range."""
    largest = z.abs().amax(dim, keepdim=True)
    return z / torch.where(largest > 0, largest, 1.0)


def _smaller_gram(z: Tensor) -> Tensor:
    return z @ z.mT if z.shape[-2] <= z.shape[-1] else z.mT @ z


def _float64_device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def _exact(name: str, tensor: Tensor) -> Tensor:
    """``tensor`` [..., n, d] in float64."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a floating-point tensor [..., n, d], got {got}")
    if tensor.ndim < 2:
        raise ValueError(f"{name}: expected [..., n, d], got shape {tuple(tensor.shape)}")
    exact = tensor.to(_float64_device(tensor), torch.float64)
    # A finite sum has finite terms, and is ten times faster than isfinite on each of them.
    if not exact.sum().isfinite() and not exact.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinite ones")
    return exact
