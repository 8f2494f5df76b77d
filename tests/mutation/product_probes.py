"""Small runs of every kernel of the products, and of the preparation of their operands.

Tiles are so small that few tokens already make several of them, with a tail each way. Inputs lie amid NaN, every access is
watched, and each kernel takes exact inputs, so that one mistake shows in one place.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import patch

import torch
from mutation.memory import amid_nan, reachable, rows_amid_nan
from mutation.modules import preparation, products
from mutation.probes import Probe
from torch import Tensor

from crate_kernels.products.norm_folding import Norm, Operand

_TILE = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP=2, LIBRARY=0, PERSISTENT=0, num_warps=4, num_stages=1)
PRODUCT_TILES = {
    "default": {
        (kernel, use, operand, stream): {**_TILE, **own}
        for kernel in ("project", "input_gradient")
        for use, own in {
            "plain": dict(PARTS=2),
            "moments": dict(PARTS=2),
            "norm": dict(PARTS=4, BLOCK_M=32),
            "masked": dict(PARTS=1, BLOCK_N=32),
        }.items()
        for operand, stream in ((2, 2), (2, 4), (4, 4))
    }
}
_LIBRARY_TILES, _PERSISTENT_TILES = (
    {"default": {key: {**tile, name: 1} for key, tile in PRODUCT_TILES["default"].items()}}
    for name in ("LIBRARY", "PERSISTENT")
)
ROWS = dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)
THRESHOLD = 0.25
LAYER_NORM_EPS = 0.125  # large enough to count in float32
PRODUCT_MARGIN = 1e-5  # as in test_products.py


def _activation(u: Tensor, kind: str) -> Tensor:
    if kind == "none":
        return u
    u = u if kind == "soft" else u.clamp_min(0)
    return torch.where(u.abs() <= THRESHOLD, 0.0, u - u.sign() * THRESHOLD)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(-1), (x.var(-1, unbiased=False) + LAYER_NORM_EPS).rsqrt()


def _operand(b: Tensor, bias: Tensor | None, norm: Norm | None, amid: Callable[[Tensor], Tensor]) -> Operand:
    """The operand of LN(x) B + bias, its matrix amid NaN."""
    if norm is None:
        return Operand(amid(b), None, bias)
    matrix = norm.weight[:, None] * b
    offset = sum(
        (t for t in (bias, None if norm.bias is None else norm.bias @ b.float()) if t is not None),
        torch.zeros(b.shape[1]),
    )
    return Operand(amid(matrix.to(b.dtype)), matrix.sum(0), offset)


class _Product:
    """Inputs of one case of T(skip +- (LN(x) B + bias)), float32 amid NaN, and its formula in float64."""

    def __init__(
        self, tokens: int, inner: int, width: int, *, norm: bool = True, norm_bias: bool = True, bias: bool = True,
        skip: str = "none", negate: bool = False, kind: str = "none", mean: float = 0.5, nan: bool = False,
        dtype: torch.dtype = torch.float32, fold: bool = False, library: bool = False, in_memory: bool = False,
        persistent: str = "",
    ) -> None:  # fmt: skip
        """``dtype`` is the operand's; ``fold`` has raw tokens multiplied, ``library`` PyTorch multiply; the threshold may lie
        ``in_memory``; tiles are ``persistent`` with a matrix that lies by "rows" or by "columns"."""
        torch.manual_seed(tokens * inner + width)
        self.skip, self.negate, self.kind = skip, negate, kind
        self.fold, self.library, self.in_memory, self.persistent = fold, library, in_memory, bool(persistent)
        self.amid = rows_amid_nan if persistent else amid_nan
        x = torch.randn(tokens, inner) * (1 + torch.rand(tokens, 1)) + mean * torch.randn(tokens, 1)
        if nan:
            x[tokens // 2, 3] = math.nan
        b = (torch.randn(inner, width) * inner**-0.5).to(dtype)
        self.x, self.b = self.amid(x), b.double()
        gamma, beta = 1 + 0.3 * torch.randn(inner), 0.3 * torch.randn(inner) if norm_bias else None
        self.norm = Norm(gamma, beta, LAYER_NORM_EPS) if norm else None
        self.bias = torch.randn(width) if bias else None
        self.residual = amid_nan(torch.randn(width, tokens)).mT
        by_columns = persistent == "columns"
        self.operand = _operand(b, self.bias, self.norm, lambda t: self.amid(t.mT).mT if by_columns else self.amid(t))
        self.threshold = None if kind == "none" else torch.tensor(THRESHOLD)
        self.exact = self.x.double().requires_grad_()
        self.moments, self.xhat, normalised, weight = None, self.x.double(), self.exact, 1
        if norm:
            center, rstd = _moments(self.exact)
            xhat = (self.exact - center[:, None]) * rstd[:, None]
            normalised, weight = xhat * gamma.double() + (0 if beta is None else beta.double()), gamma.double()
            self.moments, self.xhat = torch.stack((center, rstd)).detach(), xhat.detach()
        product = normalised @ self.b + (0 if self.bias is None else self.bias.double())
        added = {"none": 0, "self": normalised, "residual": self.residual.double()}[skip]
        self.truth = _activation(added - product if negate else added + product, kind)
        # What xhat is multiplied with in all: the product's matrix and what is added to it.
        self.matrix = (weight * (-self.b if negate else self.b).mT).mT
        if skip == "self":
            self.matrix = self.matrix + torch.eye(inner) * weight

    def gradient(self) -> None:
        """A gradient of the result; behind the threshold, as it is and as products read it, with its sums; and that of x."""
        self.upstream = amid_nan(torch.randn(self.truth.mT.shape)).mT
        self.truth.backward(self.upstream.double())
        self.y = amid_nan(self.truth.detach().float())
        self.g = self.upstream.double() * ((self.truth.detach() != 0) if self.kind != "none" else 1)
        mean, rstd = self.float32_moments()[..., None] if self.fold else (1, 1)
        self.read = (self.g.float() * rstd).to(self.operand.matrix.dtype).double()  # sums are of what products read
        seconds = [mean * self.read] if self.fold else [self.g * self.xhat] if self.norm and self.skip == "self" else []
        self.columns = torch.stack([self.g, *seconds]).sum(1)
        self.sums = torch.stack((self.read @ self.matrix.sum(0), (self.read * (self.xhat @ self.matrix)).sum(1)))

    def options(self) -> dict[str, object]:
        """What the launchers of the product and of its gradients take alike."""
        return dict(norm=self.norm, negate=self.negate, threshold=self.threshold, soft=self.kind == "soft")

    def gradient_options(self) -> dict[str, object]:
        return dict(**self.options(), y=self.y, moments=self.float32_moments(), skip=self.skip == "self")

    def float32_moments(self) -> Tensor | None:
        return None if self.moments is None else self.moments.float()

    @contextmanager
    def patched(self, moments_in_parts: bool = False):
        """The module with the choices of this case; what comes before its product is exact, and amid NaN."""
        before = self.x if self.fold else self.amid(self.xhat.float()), self.float32_moments()
        if moments_in_parts:  # then there is only memory for them
            before = self.x, torch.full_like(before[1], math.nan)
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(products, "folds", lambda *_: self.fold))
            stack.enter_context(patch.object(products, "before_product", lambda *_: before))
            if self.library:
                stack.enter_context(patch.object(products, "TABLE", _LIBRARY_TILES))
                stack.enter_context(patch.object(products, "float32_product", lambda a, b: amid_nan((a @ b).float())))
            if self.persistent:
                stack.enter_context(patch.object(products, "TABLE", _PERSISTENT_TILES))
            stack.enter_context(_numbers_in_memory(products, self.in_memory))
            yield


@contextmanager
def _numbers_in_memory(module: ModuleType, in_memory: bool):
    """The threshold by address, as from a device."""
    if not in_memory:
        yield
        return
    with patch.object(module, "number", lambda value: (value, value is not None)):
        yield


def _probe(
    name: str,
    run: Callable[[], dict[str, Tensor]],
    expected: dict[str, Tensor],
    margin: float = PRODUCT_MARGIN,
) -> Probe:
    return Probe(name, run, expected, dict.fromkeys(expected, margin))


def _moments_of(name: str, *shape: int, normalise: bool, mean: float = 0.5) -> Probe:
    product = _Product(*shape, mean=mean)

    def run() -> dict[str, Tensor]:
        moments, xhat = products.moments_of(product.x, LAYER_NORM_EPS, torch.float32 if normalise else None)
        return {"mean": moments[0], "rstd": moments[1], "xhat": xhat}

    expected = {"mean": product.moments[0], "rstd": product.moments[1]}
    return _probe(f"moments: {name}", run, expected | ({"xhat": product.xhat} if normalise else {}))


def _part_moments(x: Tensor, width: int) -> dict[str, Tensor]:
    """Mean of each token over ``width`` features at a time, and sum of squares about it, [parts, tokens]."""
    parts = x.split(width, 1)
    squares = [(part - part.mean(1, keepdim=True)).square().sum(1) for part in parts]
    return {"means": torch.stack([part.mean(1) for part in parts]), "squares": torch.stack(squares)}


def _project(name: str, *shape: int, in_parts: int = 0, out_parts: int = 0, **case) -> Probe:
    """The moments of x are given for ``in_parts`` features at a time, those of the result asked for ``out_parts`` at a time."""
    product = _Product(*shape, **case)
    skip = {"none": None, "self": product.x, "residual": product.residual}[product.skip]
    given, expected = None, {"y": product.truth.detach()}
    if in_parts:
        values = torch.stack(list(_part_moments(product.x.double(), in_parts).values())).float()
        given = products.PartMoments(values, in_parts)
        expected |= {"mean": product.moments[0], "rstd": product.moments[1]}
    if out_parts:
        expected |= _part_moments(expected["y"], out_parts)

    def run() -> dict[str, Tensor]:
        with product.patched(moments_in_parts=bool(in_parts)):
            y, moments, parts = products.project(
                product.x, product.operand, torch.float32, skip=skip, moments=given,
                skip_norm=product.skip == "self" and product.norm is not None,
                parts_for=torch.float32 if out_parts else None, **product.options(),
            )  # fmt: skip
        found = {"y": y}
        if in_parts:
            found |= {"mean": moments[0], "rstd": moments[1]}
        return found | (dict(zip(("means", "squares"), parts.values, strict=True)) if out_parts else {})

    return _probe(f"project: {name}", run, expected)


def _gradient_rows(name: str, *shape: int, **case) -> Probe:
    product = _Product(*shape, **case)
    product.gradient()

    def run() -> dict[str, Tensor]:
        with product.patched():
            rows = products.gradient_rows(product.upstream, product.x, product.operand, **product.gradient_options())
        return {"g": rows.g, "c1": rows.sums[0], "c2": rows.sums[1], "column sums": rows.column_sums}

    expected = {"g": product.read, "c1": product.sums[0], "c2": product.sums[1], "column sums": product.columns}
    return _probe(f"gradient_rows: {name}", run, expected)


def _weight_gradient(name: str, *shape: int, **case) -> Probe:
    """H and the offset's gradient, which need no sums over features."""
    product = _Product(*shape, **case)
    product.gradient()

    def run() -> dict[str, Tensor]:
        with product.patched():
            found = products.gradients(
                product.upstream, product.x, product.operand, torch.float32, **product.gradient_options(), need_x=False
            )
        mean_column = found.mean_column if product.fold else 0
        return {"xhat^T g": found.matrix - mean_column, "sums of g": found.column}

    sign = -1 if product.negate else 1
    expected = {"xhat^T g": sign * product.xhat.mT @ product.g, "sums of g": sign * product.g.sum(0)}
    return _probe(f"gradient_rows: {name}", run, expected)


