"""torch.compile takes CRATE-MAE of every size as one graph, whose batch may change.

The kernels are replaced by nothing here (their results are garbage): what counts is the graph around them, of whole layers.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import crate_kernels
from crate_mae import MODELS, create_model

pytest.importorskip("triton")


class Nothing:
    """Stands for a kernel; a launch does nothing."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getitem__(self, grid: object) -> object:
        return lambda *_, **__: None


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from crate_kernels.products import kernels, preparation_kernels
    from crate_kernels.shared_attention import kernels as attention

    for module in (preparation_kernels, kernels, attention):
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Nothing(name))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model: torch.nn.Module, batch: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(batch, 3, 32, 32)).loss
    loss.backward()


@pytest.mark.usefixtures("no_kernels")
def test_one_graph_at_full_depth() -> None:
    """``fullgraph`` raises at a graph break; forward and backward are traced and run. The other sizes: one layer, below."""
    counter = CompileCounterWithBackend("aot_eager")
    with crate_kernels.use("triton"):
        model = create_model("crate_mae_small", img_size=32)
        step(torch.compile(model, fullgraph=True, backend=counter), 2)
    assert counter.frame_count == 1
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("name", ["crate_mae_tiny", "crate_mae_large"])
def test_batches_do_not_recompile(name: str) -> None:
    """The second batch size makes the graph dynamic; others run it as it is."""
    counter = CompileCounterWithBackend("aot_eager")
    with crate_kernels.use("triton"):
        model = create_model(name, img_size=32, depth=1, decoder_depth=1)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        step(compiled, 2)
        step(compiled, 3)
        graphs = counter.frame_count
        for batch in (4, 7, 16, 23):
            step(compiled, batch)
    assert counter.frame_count == graphs == 2
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("kind", ["blocks", "decoder_blocks"])
@pytest.mark.parametrize("name", MODELS)
def test_opcheck_of_a_layer_of_every_size(name: str, kind: str) -> None:
    """Schema and fake against what the operators really return, at the widths, heads and dtypes of the model."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "crate_kernels":
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    with crate_kernels.use("triton"), torch.autocast("cpu", torch.bfloat16):
        model = create_model(name, depth=2, decoder_depth=2)
        layers, heads = getattr(model, kind), model.config.num_heads
        weights = [layer.weights() for layer in layers]
        x = torch.randn(6, 197, weights[0].attention.qkv.shape[1], requires_grad=True)
        with Record():
            crate_kernels.prepare_layers(x, weights, num_heads=heads)
            layers[0](x).sum().backward()
    names = [str(function).removeprefix("crate_kernels.").removesuffix(".default") for function, _ in calls]
    if kind == "blocks":
        operators = ["prepare", "combine", "encoder_layer_forward", "encoder_layer_backward"]
    else:
        operators = ["prepare", "prepare", "decoder_layer_forward", "decoder_layer_backward"]
    # The layer was given nothing prepared, and so prepares for itself.
    assert [name for name in names[2:] if name not in ("prepare", "combine")] == operators[2:]
    assert names[:2] == operators[:2]
    for function, args in calls:
        # Derivatives are the autograd.Function's around the operators.
        args = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        opcheck(function, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
