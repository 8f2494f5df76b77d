"""The large products' Triton kernels: tokens times a matrix, and what the gradients of both need.

    moments            mean and rstd of each token, and the tokens normalised
    project            out = T(skip +- (LN(x) B + bias))
    gradient_rows      g = the gradient where T let it pass, xhat, their sums: one pass over the tokens
    input_gradient     dx = extra + LN'(+-(g B^T) + g)
    weight_gradient    H = xhat^T g and the column sums of g: a product of the library's

A product runs at the rate of the tensor cores only where its loop does nothing but load two tiles and multiply them. (One that
summed a LayerNorm's moments as it went also gave other results each run, as Triton 3.6 compiled it for Hopper: NOTES.md, GPU.) So
what a LayerNorm or a gradient needs besides is made before, row by row. The backward's two sums over features come from rows
of g: with
z = xhat . B' + offset the product that was,

    c1 = sum_k dxhat_k        = sum_n g_n u_n,                u = column sums of B'
    c2 = sum_k dxhat_k xhat_k = sum_n g_n (z_n - offset_n)
    dx = rstd * (dxhat - c1 / width - xhat * c2 / width)

What the products keep for their backward is x, y and two float32 numbers a token. Column sums are split in a fixed way and added
in a fixed order; the weight gradient is as repeatable as ``torch.mm`` of the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_kernels.matmul import float32_product
from crate_kernels.precision import dot_precision
from crate_kernels.products.operand import Norm, Operand
from crate_kernels.tiles import select
from crate_kernels.tiles.products import TABLE

# The pass over rows is bound by memory: tiles that load 16 bytes a thread, several at a time.
_ROWS = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2}


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
def load_row(vector, columns, column_count):
    """vector[columns] as a float32 row [1, columns], zero beyond the end."""
    return tl.load(vector + columns, mask=columns < column_count, other=0.0).to(tl.float32)[None, :]


@triton.jit
def scalar(value, IN_MEMORY: tl.constexpr):
    """A number that came as an argument, or lies on the device."""
    if IN_MEMORY:
        return tl.load(value).to(tl.float32)
    else:
        return value


@triton.jit
def rectify(u, threshold):
    """max(u - threshold, 0). Compared so that NaN is not taken for zero."""
    return tl.where(u <= threshold, 0.0, u - threshold)


@triton.jit
def soft_threshold(u, threshold):
    """sign(u) * max(|u| - threshold, 0). Compared so that NaN is not taken for zero."""
    return tl.where(tl.abs(u) <= threshold, 0.0, tl.where(u < 0.0, u + threshold, u - threshold))


@triton.jit
def before_threshold(y, threshold, ACTIVATION: tl.constexpr):
    """u of y = T(u), where y is not zero."""
    if ACTIVATION == "relu":
        return y + threshold
    else:
        return tl.where(y < 0.0, y - threshold, y + threshold)


@triton.jit
def masked_gradient(grad_y, y):
    """The gradient that passes the threshold: y is the only mask, since both thresholds pass it just where y is not zero."""
    return tl.where(y != 0.0, grad_y, 0.0)


@triton.jit
def add_moments(mean, squares, x_tile, start, columns, width, WHOLE: tl.constexpr):
    """Mean of each token, and its sum of squares about the mean, over one tile of features more than the ``start`` before.

    Each tile about its own mean, then merged (Chan, Golub, LeVeque 1979): nothing cancels, however far from zero the tokens are.
    """
    x_tile = x_tile.to(tl.float32)
    count = tl.minimum(width - start, columns.shape[0]).to(tl.float32)
    tile_mean = tl.sum(x_tile, 1) / count  # features beyond the last were loaded as zero
    centred = x_tile - tile_mean[:, None]
    if not WHOLE:
        centred = tl.where((columns < width)[None, :], centred, 0.0)
    step, share = tile_mean - mean, count / (start + count)
    return mean + step * share, squares + tl.sum(centred * centred, 1) + step * step * (start * share)


@triton.jit
def inverse_deviation(squares, width, eps):
    """rstd of each token, from its sum of squares about the mean."""
    return 1.0 / tl.sqrt(squares / width + eps)


@triton.jit
def tile_position(row_tiles, column_tiles, GROUP: tl.constexpr):
    """This program's (row tile, column tile), ordered so that GROUP row tiles in turn reuse the right operand in L2."""
    program = tl.program_id(0)
    return tl.swizzle2d(program // column_tiles, program % column_tiles, row_tiles, column_tiles, GROUP)


@triton.jit
def store_normalised(
    xhat_out,
    x,
    mean,
    rstd,
    rows,
    tokens,
    width,
    x_row_stride,
    x_column_stride,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Writes whole rows of (x - mean) * rstd; mean and rstd are columns [rows, 1]."""
    for start in range(0, width, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        x_tile = load_tile(x, rows, columns, x_row_stride, x_column_stride, tokens, width, False, WHOLE)
        store_tile(xhat_out, (x_tile.to(tl.float32) - mean) * rstd, rows, columns, tokens, width)


@triton.jit(do_not_specialize=["tokens", "eps"])
def moments_kernel(
    x, stats, xhat_out, eps, tokens, width, x_row_stride, x_column_stride,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of BLOCK_M tokens of x [tokens, width] into stats [2, tokens], and the tokens normalised where asked for."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, width, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        x_tile = load_tile(x, rows, columns, x_row_stride, x_column_stride, tokens, width, False, WHOLE)
        mean, squares = add_moments(mean, squares, x_tile, start, columns, width, WHOLE)
    rstd = inverse_deviation(squares, width, eps)
    tl.store(stats + rows, mean, mask=rows < tokens)
    tl.store(stats + tokens.to(tl.int64) + rows, rstd, mask=rows < tokens)
    if xhat_out is not None:
        store_normalised(
            xhat_out,
            x,
            mean[:, None],
            rstd[:, None],
            rows,
            tokens,
            width,
            x_row_stride,
            x_column_stride,
            WHOLE,
            BLOCK_N,
        )


@triton.jit(do_not_specialize=["tokens"])
def project_kernel(
    x, matrix, out, stats, column_sum, offset, skip, norm_weight, norm_bias, threshold, tokens, inner_width, width,
    x_row_stride, x_column_stride, matrix_row_stride, matrix_column_stride, skip_row_stride, skip_column_stride,
    FOLD: tl.constexpr, SKIP_NORM: tl.constexpr, NEGATE: tl.constexpr, ACTIVATION: tl.constexpr,
    THRESHOLD_IN_MEMORY: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = T(skip +- (LN(x) B + bias)).

    x [tokens, inner_width], in the matrix's dtype; matrix [inner_width, width]; skip, out [tokens, width]; stats [2, tokens]:
    mean and rstd. FOLD: x are raw tokens, and their moments enter behind the product. SKIP_NORM: so are those of skip.
    """
    tile_m, tile_n = tile_position(tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the last read the last again and are not stored: no mask along them.
    clamped_rows = tl.minimum(rows, tokens - 1)

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner_width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, clamped_rows, inner, x_row_stride, x_column_stride, tokens, inner_width, True, WHOLE_K)
        matrix_tile = load_tile(
            matrix, inner, columns, matrix_row_stride, matrix_column_stride, inner_width, width, WHOLE_K, WHOLE_N
        )
        product = tl.dot(x_tile, matrix_tile, product, input_precision=PRECISION)

    if FOLD or SKIP_NORM:
        mean = tl.load(stats + clamped_rows)[:, None]
        rstd = tl.load(stats + tokens.to(tl.int64) + clamped_rows)[:, None]
    if FOLD:
        product = rstd * (product - mean * load_row(column_sum, columns, width))
    if offset is not None:
        product += load_row(offset, columns, width)
    if NEGATE:
        product = -product
    if skip is not None:
        skip_tile = load_tile(
            skip, clamped_rows, columns, skip_row_stride, skip_column_stride, tokens, width, True, WHOLE_N
        ).to(tl.float32)
        if SKIP_NORM:
            skip_tile = (skip_tile - mean) * rstd * load_row(norm_weight, columns, width)
            if norm_bias is not None:
                skip_tile += load_row(norm_bias, columns, width)
        product += skip_tile
    if ACTIVATION == "relu":
        product = rectify(product, scalar(threshold, THRESHOLD_IN_MEMORY))
    elif ACTIVATION == "soft":
        product = soft_threshold(product, scalar(threshold, THRESHOLD_IN_MEMORY))
    store_tile(out, product, rows, columns, tokens, width)


@triton.jit(do_not_specialize=["tokens"])
def gradient_rows_kernel(
    grad, y, x, stats, product_sum, product_offset, g_out, xhat_out, sums, column_sums, threshold, tokens, inner_width, width,
    grad_row_stride, grad_column_stride, y_row_stride, y_column_stride, x_row_stride, x_column_stride,
    ACTIVATION: tl.constexpr, THRESHOLD_IN_MEMORY: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_M tokens: g, grad where y is not zero, c1 and c2, xhat, and the column sums of g; each where it has a place.

    grad, y, g_out [tokens, width]; x, xhat_out [tokens, inner_width]; stats, sums [2, tokens]; column_sums [programs, width];
    product_sum, product_offset [width]: u and offset of c1 and c2, skip included.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    c2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        g = load_tile(grad, rows, columns, grad_row_stride, grad_column_stride, tokens, width, False, WHOLE_N)
        g = g.to(tl.float32)
        if y is not None:
            y_tile = load_tile(y, rows, columns, y_row_stride, y_column_stride, tokens, width, False, WHOLE_N)
            y_tile = y_tile.to(tl.float32)
            if ACTIVATION != "none":
                g = masked_gradient(g, y_tile)
        if sums is not None:
            z = y_tile
            if ACTIVATION != "none":
                z = before_threshold(y_tile, scalar(threshold, THRESHOLD_IN_MEMORY), ACTIVATION)
            c1 += g * load_row(product_sum, columns, width)
            c2 += g * (z - load_row(product_offset, columns, width))
        if g_out is not None:
            store_tile(g_out, g, rows, columns, tokens, width)
        if column_sums is not None:
            place = column_sums + tl.program_id(0).to(tl.int64) * width + columns
            tl.store(place, tl.sum(g, 0), mask=columns < width)
    if sums is not None:
        tl.store(sums + rows, tl.sum(c1, 1), mask=rows < tokens)
        tl.store(sums + tokens.to(tl.int64) + rows, tl.sum(c2, 1), mask=rows < tokens)
    if xhat_out is not None:
        mean = tl.load(stats + rows, mask=rows < tokens, other=0.0)[:, None]
        rstd = tl.load(stats + tokens.to(tl.int64) + rows, mask=rows < tokens, other=0.0)[:, None]
        store_normalised(
            xhat_out, x, mean, rstd, rows, tokens, inner_width, x_row_stride, x_column_stride, WHOLE_K, BLOCK_N
        )


@triton.jit(do_not_specialize=["tokens"])
def input_gradient_kernel(
    g, grad, y, matrix, out, x, stats, sums, norm_weight, extra, tokens, inner_width, width,
    g_row_stride, g_column_stride, grad_row_stride, grad_column_stride, y_row_stride, y_column_stride,
    matrix_row_stride, matrix_column_stride, x_row_stride, x_column_stride, extra_row_stride, extra_column_stride,
    NORM: tl.constexpr, SKIP: tl.constexpr, NEGATE: tl.constexpr,
    WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = extra + LN'(+-(g B^T) + grad), what is added of grad only where y is not zero.

    g, grad, y [tokens, inner_width], g in the dtype of the product, grad and y as they came; matrix B^T [inner_width, width];
    out, x, extra [tokens, width]; stats, sums [2, tokens]: mean and rstd, c1 and c2; norm_weight [width].
    """
    tile_m, tile_n = tile_position(tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    clamped_rows = tl.minimum(rows, tokens - 1)

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner_width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        g_tile = load_tile(g, clamped_rows, inner, g_row_stride, g_column_stride, tokens, inner_width, True, WHOLE_K)
        matrix_tile = load_tile(
            matrix, inner, columns, matrix_row_stride, matrix_column_stride, inner_width, width, WHOLE_K, WHOLE_N
        )
        product = tl.dot(g_tile, matrix_tile, product, input_precision=PRECISION)

    if NEGATE:
        product = -product
    if SKIP:
        skipped = load_tile(
            grad, clamped_rows, columns, grad_row_stride, grad_column_stride, tokens, width, True, WHOLE_N
        ).to(tl.float32)
        if y is not None:
            y_tile = load_tile(y, clamped_rows, columns, y_row_stride, y_column_stride, tokens, width, True, WHOLE_N)
            skipped = masked_gradient(skipped, y_tile)
        if NORM:
            skipped *= load_row(norm_weight, columns, width)
        product += skipped
    if NORM:
        mean = tl.load(stats + clamped_rows)[:, None]
        rstd = tl.load(stats + tokens.to(tl.int64) + clamped_rows)[:, None]
        c1 = tl.load(sums + clamped_rows)[:, None]
        c2 = tl.load(sums + tokens.to(tl.int64) + clamped_rows)[:, None]
        x_tile = load_tile(x, clamped_rows, columns, x_row_stride, x_column_stride, tokens, width, True, WHOLE_N)
        normalised = (x_tile.to(tl.float32) - mean) * rstd
        product = rstd * (product - (c1 + normalised * c2) / width)
    if extra is not None:
        product += load_tile(
            extra, clamped_rows, columns, extra_row_stride, extra_column_stride, tokens, width, True, WHOLE_N
        ).to(tl.float32)
    store_tile(out, product, rows, columns, tokens, width)


def moments(x: Tensor, eps: float, xhat_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Mean and ``(variance + eps)^-1/2`` of each token, [2, tokens] float32; and (x - mean) * rstd in ``xhat_dtype``, if any.

    x is [tokens, width], of any floating dtype and strides. One pass, or two of which the second finds x in the cache.
    """
    tokens, width = x.shape
    stats = x.new_empty((2, tokens), dtype=torch.float32)
    xhat = None if xhat_dtype is None else torch.empty((tokens, width), dtype=xhat_dtype, device=x.device)
    if x.numel():
        moments_kernel[(triton.cdiv(tokens, _ROWS["BLOCK_M"]),)](
            x, stats, xhat, eps, tokens, width, *x.stride(),
            WHOLE=width % _ROWS["BLOCK_N"] == 0, enable_fp_fusion=True, **_ROWS,
        )  # fmt: skip
    return stats, xhat


def project(
    x: Tensor,
    operand: Operand,
    out_dtype: torch.dtype,
    *,
    norm: Norm | None = None,
    skip: Tensor | None = None,
    skip_norm: bool = False,
    negate: bool = False,
    threshold: Tensor | None = None,
    soft: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``T(skip +- (LN(x) B + bias))`` and, with a LayerNorm, mean and rstd of each token.

    Args:
        x: [tokens, inner], any floating dtype and strides; rounded to the operand's dtype.
        operand: of B [inner, width], by ``preparation.prepare`` with the same norm.
        out_dtype: of the result.
        norm: the LayerNorm before the product.
        skip: [tokens, width], any dtype and strides, added in float32; with ``skip_norm`` it is x, and LN(x) is added.
        negate: subtract the product instead.
        threshold: a number (0-dim tensor, on the CPU or beside x); no threshold if None.
        soft: the signed threshold instead of the relu's.

    Returns:
        [tokens, width], contiguous, and [2, tokens] float32 or None.
    """
    (tokens, inner_width), width = x.shape, operand.matrix.shape[1]
    out = torch.empty((tokens, width), dtype=out_dtype, device=x.device)
    fold = norm_mode(x, operand, norm) == "fold"
    stats, xhat = (None, x) if norm is None else moments(x, norm.eps, None if fold else operand.matrix.dtype)
    if out.numel():
        tiles = _tiles("project", x.device, operand.matrix, x)
        threshold, in_memory = number(threshold)
        # Cast before the product, whose loop then copies tiles as they are.
        multiplied = (x if fold else xhat).to(operand.matrix.dtype)
        project_kernel[_grid(tokens, width, tiles)](
            multiplied, operand.matrix, out, stats if fold or skip_norm else None, operand.column_sum if fold else None,
            operand.offset, skip, _vector(norm.weight) if skip_norm else None, _vector(norm.bias) if skip_norm else None,
            threshold, tokens, inner_width, width,
            *multiplied.stride(), *operand.matrix.stride(), *_strides(skip),
            FOLD=fold, SKIP_NORM=skip_norm, NEGATE=negate,
            ACTIVATION="none" if threshold is None else "soft" if soft else "relu", THRESHOLD_IN_MEMORY=in_memory,
            WHOLE_N=width % tiles["BLOCK_N"] == 0, WHOLE_K=inner_width % tiles["BLOCK_K"] == 0,
            **_options(operand.matrix), **tiles,
        )  # fmt: skip
    return out, stats


class GradientRows(NamedTuple):
    """What both gradients of ``project`` read; None where a part is not asked for or has no use.

    g: [tokens, width], the gradient behind the threshold, in the dtype of the products.
    sums: [2, tokens] float32, c1 and c2, with a LayerNorm.
    xhat: [tokens, inner], the tokens as they were multiplied, normalised or not, in the dtype of the products.
    column: [width] float32, the sums of g over tokens.
    """

    g: Tensor
    sums: Tensor | None = None
    xhat: Tensor | None = None
    column: Tensor | None = None


def gradient_rows(
    grad: Tensor,
    x: Tensor | None,
    dtype: torch.dtype,
    *,
    operand: Operand | None = None,
    y: Tensor | None = None,
    threshold: Tensor | None = None,
    soft: bool = False,
    norm: Norm | None = None,
    stats: Tensor | None = None,
    skip: bool = False,
    negate: bool = False,
    need_input: bool = True,
    need_weight: bool = True,
    need_column: bool = True,
) -> GradientRows:
    """One pass over grad, y and x, for the gradients of ``project`` that are asked for; none where they can be read as they are.

    Args:
        grad, x: as ``input_gradient`` and ``weight_gradient`` take them; x is needed for the weight, or with a LayerNorm.
        dtype: of the products.
        operand: what ``project`` took; needed for the input's gradient with a LayerNorm.
        threshold: what ``project`` took, on the host or the device; None where there was none, and y is then no mask.
        y, soft, norm, stats, skip, negate: see ``input_gradient``.
        need_input, need_weight, need_column: whose gradients are asked for: x's, the matrix's, the offset's.
    """
    tokens, width = grad.shape
    normalised, masked = norm is not None or stats is not None, threshold is not None
    make_g = masked or grad.dtype != dtype
    make_sums, make_xhat = need_input and norm is not None, need_weight and normalised
    g = torch.empty((tokens, width), dtype=dtype, device=grad.device) if make_g else grad
    sums = grad.new_empty((2, tokens), dtype=torch.float32) if make_sums else None
    xhat = x.to(dtype) if need_weight and not normalised else None
    if make_xhat:
        xhat = torch.empty(x.shape, dtype=dtype, device=x.device)
    programs = triton.cdiv(tokens, _ROWS["BLOCK_M"])
    need_column = need_column and need_weight
    columns = grad.new_empty((programs, width), dtype=torch.float32) if need_column else None
    if not (make_g or make_sums or make_xhat or need_column) or not tokens:
        return GradientRows(g, sums, xhat, None if columns is None else columns.sum(0))
    product_sum = product_offset = None
    if make_sums:
        product_sum, product_offset = operand.column_sum, operand.offset
        if negate:
            product_sum, product_offset = -product_sum, -product_offset
        if skip:
            product_sum = product_sum + norm.weight
            product_offset = product_offset if norm.bias is None else product_offset + norm.bias
    inner_width = 0 if x is None else x.shape[1]
    threshold, in_memory = number(threshold)
    read_y = y if masked or make_sums else None
    gradient_rows_kernel[(programs,)](
        grad, read_y, x if make_xhat else None, stats, product_sum, product_offset,
        g if make_g else None, xhat if make_xhat else None, sums, columns, threshold, tokens, inner_width, width,
        *grad.stride(), *_strides(read_y), *_strides(x if make_xhat else None),
        ACTIVATION="none" if not masked else "soft" if soft else "relu", THRESHOLD_IN_MEMORY=in_memory,
        WHOLE_N=width % _ROWS["BLOCK_N"] == 0, WHOLE_K=inner_width % _ROWS["BLOCK_N"] == 0,
        enable_fp_fusion=True, **_ROWS,
    )  # fmt: skip
    return GradientRows(g, sums, xhat, None if columns is None else columns.sum(0))


def input_gradient(
    grad: Tensor,
    operand: Operand,
    out_dtype: torch.dtype,
    *,
    y: Tensor | None = None,
    threshold: Tensor | None = None,
    soft: bool = False,
    norm: Norm | None = None,
    x: Tensor | None = None,
    stats: Tensor | None = None,
    skip: bool = False,
    negate: bool = False,
    extra: Tensor | None = None,
    rows: GradientRows | None = None,
) -> Tensor:
    """The gradient of ``project`` in x: ``extra + LN'(+-(g B^T) + g)``, g being grad where y is not zero.

    Args:
        grad: [tokens, width of the product], any dtype and strides; only read.
        operand, norm, soft, negate: what ``project`` took.
        out_dtype: of the result.
        y: what ``project`` gave; needed with a threshold or a LayerNorm, which then allows no skip but x itself.
        threshold: what ``project`` took; None where there was none.
        x, stats: what ``project`` took and gave; needed with a LayerNorm.
        skip: x itself (normalised, with a LayerNorm) was added to the product.
        extra: [tokens, inner], added to the result: the gradient that comes past the product.
        rows: ``gradient_rows`` of all this, where it was made before.

    Returns:
        [tokens, inner], contiguous.
    """
    dtype = operand.matrix.dtype
    (tokens, inner_width), width = grad.shape, operand.matrix.shape[0]
    out = torch.empty((tokens, width), dtype=out_dtype, device=grad.device)
    if not out.numel():
        return out
    if rows is None:
        rows = gradient_rows(
            grad, x, dtype, operand=operand, y=y, threshold=threshold, soft=soft, norm=norm, stats=stats, skip=skip,
            negate=negate, need_weight=False,
        )  # fmt: skip
    # What is added past the product is not rounded to its dtype; where nothing had to be, it is g, masked already.
    skipped = rows.g if grad.dtype == dtype else grad
    mask = y if skip and threshold is not None and grad.dtype != dtype else None
    tiles = _tiles("input_gradient", grad.device, operand.matrix, skipped)
    matrix = operand.matrix.t()
    input_gradient_kernel[_grid(tokens, width, tiles)](
        rows.g, skipped if skip else None, mask, matrix, out, x, stats, rows.sums,
        None if norm is None else _vector(norm.weight), extra, tokens, inner_width, width,
        *rows.g.stride(), *_strides(skipped if skip else None), *_strides(mask), *matrix.stride(), *_strides(x),
        *_strides(extra),
        NORM=norm is not None, SKIP=skip, NEGATE=negate,
        WHOLE_N=width % tiles["BLOCK_N"] == 0, WHOLE_K=inner_width % tiles["BLOCK_K"] == 0,
        **_options(operand.matrix), **tiles,
    )  # fmt: skip
    return out


def weight_gradient(
    x: Tensor,
    grad: Tensor,
    operand_dtype: torch.dtype,
    *,
    y: Tensor | None = None,
    stats: Tensor | None = None,
    need_column: bool = True,
    rows: GradientRows | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``project`` in the operand's matrix and in its offset, float32: ``xhat^T g`` and the column sums of g.

    Args:
        x: [tokens, inner], as ``project`` took it; normalised where ``stats`` [2, tokens] are given.
        grad: [tokens, width], any dtype and strides; only read.
        operand_dtype: the dtype of the product.
        y: [tokens, width], where there was a threshold: grad counts where y is not zero.
        need_column: whether the column sums are asked for; else None.
        rows: ``gradient_rows`` of all this, where it was made before.
    """
    if rows is None:
        mask = None if y is None else torch.zeros(())  # y is the mask of any threshold
        rows = gradient_rows(
            grad, x, operand_dtype, y=y, threshold=mask, stats=stats, need_input=False, need_column=need_column
        )
    return float32_product(rows.xhat.t(), rows.g), rows.column


TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def norm_mode(x: Tensor, operand: Operand, norm: Norm | None) -> str:
    """Folding multiplies raw tokens and takes the mean's share off the product. So the product must not round them, or a token
    far from zero would lose what its mean hides; and float32 results, more exact than the difference, come without it: there
    ("first") tokens are normalised before they are multiplied."""
    if norm is None:
        return "none"
    return "fold" if x.itemsize == 2 and x.dtype == operand.matrix.dtype else "first"


def _tiles(kernel: str, device: torch.device, operand: Tensor, stream: Tensor) -> dict[str, int]:
    return select(TABLE, device, kernel, operand.itemsize, stream.itemsize)


def number(value: Tensor | None) -> tuple[Tensor | float | None, bool]:
    """A number as the kernels take it: by value from the host, by address from the device, never waiting for it."""
    if value is None:
        return None, False
    return (float(value), False) if value.device.type == "cpu" else (value, True)


def _vector(values: Tensor | None) -> Tensor | None:
    """As the kernels read it: one number after the other."""
    return None if values is None else values.contiguous()


def _strides(matrix: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if matrix is None else matrix.stride()


def _grid(rows: int, columns: int, tiles: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, tiles["BLOCK_M"]) * triton.cdiv(columns, tiles["BLOCK_N"]),)


def _options(operand: Tensor) -> dict[str, object]:
    """How products round: float32 operands as torch is told to, and multiply-adds fused whatever Triton's default."""
    return {"PRECISION": dot_precision(operand), "enable_fp_fusion": True}
