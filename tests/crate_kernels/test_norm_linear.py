"""The linear step: LayerNorm and product in one launch, its boundary and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import a_few_roundings, awkward_gradients, error, gradients
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import crate_kernels
from crate_kernels import Norm, library_products, norm_linear
from crate_kernels.products.op import operands

OPS = torch.ops.crate_kernels
IMPLEMENTATIONS = ["reference", "composed", "triton"]


def parameters(width: int = 12, out_width: int = 10, **options: object) -> list[Tensor]:
    """weight, bias, norm_weight, norm_bias."""
    weight = torch.randn(out_width, width, **options) / width**0.5
    return [weight, *(torch.randn(size, **options) for size in (out_width, width, width))]


def operator(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    return norm_linear(x, weight, bias, norm_weight=gamma, norm_bias=beta, norm_eps=1e-3)


def truth(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Feature by feature."""
    centred = x - x.mean(-1, keepdim=True)
    n = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gamma + beta
    return torch.stack([(n * row).sum(-1) for row in weight], -1) + bias


@pytest.mark.parametrize("implementation", ["reference", "composed"])
def test_agrees_with_the_formula_in_float64(implementation: str) -> None:
    inputs = [torch.randn(2, 7, 12, dtype=torch.float64), *parameters(dtype=torch.float64)]
    upstream = torch.randn(2, 7, 10, dtype=torch.float64)
    with crate_kernels.use(implementation):
        found = gradients(operator, inputs, upstream)
        plain = norm_linear(*inputs[:2])
    assert max(map(error, found, gradients(truth, inputs, upstream))) < 1e-12
    assert error(plain, torch.einsum("...i,oi->...o", *inputs[:2])) < 1e-12


@pytest.mark.parametrize("mean", [0.0, 20.0])
@pytest.mark.parametrize("given", ["norm", "norm without bias", "bias", "norm and bias"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.float16, False), (torch.float32, True)],
    ids=["float32", "float16", "autocast"],
)
def test_triton(dtype: torch.dtype, autocast: bool, given: str, mean: float, device: str) -> None:
    """No worse than the official order, for widths and tokens that no tile divides, and tokens far from zero."""
    x = (torch.randn(3, 37, 72) + mean).to(device, dtype)
    weight, bias, gamma, beta = (value.to(device, dtype) for value in parameters(72, 40))
    weights = [weight, bias if "bias" in given.split(" and ") else None]
    weights += [gamma, beta] if given in ("norm", "norm and bias") else [gamma if "norm" in given else None, None]
    present = [value for value in weights if value is not None]
    upstream = torch.randn(3, 37, 40).to(device, torch.float16 if autocast else dtype)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        values = iter(values)
        with torch.autocast(device, torch.float16, enabled=autocast and x.dtype != torch.float64):
            return operator(x, *(None if value is None else next(values) for value in weights))

    inputs = [x, *present]
    with crate_kernels.use("reference"):
        truth = gradients(call, [value.double() for value in inputs], upstream.double())
        official = gradients(call, inputs, upstream)
    with crate_kernels.use("triton"):
        found = gradients(call, inputs, upstream)
    margin = a_few_roundings(torch.float16 if autocast else dtype)
    if dtype == torch.float32 and not autocast:
        # Folded, the product sums raw tokens, and float32 sums of terms 1 + mean times as large round so much more.
        margin *= 1 + mean
    for ours, plain, exact in zip(found, official, truth, strict=True):
        assert ours.dtype == plain.dtype
        assert error(ours, exact) <= 1.25 * error(plain, exact) + margin


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_as_they_arrive(implementation: str, device: str) -> None:
    inputs = [value.to(device) for value in (torch.randn(9, 12), *parameters())]
    for name, upstream in awkward_gradients((9, 10), torch.float32, device):
        before = upstream.clone()
        with crate_kernels.use(implementation):
            found = gradients(operator, inputs, upstream)
        expected = gradients(truth, [value.double() for value in inputs], upstream.double())
        assert max(map(error, found, expected)) < 1e-5, name
        assert torch.equal(upstream, before), f"{name}: the gradient was written to"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strided_tokens_and_weights(implementation: str, device: str) -> None:
    weight, *others = (value.to(device) for value in parameters(8, 8))
    for x in (torch.randn(8, 30).t(), torch.randn(30, 16)[:, ::2], torch.randn(3, 8, 10).mT, torch.randn(8)):
        with crate_kernels.use(implementation):
            found = operator(x.to(device), weight.t(), *others)
        assert error(found, truth(*(v.double() for v in (x.to(device), weight.t(), *others)))) < 1e-6


