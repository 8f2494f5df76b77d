"""Launchers of the kernels in ``kernels.py``: they choose tiles and parts, allocate results and start the grid."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from crate_kernels.dtypes import dot_precision
from crate_kernels.replay import launch
from crate_kernels.shared_attention import kernels
from crate_kernels.shared_attention.mask import NO_MASK, Mask
from crate_kernels.shared_attention.op import AttentionArguments, empty_token_major
from crate_kernels.tiles import cdiv, family, naming_the_cache, select
from crate_kernels.tiles.shared_attention import LAST_ROWS, MANY_HEADS, TABLE


def forward(w: Tensor, given: AttentionArguments) -> tuple[Tensor, Tensor]:
    """The operator's forward: out and log-sum-exp of ``attend``, whatever is to be kept."""
    return attend(w, _scale(given), given.mask, given.dropout, given.seed)


def backward(
    grad_out: Tensor,
    w: Tensor,
    out: Tensor,
    lse: Tensor,
    need_scales: bool,
    given: AttentionArguments,
) -> tuple[Tensor, Tensor]:
    """The operator's backward: ``gradient``, and that of the scales [heads], float32, if it is asked for; else empty."""
    pairs = row_pairs(grad_out, out, lse, _scale(given))
    rows = torch.empty_like(lse) if need_scales else None
    dw = gradient(grad_out, w, pairs, _scale(given), given.mask, given.dropout, given.seed, rows)
    if rows is None or given.scales is None:
        return dw, lse.new_empty(0)
    return dw, rows.sum((0, 2)) / given.scales


def _number_and_scales(scale: float | Tensor) -> tuple[float, Tensor | None]:
    """How kernels take a scale: a number, or one for each head in memory."""
    return (1.0, scale) if isinstance(scale, Tensor) else (scale, None)


def _scale(given: AttentionArguments) -> float | Tensor:
    return given.scale if given.scales is None else given.scales