def _input_gradient(name: str, *shape: int, extra: bool = True, heads: tuple[int, int] | None = None, **case) -> Probe:
    """With an operand in float16 the gradient is rounded for the product, what passes it is not, and dx only where attention's
    heads read it."""
    product = _Product(*shape, **case)
    product.gradient()
    tokens, inner, _ = shape
    passed = amid_nan(torch.randn(inner, tokens)).mT if extra else None
    dtype = product.operand.matrix.dtype
    g, out_dtype = product.amid(product.read.to(dtype)), dtype if heads else torch.float32
    rows = products.GradientRows(g, product.sums.float() if product.norm else None)
    dx = product.exact.grad + (passed.double() if extra else 0)
    if dtype != torch.float32:
        dx = dx + (product.read - product.g) @ product.b.mT * (-1 if product.negate else 1)
    expected = {"dx": dx.to(out_dtype).double()}
    scores = None
    if heads:
        deltas = (expected["dx"] * product.x).view(heads[0], -1, heads[1], inner // heads[1]).sum(-1).transpose(1, 2)
        scores = torch.randn(deltas.shape), 0.25
        scores[0][0, 0, 0] = -math.inf  # a row without a key
        exponents = (scores[0].double() * math.log2(math.e)).nan_to_num(neginf=0)
        expected |= {"exponents": exponents, "deltas": 0.25 * deltas}

    def run() -> dict[str, Tensor]:
        with product.patched():
            found = products.gradients(
                product.upstream, product.x, product.operand, out_dtype, **product.gradient_options(), extra=passed,
                rows=rows, scores=scores, need_matrix=False, need_column=False,
            )  # fmt: skip
        return dict(zip(expected, [found.x, *(() if scores is None else found.row_pairs.unbind(-1))], strict=True))

    # In 16 bits a number here and there may be rounded the other way; all of them unrounded are 2e-4.
    return _probe(f"input_gradient: {name}", run, expected, PRODUCT_MARGIN if out_dtype == torch.float32 else 1e-4)


def product_probes() -> list[Probe]:
    """The first of each kernel is small and meets most mistakes."""
    odd, square, narrow = (37, 24, 20), (20, 20, 20), (37, 20, 12)
    by_rows = dict(fold=True, persistent="rows")
    subtracted = dict(kind="soft", negate=True, fold=True, persistent="columns")
    rounded = dict(norm=False, dtype=torch.float16, persistent="columns")
    return [
        _moments_of("with the tokens normalised", 20, 24, 1, normalise=True),
        _moments_of("far from zero", 37, 24, 1, normalise=False, mean=30.0),
        _project("fold, skip itself, relu", 5, 20, 20, skip="self", kind="relu", fold=True),
        _project("skip itself, soft, negated", *square, skip="self", kind="soft", negate=True),
        _project("fold, no bias", 37, 24, 32, bias=False, fold=True),
        _project("no norm, residual, soft", 37, 64, 20, norm=False, skip="residual", kind="soft", in_memory=True),
        _project(
            "a library's, fold, norm without bias", *odd[:2], 24, norm_bias=False, skip="self", fold=True, library=True
        ),
        _project("fold, skip itself, moments in parts", 37, 24, 24, skip="self", kind="relu", fold=True, in_parts=10),
        _project("fold, moments in parts to and from", 20, 20, 23, fold=True, in_parts=7, out_parts=4),
        _project("no norm, moments of the result", 37, 20, 24, norm=False, skip="residual", fold=True, out_parts=8),
        _project("persistent, skip itself, relu", 37, 40, 40, skip="self", kind="relu", in_memory=True, **by_rows),
        _project("persistent, parts to and from", *narrow, skip="residual", in_parts=7, out_parts=32, **subtracted),
        _project("persistent, moments of the result", 85, 24, 20, out_parts=4, **by_rows),
        _project("NaN, relu", 5, 10, 12, kind="relu", nan=True),
        _project("NaN, soft", 5, 10, 12, kind="soft", nan=True),
        _gradient_rows("fold, skip, relu", 20, 24, 24, skip="self", kind="relu", fold=True, dtype=torch.float16),
        _gradient_rows("soft, negated", *odd, kind="soft", negate=True, in_memory=True),
        _gradient_rows("no threshold", 20, 24, 20),
        _gradient_rows("skip, normalised first", 37, 20, 20, skip="self", kind="relu"),
        _weight_gradient("fold, relu, negated", 37, 20, 24, kind="relu", fold=True, negate=True),
        _weight_gradient("no norm, no threshold", 37, 24, 20, norm=False),
        _input_gradient("fold, skip, relu", 20, 20, 20, skip="self", kind="relu", fold=True),
        _input_gradient("negated", 37, 32, 20, negate=True),
        _input_gradient("no norm, row pairs", 21, 20, 24, norm=False, extra=False, heads=(3, 5), dtype=torch.float16),
        _input_gradient(
            "a rounded product, skip, relu", *square, norm=False, skip="self", kind="relu", dtype=torch.float16
        ),
        _input_gradient("persistent, skip, relu", 37, 40, 40, skip="self", kind="relu", **by_rows),
        _input_gradient("persistent, negated", 85, 12, 24, negate=True, persistent="columns"),
        _input_gradient("persistent, row pairs", 45, 20, 24, extra=False, heads=(3, 5), **rounded),
        _input_gradient("persistent, rounded, skip", 37, 12, 12, skip="self", kind="relu", **rounded),
        _input_gradient("a library's", *odd, library=True),
    ]


_SMALL_TILES = {
    "_PREPARE": dict(BLOCK_N=16, BLOCK_K=16),
    "_COMBINE": dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16),
    "_GRADIENT": dict(BLOCK_N=16, BLOCK_K=8),
}
_SCALE = torch.tensor(0.3)


