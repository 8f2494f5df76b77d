"""MSSA's projection and attention in one launch, behind the one for a LayerNorm's moments: one program a head of a sample.

    w = LN(x) U^T      out = softmax(scale * w w^T) w, head by head

A program projects its sample's tokens tile by tile and writes its head's w, which a backward needs anyway. Behind a barrier it
reads that w back, from the cache, as queries and keys of its attention. No program waits for another. What it computes it
computes as the two launches do, in the same device functions; tiles, and with them the order of sums, are its own.

It saves a launch, and the way of w through another one's start. It costs tokens that are read once a head, and a grid of no more
than batch * heads programs, whatever the number of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_kernels.precision import dot_precision
from crate_kernels.products.operand import Norm, Operand
from crate_kernels.products.triton import before_product, folds, load_pairs, load_row, load_tile
from crate_kernels.shared_attention.triton import (
    LN_2,
    add_weighted_rows,
    attend_to_tokens,
    load_parts,
    split_features,
    store_part,
    store_parts,
    tail,
    zero_parts,
)
from crate_kernels.tiles import select
from crate_kernels.tiles.mssa import TABLE, WIDTHS

# One program for each multiprocessor of an H100. A constant rather than the running device's count, so that which form runs,
# and with it every bit, depends on shapes alone.
_MOST_PROGRAMS = 132
# Two tiles of rows: further ones would wait in line where two launches have them side by side.
_MOST_TOKENS = 256


def is_chosen(batch: int, heads: int, tokens: int) -> bool:
    """Whether projection and attention of this shape run in one launch rather than two.

    They do while ``batch * heads <= 132`` and ``tokens <= 256``: one program for each multiprocessor of an H100, two tiles of
    rows each. Up to there two launches do not fill the device either (at width 768 a projection of 11 x 197 tokens is 102
    tiles), and beyond, reading the tokens once a head costs more than a launch. This follows from counting; it has not been
    measured, and is meant to err towards two launches.
    """
    return batch * heads <= _MOST_PROGRAMS and tokens <= _MOST_TOKENS


@triton.jit
def behind_norm(
    product,
    stats,
    rows,
    all_tokens,
    column_sum,
    offset,
    FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FOLD: tl.constexpr,
):
    """What follows a product with a head's features from FIRST on: the moments of raw tokens, and the offset."""
    features = FIRST + tl.arange(0, product.shape[1])
    if FOLD:
        mean, rstd = load_pairs(stats, rows, all_tokens)
        product = rstd * (product - mean * load_row(column_sum, features, HEAD_DIM))
    if offset is not None:
        product += load_row(offset, features, HEAD_DIM)
    return product


