"""The large products' Triton kernels: tokens times a matrix, and the gradients of both.

    moments            mean and rstd of each token, and the tokens normalised where they are multiplied so
    project            out = T(skip +- (LN(x) B + bias))
    gradient_rows      the gradient as both products of the backward read it, and its sums, in one pass over the tokens
    input_gradient     dx = extra + LN'(+-(g B^T) + g)
    weight_gradient    H = xhat^T g, by PyTorch's library

A product reaches the rate of the tensor cores only if its loop does nothing but load two tiles and multiply them. (A loop that
also summed a LayerNorm's moments gave different results in each run, as Triton 3.6 compiled it for Hopper: NOTES.md, GPU.) So the
sums over rows that a LayerNorm or a gradient needs are computed by the other kernels, which go through tensors row by row; or,
for the LayerNorm of a layer's second step, behind the loop of the product before, a part of each row in every tile, and merged
behind the loop of the product after.

The loop loads its tiles by pointers, one tile of the result a program; or, in a persistent kernel, by descriptors, and goes on
with the next tile, whose loads so run during the epilogue. The epilogues are the same (``behind_projection``,
``behind_input_gradient``).

There are two ways to multiply tokens after a LayerNorm, and ``launchers.folds`` chooses one. If it folds, raw tokens are
multiplied, and their moments are applied after the product. The backward then stores the gradient times rstd, g^ = rstd * g, and
multiplies raw tokens again. With z = xhat . B' + offset the forward's product, u the column sums of B', and c1 and c2 sums over
features for each token,

    c1 = sum_n g^_n u_n       c2 = sum_n g^_n (z_n - offset_n)
    dx = g^ B'^T - (c1 + xhat * c2) / width       H = x^T g^ - 1 (sum over tokens of mean * g^)

If it does not fold, tokens are normalised before they are multiplied, g is stored as it is, dx is multiplied by rstd last, and
H is xhat^T g. z is computed from y, which is rounded: if the offset is many times as large as the product, dx loses as much
accuracy.

The backward keeps x, y and two float32 numbers a token. Column sums are split in a fixed way and added in a fixed order, so that
results repeat bit by bit; a product by PyTorch's library is as repeatable as ``torch.mm`` is on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crate_kernels.row_pairs import store_row_pairs


@triton.jit
def load_tile(
    matrix, rows, columns, row_stride, column_stride, row_count, column_count,
    WHOLE_ROWS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """matrix[rows, columns], zero outside [row_count, column_count]; an axis that is WHOLE needs no mask."""
    # In 64 bits, since offsets along either axis may pass 2^31.
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
    """A number: the argument itself, or what it points to."""
    if IN_MEMORY:
        return tl.load(value).to(tl.float32)
    else:
        return value


@triton.jit
def rectify(u, threshold):
    """max(u - threshold, 0). The comparison is false for NaN, which so stays NaN."""
    return tl.where(u <= threshold, 0.0, u - threshold)


@triton.jit
def soft_threshold(u, threshold):
    """sign(u) * max(|u| - threshold, 0). The comparison is false for NaN, which so stays NaN."""
    return tl.where(tl.abs(u) <= threshold, 0.0, tl.where(u < 0.0, u + threshold, u - threshold))


@triton.jit
def before_threshold(y, threshold, ACTIVATION: tl.constexpr):
    """The u of y = T(u), where y is not zero."""
    if ACTIVATION == "relu":
        return y + threshold
    else:
        return tl.where(y < 0.0, y - threshold, y + threshold)


@triton.jit
def masked_gradient(grad_y, y):
    """The gradient through the threshold y = T(u): both thresholds pass it exactly where y is not zero."""
    return tl.where(y != 0.0, grad_y, 0.0)


@triton.jit
def moments_of_tile(x_tile, columns, width, count, WHOLE: tl.constexpr):
    """Mean of each token over a tile of ``count`` features, and sum of squares about it; features beyond the last are zero."""
    tile_mean = tl.sum(x_tile, 1) / count
    centred = x_tile - tile_mean[:, None]
    if not WHOLE:
        centred = tl.where((columns < width)[None, :], centred, 0.0)
    return tile_mean, tl.sum(centred * centred, 1)


@triton.jit
def add_moments(mean, squares, x_tile, start, columns, width, WHOLE: tl.constexpr):
    """Adds a tile of features to each token's mean and sum of squares about the mean, which are over the ``start`` before.

    The tile's squares are summed about its own mean, then both sums are merged (Chan, Golub, LeVeque 1979). So nothing cancels,
    however far from zero the tokens are.
    """
    count = tl.minimum(width - start, columns.shape[0]).to(tl.float32)
    tile_mean, tile_squares = moments_of_tile(x_tile.to(tl.float32), columns, width, count, WHOLE)
    step, share = tile_mean - mean, count / (start + count)
    return mean + step * share, squares + tile_squares + step * step * (start * share)


@triton.jit
def inverse_deviation(squares, width, eps):
    """rstd of each token, from its sum of squares about the mean."""
    return 1.0 / tl.sqrt(squares / width + eps)


@triton.jit(do_not_specialize=["tokens", "eps"])
def moments_kernel(
    x, moments, xhat, eps, tokens, width, x_row_stride, x_column_stride,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of BLOCK_M tokens of x [tokens, width] into moments [2, tokens]; the tokens normalised where asked for."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, width, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        x_tile = load_tile(x, rows, columns, x_row_stride, x_column_stride, tokens, width, False, WHOLE)
        mean, squares = add_moments(mean, squares, x_tile, start, columns, width, WHOLE)
    rstd = inverse_deviation(squares, width, eps)
    tl.store(moments + rows, mean, mask=rows < tokens)
    tl.store(moments + tokens.to(tl.int64) + rows, rstd, mask=rows < tokens)
    if xhat is not None:
        for start in range(0, width, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            x_tile = load_tile(x, rows, columns, x_row_stride, x_column_stride, tokens, width, False, WHOLE)
            store_tile(xhat, (x_tile.to(tl.float32) - mean[:, None]) * rstd[:, None], rows, columns, tokens, width)


@triton.jit
def column_parts(tile, PARTS: tl.constexpr):
    """Splits a tile into PARTS tiles (a power of two) side by side, so that what follows needs fewer registers at a time. This
    moves no values between threads."""
    if PARTS == 1:
        return (tile,)
    else:
        halves = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        return column_parts(left, PARTS // 2) + column_parts(right, PARTS // 2)


@triton.jit
def count_tiles(tokens, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of a result [tokens, width]."""
    return tl.cdiv(tokens, BLOCK_M) * tl.cdiv(width, BLOCK_N)


