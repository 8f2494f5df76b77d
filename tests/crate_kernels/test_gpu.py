"""On a CUDA device: the Triton path against the reference at the shapes of the CRATE family, and whole models on it.

``make gpu-check`` runs these. Only public functions are used, so that they outlive changes of the kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from support import LOG_SUM_EXP_ROUNDING, a_few_roundings, error, gradients
from torch import Tensor, nn

import crate_kernels
from crate_kernels import (
    AttentionWeights,
    Norm,
    decoder_layer,
    encoder_layer,
    ista,
    mssa,
    norm_linear,
    shared_qkv_attention,
)
from crate_mae import MODELS, create_model

pytestmark = pytest.mark.gpu

# Without a GPU conftest skips all of this; with the mark taken off, most bodies run in the interpreter at smaller sizes.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (width, heads). CRATE and CRATE-MAE share theirs; CRATE-alpha adds a narrower and four wider ones, heads of 80 to 112 features.
SIZES = {name.removeprefix("crate_mae_"): (config.embed_dim, config.num_heads) for name, config in MODELS.items()}
ALPHA_SIZES = {
    "alpha-tiny": (192, 3),
    "alpha-huge": (1280, 16),
    "alpha-g": (1408, 16),
    "alpha-G": (1664, 16),
    "alpha-e": (1792, 16),
}
BASE_WIDTH, BASE_HEADS = SIZES["base"]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MODELS_AND_DTYPES = pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *(pytest.param(size, dtype, id=f"{name}-{dtype}") for dtype in DTYPES for name, size in SIZES.items()),
        *(pytest.param(size, torch.bfloat16, id=f"{name}-{torch.bfloat16}") for name, size in ALPHA_SIZES.items()),
    ],
)
BATCHES = [1, 8]  # one image: fewer tokens than the width, two products in ISTA; eight: one product

# Offsets in a tensor with more elements than this do not fit 32 bits.
INT32_ELEMENTS = 2**31


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype).mul_(scale)


def heads_of(tokens: Tensor, heads: int) -> Tensor:
    """[batch, tokens, width] -> the view [batch, heads, tokens, head_dim] that the projection hands to attention."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def random_heads(batch: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    width, heads = size
    return heads_of(random(batch, 197, width, dtype=dtype), heads)


