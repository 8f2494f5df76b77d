"""Stand-ins with the structure of the official modules: the attributes, parameter names and formulas, nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_kernels import ISTA, MSSA, DecoderStep, OvercompleteISTA


class Attention(nn.Module):
    def __init__(
        self, dim: int, heads: int, dim_head: int, dropout: float = 0.0, softmax: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.attend = nn.Softmax(dim=-1) if softmax else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, heads * dim_head, bias=False)
        projects = heads > 1 or dim_head != dim
        self.to_out = (
            nn.Sequential(nn.Linear(heads * dim_head, dim, bias=bias), nn.Dropout(dropout))
            if projects
            else nn.Identity()
        )

    def forward(self, x: Tensor, return_attention: bool = False, return_key: bool = False) -> Tensor:
        if return_key:
            return self.qkv(x)
        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attention = self.attend(w @ w.mT * self.scale)
        if return_attention:
            return attention
        return self.to_out((self.dropout(attention) @ w).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, lambd: float = 0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim) / dim**0.5)
        self.step_size, self.lambd = 0.1, lambd

    def forward(self, x: Tensor) -> Tensor:
        descent = x @ self.weight - x @ self.weight.t() @ self.weight
        return F.relu(x + self.step_size * descent - self.step_size * self.lambd)


class DecoderFeedForward(FeedForward):
    """The numbers are there, and not used."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Overcomplete(nn.Module):
    """CRATE-alpha's sparse step."""

    def __init__(self, dim: int, ratio: int = 4, decouple: bool = True, lmbda: float = 0.1) -> None:
        super().__init__()
        self.eta, self.lmbda, self.overcomplete_ratio, self.decouple, self.d = 0.1, lmbda, ratio, decouple, dim
        self.D = nn.Parameter(torch.randn(dim, ratio * dim) / dim**0.5)
        if decouple:
            self.D1 = nn.Parameter(torch.randn(dim, ratio * dim) / dim**0.5)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.eta * (x @ self.D) - self.eta * self.lmbda)
        z = F.relu(z - self.eta * ((z @ self.D.t() - x) @ self.D) - self.eta * self.lmbda)
        return z @ (self.D1 if self.decouple else self.D).t()


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Model(nn.Module):
    """Two encoder layers and a decoder layer of CRATE-MAE: six modules to swap."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            nn.ModuleList([PreNorm(dim, Attention(dim, heads, dim // heads)), PreNorm(dim, FeedForward(dim))])
            for _ in range(2)
        )
        self.decoder = nn.ModuleList([PreNorm(dim, DecoderFeedForward(dim)), PreNorm(dim, Attention(dim, 1, dim))])

    def forward(self, x: Tensor) -> Tensor:
        for attention, sparsify in self.encoder:
            x = sparsify(x + attention(x))
        densify, attention = self.decoder
        x = densify(x)
        return x - attention(x)


class Alpha(nn.Module):
    """A layer of CRATE-alpha."""

    def __init__(self, decouple: bool) -> None:
        super().__init__()
        self.attention = PreNorm(16, Attention(16, 2, 8, bias=False))
        self.sparsify = PreNorm(16, Overcomplete(16, decouple=decouple))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.sparsify(x)


class ISTAWithThreshold(FeedForward):
    """Our ISTA's setting more: which threshold."""

    def forward(self, x: Tensor) -> Tensor:
        if self.threshold == "relu":
            return super().forward(x)
        u = x + self.step_size * (x @ self.weight - x @ self.weight.t() @ self.weight)
        return u.sign() * F.relu(u.abs() - self.step_size * self.lambd)


def officially(model: nn.Module) -> nn.Module:
    """``model``, its modules of ours turned into stand-ins in place: it computes the official steps, one by one."""
    for module in model.modules():
        if isinstance(module, MSSA):
            module.__class__ = Attention
        elif isinstance(module, ISTA):
            module.__class__ = ISTAWithThreshold
        elif isinstance(module, DecoderStep):
            module.__class__, module.step_size, module.lambd = DecoderFeedForward, 0.1, 0.5
        elif isinstance(module, OvercompleteISTA):
            module.__class__ = Overcomplete
    return model