def attend(
    w: Tensor, scale: float | Tensor, mask: Mask = NO_MASK, dropout: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * w w^T) w and the log-sum-exp of the scaled scores.

    Args:
        w: [batch, heads, tokens, head_dim], float32, float16 or bfloat16, any strides; head_dim up to 128.
        scale: factor on the scores, not negative; or one for each head, [heads], float32, contiguous.
        mask: which tokens a token attends to. Padding, and tokens without a key, have 0 in out and -inf in lse.
        dropout: probability with which each weight of the softmax is dropped.
        seed: int64 on the CPU, one element: determines the mask; needed where dropout is not 0.

    Returns:
        out: [batch, heads, tokens, head_dim], w.dtype, memory in the order [batch, tokens, heads, head_dim].
        lse: [batch, heads, tokens], float32, natural logarithm.
    """
    out = empty_token_major(w)
    lse = w.new_empty(w.shape[:-1], dtype=torch.float32)
    _launch_walk(kernels.forward_kernel, w, (w, out, lse), (w, out), scale, mask, dropout, seed)
    return out, lse


def row_pairs(grad_out: Tensor, out: Tensor, lse: Tensor, scale: float | Tensor) -> Tensor:
    """What ``gradient`` reads of each row of scores [batch, heads, tokens, 2], float32: the log-sum-exp times log2(e), and
    scale * rowsum(grad_out * out)."""
    pairs = out.new_empty((*out.shape[:-1], 2), dtype=torch.float32)
    options = _options(kernels.row_pairs_kernel, out)
    number, scales = _number_and_scales(scale)
    arguments = grad_out, out, lse, pairs, scales, number
    _launch(kernels.row_pairs_kernel, out, arguments, (grad_out, out), options, 0, out.shape[2])
    return pairs


def gradient(
    grad_out: Tensor,
    w: Tensor,
    pairs: Tensor,
    scale: float | Tensor,
    mask: Mask = NO_MASK,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    rows_of_scale: Tensor | None = None,
) -> Tensor:
    """dw of ``attend``, from its arguments and ``row_pairs``.

    Args:
        grad_out: [batch, heads, tokens, head_dim], w.dtype, any strides, 0 included.
        w: any strides.
        pairs: [batch, heads, tokens, 2], float32, contiguous: what ``row_pairs`` returns for the same scale.
        rows_of_scale: [batch, heads, tokens], float32, contiguous; if given, each row's share of scale * dscale is written there.

    Returns:
        dw [batch, heads, tokens, head_dim] in w.dtype, laid out like ``out`` of ``attend``; 0 in rows of padding.
    """
    dw = empty_token_major(w)
    tensors, strided = (grad_out, w, pairs, dw, w, rows_of_scale), (grad_out, w, dw, w)
    _launch_walk(kernels.backward_kernel, w, tensors, strided, scale, mask, dropout, seed)
    return dw


@functools.cache
def split_features(head_dim: int) -> tuple[int, int]:
    """The widths of the one or two parts that hold a head's features: powers of two, at least 16; the second is 0 for one part.

    48 features take 32 + 16, 72 and 80 take 64 + 16, 96 take 64 + 32. Two parts are taken only if they are narrower than one.
    """
    one = max(16, triton.next_power_of_2(head_dim))
    first, second = one // 2, max(16, triton.next_power_of_2(head_dim - one // 2))
    return (first, second) if first >= 16 and first + second < one else (one, 0)


@functools.cache
def tail(block: int, tokens: int, is_masked: bool, has_lengths: bool, precision: str) -> int:
    """Side of the masked tiles at the end of a walk over ``tokens`` in tiles of ``block``; ``block`` if all tiles are masked.

    It is the next power of two of the remainder, at most half a tile; or half a tile if the remainder is known on the device
    only. All tiles are masked where more than padding is, in short walks whose remainder is more than half a tile, and with exact
    float32 products, whose tiles are small and whose unrolled code is long.
    """
    if is_masked or precision == "ieee":
        return block
    side = triton.next_power_of_2(tokens % block)
    if tokens < 4 * block and not has_lengths and side == block:
        return block
    return max(16, block // 2 if has_lengths else min(side, block // 2))


def _launch_walk(
    kernel,
    w: Tensor,
    tensors: tuple[Tensor | None, ...],
    strided: tuple[Tensor, ...],
    scale: float | Tensor,
    mask: Mask,
    dropout: float,
    seed: Tensor | None,
) -> None:
    """Start a kernel whose programs walk all tokens."""
    precision = dot_precision(w)
    lengths, spans, key_mask = (None if one is None else one.contiguous() for one in mask[2:])
    is_masked = mask.is_causal or not mask.is_plain
    flags = {"IS_CAUSAL": mask.is_causal, "DROPOUT": dropout > 0, "PRECISION": precision}
    number, scales = _number_and_scales(scale)
    numbers = mask.window, number, dropout, 0 if seed is None else int(seed)
    arguments = *tensors, lengths, spans, key_mask, scales, *numbers
    parts = launches(kernel.__name__, _options(kernel, w), w, in_one=is_masked or dropout > 0)
    for first_row, end_row, tile in parts:
        if dropout:  # narrower tiles, to have registers for its factors
            tile["BLOCK_COLUMNS"] = max(16, tile["BLOCK_COLUMNS"] // 2)
        tile["TAIL"] = tail(tile["BLOCK_COLUMNS"], w.shape[2], is_masked, lengths is not None, precision)
        tile["WHOLE_ROWS"] = (end_row - first_row) % tile["BLOCK_ROWS"] == 0
        _launch(kernel, w, arguments, strided, tile | flags, first_row, end_row)


def launches(
    kernel: str, tile: dict[str, int], w: Tensor, in_one: bool = False
) -> list[tuple[int, int, dict[str, int]]]:
    """The first row, the end of the rows and the tile of each launch over the rows of all heads of w: one, or two where the last
    rows of a head are so few that a tile of their own is cheaper, and the heads so many that it is worth a launch. Walks with
    masks or dropout are to be ``in_one``: in 16 rows a warp some of them spill."""
    batch, heads, tokens, head_dim = w.shape
    last = LAST_ROWS[kernel, sum(split_features(head_dim))]
    whole = tokens // tile["BLOCK_ROWS"] * tile["BLOCK_ROWS"]
    pays = family(w.device) == "sm_90" and w.element_size() == 2 and batch * heads >= MANY_HEADS
    if pays and not in_one and 0 < whole < tokens <= whole + last["BLOCK_ROWS"]:
        return [(0, whole, tile), (whole, tokens, tile | last)]
    return [(0, tokens, tile)]


def _options(kernel, w: Tensor) -> dict[str, int]:
    """Tile sizes from the table, and the widths of the parts of a head."""
    dim_a, dim_b = split_features(w.shape[-1])
    options = select(TABLE, w.device, kernel.__name__, w.element_size(), dim_a + dim_b)
    return {**options, "DIM_A": dim_a, "DIM_B": dim_b}


@naming_the_cache
def _launch(
    kernel, w: Tensor, arguments: tuple, strided: tuple[Tensor, ...], options: dict, first_row: int, end_row: int
) -> None:
    """Start one program for every ``BLOCK_ROWS`` tokens, from ``first_row`` to ``end_row``, of every head of w.

    All programs are on the grid's first axis, since its limit is 2^31 - 1 and that of the others 65535. The programs of a head
    are adjacent: those that run at the same time share the head's w in the cache.
    """
    if w.numel() == 0:
        return
    batch, heads, tokens, head_dim = w.shape
    row_tiles = cdiv(end_row - first_row, options["BLOCK_ROWS"])
    strides = [stride for tensor in strided for stride in tensor.stride()]
    launch(
        kernel, (batch * heads * row_tiles,), *arguments, heads, tokens, first_row, row_tiles, *strides,
        HEAD_DIM=head_dim, enable_fp_fusion=True, **options,
    )  # fmt: skip
