"""Triton kernels of shared-QKV attention: out = softmax(scale * w w^T) w, one tensor as query, key and value.

Forward: online softmax over tiles of keys. Backward: the scores are symmetric, so the tile S[j, i] = scale * w_j . w_i
gives both probabilities that bind tokens i and j, with the row log-sum-exp L kept from the forward pass:

    P[i, j] = exp(S[j, i] - L[i])   token i asks, token j is the key
    P[j, i] = exp(S[j, i] - L[j])   token j asks, token i is the key

The three gradients of ordinary attention (query, key, value) land on the one tensor w, and with delta = rowsum(dO * O)
all of them can be summed in rows j:

    dw_j = sum_i  P[i, j] dO_i
         + scale * sum_i ( P[i, j] (dO_i . w_j - delta_i) + P[j, i] (dO_j . w_i - delta_j) ) w_i

so one program owns rows j, walks all tiles i, and writes its rows once: no atomics, the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_kernels.precision import dot_precision
from crate_kernels.shared_attention.op import empty_token_major
from crate_kernels.tiles import select
from crate_kernels.tiles.shared_attention import TABLE

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def head_offset(head, heads, stride_batch, stride_head):
    """Offset of one of batch * heads heads; in 64 bits, since a whole tensor may pass 2^31 elements."""
    return (head // heads).to(tl.int64) * stride_batch + (head % heads).to(tl.int64) * stride_head


@triton.jit
def tile_pointers(base, rows, stride_token, stride_feature, PADDED_DIM: tl.constexpr):
    """Pointers [rows, PADDED_DIM], in 64 bits: one step to the next token or feature may span a whole batch."""
    features = tl.arange(0, PADDED_DIM).to(tl.int64)
    return base + rows.to(tl.int64)[:, None] * stride_token + features[None, :] * stride_feature


@triton.jit
def tile_mask(rows, tokens, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """True [rows, PADDED_DIM] (or [rows, 1], features unpadded) where the tensor has an element."""
    mask = rows[:, None] < tokens
    if HEAD_DIM != PADDED_DIM:
        mask &= tl.arange(0, PADDED_DIM)[None, :] < HEAD_DIM
    return mask


@triton.jit
def load_tile(base, rows, tokens, stride_token, stride_feature, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Rows of one head [rows, PADDED_DIM]; tokens past the end and padded features read as zero."""
    pointers = tile_pointers(base, rows, stride_token, stride_feature, PADDED_DIM)
    return tl.load(pointers, mask=tile_mask(rows, tokens, HEAD_DIM, PADDED_DIM), other=0.0)


@triton.jit
def store_tile(
    base, tile, rows, tokens, stride_token, stride_feature, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):
    """Store [rows, PADDED_DIM] in the tensor's own dtype, leaving out tokens past the end and padded features."""
    pointers = tile_pointers(base, rows, stride_token, stride_feature, PADDED_DIM)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=tile_mask(rows, tokens, HEAD_DIM, PADDED_DIM))


@triton.jit
def scaled_scores(w_rows, w_columns, columns, tokens, scale_log2, PRECISION: tl.constexpr):
    """scale * w_rows w_columns^T in units of log 2, float32; -inf in columns past the last token."""
    scores = tl.dot(w_rows, tl.trans(w_columns), input_precision=PRECISION) * scale_log2
    return tl.where(columns[None, :] < tokens, scores, float("-inf"))


