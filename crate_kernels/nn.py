"""Modules whose parameters have the official state-dict names."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crate_kernels.fusing import attached, fold, hooks_of_all_modules, known, linear_obstacle, obstacle, say
from crate_kernels.ista.api import combine, ista
from crate_kernels.mssa.api import AttentionWeights, mssa
from crate_kernels.norm_linear.api import norm_linear
from crate_kernels.overcomplete.api import overcomplete_ista
from crate_kernels.shared_attention.api import shared_qkv_attention
from crate_kernels.shared_attention.mask import Mask, checked_mask
from crate_kernels.validation import describe


@known
class MSSA(nn.Module):
    """Multi-head subspace self-attention with the official parameters: ``qkv.weight``, ``to_out.0.weight``, ``to_out.0.bias``.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        dim_head: width of one head. Official naming and default.
        dropout: probability, below 1, on the attention weights and after the output projection, in training. If it is above 0,
            PyTorch computes the projections, and a kernel the attention between them.
        out_bias: whether the output projection has a bias. That of CRATE-alpha has none.

    Set ``window`` to an int, and tokens attend to those at most so many places away. Set ``scale`` to a parameter [heads, 1, 1],
    and each head learns its own; then PyTorch computes the projections.

    ``to_out`` is the identity where one head is as wide as the tokens, as in the official code. Formula, shapes and errors:
    ``crate_kernels.mssa``.

    The children are the official ones, ``attend`` and ``dropout`` included. While they are as they were made, one fused call
    computes what they do. If one has hooks, an adapter or a bias, or was replaced, they are called one by one
    (``crate_kernels.fusing``), with the attention kernel between the projections if ``attend`` and ``dropout`` are plain.
    """

    is_causal = False
    window: int | None = None
    scale: float | Tensor

    def __init__(
        self, dim: int, heads: int = 8, dim_head: int = 64, dropout: float = 0.0, out_bias: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability of at least 0 and below 1, got {dropout}")
        self.heads = heads
        self.scale = dim_head**-0.5
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, heads * dim_head, bias=False)
        projects = not (heads == 1 and dim_head == dim)
        out = nn.Linear(heads * dim_head, dim, bias=out_bias)
        self.to_out = nn.Sequential(out, nn.Dropout(dropout)) if projects else nn.Identity()

    def forward(
        self,
        x: Tensor,
        return_attention: bool = False,
        return_key: bool = False,
        *,
        norm: nn.Module | None = None,
        skip: Tensor | None = None,
        subtract: bool = False,
        lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """MSSA of x [batch, tokens, dim], or of ``norm(x)``, added to ``skip`` or with ``subtract`` subtracted from it.
        With ``lengths`` [batch], tokens from there on are padding; only tokens with True in ``key_mask`` [batch, tokens] are
        attended to; ``cu_seqlens`` [sequences + 1] says where the sequences of a packed batch of 1 begin and end.

        ``return_attention`` gives the attention weights [batch, heads, tokens, tokens] instead, ``return_key`` the
        projection [batch, tokens, heads * dim_head], as in the official encoder.
        """
        hiding: dict[str, Any] = {"lengths": lengths, "key_mask": key_mask, "cu_seqlens": cu_seqlens}
        if return_attention or return_key:
            w = self._qkv(x if norm is None else norm(x))
            if return_key:
                return w
            return self._weights(self._heads_of(w), self._mask(x, hiding))
        if reason := self.obstacle():
            say("MSSA", reason)
            return self._by_children(x if norm is None else norm(x), skip, subtract, hiding)
        x, norm_options = fold("MSSA", norm, x)
        (heads, scale), (qkv, out, out_bias) = self._heads_and_scale(), self.weights()
        return mssa(
            x, qkv, out, out_bias, num_heads=heads, scale=_of_each_head(scale, heads), is_causal=self.is_causal,
            window=self.window, skip=skip, subtract=subtract, dropout=self.dropout_rate, **hiding, **norm_options,
        )  # fmt: skip

    def weights(self) -> AttentionWeights:
        """The weights as ``mssa`` and the layers take them. To be called where there is no ``obstacle``: both are Linear then."""
        (qkv, _, _), (out, _, _) = self._parts(), self._projection()
        assert isinstance(qkv, nn.Linear)
        if out is None:
            return AttentionWeights(qkv.weight, None, None)
        assert isinstance(out, nn.Linear)
        return AttentionWeights(qkv.weight, out.weight, out.bias)

    @property
    def dropout_rate(self) -> float:
        """The probability on the attention weights in the present mode: 0 in evaluation."""
        return _rate(self._parts()[2])

    def obstacle(self) -> str | None:
        """Why the children must be called one by one, in words; None where one fused call computes the same."""
        (qkv, _, dropout), (out, out_dropout, reason) = self._parts(), self._projection()
        reason = hooks_of_all_modules() or reason or self.attention_obstacle() or linear_obstacle(self._names[0], qkv)
        if reason is not None:
            return reason
        assert isinstance(qkv, nn.Linear)
        if qkv.bias is not None:
            return f"{self._names[0]} has a bias"
        if out is None:
            return None
        reason = linear_obstacle("its output projection", out)
        if reason is None and out_dropout is not None:
            reason = obstacle("the dropout behind its output projection", out_dropout, nn.Dropout)
        if reason is None and (rate := _rate(dropout)) != (behind := _rate(out_dropout)):
            reason = f"dropout is {rate} on the attention weights and {behind} behind the output projection"
        return reason

    # A class for modules that have other names (``crate_kernels.renamed``) overrides these four.
    _names: ClassVar = ("qkv", "attend", "dropout")

    def _heads_and_scale(self) -> tuple[int, float | Tensor]:
        return self.heads, self.scale

    def _projection(self) -> tuple[nn.Module | None, nn.Module | None, str | None]:
        """The output projection and the dropout after it, None for what is missing; and what keeps them from being fused."""
        to_out = self._modules["to_out"]
        if type(to_out) is nn.Identity:
            return None, None, attached("to_out", to_out)
        if type(to_out) is not nn.Sequential:
            return to_out, None, None
        steps = list(to_out._modules.values())
        if not 1 <= len(steps) <= 2:
            return None, None, f"to_out has {len(steps)} steps"
        return steps[0], steps[1] if len(steps) == 2 else None, attached("to_out", to_out)

    def _project(self, out: Tensor) -> Tensor:
        return self.to_out(out)

    def _parts(self) -> list[nn.Module | None]:
        """The projection to w, the softmax, and the dropout after that; None for one that is missing."""
        modules = self._modules
        return [modules.get(name) for name in self._names]

    def _mask(self, x: Tensor, hiding: dict[str, Any]) -> Mask:
        return checked_mask(x, 1, self.is_causal, self.window, **hiding)

    def _by_children(self, x: Tensor, skip: Tensor | None, subtract: bool, hiding: dict[str, Any]) -> Tensor:
        """The official steps one by one, with the checks of the fused call."""
        mask = self._mask(x, hiding)
        if subtract and skip is None:
            raise ValueError("subtract: given without a skip to subtract from")
        out = self._project(self._attended(self._qkv(x), mask, hiding))
        if skip is None:
            return out
        if skip.shape != out.shape:
            raise ValueError(f"skip: expected {tuple(out.shape)}, got {describe(skip)}")
        return skip - out if subtract else skip + out

    def _qkv(self, x: Tensor) -> Tensor:
        return getattr(self, self._names[0])(x)

    def restriction(self) -> str | None:
        """What makes it other than attention of all tokens to all with one number as its scale, in words; None if nothing."""
        if self.is_causal:
            return "its attention is causal"
        if self.window is not None:
            return "its attention has a window"
        return "its attention has a scale for each head" if isinstance(self._heads_and_scale()[1], Tensor) else None

    def attention_obstacle(self) -> str | None:
        """Why attention must be computed in the official steps, in words; None where the operator can."""
        _, attend, dropout = self._parts()
        if attend is not None:
            if reason := obstacle("attend", attend, nn.Softmax):
                return reason
            assert isinstance(attend, nn.Softmax)
            if attend.dim not in (-1, 3):
                return f"attend is a softmax over dimension {attend.dim}"
        if dropout is not None:
            if reason := obstacle("dropout", dropout, nn.Dropout):
                return reason
            if _rate(dropout) >= 1:
                return f"dropout is {dropout.p}"
        heads, scale = self._heads_and_scale()
        return "scale is no number, and not one for each head" if _of_each_head(scale, heads) is None else None

    def _attended(self, w: Tensor, mask: Mask, hiding: dict[str, Any]) -> Tensor:
        """Attention on the projection w [batch, tokens, heads * dim_head]; the result has the same shape."""
        w = self._heads_of(w)
        if (hooks_of_all_modules() or self.attention_obstacle()) is None:
            heads, scale = self._heads_and_scale()
            out = shared_qkv_attention(
                w, scale=_of_each_head(scale, heads), is_causal=self.is_causal, window=self.window, dropout=self.dropout_rate,
                **hiding,
            )  # fmt: skip
        else:
            attention, dropout = self._weights(w, mask), self._parts()[2]
            out = torch.matmul(attention if dropout is None else dropout(attention), mask.without_padding(w))
        return out.transpose(1, 2).flatten(2)

    def _heads_of(self, w: Tensor) -> Tensor:
        """w as [batch, heads, tokens, dim_head]."""
        return w.unflatten(-1, (self._heads_and_scale()[0], -1)).transpose(1, 2)

    def _weights(self, w: Tensor, mask: Mask) -> Tensor:
        """What each token attends to, [batch, heads, tokens, tokens]; zero in rows of padding and of tokens that have no key."""
        w, attend, idle = mask.without_padding(w), self._parts()[1], mask.idle(w)
        scores = mask.hide(torch.matmul(w, w.transpose(-1, -2)) * self._heads_and_scale()[1], w)
        weights = scores.softmax(dim=-1) if attend is None else attend(scores)
        return weights if idle is None else weights.masked_fill(idle[..., None], 0.0)

    def extra_repr(self) -> str:
        heads, scale = self._heads_and_scale()
        shown = f"heads={heads}" + ("" if isinstance(scale, Tensor) else f", scale={scale:.4g}")
        return shown if self.window is None else f"{shown}, window={self.window}"


def _of_each_head(scale: float | Tensor, heads: int) -> float | Tensor | None:
    """A number as it is; a tensor that multiplies scores [batch, heads, tokens, tokens] head by head as [heads]; else None."""
    if isinstance(scale, (int, float)):
        return scale
    if not isinstance(scale, Tensor):
        return None
    suits = scale.numel() == 1 or (scale.numel() == heads and scale.shape[-3:] == (heads, 1, 1))
    return scale.reshape(-1).expand(heads) if suits and scale.is_floating_point() else None


def _rate(dropout: nn.Module | None) -> float:
    """The probability of a dropout in its present mode; 0 in evaluation, and for anything else than a dropout."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


