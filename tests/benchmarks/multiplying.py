"""A product of [rows, width] and [width, BLOCK_N], and what keeps its loop from the tensor cores' rate."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(
    x, matrix, out, width,
    DOUBLED: tl.constexpr, TWICE: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x matrix; with DOUBLED (2 x) matrix; with TWICE each step's product is itself multiplied, by the transposed matrix tile."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_K if TWICE else BLOCK_N), tl.float32)
    for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        inner = start + tl.arange(0, BLOCK_K)
        tile = tl.load(x + rows[:, None] * width + inner[None, :])
        matrix_tile = tl.load(matrix + inner.to(tl.int64)[:, None] * BLOCK_N + columns[None, :])
        if DOUBLED:
            tile = (tile.to(tl.float32) * 2).to(tile.dtype)
        if TWICE:
            weights = tl.dot(tile, matrix_tile)
            total += tl.dot(weights.to(tile.dtype), tl.trans(matrix_tile))
        else:
            total = tl.dot(tile, matrix_tile, total)
    if TWICE:
        columns = tl.arange(0, BLOCK_K)
    tl.store(out + rows[:, None] * total.shape[1] + columns[None, :], total.to(out.dtype.element_ty))
