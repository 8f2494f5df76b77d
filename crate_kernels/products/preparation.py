"""Launchers of the kernels in ``preparation_kernels.py``, and the table of addresses of the weights of many layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from crate_kernels.dtypes import dot_precision
from crate_kernels.products import preparation_kernels as kernels
from crate_kernels.products.launchers import Gradients, number
from crate_kernels.products.norm_folding import Norm, Operand
from crate_kernels.products.op import empty_operands
from crate_kernels.tiles import cdiv

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# One for every device: these are small beside the products with the tokens, and no step waits for their last percent.
_PREPARE = {"BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
_GRADIENT = {"BLOCK_N": 128, "BLOCK_K": 8, "num_warps": 8, "num_stages": 2}
_COMBINE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}

# Tables of addresses kept, each of a few KB: some models, and weights that are not where they were the step before. By the
# stream that filled them: another one's kernels could read a table before it is filled, or after its memory has gone on.
_MOST_TABLES = 256
_tables: OrderedDict[tuple, dict[int, Tensor]] = OrderedDict()
# Those that a CUDA graph reads, as long as the process lives: there is no telling when the graph goes.
_tables_of_graphs: dict[tuple, Tensor] = {}


def matrix_gradient(
    found: Gradients, matrix: Tensor, norm: Norm, like: Tensor, scale: Tensor | None = None, skip: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of B, gamma and beta of ``LN(x) (scale * B)``, from those of the product, in one launch.

    Args:
        found: by ``launchers.gradients``, matrix and column included.
        matrix: B [inner, width], any dtype and strides.
        norm: the LayerNorm before the product.
        like: the gradient of B has its dtype and memory; of B's shape, any strides.
        scale: 0-dim, on the host or beside the matrix; 1 if None.
        skip: LN(x) was added to the product.
    """
    assert found.matrix is not None
    inner_width, width = matrix.shape
    grad_matrix = torch.empty_like(like)
    grad_gamma = torch.empty_like(norm.weight, memory_format=torch.contiguous_format)
    grad_beta = None if norm.bias is None else torch.empty_like(norm.bias, memory_format=torch.contiguous_format)
    beta = None if norm.bias is None else norm.bias.contiguous()
    if matrix.numel():
        scale_value, in_memory = number(scale)
        kernels.gradient_kernel[(cdiv(inner_width, _GRADIENT["BLOCK_K"]),)](
            found.matrix, matrix, found.column, found.mean_column, found.diagonal if skip else None, norm.weight.contiguous(),
            beta, grad_matrix, grad_gamma, grad_beta, scale_value, inner_width, width, *found.matrix.stride(), *matrix.stride(),
            *grad_matrix.stride(), SCALE_IN_MEMORY=in_memory, SKIP=skip,
            WHOLE_N=width % _GRADIENT["BLOCK_N"] == 0, WHOLE_K=inner_width % _GRADIENT["BLOCK_K"] == 0,
            enable_fp_fusion=True, **_GRADIENT,
        )  # fmt: skip
    return grad_matrix, grad_gamma, grad_beta


def prepare_all(
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norms: Sequence[Norm | None],
    dtype: torch.dtype,
    scale: Tensor | None = None,
) -> Operand:
    """The operands of ``LN(x) (scale * B) + bias``, B [inner, width] of one shape and any strides, in one launch, stacked:
    matrix [count, inner, width], the others [count, width].

    Where there is no LayerNorm column_sum is there all the same, and has no meaning. ``scale`` is 0-dim, on the host or beside
    the matrices. A single matrix without LayerNorm is PyTorch's to copy.
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
        kernels.prepare_kernel[(cdiv(width, _PREPARE["BLOCK_N"]), count)](
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

    Of float32 weights tensor cores may round the products' factors to TF32 where the operand is bfloat16, as that hides behind
    its own rounding; else (float16 has no fewer bits) as torch is told to. Sums are float32.
    """
    weights, vectors = _uniform(weights, [(*(norm or (None, None))[:2], None) for norm in norms])
    first, count, width = weights[0], len(weights), weights[0].shape[0]
    combined = torch.empty((count, width, width), dtype=torch.float32, device=first.device)
    operand = torch.empty_like(combined, dtype=dtype)
    column_sum, offset = (first.new_empty(count, width, dtype=torch.float32) for _ in range(2))
    if combined.numel():
        scale, in_memory = number(step_size)
        precision = dot_precision(operand if dtype == torch.bfloat16 else combined)
        kernels.combine_kernel[(cdiv(width, _COMBINE["BLOCK_N"]), count)](
            _table(weights, vectors), combined, operand, column_sum, offset, scale, width, *first.stride(),
            SCALE_IN_MEMORY=in_memory, WHOLE=width % _COMBINE["BLOCK_N"] == 0,
            PRECISION=precision, **_kinds(weights, vectors), enable_fp_fusion=True, **_COMBINE,
        )  # fmt: skip
    return combined, Operand(operand, column_sum, offset)


# One row a matrix: the vectors that go with it, or None for those that it lacks.
Vectors = list[tuple[Tensor | None, ...]]


def _uniform(matrices: Sequence[Tensor], vectors: Vectors) -> tuple[list[Tensor], Vectors]:
    """Tensors as one launch takes them: matrices of one dtype and in the same strides, vectors contiguous and of one dtype.

    Those that are so already stay where they are; others are copied.
    """
    matrices = [matrix.detach() for matrix in matrices]
    if len({matrix.dtype for matrix in matrices}) > 1 or matrices[0].dtype not in _TRITON_DTYPES:
        matrices = [matrix.float() for matrix in matrices]
    if len({matrix.stride() for matrix in matrices}) > 1:
        matrices = [matrix.contiguous() for matrix in matrices]
    present = [vector for row in vectors for vector in row if vector is not None]
    dtypes = {vector.dtype for vector in present}
    dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= _TRITON_DTYPES.keys() else torch.float32
    return matrices, [tuple(None if v is None else v.detach().to(dtype).contiguous() for v in row) for row in vectors]


def _kinds(matrices: Sequence[Tensor], vectors: Vectors) -> dict[str, object]:
    """What is to be known of the tensors behind the addresses while compiling."""
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
    of_streams = _tables.pop(key, {})
    if capturing:
        # Filled by a step before, on whatever stream: who captures has waited for that.
        table = _tables_of_graphs.get(key, next(iter(of_streams.values()), None))
        if table is None:
            raise RuntimeError(
                "weights: met for the first time while a CUDA graph is captured; run one step on the same weights before"
            )
        _tables_of_graphs[key] = table
    elif (table := of_streams.get(stream)) is None:
        table = torch.tensor(addresses, dtype=torch.int64)
        table = table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
        of_streams[stream] = table
    _tables[key] = of_streams  # now the newest
    if len(_tables) > _MOST_TABLES:
        _tables.popitem(last=False)
    return table


def _stream(device: torch.device) -> tuple[int, bool]:
    """Where kernels are launched now, as a number, and whether a CUDA graph captures them instead."""
    if device.type != "cuda":
        return 0, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()
