"""Modules whose parameters bear the official state-dict names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crate_kernels.ista.api import ista
from crate_kernels.mssa.api import mssa


class MSSA(nn.Module):
    """Multi-head subspace self-attention with the official parameters: ``qkv.weight``, ``to_out.0.weight``, ``to_out.0.bias``.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        dim_head: width of one head. Official naming and default.
        dropout: probability on the attention weights and after the output projection; only 0 is supported.

    ``to_out`` is the identity where one head is as wide as the tokens, as in the official code. Formula, shapes and errors:
    ``crate_kernels.mssa``.
    """

    def __init__(self, dim: int, heads: int = 8, dim_head: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        if dropout:
            raise ValueError(f"dropout: expected 0, the only probability the fused attention supports, got {dropout}")
        self.heads = heads
        self.scale = dim_head**-0.5
        self.qkv = nn.Linear(dim, heads * dim_head, bias=False)
        projects = not (heads == 1 and dim_head == dim)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Identity()) if projects else nn.Identity()

    def forward(
        self,
        x: Tensor,
        return_attention: bool = False,
        return_key: bool = False,
        *,
        norm: nn.LayerNorm | None = None,
        residual: Tensor | None = None,
        subtract: bool = False,
    ) -> Tensor:
        """MSSA of x [batch, tokens, dim], after ``norm`` and added to (or taken from) ``residual`` where these are given.

        ``return_attention`` gives the attention weights [batch, heads, tokens, tokens] instead, ``return_key`` the
        projection [batch, tokens, heads * dim_head], as in the official encoder.
        """
        if return_attention or return_key:
            w = self.qkv(x if norm is None else norm(x))
            return w if return_key else self._attention(w)
        out = self.to_out[0] if isinstance(self.to_out, nn.Sequential) else None
        return mssa(
            x,
            self.qkv.weight,
            None if out is None else out.weight,
            None if out is None else out.bias,
            num_heads=self.heads,
            scale=self.scale,
            residual=residual,
            subtract=subtract,
            **_norm_arguments(norm),
        )

    def _attention(self, w: Tensor) -> Tensor:
        w = w.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return (torch.matmul(w, w.transpose(-1, -2)) * self.scale).softmax(dim=-1)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, scale={self.scale:.4g}"


class ISTA(nn.Module):
    """One ISTA step with the official parameter: ``weight`` [dim, dim].

    Args:
        dim: width of the tokens.
        step_size: eta of the proximal gradient step.
        lambd: sparsity weight. The official CRATE has 0.1, CRATE-MAE 0.5 by default.
        threshold: "relu" or "soft".

    Formula, shapes and errors: ``crate_kernels.ista``.
    """

    threshold = "relu"  # for official modules that ``accelerate`` turned into this class, which have no such attribute

    def __init__(self, dim: int, step_size: float = 0.1, lambd: float = 0.1, threshold: str = "relu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)
        self.step_size = step_size
        self.lambd = lambd
        self.threshold = threshold

    def forward(self, x: Tensor, *, norm: nn.LayerNorm | None = None) -> Tensor:
        """ISTA of x [..., dim], after ``norm`` where it is given."""
        return ista(
            x,
            self.weight,
            step_size=self.step_size,
            lambd=self.lambd,
            threshold=self.threshold,
            **_norm_arguments(norm),
        )

    def extra_repr(self) -> str:
        width = self.weight.shape[0]
        return f"dim={width}, step_size={self.step_size}, lambd={self.lambd}, threshold={self.threshold}"


def _norm_arguments(norm: nn.LayerNorm | None) -> dict[str, Tensor | float | None]:
    return {} if norm is None else dict(norm_weight=norm.weight, norm_bias=norm.bias, norm_eps=norm.eps)
