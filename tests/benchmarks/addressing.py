"""Kernels that copy [rows, width], each with its own way to an address; those in 32 bits are wrong past 2^31 elements."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy(x, out, offsets):
    tl.store(out + offsets, tl.load(x + offsets))


@triton.jit
def wide(x, out, row_stride, trips, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    copy(x, out, rows.to(tl.int64) * row_stride)


@triton.jit
def narrow(x, out, row_stride, trips, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    copy(x, out, rows * row_stride)


@triton.jit
def narrow_by_a_constant(x, out, row_stride, trips, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    copy(x, out, rows * WIDTH)


@triton.jit
def widened_too_late(x, out, row_stride, trips, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    copy(x, out, (rows * row_stride).to(tl.int64))


@triton.jit
def narrow_base(x, out, row_stride, trips, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK * row_stride
    copy(x + first, out + first, tl.arange(0, BLOCK).to(tl.int64) * row_stride)


@triton.jit
def narrow_in_one_branch(x, out, row_stride, trips, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK
    offset = rows.to(tl.int64) * row_stride
    if trips > 3:
        offset = (rows * row_stride).to(tl.int64)
    copy(x, out, offset + tl.arange(0, BLOCK))


@triton.jit
def stepping_offset(x, out, row_stride, trips, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * 0
    for _ in range(0, trips):
        copy(x, out, offset + tl.arange(0, BLOCK))
        offset += BLOCK * row_stride


@triton.jit
def stepping_pointer(x, out, row_stride, trips, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    for _ in range(0, trips):
        copy(x, out, tl.arange(0, BLOCK))
        x += BLOCK * row_stride
        out += BLOCK * row_stride