@known
class ISTA(nn.Module):
    """One ISTA step with the official parameter: ``weight`` [dim, dim].

    Args:
        dim: width of the tokens.
        step_size: eta of the proximal gradient step.
        lambd: sparsity weight. The official CRATE has 0.1, CRATE-MAE 0.5 by default.
        threshold: "relu" or "soft".

    For inference, ``freeze()`` computes the matrix that the tokens are multiplied with once, instead of at every call. Formula,
    shapes and errors: ``crate_kernels.ista``.
    """

    # Official modules that ``accelerate`` turned into this class have no such attribute of their own.
    threshold = "relu"

    def __init__(self, dim: int, step_size: float = 0.1, lambd: float = 0.1, threshold: str = "relu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)
        self.step_size = step_size
        self.lambd = lambd
        self.threshold = threshold

    def forward(self, x: Tensor, *, norm: nn.Module | None = None) -> Tensor:
        """ISTA of x [..., dim], or of ``norm(x)``.

        Raises:
            RuntimeError: the module is frozen, and the weight would get no gradient though it asks for one.
        """
        combined, (weight, step_size, lambd) = getattr(self, "combined", None), self._step()
        if combined is not None and torch.is_grad_enabled() and weight.requires_grad:
            raise RuntimeError(
                "weight: it asks for a gradient, which a frozen ISTA cannot give; call unfreeze(), or run under torch.no_grad()"
            )
        x, norm_options = fold("ISTA", norm, x)
        return ista(
            x, weight, step_size=step_size, lambd=lambd, threshold=self.threshold, combined=combined, **norm_options
        )

    def _step(self) -> tuple[nn.Parameter, float | Tensor, float | Tensor]:
        """Dictionary, step size and lambda. A class for modules that have other names overrides this."""
        return self.weight, self.step_size, self.lambd

    def freeze(self) -> None:
        """Treat the weight as a constant: keep ``combine(weight)``, and multiply with that from now on.

        It is kept in the buffer ``combined``, which moves with the module and is not in its state dict. ``load_state_dict``
        computes it again; after any other change of the weight, call ``freeze()`` again. To cast the module, do it before: a
        later cast would round the buffer.
        """
        self.unfreeze()
        self.register_buffer("combined", combine(self._step()[0]), persistent=False)

    def unfreeze(self) -> None:
        """Delete what ``freeze`` made. Does nothing to a module that is not frozen."""
        if "combined" in self._buffers:
            del self.combined

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        if "combined" in self._buffers:
            self.freeze()

    def extra_repr(self) -> str:
        frozen = ", frozen" if "combined" in self._buffers else ""
        weight, step_size, lambd = self._step()
        return f"dim={weight.shape[0]}, step_size={step_size}, lambd={lambd}, threshold={self.threshold}{frozen}"


@known
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

    def forward(self, x: Tensor, *, norm: nn.Module | None = None) -> Tensor:
        """``x W^T`` for x [..., dim], or ``norm(x) W^T``."""
        x, norm_options = fold("DecoderStep", norm, x)
        return norm_linear(x, self.weight, **norm_options)

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[0]}"


