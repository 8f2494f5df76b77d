"""Triton kernels between weights and products: two make operands, of all layers in one launch each, one takes gradients back.

    prepare_kernel     B' = diag(gamma) B in the dtype of the product, its column sums, and beta B + bias
    combine_kernel     G = W - W^T W, and the same of B = eta * G
    gradient_kernel    the gradients of B, gamma and beta, from those of the product

The weights of many layers are tensors of their own: kernels find them through a table of addresses, which is made once for the
same tensors and stays on the device. A gamma, beta or bias that is not there has address zero.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_kernels.precision import dot_precision
from crate_kernels.products.op import empty_operands
from crate_kernels.products.operand import Norm, Operand
from crate_kernels.products.triton import Gradients, load_row, load_tile, number, scalar
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


@triton.jit
def load_optional(address, entries, count, absent, DTYPE: tl.constexpr):
    """The entries of the vector at ``address`` in float32; ``absent`` everywhere where there is none."""
    values = tl.full(entries.shape, absent, tl.float32)
    if address != 0:
        vector = address.to(tl.pointer_type(DTYPE))
        values = tl.load(vector + entries, mask=entries < count, other=0.0).to(tl.float32)
    return values


@triton.jit
def scale_tile(
    tile, gamma_address, beta_address, operand, rows, columns, inner_width, width, row_stride, column_stride,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes the rounded tile of B' = diag(gamma) B, and returns the column sums of that and of beta B."""
    gamma = load_optional(gamma_address, rows, inner_width, 1.0, VECTOR)
    beta = load_optional(beta_address, rows, inner_width, 0.0, VECTOR)
    scaled = (tile * gamma[:, None]).to(operand.dtype.element_ty)
    addresses = operand + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    tl.store(addresses, scaled, mask=(rows < inner_width)[:, None] & (columns < width)[None, :])
    # Rows beyond the last are zero in the tile.
    return tl.sum(scaled.to(tl.float32), 0), tl.sum(beta[:, None] * tile, 0)