def _vector(size: int) -> Tensor:
    """Numbers one after the other, with NaN before and after them."""
    return torch.cat([torch.full((1,), math.nan), torch.randn(size), torch.full((1,), math.nan)])[1:-1]


@contextmanager
def _preparing(in_memory: bool, *tensors: Tensor | None):
    """Small tiles, no table from before, the scale by value or by address, and weights in reach of the kernels."""
    with contextlib.ExitStack() as stack:
        for name, tile in _SMALL_TILES.items():
            stack.enter_context(patch.object(preparation, name, tile))
        stack.enter_context(_numbers_in_memory(preparation, in_memory))
        stack.enter_context(reachable(*(tensor for tensor in tensors if tensor is not None)))
        preparation._tables.clear()
        yield


def _operands(
    scaled: list[Tensor], norms: list[Norm | None], biases: list[Tensor | None], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """matrix, column_sum and offset by formula, of B in float64; the first two of B' as rounded."""
    found = {"matrix": [], "column_sum": [], "offset": []}
    for b, norm, bias in zip(scaled, norms, biases, strict=True):
        weight, beta = (norm.weight, norm.bias) if norm else (None, None)
        matrix = b if weight is None else weight.double()[:, None] * b
        matrix = matrix.to(dtype).double()
        offset = torch.zeros(b.shape[1], dtype=torch.float64) if beta is None else beta.double() @ b
        found["matrix"].append(matrix)
        found["column_sum"].append(matrix.sum(0))
        found["offset"].append(offset if bias is None else offset + bias.double())
    return {name: torch.stack(values) for name, values in found.items()}


def _prepare(
    name: str, inner: int, width: int, *, flipped: bool = False, scaled: bool = False, in_memory: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Probe:  # fmt: skip
    torch.manual_seed(inner * width)
    matrices = [torch.randn(width, inner).mT if flipped else amid_nan(torch.randn(inner, width)) for _ in range(3)]
    norms = [Norm(_vector(inner), _vector(inner)), Norm(_vector(inner)), None]
    biases = [_vector(width), None, _vector(width)]
    expected = _operands([m.double() * (_SCALE.double() if scaled else 1) for m in matrices], norms, biases, dtype)
    vectors = [vector for norm in norms[:2] for vector in norm[:2]]

    def run() -> dict[str, Tensor]:
        with _preparing(in_memory, *matrices, *vectors, *biases):
            scale = _SCALE if scaled else None
            return preparation.prepare_all(matrices, biases, norms, dtype, scale)._asdict()

    return Probe(f"prepare: {name}", run, expected, dict.fromkeys(expected, PRODUCT_MARGIN))


def _combine(name: str, width: int, *, in_memory: bool = False) -> Probe:
    torch.manual_seed(width)
    weights = [amid_nan(torch.randn(width, width) * width**-0.5) for _ in range(3)]
    norms = [Norm(_vector(width), _vector(width)), Norm(_vector(width)), None]
    combined = torch.stack([w.double() - w.double().mT @ w.double() for w in weights])
    expected = _operands(list(combined * _SCALE.double()), norms, [None] * 3) | {"combined": combined}
    vectors = [vector for norm in norms[:2] for vector in norm[:2]]

    def run() -> dict[str, Tensor]:
        with _preparing(in_memory, *weights, *vectors):
            combined, operand = preparation.combine_all(weights, norms, _SCALE, torch.float32)
        return {"combined": combined, **operand._asdict()}

    return Probe(f"combine: {name}", run, expected, dict.fromkeys(expected, PRODUCT_MARGIN))


def _matrix_gradient(
    name: str, inner: int, width: int, *, beta: bool = True, fold: bool = True, skip: bool = False,
    scaled: bool = True, in_memory: bool = False, by_rows: bool = False,
) -> Probe:  # fmt: skip
    torch.manual_seed(inner * width)
    product = amid_nan(torch.randn(inner, width))
    matrix = amid_nan(torch.randn(inner, width)) if by_rows else amid_nan(torch.randn(width, inner)).mT
    column, mean_column = _vector(width), _vector(width) if fold else None
    norm = Norm(_vector(inner), _vector(inner) if beta else None)
    scale = _SCALE.double() if scaled else 1
    diagonal = _vector(inner) if skip and not fold else None
    h = product.double() - (mean_column.double() if fold else 0)
    grad_matrix, expected = norm.weight.double()[:, None] * h, {}
    if beta:
        grad_matrix = grad_matrix + norm.bias.double()[:, None] * column
        expected["beta"] = scale * matrix.double() @ column.double() + (column if skip else 0)
    on_diagonal = 0 if not skip else h.diagonal() if diagonal is None else diagonal.double()
    expected |= {"matrix": scale * grad_matrix, "gamma": scale * (matrix * h).sum(1) + on_diagonal}
    if skip:
        expected["symmetric"] = scale * (grad_matrix + grad_matrix.mT)

    def run() -> dict[str, Tensor]:
        with _preparing(in_memory):
            found = products.Gradients(None, product, column, mean_column, diagonal, None)
            scale = _SCALE if scaled else None
            grads = preparation.matrix_gradients(found, matrix, norm, scale, skip=skip, symmetric=skip)
        return {name: grad for name, grad in grads._asdict().items() if grad is not None}

    return _probe(f"gradient: {name}", run, expected)


def preparation_probes() -> list[Probe]:
    return [
        _prepare("tails", 21, 35, scaled=True),
        _prepare("whole tiles, columns in a row", 32, 16, flipped=True),
        _prepare("scale in memory", 16, 5, scaled=True, in_memory=True),
        _prepare("rounded", 21, 5, dtype=torch.float16),
        _combine("tails", 21),
        _combine("whole tiles, scale in memory", 32, in_memory=True),
        _matrix_gradient("tails, skip", 21, 21, skip=True),
        _matrix_gradient("scale in memory", 5, 35, in_memory=True, fold=False),
        _matrix_gradient("whole rows", 16, 35),
        _matrix_gradient("skip, its diagonal given", 21, 21, skip=True, fold=False, by_rows=True),
        _matrix_gradient("skip, whole rows", 24, 24, skip=True),
        _matrix_gradient("whole tiles, no beta, no scale", 16, 32, beta=False, scaled=False),
    ]
