"""LayerNorm by PyTorch, in the dtype that the products after it need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_kernels.dtypes import is_autocast, no_autocast


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, before: torch.dtype | None = None
) -> Tensor:
    """LayerNorm over the last dimension; x itself where weight is None.

    Under autocast it is computed in float32 and returned so. There is one exception. ``before`` is the dtype that the next
    product will round the result to: if x on a CPU has that dtype already, the result has it too, which takes a third of the
    memory traffic and is what PyTorch's own autocast does there.
    """
    if weight is None:
        return x
    dtype = layer_norm_dtype(x, before)
    with no_autocast(x):
        operands = norm_operands(x, weight, bias, dtype)
        return F.layer_norm(operands[0], x.shape[-1:], *operands[1:], eps)


def layer_norm_dtype(x: Tensor, before: torch.dtype | None = None) -> torch.dtype:
    """The dtype that ``layer_norm`` computes x in, and returns."""
    if not is_autocast(x) or (before == x.dtype and x.device.type == "cpu"):
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def norm_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias as PyTorch's LayerNorm takes them for a result in ``dtype``.

    x is cast to ``dtype``. Weight and bias stay as they are if they have it, and else are cast to at least float32.
    """
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        wide = torch.promote_types(dtype, torch.float32)
        weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    return x.to(dtype), weight, bias
