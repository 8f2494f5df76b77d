"""CRATE-alpha's sparse step: four products and a backward by hand, its boundary and its errors."""

from __future__ import annotations

import pytest
import torch
from support import a_few_roundings, awkward_gradients, error, gradients
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import crate_kernels
from crate_kernels import overcomplete_ista

OPS = torch.ops.crate_kernels
IMPLEMENTATIONS = ["reference", "composed", "triton"]
STEP_SIZE, LAMBD = 0.2, 0.3
FORMS = pytest.mark.parametrize("coupled", [False, True], ids=["decoupled", "coupled"])


def dictionaries(width: int = 8, codes: int = 20, **options: object) -> list[Tensor]:
    return [torch.randn(width, codes, **options) / width**0.5 for _ in range(2)]


def step(x: Tensor, dictionary: Tensor, out_dictionary: Tensor | None = None, **options: object) -> Tensor:
    return overcomplete_ista(x, dictionary, out_dictionary, **{"step_size": STEP_SIZE, "lambd": LAMBD, **options})


def truth(
    x: Tensor, dictionary: Tensor, out_dictionary: Tensor | None = None, eta: object = STEP_SIZE, lambd: object = LAMBD
) -> Tensor:
    """Two proximal gradient steps on |x - z D^T|^2 / 2 + lambda |z|, z >= 0, from z = 0, one token at a time."""

    def one(token: Tensor) -> Tensor:
        z = torch.zeros_like(dictionary[0])
        for _ in range(2):
            descent = (token - (dictionary * z).sum(1)) @ dictionary
            z = (z + eta * descent - eta * lambd).clamp_min(0)
        return ((dictionary if out_dictionary is None else out_dictionary) * z).sum(1)

    return torch.stack([one(token) for token in x.reshape(-1, x.shape[-1])]).reshape(x.shape)


@FORMS
@pytest.mark.parametrize("implementation", ["reference", "composed"])
def test_agrees_with_the_formula_in_float64(implementation: str, coupled: bool) -> None:
    inputs = [torch.randn(2, 7, 8, dtype=torch.float64), *dictionaries(dtype=torch.float64)]
    numbers = torch.tensor([STEP_SIZE], dtype=torch.float64), torch.tensor(LAMBD, dtype=torch.float64)
    inputs = [*(inputs[:2] if coupled else inputs), *numbers]
    upstream = torch.randn(2, 7, 8, dtype=torch.float64)

    def ours(x: Tensor, *rest: Tensor) -> Tensor:
        *matrices, eta, lambd = rest
        return step(x, *matrices, step_size=eta, lambd=lambd)

    def exact(x: Tensor, *rest: Tensor) -> Tensor:
        *matrices, eta, lambd = rest
        return (
            truth(x, *matrices, eta=eta, lambd=lambd) if len(matrices) == 2 else truth(x, *matrices, None, eta, lambd)
        )

    with crate_kernels.use(implementation):
        found = gradients(ours, inputs, upstream)
    assert max(map(error, found, gradients(exact, inputs, upstream))) < 1e-12


