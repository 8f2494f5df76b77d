"""The large products' Triton kernels: tokens times a matrix, and the gradients of both.

    moments            mean and rstd of each token, and the tokens normalised where they are multiplied so
    project            out = T(skip +- (LN(x) B + bias))
    gradient_rows      the gradient as both products of the backward read it, and its sums: one pass over the tokens
    input_gradient     dx = extra + LN'(+-(g B^T) + g)
    weight_gradient    H = xhat^T g: a product of the library's

A product runs at the rate of the tensor cores only where its loop does nothing but load two tiles and multiply them. (One that
summed a LayerNorm's moments as it went also gave other results each run, as Triton 3.6 compiled it for Hopper: NOTES.md, GPU.) So
what a LayerNorm or a gradient needs besides comes from whoever writes the tensor, row by row.

There are two ways to multiply tokens behind a LayerNorm, and ``folds`` says which. Folded, raw tokens are multiplied, and their
moments enter behind the product. The backward then stores the gradient times rstd, g^ = rstd * g, and multiplies raw tokens
again: with z = xhat . B' + offset the product that was, u the column sums of B', and sums over features for each token,

    c1 = sum_n g^_n u_n       c2 = sum_n g^_n (z_n - offset_n)
    dx = g^ B'^T - (c1 + xhat * c2) / width       H = x^T g^ - 1 (sum over tokens of mean * g^)

Not folded, tokens are normalised before they are multiplied, g stays as it is, dx takes rstd last, and H is xhat^T g.
z comes from y as it is stored: an offset many times as large as the product itself costs dx as much of its accuracy.

What the products keep for their backward is x, y and two float32 numbers a token. Column sums are split in a fixed way and added
in a fixed order; a product of the library's is as repeatable as ``torch.mm`` of the device.
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
from crate_kernels.tiles import cdiv, naming_the_cache, select
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


@triton.jit(do_not_specialize=["tokens", "eps"])
def moments_kernel(
    x, stats, xhat, eps, tokens, width, x_row_stride, x_column_stride,
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
    if xhat is not None:
        for start in range(0, width, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            x_tile = load_tile(x, rows, columns, x_row_stride, x_column_stride, tokens, width, False, WHOLE)
            store_tile(xhat, (x_tile.to(tl.float32) - mean[:, None]) * rstd[:, None], rows, columns, tokens, width)


@triton.jit
def column_parts(tile, PARTS: tl.constexpr):
    """A tile as so many tiles (a power of two) side by side, so that what follows holds fewer registers at a time; they are
    shared out in a way that needs no exchange."""
    if PARTS == 1:
        return (tile,)
    else:
        halves = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        return column_parts(left, PARTS // 2) + column_parts(right, PARTS // 2)


@triton.jit
def multiply(
    x, matrix, tokens, inner_width, width, x_row_stride, x_column_stride, matrix_row_stride, matrix_column_stride,
    LIBRARY: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """This program's tile of x [tokens, inner_width] times the matrix [inner_width, width], or, from a LIBRARY, of the product
    itself, which x then is: its rows, the same clamped, its first column, and its parts, float32.

    Rows beyond the last read the last again and are not stored: no mask along them. Tiles are ordered so that GROUP row tiles in
    turn reuse the matrix's tile in L2.
    """
    row_tiles, column_tiles = tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N)
    program = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(program // column_tiles, program % column_tiles, row_tiles, column_tiles, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    clamped_rows = tl.minimum(rows, tokens - 1)
    first = tile_n * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    if LIBRARY:
        product = load_tile(x, clamped_rows, columns, x_row_stride, x_column_stride, tokens, width, True, WHOLE_N)
    else:
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, inner_width, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            x_tile = load_tile(
                x, clamped_rows, inner, x_row_stride, x_column_stride, tokens, inner_width, True, WHOLE_K
            )
            matrix_tile = load_tile(
                matrix, inner, columns, matrix_row_stride, matrix_column_stride, inner_width, width, WHOLE_K, WHOLE_N
            )
            product = tl.dot(x_tile, matrix_tile, product, input_precision=PRECISION)
    return rows, clamped_rows, first, column_parts(product, PARTS)


@triton.jit
def load_pairs(pairs, clamped_rows, tokens):
    """Two numbers a token, of pairs [2, tokens], as columns [rows, 1]: mean and rstd, or c1 and c2."""
    return tl.load(pairs + clamped_rows)[:, None], tl.load(pairs + tokens.to(tl.int64) + clamped_rows)[:, None]


@triton.jit
def behind_projection(
    product, out, stats, column_sum, offset, skip, norm_weight, norm_bias, threshold, rows, clamped_rows, first, tokens, width,
    skip_row_stride, skip_column_stride,
    FOLD: tl.constexpr, SKIP_NORM: tl.constexpr, NEGATE: tl.constexpr, ACTIVATION: tl.constexpr,
    THRESHOLD_IN_MEMORY: tl.constexpr, WHOLE_N: tl.constexpr,
):  # fmt: skip
    """What follows the product of ``project_kernel``, for its columns from ``first`` on, up to the store."""
    columns = first + tl.arange(0, product.shape[1])
    if FOLD or SKIP_NORM:
        mean, rstd = load_pairs(stats, clamped_rows, tokens)
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
def project_kernel(
    x, matrix, out, stats, column_sum, offset, skip, norm_weight, norm_bias, threshold, tokens, inner_width, width,
    x_row_stride, x_column_stride, matrix_row_stride, matrix_column_stride, skip_row_stride, skip_column_stride,
    FOLD: tl.constexpr, SKIP_NORM: tl.constexpr, NEGATE: tl.constexpr, ACTIVATION: tl.constexpr,
    THRESHOLD_IN_MEMORY: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    LIBRARY: tl.constexpr,
):  # fmt: skip
    """out = T(skip +- (LN(x) B + bias)).

    x [tokens, inner_width], in the matrix's dtype; matrix [inner_width, width]; skip, out [tokens, width]; stats [2, tokens]:
    mean and rstd. FOLD: x are raw tokens, and their moments enter behind the product. SKIP_NORM: so are those of skip.
    """
    rows, clamped_rows, first, parts = multiply(
        x, matrix, tokens, inner_width, width, x_row_stride, x_column_stride, matrix_row_stride, matrix_column_stride,
        LIBRARY, WHOLE_N, WHOLE_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, PARTS,
    )  # fmt: skip
    for part in tl.static_range(PARTS):
        behind_projection(
            parts[part], out, stats, column_sum, offset, skip, norm_weight, norm_bias, threshold,
            rows, clamped_rows, first + part * (BLOCK_N // PARTS), tokens, width, skip_row_stride, skip_column_stride,
            FOLD, SKIP_NORM, NEGATE, ACTIVATION, THRESHOLD_IN_MEMORY, WHOLE_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def gradient_rows_kernel(
    grad, y, x, stats, product_sum, product_offset, g_out, sums, column_sums, threshold, tokens, width,
    grad_row_stride, grad_column_stride, y_row_stride, y_column_stride, x_row_stride, x_column_stride,
    SCALED: tl.constexpr, ACTIVATION: tl.constexpr, THRESHOLD_IN_MEMORY: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_M tokens: g, grad where y is not zero (SCALED: times rstd), c1 and c2, and column sums; each where it has a place.

    grad, y, g_out [tokens, width]; stats, sums [2, tokens]; product_sum, product_offset [width]: u and offset of c1 and c2, skip
    included; column_sums [1 or 2, programs, width]: of g without rstd, and SCALED, of mean * g, or with x, of g * xhat.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    c2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if stats is not None:
        mean, rstd = load_pairs(stats, tl.minimum(rows, tokens - 1), tokens)
    for start in range(0, width, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        g = load_tile(grad, rows, columns, grad_row_stride, grad_column_stride, tokens, width, False, WHOLE)
        g = g.to(tl.float32)
        if y is not None:
            y_tile = load_tile(y, rows, columns, y_row_stride, y_column_stride, tokens, width, False, WHOLE)
            y_tile = y_tile.to(tl.float32)
            if ACTIVATION != "none":
                g = masked_gradient(g, y_tile)
        if column_sums is not None:
            sums_here = column_sums + tl.program_id(0).to(tl.int64) * width + columns
            tl.store(sums_here, tl.sum(g, 0), mask=columns < width)
            second = tl.num_programs(0).to(tl.int64) * width
            if x is not None:
                x_tile = load_tile(x, rows, columns, x_row_stride, x_column_stride, tokens, width, False, WHOLE)
                xhat = (x_tile.to(tl.float32) - mean) * rstd
                tl.store(sums_here + second, tl.sum(g * xhat, 0), mask=columns < width)
        if g_out is not None:
            # Sums are of what products will read: rounded.
            g = (g * rstd if SCALED else g).to(g_out.dtype.element_ty)
            store_tile(g_out, g, rows, columns, tokens, width)
            g = g.to(tl.float32)
        if SCALED:  # noqa: SIM102  (decided while compiling, as is the other)
            if column_sums is not None:
                tl.store(sums_here + second, tl.sum(mean * g, 0), mask=columns < width)
        if sums is not None:
            z = y_tile
            if ACTIVATION != "none":
                z = before_threshold(y_tile, scalar(threshold, THRESHOLD_IN_MEMORY), ACTIVATION)
            c1 += g * load_row(product_sum, columns, width)
            c2 += g * (z - load_row(product_offset, columns, width))
    if sums is not None:
        tl.store(sums + rows, tl.sum(c1, 1), mask=rows < tokens)
        tl.store(sums + tokens.to(tl.int64) + rows, tl.sum(c2, 1), mask=rows < tokens)


@triton.jit
def behind_input_gradient(
    product, grad, y, out, x, stats, sums, norm_weight, extra, delta, attended, rows, clamped_rows, first, tokens, width,
    sample_tokens,
    grad_row_stride, grad_column_stride, y_row_stride, y_column_stride, x_row_stride, x_column_stride,
    extra_row_stride, extra_column_stride,
    NORM: tl.constexpr, SCALED: tl.constexpr, SKIP: tl.constexpr, NEGATE: tl.constexpr, HEAD_DIM: tl.constexpr,
    WHOLE_N: tl.constexpr,
):  # fmt: skip
    """What follows the product of ``input_gradient_kernel``, for its columns from ``first`` on, up to the store."""
    columns = first + tl.arange(0, product.shape[1])
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
        mean, rstd = load_pairs(stats, clamped_rows, tokens)
        c1, c2 = load_pairs(sums, clamped_rows, tokens)
        x_tile = load_tile(x, clamped_rows, columns, x_row_stride, x_column_stride, tokens, width, True, WHOLE_N)
        product -= c1 / width + (x_tile.to(tl.float32) - mean) * (rstd * c2 / width)
        if not SCALED:
            product *= rstd
    if extra is not None:
        product += load_tile(
            extra, clamped_rows, columns, extra_row_stride, extra_column_stride, tokens, width, True, WHOLE_N
        ).to(tl.float32)
    store_tile(out, product, rows, columns, tokens, width)
    if delta is not None:
        attended_tile = load_tile(attended, clamped_rows, columns, width, 1, tokens, width, True, WHOLE_N)
        # Sums are of what attention's backward will read: rounded.
        terms = product.to(out.dtype.element_ty).to(tl.float32) * attended_tile.to(tl.float32)
        HEADS: tl.constexpr = product.shape[1] // HEAD_DIM
        terms = tl.sum(tl.reshape(terms, (rows.shape[0], HEADS, HEAD_DIM)), 2)
        heads = first // HEAD_DIM + tl.arange(0, HEADS)
        head_count = width // HEAD_DIM
        place = ((rows // sample_tokens).to(tl.int64)[:, None] * head_count + heads[None, :]) * sample_tokens
        inside = (rows < tokens)[:, None] & (heads < head_count)[None, :]
        tl.store(delta + place + (rows % sample_tokens)[:, None], terms, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def input_gradient_kernel(
    g, grad, y, matrix, out, x, stats, sums, norm_weight, extra, delta, attended, tokens, inner_width, width, sample_tokens,
    g_row_stride, g_column_stride, grad_row_stride, grad_column_stride, y_row_stride, y_column_stride,
    matrix_row_stride, matrix_column_stride, x_row_stride, x_column_stride, extra_row_stride, extra_column_stride,
    NORM: tl.constexpr, SCALED: tl.constexpr, SKIP: tl.constexpr, NEGATE: tl.constexpr, HEAD_DIM: tl.constexpr,
    WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    LIBRARY: tl.constexpr,
):  # fmt: skip
    """out = extra + LN'(+-(g B^T) + grad), what is added of grad only where y is not zero.

    g, grad, y [tokens, inner_width], g in the dtype of the product (SCALED: it contains rstd), grad as it came, or g itself;
    matrix B^T [inner_width, width]; out, x, extra [tokens, width]; stats [2, tokens]: mean and rstd; sums [2, tokens]: c1 and
    c2; norm_weight [width]; attended [tokens, width], contiguous, and delta [samples, heads, sample_tokens]: of each head of
    HEAD_DIM features the sums of out * attended.
    """
    rows, clamped_rows, first, parts = multiply(
        g, matrix, tokens, inner_width, width, g_row_stride, g_column_stride, matrix_row_stride, matrix_column_stride,
        LIBRARY, WHOLE_N, WHOLE_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, PARTS,
    )  # fmt: skip
    for part in tl.static_range(PARTS):
        behind_input_gradient(
            parts[part], grad, y, out, x, stats, sums, norm_weight, extra, delta, attended,
            rows, clamped_rows, first + part * (BLOCK_N // PARTS), tokens, width, sample_tokens,
            grad_row_stride, grad_column_stride, y_row_stride, y_column_stride, x_row_stride, x_column_stride,
            extra_row_stride, extra_column_stride, NORM, SCALED, SKIP, NEGATE, HEAD_DIM, WHOLE_N,
        )  # fmt: skip


def moments(x: Tensor, eps: float, xhat_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Mean and ``(variance + eps)^-1/2`` of each token, [2, tokens] float32; and (x - mean) * rstd in ``xhat_dtype``, if any.

    x is [tokens, width], of any floating dtype and strides. One pass, or two of which the second finds x in the cache.
    """
    tokens, width = x.shape
    stats = x.new_empty((2, tokens), dtype=torch.float32)
    xhat = None if xhat_dtype is None else torch.empty((tokens, width), dtype=xhat_dtype, device=x.device)
    if x.numel():
        moments_kernel[(cdiv(tokens, _ROWS["BLOCK_M"]),)](
            x, stats, xhat, eps, tokens, width, *x.stride(),
            WHOLE=width % _ROWS["BLOCK_N"] == 0, enable_fp_fusion=True, **_ROWS,
        )  # fmt: skip
    return stats, xhat