@triton.jit
def online_softmax_update(scores, row_max, row_sum):
    """Fold one more tile of scores into the running softmax; what was summed before is to be multiplied by ``rescale``.

    Token 0 is a key of every row and lies in the first tile: the new maximum is finite, and no -inf - -inf arises.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    rescale = tl.exp2(row_max - new_max)
    unnormalised = tl.exp2(scores - new_max[:, None])
    return unnormalised, rescale, new_max, row_sum * rescale + tl.sum(unnormalised, 1)


@triton.jit(do_not_specialize=["heads", "tokens"])
def forward_kernel(
    w_ptr, out_ptr, lse_ptr, scale, heads, tokens,
    w_batch, w_head, w_token, w_feature,
    out_batch, out_head, out_token, out_feature,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_QUERIES rows of one head's output and their log-sum-exp."""
    tiles = tl.cdiv(tokens, BLOCK_QUERIES)
    head = tl.program_id(0) // tiles
    start_i = tl.program_id(0) % tiles * BLOCK_QUERIES
    rows_i = start_i + tl.arange(0, BLOCK_QUERIES)
    w_head_ptr = w_ptr + head_offset(head, heads, w_batch, w_head)
    w_i = load_tile(w_head_ptr, rows_i, tokens, w_token, w_feature, HEAD_DIM, PADDED_DIM)

    row_max = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
    out_i = tl.zeros([BLOCK_QUERIES, PADDED_DIM], tl.float32)
    end = tokens
    if IS_CAUSAL:
        end = tl.minimum(tokens, start_i + BLOCK_QUERIES)
    for start_j in range(0, end, BLOCK_KEYS):
        rows_j = start_j + tl.arange(0, BLOCK_KEYS)
        w_j = load_tile(w_head_ptr, rows_j, tokens, w_token, w_feature, HEAD_DIM, PADDED_DIM)
        scores = scaled_scores(w_i, w_j, rows_j, tokens, scale * LOG2_E, PRECISION)
        if IS_CAUSAL:
            scores = tl.where(rows_j[None, :] <= rows_i[:, None], scores, float("-inf"))
        unnormalised, rescale, row_max, row_sum = online_softmax_update(scores, row_max, row_sum)
        out_i = tl.dot(unnormalised.to(w_j.dtype), w_j, out_i * rescale[:, None], input_precision=PRECISION)

    out_head_ptr = out_ptr + head_offset(head, heads, out_batch, out_head)
    store_tile(out_head_ptr, out_i / row_sum[:, None], rows_i, tokens, out_token, out_feature, HEAD_DIM, PADDED_DIM)
    lse_i = (row_max + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + head.to(tl.int64) * tokens + rows_i, lse_i, mask=rows_i < tokens)


@triton.jit(do_not_specialize=["heads", "tokens"])
def delta_kernel(
    grad_out_ptr, out_ptr, delta_ptr, heads, tokens,
    grad_out_batch, grad_out_head, grad_out_token, grad_out_feature,
    out_batch, out_head, out_token, out_feature,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """One program: delta = rowsum(dO * O) of BLOCK_ROWS rows of one head, float32."""
    tiles = tl.cdiv(tokens, BLOCK_ROWS)
    head = tl.program_id(0) // tiles
    rows = tl.program_id(0) % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    grad_out_head_ptr = grad_out_ptr + head_offset(head, heads, grad_out_batch, grad_out_head)
    out_head_ptr = out_ptr + head_offset(head, heads, out_batch, out_head)
    grad_out = load_tile(grad_out_head_ptr, rows, tokens, grad_out_token, grad_out_feature, HEAD_DIM, PADDED_DIM)
    out = load_tile(out_head_ptr, rows, tokens, out_token, out_feature, HEAD_DIM, PADDED_DIM)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * tokens + rows, delta, mask=rows < tokens)