@triton.jit
def place_of(tile, tokens, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The first row and the first column of a tile of the result [tokens, width]. Tiles are ordered so that GROUP row tiles in
    turn reuse a tile of the matrix in L2."""
    row_tiles, column_tiles = tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N)
    tile_m, tile_n = tl.swizzle2d(tile // column_tiles, tile % column_tiles, row_tiles, column_tiles, GROUP)
    return tile_m * BLOCK_M, tile_n * BLOCK_N


@triton.jit
def rows_from(row, tokens, BLOCK_M: tl.constexpr):
    """BLOCK_M rows from ``row`` on, and the same clamped to the last token. Rows beyond it read the last one and are not stored,
    so loads need no mask along rows."""
    rows = row + tl.arange(0, BLOCK_M)
    return rows, tl.minimum(rows, tokens - 1)


@triton.jit
def multiply(
    x, matrix, row, first, tokens, inner_width, width,
    x_row_stride, x_column_stride, matrix_row_stride, matrix_column_stride,
    LIBRARY: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile at ``row`` and column ``first`` of x [tokens, inner_width] times the matrix [inner_width, width], in float32; with
    LIBRARY, x is that product."""
    _, clamped_rows = rows_from(row, tokens, BLOCK_M)
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
    return product


@triton.jit
def describe_factors(
    x, matrix, tokens, inner_width, width, x_row_stride, matrix_row_stride, matrix_column_stride,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Descriptors of x and the matrix, by which the copy engine (TMA) fills shared memory, with zeros beyond their edges."""
    x_blocks = tl.make_tensor_descriptor(x, (tokens, inner_width), (x_row_stride, 1), (BLOCK_M, BLOCK_K))
    if TRANSPOSED:
        matrix_blocks = tl.make_tensor_descriptor(
            matrix, (width, inner_width), (matrix_column_stride, 1), (BLOCK_N, BLOCK_K)
        )
    else:
        matrix_blocks = tl.make_tensor_descriptor(
            matrix, (inner_width, width), (matrix_row_stride, 1), (BLOCK_K, BLOCK_N)
        )
    return x_blocks, matrix_blocks


@triton.jit
def multiply_blocks(
    x_blocks, matrix_blocks, row, first, inner_width, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``multiply`` by the descriptors of ``describe_factors``."""
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner_width, BLOCK_K):
        matrix_tile = matrix_blocks.load([first, start]).T if TRANSPOSED else matrix_blocks.load([start, first])
        product = tl.dot(x_blocks.load([row, start]), matrix_tile, product, input_precision=PRECISION)
    return product


@triton.jit
def store_moments_of_part(parts, values, rows, first, columns, tokens, width, WHOLE: tl.constexpr):
    """Each token's mean over the features ``values`` from ``first`` on, and sum of squares about it, into parts
    [2, count, tokens]; all parts are as wide as ``values``, but for the last one. Features beyond the last are zero."""
    WIDTH: tl.constexpr = values.shape[1]
    mean, squares = moments_of_tile(values, columns, width, tl.minimum(width - first, WIDTH).to(tl.float32), WHOLE)
    inside = (rows < tokens) & (first < width)
    place = parts + (first // WIDTH) * tokens.to(tl.int64) + rows
    tl.store(place, mean, mask=inside)
    tl.store(place + tl.cdiv(width, WIDTH) * tokens.to(tl.int64), squares, mask=inside)


@triton.jit
def merge_moments(parts, clamped_rows, tokens, width, eps, part_width, PARTS: tl.constexpr):
    """Mean and rstd of each token, as columns [rows, 1], from the mean of each of PARTS parts of its features and the sum of
    squares about that. The squares of the parts' means are summed about the token's, so nothing cancels."""
    part = tl.arange(0, triton.next_power_of_2(PARTS))
    counts = tl.maximum(tl.minimum(part_width, width - part * part_width), 0).to(tl.float32)[:, None]
    addresses = parts + part[:, None] * tokens.to(tl.int64) + clamped_rows[None, :]
    is_part = (part < PARTS)[:, None]
    means = tl.load(addresses, mask=is_part, other=0.0)
    squares = tl.load(addresses + PARTS * tokens.to(tl.int64), mask=is_part, other=0.0)
    mean = tl.sum(means * (counts / width), 0)
    steps = means - mean[None, :]
    squares = tl.sum(squares + counts * steps * steps, 0)
    return mean[:, None], inverse_deviation(squares, width, eps)[:, None]


@triton.jit
def load_pairs(pairs, clamped_rows, tokens):
    """Two numbers a token from pairs [2, tokens] (mean and rstd, or c1 and c2), each as a column [rows, 1]."""
    return tl.load(pairs + clamped_rows)[:, None], tl.load(pairs + tokens.to(tl.int64) + clamped_rows)[:, None]


@triton.jit
def project_part(
    product, out, part_moments, mean, rstd, column_sum, offset, skip, norm_weight, norm_bias, threshold,
    rows, clamped_rows, first, tokens, width,
    skip_row_stride, skip_column_stride,
    FOLD: tl.constexpr, SKIP_NORM: tl.constexpr, NEGATE: tl.constexpr, ACTIVATION: tl.constexpr,
    THRESHOLD_IN_MEMORY: tl.constexpr, WHOLE_N: tl.constexpr,
):  # fmt: skip
    """``behind_projection`` for the columns from ``first`` on."""
    columns = first + tl.arange(0, product.shape[1])
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
    if part_moments is not None:
        rounded = product.to(out.dtype.element_ty).to(tl.float32)  # as the next product will read it
        store_moments_of_part(part_moments, rounded, rows, first, columns, tokens, width, WHOLE_N)


@triton.jit
def behind_projection(
    product, row, first, out, moments, x_parts, out_parts, column_sum, offset, skip, norm_weight, norm_bias, threshold, eps,
    tokens, inner_width, width, part_width, skip_row_stride, skip_column_stride,
    FOLD: tl.constexpr, SKIP_NORM: tl.constexpr, NEGATE: tl.constexpr, ACTIVATION: tl.constexpr,
    THRESHOLD_IN_MEMORY: tl.constexpr, X_PARTS: tl.constexpr, WHOLE_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """All that follows the product in ``project_kernel``, the stores included, for the tile at ``row`` and column ``first``."""
    rows, clamped_rows = rows_from(row, tokens, product.shape[0])
    mean = None
    rstd = None
    if x_parts is not None:
        mean, rstd = merge_moments(x_parts, clamped_rows, tokens, inner_width, eps, part_width, X_PARTS)
        writes = (rows < tokens)[:, None] & (first == 0)  # the tiles of one column
        tl.store(moments + rows[:, None], mean, mask=writes)
        tl.store(moments + tokens.to(tl.int64) + rows[:, None], rstd, mask=writes)
    elif FOLD or SKIP_NORM:
        mean, rstd = load_pairs(moments, clamped_rows, tokens)
    parts = column_parts(product, PARTS)
    for part in tl.static_range(PARTS):
        project_part(
            parts[part], out, out_parts, mean, rstd, column_sum, offset, skip, norm_weight, norm_bias, threshold,
            rows, clamped_rows, first + part * (product.shape[1] // PARTS), tokens, width, skip_row_stride, skip_column_stride,
            FOLD, SKIP_NORM, NEGATE, ACTIVATION, THRESHOLD_IN_MEMORY, WHOLE_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "eps"])
def project_kernel(
    x, matrix, out, moments, x_parts, out_parts, column_sum, offset, skip, norm_weight, norm_bias, threshold, eps,
    tokens, inner_width, width, part_width,
    x_row_stride, x_column_stride, matrix_row_stride, matrix_column_stride, skip_row_stride, skip_column_stride,
    FOLD: tl.constexpr, SKIP_NORM: tl.constexpr, NEGATE: tl.constexpr, ACTIVATION: tl.constexpr,
    THRESHOLD_IN_MEMORY: tl.constexpr, X_PARTS: tl.constexpr, TRANSPOSED: tl.constexpr,
    WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    LIBRARY: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """out = T(skip +- (LN(x) B + bias)).

    x [tokens, inner_width], in the matrix's dtype; matrix [inner_width, width]; skip, out [tokens, width]; moments [2, tokens]:
    mean and rstd. FOLD: x are raw tokens, and their moments are applied after the product. SKIP_NORM: skip is x, and LN(x) is
    added.

    x_parts [2, X_PARTS, tokens]: mean of x over part_width features, and sum of squares about it; then moments is written, not
    read. out_parts: the same of out, to be written, with parts of BLOCK_N // PARTS features.

    PERSISTENT: each program goes through tiles, and the first loads of a tile run during the epilogue of the one before.
    inner_width is above zero; rows of x, and of the matrix (TRANSPOSED: its columns), are contiguous and begin at multiples of 16
    bytes.
    """
    if PERSISTENT:
        tl.assume(inner_width > 0)  # else the flattened loop would have an epilogue of its own for tiles without a step
        x_blocks, matrix_blocks = describe_factors(
            x, matrix, tokens, inner_width, width, x_row_stride, matrix_row_stride, matrix_column_stride,
            TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tiles = count_tiles(tokens, width, BLOCK_M, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            row, first = place_of(tile, tokens, width, BLOCK_M, BLOCK_N, GROUP)
            product = multiply_blocks(
                x_blocks, matrix_blocks, row, first, inner_width, TRANSPOSED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
            behind_projection(
                product, row, first, out, moments, x_parts, out_parts, column_sum, offset, skip, norm_weight, norm_bias,
                threshold, eps, tokens, inner_width, width, part_width, skip_row_stride, skip_column_stride,
                FOLD, SKIP_NORM, NEGATE, ACTIVATION, THRESHOLD_IN_MEMORY, X_PARTS, WHOLE_N, PARTS,
            )  # fmt: skip
    else:
        row, first = place_of(tl.program_id(0), tokens, width, BLOCK_M, BLOCK_N, GROUP)
        product = multiply(
            x, matrix, row, first, tokens, inner_width, width,
            x_row_stride, x_column_stride, matrix_row_stride, matrix_column_stride,
            LIBRARY, WHOLE_N, WHOLE_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        behind_projection(
            product, row, first, out, moments, x_parts, out_parts, column_sum, offset, skip, norm_weight, norm_bias,
            threshold, eps, tokens, inner_width, width, part_width, skip_row_stride, skip_column_stride,
            FOLD, SKIP_NORM, NEGATE, ACTIVATION, THRESHOLD_IN_MEMORY, X_PARTS, WHOLE_N, PARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def gradient_rows_kernel(
    grad, y, x, moments, column_sum, offset, norm_weight, norm_bias, g_out, sums, column_sums, threshold, tokens, width,
    grad_row_stride, grad_column_stride, y_row_stride, y_column_stride, x_row_stride, x_column_stride,
    SCALED: tl.constexpr, NEGATE: tl.constexpr, ACTIVATION: tl.constexpr, THRESHOLD_IN_MEMORY: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """For BLOCK_M tokens: g (grad where y is not zero; SCALED: times rstd), c1 and c2, column sums; each if it is asked for.

    grad, y, g_out [tokens, width]; moments, sums [2, tokens]; column_sum, offset [width]: the product's u and offset, NEGATE: of
    a product that was subtracted; norm_weight, norm_bias [width]: given if LN(x) was added to the product; column_sums
    [1 or 2, programs, width]: first of g without rstd; then of mean * g if SCALED, of g * xhat with x.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    c2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if moments is not None:
        mean, rstd = load_pairs(moments, tl.minimum(rows, tokens - 1), tokens)
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
            # The sums that follow are of the rounded g, which products will read.
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
            u = load_row(column_sum, columns, width)
            z_offset = load_row(offset, columns, width)
            if NEGATE:
                u, z_offset = -u, -z_offset
            if norm_weight is not None:
                u += load_row(norm_weight, columns, width)
            if norm_bias is not None:
                z_offset += load_row(norm_bias, columns, width)
            c1 += g * u
            c2 += g * (z - z_offset)
    if sums is not None:
        tl.store(sums + rows, tl.sum(c1, 1), mask=rows < tokens)
        tl.store(sums + tokens.to(tl.int64) + rows, tl.sum(c2, 1), mask=rows < tokens)


@triton.jit
def input_gradient_part(
    product, grad, y, out, x, mean, rstd, c1, c2, norm_weight, extra, pairs, lse, attended, scale, rows, clamped_rows,
    first, tokens, width, sample_tokens,
    grad_row_stride, grad_column_stride, y_row_stride, y_column_stride, x_row_stride, x_column_stride,
    extra_row_stride, extra_column_stride,
    NORM: tl.constexpr, SCALED: tl.constexpr, SKIP: tl.constexpr, NEGATE: tl.constexpr, HEAD_DIM: tl.constexpr,
    WHOLE_N: tl.constexpr,
):  # fmt: skip
    """``behind_input_gradient`` for the columns from ``first`` on."""
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
        x_tile = load_tile(x, clamped_rows, columns, x_row_stride, x_column_stride, tokens, width, True, WHOLE_N)
        product -= c1 / width + (x_tile.to(tl.float32) - mean) * (rstd * c2 / width)
        if not SCALED:
            product *= rstd
    if extra is not None:
        product += load_tile(
            extra, clamped_rows, columns, extra_row_stride, extra_column_stride, tokens, width, True, WHOLE_N
        ).to(tl.float32)
    store_tile(out, product, rows, columns, tokens, width)
    if pairs is not None:
        attended_tile = load_tile(attended, clamped_rows, columns, width, 1, tokens, width, True, WHOLE_N)
        # These sums are of the rounded gradient, which the backward of attention will read.
        terms = product.to(out.dtype.element_ty).to(tl.float32) * attended_tile.to(tl.float32)
        HEADS: tl.constexpr = product.shape[1] // HEAD_DIM
        terms = tl.sum(tl.reshape(terms, (rows.shape[0], HEADS, HEAD_DIM)), 2)
        heads = first // HEAD_DIM + tl.arange(0, HEADS)
        head_count = width // HEAD_DIM
        place = ((rows // sample_tokens).to(tl.int64)[:, None] * head_count + heads[None, :]) * sample_tokens
        inside = (rows < tokens)[:, None] & (heads < head_count)[None, :]
        store_row_pairs(pairs, lse, place + (rows % sample_tokens)[:, None], terms, scale, inside)


@triton.jit
def behind_input_gradient(
    product, row, first, grad, y, out, x, moments, sums, norm_weight, extra, pairs, lse, attended, scale, tokens, width,
    sample_tokens,
    grad_row_stride, grad_column_stride, y_row_stride, y_column_stride, x_row_stride, x_column_stride,
    extra_row_stride, extra_column_stride,
    NORM: tl.constexpr, SCALED: tl.constexpr, SKIP: tl.constexpr, NEGATE: tl.constexpr, HEAD_DIM: tl.constexpr,
    WHOLE_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """All that follows the product in ``input_gradient_kernel``, the stores included, for the tile at ``row`` and column
    ``first``."""
    rows, clamped_rows = rows_from(row, tokens, product.shape[0])
    mean = None
    rstd = None
    c1 = None
    c2 = None
    if NORM:
        mean, rstd = load_pairs(moments, clamped_rows, tokens)
        c1, c2 = load_pairs(sums, clamped_rows, tokens)
    parts = column_parts(product, PARTS)
    for part in tl.static_range(PARTS):
        input_gradient_part(
            parts[part], grad, y, out, x, mean, rstd, c1, c2, norm_weight, extra, pairs, lse, attended, scale,
            rows, clamped_rows, first + part * (product.shape[1] // PARTS), tokens, width, sample_tokens,
            grad_row_stride, grad_column_stride, y_row_stride, y_column_stride, x_row_stride, x_column_stride,
            extra_row_stride, extra_column_stride, NORM, SCALED, SKIP, NEGATE, HEAD_DIM, WHOLE_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def input_gradient_kernel(
    g, matrix, grad, y, out, x, moments, sums, norm_weight, extra, pairs, lse, attended,
    scale, tokens, inner_width, width, sample_tokens,
    g_row_stride, g_column_stride, grad_row_stride, grad_column_stride, y_row_stride, y_column_stride,
    matrix_row_stride, matrix_column_stride, x_row_stride, x_column_stride, extra_row_stride, extra_column_stride,
    NORM: tl.constexpr, SCALED: tl.constexpr, SKIP: tl.constexpr, NEGATE: tl.constexpr, HEAD_DIM: tl.constexpr,
    TRANSPOSED: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    LIBRARY: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """out = extra + LN'(+-(g B^T) + grad), where grad is added only where y is not zero.

    g, grad, y [tokens, inner_width], g in the dtype of the product (SCALED: it contains rstd), grad as it came, or g itself;
    matrix B^T [inner_width, width]; out, x, extra [tokens, width]; moments [2, tokens]: mean and rstd; sums [2, tokens]: c1 and
    c2; norm_weight [width]; attended [tokens, width], contiguous; lse [samples, heads, sample_tokens]; pairs
    [samples, heads, sample_tokens, 2] (``store_row_pairs``), delta being the sums of out * attended over the HEAD_DIM features of
    each head. PERSISTENT, TRANSPOSED: as in ``project_kernel``, with g for x.
    """
    if PERSISTENT:
        tl.assume(inner_width > 0)
        g_blocks, matrix_blocks = describe_factors(
            g, matrix, tokens, inner_width, width, g_row_stride, matrix_row_stride, matrix_column_stride,
            TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tiles = count_tiles(tokens, width, BLOCK_M, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            row, first = place_of(tile, tokens, width, BLOCK_M, BLOCK_N, GROUP)
            product = multiply_blocks(
                g_blocks, matrix_blocks, row, first, inner_width, TRANSPOSED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
            behind_input_gradient(
                product, row, first, grad, y, out, x, moments, sums, norm_weight, extra, pairs, lse, attended, scale, tokens,
                width, sample_tokens, grad_row_stride, grad_column_stride, y_row_stride, y_column_stride,
                x_row_stride, x_column_stride, extra_row_stride, extra_column_stride,
                NORM, SCALED, SKIP, NEGATE, HEAD_DIM, WHOLE_N, PARTS,
            )  # fmt: skip
    else:
        row, first = place_of(tl.program_id(0), tokens, width, BLOCK_M, BLOCK_N, GROUP)
        product = multiply(
            g, matrix, row, first, tokens, inner_width, width,
            g_row_stride, g_column_stride, matrix_row_stride, matrix_column_stride,
            LIBRARY, WHOLE_N, WHOLE_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        behind_input_gradient(
            product, row, first, grad, y, out, x, moments, sums, norm_weight, extra, pairs, lse, attended, scale, tokens,
            width, sample_tokens, grad_row_stride, grad_column_stride, y_row_stride, y_column_stride,
            x_row_stride, x_column_stride, extra_row_stride, extra_column_stride,
            NORM, SCALED, SKIP, NEGATE, HEAD_DIM, WHOLE_N, PARTS,
        )  # fmt: skip