@triton.jit
def prepare_kernel(
    addresses, matrices, column_sums, offsets, scale, inner_width, width, row_stride, column_stride,
    operand_row_stride, operand_column_stride,
    SCALE_IN_MEMORY: tl.constexpr, MATRIX: tl.constexpr, VECTOR: tl.constexpr, ALIGNMENT: tl.constexpr,
    WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of matrix number program_id(1): B' [inner_width, width], its column sums, and offset = scale * beta B + bias.

    addresses [count, 4]: B of dtype MATRIX, gamma, beta and bias of dtype VECTOR; matrices [count, inner_width, width];
    column_sums, offsets [count, width] float32. B is multiplied with ``scale`` first, unless that is None.
    """
    index = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    given = addresses + 4 * index
    matrix = tl.multiple_of(tl.load(given).to(tl.pointer_type(MATRIX)), ALIGNMENT)
    operand = matrices + index * inner_width * width

    column_sum = tl.zeros((BLOCK_N,), tl.float32)
    offset = load_optional(tl.load(given + 3), columns, width, 0.0, VECTOR)
    for start in range(0, inner_width, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        tile = load_tile(matrix, rows, columns, row_stride, column_stride, inner_width, width, WHOLE_K, WHOLE_N).to(
            tl.float32
        )
        if scale is not None:
            tile *= scalar(scale, SCALE_IN_MEMORY)
        sums, through_bias = scale_tile(
            tile, tl.load(given + 1), tl.load(given + 2), operand, rows, columns, inner_width, width,
            operand_row_stride, operand_column_stride, VECTOR,
        )  # fmt: skip
        column_sum += sums
        offset += through_bias
    inside = columns < width
    tl.store(column_sums + index * width + columns, column_sum, mask=inside)
    tl.store(offsets + index * width + columns, offset, mask=inside)


@triton.jit
def combine_kernel(
    addresses, combined, matrices, column_sums, offsets, scale, width, row_stride, column_stride,
    SCALE_IN_MEMORY: tl.constexpr, MATRIX: tl.constexpr, VECTOR: tl.constexpr, ALIGNMENT: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of dictionary number program_id(1): G = W - W^T W, and as ``prepare_kernel`` does, of B = scale * G.

    addresses [count, 4]: W [width, width] of dtype MATRIX, gamma, beta, and one not used; combined [count, width, width] float32.
    A program has all rows of its columns, so that nothing is added up between programs.
    """
    index = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    given = addresses + 4 * index
    weight = tl.multiple_of(tl.load(given).to(tl.pointer_type(MATRIX)), ALIGNMENT)
    combined += index * width * width
    operand = matrices + index * width * width

    column_sum = tl.zeros((BLOCK_N,), tl.float32)
    offset = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, width, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for inner_start in range(0, width, BLOCK_K):
            inner = inner_start + tl.arange(0, BLOCK_K)
            left = load_tile(weight, inner, rows, row_stride, column_stride, width, width, WHOLE, WHOLE)
            right = load_tile(weight, inner, columns, row_stride, column_stride, width, width, WHOLE, WHOLE)
            product = tl.dot(tl.trans(left), right, product, input_precision=PRECISION)
        tile = load_tile(weight, rows, columns, row_stride, column_stride, width, width, WHOLE, WHOLE)
        tile = tile.to(tl.float32) - product
        inside = (rows < width)[:, None] & (columns < width)[None, :]
        tl.store(combined + rows.to(tl.int64)[:, None] * width + columns[None, :], tile, mask=inside)
        sums, through_bias = scale_tile(
            tile * scalar(scale, SCALE_IN_MEMORY), tl.load(given + 1), tl.load(given + 2), operand, rows, columns,
            width, width, width, 1, VECTOR,
        )  # fmt: skip
        column_sum += sums
        offset += through_bias
    inside = columns < width
    tl.store(column_sums + index * width + columns, column_sum, mask=inside)
    tl.store(offsets + index * width + columns, offset, mask=inside)


@triton.jit
def gradient_kernel(
    product, matrix, column, mean_column, diagonal, gamma, beta, grad_matrix, grad_gamma, grad_beta, scale, inner_width, width,
    product_row_stride, product_column_stride, matrix_row_stride, matrix_column_stride, grad_row_stride, grad_column_stride,
    SCALE_IN_MEMORY: tl.constexpr, SKIP: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_K rows of B = scale * matrix [inner_width, width], with H = product - 1 (x) mean_column:

        d matrix = scale * (gamma * H + beta (x) column)
        dgamma = scale * rowsum(matrix * H)
        dbeta = scale * matrix column

    SKIP: LN(x) was added to the product as well, and its weight and bias meet the gradient there, too; the weight in the
    diagonal of H, or in the ``diagonal`` given.
    """
    rows = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = rows < inner_width
    factor = 1.0
    if scale is not None:
        factor = scalar(scale, SCALE_IN_MEMORY)
    weight = tl.load(gamma + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    through_weight = tl.zeros((BLOCK_K,), tl.float32)
    through_bias = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, width, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        h = load_tile(
            product, rows, columns, product_row_stride, product_column_stride, inner_width, width, WHOLE_K, WHOLE_N
        )
        if mean_column is not None:
            h -= load_row(mean_column, columns, width)
        tile = load_tile(
            matrix, rows, columns, matrix_row_stride, matrix_column_stride, inner_width, width, WHOLE_K, WHOLE_N
        )
        tile = tile.to(tl.float32)
        through_weight += factor * tl.sum(tile * h, 1)
        if SKIP:  # noqa: SIM102  (decided while compiling, as is the other)
            if diagonal is None:
                through_weight += tl.sum(tl.where(rows[:, None] == columns[None, :], h, 0.0), 1)
        grad = weight * h
        if beta is not None:
            sums = load_row(column, columns, width)
            through_bias += tl.sum(tile * sums, 1)
            grad += tl.load(beta + rows, mask=inside, other=0.0).to(tl.float32)[:, None] * sums
        place = rows.to(tl.int64)[:, None] * grad_row_stride + columns.to(tl.int64)[None, :] * grad_column_stride
        mask = inside[:, None] & (columns < width)[None, :]
        tl.store(grad_matrix + place, (factor * grad).to(grad_matrix.dtype.element_ty), mask=mask)
    if diagonal is not None:
        through_weight += tl.load(diagonal + rows, mask=inside, other=0.0)
    tl.store(grad_gamma + rows, through_weight.to(grad_gamma.dtype.element_ty), mask=inside)
    if beta is not None:
        through_bias *= factor
        if SKIP:
            through_bias += tl.load(column + rows, mask=inside, other=0.0)
        tl.store(grad_beta + rows, through_bias.to(grad_beta.dtype.element_ty), mask=inside)


def matrix_gradient(
    found: Gradients, matrix: Tensor, norm: Norm, like: Tensor, scale: Tensor | None = None, skip: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of B, gamma and beta of ``LN(x) (scale * B)``, from those of the product, in one launch.

    Args:
        found: by ``products.triton.gradients``, matrix and column included.
        matrix: B [inner, width], any dtype and strides.
        norm: the LayerNorm before the product.
        like: the gradient of B has its dtype and memory; of B's shape, any strides.
        scale: 0-dim, on the host or beside the matrix; 1 if None.
        skip: LN(x) was added to the product.
    """
    inner_width, width = matrix.shape
    grad_matrix = torch.empty_like(like)
    grad_gamma = torch.empty_like(norm.weight, memory_format=torch.contiguous_format)
    grad_beta = None if norm.bias is None else torch.empty_like(norm.bias, memory_format=torch.contiguous_format)
    beta = None if norm.bias is None else norm.bias.contiguous()
    if matrix.numel():
        scale, in_memory = number(scale)
        gradient_kernel[(cdiv(inner_width, _GRADIENT["BLOCK_K"]),)](
            found.matrix, matrix, found.column, found.mean_column, found.diagonal if skip else None, norm.weight.contiguous(),
            beta, grad_matrix, grad_gamma, grad_beta, scale, inner_width, width, *found.matrix.stride(), *matrix.stride(),
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
        scale, in_memory = number(scale)
        prepare_kernel[(cdiv(width, _PREPARE["BLOCK_N"]), count)](
            _table(matrices, vectors), operand, column_sum, offset, scale, inner_width, width,
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
        combine_kernel[(cdiv(width, _COMBINE["BLOCK_N"]), count)](
            _table(weights, vectors), combined, operand, column_sum, offset, scale, width, *first.stride(),
            SCALE_IN_MEMORY=in_memory, WHOLE=width % _COMBINE["BLOCK_N"] == 0,
            PRECISION=precision, **_kinds(weights, vectors), enable_fp_fusion=True, **_COMBINE,
        )  # fmt: skip
    return combined, Operand(operand, column_sum, offset)


Vectors = list[tuple[Tensor | None, Tensor | None, Tensor | None]]


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
