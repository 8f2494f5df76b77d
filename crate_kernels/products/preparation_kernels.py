"""Triton kernels between weights and products: two make the operands of all layers in a launch, one computes weights' gradients.

    prepare_kernel     B' = diag(gamma) B in the dtype of the product, its column sums, and beta B + bias
    combine_kernel     G = W - W^T W, and the same of B = eta * G
    gradient_kernel    the gradients of B, gamma and beta, from those of the product

The weights of each layer are separate tensors. Kernels find them through a table of addresses, which is made once for the same
tensors and stays on the device. A gamma, beta or bias that is missing has address zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crate_kernels.products.kernels import load_row, load_tile, scalar


@triton.jit
def load_optional(address, entries, count, absent, DTYPE: tl.constexpr):
    """Entries of the vector at ``address`` in float32; all are ``absent`` if the address is zero."""
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
    """Writes the tile of B' = diag(gamma) B, rounded, and returns the column sums of the rounded tile and of beta B."""
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
    """For matrix number program_id(1): B' [inner_width, width], its column sums, and offset = scale * beta B + bias.

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
    """For dictionary number program_id(1): G = W - W^T W, and what ``prepare_kernel`` makes of B = scale * G.

    addresses [count, 4]: W [width, width] of dtype MATRIX, gamma, beta, and one not used; combined [count, width, width] float32.
    A program computes all rows of its columns, so that no sums are shared between programs.
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
    product, matrix, column, mean_column, diagonal, gamma, beta, grad_matrix, symmetric, grad_gamma, grad_beta, scale,
    inner_width, width,
    product_row_stride, product_column_stride, matrix_row_stride, matrix_column_stride, grad_row_stride, grad_column_stride,
    SCALE_IN_MEMORY: tl.constexpr, SKIP: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For BLOCK_K rows of B = scale * matrix [inner_width, width], with H = product - 1 (x) mean_column:

        d matrix = scale * (gamma * H + beta (x) column)
        dgamma = scale * rowsum(matrix * H)
        dbeta = scale * matrix column

    SKIP: LN(x) was added to the product, which adds to dgamma the diagonal of H (or ``diagonal``, if given), and to dbeta the
    column. symmetric, of a square matrix: d matrix + its transpose, laid out as d matrix.
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
        if symmetric is not None:  # [rows, columns] of the transpose, whose own rows are the columns here
            h = load_tile(
                product, rows, columns, product_column_stride, product_row_stride, inner_width, width, WHOLE_K, WHOLE_N
            )
            if mean_column is not None:
                h -= tl.load(mean_column + rows, mask=inside, other=0.0)[:, None]
            transposed = load_row(gamma, columns, width) * h
            if beta is not None:
                sums_of_rows = tl.load(column + rows, mask=inside, other=0.0)[:, None]
                transposed += load_row(beta, columns, width) * sums_of_rows
            both = factor * grad + factor * transposed
            tl.store(symmetric + place, both.to(symmetric.dtype.element_ty), mask=mask)
    if diagonal is not None:
        through_weight += tl.load(diagonal + rows, mask=inside, other=0.0)
    tl.store(grad_gamma + rows, through_weight.to(grad_gamma.dtype.element_ty), mask=inside)
    if beta is not None:
        through_bias *= factor
        if SKIP:
            through_bias += tl.load(column + rows, mask=inside, other=0.0)
        tl.store(grad_beta + rows, through_bias.to(grad_beta.dtype.element_ty), mask=inside)
