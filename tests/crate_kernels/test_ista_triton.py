"""The Triton path of ISTA against the official order of operations in float64; without a GPU, in Triton's interpreter.

One rule decides every comparison: the kernel's error against float64, relative in norm, is at most 1.25 times that of
the official order run eagerly at the same storage dtypes, plus two roundings of the dtype that the result is stored in.
Gradients are compared under the mask of the kernel's own output, so that a value within a rounding of the threshold decides
nothing; that the mask itself differs from float64's only there is a check of its own.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import a_few_roundings, awkward_gradients, error, gradients
from torch import Tensor

pytest.importorskip("triton")

import crate_kernels
from crate_kernels import ista
from crate_kernels.ista.form import one_product
from crate_kernels.products.op import combined_operands

OPS = torch.ops.crate_kernels

STEP_SIZE, LAMBD = 0.3, 0.5

# The interpreter multiplies bfloat16 wrongly, so that dtype is proved on a GPU. A pair is (stream, operands).
ON_GPU = pytest.mark.gpu
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.float16, torch.float16, id="float16"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16", marks=ON_GPU),
    pytest.param(torch.float32, torch.float16, id="float32 stream, float16 operands"),
    pytest.param(torch.float32, torch.bfloat16, id="float32 stream, bfloat16 operands", marks=ON_GPU),
]

SHAPES = [
    (1, 48),  # one token; a width under one tile
    (50, 130),  # two products; tails both ways, and a row stride that is no multiple of 16 bytes
    (66, 66),  # as many tokens as features, the last size of the two-product form; one past a tile of 64
    (67, 66),  # and the first of the one-product form
    (197, 48),  # one image of CRATE-MAE
    (256, 128),  # whole tiles only: no masks
    (394, 96),  # two images, so that the weight's gradient is summed over several programs
]
FORMS = pytest.mark.parametrize(("tokens", "width"), [(50, 96), (197, 48)], ids=["two products", "one product"])


def prepared(tokens: int, width: int, device: str, stream: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Tokens as a LayerNorm gives them, and a dictionary of rows of about unit length."""
    x = torch.randn(tokens, width).to(device, stream)
    weight = (torch.randn(width, width) / width**0.5).to(device, stream)
    return x, weight


def arguments(tokens: int, weight: Tensor, dtype: torch.dtype, soft: bool) -> tuple:
    numbers = torch.tensor(STEP_SIZE), torch.tensor(LAMBD)
    combined = matrix = None
    if one_product(tokens, weight.shape[0]):
        ((combined, (matrix, *_)),) = combined_operands([weight], [None], numbers[0], dtype)
    return weight, combined, None, None, matrix, None, None, 1e-5, *numbers, soft, dtype, "triton"


def forward(x: Tensor, weight: Tensor, dtype: torch.dtype, soft: bool = False) -> tuple[Tensor, list[Tensor]]:
    return OPS.ista_forward(x, x.dtype, *arguments(x.shape[0], weight, dtype, soft))


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    kept: list[Tensor],
    dtype: torch.dtype,
    need_x: bool = True,
    need_weight: bool = True,
    soft: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    found = OPS.ista_backward(grad_y, x, y, kept, need_x, need_weight, *arguments(x.shape[0], weight, dtype, soft))
    return found[0] if need_x else None, found[1] if need_weight else None


