"""Triton kernels of shared-QKV attention: out = softmax(scale * w w^T) w, one tensor as query, key and value.

Forward: online softmax over tiles of keys. Backward: the scores are symmetric, so the tile S[j, i] = scale * w_j . w_i
gives both probabilities between tokens i and j, with the log-sum-exp L of each row, kept from the forward:

    P[i, j] = exp(S[j, i] - L[i])   token i is the query, token j the key
    P[j, i] = exp(S[j, i] - L[j])   token j is the query, token i the key

The gradient of w is the sum of the three gradients of ordinary attention (query, key, value). With delta = rowsum(dO * O)
all three can be summed for rows j:

    dw_j = sum_i  P[i, j] dO_i
         + scale * sum_i ( P[i, j] (dO_i . w_j - delta_i) + P[j, i] (dO_j . w_i - delta_j) ) w_i

so one program owns rows j, goes through all tiles i, and writes its rows once: no atomics, the same bits on every run. L and
delta come side by side, ready for use (``row_pairs.py``); in 16 bits, what delta of a rounded output adds to the gradient is
taken away at the end (``correct_delta``). With dropout, P[i, j] dO_i and dO_i . w_j are multiplied by the factor that the forward
gave P[i, j]: 0 or 1 / (1 - dropout).

A mask (``Mask`` in ``mask.py``) makes each token attend to an interval of tokens, and be attended to by an interval: a causal
mask, a window and packed sequences are intervals, and so is what they have in common. A program walks from the first token of its
rows' intervals to the last, and looks in every tile which pairs are within. A key mask hides keys inside the intervals as well.

The sides of tiles are powers of two, which would waste work in two ways. Features: a head of 48 is held as parts of 32 and 16
features (``split_features`` in ``triton.py``); "parts" below are tuples of one or two tiles, side by side. Tokens: a walk takes
whole tiles of BLOCK tokens without masks, and the rest in masked tiles of TAIL (``tail``, there as well), so that 197 tokens are
walked as 3 x 64 + 16. The rows that programs own are parted alike, by two launches of one kernel: wgmma takes no fewer than 64
rows, and where a head has a few rows more than whole tiles, those go to programs of 16 rows (``launches`` in ``triton.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from crate_kernels.row_pairs import LOG2_E, store_row_pairs

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def head_offset(head, heads, stride_batch, stride_head):
    """Offset of one of batch * heads heads; in 64 bits, since a whole tensor may pass 2^31 elements."""
    return (head // heads).to(tl.int64) * stride_batch + (head % heads).to(tl.int64) * stride_head


@triton.jit
def count_tokens(lengths_ptr, head, heads, tokens):
    """How many tokens of the head's sample are not padding. A device cannot raise for a length out of range: it is clamped."""
    if lengths_ptr is None:
        return tokens
    else:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + head // heads), 0), tokens).to(tl.int32)


@triton.jit
def reach(rows, end, tokens, spans_ptr, window):
    """The interval of tokens that each of ``rows`` (a tile or one row) may have to do with, and its end: its sequence of packed
    ones, of ``end`` tokens at most, and the window around it. A device cannot raise for spans out of range: they are clamped."""
    first, last = rows * 0, rows * 0 + end
    if spans_ptr is not None:
        first = tl.maximum(tl.load(spans_ptr + rows, mask=rows < end, other=0), 0)
        last = tl.minimum(tl.maximum(tl.load(spans_ptr + tokens + rows, mask=rows < end, other=0), 0), end)
    if window is not None:
        first = tl.maximum(first, rows - window)
        last = tl.minimum(last, rows + window + 1)
    return first, last


@triton.jit
def keys_of(rows, end, tokens, spans_ptr, window, IS_CAUSAL: tl.constexpr):
    """The interval of the keys of each row, and its end."""
    first, last = reach(rows, end, tokens, spans_ptr, window)
    if IS_CAUSAL:
        last = rows + 1
    return first, last


@triton.jit
def queries_of(rows, end, tokens, spans_ptr, window, IS_CAUSAL: tl.constexpr):
    """The interval of the queries that have each row as a key, if the key mask lets it be one; and its end."""
    first, last = reach(rows, end, tokens, spans_ptr, window)
    if IS_CAUSAL:
        first = rows
    return first, last


@triton.jit
def is_within(places, first, last):
    """True [rows, places] for places in the interval of a row. One comparison: unsigned, what lies before is far behind."""
    size = (last - first).to(tl.uint32)
    return (places[None, :] - first[:, None]).to(tl.uint32) < size[:, None]


