"""Tokens in colour: the principal components of many images' tokens, each a colour channel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TAILS = (0.01, 0.99)
"""The quantiles of a component that become the ends of its colour channel, so that single tokens do not bleach the others."""


class PrincipalComponents(NamedTuple):
    """Directions of the most variance, and the range that tokens have along each. ``of`` makes it; all float64, on the CPU.

    mean [d]; directions [count, d], of unit norm; least, most [count]; variances [count], the share of each in the whole.
    """

    mean: Tensor
    directions: Tensor
    least: Tensor
    most: Tensor
    variances: Tensor

    @classmethod
    def of(cls, tokens: Tensor, count: int = 3) -> PrincipalComponents:
        """Fitted to tokens [..., d], such as those of all patches of several images.

        The same tokens have the same components, whatever their order: the entry of the largest size in each direction is
        positive. Where there are fewer directions than ``count``, as of equal tokens, the others are zero.

        Raises:
            ValueError: there are no tokens, or they are not finite.
        """
        flat = tokens.detach().to("cpu", torch.float64).flatten(0, -2)
        if len(flat) == 0 or not flat.isfinite().all():
            raise ValueError(f"tokens: expected one or more [..., d], all finite, got shape {tuple(tokens.shape)}")
        mean = flat.mean(0)
        centred = flat - mean
        values, vectors = torch.linalg.eigh(centred.mT @ centred / len(flat))
        values, directions = values.flip(0).clamp_min(0), vectors.mT.flip(0)
        # Below this, variances are rounding of the mean's size, and directions chance.
        floor = (flat.square().mean(0).sum() + values[0]) * (len(values) * torch.finfo(torch.float64).eps)
        directions = directions * (values > floor)[:, None]
        shares = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
        missing = max(0, count - len(values))
        directions = torch.cat([directions[:count], directions.new_zeros(missing, directions.shape[1])])
        shares = torch.cat([shares[:count], shares.new_zeros(missing)])
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        directions = torch.where(largest < 0, -directions, directions)
        along = centred @ directions.mT
        least, most = torch.quantile(along, along.new_tensor(_TAILS), dim=0)
        return cls(mean, directions, least, most, shares)

    def colours(self, tokens: Tensor) -> Tensor:
        """Tokens [..., d] as colours, float64 [..., count] from 0 to 1; 0.5 along a direction in which none differ."""
        along = (tokens.detach().to("cpu", torch.float64) - self.mean) @ self.directions.mT
        span = self.most - self.least
        scaled = (along - self.least) / torch.where(span > 0, span, 1.0)
        return torch.where(span > 0, scaled.clamp(0, 1), 0.5)
