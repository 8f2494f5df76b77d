"""ISTA: composed path, boundary and errors. Its kernels: test_ista_triton.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import awkward_gradients, error, gradients
from torch import Tensor

import crate_kernels
from crate_kernels import combine, ista

SHAPES = [
    ((1, 8), 8),  # one token: two products
    ((8, 8), 8),  # as many tokens as the width: still two
    ((9, 8), 8),  # one token more: one product
    ((2, 13, 24), 24),  # batch and tokens
    ((40,), 40),  # a lone vector
    ((5, 1), 1),  # a matrix that is its own transpose
    ((0, 6), 6),  # no tokens
]


def truth(x: Tensor, weight: Tensor, soft: bool, step_size: float = 0.3, lambd: float = 0.4) -> Tensor:
    """A proximal gradient step on |x - z W^T|^2 / 2 + lambda |z| from z = x, one token at a time, in float64."""

    def one(token: Tensor) -> Tensor:
        step = token + step_size * (token @ weight - token @ weight.T @ weight)
        if soft:
            return step.sign() * (step.abs() - step_size * lambd).clamp_min(0)
        return (step - step_size * lambd).clamp_min(0)

    tokens = x.reshape(-1, x.shape[-1])
    return torch.stack([one(token) for token in tokens]).reshape(x.shape) if len(tokens) else x * 1.0


def dictionary(width: int, **options: object) -> Tensor:
    return torch.randn(width, width, **options) / width**0.5


@pytest.mark.parametrize("threshold", ["relu", "soft"])
@pytest.mark.parametrize(("shape", "width"), SHAPES, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "composed"])
def test_agrees_with_the_formula_in_float64(
    implementation: str, shape: tuple[int, ...], width: int, threshold: str
) -> None:
    """Step size and lambda as numbers, and as tensors that get gradients."""
    x, weight = torch.randn(shape, dtype=torch.float64), dictionary(width, dtype=torch.float64)
    upstream = torch.randn(shape, dtype=torch.float64)
    learned = [torch.tensor(value, dtype=torch.float64) for value in (0.3, 0.4)]

    def operator(x: Tensor, weight: Tensor, step_size: float | Tensor = 0.3, lambd: float | Tensor = 0.4) -> Tensor:
        return ista(x, weight, step_size=step_size, lambd=lambd, threshold=threshold)

    with crate_kernels.use(implementation):
        found = gradients(operator, [x, weight, *learned], upstream)
        fixed = gradients(operator, [x, weight], upstream)
    assert all(map(torch.equal, fixed, found[:3]))
    if not len(x):
        assert found[0].shape == x.shape and not any(grad.any() for grad in found[2:])
        return
    expected = gradients(lambda x, w, *n: truth(x, w, threshold == "soft", *n), [x, weight, *learned], upstream)
    assert 0 < (expected[0] == 0).double().mean() < 1 or x.numel() < 10, "the threshold should cut some and keep some"
    for value, wanted in zip(found, expected, strict=True):
        assert error(value, wanted) < 1e-12


def test_layer_norm_before_it() -> None:
    x, weight = torch.randn(3, 11, 8, dtype=torch.float64), dictionary(8, dtype=torch.float64)
    gamma, beta = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    upstream = torch.randn_like(x)

    def ours(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return ista(x, weight, norm_weight=gamma, norm_bias=beta, norm_eps=1e-3, step_size=0.3, lambd=0.4)

    def plain(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gamma + beta
        return truth(normed, weight, soft=False)

    inputs = [x, weight, gamma, beta]
    for value, wanted in zip(gradients(ours, inputs, upstream), gradients(plain, inputs, upstream), strict=True):
        assert error(value, wanted) < 1e-12


def test_gradients_as_they_arrive() -> None:
    x, weight = torch.randn(9, 8), dictionary(8)
    for name, upstream in awkward_gradients((9, 8), torch.float32, "cpu"):
        kept = upstream.clone()
        found = gradients(lambda x, w: ista(x, w, step_size=0.3, lambd=0.4), [x, weight], upstream)
        expected = gradients(lambda x, w: truth(x, w, False), [x.double(), weight.double()], kept.double())
        assert max(map(error, found, expected)) < 1e-5, name
        assert torch.equal(upstream, kept), f"{name}: the gradient was written to"


@pytest.mark.parametrize("tokens", [5, 20])
@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_only_the_gradients_asked_for_are_computed(wanted: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from crate_kernels.ista import composed

    asked = []
    backward = composed.backward
    monkeypatch.setattr(composed, "backward", lambda *a: asked.append(a[-2:]) or backward(*a))
    x, weight = torch.randn(tokens, 8), dictionary(8)
    expected = gradients(lambda x, w: truth(x, w, False), [x.double(), weight.double()], torch.ones(tokens, 8))
    x.requires_grad_(wanted == "x")
    weight.requires_grad_(wanted == "weight")
    ista(x, weight, step_size=0.3, lambd=0.4).sum().backward()
    assert asked == [(wanted == "x", wanted == "weight")]
    assert (x.grad is None) == (wanted != "x") and (weight.grad is None) == (wanted != "weight")
    assert error(x.grad if wanted == "x" else weight.grad, expected[1 if wanted == "x" else 2]) < 1e-5


def test_strided_tokens() -> None:
    weight = dictionary(8)
    for x in (torch.randn(8, 30).t(), torch.randn(30, 16)[:, ::2], torch.randn(3, 8, 10).transpose(1, 2)):
        assert error(ista(x, weight, step_size=0.3, lambd=0.4), truth(x.double(), weight.double(), False)) < 1e-6


@pytest.mark.parametrize("tokens", [5, 20])
@pytest.mark.parametrize("implementation", ["reference", "composed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_after_a_layer_norm_under_autocast_16_bits_stay_16_bits(
    dtype: torch.dtype, implementation: str, tokens: int
) -> None:
    x, weight = torch.randn(tokens, 8).to(dtype), dictionary(8)
    norm = dict(norm_weight=torch.rand(8) + 0.5, norm_bias=torch.randn(8))

    def step(x: Tensor) -> Tensor:
        return ista(x, weight, step_size=0.3, lambd=0.4, **norm)

    with crate_kernels.use(implementation), torch.autocast("cpu", torch.bfloat16):
        y = step(x)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == compiled.dtype == dtype
    normalised = F.layer_norm(x.double(), (8,), *(value.double() for value in norm.values()))
    assert error(y, truth(normalised, weight.double(), False)) < 1e-2
    assert torch.equal(compiled, y)


def test_under_autocast_the_stream_stays_float32_and_so_does_the_weight_gradient() -> None:
    x, weight = torch.randn(2, 30, 16, requires_grad=True), dictionary(16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ista(x, weight, step_size=0.3, lambd=0.4)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == weight.grad.dtype == torch.float32
    for value in (y, x.grad):  # summed in float32, not in 16 bits and widened afterwards
        assert not torch.equal(value, value.bfloat16().float())
    expected = gradients(lambda x, w: truth(x, w, False), [x.double(), weight.double()], torch.ones(2, 30, 16))
    assert error(y, expected[0]) < 5e-3
    assert error(weight.grad, expected[2]) < 3e-2


def test_backward_inside_autocast_gives_the_same_bits() -> None:
    x, weight = torch.randn(30, 16), dictionary(16)

    def weight_gradient(inside: bool) -> Tensor:
        leaf = weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = ista(x, leaf).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return leaf.grad

    assert torch.equal(weight_gradient(inside=True), weight_gradient(inside=False))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            dict(x=torch.randn(3, 4), dictionary=torch.randn(4, 5)),
            ValueError,
            r"dictionary: expected \[width, width\] \(4, 4\), got shape \(4, 5\)",
        ),
        (dict(x=torch.randn(3, 4), dictionary=torch.randn(4)), ValueError, r"dictionary: expected \[width, width\]"),
        (dict(x=torch.tensor(1.0), dictionary=torch.randn(4, 4)), ValueError, r"x: expected \[..., width\]"),
        (
            dict(x=torch.randn(3, 4), dictionary=torch.randn(4, 4).double()),
            TypeError,
            "dictionary: expected torch.float32 like x",
        ),
        (
            dict(x=torch.randn(3, 4), dictionary=torch.randn(4, 4, device="meta")),
            ValueError,
            "dictionary: expected it on cpu like x",
        ),
        (
            dict(x=torch.randn(3, 4), dictionary=torch.randn(4, 4), lambd=-0.1),
            ValueError,
            "lambd: expected .* at least zero, got -0.1",
        ),
        (
            dict(x=torch.randn(3, 4), dictionary=torch.randn(4, 4), step_size=0),
            ValueError,
            "step_size: .* above zero, got 0",
        ),
        (
            dict(x=torch.randn(3, 4), dictionary=torch.randn(4, 4), threshold="hard"),
            ValueError,
            'threshold: expected "relu" or "soft"',
        ),
        (
            dict(x=torch.randn(3, 4), dictionary=torch.randn(4, 4), norm_bias=torch.randn(4)),
            ValueError,
            "norm_bias: given without",
        ),
        (
            dict(x=torch.randn(3, 4), dictionary=torch.randn(4, 4), norm_weight=torch.randn(5)),
            ValueError,
            r"norm_weight: expected \[width\]",
        ),
    ],
)
def test_bad_input_names_the_argument(arguments: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ista(**arguments)


def test_second_derivative_of_a_cast_is_refused() -> None:
    x, weight = torch.randn(9, 8, requires_grad=True), torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = ista(x, weight).sum()
    with pytest.raises(RuntimeError, match=r"^ista: under autocast .* gives no second derivative .*use\(.reference.\)"):
        torch.autograd.grad(y, x, create_graph=True)


def test_second_derivative_under_autocast() -> None:
    """With a LayerNorm x is kept as it came: as near to float64's as a rounded mask and rounded first factors are."""
    tensors = [torch.randn(9, 8), torch.randn(8, 8) / 3, 1 + torch.rand(8)]

    def second(dtype: torch.dtype, autocast: bool) -> Tensor:
        x, weight, gamma = (value.to(dtype).requires_grad_() for value in tensors)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = ista(x, weight, norm_weight=gamma, lambd=0.0, threshold="soft")
        (grad,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), x)[0]

    assert error(second(torch.float32, True), second(torch.float64, False)) < 2e-2


@pytest.mark.parametrize("implementation", ["reference", "composed", "triton"])
def test_combined_makes_the_dictionary_a_constant(implementation: str) -> None:
    x, weight = torch.randn(9, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    with crate_kernels.use(implementation):
        ista(x, weight, combined=combine(weight)).sum().backward()
    assert x.grad is not None and weight.grad is None
