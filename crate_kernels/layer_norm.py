"""LayerNorm by PyTorch, in the dtype that the products behind it need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_kernels.dtypes import is_autocast, no_autocast


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, before: torch.dtype | None = None
) -> Tensor:
    """LayerNorm over the last dimension, in float32 under autocast on every device; x itself where weight is None.

    ``before`` names the dtype that the result will be rounded to next, by a product. Where x has it too, a CPU reads and writes
    16 bits, as PyTorch's own autocast has it there: a third of the memory traffic.
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
    """What PyTorch's LayerNorm takes for a result in ``dtype``: x in it, and weight and bias too or in at least float32."""
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        wide = torch.promote_types(dtype, torch.float32)
        weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    return x.to(dtype), weight, bias
