"""The product kernels, with everything that rides along, against float64 autograd of the formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import a_few_roundings, error
from torch import Tensor

from crate_kernels.products import launchers as products
from crate_kernels.products.norm_folding import Norm, Operand
from crate_kernels.products.op import operands
from crate_kernels.products.preparation import matrix_gradients
from crate_kernels.tiles import pretend

THRESHOLD = 0.05


def activation(u: Tensor, kind: str) -> Tensor:
    return {"none": lambda u: u, "relu": lambda u: F.relu(u - THRESHOLD), "soft": lambda u: F.softshrink(u, THRESHOLD)}[
        kind
    ](u)


def formula(x: Tensor, b: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor, case: dict) -> Tensor:
    """T(skip +- (LN(x) B + bias)) by PyTorch."""
    tokens = F.layer_norm(x, x.shape[-1:], gamma, beta, 1e-5) if case["norm"] else x
    product = tokens @ b + (bias if case["bias"] else 0)
    skip = {"none": 0, "self": tokens, "residual": residual}[case["skip"]]
    return activation(skip - product if case["negate"] else skip + product, case["activation"])


def run(x, b, bias, gamma, beta, residual, extra, upstream, operand_dtype, case):
    """The same and all its gradients by the kernels: y, dx, dB, and what there is of dbias, dgamma, dbeta."""
    norm = Norm(gamma, beta, 1e-5) if case["norm"] else None
    bias = bias if case["bias"] else None
    (operand,) = operands([b], [bias], [norm], operand_dtype)
    threshold = None if case["activation"] == "none" else torch.tensor(THRESHOLD)
    soft, negate, itself = case["activation"] == "soft", case["negate"], case["skip"] == "self"
    skip = {"none": None, "self": x, "residual": residual}[case["skip"]]
    y, moments, _ = products.project(
        x, operand, x.dtype, norm=norm, skip=skip, skip_norm=itself and case["norm"], negate=negate,
        threshold=threshold, soft=soft,
    )  # fmt: skip
    found = products.gradients(
        upstream, x, operand, x.dtype, y=y, threshold=threshold, soft=soft, norm=norm, moments=moments, skip=itself,
        negate=negate, extra=extra,
    )  # fmt: skip
    grads = {"y": y, "dx": found.x, "dB": found.matrix, "dbias": found.column}
    if norm and not (itself and negate):  # no operator takes LN(x) (-B) off LN(x)
        db, dgamma, dbeta, _ = matrix_gradients(found, b, norm, skip=itself)
        grads |= {"dB": db, "dgamma": dgamma, "dbeta": dbeta}
    elif norm:
        del grads["dB"]
    return grads


def check(tokens: int, inner: int, width: int, case: dict, dtype=torch.float32, operand=torch.float32, mean=0.0):
    x = (torch.randn(tokens, inner) + mean).to(dtype)
    b, bias = torch.randn(inner, width) * inner**-0.5, torch.randn(width)
    gamma, beta = 1 + 0.3 * torch.randn(inner), 0.3 * torch.randn(inner)
    residual, extra = torch.randn(tokens, width).to(dtype), torch.randn(tokens, inner).to(dtype)
    b = b.to(operand).float()
    exact = [t.double().requires_grad_() for t in (x, b, bias, gamma, beta)]
    truth = formula(*exact, residual.double(), case)
    # Rounding decides by luck where a value is at its threshold: no gradient comes from there.
    upstream = torch.randn(tokens, width).to(dtype)
    if case["activation"] != "none":
        u = formula(*exact, residual.double(), {**case, "activation": "none"})
        upstream = upstream * ((u.abs() - THRESHOLD).abs() > 0.02)
    truth.backward(upstream.double())
    names = ("x", "B", "bias", "gamma", "beta")
    expected = {"y": truth, **{f"d{name}": leaf.grad for name, leaf in zip(names, exact, strict=True)}}
    expected["dx"] = expected["dx"] + extra.double()
    found = run(x, b, bias, gamma, beta, residual, extra, upstream, operand, case)
    # Tokens about a mean are themselves rounded at the mean's scale.
    margin = 1e-6 + 6e-8 * mean if operand == torch.float32 else a_few_roundings(operand)
    for name, value in found.items():
        if expected[name] is not None:
            assert error(value, expected[name]) < margin, f"{name}: {error(value, expected[name]):.1e}"


FLAGS = [
    dict(norm=norm, bias=bias, skip=skip, negate=negate, activation=kind)
    for norm, bias, skip, negate, kind in itertools.product(
        (False, True), (False, True), ("none", "self", "residual"), (False, True), ("none", "relu", "soft")
    )
    if not (norm and skip == "residual")  # no operator has it, and the backward does not know the residual
]


@pytest.fixture
def persistent(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """Has products take small persistent tiles, several of them a program, and returns the options of their launches."""

    def begin() -> list[dict[str, Any]]:
        options: list[dict[str, Any]] = []
        launch, select = products.launch, products.select

        def noted(kernel: Any, *arguments: Any, **more: Any) -> None:
            options.extend([more] if "PERSISTENT" in more else [])
            launch(kernel, *arguments, **more)

        small = dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, PERSISTENT=1)
        monkeypatch.setattr(products, "launch", noted)
        monkeypatch.setattr(products, "select", lambda *key: select(*key) | small)
        return options

    return begin


@pytest.mark.parametrize("mode", ["fold", "first", "persistent"])
@pytest.mark.parametrize("case", FLAGS, ids=lambda case: "-".join(str(v) for v in case.values()))
def test_every_combination(case: dict, mode: str, monkeypatch: pytest.MonkeyPatch, persistent: Callable) -> None:
    """In float32 both ways of the LayerNorm are right, though tokens are only normalised first there."""
    if mode == "fold" and not case["norm"]:
        pytest.skip("there is no LayerNorm to fold")
    monkeypatch.setattr(products, "folds", lambda x, dtype: mode != "first")
    tiles = products.TABLE["default"]
    monkeypatch.setitem(tiles, ("project", "norm", 4, 4), tiles["project", "plain", 4, 4])
    if mode == "persistent":
        options = persistent()
        check(100, 40, 40, case)
        assert [one["PERSISTENT"] for one in options] == [1, 1]
    else:
        check(37, 24, 24, case)


@pytest.mark.parametrize("mean", [0.0, 20.0])
def test_persistent_in_float16(mean: float, persistent: Callable) -> None:
    """Shapes that no tile divides, factors that lie row by row and column by column."""
    options = persistent()
    case = dict(norm=True, bias=True, skip="none", negate=True, activation="none")
    check(150, 40, 72, case, torch.float16, torch.float16, mean)
    assert {(one["PERSISTENT"], one["TRANSPOSED"]) for one in options} == {(1, False), (1, True)}


def half(*shape: int) -> Tensor:
    return torch.randn(shape).half()


# Tokens [64, 40] and a matrix [40, 24], and whether descriptors can name both. float16: 8 numbers are 16 bytes.
FACTORS: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], bool]] = {
    "contiguous": (lambda: half(64, 40), lambda: half(40, 24), True),
    "matrix by columns": (lambda: half(64, 40), lambda: half(24, 40).t(), True),
    "rows apart": (lambda: half(64, 2, 40)[:, 1], lambda: half(40, 48)[:, 8:32], True),
    "tokens by columns": (lambda: half(40, 64).t(), lambda: half(40, 24), False),
    "one row for all": (lambda: half(1, 40).expand(64, 40), lambda: half(40, 24), False),
    "overlapping rows": (lambda: half(64 * 8 + 40).as_strided((64, 40), (8, 1)), lambda: half(40, 24), False),
    "rows of 82 bytes": (lambda: half(64, 41)[:, :40], lambda: half(40, 24), False),
    "begins at 2 bytes": (lambda: half(64, 48)[:, 1:41], lambda: half(40, 24), False),
    "matrix begins at 2 bytes": (lambda: half(64, 40), lambda: half(40, 32)[:, 1:25], False),
    "matrix of odd rows": (lambda: half(64, 40), lambda: half(40, 25)[:, :24], False),
    "every other feature": (lambda: half(64, 80)[:, ::2], lambda: half(40, 24), False),
    "rows far apart": (lambda: half(40).as_strided((1, 40), (2**39, 1)), lambda: half(40, 24), False),
    "no features": (lambda: half(64, 0), lambda: half(0, 24), False),
}


@pytest.mark.parametrize("name", FACTORS)
def test_what_descriptors_cannot_name_goes_by_pointers(name: str, persistent: Callable) -> None:
    options = persistent()
    make_x, make_matrix, named = FACTORS[name]
    x, matrix = make_x(), make_matrix()
    found = products.project(x, Operand(matrix, None, None), torch.float16).out
    assert error(found, x.double() @ matrix.double()) < 1e-3
    assert [one["PERSISTENT"] for one in options] == [int(named)]


@pytest.mark.parametrize("operand", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["stream32", "stream16"])
@pytest.mark.parametrize("mean", [0.0, 20.0])
def test_precisions(operand: torch.dtype, dtype: torch.dtype, mean: float) -> None:
    """Tokens far from zero lose nothing in the LayerNorm, folded or not; shapes that no tile divides."""
    if dtype == torch.float16 and operand == torch.float32:
        pytest.skip("no operator multiplies in more than the stream has")
    case = dict(norm=True, bias=True, skip="self", negate=False, activation="relu")
    check(150, 136, 136, case, dtype, operand, mean)
    check(150, 136, 200, {**case, "skip": "none", "activation": "none"}, dtype, operand, mean)


@pytest.mark.parametrize(
    ("tokens", "width", "wide"),
    [
        (64 * 197, 768, 256),
        (64 * 197, 384, 128),  # 256 would leave half a tile empty
        (32 * 197, 768, 256),  # 150 tiles
        (27 * 197, 768, 128),  # 126 tiles of 256
        (197, 768, 128),  # one part
        (1, 16, 128),
    ],
)
def test_persistent_tiles_are_as_wide_as_the_result_allows(tokens: int, width: int, wide: int) -> None:
    """And their parts are as wide as ever: moments are made of the same parts for any number of tokens."""
    left, right = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((tokens, 64), (64, width)))
    with pretend("sm_90"):
        tiles = products._tiles("project", "plain", left, right, left)
        assert products._grid(torch.empty(tokens, width, device="meta"), tiles) == (
            min(132, -(-tokens // 128) * -(-width // wide)),
        )
    assert (tiles["BLOCK_N"], tiles["BLOCK_N"] // tiles["PARTS"]) == (wide, 128)


def test_a_librarys_product_does_not_persist(monkeypatch: pytest.MonkeyPatch) -> None:
    select = products.select
    monkeypatch.setattr(products, "select", lambda *key: select(*key) | {"LIBRARY": 1, "PERSISTENT": 1})
    check(37, 24, 24, dict(norm=True, bias=True, skip="self", negate=False, activation="relu"))


@pytest.mark.parametrize("most", [3, 4])
def test_moments_are_not_given_in_more_parts_than_can_be_merged(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "folds", lambda x, dtype: True)
    monkeypatch.setattr(products, "_MOST_PARTS", most)
    operand = Operand(half(16, 200), None, None)
    found = products.project(half(5, 16), operand, torch.float16, parts_for=torch.float16)
    assert (found.parts is None) == (most == 3)


@pytest.mark.parametrize("mean", [0.0, 20.0])
@pytest.mark.parametrize("width", [24, 136, 200])
@pytest.mark.parametrize("persists", [False, True])
def test_moments_of_the_result(
    width: int, mean: float, persists: bool, monkeypatch: pytest.MonkeyPatch, persistent: Callable
) -> None:
    """They are those of the result as it was stored, also far from zero, where roundings are large; and the next product makes
    mean and rstd of them."""
    if persists:
        persistent()
    monkeypatch.setattr(products, "folds", lambda x, dtype: dtype == torch.float16)
    x, residual = torch.randn(150, 40).half(), (torch.randn(150, width) + mean).half()
    operand = Operand(torch.randn(40, width).half() * 40**-0.5, None, None)
    out, _, parts = products.project(x, operand, torch.float16, skip=residual, parts_for=torch.float16)
    assert parts is not None and products.project(x, operand, torch.float16, parts_for=torch.float32).parts is None
    features = out.double().split(parts.width, 1)
    assert parts.values.shape == (2, len(features), 150)
    means = torch.stack([part.mean(1) for part in features])
    squares = torch.stack([(part - part.mean(1, keepdim=True)).square().sum(1) for part in features])
    assert error(parts.values[0], means) < 1e-6 and error(parts.values[1], squares) < 1e-5

    norm = Norm(torch.ones(width), None)
    after = Operand(torch.randn(width, 16).half() * width**-0.5, torch.randn(16), torch.zeros(16))
    found = products.project(out, after, torch.float16, norm=norm, moments=parts)
    expected = products.project(out, after, torch.float16, norm=norm)
    assert found.moments is not None and expected.moments is not None
    rstd = (out.double().var(1, unbiased=False) + norm.eps).rsqrt()
    assert error(found.moments[0], out.double().mean(1)) < 1e-6 and error(found.moments[1], rstd) < 1e-5
    again = products.project(out, after, torch.float16, norm=norm, moments=found.moments)
    assert torch.equal(found.out, again.out) and again.moments is found.moments
    assert error(found.out, expected.out) < 1e-3