def official(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x + eta * (x W - x W^T W) in the official order, products of operands in ``dtype``."""
    operand, weight = x.to(dtype), weight.to(dtype)
    x1 = operand @ weight.T
    grad1 = x1 @ weight
    grad2 = operand @ weight
    return x + STEP_SIZE * (grad2 - grad1)


def thresholded(u: Tensor, soft: bool) -> Tensor:
    if soft:
        return torch.sign(u) * torch.relu(u.abs() - STEP_SIZE * LAMBD)
    return torch.relu(u - STEP_SIZE * LAMBD)


def official_step(
    x: Tensor, weight: Tensor, dtype: torch.dtype, soft: bool, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the gradients of x and W for ``upstream`` as it is after the threshold's mask."""
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    u = official(x, weight, dtype)
    grad_x, grad_weight = torch.autograd.grad(u, (x, weight), upstream.to(u.dtype))
    return thresholded(u, soft).detach(), grad_x, grad_weight


def check(
    x: Tensor, weight: Tensor, grad_y: Tensor, operands: torch.dtype, soft: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels on the tensors as they are and hold them to the rule; their results."""
    y, kept = forward(x, weight, operands, soft)
    arrived = grad_y.clone()
    grad_x, grad_weight = backward(grad_y, x, weight, y, kept, operands, soft=soft)
    assert torch.equal(grad_y, arrived), "the gradient that arrived was written to"

    mask = y != 0
    upstream = grad_y * mask
    truth = official_step(x.double(), weight.double(), torch.float64, soft, upstream)
    eager = official_step(x, weight, operands, soft, upstream)
    kernels = {"y": (y, x.dtype), "grad_x": (grad_x, x.dtype), "grad_weight": (grad_weight, weight.dtype)}
    for (name, (kernel, dtype)), exact, eagerly in zip(kernels.items(), truth, eager, strict=True):
        assert kernel.dtype == dtype and kernel.is_contiguous(), name
        assert error(kernel, exact) <= 1.25 * error(eagerly, exact) + a_few_roundings(dtype), name

    # Where the masks differ one side is zero, so y's own error there is how far it was from the threshold.
    distance = ((y.double() - truth[0]).abs() * (mask != (truth[0] != 0))).max()
    eager_error, largest = (eager[0].double() - truth[0]).abs().max(), truth[0].abs().max()
    assert distance <= 1.25 * eager_error + a_few_roundings(y.dtype) * largest
    return y, grad_x, grad_weight


@pytest.mark.parametrize(("stream", "operands"), DTYPES)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_output_and_gradients(tokens: int, width: int, stream: torch.dtype, operands: torch.dtype, device: str) -> None:
    x, weight = prepared(tokens, width, device, stream)
    check(x, weight, torch.randn(tokens, width).to(x), operands)


@FORMS
@pytest.mark.parametrize(("stream", "operands"), DTYPES)
def test_soft_threshold(tokens: int, width: int, stream: torch.dtype, operands: torch.dtype, device: str) -> None:
    x, weight = prepared(tokens, width, device, stream)
    y, *_ = check(x, weight, torch.randn(tokens, width).to(x), operands, soft=True)
    assert 0 < (y == 0).double().mean() < 0.5
    assert (y > 0).any() and (y < 0).any()


@pytest.mark.gpu
@pytest.mark.parametrize(("stream", "operands"), DTYPES)
@pytest.mark.parametrize("tokens", [197, 16 * 197], ids=["two products", "one product"])
@pytest.mark.parametrize("width", [384, 576, 768, 1024], ids=["tiny", "small", "base", "large"])
def test_crate_mae_widths(tokens: int, width: int, stream: torch.dtype, operands: torch.dtype, device: str) -> None:
    x, weight = prepared(tokens, width, device, stream)
    check(x, weight, torch.randn(tokens, width).to(x), operands)


@pytest.mark.parametrize(("stream", "operands"), DTYPES)
@FORMS
def test_strided_gradients(tokens: int, width: int, stream: torch.dtype, operands: torch.dtype, device: str) -> None:
    x, weight = prepared(tokens, width, device, stream)
    for _, grad_y in awkward_gradients((tokens, width), stream, device):
        check(x, weight, grad_y, operands)


@FORMS
@pytest.mark.parametrize("layout", ["every second feature", "transposed", "rows apart", "one row repeated"])
def test_strided_tokens(tokens: int, width: int, layout: str, device: str) -> None:
    x, weight = prepared(tokens, width, device)
    if layout == "every second feature":
        x = x.repeat_interleave(2, -1)[..., ::2]
    elif layout == "transposed":
        x = x.T.contiguous().T
    elif layout == "rows apart":
        x = torch.cat([x, x], -1)[:, :width]
    else:
        x = x[:1].expand(tokens, width)
    check(x, weight.T.contiguous().T, torch.randn(tokens, width).to(x), torch.float32)


def test_master_weight_stays_float32(device: str) -> None:
    """Float32 dictionary, float16 tokens: the dictionary's gradient comes back in float32, not rounded on the way.

    With as many tokens as here the products' operands are exact: what is left of the error is float32's own.
    """
    for tokens, bound in ((50, 3e-4), (197, 1e-6)):  # two products round the residual to the operands' dtype
        x, weight = prepared(tokens, 64, device, torch.float16)
        weight, grad_y = weight.float(), torch.randn(tokens, 64).to(x)
        y, kept = forward(x, weight, torch.float16)
        _, grad_weight = backward(grad_y, x, weight, y, kept, torch.float16, need_x=False)
        upstream = (grad_y * (y != 0)).double()
        *_, exact = official_step(x.double(), weight.double(), torch.float64, False, upstream)
        assert grad_weight.dtype == torch.float32
        assert error(grad_weight, exact) <= bound


@pytest.mark.parametrize(("tokens", "width"), [(40, 64), (150, 48)], ids=["two products", "one product"])
def test_only_the_gradients_asked_for_and_always_the_same_bits(tokens: int, width: int, device: str) -> None:
    x, weight = prepared(tokens, width, device)
    grad_y = torch.randn(tokens, width).to(x)

    def step(need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y, kept = forward(x, weight, torch.float32)
        return y, *backward(grad_y, x, weight, y, kept, torch.float32, need_x, need_weight)

    both = step(True, True)
    for need_x, need_weight in [(True, True), (True, False), (False, True)]:
        for wanted, found, first in zip((True, need_x, need_weight), step(need_x, need_weight), both, strict=True):
            assert (found is not None) == wanted
            assert found is None or torch.equal(found, first)


def test_no_tokens(device: str) -> None:
    x, weight = prepared(0, 48, device)
    y, kept = forward(x, weight, torch.float32)
    grad_x, grad_weight = backward(torch.empty_like(y), x, weight, y, kept, torch.float32)
    assert y.shape == grad_x.shape == (0, 48)
    assert torch.equal(grad_weight, torch.zeros_like(weight))


@pytest.mark.parametrize("soft", [False, True], ids=["relu", "soft"])
@pytest.mark.parametrize("tokens", [20, 60], ids=["two products", "one product"])
def test_nan_is_not_thresholded_away(tokens: int, soft: bool, device: str) -> None:
    x, weight = prepared(tokens, 48, device)
    x[3, 5] = torch.nan
    y, kept = forward(x, weight, torch.float32, soft)
    assert y[3].isnan().all() and not y[:3].isnan().any() and not y[4:].isnan().any()
    grad_x, _ = backward(torch.full_like(y, torch.nan), x, weight, y, kept, torch.float32, True, False, soft)
    assert grad_x[3].isnan().all()


def test_the_form_by_operation_counts() -> None:
    for tokens, width in [(1, 48), (96, 96), (97, 96), (50432, 768), (197, 768)]:
        one, two = 2 * tokens * width**2 + 2 * width**3, 4 * tokens * width**2
        assert one_product(tokens, width) == (one < two)


@pytest.mark.parametrize("threshold", ["relu", "soft"])
@pytest.mark.parametrize("tokens", [20, 70], ids=["two products", "one product"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layer_norm_and_learned_numbers(dtype: torch.dtype, tokens: int, threshold: str, device: str) -> None:
    """LN before the step, folded or not, and step_size and lambda as tensors: every gradient against the official order."""
    width = 40
    x, weight = torch.randn(2, tokens // 2, width), torch.randn(width, width) / width**0.5
    inputs = [x, weight, 1 + torch.randn(width) / 4, torch.randn(width) / 4]
    inputs = [value.to(device, dtype) for value in inputs]
    numbers = torch.tensor(STEP_SIZE), torch.tensor(LAMBD)

    def operator(x, weight, gamma, beta, step_size, lambd):
        options = dict(step_size=step_size, lambd=lambd, threshold=threshold)
        return ista(x, weight, norm_weight=gamma, norm_bias=beta, **options)

    def before_threshold(x, weight, gamma, beta, step_size):
        x = F.layer_norm(x, (width,), gamma, beta)
        return x + step_size * (x @ weight - x @ weight.T @ weight)

    def plain(*inputs):
        u, cut = before_threshold(*inputs[:5]), inputs[4] * inputs[5]
        return torch.relu(u - cut) if threshold == "relu" else u.sign() * torch.relu(u.abs() - cut)

    exact = [value.double() for value in (*inputs, *numbers)]
    # No gradient from where rounding alone decides on which side of the threshold an element falls.
    distance = (before_threshold(*exact[:5]).abs() - STEP_SIZE * LAMBD).abs()
    upstream = torch.randn(x.shape).to(device, dtype) * (distance > 0.02)
    truth = gradients(plain, exact, upstream.double())
    official = gradients(plain, [*inputs, *(number.to(dtype) for number in numbers)], upstream)
    with crate_kernels.use("triton"):
        found = gradients(operator, [*inputs, *numbers], upstream)
    roundings = a_few_roundings(dtype)
    for ours, eagerly, wanted in zip(found[:5], official, truth, strict=False):
        assert error(ours, wanted) <= 1.25 * error(eagerly, wanted) + roundings
    # A sum over all elements may cancel: its rounding is measured by its terms.
    x = F.layer_norm(exact[0], (width,), *exact[2:4])
    terms = (upstream.double() * (x @ exact[1] - x @ exact[1].T @ exact[1])).norm()
    for ours, wanted in zip(found[5:], truth[5:], strict=True):
        assert (ours.double() - wanted).abs() <= 2 * roundings * terms


def test_norm_weight_in_a_float32_stream(device: str) -> None:
    """LN(x) is added in float32, and so is its share of the norm weight's gradient: not by way of rounded factors."""
    width = 64
    x, weight = torch.randn(210, width, device=device), torch.randn(width, width, device=device) / width**0.5
    inputs = [x, weight, 1 + torch.randn(width, device=device) / 4, torch.randn(width, device=device) / 4]

    def operator(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        with torch.autocast(device, torch.float16, enabled=x.dtype == torch.float32):
            return ista(x, weight, lambd=LAMBD, norm_weight=gamma, norm_bias=beta)

    exact = [value.double() for value in inputs]
    n = F.layer_norm(exact[0], (width,), *exact[2:])
    u = n + 0.1 * (n @ exact[1] - n @ exact[1].T @ exact[1]) - 0.1 * LAMBD
    upstream = torch.randn(210, width, device=device) * (u.abs() > 0.02)
    with crate_kernels.use("reference"):
        truth, official = gradients(operator, exact, upstream.double()), gradients(operator, inputs, upstream)
    with crate_kernels.use("triton"):
        found = gradients(operator, inputs, upstream)
    assert error(found[3], truth[3]) <= 1.25 * error(official[3], truth[3]) + a_few_roundings(torch.float32)