@triton.jit
def add_tile_gradient(
    dw_j, w_j, grad_out_j, lse_j, delta_j, rows_j, start_i,
    w_head_ptr, grad_out_head_ptr, lse_head_ptr, delta_head_ptr, scale, tokens,
    w_token, w_feature, grad_out_token, grad_out_feature,
    J_IS_KEY: tl.constexpr, J_IS_QUERY: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """dw_j plus what the tokens i of one tile contribute to it, with j as their key, as their query, or both."""
    rows_i = start_i + tl.arange(0, BLOCK_I)
    w_i = load_tile(w_head_ptr, rows_i, tokens, w_token, w_feature, HEAD_DIM, PADDED_DIM)
    scores = scaled_scores(w_j, w_i, rows_i, tokens, scale * LOG2_E, PRECISION)
    grad_scores = tl.zeros(scores.shape, tl.float32)
    if J_IS_KEY:
        grad_out_i = load_tile(
            grad_out_head_ptr, rows_i, tokens, grad_out_token, grad_out_feature, HEAD_DIM, PADDED_DIM
        )
        lse_i = tl.load(lse_head_ptr + rows_i, mask=rows_i < tokens, other=0.0) * LOG2_E
        delta_i = tl.load(delta_head_ptr + rows_i, mask=rows_i < tokens, other=0.0)
        p_ij = tl.exp2(scores - lse_i[None, :])
        if IS_CAUSAL:
            p_ij = tl.where(rows_i[None, :] >= rows_j[:, None], p_ij, 0.0)
        dw_j = tl.dot(p_ij.to(w_i.dtype), grad_out_i, dw_j, input_precision=PRECISION)
        grad_p_ij = tl.dot(w_j, tl.trans(grad_out_i), input_precision=PRECISION)
        grad_scores += p_ij * (grad_p_ij - delta_i[None, :])
    if J_IS_QUERY:
        p_ji = tl.exp2(scores - lse_j[:, None])
        if IS_CAUSAL:
            p_ji = tl.where(rows_i[None, :] <= rows_j[:, None], p_ji, 0.0)
        grad_p_ji = tl.dot(grad_out_j, tl.trans(w_i), input_precision=PRECISION)
        grad_scores += p_ji * (grad_p_ji - delta_j[:, None])
    return tl.dot((scale * grad_scores).to(w_i.dtype), w_i, dw_j, input_precision=PRECISION)


@triton.jit(do_not_specialize=["heads", "tokens"])
def backward_kernel(
    grad_out_ptr, w_ptr, lse_ptr, delta_ptr, dw_ptr, scale, heads, tokens,
    grad_out_batch, grad_out_head, grad_out_token, grad_out_feature,
    w_batch, w_head, w_token, w_feature,
    dw_batch, dw_head, dw_token, dw_feature,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_J rows of one head's dw, summed over all tiles of BLOCK_I tokens."""
    tiles = tl.cdiv(tokens, BLOCK_J)
    head = tl.program_id(0) // tiles
    start_j = tl.program_id(0) % tiles * BLOCK_J
    rows_j = start_j + tl.arange(0, BLOCK_J)
    w_head_ptr = w_ptr + head_offset(head, heads, w_batch, w_head)
    grad_out_head_ptr = grad_out_ptr + head_offset(head, heads, grad_out_batch, grad_out_head)
    lse_head_ptr = lse_ptr + head.to(tl.int64) * tokens
    delta_head_ptr = delta_ptr + head.to(tl.int64) * tokens

    w_j = load_tile(w_head_ptr, rows_j, tokens, w_token, w_feature, HEAD_DIM, PADDED_DIM)
    grad_out_j = load_tile(grad_out_head_ptr, rows_j, tokens, grad_out_token, grad_out_feature, HEAD_DIM, PADDED_DIM)
    lse_j = tl.load(lse_head_ptr + rows_j, mask=rows_j < tokens, other=0.0) * LOG2_E
    delta_j = tl.load(delta_head_ptr + rows_j, mask=rows_j < tokens, other=0.0)
    dw_j = tl.zeros([BLOCK_J, PADDED_DIM], tl.float32)

    # One loop for both sides computes each score once. Two loops, a side each, where that costs more than it saves:
    # under a causal mask the sides need different halves of the tokens, and exact float32 products, which run outside
    # the tensor cores and hold whole rows of their operands in registers, would spill.
    if IS_CAUSAL or PRECISION == "ieee":
        first_query, last_key = 0, tokens
        if IS_CAUSAL:
            first_query, last_key = start_j, tl.minimum(tokens, start_j + BLOCK_J)
        for start_i in range(0, last_key, BLOCK_I):
            dw_j = add_tile_gradient(
                dw_j, w_j, grad_out_j, lse_j, delta_j, rows_j, start_i,
                w_head_ptr, grad_out_head_ptr, lse_head_ptr, delta_head_ptr, scale, tokens,
                w_token, w_feature, grad_out_token, grad_out_feature,
                J_IS_KEY=False, J_IS_QUERY=True, IS_CAUSAL=IS_CAUSAL,
                HEAD_DIM=HEAD_DIM, PADDED_DIM=PADDED_DIM, PRECISION=PRECISION, BLOCK_I=BLOCK_I,
            )  # fmt: skip
        for start_i in range(first_query, tokens, BLOCK_I):
            dw_j = add_tile_gradient(
                dw_j, w_j, grad_out_j, lse_j, delta_j, rows_j, start_i,
                w_head_ptr, grad_out_head_ptr, lse_head_ptr, delta_head_ptr, scale, tokens,
                w_token, w_feature, grad_out_token, grad_out_feature,
                J_IS_KEY=True, J_IS_QUERY=False, IS_CAUSAL=IS_CAUSAL,
                HEAD_DIM=HEAD_DIM, PADDED_DIM=PADDED_DIM, PRECISION=PRECISION, BLOCK_I=BLOCK_I,
            )  # fmt: skip
    else:
        for start_i in range(0, tokens, BLOCK_I):
            dw_j = add_tile_gradient(
                dw_j, w_j, grad_out_j, lse_j, delta_j, rows_j, start_i,
                w_head_ptr, grad_out_head_ptr, lse_head_ptr, delta_head_ptr, scale, tokens,
                w_token, w_feature, grad_out_token, grad_out_feature,
                J_IS_KEY=True, J_IS_QUERY=True, IS_CAUSAL=IS_CAUSAL,
                HEAD_DIM=HEAD_DIM, PADDED_DIM=PADDED_DIM, PRECISION=PRECISION, BLOCK_I=BLOCK_I,
            )  # fmt: skip

    dw_head_ptr = dw_ptr + head_offset(head, heads, dw_batch, dw_head)
    store_tile(dw_head_ptr, dw_j, rows_j, tokens, dw_token, dw_feature, HEAD_DIM, PADDED_DIM)


def forward(w: Tensor, scale: float, is_causal: bool, keep: bool = True) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * w w^T) w and the log-sum-exp of the scaled scores.

    Args:
        w: [batch, heads, tokens, head_dim], float32, float16 or bfloat16, any strides; head_dim up to 128.
        scale: factor on the scores.
        is_causal: token i sees tokens 0..i only.
        keep: whether a backward may come; the log-sum-exp costs nothing, and is returned all the same.

    Returns:
        out: [batch, heads, tokens, head_dim], w.dtype, memory in the order [batch, tokens, heads, head_dim].
        lse: [batch, heads, tokens], float32, natural logarithm.
    """
    out = empty_token_major(w)
    lse = w.new_empty(w.shape[:-1], dtype=torch.float32)
    _launch(forward_kernel, w, "BLOCK_QUERIES", (w, out, lse, scale), (w, out), **_arithmetic(w, is_causal))
    return out, lse


def backward(grad_out: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float, is_causal: bool) -> Tensor:
    """dw of :func:`forward`, from what it returned.

    Args:
        grad_out: [batch, heads, tokens, head_dim], w.dtype, any strides, among them 0.
        w, out: as given to and returned by :func:`forward`, any strides.
        lse: [batch, heads, tokens], float32, contiguous.

    Returns:
        dw [batch, heads, tokens, head_dim] in w.dtype, laid out like ``out`` of :func:`forward`.
    """
    dw = empty_token_major(w)
    delta = torch.empty_like(lse)
    _launch(delta_kernel, w, "BLOCK_ROWS", (grad_out, out, delta), (grad_out, out))
    tensors = (grad_out, w, lse, delta, dw, scale)
    _launch(backward_kernel, w, "BLOCK_J", tensors, (grad_out, w, dw), **_arithmetic(w, is_causal))
    return dw


def _arithmetic(w: Tensor, is_causal: bool) -> dict[str, bool | str]:
    """Constants of the kernels that multiply; only float32 has a precision to choose, and PyTorch's own switch does."""
    return {"IS_CAUSAL": is_causal, "PRECISION": dot_precision(w)}


def _launch(kernel, w: Tensor, block_rows: str, arguments: tuple, strided: tuple[Tensor, ...], **constants) -> None:
    """Start one program for every ``block_rows`` tokens of every head of w.

    All programs lie on the grid's first axis (its limit is 2^31 - 1, the others' 65535), the tiles of a head side by
    side: programs that run at the same time share the head's w in the cache.
    """
    if w.numel() == 0:
        return
    batch, heads, tokens, head_dim = w.shape
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    options = select(TABLE, w.device, kernel.__name__, w.element_size(), padded_dim)
    programs = batch * heads * triton.cdiv(tokens, options[block_rows])
    strides = [stride for tensor in strided for stride in tensor.stride()]
    kernel[(programs,)](
        *arguments, heads, tokens, *strides,
        HEAD_DIM=head_dim, PADDED_DIM=padded_dim, enable_fp_fusion=True, **constants, **options,
    )  # fmt: skip
