"""Launchers of the kernels in ``preparation_kernels.py``, and the table of addresses of the weights of many layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from crate_kernels.dtypes import dot_precision
from crate_kernels.products import preparation_kernels as kernels
from crate_kernels.products.launchers import Gradients, number
from crate_kernels.products.norm_folding import Norm, Operand
from crate_kernels.products.op import empty_operands
from crate_kernels.replay import launch
from crate_kernels.tiles import cdiv

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# The same tiles on every device: these kernels take little time beside the products with the tokens.
_PREPARE = {"BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
_GRADIENT = {"BLOCK_N": 128, "BLOCK_K": 8, "num_warps": 8, "num_stages": 2}
_COMBINE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}

# Tables of addresses, a few KB each, are kept: enough for several models, and for weights that move to new addresses at each
# step. Each stream fills a table of its own: another stream could read it too early, or when its memory is already used again.
_MOST_TABLES = 256
_tables: OrderedDict[tuple, dict[int, Tensor]] = OrderedDict()
# Tables that a CUDA graph reads are kept until the process ends: nothing tells when the graph is deleted.
_tables_of_graphs: dict[tuple, Tensor] = {}


class MatrixGradients(NamedTuple):
    """The gradients of B, gamma and beta of ``LN(x) (scale * B)``, and that of B plus its transpose; None where there is none."""

    matrix: Tensor
    gamma: Tensor
    beta: Tensor | None
    symmetric: Tensor | None


def matrix_gradients(
    found: Gradients,
    matrix: Tensor,
    norm: Norm,
    scale: Tensor | None = None,
    *,
    skip: bool = False,
    symmetric: bool = False,
) -> MatrixGradients:
    """All gradients of weights that come from those of the product, in one launch.

    Args:
        found: what ``launchers.gradients`` returned, with the gradients of matrix and column.
        matrix: B [inner, width], any dtype and strides, which its gradient gets, too.
        norm: the LayerNorm before the product.
        scale: 0-dim, on the host or beside the matrix; 1 if None.
        skip: LN(x) was added to the product.
        symmetric: return the gradient of B plus its transpose; B is square.
    """
    assert found.matrix is not None
    inner_width, width = matrix.shape
    grad_matrix, both = torch.empty_like(matrix), torch.empty_like(matrix) if symmetric else None
    grad_gamma = torch.empty_like(norm.weight, memory_format=torch.contiguous_format)
    grad_beta = None if norm.bias is None else torch.empty_like(norm.bias, memory_format=torch.contiguous_format)
    beta = None if norm.bias is None else norm.bias.contiguous()
    if matrix.numel():
        scale_value, in_memory = number(scale)
        launch(
            kernels.gradient_kernel, (cdiv(inner_width, _GRADIENT["BLOCK_K"]),),
            found.matrix, matrix, found.column, found.mean_column, found.diagonal if skip else None, norm.weight.contiguous(),
            beta, grad_matrix, both, grad_gamma, grad_beta, scale_value, inner_width, width,
            *found.matrix.stride(), *matrix.stride(), *grad_matrix.stride(), SCALE_IN_MEMORY=in_memory, SKIP=skip,
            WHOLE_N=width % _GRADIENT["BLOCK_N"] == 0, WHOLE_K=inner_width % _GRADIENT["BLOCK_K"] == 0,
            enable_fp_fusion=True, **_GRADIENT,
        )  # fmt: skip
    return MatrixGradients(grad_matrix, grad_gamma, grad_beta, both)


def prepare_all(
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: Sequence[Norm | None],
    dtype: torch.dtype,
    scale: Tensor | None = None,
) -> Operand:
    """The operands of ``LN(x) (scale * B) + bias`` for many matrices B [inner, width] of one shape, made in one launch.

    They are stacked: matrix is [count, inner, width], column_sum and offset are [count, width]. column_sum has no meaning for a
    matrix without a LayerNorm. ``scale`` is 0-dim, on the host or on the device of the matrices. A single matrix without a
    LayerNorm is copied by PyTorch.
    """
    operand, column_sum, offset = empty_operands(matrices, dtype)
    if len(matrices) == 1 and norms[0] is None:
        operand[0].copy_(matrices[0] if scale is None else matrices[0].float() * scale)
        return Operand(operand, column_sum.zero_(), offset.zero_() if biases[0] is None else offset.copy_(biases[0]))
    matrices, vectors = _uniform(
        matrices, [(*(norm or (None, None))[:2], bias) for norm, bias in zip(norms, biases, strict=True)]
    )
    (inner_width, width), count = matrices[0].shape, len(matrices)
    if operand.numel():
        scale_value, in_memory = number(scale)
        launch(
            kernels.prepare_kernel, (cdiv(width, _PREPARE["BLOCK_N"]), count),
            _table(matrices, vectors), operand, column_sum, offset, scale_value, inner_width, width,
            *matrices[0].stride(), *operand.stride()[1:],
            SCALE_IN_MEMORY=in_memory, WHOLE_N=width % _PREPARE["BLOCK_N"] == 0, WHOLE_K=inner_width % _PREPARE["BLOCK_K"] == 0,
            **_kinds(matrices, vectors), enable_fp_fusion=True, **_PREPARE,
        )  # fmt: skip
    return Operand(operand, column_sum, offset)


def combine_all(
    weights: Sequence[Tensor], norms: Sequence[Norm | None], step_size: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Operand]:
    """G = W - W^T W of dictionaries of one shape in one launch, stacked, and the operands of ``LN(x) (eta G)``.

    W^T W of float32 weights may be computed in TF32 if the operand is bfloat16: the error is smaller than that of rounding the
    operand. This is not so for float16, which has as many bits as TF32; there PyTorch's setting decides. Sums are float32.
    """
    weights, vectors = _uniform(weights, [(*(norm or (None, None))[:2], None) for norm in norms])
    first, count, width = weights[0], len(weights), weights[0].shape[0]
    combined = torch.empty((count, width, width), dtype=torch.float32, device=first.device)
    operand = torch.empty_like(combined, dtype=dtype)
    column_sum, offset = (first.new_empty(count, width, dtype=torch.float32) for _ in range(2))
    if combined.numel():
        scale, in_memory = number(step_size)
        precision = dot_precision(operand if dtype == torch.bfloat16 else combined)
        launch(
            kernels.combine_kernel, (cdiv(width, _COMBINE["BLOCK_N"]), count),
            _table(weights, vectors), combined, operand, column_sum, offset, scale, width, *first.stride(),
            SCALE_IN_MEMORY=in_memory, WHOLE=width % _COMBINE["BLOCK_N"] == 0,
            PRECISION=precision, **_kinds(weights, vectors), enable_fp_fusion=True, **_COMBINE,
        )  # fmt: skip
    return combined, Operand(operand, column_sum, offset)


# One row a matrix: the vectors that go with it, or None for those that it lacks.
Vectors = list[tuple[Tensor | None, ...]]


def _uniform(matrices: Sequence[Tensor], vectors: Vectors) -> tuple[list[Tensor], Vectors]:
    """Tensors as one launch takes them: matrices of one dtype and the same strides, vectors contiguous and of one dtype.

    Tensors that are not so are copied.
    """
    if len({matrix.dtype for matrix in matrices}) > 1 or matrices[0].dtype not in _TRITON_DTYPES:
        matrices = [matrix.float() for matrix in matrices]
    if len({matrix.stride() for matrix in matrices}) > 1:
        matrices = [matrix.contiguous() for matrix in matrices]
    present = [vector for row in vectors for vector in row if vector is not None]
    dtypes = {vector.dtype for vector in present}
    dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= _TRITON_DTYPES.keys() else torch.float32
    return list(matrices), [tuple(None if v is None else v.to(dtype).contiguous() for v in row) for row in vectors]


def _kinds(matrices: Sequence[Tensor], vectors: Vectors) -> dict[str, object]:
    """What the compiler must know of the tensors behind the addresses."""
    vector = next((v for row in vectors for v in row if v is not None), None)
    aligned = all(matrix.data_ptr() % 16 == 0 for matrix in matrices)
    return {
        "MATRIX": _TRITON_DTYPES[matrices[0].dtype],
        "VECTOR": _TRITON_DTYPES[torch.float32 if vector is None else vector.dtype],
        "ALIGNMENT": 16 if aligned else matrices[0].element_size(),
    }


def _table(matrices: Sequence[Tensor], vectors: Vectors) -> Tensor:
    """Addresses [count, 4], int64, on the device of the matrices."""
    device = matrices[0].device
    rows = [(matrix, *three) for matrix, three in zip(matrices, vectors, strict=True)]
    addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in row] for row in rows]
    key = device, *map(tuple, addresses)
    stream, capturing = _stream(device)
    tables_by_stream = _tables.pop(key, {})
    if capturing:
        # A step before has filled the table, on any stream, and has ended before the capture began.
        table = _tables_of_graphs.get(key, next(iter(tables_by_stream.values()), None))
        if table is None:
            raise RuntimeError(
                "weights: met for the first time while a CUDA graph is captured; run one step on the same weights before"
            )
        _tables_of_graphs[key] = table
    elif (table := tables_by_stream.get(stream)) is None:
        table = torch.tensor(addresses, dtype=torch.int64)
        table = table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
        tables_by_stream[stream] = table
    _tables[key] = tables_by_stream  # now the newest
    if len(_tables) > _MOST_TABLES:
        _tables.popitem(last=False)
    return table


def _stream(device: torch.device) -> tuple[int, bool]:
    """Where kernels are launched now, as a number, and whether a CUDA graph captures them instead."""
    if device.type != "cuda":
        return 0, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()
