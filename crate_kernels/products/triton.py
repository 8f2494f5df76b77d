"""Three Triton kernels: tokens times a matrix, the gradient in the tokens, the gradient in the matrix.

    project            out = T(skip +- (LN(x) B + bias)), and mean and rstd of each token
    input_gradient     dx = extra + LN'(+-(g B^T) + g), g the gradient where T let it pass
    weight_gradient    H = xhat^T g and the column sums of g

A LayerNorm costs no pass of its own. Forward, the moments are summed while the product streams the tokens. Backward, its two
sums over features come from the tiles of g that the product streams anyway: with z = xhat . B' + offset the product that was,

    c1 = sum_k dxhat_k        = sum_n g_n u_n,                u = column sums of B'
    c2 = sum_k dxhat_k xhat_k = sum_n g_n (z_n - offset_n)
    dx = rstd * (dxhat - c1 / width - xhat * c2 / width)

What the products keep for their backward is x, y and two float32 numbers a token. Sums over tokens are split in a fixed way and
added in a fixed order: no atomics, the same bits every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crate_kernels.precision import dot_precision
from crate_kernels.products.operand import Norm, Operand
from crate_kernels.tiles import select
from crate_kernels.tiles.products import TABLE

# Programs the weight's gradient is spread over: two for each multiprocessor of an H100. A constant rather than the
# running device's count, so that the order of summation, and with it every bit, depends on shapes and tiles alone.
_PROGRAMS = 264
# Each split writes a float32 [inner, width] that is read again: at most so many, and each worth so many steps at least.
_MOST_SPLITS = 64
_LEAST_STEPS = 4


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


@triton.jit(do_not_specialize=["tokens", "eps"])
def project_kernel(
    x, matrix, out, stats, column_sum, offset, skip, norm_weight, norm_bias, threshold, eps, tokens, inner_width, width,
    x_row_stride, x_column_stride, matrix_row_stride, matrix_column_stride, skip_row_stride, skip_column_stride,
    NORM: tl.constexpr, SKIP_NORM: tl.constexpr, NEGATE: tl.constexpr, ACTIVATION: tl.constexpr,
    THRESHOLD_IN_MEMORY: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = T(skip +- (LN(x) B + bias)).

    x [tokens, inner_width]; matrix [inner_width, width]; skip, out [tokens, width]; stats [2, tokens]: mean and rstd, written.
    NORM: "none"; "fold", the raw tokens are multiplied and the moments enter behind the product; "first", a loop over the
    tokens finds the moments before the product, which then multiplies normalised tokens. SKIP_NORM: skip is normalised as x is.
    """
    tile_m, tile_n = tile_position(tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the last read the last again and are not stored: no mask along them.
    clamped_rows = tl.minimum(rows, tokens - 1)

    mean = tl.zeros((BLOCK_M,), tl.float32)
    rstd = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    if NORM == "first":
        for start in range(0, inner_width, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            x_tile = load_tile(
                x, clamped_rows, inner, x_row_stride, x_column_stride, tokens, inner_width, True, WHOLE_K
            )
            mean, squares = add_moments(mean, squares, x_tile, start, inner, inner_width, WHOLE_K)
        rstd = inverse_deviation(squares, inner_width, eps)

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner_width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, clamped_rows, inner, x_row_stride, x_column_stride, tokens, inner_width, True, WHOLE_K)
        matrix_tile = load_tile(
            matrix, inner, columns, matrix_row_stride, matrix_column_stride, inner_width, width, WHOLE_K, WHOLE_N
        )
        if NORM == "fold":
            mean, squares = add_moments(mean, squares, x_tile, start, inner, inner_width, WHOLE_K)
        elif NORM == "first":
            x_tile = (x_tile.to(tl.float32) - mean[:, None]) * rstd[:, None]
        product = tl.dot(x_tile.to(matrix.dtype.element_ty), matrix_tile, product, input_precision=PRECISION)

    if NORM == "fold":
        rstd = inverse_deviation(squares, inner_width, eps)
        product = rstd[:, None] * (product - mean[:, None] * load_row(column_sum, columns, width))
    if NORM != "none":  # noqa: SIM102  (decided while compiling; the other while running)
        if tile_n == 0:
            tl.store(stats + rows, mean, mask=rows < tokens)
            tl.store(stats + tokens.to(tl.int64) + rows, rstd, mask=rows < tokens)
    if offset is not None:
        product += load_row(offset, columns, width)
    if NEGATE:
        product = -product
    if skip is not None:
        skip_tile = load_tile(
            skip, clamped_rows, columns, skip_row_stride, skip_column_stride, tokens, width, True, WHOLE_N
        ).to(tl.float32)
        if SKIP_NORM:
            skip_tile = (skip_tile - mean[:, None]) * rstd[:, None] * load_row(norm_weight, columns, width)
            if norm_bias is not None:
                skip_tile += load_row(norm_bias, columns, width)
        product += skip_tile
    if ACTIVATION == "relu":
        product = rectify(product, scalar(threshold, THRESHOLD_IN_MEMORY))
    elif ACTIVATION == "soft":
        product = soft_threshold(product, scalar(threshold, THRESHOLD_IN_MEMORY))
    store_tile(out, product, rows, columns, tokens, width)


@triton.jit(do_not_specialize=["tokens"])
def input_gradient_kernel(
    grad, y, matrix, out, x, stats, product_sum, product_offset, norm_weight, extra, threshold, tokens, inner_width, width,
    grad_row_stride, grad_column_stride, y_row_stride, y_column_stride, matrix_row_stride, matrix_column_stride,
    x_row_stride, x_column_stride, extra_row_stride, extra_column_stride,
    NORM: tl.constexpr, SKIP: tl.constexpr, NEGATE: tl.constexpr, ACTIVATION: tl.constexpr,
    THRESHOLD_IN_MEMORY: tl.constexpr, WHOLE_N: tl.constexpr, WHOLE_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = extra + LN'(+-(g B^T) + g): g, grad where y is not zero, exists only in the tile at hand.

    grad, y [tokens, inner_width]; matrix B^T [inner_width, width]; out, x, extra [tokens, width]; stats [2, tokens];
    product_sum, product_offset [inner_width]: u and offset of c1 and c2, skip included; norm_weight [width].
    """
    tile_m, tile_n = tile_position(tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    clamped_rows = tl.minimum(rows, tokens - 1)

    c1 = tl.zeros((BLOCK_M,), tl.float32)
    c2 = tl.zeros((BLOCK_M,), tl.float32)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner_width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        g = load_tile(
            grad, clamped_rows, inner, grad_row_stride, grad_column_stride, tokens, inner_width, True, WHOLE_K
        )
        if NORM or ACTIVATION != "none":
            y_tile = load_tile(
                y, clamped_rows, inner, y_row_stride, y_column_stride, tokens, inner_width, True, WHOLE_K
            )
            if ACTIVATION != "none":
                g = masked_gradient(g, y_tile)
            if NORM:
                z = y_tile.to(tl.float32)
                if ACTIVATION != "none":
                    z = before_threshold(z, scalar(threshold, THRESHOLD_IN_MEMORY), ACTIVATION)
                c1 += tl.sum(g.to(tl.float32) * load_row(product_sum, inner, inner_width), 1)
                c2 += tl.sum(g.to(tl.float32) * (z - load_row(product_offset, inner, inner_width)), 1)
        matrix_tile = load_tile(
            matrix, inner, columns, matrix_row_stride, matrix_column_stride, inner_width, width, WHOLE_K, WHOLE_N
        )
        product = tl.dot(g.to(matrix.dtype.element_ty), matrix_tile, product, input_precision=PRECISION)

    if NEGATE:
        product = -product
    if SKIP:
        g = load_tile(
            grad, clamped_rows, columns, grad_row_stride, grad_column_stride, tokens, width, True, WHOLE_N
        ).to(tl.float32)
        if ACTIVATION != "none":
            y_tile = load_tile(y, clamped_rows, columns, y_row_stride, y_column_stride, tokens, width, True, WHOLE_N)
            g = masked_gradient(g, y_tile)
        if NORM:
            g *= load_row(norm_weight, columns, width)
        product += g
    if NORM:
        mean = tl.load(stats + clamped_rows)[:, None]
        rstd = tl.load(stats + tokens.to(tl.int64) + clamped_rows)[:, None]
        x_tile = load_tile(x, clamped_rows, columns, x_row_stride, x_column_stride, tokens, width, True, WHOLE_N)
        normalised = (x_tile.to(tl.float32) - mean) * rstd
        product = rstd * (product - (c1[:, None] + normalised * c2[:, None]) / width)
    if extra is not None:
        product += load_tile(
            extra, clamped_rows, columns, extra_row_stride, extra_column_stride, tokens, width, True, WHOLE_N
        ).to(tl.float32)
    store_tile(out, product, rows, columns, tokens, width)


@triton.jit(do_not_specialize=["tokens", "tokens_per_split"])
def weight_gradient_kernel(
    x, stats, grad, y, products, column_sums, tokens, tokens_per_split, inner_width, width,
    x_row_stride, x_column_stride, grad_row_stride, grad_column_stride, y_row_stride, y_column_stride,
    WHOLE_M: tl.constexpr, WHOLE_N: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """products[split] = xhat^T g and column_sums[split] = sum g over that split's tokens, g being grad where y is not zero.

    x [tokens, inner_width]; grad, y [tokens, width]; products [splits, inner_width, width], column_sums [splits, width], float32;
    stats [2, tokens], or None where x is not normalised; y None where all of grad counts. Each split has its own output.
    """
    tile_m, tile_n = tile_position(tl.cdiv(inner_width, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    first = tl.program_id(1) * tokens_per_split
    last = tl.minimum(first + tokens_per_split, tokens)

    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    column_sum = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, last, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, inner, rows, x_row_stride, x_column_stride, last, inner_width, False, WHOLE_M)
        g = load_tile(grad, inner, columns, grad_row_stride, grad_column_stride, last, width, False, WHOLE_N)
        if stats is not None:
            mean = tl.load(stats + inner, mask=inner < last, other=0.0)[:, None]
            rstd = tl.load(stats + tokens.to(tl.int64) + inner, mask=inner < last, other=0.0)[:, None]
            x_tile = (x_tile.to(tl.float32) - mean) * rstd
        if y is not None:
            y_tile = load_tile(y, inner, columns, y_row_stride, y_column_stride, last, width, False, WHOLE_N)
            g = masked_gradient(g, y_tile)
        column_sum += tl.sum(g.to(tl.float32), 0)
        product = tl.dot(tl.trans(x_tile.to(OPERAND)), g.to(OPERAND), product, input_precision=PRECISION)

    store_tile(products + split * inner_width * width, product, rows, columns, inner_width, width)
    if tile_m == 0:
        tl.store(column_sums + split * width + columns, column_sum, mask=columns < width)


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
        x: [tokens, inner], any floating dtype and strides; rounded to the operand's dtype in the kernel.
        operand: of B [inner, width], by ``preparation.prepare`` with the same norm.
        out_dtype: of the result.
        norm: the LayerNorm before the product, folded into it.
        skip: [tokens, width], any dtype and strides, added in float32; with ``skip_norm`` it is x, and LN(x) is added.
        negate: subtract the product instead.
        threshold: a number (0-dim tensor, on the CPU or beside x); no threshold if None.
        soft: the signed threshold instead of the relu's.

    Returns:
        [tokens, width], contiguous, and [2, tokens] float32 or None.
    """
    (tokens, inner_width), width = x.shape, operand.matrix.shape[1]
    out = torch.empty((tokens, width), dtype=out_dtype, device=x.device)
    stats = None if norm is None else torch.empty((2, tokens), dtype=torch.float32, device=x.device)
    if out.numel():
        tiles = _tiles("project", x.device, operand.matrix, x)
        threshold, in_memory = number(threshold)
        project_kernel[_grid(tokens, width, tiles)](
            x, operand.matrix, out, stats, operand.column_sum, operand.offset, skip,
            _vector(norm.weight) if skip_norm else None, _vector(norm.bias) if skip_norm else None,
            threshold, 0.0 if norm is None else norm.eps, tokens, inner_width, width,
            *x.stride(), *operand.matrix.stride(), *_strides(skip),
            NORM=norm_mode(x, operand, norm), SKIP_NORM=skip_norm, NEGATE=negate,
            ACTIVATION="none" if threshold is None else "soft" if soft else "relu", THRESHOLD_IN_MEMORY=in_memory,
            WHOLE_N=width % tiles["BLOCK_N"] == 0, WHOLE_K=inner_width % tiles["BLOCK_K"] == 0,
            **_options(operand.matrix), **tiles,
        )  # fmt: skip
    return out, stats


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

    Returns:
        [tokens, inner], contiguous.
    """
    (tokens, inner_width), width = grad.shape, operand.matrix.shape[0]
    out = torch.empty((tokens, width), dtype=out_dtype, device=grad.device)
    if not out.numel():
        return out
    product_sum, product_offset = operand.column_sum, operand.offset
    if norm is not None:
        if negate:
            product_sum, product_offset = -product_sum, -product_offset
        if skip:
            product_sum = product_sum + norm.weight
            product_offset = product_offset if norm.bias is None else product_offset + norm.bias
    tiles = _tiles("input_gradient", grad.device, operand.matrix, grad)
    threshold, in_memory = number(threshold)
    matrix = operand.matrix.t()
    input_gradient_kernel[_grid(tokens, width, tiles)](
        grad, y, matrix, out, x, stats, product_sum, product_offset, None if norm is None else _vector(norm.weight), extra,
        threshold, tokens, inner_width, width,
        *grad.stride(), *_strides(y), *matrix.stride(), *_strides(x), *_strides(extra),
        NORM=norm is not None, SKIP=skip, NEGATE=negate,
        ACTIVATION="none" if threshold is None else "soft" if soft else "relu", THRESHOLD_IN_MEMORY=in_memory,
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
) -> tuple[Tensor, Tensor]:
    """The gradients of ``project`` in the operand's matrix and in its offset, float32: ``xhat^T g`` and the column sums of g.

    Args:
        x: [tokens, inner], as ``project`` took it; normalised in the kernel where ``stats`` [2, tokens] are given.
        grad: [tokens, width], any dtype and strides; only read.
        operand_dtype: the dtype of the product.
        y: [tokens, width], where there was a threshold: grad counts where y is not zero.
    """
    (tokens, inner_width), width = x.shape, grad.shape[1]
    if not x.numel() or not grad.numel():
        shapes = (inner_width, width), (width,)
        return tuple(torch.zeros(shape, dtype=torch.float32, device=x.device) for shape in shapes)
    operand = torch.empty((), dtype=operand_dtype, device="meta")
    tiles = _tiles("weight_gradient", x.device, operand, grad)
    (programs,) = _grid(inner_width, width, tiles)
    steps = triton.cdiv(tokens, tiles["BLOCK_K"])
    splits = max(1, min(_PROGRAMS // programs, steps // _LEAST_STEPS, _MOST_SPLITS))
    tokens_per_split = triton.cdiv(steps, splits) * tiles["BLOCK_K"]
    splits = triton.cdiv(tokens, tokens_per_split)
    products = torch.empty((splits, inner_width, width), dtype=torch.float32, device=x.device)
    column_sums = torch.empty((splits, width), dtype=torch.float32, device=x.device)
    weight_gradient_kernel[(programs, splits)](
        x, stats, grad, y, products, column_sums, tokens, tokens_per_split, inner_width, width,
        *x.stride(), *grad.stride(), *_strides(y),
        WHOLE_M=inner_width % tiles["BLOCK_M"] == 0, WHOLE_N=width % tiles["BLOCK_N"] == 0,
        OPERAND=TRITON_DTYPES[operand_dtype], **_options(operand), **tiles,
    )  # fmt: skip
    return (products[0], column_sums[0]) if splits == 1 else (products.sum(0), column_sums.sum(0))


TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def norm_mode(x: Tensor, operand: Operand, norm: Norm | None) -> str:
    """Folding multiplies raw tokens and takes the mean's share off the product. So the product must not round them, or a token
    far from zero would lose what its mean hides; and float32 results, more exact than the difference, come without it."""
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
