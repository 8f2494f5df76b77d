"""Measures of attention maps: how concentrated they are, how far they reach, and which patches they pick out."""

from __future__ import annotations

import torch
from torch import Tensor

from crate_mae.analysis.rates import _exact


def attention_entropy(attention: Tensor) -> Tensor:
    """The mean over queries i of -sum_j A_ij log A_ij, in nats: float64 [...] for attention A [..., n, n].

    0 where each token attends to one token, log n where it attends to all equally.

    Raises:
        ValueError: attention is negative somewhere, as of a module without softmax.
    """
    return torch.special.entr(_attention(attention)).sum(-1).mean(-1)


def attention_distance(attention: Tensor, grid: tuple[int, int], patch_size: int = 1) -> Tensor:
    """The mean distance in pixels from patches to the patches they attend to: float64 [...] for attention [..., n, n].

    It is sum_j A_ij |position_i - position_j| between centres of patches, averaged over the patches i. A is the attention
    between patches, each row divided by its sum (Dosovitskiy et al., arXiv 2010.11929, figure 7).

    Args:
        attention: [..., n, n], the last rows * columns tokens those of the patches, row by row.
        grid: (rows, columns) of patches.
        patch_size: side of a patch in pixels; 1 leaves the distance in patches.

    Raises:
        ValueError: there are fewer tokens than patches, or attention is negative somewhere.
    """
    rows, columns = grid
    patches = rows * columns
    if attention.shape[-1] < patches or min(grid) < 1:
        raise ValueError(
            f"grid: expected at most the {attention.shape[-1]} tokens of attention as patches, got {rows} x {columns}"
        )
    among = _attention(attention)[..., -patches:, -patches:]
    among = among / among.sum(-1, keepdim=True).clamp_min(torch.finfo(among.dtype).tiny)
    position = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(among)
    return (among * torch.cdist(position, position)).sum(-1).mean(-1) * patch_size


def _attention(attention: Tensor) -> Tensor:
    exact = _exact("attention", attention)
    if exact.numel() and exact.amin() < 0:
        raise ValueError(f"attention: expected no negative values, got {exact.amin().item():.3g}")
    return exact


def most_attended(attention: Tensor, mass: float = 0.6) -> Tensor:
    """The fewest patches that together have a share of the attention, as a mask: emergent segmentation as DINO shows it.

    (Caron et al., arXiv 2104.14294, figure 3; of CRATE, Yu et al., arXiv 2308.16271.)

    Args:
        attention: [..., patches], of one query to each patch; 0 or more.
        mass: the share, above 0 and at most 1.

    Returns:
        bool [..., patches]; the patch attended to most is always True.

    Raises:
        ValueError: mass is out of range.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass: expected above 0 and at most 1, got {mass}")
    ordered, order = attention.double().sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = before < mass * ordered.sum(-1, keepdim=True)
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)
