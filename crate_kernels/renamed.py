"""Our modules for models whose parameters have other names than the official ones; ``accelerate`` swaps modules for these.

Only the names differ. As with all modules, ``accelerate`` first checks that both compute the same.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from crate_kernels.nn import ISTA, MSSA, OvercompleteISTA


class CausalMSSA(MSSA):
    """MSSA whose token i attends to tokens 0..i, under the official names.

    The official module applies a mask from a buffer. This class does not read the mask, but checks that it is causal whenever it
    was written to.

    Raises:
        RuntimeError: the mask is no longer causal; raised by a call.
    """

    is_causal = True

    def obstacle(self) -> str | None:
        for name, buffer in self._buffers.items():
            if buffer is None or torch.compiler.is_compiling():
                continue
            if _CAUSAL.get(buffer) != (buffer.data_ptr(), buffer._version):
                if not is_causal_mask(buffer):
                    raise RuntimeError(
                        f"{name}: expected a causal mask, as it was when accelerate saw it; undo() for another"
                    )
                _CAUSAL[buffer] = buffer.data_ptr(), buffer._version
        return super().obstacle()


# The address of each mask that was found causal, and PyTorch's count of writes to it.
_CAUSAL: MutableMapping[Tensor, tuple[int, int]] = WeakIdKeyDictionary()


def is_causal_mask(buffer: Tensor | None) -> bool:
    """Whether it is one square matrix with ones on and below the diagonal and zeros above, or -inf above and zeros elsewhere."""
    if buffer is None or buffer.ndim < 2 or buffer.numel() != buffer.shape[-1] ** 2 or buffer.shape[-2] < 2:
        return False
    square = buffer.reshape(buffer.shape[-2:])
    infinite = square.is_floating_point() and bool(square.isinf().any())
    kept = square == 0 if infinite else square == 1
    rest = square.isneginf() if infinite else square == 0
    below = torch.ones_like(kept).tril()
    return torch.equal(kept, below) and torch.equal(rest, ~below)


class CausalMSSAOfGPT(CausalMSSA):
    """Causal MSSA under GPT's names: ``c_attn``, ``c_proj``, ``attn_dropout``, ``resid_dropout``, ``n_head``, ``n_embd``."""

    n_head: int
    n_embd: int
    c_proj: nn.Module
    _names: ClassVar = ("c_attn", "attend", "attn_dropout")

    def _heads_and_scale(self) -> tuple[int, float]:
        return self.n_head, (self.n_embd // self.n_head) ** -0.5

    def _projection(self) -> tuple[nn.Module | None, nn.Module | None, str | None]:
        return self._modules["c_proj"], self._modules.get("resid_dropout"), None

    def _project(self, out: Tensor) -> Tensor:
        out, dropout = self.c_proj(out), self._modules.get("resid_dropout")
        return out if dropout is None else dropout(out)


class ISTAOfD(ISTA):
    """ISTA whose dictionary is ``D``, its numbers ``eta`` and ``lmbda``, as CRATE-alpha names them."""

    D: nn.Parameter
    eta: float | Tensor
    lmbda: float | Tensor

    def _step(self) -> tuple[nn.Parameter, float | Tensor, float | Tensor]:
        return self.D, self.eta, self.lmbda


class OvercompleteISTAOfCLIPA(OvercompleteISTA):
    """The overcomplete step whose dictionaries are ``c_fc`` and ``c_proj``, as CLIPA's variant of CRATE-alpha names them."""

    c_fc: nn.Parameter
    c_proj: nn.Parameter

    def _dictionaries(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.c_fc, self.c_proj if getattr(self, "decouple", True) else None
