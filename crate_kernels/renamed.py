"""Our modules for models that hold the same parameters under other names: what ``accelerate`` makes of those.

Only the names differ. As everywhere in ``accelerate``, what such a module computes is tried out before it becomes one of these.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from crate_kernels.nn import ISTA, MSSA, OvercompleteISTA


class CausalMSSA(MSSA):
    """MSSA whose token i attends to tokens 0..i, under the official names. A mask kept in a buffer stays there, unused."""

    is_causal = True


class CausalMSSAOfGPT(CausalMSSA):
    """Causal MSSA under the names of GPT's attention: ``c_attn``, ``c_proj``, ``attn_dropout``, ``resid_dropout``, ``n_head``."""

    _names: ClassVar = ("c_attn", "attend", "attn_dropout")

    @property
    def heads(self) -> int:
        return self.n_head

    @property
    def scale(self) -> float:
        return (self.c_attn.out_features // self.n_head) ** -0.5

    def _projection(self) -> tuple[nn.Module | None, nn.Module | None, str | None]:
        return self.c_proj, self._modules.get("resid_dropout"), None

    def _project(self, out: Tensor) -> Tensor:
        out, dropout = self.c_proj(out), self._modules.get("resid_dropout")
        return out if dropout is None else dropout(out)


class ISTAOfD(ISTA):
    """ISTA whose dictionary is ``D``, its numbers ``eta`` and ``lmbda``, as CRATE-alpha names them."""

    @property
    def weight(self) -> Tensor:
        return self.D

    @property
    def step_size(self) -> float | Tensor:
        return self.eta

    @property
    def lambd(self) -> float | Tensor:
        return self.lmbda


class OvercompleteISTAOfCLIPA(OvercompleteISTA):
    """The overcomplete step whose dictionaries are ``c_fc`` and ``c_proj``, as CLIPA's variant of CRATE-alpha names them."""

    decouple = True

    @property
    def D(self) -> Tensor:
        return self.c_fc

    @property
    def D1(self) -> Tensor:
        return self.c_proj