@triton.jit
def load_key_mask(key_mask_ptr, rows, end):
    """Which rows the key mask lets be keys; none from ``end`` on."""
    return tl.load(key_mask_ptr + rows, mask=rows < end, other=0).to(tl.int1)


@triton.jit
def part_pointers(base, rows, stride_token, stride_feature, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers [rows, WIDTH] to features from FIRST on, in 64 bits: with large strides, offsets may pass 2^31."""
    features = (FIRST + tl.arange(0, WIDTH)).to(tl.int64)
    return base + rows.to(tl.int64)[:, None] * stride_token + features[None, :] * stride_feature


@triton.jit
def part_mask(rows, end, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr):
    """True [rows, WIDTH] (or broadcastable to it) for rows before ``end`` and features that exist."""
    mask = tl.full([1, 1], True, tl.int1)
    if MASK_ROWS:
        mask = rows[:, None] < end
    if HEAD_DIM < FIRST + WIDTH:
        mask = mask & (FIRST + tl.arange(0, WIDTH) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def load_part(
    base, rows, end, stride_token, stride_feature,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    pointers = part_pointers(base, rows, stride_token, stride_feature, FIRST, WIDTH)
    return tl.load(pointers, mask=part_mask(rows, end, FIRST, WIDTH, HEAD_DIM, MASK_ROWS), other=0.0)


@triton.jit
def load_parts(
    base, rows, end, stride_token, stride_feature,
    HEAD_DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, MASK_ROWS: tl.constexpr = True,
):  # fmt: skip
    """Rows of one head as parts; rows from ``end`` on (where asked to look) and features that do not exist read as zero."""
    a = load_part(base, rows, end, stride_token, stride_feature, 0, DIM_A, HEAD_DIM, MASK_ROWS)
    if DIM_B == 0:
        return (a,)
    else:
        return a, load_part(base, rows, end, stride_token, stride_feature, DIM_A, DIM_B, HEAD_DIM, MASK_ROWS)


@triton.jit
def load_pairs(pointer, rows, end, MASK_ROWS: tl.constexpr = True):
    """Two float32 numbers a row that lie side by side, in one load; rows from ``end`` on (where asked to look) read as zero."""
    pointers = pointer.to(tl.pointer_type(tl.int64)) + rows
    pairs = tl.load(pointers, mask=rows < end, other=0) if MASK_ROWS else tl.load(pointers)
    return pairs.to(tl.int32).to(tl.float32, bitcast=True), (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def store_numbers(pointer, numbers, rows, tokens, MASK_ROWS: tl.constexpr):
    """One number a row, for rows before ``tokens`` (where asked to look)."""
    if MASK_ROWS:
        tl.store(pointer + rows, numbers, mask=rows < tokens)
    else:
        tl.store(pointer + rows, numbers)


@triton.jit
def store_part(
    base, part, rows, end, tokens, stride_token, stride_feature,
    FIRST: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_PADDING: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    if HAS_PADDING:
        part = tl.where((rows < end)[:, None], part, 0.0)
    pointers = part_pointers(base, rows, stride_token, stride_feature, FIRST, part.shape[1])
    mask = part_mask(rows, tokens, FIRST, part.shape[1], HEAD_DIM, MASK_ROWS)
    tl.store(pointers, part.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_parts(
    base, parts, factor, rows, end, tokens, stride_token, stride_feature,
    HEAD_DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, HAS_PADDING: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Store parts times ``factor`` [rows], in the tensor's own dtype; zero in rows of padding, from ``end`` to ``tokens``."""
    a = parts[0] * factor[:, None]
    store_part(base, a, rows, end, tokens, stride_token, stride_feature, 0, HEAD_DIM, HAS_PADDING, MASK_ROWS)
    if DIM_B > 0:
        b = parts[1] * factor[:, None]
        store_part(base, b, rows, end, tokens, stride_token, stride_feature, DIM_A, HEAD_DIM, HAS_PADDING, MASK_ROWS)


@triton.jit
def zero_parts(ROWS: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr):
    if DIM_B == 0:
        return (tl.zeros([ROWS, DIM_A], tl.float32),)
    else:
        return tl.zeros([ROWS, DIM_A], tl.float32), tl.zeros([ROWS, DIM_B], tl.float32)


@triton.jit
def scale_rows(parts, factor, DIM_B: tl.constexpr):
    if DIM_B == 0:
        return (parts[0] * factor[:, None],)
    else:
        return parts[0] * factor[:, None], parts[1] * factor[:, None]


@triton.jit
def products_of_rows(x, y, DIM_B: tl.constexpr, PRECISION: tl.constexpr):
    """x y^T [rows of x, rows of y] in float32, summed over the parts."""
    products = tl.dot(x[0], tl.trans(y[0]), input_precision=PRECISION)
    if DIM_B > 0:
        products = tl.dot(x[1], tl.trans(y[1]), products, input_precision=PRECISION)
    return products


@triton.jit
def add_weighted_rows(sums, weights, y, DIM_B: tl.constexpr, PRECISION: tl.constexpr):
    """sums + weights y, part by part; the weights take y's dtype."""
    weights = weights.to(y[0].dtype)
    a = tl.dot(weights, y[0], sums[0], input_precision=PRECISION)
    if DIM_B == 0:
        return (a,)
    else:
        return a, tl.dot(weights, y[1], sums[1], input_precision=PRECISION)


@triton.jit
def dropout_factors(seed, head, rows, columns, dropout):
    """The factors of P[row, column] and of P[column, row], 0 or 1 / (1 - dropout), both as [rows, columns].

    Philox, a counter-based generator, makes four random words from a key (the seed) and a position of four words. The position is
    the unordered pair of tokens and the head, each a word of its own, so nothing overflows. The first random word is for the
    earlier token as the query, the second for the later.
    """
    row, column = rows[:, None], columns[None, :]
    first, second, _, _ = tl.philox(seed, tl.minimum(row, column), tl.maximum(row, column), head, 0)
    forth = tl.where(row <= column, first, second)
    back = tl.where(column <= row, first, second)
    return factor_of_word(forth, dropout), factor_of_word(back, dropout)


@triton.jit
def factor_of_word(word, dropout):
    # The upper 24 of 32 random bits: a float32 in [0, 1) holds no more.
    uniform = (word >> 8).to(tl.float32) * (1.0 / 16777216.0)
    return tl.where(uniform >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def online_softmax_update(scores, factor, row_max, row_sum, GAPS: tl.constexpr):
    """Add one more tile of scores to the running softmax; the caller multiplies what it has summed before by ``rescale``.

    The scores come unscaled as a rule: ``factor``, scale * log2(e), goes into the fused multiply-add that takes the maximum off.
    Without GAPS, token 0 is a key of every row and is in the first tile, so the new maximum is finite, and -inf - -inf does not
    occur. With GAPS a row may have seen no key yet: then 0 stands for its maximum, and all its exponentials are 0.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
    subtracted = new_max
    if GAPS:
        subtracted = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp2(row_max - subtracted)
    unnormalised = tl.exp2(scores * factor - subtracted[:, None])
    return unnormalised, rescale, new_max, row_sum * rescale + tl.sum(unnormalised, 1)


@triton.jit
def attend_to_tile(
    out_i, row_max, row_sum, w_i, rows_i, keys_i, start_j, end,
    w_head_ptr, w_token, w_feature, key_mask_ptr, head, scale, dropout, seed,
    MASKED: tl.constexpr, INTERVALS: tl.constexpr, GAPS: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Let rows i attend to BLOCK keys from ``start_j`` on as well."""
    rows_j = start_j + tl.arange(0, BLOCK)
    w_j = load_parts(w_head_ptr, rows_j, end, w_token, w_feature, HEAD_DIM, DIM_A, DIM_B, MASKED)
    scores = products_of_rows(w_i, w_j, DIM_B, PRECISION)
    if MASKED:
        is_key = is_within(rows_j, keys_i[0], keys_i[1]) if INTERVALS else rows_j[None, :] < end
        if key_mask_ptr is not None:
            is_key = is_key & load_key_mask(key_mask_ptr, rows_j, end)[None, :]
        scores = tl.where(is_key, scores, float("-inf"))
    factor = scale * LOG2_E
    if (
        DIM_A == 64 and DIM_B == 16
    ):  # with raw scores Triton 3.9 takes 139 registers here, so that only three blocks fit
        scores *= factor
        factor = 1.0
    weights, rescale, row_max, row_sum = online_softmax_update(scores, factor, row_max, row_sum, GAPS)
    if DROPOUT:
        weights *= dropout_factors(seed, head, rows_i, rows_j, dropout)[0]
    out_i = add_weighted_rows(scale_rows(out_i, rescale, DIM_B), weights, w_j, DIM_B, PRECISION)
    return out_i, row_max, row_sum


@triton.jit
def attend_to_tokens(
    w_i, rows_i, keys_i, first_j, end_j, end, w_head_ptr, w_token, w_feature, key_mask_ptr, head, scale, dropout, seed,
    INTERVALS: tl.constexpr, GAPS: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Walk the keys from ``first_j`` to ``end_j``. Returns, for rows i, the output before its division, the largest score, and
    the divisor."""
    row_max = tl.full([rows_i.shape[0]], float("-inf"), tl.float32)
    row_sum = tl.zeros([rows_i.shape[0]], tl.float32)
    out_i = zero_parts(rows_i.shape[0], DIM_A, DIM_B)
    whole = first_j
    if TAIL < BLOCK:
        whole = end_j // BLOCK * BLOCK
        for start_j in range(0, whole, BLOCK):
            out_i, row_max, row_sum = attend_to_tile(
                out_i, row_max, row_sum, w_i, rows_i, keys_i, start_j, end,
                w_head_ptr, w_token, w_feature, key_mask_ptr, head, scale, dropout, seed,
                MASKED=False, INTERVALS=INTERVALS, GAPS=GAPS, DROPOUT=DROPOUT,
                HEAD_DIM=HEAD_DIM, DIM_A=DIM_A, DIM_B=DIM_B, PRECISION=PRECISION, BLOCK=BLOCK,
            )  # fmt: skip
    for start_j in tl.range(whole, end_j, TAIL, num_stages=1 if TAIL == 16 and BLOCK > 16 else None):
        out_i, row_max, row_sum = attend_to_tile(
            out_i, row_max, row_sum, w_i, rows_i, keys_i, start_j, end,
            w_head_ptr, w_token, w_feature, key_mask_ptr, head, scale, dropout, seed,
            MASKED=True, INTERVALS=INTERVALS, GAPS=GAPS, DROPOUT=DROPOUT,
            HEAD_DIM=HEAD_DIM, DIM_A=DIM_A, DIM_B=DIM_B, PRECISION=PRECISION, BLOCK=TAIL,
        )  # fmt: skip
    return out_i, row_max, row_sum


@triton.jit(do_not_specialize=["window", "heads", "tokens", "first_row", "tiles", "seed"])
def forward_kernel(
    w_ptr, out_ptr, lse_ptr, lengths_ptr, spans_ptr, key_mask_ptr, scales_ptr,
    window, scale, dropout, seed: tl.int64, heads, tokens, first_row, tiles,
    w_batch, w_head, w_token, w_feature,
    out_batch, out_head, out_token, out_feature,
    HEAD_DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr,
    IS_CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_ROWS rows of one head's output and their log-sum-exp."""
    HAS_PADDING: tl.constexpr = lengths_ptr is not None
    MASK_ROWS: tl.constexpr = HAS_PADDING or not WHOLE_ROWS
    INTERVALS: tl.constexpr = IS_CAUSAL or window is not None or spans_ptr is not None
    GAPS: tl.constexpr = window is not None or spans_ptr is not None or key_mask_ptr is not None
    head = tl.program_id(0) // tiles
    start_i = first_row + tl.program_id(0) % tiles * BLOCK_ROWS
    rows_i = start_i + tl.arange(0, BLOCK_ROWS)
    end = count_tokens(lengths_ptr, head, heads, tokens)
    w_head_ptr = w_ptr + head_offset(head, heads, w_batch, w_head)
    w_i = load_parts(w_head_ptr, rows_i, end, w_token, w_feature, HEAD_DIM, DIM_A, DIM_B, MASK_ROWS)

    if scales_ptr is not None:
        scale = tl.load(scales_ptr + head % heads)
    if key_mask_ptr is not None:
        key_mask_ptr += (head // heads).to(tl.int64) * tokens

    scale = tl.maximum(scale, 1.2e-38)  # masked scores are -inf before they are scaled, and -inf * 0 is no number

    keys_i = keys_of(rows_i, end, tokens, spans_ptr, window, IS_CAUSAL)
    first_j, end_j = 0, end
    if INTERVALS:
        last_i = tl.maximum(tl.minimum(start_i + BLOCK_ROWS, end) - 1, 0)
        first_j, _ = keys_of(start_i, end, tokens, spans_ptr, window, IS_CAUSAL)
        _, end_j = keys_of(last_i, end, tokens, spans_ptr, window, IS_CAUSAL)
    if lengths_ptr is not None:
        end_j = tl.where(start_i < end, end_j, 0)  # rows of padding attend to nothing
    out_i, row_max, row_sum = attend_to_tokens(
        w_i, rows_i, keys_i, first_j, end_j, end, w_head_ptr, w_token, w_feature, key_mask_ptr, head, scale, dropout, seed,
        INTERVALS, GAPS, DROPOUT, HEAD_DIM, DIM_A, DIM_B, PRECISION, BLOCK_COLUMNS, TAIL,
    )  # fmt: skip
    # Rows of padding have summed nothing, and neither have rows that have no key.
    if GAPS or MASK_ROWS:
        row_sum = tl.where(row_sum == 0.0 if GAPS else rows_i >= end, 1.0, row_sum)
    out_head_ptr = out_ptr + head_offset(head, heads, out_batch, out_head)
    store_parts(
        out_head_ptr, out_i, 1.0 / row_sum, rows_i, end, tokens, out_token, out_feature,
        HEAD_DIM, DIM_A, DIM_B, HAS_PADDING, MASK_ROWS,
    )  # fmt: skip
    lse_i = (row_max + tl.log2(row_sum)) * LN_2
    if HAS_PADDING:
        lse_i = tl.where(rows_i < end, lse_i, float("-inf"))
    store_numbers(lse_ptr + head.to(tl.int64) * tokens, lse_i, rows_i, tokens, MASK_ROWS)


@triton.jit(do_not_specialize=["heads", "tokens", "first_row", "tiles"])
def row_pairs_kernel(
    grad_out_ptr, out_ptr, lse_ptr, pairs_ptr, scales_ptr, scale, heads, tokens, first_row, tiles,
    grad_out_batch, grad_out_head, grad_out_token, grad_out_feature,
    out_batch, out_head, out_token, out_feature,
    HEAD_DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """One program: the numbers that the backward reads of BLOCK_ROWS rows of one head, side by side (``store_row_pairs``)."""
    head = tl.program_id(0) // tiles
    rows = first_row + tl.program_id(0) % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    grad_out_head_ptr = grad_out_ptr + head_offset(head, heads, grad_out_batch, grad_out_head)
    out_head_ptr = out_ptr + head_offset(head, heads, out_batch, out_head)
    grad_out = load_parts(grad_out_head_ptr, rows, tokens, grad_out_token, grad_out_feature, HEAD_DIM, DIM_A, DIM_B)
    out = load_parts(out_head_ptr, rows, tokens, out_token, out_feature, HEAD_DIM, DIM_A, DIM_B)
    delta = tl.sum(grad_out[0].to(tl.float32) * out[0].to(tl.float32), 1)
    if DIM_B > 0:
        delta += tl.sum(grad_out[1].to(tl.float32) * out[1].to(tl.float32), 1)
    if scales_ptr is not None:
        scale = tl.load(scales_ptr + head % heads)
    store_row_pairs(pairs_ptr, lse_ptr, head.to(tl.int64) * tokens + rows, delta, scale, rows < tokens)


@triton.jit
def add_tile_gradient(
    dw_j, sums_j, w_j, grad_out_j, lse_j, delta_j, rows_j, keys_j, queries_j, start_i, end,
    w_head_ptr, grad_out_head_ptr, pairs_head_ptr,
    w_token, w_feature, grad_out_token, grad_out_feature, key_mask_ptr, head, scale, dropout, seed,
    J_IS_KEY: tl.constexpr, J_IS_QUERY: tl.constexpr, MASKED: tl.constexpr, INTERVALS: tl.constexpr, DROPOUT: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to dw_j the terms of BLOCK tokens i from ``start_i`` on: those with j as the key, with j as the query, or both. With j
    as the query, add to sums_j what ``correct_delta`` takes (for 16 bits), and what ``gradient_of_scale`` takes (if NEED_SCALE).

    Tokens i past the end need no mask for dw_j: their w_i and dO_i are read as zero, and so they add zero. delta comes times
    ``scale``: then the scale of a gradient of scores is a factor of a fused multiply-add.
    """
    CORRECT: tl.constexpr = w_j[0].dtype != tl.float32
    rows_i = start_i + tl.arange(0, BLOCK)
    w_i = load_parts(w_head_ptr, rows_i, end, w_token, w_feature, HEAD_DIM, DIM_A, DIM_B, MASKED)
    scores = products_of_rows(w_j, w_i, DIM_B, PRECISION) * (scale * LOG2_E)
    if DROPOUT:
        factor_ji, factor_ij = dropout_factors(seed, head, rows_j, rows_i, dropout)
    if J_IS_KEY:
        grad_out_i = load_parts(
            grad_out_head_ptr, rows_i, end, grad_out_token, grad_out_feature, HEAD_DIM, DIM_A, DIM_B, MASKED
        )
        lse_i, delta_i = load_pairs(pairs_head_ptr, rows_i, end, MASKED)
        p_ij = tl.exp2(scores - lse_i[None, :])
        if INTERVALS:
            p_ij = tl.where(is_within(rows_i, queries_j[0], queries_j[1]), p_ij, 0.0)
        if key_mask_ptr is not None:
            p_ij = tl.where(load_key_mask(key_mask_ptr, rows_j, end)[:, None], p_ij, 0.0)
    grad_scores = tl.zeros([rows_j.shape[0], BLOCK], tl.float32)
    if J_IS_KEY:
        dw_j = add_weighted_rows(dw_j, p_ij * factor_ij if DROPOUT else p_ij, grad_out_i, DIM_B, PRECISION)
        grad_p_ij = products_of_rows(w_j, grad_out_i, DIM_B, PRECISION)
        if DROPOUT:
            grad_p_ij *= factor_ij
        grad_scores += p_ij * (grad_p_ij * scale - delta_i[None, :])
    if J_IS_QUERY:
        p_ji = tl.exp2(scores - lse_j[:, None])
        if INTERVALS:
            p_ji = tl.where(is_within(rows_i, keys_j[0], keys_j[1]), p_ji, 0.0)
        if key_mask_ptr is not None:
            p_ji = tl.where(load_key_mask(key_mask_ptr, rows_i, end)[None, :], p_ji, 0.0)
        if (CORRECT or NEED_SCALE) and MASKED and not INTERVALS:
            p_ji = tl.where(rows_i[None, :] < end, p_ji, 0.0)
        grad_p_ji = products_of_rows(grad_out_j, w_i, DIM_B, PRECISION)
        if DROPOUT:
            grad_p_ji *= factor_ji
        grad_scores_ji = p_ji * (grad_p_ji * scale - delta_j[:, None])
        if CORRECT:
            sums_j = sums_j[0] + tl.sum(grad_scores_ji, 1), sums_j[1], sums_j[2], sums_j[3]
        if NEED_SCALE:
            log_p_ji, weighted = scores - lse_j[:, None], p_ji * grad_p_ji
            weighted_log = tl.sum(weighted * log_p_ji, 1)
            sums_j = (
                sums_j[0],
                sums_j[1] + weighted_log,
                sums_j[2] + tl.sum(weighted, 1),
                sums_j[3] + tl.sum(p_ji * log_p_ji, 1),
            )
        grad_scores += grad_scores_ji
    return add_weighted_rows(dw_j, grad_scores, w_i, DIM_B, PRECISION), sums_j


@triton.jit
def correct_delta(dw_j, excess_j, w_j, lse_j, rows_j, end, key_mask_ptr, scale, DIM_B: tl.constexpr):
    """dw_j less what the rounding of delta has added to it by the pair (j, j).

    delta_j, of the output as it was rounded to 16 bits, is off by e_j, and so every P[j, i] adds -e_j P[j, i] to the gradient of
    its score. Exact gradients of a row's scores sum to zero, so the sum, in ``excess_j``, is -e_j. A token's key is its query,
    so its score with itself is the largest as a rule, and the pair (j, j), which counts as key and as query, has most of the
    error: 2 excess_j P[j, j] w_j.
    """
    a = w_j[0].to(tl.float32)
    square = tl.sum(a * a, 1)
    if DIM_B > 0:
        b = w_j[1].to(tl.float32)
        square += tl.sum(b * b, 1)
    p_jj = tl.exp2(square * (scale * LOG2_E) - lse_j)
    if key_mask_ptr is not None:
        p_jj = tl.where(load_key_mask(key_mask_ptr, rows_j, end), p_jj, 0.0)
    factor = (2.0 * excess_j * p_jj)[:, None]
    if DIM_B == 0:
        return (dw_j[0] - factor * a,)
    else:
        return dw_j[0] - factor * a, dw_j[1] - factor * b


@triton.jit
def gradient_of_scale(sums_j):
    """Each row's share of scale * dscale = sum over i of P[j, i] (dP[j, i] - delta_j) S[j, i], for S = log P[j, i] + L[j].

    L[j] falls out, and delta_j, the sum of P dP, is summed here: that of the output as it was rounded would be the largest error.
    """
    return (sums_j[1] - sums_j[2] * sums_j[3]) * LN_2


@triton.jit(do_not_specialize=["window", "heads", "tokens", "first_row", "tiles", "seed"])
def backward_kernel(
    grad_out_ptr, w_ptr, pairs_ptr, dw_ptr, own_ptr, scale_grad_ptr, lengths_ptr, spans_ptr, key_mask_ptr, scales_ptr,
    window, scale, dropout, seed: tl.int64, heads, tokens, first_row, tiles,
    grad_out_batch, grad_out_head, grad_out_token, grad_out_feature,
    w_batch, w_head, w_token, w_feature,
    dw_batch, dw_head, dw_token, dw_feature,
    own_batch, own_head, own_token, own_feature,
    HEAD_DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr,
    IS_CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WHOLE_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_ROWS rows of one head's dw, summed over all tiles of BLOCK_COLUMNS tokens. With ``scale_grad_ptr``, also
    each row's share of the gradient of the head's scale, times scale."""
    HAS_PADDING: tl.constexpr = lengths_ptr is not None
    MASK_ROWS: tl.constexpr = HAS_PADDING or not WHOLE_ROWS
    INTERVALS: tl.constexpr = IS_CAUSAL or window is not None or spans_ptr is not None
    NEED_SCALE: tl.constexpr = scale_grad_ptr is not None
    head = tl.program_id(0) // tiles
    start_j = first_row + tl.program_id(0) % tiles * BLOCK_ROWS
    rows_j = start_j + tl.arange(0, BLOCK_ROWS)
    end = count_tokens(lengths_ptr, head, heads, tokens)
    w_head_ptr = w_ptr + head_offset(head, heads, w_batch, w_head)
    grad_out_head_ptr = grad_out_ptr + head_offset(head, heads, grad_out_batch, grad_out_head)
    pairs_head_ptr = pairs_ptr + head.to(tl.int64) * tokens * 2

    if scales_ptr is not None:
        scale = tl.load(scales_ptr + head % heads)

    w_j = load_parts(w_head_ptr, rows_j, end, w_token, w_feature, HEAD_DIM, DIM_A, DIM_B, MASK_ROWS)
    grad_out_j = load_parts(
        grad_out_head_ptr, rows_j, end, grad_out_token, grad_out_feature, HEAD_DIM, DIM_A, DIM_B, MASK_ROWS
    )
    lse_j, delta_j = load_pairs(pairs_head_ptr, rows_j, end, MASK_ROWS)
    dw_j = zero_parts(BLOCK_ROWS, DIM_A, DIM_B)
    zeros_j = tl.zeros([BLOCK_ROWS], tl.float32)
    sums_j = zeros_j, zeros_j, zeros_j, zeros_j
    if key_mask_ptr is not None:
        key_mask_ptr += (head // heads).to(tl.int64) * tokens

    keys_j = keys_of(rows_j, end, tokens, spans_ptr, window, IS_CAUSAL)
    queries_j = queries_of(rows_j, end, tokens, spans_ptr, window, IS_CAUSAL)
    first_key, first_query, end_key, end_query = 0, 0, end, end
    if INTERVALS:
        last_j = tl.maximum(tl.minimum(start_j + BLOCK_ROWS, end) - 1, 0)
        first_key, _ = keys_of(start_j, end, tokens, spans_ptr, window, IS_CAUSAL)
        first_query, _ = queries_of(start_j, end, tokens, spans_ptr, window, IS_CAUSAL)
        _, end_key = keys_of(last_j, end, tokens, spans_ptr, window, IS_CAUSAL)
        _, end_query = queries_of(last_j, end, tokens, spans_ptr, window, IS_CAUSAL)
    if lengths_ptr is not None:  # rows of padding have no gradient
        end_key, end_query = tl.where(start_j < end, end_key, 0), tl.where(start_j < end, end_query, 0)

    # One walk with j as key and as query computes each score once. There are two walks where one would cost more: under a causal
    # mask, key and query need different halves of the tokens; and exact float32 products, which run outside the tensor cores
    # and hold whole rows of their operands in registers, would spill.
    #
    # P[j, i] = P[i, j] exp(L[i] - L[j]) would save one of two exponentials a score, but not where L[i] and L[j] are so far apart
    # that P[i, j] underflows. A second walk for such heads takes so many registers that fewer blocks fit on a multiprocessor,
    # or that they spill: as compiled for sm_90, 213 to 248 against 168 (64 features, 64 x 64 tiles).
    if IS_CAUSAL or PRECISION == "ieee":
        for start_i in range(first_key, end_key, BLOCK_COLUMNS):
            dw_j, sums_j = add_tile_gradient(
                dw_j, sums_j, w_j, grad_out_j, lse_j, delta_j, rows_j, keys_j, queries_j, start_i, end,
                w_head_ptr, grad_out_head_ptr, pairs_head_ptr,
                w_token, w_feature, grad_out_token, grad_out_feature, key_mask_ptr, head, scale, dropout, seed,
                J_IS_KEY=False, J_IS_QUERY=True, MASKED=True, INTERVALS=INTERVALS, DROPOUT=DROPOUT, NEED_SCALE=NEED_SCALE,
                HEAD_DIM=HEAD_DIM, DIM_A=DIM_A, DIM_B=DIM_B, PRECISION=PRECISION, BLOCK=BLOCK_COLUMNS,
            )  # fmt: skip
        for start_i in range(first_query, end_query, BLOCK_COLUMNS):
            dw_j, sums_j = add_tile_gradient(
                dw_j, sums_j, w_j, grad_out_j, lse_j, delta_j, rows_j, keys_j, queries_j, start_i, end,
                w_head_ptr, grad_out_head_ptr, pairs_head_ptr,
                w_token, w_feature, grad_out_token, grad_out_feature, key_mask_ptr, head, scale, dropout, seed,
                J_IS_KEY=True, J_IS_QUERY=False, MASKED=True, INTERVALS=INTERVALS, DROPOUT=DROPOUT, NEED_SCALE=NEED_SCALE,
                HEAD_DIM=HEAD_DIM, DIM_A=DIM_A, DIM_B=DIM_B, PRECISION=PRECISION, BLOCK=BLOCK_COLUMNS,
            )  # fmt: skip
    else:
        whole = first_key
        if TAIL < BLOCK_COLUMNS:
            whole = end_key // BLOCK_COLUMNS * BLOCK_COLUMNS
            # Not range(0, whole), with which the compiler takes 20 registers more.
            for start_i in range(0, end_key - BLOCK_COLUMNS + 1, BLOCK_COLUMNS):
                dw_j, sums_j = add_tile_gradient(
                    dw_j, sums_j, w_j, grad_out_j, lse_j, delta_j, rows_j, keys_j, queries_j, start_i, end,
                    w_head_ptr, grad_out_head_ptr, pairs_head_ptr,
                    w_token, w_feature, grad_out_token, grad_out_feature, key_mask_ptr, head, scale, dropout, seed,
                    J_IS_KEY=True, J_IS_QUERY=True, MASKED=False, INTERVALS=False, DROPOUT=DROPOUT, NEED_SCALE=NEED_SCALE,
                    HEAD_DIM=HEAD_DIM, DIM_A=DIM_A, DIM_B=DIM_B, PRECISION=PRECISION, BLOCK=BLOCK_COLUMNS,
                )  # fmt: skip
        for start_i in tl.range(whole, end_key, TAIL, num_stages=1 if TAIL == 16 and BLOCK_COLUMNS > 16 else None):
            dw_j, sums_j = add_tile_gradient(
                dw_j, sums_j, w_j, grad_out_j, lse_j, delta_j, rows_j, keys_j, queries_j, start_i, end,
                w_head_ptr, grad_out_head_ptr, pairs_head_ptr,
                w_token, w_feature, grad_out_token, grad_out_feature, key_mask_ptr, head, scale, dropout, seed,
                J_IS_KEY=True, J_IS_QUERY=True, MASKED=True, INTERVALS=INTERVALS, DROPOUT=DROPOUT, NEED_SCALE=NEED_SCALE,
                HEAD_DIM=HEAD_DIM, DIM_A=DIM_A, DIM_B=DIM_B, PRECISION=PRECISION, BLOCK=TAIL,
            )  # fmt: skip

    if w_j[0].dtype != tl.float32:
        # w comes a second time, with strides of its own: else the addresses of the first load are kept through the walk, in
        # registers that it needs.
        own_head_ptr = own_ptr + head_offset(head, heads, own_batch, own_head)
        w_j = load_parts(own_head_ptr, rows_j, end, own_token, own_feature, HEAD_DIM, DIM_A, DIM_B, MASK_ROWS)
        dw_j = correct_delta(dw_j, sums_j[0], w_j, lse_j, rows_j, end, key_mask_ptr, scale, DIM_B)
    dw_head_ptr = dw_ptr + head_offset(head, heads, dw_batch, dw_head)
    one = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    store_parts(
        dw_head_ptr, dw_j, one, rows_j, end, tokens, dw_token, dw_feature,
        HEAD_DIM, DIM_A, DIM_B, HAS_PADDING, MASK_ROWS,
    )  # fmt: skip
    if NEED_SCALE:
        scale_grad_j = tl.where(rows_j < end, gradient_of_scale(sums_j), 0.0)
        store_numbers(scale_grad_ptr + head.to(tl.int64) * tokens, scale_grad_j, rows_j, tokens, MASK_ROWS)
