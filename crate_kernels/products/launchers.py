"""Launchers of the kernels in ``kernels.py``: they choose tiles, allocate results and start the grid."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crate_kernels.dtypes import dot_precision
from crate_kernels.library_products import float32_product
from crate_kernels.products import kernels
from crate_kernels.products.norm_folding import Norm, Operand
from crate_kernels.replay import launch
from crate_kernels.tiles import cdiv, multiprocessors, naming_the_cache, select
from crate_kernels.tiles.products import TABLE

# Whoever merges the moments of parts holds them all in registers.
_MOST_PARTS = 16

# The kernels that pass over rows are bound by memory: these tiles let a thread load 16 bytes at a time, several times.
_ROWS = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2}


def moments_of(x: Tensor, eps: float, xhat_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Mean and rstd = ``(variance + eps)^-1/2`` of each token, [2, tokens] float32; and (x - mean) * rstd in ``xhat_dtype``,
    or None.

    x is [tokens, width], of any floating dtype and strides. The kernel reads it once, and a second time, from the cache, to
    normalise it.
    """
    tokens, width = x.shape
    moments = x.new_empty((2, tokens), dtype=torch.float32)
    xhat = None if xhat_dtype is None else torch.empty((tokens, width), dtype=xhat_dtype, device=x.device)
    if x.numel():
        launch(
            kernels.moments_kernel, (cdiv(tokens, _ROWS["BLOCK_M"]),),
            x, moments, xhat, eps, tokens, width, *x.stride(),
            WHOLE=width % _ROWS["BLOCK_N"] == 0, enable_fp_fusion=True, **_ROWS,
        )  # fmt: skip
    return moments, xhat


