"""ISTA on a GPU: three Triton kernels, for the tokens, for their gradient and for the weight's gradient.

With G = W - W^T W the sparse step is ``y = T(x + eta * x G - eta*lambda)``. Where tokens outnumber the width,
``eta * G`` is formed once and the tokens are multiplied by it; elsewhere they are multiplied by ``W^T`` and then by
``eta * W``. The identity never enters a 16-bit operand: x is added in float32 to the float32 accumulator. y is the only
mask the backward needs, because both thresholds pass a gradient exactly where y is not zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_kernels.ista.form import one_product
from crate_kernels.precision import dot_precision
from crate_kernels.tiles import select
from crate_kernels.tiles.ista import TABLE

# Programs the weight's gradient is spread over: two for each multiprocessor of an H100. A constant rather than the
# running device's count, so that the order of summation, and with it every bit, depends on shapes and tiles alone.
_PROGRAMS = 264
# Each split writes a float32 [width, width] that is read again: at most so many, and each worth so many steps at least.
_MOST_SPLITS = 64
_LEAST_STEPS = 4


@triton.jit
def load_tile(
    matrix, rows, columns, row_stride, column_stride, row_count, column_count,
    WHOLE_ROWS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """matrix[rows, columns], zero outside [row_count, column_count]; an axis that is WHOLE needs no mask."""
    # In 64 bits: either axis may be the one that strides over billions of elements.
    addresses = matrix + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    inside = ((rows < row_count) | WHOLE_ROWS)[:, None] & ((columns < column_count) | WHOLE_COLUMNS)[None, :]
    return tl.load(addresses, mask=inside, other=0.0)


@triton.jit
def store_tile(matrix, values, rows, columns, row_count, column_count):
    """Writes values into the contiguous matrix [row_count, column_count], and nothing beyond its edges."""
    addresses = matrix + rows.to(tl.int64)[:, None] * column_count + columns[None, :]
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    tl.store(addresses, values.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def rectify(u, threshold):
    """max(u - threshold, 0). Compared so that NaN is not taken for zero."""
    return tl.where(u <= threshold, 0.0, u - threshold)


@triton.jit
def soft_threshold(u, threshold):
    """sign(u) * max(|u| - threshold, 0). Compared so that NaN is not taken for zero."""
    return tl.where(tl.abs(u) <= threshold, 0.0, tl.where(u < 0.0, u + threshold, u - threshold))


@triton.jit
def masked_gradient(grad_y, y):
    """The gradient that passes the threshold."""
    return tl.where(y != 0.0, grad_y, 0.0)


@triton.jit
def tile_position(row_tiles, column_tiles, GROUP: tl.constexpr):
    """This program's (row tile, column tile), ordered so that GROUP row tiles in turn reuse the right operand in L2."""
    program = tl.program_id(0)
    return tl.swizzle2d(program // column_tiles, program % column_tiles, row_tiles, column_tiles, GROUP)


@triton.jit(do_not_specialize=["tokens"])
def token_product_kernel(
    left, right, skip, out, tokens, width,
    left_row_stride, left_column_stride, right_row_stride, right_column_stride, skip_row_stride, skip_column_stride,
    threshold,
    WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr, EPILOGUE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = skip - left right ("residual"), or the threshold ("relu", "soft") of skip + left right.

    left, skip, out [tokens, width]; right [width, width].
    """
    tile_m, tile_n = tile_position(tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the last read the last again and are not stored: no mask along them.
    clamped_rows = tl.minimum(rows, tokens - 1)

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left_tile = load_tile(
            left, clamped_rows, inner, left_row_stride, left_column_stride, tokens, width, True, WHOLE_K
        )
        right_tile = load_tile(
            right, inner, columns, right_row_stride, right_column_stride, width, width, WHOLE_K, WHOLE_N
        )
        product = tl.dot(left_tile, right_tile, product, input_precision=PRECISION)

    skip_tile = load_tile(
        skip, clamped_rows, columns, skip_row_stride, skip_column_stride, tokens, width, True, WHOLE_N
    ).to(tl.float32)
    if EPILOGUE == "residual":
        result = skip_tile - product
    elif EPILOGUE == "relu":
        result = rectify(skip_tile + product, threshold)
    else:
        result = soft_threshold(skip_tile + product, threshold)
    store_tile(out, result, rows, columns, tokens, width)


@triton.jit(do_not_specialize=["tokens"])
def gradient_product_kernel(
    grad_y, y, right, total, product, tokens, width,
    grad_row_stride, grad_column_stride, y_row_stride, y_column_stride, right_row_stride, right_column_stride,
    WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """product = g right and total = g + g right, for g = grad_y where y is not zero; either output may be None.

    grad_y, y, total, product [tokens, width]; right [width, width]. g exists only in the tile at hand.
    """
    tile_m, tile_n = tile_position(tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    clamped_rows = tl.minimum(rows, tokens - 1)

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        grad_tile = load_tile(
            grad_y, clamped_rows, inner, grad_row_stride, grad_column_stride, tokens, width, True, WHOLE_K
        )
        y_tile = load_tile(y, clamped_rows, inner, y_row_stride, y_column_stride, tokens, width, True, WHOLE_K)
        g = masked_gradient(grad_tile, y_tile).to(right.dtype.element_ty)
        right_tile = load_tile(
            right, inner, columns, right_row_stride, right_column_stride, width, width, WHOLE_K, WHOLE_N
        )
        accumulator = tl.dot(g, right_tile, accumulator, input_precision=PRECISION)

    if product is not None:
        store_tile(product, accumulator, rows, columns, tokens, width)
    if total is not None:
        grad_tile = load_tile(
            grad_y, clamped_rows, columns, grad_row_stride, grad_column_stride, tokens, width, True, WHOLE_N
        ).to(tl.float32)
        y_tile = load_tile(y, clamped_rows, columns, y_row_stride, y_column_stride, tokens, width, True, WHOLE_N)
        store_tile(total, masked_gradient(grad_tile, y_tile) + accumulator, rows, columns, tokens, width)


@triton.jit(do_not_specialize=["tokens", "tokens_per_split"])
def weight_product_kernel(
    left, right, y, partials, tokens, tokens_per_split, width,
    left_row_stride, left_column_stride, right_row_stride, right_column_stride, y_row_stride, y_column_stride,
    WHOLE_M: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """partials[split] = left^T right over that split's tokens, right counting only where y, if given, is not zero.

    left, right, y [tokens, width]; partials [splits, width, width] float32. Each split has its own output, so no atomics.
    """
    tile_m, tile_n = tile_position(tl.cdiv(width, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, tokens)

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left_tile = load_tile(left, inner, rows, left_row_stride, left_column_stride, last, width, WHOLE_K, WHOLE_M)
        right_tile = load_tile(
            right, inner, columns, right_row_stride, right_column_stride, last, width, WHOLE_K, WHOLE_N
        )
        if y is not None:
            y_tile = load_tile(y, inner, columns, y_row_stride, y_column_stride, last, width, WHOLE_K, WHOLE_N)
            right_tile = masked_gradient(right_tile, y_tile)
        product = tl.dot(tl.trans(left_tile), right_tile.to(left.dtype.element_ty), product, input_precision=PRECISION)

    store_tile(partials + split.to(tl.int64) * width * width, product, rows, columns, width, width)


def forward(
    x: Tensor, operand: Tensor, weight: Tensor, step_size: float, lambd: float, soft: bool
) -> tuple[Tensor, Tensor]:
    """y = T(x + eta*(x W - x W^T W) - eta*lambda), and the matrix the tokens were multiplied with last.

    x [M, D] in the stream's dtype and any strides, added in float32; operand [M, D] the same values in the compute dtype;
    weight [D, D], float32 or the compute dtype. Returns y [M, D] like x but contiguous, and matrix [D, D] in the compute
    dtype: eta*(W - W^T W) in the one-product form, eta*W in the two-product form.
    """
    if one_product(*x.shape):
        full = weight.float()
        matrix = torch.addmm(full, full.T, full, beta=step_size, alpha=-step_size).to(operand.dtype)
        left = operand
    else:
        matrix = (weight.float() * step_size).to(operand.dtype).contiguous()
        left = _residual(operand, weight)
    y = _token_product(left, matrix, x, x.dtype, "soft" if soft else "relu", step_size * lambd)
    return y, matrix


def backward(
    grad_y: Tensor,
    operand: Tensor,
    weight: Tensor,
    y: Tensor,
    matrix: Tensor,
    step_size: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``forward`` with respect to x and weight, each None unless asked for.

    grad_y [M, D] of any strides, only read; operand, weight, y and matrix as ``forward`` took and gave them. Returns
    grad_x [M, D] in y.dtype, contiguous, and grad_weight [D, D] in weight.dtype. With g = grad_y where y is not zero:

        one product    grad_x = g + g matrix^T
                       grad_weight = dG - W (dG + dG^T), dG = eta * operand^T g
        two products   dr = g matrix^T, grad_x = g + dr - dr W
                       grad_weight = eta * r^T g - dr^T operand, r = operand - operand W^T recomputed
    """
    grad_x = grad_weight = None
    if one_product(*y.shape):
        if need_x:
            grad_x, _ = _gradient_product(grad_y, y, matrix.T, total_dtype=y.dtype)
        if need_weight:
            grad_product = _weight_product(operand, grad_y, y)
            grad_weight = torch.addmm(
                grad_product, weight.float(), grad_product + grad_product.T, beta=step_size, alpha=-step_size
            )
    else:
        # Kept in float32 up to the last product: there are few tokens here, and one rounding less.
        total, grad_residual = _gradient_product(
            grad_y, y, matrix.T, total_dtype=torch.float32 if need_x else None, product_dtype=operand.dtype
        )
        if need_x:
            grad_x = _token_product(grad_residual, weight.to(operand.dtype), total, y.dtype, "residual")
        if need_weight:
            grad_weight = _weight_product(_residual(operand, weight), grad_y, y).mul_(step_size)
            grad_weight -= _weight_product(grad_residual, operand)
    return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype)


def _residual(operand: Tensor, weight: Tensor) -> Tensor:
    """operand - operand W^T, in the compute dtype."""
    return _token_product(operand, weight.to(operand.dtype).T, operand, operand.dtype, "residual")


def _token_product(
    left: Tensor, right: Tensor, skip: Tensor, out_dtype: torch.dtype, epilogue: str, threshold: float = 0.0
) -> Tensor:
    tokens, width = left.shape
    out = torch.empty((tokens, width), dtype=out_dtype, device=left.device)
    if out.numel():
        tiles = select(TABLE, left.device, "token_product", left.itemsize, out.itemsize)
        token_product_kernel[_grid(tokens, width, tiles)](
            left, right, skip, out, tokens, width,
            *left.stride(), *right.stride(), *skip.stride(),
            threshold,
            WHOLE_N=width % tiles["BLOCK_N"] == 0, WHOLE_K=width % tiles["BLOCK_K"] == 0, EPILOGUE=epilogue,
            **_options(left), **tiles,
        )  # fmt: skip
    return out


def _gradient_product(
    grad_y: Tensor,
    y: Tensor,
    right: Tensor,
    total_dtype: torch.dtype | None = None,
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """g + g right and g right, each in the dtype named, or None for None."""
    tokens, width = y.shape
    total, product = (
        None if dtype is None else torch.empty((tokens, width), dtype=dtype, device=y.device)
        for dtype in (total_dtype, product_dtype)
    )
    if y.numel():
        tiles = select(TABLE, y.device, "gradient_product", right.itemsize, y.itemsize)
        gradient_product_kernel[_grid(tokens, width, tiles)](
            grad_y, y, right, total, product, tokens, width,
            *grad_y.stride(), *y.stride(), *right.stride(),
            WHOLE_N=width % tiles["BLOCK_N"] == 0, WHOLE_K=width % tiles["BLOCK_K"] == 0,
            **_options(right), **tiles,
        )  # fmt: skip
    return total, product


def _weight_product(left: Tensor, right: Tensor, y: Tensor | None = None) -> Tensor:
    """left^T right [D, D] in float32, right counting only where y, if given, is not zero."""
    tokens, width = left.shape
    if not left.numel():
        return left.new_zeros((width, width), dtype=torch.float32)
    tiles = select(TABLE, left.device, "weight_product", left.itemsize, right.itemsize)
    (programs,) = _grid(width, width, tiles)
    steps = triton.cdiv(tokens, tiles["BLOCK_K"])
    splits = max(1, min(_PROGRAMS // programs, steps // _LEAST_STEPS, _MOST_SPLITS))
    tokens_per_split = triton.cdiv(steps, splits) * tiles["BLOCK_K"]
    splits = triton.cdiv(tokens, tokens_per_split)
    partials = torch.empty((splits, width, width), dtype=torch.float32, device=left.device)
    weight_product_kernel[(programs, splits)](
        left, right, y, partials, tokens, tokens_per_split, width,
        *left.stride(), *right.stride(), *((0, 0) if y is None else y.stride()),
        WHOLE_M=width % tiles["BLOCK_M"] == 0, WHOLE_N=width % tiles["BLOCK_N"] == 0,
        WHOLE_K=tokens % tiles["BLOCK_K"] == 0, **_options(left), **tiles,
    )  # fmt: skip
    return partials.sum(0)


def _grid(rows: int, columns: int, tiles: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, tiles["BLOCK_M"]) * triton.cdiv(columns, tiles["BLOCK_N"]),)


def _options(operand: Tensor) -> dict[str, object]:
    """How products round: float32 operands as torch is told to, and multiply-adds fused whatever Triton's default."""
    return {"PRECISION": dot_precision(operand), "enable_fp_fusion": True}