@pytest.mark.parametrize("wanted", range(5), ids=["x", "weight", "bias", "norm_weight", "norm_bias"])
def test_only_the_gradients_asked_for(wanted: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from crate_kernels.norm_linear import triton

    asked, backward = [], triton.backward
    monkeypatch.setattr(triton, "backward", lambda *a: asked.append(a[-2:]) or backward(*a))
    inputs = [value.to(device) for value in (torch.randn(9, 12), *parameters())]
    expected = gradients(truth, [value.double() for value in inputs], torch.ones(9, 10, dtype=torch.float64))[1:]
    inputs[wanted].requires_grad_()
    with crate_kernels.use("triton"):
        operator(*inputs).sum().backward()
    assert asked == [(wanted == 0, wanted > 0)]
    assert [value.grad is not None for value in inputs] == [i == wanted for i in range(5)]
    assert error(inputs[wanted].grad, expected[wanted]) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens(implementation: str, device: str) -> None:
    inputs = [value.to(device) for value in (torch.randn(2, 0, 12), *parameters())]
    with crate_kernels.use(implementation):
        y, grad_x, *grads = gradients(operator, inputs, torch.randn(2, 0, 10))
    assert y.shape == (2, 0, 10) and grad_x.shape == (2, 0, 12)
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("implementation", ["reference", "composed"])
def test_autocast_gives_the_autocast_dtype(implementation: str) -> None:
    x, weights = torch.randn(2, 5, 12), parameters()
    with crate_kernels.use(implementation), torch.autocast("cpu", torch.bfloat16):
        y = operator(x, *weights)
    assert y.dtype == torch.bfloat16 and error(y, truth(*(v.double() for v in (x, *weights)))) < 1e-2


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype: torch.dtype, norm: bool, device: str) -> None:
    x, (weight, bias, *norms) = torch.randn(7, 16, device=device), parameters(16, 24, device=device)
    for first, second in ((weight, bias), (weight.t().contiguous().t(), None)):
        layer_norm = Norm(*norms) if norm else None
        (operand,) = operands([first.mT], [second], [layer_norm], dtype)
        arguments = first, second, *(norms if norm else (None, None)), *operand, 1e-5
        opcheck(OPS.norm_linear_forward.default, (x, *arguments))
        y, kept = OPS.norm_linear_forward(x, *arguments)
        kept = [y, *kept] if norm else []
        for needs in ((True, True), (True, False), (False, True)):
            opcheck(OPS.norm_linear_backward.default, (torch.randn_like(y), x, kept, *needs, *arguments))


def test_gradcheck() -> None:
    inputs = [torch.randn(2, 3, 6, dtype=torch.float64), *parameters(6, 4, dtype=torch.float64)]
    assert torch.autograd.gradcheck(operator, [value.requires_grad_() for value in inputs])