def folds(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product in ``dtype`` multiplies raw tokens and subtracts the mean's part afterwards: only if both are bfloat16.

    Tokens must have the dtype of the product: if it rounded them, a token whose mean is large would lose its differences from
    the mean. float32 products are more exact than the subtraction would leave them, and a gradient times rstd may overflow in
    float16.
    """
    return x.dtype == dtype == torch.bfloat16


class PartMoments(NamedTuple):
    """Mean of each token over ``width`` features at a time, and sum of squares about it, in values [2, parts, tokens] float32."""

    values: Tensor
    width: int


class Projected(NamedTuple):
    """The result of ``project``.

    out: [tokens, width], contiguous.
    moments: with a LayerNorm, mean and rstd of each token of x, [2, tokens] float32.
    parts: moments of ``out``, where they were asked for and come in so few parts that they can be merged.
    """

    out: Tensor
    moments: Tensor | None
    parts: PartMoments | None


def before_product(
    x: Tensor, operand: Operand, norm: Norm | None, known: Tensor | PartMoments | None = None
) -> tuple[Tensor, Tensor | None]:
    """x [tokens, width] as the product takes it, and with a LayerNorm the mean and rstd of each token, [2, tokens] float32: those
    that are known, or memory for them if they are known in parts."""
    dtype = operand.matrix.dtype
    if norm is None:
        return x.to(dtype), None
    if folds(x, dtype) and known is not None:
        return x, x.new_empty((2, len(x)), dtype=torch.float32) if isinstance(known, PartMoments) else known
    moments, xhat = moments_of(x, norm.eps, None if folds(x, dtype) else dtype)
    return x if xhat is None else xhat, moments


@naming_the_cache
def project(
    x: Tensor,
    operand: Operand,
    out_dtype: torch.dtype,
    *,
    norm: Norm | None = None,
    moments: Tensor | PartMoments | None = None,
    skip: Tensor | None = None,
    skip_norm: bool = False,
    negate: bool = False,
    threshold: Tensor | None = None,
    soft: bool = False,
    parts_for: torch.dtype | None = None,
) -> Projected:
    """``T(skip +- (LN(x) B + bias))`` with T a threshold.

    Args:
        x: [tokens, inner], any floating dtype and strides; rounded to the operand's dtype.
        operand: what ``op.operands`` made of B [inner, width] and the same norm.
        out_dtype: the dtype of the result.
        norm: the LayerNorm before the product.
        moments: those of x, if they are known; used if raw tokens are multiplied (``folds``).
        skip: [tokens, width], any dtype and strides, added in float32.
        skip_norm: skip is x, and LN(x) is added instead of x.
        negate: subtract the product instead.
        threshold: a number (0-dim tensor, on the CPU or beside x); no threshold if None.
        soft: the signed threshold instead of the relu's.
        parts_for: the dtype of a product that will read the result, after a LayerNorm of its own. If it multiplies raw tokens
            (``folds``), it needs their moments, which are at hand here.
    """
    (tokens, inner_width), width = x.shape, operand.matrix.shape[1]
    fold = norm is not None and folds(x, operand.matrix.dtype)
    known_parts = moments if fold and isinstance(moments, PartMoments) else None
    multiplied, moments = before_product(x, operand, norm, moments)
    out, parts = torch.empty((tokens, width), dtype=out_dtype, device=x.device), None
    if not out.numel():
        return Projected(out, moments, None)
    gives_parts = parts_for is not None and folds(out, parts_for)
    use = "masked" if threshold is not None else "norm" if fold else "moments" if gives_parts else "plain"
    tiles = _tiles("project", use, multiplied, operand.matrix, out if skip is None else skip)
    parts_width = tiles["BLOCK_N"] // tiles["PARTS"]
    if gives_parts and cdiv(width, parts_width) <= _MOST_PARTS:
        parts = PartMoments(out.new_empty((2, cdiv(width, parts_width), tokens), dtype=torch.float32), parts_width)
    threshold_value, in_memory = number(threshold)
    gamma = beta = None
    if norm is not None and skip_norm:
        gamma, beta = norm.weight.contiguous(), None if norm.bias is None else norm.bias.contiguous()
    left, matrix = _by(tiles, multiplied, operand.matrix)
    launch(
        kernels.project_kernel, _grid(out, tiles),
        left, matrix, out, moments if fold or skip_norm else None, known_parts and known_parts.values, parts and parts.values,
        operand.column_sum if fold else None, operand.offset, skip, gamma, beta, threshold_value, norm.eps if norm else 0.0,
        tokens, inner_width, width, known_parts.width if known_parts else 1,
        *left.stride(), *_strides(matrix), *_strides(skip),
        FOLD=fold, SKIP_NORM=skip_norm, NEGATE=negate, ACTIVATION=_activation(threshold, soft), THRESHOLD_IN_MEMORY=in_memory,
        X_PARTS=known_parts.values.shape[1] if known_parts else 0,
        **_options(operand.matrix, tiles),
    )  # fmt: skip
    return Projected(out, moments, parts)


class GradientRows(NamedTuple):
    """The gradient of the threshold's input, as both products of the backward read it, and its sums; None where not asked for.

    g: [tokens, width] in the dtype of the products; times rstd where raw tokens were multiplied (``folds``).
    sums: [2, tokens] float32: c1 and c2 (``kernels``); only with a LayerNorm.
    column_sums: [1 or 2, width] float32, sums over tokens. First of the gradient without rstd. Then, where raw tokens were
        multiplied, of mean * g; where they were not and LN(x) was added to the product, of g * xhat before g is rounded.
    """

    g: Tensor
    sums: Tensor | None = None
    column_sums: Tensor | None = None


class Gradients(NamedTuple):
    """The gradients of ``project``; None where not asked for. g^ is g * rstd, and xhat is the normalised x, or x without a norm.

    x: [tokens, inner].
    matrix: [inner, width] float32, any strides: xhat^T g. Where raw tokens were multiplied (``folds``) it is x^T g^, and
        mean_column must still be subtracted from each row. With a LayerNorm ``preparation.matrix_gradients`` does the rest.
    column: [width] float32, sums over tokens of g: the gradient of the offset.
    mean_column: [width] float32, sums over tokens of mean * g^; only where raw tokens were multiplied.
    diagonal: [width] float32, the diagonal of xhat^T g before g is rounded; only where they were not, and LN(x) was added.
    row_pairs: [samples, heads, tokens of a sample, 2] float32; only where ``scores`` were given and a tile holds whole heads.
    """

    x: Tensor | None
    matrix: Tensor | None
    column: Tensor | None
    mean_column: Tensor | None
    diagonal: Tensor | None
    row_pairs: Tensor | None


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
    moments: Tensor | None = None,
    skip: bool = False,
    negate: bool = False,
    extra: Tensor | None = None,
    rows: GradientRows | None = None,
    scores: tuple[Tensor, float] | None = None,
    need_x: bool = True,
    need_matrix: bool = True,
    need_column: bool = True,
) -> Gradients:
    """The gradients of ``project`` that are asked for: ``dx = extra + LN'(+-(g B^T) + g)``, where g is grad where y is not zero,
    and zero elsewhere.

    Args:
        grad: [tokens, width of the product], any dtype and strides; only read. May be None where ``rows`` are given.
        x: [tokens, inner], the x of ``project``; needed with a LayerNorm, for the matrix's gradient and for ``scores``.
        operand, threshold, soft, norm, negate: those of ``project``.
        out_dtype: the dtype of dx.
        y: the result of ``project``; needed with a threshold, and with a LayerNorm unless ``rows`` are given.
        moments: the mean and rstd that ``project`` returned with a LayerNorm.
        skip: x (LN(x) with a LayerNorm) was added to the product.
        extra: [tokens, inner], added to dx: the part of the gradient that does not go through the product.
        rows: what ``gradient_rows`` returns for these arguments, if it is there already.
        scores: their log-sum-exp [samples, heads, tokens] float32 and scale, where x is the output of attention
            [samples * tokens, heads * head_dim]. Then what its backward reads of each row is written too (``store_row_pairs``),
            delta being the sum over a head's features of dx * x, if head_dim divides the width of a tile.
        need_x, need_matrix, need_column: which gradients are asked for: of x, of the matrix, of the offset.
    """
    fold = norm is not None and x is not None and folds(x, operand.matrix.dtype)
    if rows is None:
        assert grad is not None
        rows = gradient_rows(
            grad, x, operand, y=y, threshold=threshold, soft=soft, norm=norm, moments=moments, skip=skip, negate=negate,
            need_x=need_x, need_column=need_column or (need_matrix and fold),
        )  # fmt: skip
    dx = product = row_pairs = None
    if need_x:
        masked = y if threshold is not None else None
        dx, row_pairs = input_gradient(
            rows, operand, out_dtype, skip=grad if skip else None, mask=masked, x=x, norm=norm, moments=moments,
            negate=negate, extra=extra, scores=scores,
        )  # fmt: skip
    if need_matrix:
        assert x is not None
        product = weight_gradient(x, rows.g, operand.matrix, norm)
        product = product.neg_() if negate else product
    column = second = None
    sums = rows.column_sums
    if sums is not None:
        sums = -sums if negate else sums
        second = sums[1] if need_matrix and len(sums) > 1 else None
    if need_column:
        assert sums is not None
        column = sums[0]
    return Gradients(dx, product, column, second if fold else None, None if fold else second, row_pairs)


def gradient_rows(
    grad: Tensor,
    x: Tensor | None,
    operand: Operand,
    *,
    y: Tensor | None = None,
    threshold: Tensor | None = None,
    soft: bool = False,
    norm: Norm | None = None,
    moments: Tensor | None = None,
    skip: bool = False,
    negate: bool = False,
    need_x: bool = True,
    need_column: bool = True,
) -> GradientRows:
    """The gradient as products read it: one pass over grad and y, none if grad itself will do. Arguments as in ``gradients``."""
    (tokens, width), dtype = grad.shape, operand.matrix.dtype
    masked, make_sums = threshold is not None, need_x and norm is not None
    scaled = norm is not None and x is not None and folds(x, dtype)
    make_g = masked or scaled or grad.dtype != dtype
    added = x if need_column and skip and norm is not None and not scaled else None
    two = scaled or added is not None
    if (
        norm is None and need_column and not make_g
    ):  # not where a gradient's bits would depend on which others are asked for
        return GradientRows(grad, column_sums=grad.sum(0, keepdim=True, dtype=torch.float32))
    g = torch.empty((tokens, width), dtype=dtype, device=grad.device) if make_g else grad
    sums = grad.new_empty((2, tokens), dtype=torch.float32) if make_sums else None
    programs = cdiv(tokens, _ROWS["BLOCK_M"])
    columns = grad.new_empty((1 + two, programs, width), dtype=torch.float32) if need_column else None
    if tokens and (make_g or make_sums or need_column):
        column_sum = offset = gamma = beta = None
        if make_sums:
            column_sum, offset = operand.column_sum, operand.offset
        if make_sums and skip:
            assert norm is not None
            gamma, beta = norm.weight.contiguous(), None if norm.bias is None else norm.bias.contiguous()
        threshold_value, in_memory = number(threshold)
        read_y = y if masked or make_sums else None
        launch(
            kernels.gradient_rows_kernel, (programs,),
            grad, read_y, added, moments if two else None, column_sum, offset, gamma, beta, g if make_g else None, sums, columns,
            threshold_value, tokens, width,
            *grad.stride(), *_strides(read_y), *_strides(added),
            SCALED=scaled, NEGATE=negate and make_sums, ACTIVATION=_activation(threshold, soft), THRESHOLD_IN_MEMORY=in_memory,
            WHOLE=width % _ROWS["BLOCK_N"] == 0, enable_fp_fusion=True, **_ROWS,
        )  # fmt: skip
    return GradientRows(g, sums, None if columns is None else columns.sum(1))


@naming_the_cache
def input_gradient(
    rows: GradientRows,
    operand: Operand,
    out_dtype: torch.dtype,
    *,
    skip: Tensor | None = None,
    mask: Tensor | None = None,
    x: Tensor | None = None,
    norm: Norm | None = None,
    moments: Tensor | None = None,
    negate: bool = False,
    extra: Tensor | None = None,
    scores: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx [tokens, inner] of ``project``, contiguous, and ``row_pairs``.

    ``skip`` is the gradient that is added to the product, in places where ``mask`` (y) is not zero if there is one. The other
    arguments are as in ``gradients``.
    """
    (tokens, inner_width), (width, _), dtype = rows.g.shape, operand.matrix.shape, operand.matrix.dtype
    out = torch.empty((tokens, width), dtype=out_dtype, device=rows.g.device)
    use = "masked" if skip is not None else "plain" if norm is None else "norm"
    right = operand.matrix.t()
    tiles = _tiles("input_gradient", use, rows.g, right, out)
    pairs, lse, attended, scale, head_dim, sample_tokens = None, None, None, 1.0, 1, 1
    if scores is not None and x is not None and tiles["BLOCK_N"] // tiles["PARTS"] % (width // scores[0].shape[1]) == 0:
        lse, scale = scores
        head_dim, sample_tokens = width // lse.shape[1], lse.shape[2]
        pairs, attended = torch.empty((*lse.shape, 2), dtype=torch.float32, device=out.device), x.contiguous()
    if not out.numel():
        return out, pairs
    scaled = norm is not None and x is not None and folds(x, dtype)
    # The gradient that is added to the product: unrounded if possible, and then masked in the kernel; else g, masked already.
    skipped = None if skip is None else rows.g if scaled or skip.dtype == dtype else skip
    mask = mask if skipped is skip else None
    left, matrix = _by(tiles, rows.g, right)
    launch(
        kernels.input_gradient_kernel, _grid(out, tiles),
        left, matrix, skipped, mask, out, x if norm else None, moments, rows.sums,
        norm.weight.contiguous() if norm and skip is not None else None, extra, pairs, lse, attended,
        scale, tokens, inner_width, width, sample_tokens,
        *left.stride(), *_strides(skipped), *_strides(mask), *_strides(matrix), *_strides(x if norm else None), *_strides(extra),
        NORM=norm is not None, SCALED=scaled, SKIP=skip is not None, NEGATE=negate, HEAD_DIM=head_dim,
        **_options(right, tiles),
    )  # fmt: skip
    return out, pairs


def weight_gradient(x: Tensor, g: Tensor, like: Tensor | None = None, norm: Norm | None = None) -> Tensor:
    """x^T g [inner, width] float32, row-major or column-major as ``like`` is. With a norm whose tokens were normalised before
    the product (``folds`` says no), x is normalised here too."""
    if norm is not None and not folds(x, g.dtype):
        _, xhat = moments_of(x, norm.eps, g.dtype)
        assert xhat is not None
        x = xhat
    x = x.to(g.dtype)
    if like is not None and like.stride(0) == 1:
        return float32_product(g.t(), x).t()
    return float32_product(x.t(), g)


def _tiles(kernel: str, use: str, left: Tensor, right: Tensor, stream: Tensor) -> dict[str, int]:
    """The tiles of a product ``left right``, whose epilogue reads or writes ``stream``."""
    key = kernel, use, right.itemsize, max(right.itemsize, stream.itemsize)
    tiles, (tokens, width) = select(TABLE, right.device, *key), (len(left), right.shape[1])
    if tiles["LIBRARY"]:
        tiles["PERSISTENT"] = 0
    elif tiles["PERSISTENT"] and not (
        _has_aligned_rows(left) and (_has_aligned_rows(right) or _has_aligned_rows(right.t()))
    ):
        tiles = dict(TABLE["default"][key])
    # Wide tiles only if they divide the width: else half of the last one may be empty. And not so few of them that programs of a
    # persistent kernel have none; but parts stay as wide, so that moments are made of the same parts for any number of tokens.
    while (tiles["BLOCK_N"] > 128 and width % tiles["BLOCK_N"]) or (
        tiles["PERSISTENT"]
        and tiles["BLOCK_N"] > 64
        and tiles["PARTS"] > 1
        and _count(tokens, width, tiles) < multiprocessors(right.device)
    ):
        tiles |= {"BLOCK_N": tiles["BLOCK_N"] // 2, "PARTS": max(1, tiles["PARTS"] // 2)}
    return tiles


def _has_aligned_rows(matrix: Tensor) -> bool:
    """Whether a descriptor can name the matrix: its rows are contiguous, apart, and begin at multiples of 16 bytes; there are
    fewer than 2^31, less than 2^40 bytes from one to the next."""
    (rows, columns), (row, column) = matrix.shape, matrix.stride()
    aligned = row * matrix.itemsize % 16 == 0 and matrix.data_ptr() % 16 == 0
    return column == 1 and row >= columns > 0 and aligned and rows < 2**31 and row * matrix.itemsize < 2**40


def _by(tiles: dict[str, int], left: Tensor, right: Tensor) -> tuple[Tensor, Tensor | None]:
    """The kernel's two factors; or, where tiles say that PyTorch's library multiplies, their product and None."""
    return (float32_product(left, right), None) if tiles["LIBRARY"] else (left, right)


def number(value: Tensor | None) -> tuple[Tensor | float | None, bool]:
    """A number as kernels take it, and whether it is an address: a value from the host, an address on the device, so that the
    host need not wait."""
    if value is None:
        return None, False
    return (float(value), False) if value.device.type == "cpu" else (value, True)


def _activation(threshold: Tensor | None, soft: bool) -> str:
    return "none" if threshold is None else "soft" if soft else "relu"


def _strides(matrix: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if matrix is None else matrix.stride()


def _count(rows: int, columns: int, tiles: dict[str, int]) -> int:
    return cdiv(rows, tiles["BLOCK_M"]) * cdiv(columns, tiles["BLOCK_N"])


def _grid(out: Tensor, tiles: dict[str, int]) -> tuple[int]:
    count = _count(len(out), out.shape[1], tiles)
    return (min(count, multiprocessors(out.device)) if tiles["PERSISTENT"] else count,)


def _options(right: Tensor, tiles: dict[str, int]) -> dict[str, object]:
    """Launch options: the tiles, which axes of the product's right factor they divide and whether it lies column by column, the
    precision of products, and fused multiply-adds, whatever Triton's default is."""
    inner_width, width = right.shape
    whole = dict(WHOLE_N=width % tiles["BLOCK_N"] == 0, WHOLE_K=inner_width % tiles["BLOCK_K"] == 0)
    transposed = bool(tiles["PERSISTENT"]) and right.stride(1) != 1
    return {**whole, "TRANSPOSED": transposed, "PRECISION": dot_precision(right), "enable_fp_fusion": True, **tiles}