def random_ista(batch: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """x [batch, 197, width] and a dictionary."""
    return [random(batch, 197, width, dtype=dtype), random(width, width, dtype=dtype, scale=(2 / width) ** 0.5)]


def random_mssa(batch: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """x [batch, 197, width], both projections and the bias."""
    projections = [random(width, width, dtype=dtype, scale=width**-0.5) for _ in range(2)]
    return [random(batch, 197, width, dtype=dtype), *projections, random(width, dtype=dtype)]


def sparse_step(threshold: str) -> Callable[..., Tensor]:
    return lambda x, weight: ista(x, weight, lambd=0.5, threshold=threshold)


def decoder_attention(heads: int) -> Callable[..., Tensor]:
    return lambda *inputs: mssa(*inputs, num_heads=heads, skip=inputs[0], subtract=True)


def ista_upstream(x: Tensor, weight: Tensor, threshold: str) -> Tensor:
    """A gradient that is zero where rounding decides on which side of the threshold an element falls."""
    x, weight = x.double(), weight.double()
    code = x + 0.1 * (x @ weight - x @ weight.T @ weight)
    distance = ((code if threshold == "relu" else code.abs()) - 0.05).abs()
    return torch.randn_like(x) * (distance > 0.05)


def agrees(operator: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor, margin: float = 0.0) -> None:
    """Triton's error against float64, output and every gradient, is at most the reference's in the same dtype.

    ``margin`` is what gradients may have besides.
    """
    dtype = inputs[0].dtype
    with crate_kernels.use("reference"):
        truth = gradients(operator, [value.double() for value in inputs], upstream.double())
        official = gradients(operator, inputs, upstream)
    with crate_kernels.use("triton"):
        found = gradients(operator, inputs, upstream)
        again = gradients(operator, inputs, upstream)
    for place, (ours, repeated, plain, exact) in enumerate(zip(found, again, official, truth, strict=True)):
        assert torch.equal(ours, repeated), "two runs differ in their bits"
        assert error(ours, exact) <= 1.25 * error(plain, exact) + a_few_roundings(dtype) + margin * (place > 0)


@pytest.mark.parametrize("batch", BATCHES)
@MODELS_AND_DTYPES
def test_shared_attention(size: tuple[int, int], dtype: torch.dtype, batch: int) -> None:
    w = random_heads(batch, size, dtype)
    for is_causal in (False, True):
        upstream = torch.randn_like(w)
        agrees(lambda w, c=is_causal: shared_qkv_attention(w, is_causal=c), [w], upstream, LOG_SUM_EXP_ROUNDING)


@pytest.mark.parametrize("batch", BATCHES)
@MODELS_AND_DTYPES
def test_ista(size: tuple[int, int], dtype: torch.dtype, batch: int) -> None:
    inputs = random_ista(batch, size[0], dtype)
    for threshold in ("relu", "soft"):
        agrees(sparse_step(threshold), inputs, ista_upstream(*inputs, threshold))


@MODELS_AND_DTYPES
def test_mssa(size: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = random_mssa(4, size[0], dtype)
    agrees(decoder_attention(size[1]), inputs, torch.randn_like(inputs[0]), LOG_SUM_EXP_ROUNDING)


@pytest.mark.parametrize("batch", [2, 5, 64, 512])
@pytest.mark.parametrize("operator", ["attention", "ista", "mssa"])
def test_batches_of_base(operator: str, batch: int) -> None:
    if operator == "attention":
        w = random_heads(batch, SIZES["base"], torch.bfloat16)
        agrees(shared_qkv_attention, [w], torch.randn_like(w))
    elif operator == "ista":
        inputs = random_ista(batch, BASE_WIDTH, torch.bfloat16)
        agrees(sparse_step("relu"), inputs, ista_upstream(*inputs, "relu"))
    else:
        inputs = random_mssa(batch, BASE_WIDTH, torch.bfloat16)
        agrees(decoder_attention(BASE_HEADS), inputs, torch.randn_like(inputs[0]))


def layer_inputs(kind: str, batch: int, stream: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A layer of Base, or one of its products with a LayerNorm, as a function of its tokens and weights, under autocast."""
    x, qkv, out, bias = random_mssa(batch, BASE_WIDTH, torch.float32)
    matrix = random(BASE_WIDTH, BASE_WIDTH, dtype=torch.float32, scale=BASE_WIDTH**-0.5)
    # Means far from zero, as tokens of trained models have them.
    x, vectors = (x + 2).to(stream), [random(BASE_WIDTH, dtype=torch.float32, scale=0.1) for _ in range(4)]

    def run(x, qkv, out, bias, matrix, *vectors):
        attention, (gamma1, beta1, gamma2, beta2) = AttentionWeights(qkv, out, bias), vectors
        norms = Norm(1 + gamma1, beta1), Norm(1 + gamma2, beta2)
        with autocast(torch.bfloat16):
            if kind == "encoder":
                return encoder_layer(x, norms[0], attention, norms[1], matrix, num_heads=BASE_HEADS)
            if kind == "decoder":
                return decoder_layer(x, norms[0], matrix, norms[1], attention, num_heads=BASE_HEADS)
            weight = matrix if kind == "norm_linear" else matrix.t()
            return norm_linear(x, weight, norm_weight=1 + gamma1, norm_bias=beta1)

    return run, [x, qkv, out, bias, matrix, *vectors]


REPEATED = [
    *(pytest.param(operator, 64, torch.bfloat16, id=operator) for operator in ("attention", "ista", "mssa")),
    *(
        pytest.param(kind, batch, stream, id=f"{kind}-{batch}-{stream}")
        for kind, batch in (("encoder", 64), ("encoder", 8), ("decoder", 64), ("decoder", 8))
        for stream in (torch.float32, torch.bfloat16)
    ),
    *(pytest.param(kind, 256, torch.bfloat16, id=kind) for kind in ("norm_linear", "norm_linear transposed")),
]


@pytest.mark.parametrize(("kind", "batch", "stream"), REPEATED)
def test_repeats_have_the_same_bits(kind: str, batch: int, stream: torch.dtype) -> None:
    """Kernels that wait for too little give other bits each run; some did, in one order of a matrix, at one size of tiles."""
    if kind == "attention":
        function, inputs = shared_qkv_attention, [random_heads(batch, SIZES["base"], stream)]
    elif kind == "ista":
        function, inputs = sparse_step("relu"), random_ista(batch, BASE_WIDTH, stream)
    elif kind == "mssa":
        function, inputs = decoder_attention(BASE_HEADS), random_mssa(batch, BASE_WIDTH, stream)
    else:
        function, inputs = layer_inputs(kind, batch, stream)

    def run() -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in inputs]
        out = function(*leaves)
        found = torch.autograd.grad(out, leaves, upstream.to(out.dtype), allow_unused=True)
        return [out.detach(), *(value for value in found if value is not None)]

    upstream = torch.randn_like(inputs[0])
    with crate_kernels.use("reference"):
        official = run()
    with crate_kernels.use("triton"):
        first = run()
        for repeat in range(10):
            elsewhere = torch.empty(1_000_003 * (repeat + 1), device=DEVICE)  # other addresses, another neighbourhood
            assert all(map(torch.equal, first, run()))
            del elsewhere
    for ours, plain in zip(first, official, strict=True):
        assert error(ours, plain) < 0.1  # what wrong tiles are, and rounding is not


def last_rows_agree(function: Callable[..., Tensor], inputs: list[Tensor], rows: int) -> None:
    """On a huge first input: output and gradients of its last rows are those of the same rows alone.

    The gradient that arrives is zero but for these rows, so every other row's is zero and the weights' is theirs alone.
    """
    large, *weights = inputs
    assert large.numel() > INT32_ELEMENTS
    upstream = torch.zeros_like(large)
    upstream[-rows:].normal_()
    with crate_kernels.use("triton"):
        out, grad, *grad_weights = gradients(function, inputs, upstream)
        alone = gradients(function, [large[-rows:], *weights], upstream[-rows:])
    for found, expected in zip([out[-rows:], grad[-rows:], *grad_weights], alone, strict=True):
        assert error(found, expected) <= a_few_roundings(found.dtype)
    assert not out.isnan().any()
    assert not grad[:-rows].any()


def needs_memory(gigabytes: int) -> None:
    if DEVICE == "cpu":
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free device memory, there are {free / 1e9:.0f}")


@pytest.mark.parametrize("operator", ["attention", "ista"])  # one after the other: together they fill a smaller device
def test_past_32_bit_offsets(operator: str) -> None:
    needs_memory(30)  # five or six tensors of 4.3 GB
    if operator == "attention":
        w = random_heads(INT32_ELEMENTS // (197 * BASE_WIDTH) + 4, SIZES["base"], torch.bfloat16)
        last_rows_agree(shared_qkv_attention, [w], rows=8)
    else:
        x = random(INT32_ELEMENTS // BASE_WIDTH + 1000, BASE_WIDTH, dtype=torch.bfloat16)
        weight = random(BASE_WIDTH, BASE_WIDTH, dtype=torch.bfloat16, scale=(2 / BASE_WIDTH) ** 0.5)
        last_rows_agree(sparse_step("relu"), [x, weight], rows=8 * BASE_WIDTH)


def loss_and_gradients(call: Callable[..., tuple], model: nn.Module, images: Tensor, noise: Tensor) -> list[Tensor]:
    """The loss and every parameter's gradient; ``call`` is the model, or something around it."""
    model.zero_grad()
    loss = call(images, noise=noise)[0]
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def small_model() -> nn.Module:
    """Real head width and every kind of layer, on images of 4 x 4 patches."""
    return create_model("crate_mae_tiny", depth=1, decoder_depth=1, img_size=64).to(DEVICE)


def small_batch(batch: int) -> tuple[Tensor, Tensor]:
    """Images and the noise that says which of their patches are removed."""
    return torch.randn(batch, 3, 64, 64, device=DEVICE), torch.rand(batch, 16, device=DEVICE)


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_step_under_autocast(dtype: torch.dtype) -> None:
    """Loss and gradients of a shallow Base model, as the official order gives them under the same autocast."""
    model = create_model("crate_mae_base", depth=2, decoder_depth=2).to(DEVICE)
    images, noise = torch.randn(4, 3, 224, 224, device=DEVICE), torch.rand(4, 196, device=DEVICE)

    def step(implementation: str, dtype: torch.dtype) -> list[Tensor]:
        with crate_kernels.use(implementation), autocast(dtype):
            return loss_and_gradients(model, model, images, noise)

    exact = step("reference", torch.float32)
    found = step("triton", dtype)
    for ours, plain, truth in zip(found, step("reference", dtype), exact, strict=True):
        # Masks that fall on either side of a threshold by rounding make single elements differ; norms stay close.
        assert error(ours, truth) <= 2 * error(plain, truth) + 1e-3
    for _ in range(3):
        assert all(map(torch.equal, found, step("triton", dtype))), "two steps differ in their bits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_model_compiled_at_any_batch(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    model = small_model()
    compiled = torch.compile(model, fullgraph=True)
    for batch in (4, 6, 40):  # crosses from two products to one in ISTA
        images, noise = small_batch(batch)
        torch._dynamo.mark_dynamic(images, 0)
        torch._dynamo.mark_dynamic(noise, 0)
        with crate_kernels.use("reference"):
            exact = loss_and_gradients(model, model, images, noise)
        with autocast(dtype):
            plain = loss_and_gradients(model, model, images, noise)
            with torch.compiler.set_stance("default" if batch == 4 else "fail_on_recompile"):
                found = loss_and_gradients(compiled, model, images, noise)
        for ours, eager, truth in zip(found, plain, exact, strict=True):
            assert error(ours, truth) <= 2 * error(eager, truth) + 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_step_in_a_cuda_graph() -> None:
    """Replays of one captured step, optimiser included, follow the same steps run eagerly."""
    original = small_model()
    # Batches of different size in their values: a replay that reads an old one gives another loss.
    batches = [(images * (1 + turn), noise) for turn, (images, noise) in enumerate(small_batch(8) for _ in range(6))]

    def prepared() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = copy.deepcopy(original)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, noise: Tensor) -> Tensor:
        with autocast(torch.bfloat16):
            loss = model(images, noise=noise).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    eager, optimizer = prepared()
    expected = []
    for images, noise in batches:
        optimizer.zero_grad(set_to_none=True)
        expected.append(step(eager, optimizer, images, noise))
    torch.cuda.synchronize()

    # One side stream from the first step on: autograd runs a node's backward on the stream that the node was made on.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model, optimizer = prepared()
        images, noise = (value.clone() for value in batches[0])
        for warmup_images, warmup_noise in batches[:3]:
            optimizer.zero_grad(set_to_none=True)
            step(model, optimizer, warmup_images, warmup_noise)
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            loss = step(model, optimizer, images, noise)
        found = []
        for new_images, new_noise in batches[3:]:
            images.copy_(new_images)
            noise.copy_(new_noise)
            graph.replay()
            found.append(loss.clone())
    torch.cuda.synchronize()

    for ours, eagerly in zip(found, expected[3:], strict=True):
        assert error(ours, eagerly) < 1e-2
    for ours, eagerly, start in zip(model.parameters(), eager.parameters(), original.parameters(), strict=True):
        assert error(ours - start, eagerly - start) < 5e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stream_that_does_not_wait_for_another() -> None:
    """Weights met first on a busy stream, then on an idle one, which must not read what the first has yet to copy."""
    x, norm = random(300, 64, dtype=torch.float32), torch.ones(64, device=DEVICE)
    first, second = random(64, 64, dtype=torch.float32), random(64, 64, dtype=torch.float32)

    def step(weight: Tensor) -> Tensor:
        return norm_linear(x, weight, norm_weight=norm)

    step(first)  # compiles, so that the next calls take no time
    torch.cuda.synchronize()
    results = []
    for stream, cycles in ((torch.cuda.Stream(), 2 * 10**9), (torch.cuda.Stream(), 0)):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)
            results.append(step(second))
    torch.cuda.synchronize()
    with crate_kernels.use("reference"):
        expected = step(second)
    assert all(error(found, expected) < 1e-5 for found in results)


def test_data_parallel_with_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter gets its gradient, so that DDP need not look for unused ones, and it is the model's own."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("needs torch.distributed")
    backend = "nccl" if DEVICE == "cuda" and distributed.is_nccl_available() else "gloo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # the machine's own name need not resolve
    rendezvous = f"file://{tmp_path / 'rendezvous'}"
    distributed.init_process_group(backend, init_method=rendezvous, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        model = small_model()
        wrapped = copy.deepcopy(model)
        parallel = nn.parallel.DistributedDataParallel(wrapped)
        for _ in range(2):  # the second step is where DDP misses gradients of the first
            images, noise = small_batch(8)
            expected = loss_and_gradients(model, model, images, noise)
            for ours, alone in zip(loss_and_gradients(parallel, wrapped, images, noise), expected, strict=True):
                assert error(ours, alone) < 1e-5
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    w = torch.randn(2, 3, 50, 64, device="cuda:1")
    x, weight = torch.randn(40, 32, device="cuda:1"), torch.randn(32, 32, device="cuda:1")
    with crate_kernels.use("reference"):
        expected = shared_qkv_attention(w), ista(x, weight)
    assert error(shared_qkv_attention(w), expected[0]) < 1e-2
    assert error(ista(x, weight), expected[1]) < 1e-2