@known
class OvercompleteISTA(nn.Module):
    """CRATE-alpha's sparse step with the official parameters: ``D`` and, decoupled, ``D1`` [dim, overcomplete_ratio * dim].

    Args:
        dim: width of the tokens.
        overcomplete_ratio: codes for each feature of a token. Official naming and default.
        eta: step size of both proximal gradient steps. Official naming.
        lmbda: sparsity weight. Official naming.
        decouple: whether the code is mapped back by a dictionary of its own, D1, instead of D.

    Formula, shapes and errors: ``crate_kernels.overcomplete_ista``.
    """

    D: nn.Parameter
    D1: nn.Parameter

    def __init__(
        self, dim: int, overcomplete_ratio: int = 4, eta: float = 0.1, lmbda: float = 0.1, decouple: bool = True
    ) -> None:
        super().__init__()
        self.eta = eta
        self.lmbda = lmbda
        self.decouple = decouple
        for name in ("D", "D1") if decouple else ("D",):
            parameter = nn.Parameter(torch.empty(dim, overcomplete_ratio * dim))
            nn.init.kaiming_uniform_(parameter)
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor, *, norm: nn.Module | None = None, skip: Tensor | None = None) -> Tensor:
        """The step for x [..., dim], or for ``norm(x)``, added to ``skip`` if there is one."""
        x, norm_options = fold("OvercompleteISTA", norm, x)
        dictionary, out_dictionary = self._dictionaries()
        return overcomplete_ista(
            x, dictionary, out_dictionary, step_size=self.eta, lambd=self.lmbda, skip=skip, **norm_options
        )

    def _dictionaries(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """D, and D1 if it is used. A class for modules that have other names overrides this."""
        # Not every module that ``accelerate`` turned into this class says whether it is decoupled.
        return self.D, self.D1 if getattr(self, "decouple", hasattr(self, "D1")) else None

    def extra_repr(self) -> str:
        dictionary, out_dictionary = self._dictionaries()
        dim, codes = dictionary.shape
        return f"dim={dim}, codes={codes}, eta={self.eta}, lmbda={self.lmbda}, decouple={out_dictionary is not None}"


# The forwards of our modules that take the norm before them as an argument.
_TAKE_NORM = MSSA.forward, ISTA.forward, DecoderStep.forward, OvercompleteISTA.forward


def takes_norm(module: nn.Module) -> bool:
    """Whether ``module`` may be given the norm before it as an argument: it is one of ours, and no hook looks at its input."""
    return type(module).forward in _TAKE_NORM and attached("", module) is None and hooks_of_all_modules() is None