@triton.jit(do_not_specialize=["heads", "tokens"])
def attend_kernel(
    x, matrix, column_sum, offset, stats, w, out, lse, scale, heads, tokens, width,
    x_token, x_feature, matrix_row, matrix_column,
    FOLD: tl.constexpr, IS_CAUSAL: tl.constexpr, WHOLE_K: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program: w, out and lse of one head of one sample.

    x [batch * tokens, width], as ``products.triton.before_product`` gives it, and stats; matrix [width, heads * HEAD_DIM];
    column_sum, offset [heads * HEAD_DIM]; w, out [batch, tokens, heads * HEAD_DIM]; lse [batch, heads, tokens].
    """
    program = tl.program_id(0).to(tl.int64)
    sample, head = program // heads, program % heads
    all_tokens = tl.num_programs(0).to(tl.int64) // heads * tokens
    token_stride = heads * HEAD_DIM
    x += sample * tokens * x_token
    matrix += head * HEAD_DIM * matrix_column
    w += sample * tokens * token_stride + head * HEAD_DIM
    out += sample * tokens * token_stride + head * HEAD_DIM
    lse += program * tokens
    if column_sum is not None:
        column_sum += head * HEAD_DIM
    if offset is not None:
        offset += head * HEAD_DIM

    for start in range(0, tokens, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        # Rows beyond the last read the last again and are not stored: no mask along them.
        clamped = tl.minimum(rows, tokens - 1)
        product = zero_parts(BLOCK_ROWS, DIM_A, DIM_B)
        for first in range(0, width, BLOCK_K):
            inner = first + tl.arange(0, BLOCK_K)
            x_tile = load_tile(x, clamped, inner, x_token, x_feature, tokens, width, True, WHOLE_K)
            columns = load_parts(matrix, inner, width, matrix_row, matrix_column, HEAD_DIM, DIM_A, DIM_B, not WHOLE_K)
            product = add_weighted_rows(product, x_tile, columns, DIM_B, PRECISION)
        token = sample * tokens + clamped
        part = behind_norm(product[0], stats, token, all_tokens, column_sum, offset, 0, HEAD_DIM, FOLD)
        store_part(w, part, rows, tokens, token_stride, 1, 0, HEAD_DIM)
        if DIM_B > 0:
            part = behind_norm(product[1], stats, token, all_tokens, column_sum, offset, DIM_A, HEAD_DIM, FOLD)
            store_part(w, part, rows, tokens, token_stride, 1, DIM_A, HEAD_DIM)

    # Each thread reads below what others of its program wrote above; the barrier orders global memory too.
    tl.debug_barrier()

    for start in range(0, tokens, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        w_i = load_parts(w, rows, tokens, token_stride, 1, HEAD_DIM, DIM_A, DIM_B)
        end = tokens
        if IS_CAUSAL:
            end = tl.minimum(tokens, start + BLOCK_ROWS)
        out_i, row_max, row_sum = attend_to_tokens(
            w_i, rows, end, tokens, w, token_stride, 1, 0, scale, 0.0, 0,
            IS_CAUSAL, False, HEAD_DIM, DIM_A, DIM_B, PRECISION, BLOCK_COLUMNS, TAIL,
        )  # fmt: skip
        store_parts(out, out_i, 1.0 / row_sum, rows, tokens, tokens, token_stride, 1, HEAD_DIM, DIM_A, DIM_B)
        tl.store(lse + rows, (row_max + tl.log2(row_sum)) * LN_2, mask=rows < tokens)


def attend(
    x: Tensor, norm: Norm | None, qkv: Operand, heads: int, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """w, out, lse and stats as ``Kept`` has them, in one launch.

    Args:
        x: [batch, tokens, width], any floating dtype and strides; rounded to the operand's dtype.
        norm: the LayerNorm before the projection.
        qkv: of U^T [width, heads * head_dim], by ``op.operands`` with the same norm; head_dim up to 128.
        heads, scale, is_causal: of the attention.
    """
    (batch, tokens, width), matrix = x.shape, qkv.matrix
    inner = matrix.shape[1]
    multiplied, stats = before_product(x.flatten(0, 1), qkv, norm)
    w, out = (x.new_empty(batch * tokens, inner, dtype=matrix.dtype) for _ in range(2))
    lse = x.new_empty(batch, heads, tokens, dtype=torch.float32)
    if w.numel():
        head_dim, precision = inner // heads, dot_precision(matrix)
        dim_a, dim_b = split_features(head_dim)
        most_features = next(most for most in WIDTHS if dim_a + dim_b <= most)
        tiles = select(TABLE, x.device, "attend_kernel", matrix.itemsize, most_features)
        fold = norm is not None and folds(x, matrix.dtype)
        attend_kernel[(batch * heads,)](
            multiplied, matrix, qkv.column_sum if fold else None, qkv.offset, stats if fold else None, w, out, lse, scale,
            heads, tokens, width, *multiplied.stride(), *matrix.stride(),
            FOLD=fold, IS_CAUSAL=is_causal, WHOLE_K=width % tiles["BLOCK_K"] == 0, PRECISION=precision,
            HEAD_DIM=head_dim, DIM_A=dim_a, DIM_B=dim_b,
            TAIL=tail(tiles["BLOCK_COLUMNS"], tokens, is_causal, False, precision), enable_fp_fusion=True, **tiles,
        )  # fmt: skip
    return w, out, lse, stats