@pytest.mark.parametrize("implementation", ["composed", "triton"])
def test_compiles_whole_at_any_batch(implementation: str, device: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager", dynamic=True)
    weights = [value.to(device) for value in parameters(32, 24)]
    with crate_kernels.use(implementation):
        for batch in (2, 3):
            inputs, upstream = [torch.randn(batch, 9, 32, device=device), *weights], torch.randn(batch, 9, 24)
            found, expected = (gradients(call, inputs, upstream) for call in (compiled, operator))
            assert max(map(error, found, expected)) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_flops_are_counted(implementation: str, device: str) -> None:
    inputs = [value.to(device).requires_grad_() for value in (torch.randn(40, 12), *parameters())]
    with crate_kernels.use(implementation), FlopCounterMode(display=False) as counter:
        operator(*inputs).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 40 * 12 * 10


def test_meta_tensors_give_shapes() -> None:
    x, weight = torch.empty(2, 9, 32, device="meta"), torch.empty(24, 32, device="meta")
    assert norm_linear(x, weight).shape == (2, 9, 24)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(x=[1.0]), TypeError, r"x: expected a tensor \[..., width\], got list"),
        (dict(x=torch.ones(3, 12).int()), TypeError, "x: expected a floating-point dtype"),
        (dict(weight=torch.randn(10, 11)), ValueError, r"weight: expected \[out_width, width\] \(10, 12\)"),
        (dict(weight=torch.randn(0, 12), bias=None), ValueError, "weight: expected at least one row"),
        (dict(weight=torch.randn(10, 12).double()), TypeError, "weight: expected torch.float32 like x"),
        (dict(weight=torch.randn(10, 12, device="meta")), ValueError, "weight: expected it on cpu like x"),
        (dict(bias=torch.randn(12)), ValueError, r"bias: expected \[out_width\] \(10,\), got shape \(12,\)"),
        (dict(norm_weight=torch.randn(10)), ValueError, r"norm_weight: expected \[width\] \(12,\)"),
        (dict(norm_bias=torch.randn(12)), ValueError, "norm_bias: given without norm_weight"),
        (dict(norm_weight=torch.randn(12), norm_eps="1e-5"), TypeError, "norm_eps: expected a number, got str"),
    ],
)
def test_bad_input_names_the_argument(change: dict, kind: type[Exception], message: str) -> None:
    weight, bias, *_ = parameters()
    with pytest.raises(kind, match=message):
        norm_linear(**{"x": torch.randn(3, 12), "weight": weight, "bias": bias, **change})


def test_forced_triton_refuses_float64() -> None:
    with crate_kernels.use("triton"), pytest.raises(RuntimeError, match="float64"):
        norm_linear(torch.randn(3, 12).double(), torch.randn(4, 12).double())


def test_composed_is_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_products, "ONEDNN_IS_FASTER", False)
    x, (weight, bias, gamma, beta) = torch.randn(5, 12), parameters()
    assert torch.equal(
        operator(x, weight, bias, gamma, beta), F.linear(F.layer_norm(x, (12,), gamma, beta, 1e-3), weight, bias)
    )


def test_float64_weights_under_autocast(device: str) -> None:
    x, weights = torch.randn(5, 12, device=device), [value.double() for value in parameters(device=device)]
    with torch.autocast(device, torch.float16):
        expected = operator(x, *weights)
        with crate_kernels.use("triton"):
            assert error(operator(x, *weights), expected) < 2e-3


@pytest.mark.parametrize(("deviation", "scale"), [(100.0, 1e-5), (1e-2, 1e3)])
def test_float16_gradients_keep_their_range(deviation: float, scale: float, device: str) -> None:
    """Times the inverse deviation of their tokens, gradients would fall below float16's range, or leave it."""
    weight, _, gamma, beta = (value.to(device, torch.float16) for value in parameters())
    x = (deviation * torch.randn(40, 12, device=device)).half()
    upstream = (scale * torch.randn(40, 10, device=device)).half()
    inputs, found = [x, weight, gamma, beta], {}

    def call(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return norm_linear(x, weight, norm_weight=gamma, norm_bias=beta)

    for implementation in ("reference", "triton"):
        with crate_kernels.use(implementation):
            found[implementation] = gradients(call, inputs, upstream)[2:]
    with crate_kernels.use("reference"):
        exact = gradients(call, [value.double() for value in inputs], upstream.double())[2:]
    for ours, plain, wanted in zip(found["triton"], found["reference"], exact, strict=True):
        assert error(ours, wanted) <= 1.25 * error(plain, wanted) + a_few_roundings(torch.float16)
