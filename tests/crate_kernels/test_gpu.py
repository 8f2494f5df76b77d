"""On a CUDA device: the Triton path against the reference at the shapes of the CRATE-MAE models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import a_few_roundings, error, gradients
from torch import Tensor

import crate_kernels
from crate_kernels import ista, mssa, shared_qkv_attention
from crate_mae import MODELS, create_model

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = {name: (config.embed_dim, config.num_heads) for name, config in MODELS.items()}
BATCHES = [1, 8]  # one image: fewer tokens than the width, two products in ISTA; eight: one product


def agrees(operator: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> None:
    """Triton's error against float64, output and every gradient, is at most the reference's in the same dtype."""
    dtype = inputs[0].dtype
    with crate_kernels.use("reference"):
        truth = gradients(operator, [value.double() for value in inputs], upstream.double())
        official = gradients(operator, inputs, upstream)
    with crate_kernels.use("triton"):
        found = gradients(operator, inputs, upstream)
        again = gradients(operator, inputs, upstream)
    for ours, repeated, plain, exact in zip(found, again, official, truth, strict=True):
        assert torch.equal(ours, repeated), "two runs differ in their bits"
        assert error(ours, exact) <= 1.25 * error(plain, exact) + a_few_roundings(dtype)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_attention(dtype: torch.dtype, name: str, batch: int) -> None:
    width, heads = SIZES[name]
    w = random(batch, 197, width, dtype=dtype).unflatten(-1, (heads, -1)).transpose(1, 2)
    for is_causal in (False, True):
        agrees(lambda w, c=is_causal: shared_qkv_attention(w, is_causal=c), [w], torch.randn_like(w))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ista(dtype: torch.dtype, name: str, batch: int) -> None:
    width, _ = SIZES[name]
    x, weight = random(batch, 197, width, dtype=dtype), random(width, width, dtype=dtype, scale=(2 / width) ** 0.5)
    # No gradient from where rounding decides on which side of the threshold an element falls.
    exact_x, exact_w = x.double(), weight.double()
    code = exact_x + 0.1 * (exact_x @ exact_w - exact_x @ exact_w.T @ exact_w)
    for threshold in ("relu", "soft"):
        distance = ((code if threshold == "relu" else code.abs()) - 0.05).abs()
        upstream = torch.randn_like(x) * (distance > 0.05)
        agrees(lambda x, w, t=threshold: ista(x, w, lambd=0.5, threshold=t), [x, weight], upstream)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mssa(dtype: torch.dtype, name: str) -> None:
    width, heads = SIZES[name]
    x = random(4, 197, width, dtype=dtype)
    parameters = [random(width, width, dtype=dtype, scale=width**-0.5) for _ in range(2)]
    parameters += [random(width, dtype=dtype)]
    agrees(lambda *a: mssa(*a, num_heads=heads, residual=a[0], subtract=True), [x, *parameters], torch.randn_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_training_step_under_autocast(dtype: torch.dtype) -> None:
    """Loss and gradients of a shallow Base model, as the official order gives them under the same autocast."""
    model = create_model("crate_mae_base", depth=2, decoder_depth=2).cuda()
    images, noise = torch.randn(4, 3, 224, 224, device="cuda"), torch.rand(4, 196, device="cuda")

    def step(implementation: str, dtype: torch.dtype) -> list[Tensor]:
        model.zero_grad()
        autocast = torch.autocast("cuda", dtype, enabled=dtype != torch.float32)
        with crate_kernels.use(implementation), autocast:
            loss = model(images, noise=noise).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    exact = step("reference", torch.float32)
    for ours, plain, truth in zip(step("triton", dtype), step("reference", dtype), exact, strict=True):
        # Masks that fall on either side of a threshold by rounding make single elements differ; norms stay close.
        assert error(ours, truth) <= 2 * error(plain, truth) + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_with_inductor(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    model = create_model("crate_mae_tiny", depth=1, decoder_depth=1, img_size=64).cuda()
    compiled = torch.compile(model, fullgraph=True)
    images, noise = torch.randn(4, 3, 64, 64, device="cuda"), torch.rand(4, 16, device="cuda")
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        assert error(compiled(images, noise=noise).loss, model(images, noise=noise).loss) < 1e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    w = torch.randn(2, 3, 50, 64, device="cuda:1")
    x, weight = torch.randn(40, 32, device="cuda:1"), torch.randn(32, 32, device="cuda:1")
    with crate_kernels.use("reference"):
        expected = shared_qkv_attention(w), ista(x, weight)
    assert error(shared_qkv_attention(w), expected[0]) < 1e-2
    assert error(ista(x, weight), expected[1]) < 1e-2