def folds(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether products in ``dtype`` take raw tokens, and the mean's share off what comes out: where both are bfloat16.

    The product must not round tokens, or one far from zero would lose what its mean hides; float32 results, more exact than that
    difference, come without it; and float16 has not the range for a gradient times rstd.
    """
    return x.dtype == dtype == torch.bfloat16


def before_product(x: Tensor, operand: Operand, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
    """x [tokens, width] as products multiply it, and with a LayerNorm, mean and rstd of each token, [2, tokens] float32."""
    dtype = operand.matrix.dtype
    if norm is None:
        return x.to(dtype), None
    stats, xhat = moments(x, norm.eps, None if folds(x, dtype) else dtype)
    return x if xhat is None else xhat, stats


@naming_the_cache
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
        operand: of B [inner, width], by ``op.operands`` with the same norm.
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
    fold = norm is not None and folds(x, operand.matrix.dtype)
    multiplied, stats = before_product(x, operand, norm)
    out = torch.empty((tokens, width), dtype=out_dtype, device=x.device)
    if not out.numel():
        return out, stats
    use = "masked" if threshold is not None else "norm" if fold else "plain"
    tiles = _tiles("project", use, operand.matrix, out if skip is None else skip, width)
    threshold, in_memory = number(threshold)
    left, matrix = _by(tiles, multiplied, operand.matrix)
    project_kernel[_grid(tokens, width, tiles)](
        left, matrix, out, stats if fold or skip_norm else None, operand.column_sum if fold else None,
        operand.offset, skip, _vector(norm.weight) if skip_norm else None, _vector(norm.bias) if skip_norm else None,
        threshold, tokens, inner_width, width, *left.stride(), *_strides(matrix), *_strides(skip),
        FOLD=fold, SKIP_NORM=skip_norm, NEGATE=negate, ACTIVATION=_activation(threshold, soft), THRESHOLD_IN_MEMORY=in_memory,
        **_options(operand.matrix, inner_width, width, tiles),
    )  # fmt: skip
    return out, stats


class GradientRows(NamedTuple):
    """The gradient behind the threshold, as both products of the backward read it, and its sums; None where not asked for.

    g: [tokens, width] in the dtype of the products; times rstd where the tokens were folded.
    sums: [2, tokens] float32, c1 and c2, with a LayerNorm.
    column_sums: [1 or 2, width] float32, over tokens of the gradient without rstd; folded, of mean * g, too; else, where x was
        added to the product normalised, of g * xhat, none of them rounded.
    """

    g: Tensor
    sums: Tensor | None = None
    column_sums: Tensor | None = None


class Gradients(NamedTuple):
    """Of ``project``; None where not asked for.

    x: [tokens, inner].
    matrix: [inner, width] float32, any strides: xhat^T g, with xhat the tokens normalised, or as they are; folded, x^T g^, which
        mean_column has yet to be taken off. With a LayerNorm ``preparation.matrix_gradient`` goes on from there.
    column: [width] float32, sums over tokens of g: the gradient of the offset.
    mean_column: [width] float32, sums over tokens of mean * g^; None where the tokens were not folded.
    diagonal: [width] float32, the diagonal of xhat^T g of what was not rounded; None where they were folded, or not added.
    delta: [samples, heads, tokens of a sample] float32, where ``heads`` were given and could be.
    """

    x: Tensor | None
    matrix: Tensor | None
    column: Tensor | None
    mean_column: Tensor | None
    diagonal: Tensor | None
    delta: Tensor | None


def gradient_sums(operand: Operand, norm: Norm, skip: bool = False, negate: bool = False) -> tuple[Tensor, Tensor]:
    """u and offset [width] of c1 = sum g u and c2 = sum g (z - offset), z the product with all that was added to it."""
    column_sum, offset = operand.column_sum, operand.offset
    if negate:
        column_sum, offset = -column_sum, -offset
    if skip:
        column_sum = column_sum + norm.weight
        offset = offset if norm.bias is None else offset + norm.bias
    return column_sum, offset


def gradients(
    grad: Tensor | None,
    x: Tensor | None,
    operand: Operand,
    out_dtype: torch.dtype,
    *,
    y: Tensor | None = None,
    threshold: Tensor | None = None,
    soft: bool = False,
    norm: Norm | None = None,
    stats: Tensor | None = None,
    skip: bool = False,
    negate: bool = False,
    extra: Tensor | None = None,
    rows: GradientRows | None = None,
    heads: tuple[int, int] | None = None,
    need_x: bool = True,
    need_matrix: bool = True,
    need_column: bool = True,
) -> Gradients:
    """The gradients of ``project`` that are asked for: ``dx = extra + LN'(+-(g B^T) + g)``, g being grad where y is not zero.

    Args:
        grad: [tokens, width of the product], any dtype and strides; only read. None where there are ``rows``.
        x: [tokens, inner], what ``project`` took; needed with a LayerNorm, for the matrix or for heads.
        operand, threshold, soft, norm, negate: what ``project`` took.
        out_dtype: of dx.
        y: what ``project`` gave; needed with a threshold, and with a LayerNorm unless there are ``rows``.
        stats: what ``project`` gave with a LayerNorm.
        skip: x itself (normalised, with a LayerNorm) was added to the product.
        extra: [tokens, inner], added to dx: the gradient that comes past the product.
        rows: what ``gradient_rows`` would make of all this, made before by whoever wrote the gradient.
        heads: x is what attention gave, [samples * tokens, heads * head_dim], of so many samples and heads: ask for delta, each
            head's sums over features of dx * x, where its width divides a tile.
        need_x, need_matrix, need_column: whose gradients are asked for: x's, the matrix's, the offset's.
    """
    fold = norm is not None and folds(x, operand.matrix.dtype)
    if rows is None:
        rows = gradient_rows(
            grad, x, operand, y=y, threshold=threshold, soft=soft, norm=norm, stats=stats, skip=skip, negate=negate,
            need_x=need_x, need_column=need_column or (need_matrix and fold),
        )  # fmt: skip
    dx = product = delta = None
    if need_x:
        masked = y if threshold is not None else None
        dx, delta = _input_gradient(
            rows, grad if skip else None, operand, out_dtype, masked, x, norm, stats, negate, extra, heads
        )
    if need_matrix:
        product = weight_gradient(x, rows.g, operand.matrix, norm)
        product = product.neg_() if negate else product
    sums = -rows.column_sums if negate and rows.column_sums is not None else rows.column_sums
    second = sums[1] if need_matrix and sums is not None and len(sums) > 1 else None
    seconds = (second, None) if fold else (None, second)
    return Gradients(dx, product, sums[0] if need_column else None, *seconds, delta)


def gradient_rows(
    grad: Tensor,
    x: Tensor | None,
    operand: Operand,
    *,
    y: Tensor | None = None,
    threshold: Tensor | None = None,
    soft: bool = False,
    norm: Norm | None = None,
    stats: Tensor | None = None,
    skip: bool = False,
    negate: bool = False,
    need_x: bool = True,
    need_column: bool = True,
) -> GradientRows:
    """One pass over grad and y; none where grad can be read as it is. Arguments as ``gradients`` has them."""
    (tokens, width), dtype = grad.shape, operand.matrix.dtype
    masked, scaled, make_sums = threshold is not None, norm is not None and folds(x, dtype), need_x and norm is not None
    make_g = masked or scaled or grad.dtype != dtype
    g = torch.empty((tokens, width), dtype=dtype, device=grad.device) if make_g else grad
    sums = grad.new_empty((2, tokens), dtype=torch.float32) if make_sums else None
    programs = cdiv(tokens, _ROWS["BLOCK_M"])
    added = x if need_column and skip and norm is not None and not scaled else None
    two = scaled or added is not None
    columns = grad.new_empty((1 + two, programs, width), dtype=torch.float32) if need_column else None
    if tokens and (make_g or make_sums or need_column):
        of_sums = gradient_sums(operand, norm, skip, negate) if make_sums else (None, None)
        threshold, in_memory = number(threshold)
        read_y = y if masked or make_sums else None
        gradient_rows_kernel[(programs,)](
            grad, read_y, added, stats if two else None, *of_sums, g if make_g else None, sums, columns, threshold, tokens, width,
            *grad.stride(), *_strides(read_y), *_strides(added),
            SCALED=scaled, ACTIVATION=_activation(threshold, soft), THRESHOLD_IN_MEMORY=in_memory,
            WHOLE=width % _ROWS["BLOCK_N"] == 0, enable_fp_fusion=True, **_ROWS,
        )  # fmt: skip
    return GradientRows(g, sums, None if columns is None else columns.sum(1))


@naming_the_cache
def _input_gradient(
    rows: GradientRows,
    grad: Tensor | None,
    operand: Operand,
    out_dtype: torch.dtype,
    masked: Tensor | None,
    x: Tensor | None,
    norm: Norm | None,
    stats: Tensor | None,
    negate: bool,
    extra: Tensor | None,
    heads: tuple[int, int] | None,
) -> tuple[Tensor, Tensor | None]:
    """dx [tokens, inner], contiguous, and delta. ``grad`` is there where it is added to the product, ``masked`` (y) its mask."""
    (tokens, inner_width), (width, _), dtype = rows.g.shape, operand.matrix.shape, operand.matrix.dtype
    out = torch.empty((tokens, width), dtype=out_dtype, device=rows.g.device)
    use = "masked" if grad is not None else "plain" if norm is None else "norm"
    tiles = _tiles("input_gradient", use, operand.matrix, out, width)
    delta, head_dim, sample_tokens = None, 1, 1
    if heads is not None and tiles["BLOCK_N"] // tiles["PARTS"] % (width // heads[1]) == 0:
        head_dim, sample_tokens = width // heads[1], tokens // max(heads[0], 1)
        delta = out.new_empty((*heads, sample_tokens), dtype=torch.float32)
    if not out.numel():
        return out, delta
    scaled = norm is not None and folds(x, dtype)
    # What is added past the product is not rounded to its dtype, unless g had to be; where g did not, it is masked already.
    skipped = None if grad is None else rows.g if scaled or grad.dtype == dtype else grad
    mask = masked if skipped is grad else None
    left, matrix = _by(tiles, rows.g, operand.matrix.t())
    input_gradient_kernel[_grid(tokens, width, tiles)](
        left, skipped, mask, matrix, out, x if norm else None, stats, rows.sums,
        _vector(norm.weight) if norm and grad is not None else None, extra, delta, None if delta is None else x.contiguous(),
        tokens, inner_width, width, sample_tokens,
        *left.stride(), *_strides(skipped), *_strides(mask), *_strides(matrix), *_strides(x if norm else None), *_strides(extra),
        NORM=norm is not None, SCALED=scaled, SKIP=grad is not None, NEGATE=negate, HEAD_DIM=head_dim,
        **_options(operand.matrix, inner_width, width, tiles),
    )  # fmt: skip
    return out, delta


def weight_gradient(x: Tensor, g: Tensor, like: Tensor | None = None, norm: Norm | None = None) -> Tensor:
    """x^T g [inner, width] float32, in the order of memory that ``like`` has; of x normalised, where it was not folded."""
    if norm is not None and not folds(x, g.dtype):
        x = moments(x, norm.eps, g.dtype)[1]
    x = x.to(g.dtype)
    if like is not None and like.stride(0) == 1:
        return float32_product(g.t(), x).t()
    return float32_product(x.t(), g)


def _tiles(kernel: str, use: str, operand: Tensor, stream: Tensor, width: int) -> dict[str, int]:
    tiles = select(TABLE, operand.device, kernel, use, operand.itemsize, max(operand.itemsize, stream.itemsize))
    if tiles["BLOCK_N"] > 128 and width % tiles["BLOCK_N"]:
        tiles["BLOCK_N"] //= 2  # wide tiles only where they divide the width: the last one would be half empty
    return tiles


def _by(tiles: dict[str, int], left: Tensor, right: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the kernel takes for its two factors: themselves, or the library's product of them and nothing."""
    return (float32_product(left, right), None) if tiles["LIBRARY"] else (left, right)


def number(value: Tensor | None) -> tuple[Tensor | float | None, bool]:
    """A number as the kernels take it: by value from the host, by address from the device, never waiting for it."""
    if value is None:
        return None, False
    return (float(value), False) if value.device.type == "cpu" else (value, True)


def _activation(threshold: Tensor | float | None, soft: bool) -> str:
    return "none" if threshold is None else "soft" if soft else "relu"


def _vector(values: Tensor | None) -> Tensor | None:
    """As the kernels read it: one number after the other."""
    return None if values is None else values.contiguous()


def _strides(matrix: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if matrix is None else matrix.stride()


def _grid(rows: int, columns: int, tiles: dict[str, int]) -> tuple[int]:
    return (cdiv(rows, tiles["BLOCK_M"]) * cdiv(columns, tiles["BLOCK_N"]),)


def _options(operand: Tensor, inner_width: int, width: int, tiles: dict[str, int]) -> dict[str, object]:
    """The tiles, which axes they divide, and how products round: float32 operands as torch is told to; multiply-adds fused
    whatever Triton's default."""
    whole = dict(WHOLE_N=width % tiles["BLOCK_N"] == 0, WHOLE_K=inner_width % tiles["BLOCK_K"] == 0)
    return {**whole, "PRECISION": dot_precision(operand), "enable_fp_fusion": True, **tiles}
