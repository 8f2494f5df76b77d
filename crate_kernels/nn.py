"""Modules whose parameters bear the official state-dict names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crate_kernels.ista.api import combine, ista
from crate_kernels.mssa.api import mssa
from crate_kernels.norm_linear.api import norm_linear
from crate_kernels.overcomplete.api import overcomplete_ista
from crate_kernels.products.operand import norm_options


class MSSA(nn.Module):
    """Multi-head subspace self-attention with the official parameters: ``qkv.weight``, ``to_out.0.weight``, ``to_out.0.bias``.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        dim_head: width of one head. Official naming and default.
        dropout: probability, below 1, on the attention weights and after the output projection, in training. Where it is
            above 0 the projections are the library's, around the attention kernel.
        out_bias: whether the output projection has a bias. CRATE-alpha's has none.

    ``to_out`` is the identity where one head is as wide as the tokens, as in the official code. Formula, shapes and errors:
    ``crate_kernels.mssa``.
    """

    def __init__(
        self, dim: int, heads: int = 8, dim_head: int = 64, dropout: float = 0.0, out_bias: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability of at least 0 and below 1, got {dropout}")
        self.heads = heads
        self.scale = dim_head**-0.5
        self.qkv = nn.Linear(dim, heads * dim_head, bias=False)
        projects = not (heads == 1 and dim_head == dim)
        out = nn.Linear(heads * dim_head, dim, bias=out_bias)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Sequential(out, nn.Dropout(dropout)) if projects else nn.Identity()

    def forward(
        self,
        x: Tensor,
        return_attention: bool = False,
        return_key: bool = False,
        *,
        norm: nn.LayerNorm | None = None,
        skip: Tensor | None = None,
        subtract: bool = False,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """MSSA of x [batch, tokens, dim], after ``norm`` and added to (or taken from) ``skip`` where these are given.
        With ``lengths`` [batch], tokens from there on are padding.

        ``return_attention`` gives the attention weights [batch, heads, tokens, tokens] instead, ``return_key`` the
        projection [batch, tokens, heads * dim_head], as in the official encoder.
        """
        if return_attention or return_key:
            w = self.qkv(x if norm is None else norm(x))
            return w if return_key else self._attention(w)
        # Not every module that ``accelerate`` turned into this class has a dropout.
        dropout = self.dropout.p if self.training and hasattr(self, "dropout") else 0.0
        out = self.to_out[0] if isinstance(self.to_out, nn.Sequential) else None
        projections = self.qkv.weight, None if out is None else out.weight, None if out is None else out.bias
        options = dict(skip=skip, subtract=subtract, lengths=lengths, dropout=dropout, **norm_options(norm))
        return mssa(x, *projections, num_heads=self.heads, scale=self.scale, **options)

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

    For inference ``freeze()`` makes the matrix that the tokens are multiplied with once, instead of at every call. Formula,
    shapes and errors: ``crate_kernels.ista``.
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
        """ISTA of x [..., dim], after ``norm`` where it is given.

        Raises:
            RuntimeError: the module is frozen, and the weight would get no gradient though it asks for one.
        """
        combined = getattr(self, "combined", None)
        if combined is not None and torch.is_grad_enabled() and self.weight.requires_grad:
            raise RuntimeError(
                "weight: it asks for a gradient, which a frozen ISTA cannot give; call unfreeze(), or run under torch.no_grad()"
            )
        numbers = dict(step_size=self.step_size, lambd=self.lambd, threshold=self.threshold)
        return ista(x, self.weight, combined=combined, **numbers, **norm_options(norm))

    def freeze(self) -> None:
        """Take the weight for a constant: keep ``combine(weight)`` and multiply with that from now on.

        It lies in the buffer ``combined``, which moves with the module and is no part of its state dict. ``load_state_dict``
        makes it again; whoever changes the weight in another way calls ``freeze()`` again. Cast the module before: a cast
        after it would round the buffer, too.
        """
        self.unfreeze()
        self.register_buffer("combined", combine(self.weight), persistent=False)

    def unfreeze(self) -> None:
        """Forget what ``freeze`` made. Without effect on a module that is not frozen."""
        if "combined" in self._buffers:
            del self.combined

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        if "combined" in self._buffers:
            self.freeze()

    def extra_repr(self) -> str:
        frozen = ", frozen" if "combined" in self._buffers else ""
        width = self.weight.shape[0]
        return f"dim={width}, step_size={self.step_size}, lambd={self.lambd}, threshold={self.threshold}{frozen}"


class DecoderStep(nn.Module):
    """CRATE-MAE's step back from a sparse code, linear: ``x W^T``, with the official parameter ``weight`` [dim, dim].

    Args:
        dim: width of the tokens.

    Shapes and errors: ``crate_kernels.norm_linear``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor, *, norm: nn.LayerNorm | None = None) -> Tensor:
        """x W^T of x [..., dim], after ``norm`` where it is given."""
        return norm_linear(x, self.weight, **norm_options(norm))

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[0]}"


class OvercompleteISTA(nn.Module):
    """CRATE-alpha's sparse step with the official parameters: ``D`` and, decoupled, ``D1`` [dim, overcomplete_ratio * dim].

    Args:
        dim: width of the tokens.
        overcomplete_ratio: codes for each feature of a token. Official naming and default.
        eta: step size of both proximal gradient steps. Official naming.
        lmbda: sparsity weight. Official naming.
        decouple: whether the way back from the code has a dictionary of its own.

    Formula, shapes and errors: ``crate_kernels.overcomplete_ista``.
    """

    def __init__(
        self, dim: int, overcomplete_ratio: int = 4, eta: float = 0.1, lmbda: float = 0.1, decouple: bool = True
    ) -> None:
        super().__init__()
        self.eta = eta
        self.lmbda = lmbda
        for name in ("D", "D1") if decouple else ("D",):
            parameter = nn.Parameter(torch.empty(dim, overcomplete_ratio * dim))
            nn.init.kaiming_uniform_(parameter)
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor, *, norm: nn.LayerNorm | None = None, skip: Tensor | None = None) -> Tensor:
        """The step of x [..., dim], after ``norm`` and added to ``skip`` where these are given."""
        numbers = dict(step_size=self.eta, lambd=self.lmbda)
        return overcomplete_ista(x, self.D, getattr(self, "D1", None), skip=skip, **numbers, **norm_options(norm))

    def extra_repr(self) -> str:
        dim, codes = self.D.shape
        return f"dim={dim}, codes={codes}, eta={self.eta}, lmbda={self.lmbda}, decouple={hasattr(self, 'D1')}"
