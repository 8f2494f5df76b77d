"""PyTorch operators that make operands of many weights in one launch: schemas, shapes, FLOP counts. Imports no Triton.

    prepare         operands of matrices of one shape
    combine         G = W - W^T W of dictionaries of one shape, and the operands of eta * G

The operators return stacks, one row a matrix; the functions ``operands`` and ``combined_operands`` split them. The column sums of
a matrix without a LayerNorm have no meaning, nor has its offset if it has no bias either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crate_kernels import dispatch
from crate_kernels._ops import ops
from crate_kernels.definitions import register
from crate_kernels.products.norm_folding import Norm, Operand, as_norm


@torch.no_grad()
def operands(
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: Sequence[Norm | None],
    dtype: torch.dtype,
    scale: Tensor | None = None,
) -> list[Operand]:
    """The operands of ``LN(x) (scale * B) + bias``, matrices B [inner, width] of one shape and any strides, in one launch."""
    columns = [None if n is None else n.weight for n in norms], [None if n is None else n.bias for n in norms]
    stacks = ops.prepare(matrices, biases, *columns, scale, dtype)
    rows = zip(biases, norms, *(stack.unbind(0) for stack in stacks), strict=True)
    return [
        Operand(matrix, None if norm is None else column_sum, None if norm is None and bias is None else offset)
        for bias, norm, matrix, column_sum, offset in rows
    ]


@torch.no_grad()
def combined_operands(
    dictionaries: Sequence[Tensor], norms: Sequence[Norm | None], step_size: Tensor, dtype: torch.dtype
) -> list[tuple[Tensor, Operand]]:
    """G = W - W^T W [width, width] float32 of dictionaries of one shape, and the operands of ``LN(x) (eta G)``, in one launch."""
    columns = [None if n is None else n.weight for n in norms], [None if n is None else n.bias for n in norms]
    stacks = ops.combine(dictionaries, *columns, step_size, dtype)
    rows = zip(norms, *(stack.unbind(0) for stack in stacks), strict=True)
    return [
        (combined, Operand(matrix, None, None) if norm is None else Operand(matrix, *vectors))
        for norm, combined, matrix, *vectors in rows
    ]


def _prepare(
    matrices: list[Tensor],
    biases: list[Tensor | None],
    norm_weights: list[Tensor | None],
    norm_biases: list[Tensor | None],
    scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    norms = list(map(as_norm, norm_weights, norm_biases))
    matrix, column_sum, offset = dispatch.load("products", "preparation").prepare_all(
        matrices, biases, norms, dtype, scale
    )
    return matrix, column_sum, offset


def _combine(
    dictionaries: list[Tensor],
    norm_weights: list[Tensor | None],
    norm_biases: list[Tensor | None],
    step_size: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norms = list(map(as_norm, norm_weights, norm_biases))
    combined, operand = dispatch.load("products", "preparation").combine_all(dictionaries, norms, step_size, dtype)
    return combined, *operand


def empty_operands(matrices: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for operands, in the order of the source's memory, so that reading and writing run along the same axis."""
    (rows, columns), count = matrices[0].shape, len(matrices)
    flipped = all(matrix.stride(0) == 1 and matrix.stride(1) != 1 for matrix in matrices)
    matrix = matrices[0].new_empty((count, columns, rows) if flipped else (count, rows, columns), dtype=dtype)
    column_sum, offset = (matrix.new_empty((count, columns), dtype=torch.float32) for _ in range(2))
    return matrix.mT if flipped else matrix, column_sum, offset


def _combine_fake(dictionaries: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    shape = len(dictionaries), *dictionaries[0].shape
    matrix = dictionaries[0].new_empty(shape, dtype=arguments[-1])
    combined, *vectors = (matrix.new_empty(size, dtype=torch.float32) for size in (shape, shape[:2], shape[:2]))
    return combined, matrix, *vectors


register("prepare", _prepare, fake=lambda matrices, *rest: empty_operands(matrices, rest[-1]))
register(
    "combine",
    _combine,
    fake=_combine_fake,
    flops=lambda dictionaries, *_: len(dictionaries) * 2 * dictionaries[0][0] ** 3,
)