@pytest.mark.parametrize("implementation", ["reference", "composed"])
def test_layer_norm_before_and_residual_after(implementation: str) -> None:
    x, gamma, beta, past = (torch.randn(*s, dtype=torch.float64) for s in ((2, 5, 8), (8,), (8,), (2, 5, 8)))
    matrices, upstream = dictionaries(dtype=torch.float64), torch.randn_like(x)

    def ours(x: Tensor, gamma: Tensor, beta: Tensor, past: Tensor) -> Tensor:
        return step(x, *matrices, norm_weight=gamma, norm_bias=beta, norm_eps=1e-3, skip=past)

    def exact(x: Tensor, gamma: Tensor, beta: Tensor, past: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        n = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gamma + beta
        return past + truth(n, *matrices)

    inputs = [x, gamma, beta, past]
    with crate_kernels.use(implementation):
        found = gradients(ours, inputs, upstream)
    assert max(map(error, found, gradients(exact, inputs, upstream))) < 1e-12


def masked(
    x: Tensor, dictionary: Tensor, out: Tensor, eta: object, lambd: object, past: Tensor | None, masks: list[Tensor]
) -> Tensor:
    """The official order of operations with the thresholds' decisions given: what their gradients are compared under."""
    first, second = masks
    z1 = (eta * (x @ dictionary) - eta * lambd) * first
    z2 = (z1 - eta * ((z1 @ dictionary.t() - x) @ dictionary) - eta * lambd) * second
    z3 = z2 @ out.t()
    return z3 if past is None else past + z3


def codes_of(x: Tensor, D: Tensor, *numbers: Tensor) -> tuple[Tensor, Tensor]:
    """z1 and z2 of the kernels."""
    numbers = numbers or (torch.tensor(STEP_SIZE), torch.tensor(LAMBD))
    return OPS.overcomplete_forward(x, None, x.dtype, D, None, *numbers, x.dtype)[1:]


@pytest.mark.parametrize(("coupled", "residual"), [(False, True), (True, False)], ids=["decoupled-residual", "coupled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "width", "codes"), [(37, 24, 50), (70, 40, 100)], ids=["one tile", "several tiles"])
def test_triton(
    tokens: int, width: int, codes: int, dtype: torch.dtype, residual: bool, coupled: bool, device: str
) -> None:
    """Codes, output and gradients, no worse than the official order; sizes that no tile divides.

    Where rounding alone puts a code at the threshold, it counts or not by luck. So gradients are compared under the masks of
    the kernels' own codes, and how far from the threshold masks may differ is bounded by the error of the codes.
    """
    D, D1 = (value.to(device, dtype) for value in dictionaries(width, codes))
    x, past, upstream = (torch.randn(tokens, width).to(device, dtype) for _ in range(3))
    inputs = [x, D, *([] if coupled else [D1]), *([past] if residual else [])]
    z1, z2 = codes_of(x, D)
    masks = [z1 != 0, z2 != 0]
    assert all(0.1 < mask.double().mean() < 0.9 for mask in masks)

    def kernels(x: Tensor, D: Tensor, *rest: Tensor) -> Tensor:
        return step(x, D, None if coupled else rest[0], skip=rest[-1] if residual else None)

    def official(x: Tensor, D: Tensor, *rest: Tensor) -> Tensor:
        return masked(x, D, D if coupled else rest[0], STEP_SIZE, LAMBD, rest[-1] if residual else None, masks)

    with crate_kernels.use("triton"):
        found = gradients(kernels, inputs, upstream)
    eager = gradients(official, inputs, upstream)
    truth = gradients(official, [value.double() for value in inputs], upstream.double())
    for ours, plain, exact in zip(found, eager, truth, strict=True):
        assert ours.dtype == dtype
        assert error(ours, exact) <= 1.25 * error(plain, exact) + a_few_roundings(dtype)

    exact_D = D.double()
    exact_z1 = (STEP_SIZE * (x.double() @ exact_D) - STEP_SIZE * LAMBD).clamp_min(0)
    exact_z2 = exact_z1 - STEP_SIZE * (exact_z1 @ exact_D.T - x.double()) @ exact_D - STEP_SIZE * LAMBD
    for code, exact in ((z1, exact_z1), (z2, exact_z2.clamp_min(0))):
        assert code.dtype == dtype and error(code, exact) < 4 * torch.finfo(dtype).eps
        assert ((code - exact).abs() * ((code != 0) != (exact != 0))).max() < 8 * torch.finfo(dtype).eps * exact.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_of_step_size_and_lambda(dtype: torch.dtype, device: str) -> None:
    """Sums of many numbers of either sign: the error of one such sum is luck, so that of a dozen is compared."""
    numbers = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (STEP_SIZE, LAMBD)]
    results = []
    for _ in range(12):
        D, D1 = (value.to(device, dtype) for value in dictionaries(8, 30))
        x, upstream = (torch.randn(20, 8).to(device, dtype) for _ in range(2))
        masks = [code != 0 for code in codes_of(x, D, *(value.detach() for value in numbers))]
        with crate_kernels.use("triton"):
            out = overcomplete_ista(x, D, D1, step_size=numbers[0], lambd=numbers[1])
        ours = torch.autograd.grad(out, numbers, upstream)
        both = []
        for kind in (dtype, torch.float64):
            values = [value.to(kind) for value in numbers]
            out = masked(x.to(kind), D.to(kind), D1.to(kind), *values, None, masks)
            both.append(torch.autograd.grad(out, values, upstream.to(kind)))
        results.append(torch.stack([torch.stack(grads).double() for grads in (ours, *both)]))
    found, eager, truth = torch.stack(results, 1)
    for number in range(2):
        ours, plain = (error(value[:, number], truth[:, number]) for value in (found, eager))
        assert ours <= 1.25 * plain + a_few_roundings(dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layer_norm_and_x_itself_as_residual_under_autocast(implementation: str, device: str) -> None:
    """The stream stays float32, and so do its gradient and those of the parameters."""
    x, D, D1, gamma, beta = torch.randn(2, 9, 24), *dictionaries(24, 96), 1 + torch.randn(24) / 4, torch.randn(24) / 4
    inputs = [value.to(device) for value in (x, D, D1, gamma, beta)]
    upstream = torch.randn(2, 9, 24).to(device)

    def block(x: Tensor, D: Tensor, D1: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return step(x, D, D1, norm_weight=gamma, norm_bias=beta, skip=x)

    with crate_kernels.use("reference"):
        exact = gradients(block, [value.double() for value in inputs], upstream.double())
    with crate_kernels.use(implementation), torch.autocast(device, torch.float16):
        found = gradients(block, inputs, upstream)
        without = step(*inputs[:3])
    assert without.dtype == torch.float16
    # One code in a hundred may fall on the other side of its threshold: in norm, a tenth. A wrong term would be of order one.
    for value, wanted in zip(found, exact, strict=True):
        assert value.dtype == torch.float32 and error(value, wanted) < 0.1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_float64_residual_of_float32_tokens(implementation: str, device: str) -> None:
    inputs = [value.to(device) for value in (torch.randn(9, 8), torch.randn(9, 8).double(), *dictionaries())]
    upstream = torch.randn(9, 8, dtype=torch.float64).to(device)

    def block(x: Tensor, past: Tensor, *matrices: Tensor) -> Tensor:
        return step(x, *matrices, skip=past)

    with crate_kernels.use(implementation):
        found = gradients(block, inputs, upstream)
    exact = gradients(
        lambda x, past, *matrices: past + truth(x, *matrices), [value.double() for value in inputs], upstream
    )
    assert [value.dtype for value in found] == [torch.float64, *(value.dtype for value in inputs)]
    assert max(map(error, found, exact)) < 1e-5


@FORMS
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_as_they_arrive(implementation: str, coupled: bool, device: str) -> None:
    inputs = [value.to(device) for value in (torch.randn(9, 8), *dictionaries()[: 1 if coupled else 2])]
    for name, upstream in awkward_gradients((9, 8), torch.float32, device):
        before = upstream.clone()
        with crate_kernels.use(implementation):
            found = gradients(step, inputs, upstream)
        expected = gradients(truth, [value.double() for value in inputs], upstream.double())
        assert max(map(error, found, expected)) < 1e-5, name
        assert torch.equal(upstream, before), f"{name}: the gradient was written to"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strided_tokens_and_dictionaries(implementation: str, device: str) -> None:
    D, D1 = (value.to(device) for value in dictionaries(20, 8))
    for x in (torch.randn(8, 30).t(), torch.randn(30, 16)[:, ::2], torch.randn(3, 8, 10).mT, torch.randn(8)):
        x = x.to(device)
        with crate_kernels.use(implementation):
            found = step(x, D.t(), D1.t(), skip=x)
        assert error(found, x.double() + truth(x.double(), D.t().double(), D1.t().double())) < 1e-6


NAMES = ["x", "dictionary", "out_dictionary", "skip", "step_size", "lambd"]


@FORMS
@pytest.mark.parametrize("wanted", NAMES)
def test_only_the_gradients_asked_for(wanted: str, coupled: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from crate_kernels.overcomplete import triton

    asked, backward = [], triton.backward
    monkeypatch.setattr(triton, "backward", lambda *a: asked.append(a[-1]) or backward(*a))
    matrices = [value.to(device) for value in dictionaries()]
    x, past = torch.randn(9, 8).to(device), torch.randn(9, 8).to(device)
    inputs = dict(zip(NAMES, (x, *matrices, past, torch.tensor(STEP_SIZE), torch.tensor([LAMBD])), strict=True))
    if coupled:
        del inputs["out_dictionary"]
        if wanted == "out_dictionary":
            pytest.skip("there is none")
    inputs[wanted].requires_grad_()
    with crate_kernels.use("triton"):
        overcomplete_ista(**{"out_dictionary": None, **inputs}).sum().backward()
    number = wanted in ("step_size", "lambd")
    needs = wanted == "x", wanted == "dictionary", wanted == "out_dictionary", number
    assert asked == ([] if wanted == "skip" else [needs])
    assert [name for name, value in inputs.items() if value.grad is not None] == [wanted]

    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    out = truth(
        exact["x"], exact["dictionary"], exact.get("out_dictionary"), exact["step_size"], exact["lambd"].squeeze()
    )
    (out + exact["skip"]).sum().backward()
    assert error(inputs[wanted].grad, exact[wanted].grad) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens(implementation: str, device: str) -> None:
    inputs = [value.to(device) for value in (torch.randn(2, 0, 8), *dictionaries())]
    with crate_kernels.use(implementation):
        y, grad_x, *grads = gradients(step, inputs, torch.randn(2, 0, 8))
    assert y.shape == grad_x.shape == (2, 0, 8)
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize(("operands", "coupled"), [(torch.float32, True), (torch.float16, False)], ids=str)
def test_opcheck(operands: torch.dtype, coupled: bool, device: str) -> None:
    x, (D, D1) = torch.randn(7, 8, device=device), dictionaries(device=device)
    arguments = D, None if coupled else D1.t().contiguous().t(), torch.tensor(0.1), torch.tensor(0.5), operands
    opcheck(OPS.overcomplete_forward.default, (x, None, x.dtype, *arguments))
    opcheck(OPS.overcomplete_forward.default, (x, torch.randn_like(x), x.dtype, *arguments))
    out, z1, z2 = OPS.overcomplete_forward(x, None, x.dtype, *arguments)
    grad = torch.randn_like(out)
    for needs in ([True, True, not coupled, True], [True, False, False, False], [False, coupled, not coupled, False]):
        opcheck(OPS.overcomplete_backward.default, (grad, x, z1, z2, needs, *arguments))


@FORMS
def test_gradcheck(coupled: bool) -> None:
    inputs = [torch.randn(3, 5, dtype=torch.float64), *dictionaries(5, 7, dtype=torch.float64)[: 1 if coupled else 2]]
    assert torch.autograd.gradcheck(step, [value.requires_grad_() for value in inputs])


@pytest.mark.parametrize("implementation", ["composed", "triton"])
def test_compiles_whole_at_any_batch_and_step_size(implementation: str, device: str) -> None:
    torch.compiler.reset()

    def block(x: Tensor, D: Tensor, D1: Tensor, step_size: float) -> Tensor:
        return overcomplete_ista(x, D, D1, step_size=step_size, skip=x)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    matrices = [value.to(device) for value in dictionaries(16, 64)]
    with crate_kernels.use(implementation):
        for batch, step_size in ((2, 0.1), (3, 0.2)):
            inputs, upstream = [torch.randn(batch, 9, 16, device=device), *matrices], torch.randn(batch, 9, 16)
            results = [gradients(lambda *a, f=f, s=step_size: f(*a, s), inputs, upstream) for f in (compiled, block)]
            assert max(map(error, *results)) < 1e-5


@FORMS
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_flops_are_counted(implementation: str, coupled: bool, device: str) -> None:
    """Four products forward, eight backward; the kernels compute one again instead of keeping it."""
    inputs = [value.to(device) for value in (torch.randn(40, 8), *dictionaries()[: 1 if coupled else 2])]
    inputs = [value.requires_grad_() for value in inputs]
    with crate_kernels.use(implementation), FlopCounterMode(display=False) as counter:
        step(*inputs).sum().backward()
    assert counter.get_total_flops() == (13 if implementation == "triton" else 12) * 2 * 40 * 8 * 20


def test_meta_tensors_give_shapes() -> None:
    x, D = torch.empty(2, 9, 8, device="meta"), torch.empty(8, 32, device="meta")
    assert overcomplete_ista(x, D, None).shape == (2, 9, 8)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(x=None), TypeError, r"x: expected a tensor \[..., width\], got NoneType"),
        (dict(dictionary=torch.randn(20, 8)), ValueError, r"dictionary: expected \[width, codes\] \(8, 8\)"),
        (dict(dictionary=torch.randn(8)), ValueError, r"dictionary: expected \[width, codes\], got shape \(8,\)"),
        (
            dict(out_dictionary=torch.randn(20, 8)),
            ValueError,
            r"out_dictionary: expected \[width, codes\] \(8, 20\)",
        ),
        (dict(dictionary=torch.randn(8, 20).half()), TypeError, "dictionary: expected torch.float32 like x"),
        (
            dict(out_dictionary=torch.randn(8, 20, device="meta")),
            ValueError,
            "out_dictionary: expected it on cpu like x",
        ),
        (dict(step_size=0.0), ValueError, "step_size: expected a finite number above zero, got 0.0"),
        (
            dict(step_size=torch.ones(2)),
            ValueError,
            "step_size: expected a number or a floating-point tensor of one element",
        ),
        (dict(lambd=torch.tensor(-1.0)), ValueError, "lambd: expected a finite number of at least zero, got -1.0"),
        (dict(lambd="0.1"), TypeError, "lambd: expected a number, got str"),
        (dict(norm_bias=torch.randn(8)), ValueError, "norm_bias: given without norm_weight"),
        (
            dict(skip=torch.randn(1, 8)),
            ValueError,
            r"skip: expected \[..., width\] \(3, 8\), got shape \(1, 8\)",
        ),
    ],
)
def test_bad_input_names_the_argument(change: dict, kind: type[Exception], message: str) -> None:
    D, D1 = dictionaries()
    with pytest.raises(kind, match=message):
        overcomplete_ista(**{"x": torch.randn(3, 8), "dictionary": D, "out_dictionary": D1, **change})


def test_forced_triton_refuses_float64() -> None:
    with crate_kernels.use("triton"), pytest.raises(RuntimeError, match="float64"):
        step(*(value.double() for value in (torch.randn(3, 8), *dictionaries())))
