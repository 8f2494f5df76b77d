"""CRATE-MAE under what trains it at scale: activation checkpointing, functional_call, DDP, FSDP2. One process, one CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from support import error, small_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import crate_kernels
from crate_mae.training.fsdp import shard

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["composed", "triton"])
IMAGES, NOISE = torch.randn(2, 3, 16, 16), torch.rand(2, 16)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(run: nn.Module, named: nn.Module) -> dict[str, Tensor]:
    loss = run(IMAGES, noise=NOISE).loss
    loss.backward()
    full = {name: p.grad for name, p in named.named_parameters()}
    return {"loss": loss} | {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in full.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert error(found[name], value) < 1e-6, name


def twins() -> tuple[nn.Module, nn.Module]:
    model, twin = small_model(depth=2, decoder_depth=2), small_model(depth=2, decoder_depth=2)
    twin.load_state_dict(model.state_dict())
    return model, twin


@functools.cache
def expected_of(implementation: str) -> dict[str, Tensor]:
    """The gradients of the first of the twins, which is the same in every test."""
    torch.manual_seed(0)
    model, _ = twins()
    with crate_kernels.use(implementation):
        return gradients(model, model)


@IMPLEMENTATIONS
def test_recompute_and_activation_checkpointing(implementation: str) -> None:
    _, twin = twins()
    with crate_kernels.use(implementation):
        expected = expected_of(implementation)
        twin.recompute = True
        same(gradients(twin, twin), expected)
        twin.recompute = False
        twin.zero_grad()
        for block in (*twin.blocks, *twin.decoder_blocks):
            forward = block.forward
            block.forward = lambda *a, forward=forward, **k: checkpoint(forward, *a, use_reentrant=False, **k)
        same(gradients(twin, twin), expected)


@IMPLEMENTATIONS
def test_functional_call(implementation: str) -> None:
    model, twin = twins()
    with crate_kernels.use(implementation):
        expected = expected_of(implementation)
        parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        loss = functional_call(twin, parameters, (IMAGES,), {"noise": NOISE}).loss
        found = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    same({"loss": loss, **found}, expected)


@IMPLEMENTATIONS
def test_ddp(implementation: str, one_process: None) -> None:
    """With its default settings, which fail where a parameter goes without a gradient."""
    _, twin = twins()
    with crate_kernels.use(implementation):
        same(gradients(DistributedDataParallel(twin), twin), expected_of(implementation))


@IMPLEMENTATIONS
def test_fsdp2(implementation: str, one_process: None) -> None:
    """Layer by layer: weights are whole only while their layer runs, so nothing may prepare them all at once."""
    _, twin = twins()
    shard(twin, dist.init_device_mesh("cpu", (1,)))
    with crate_kernels.use(implementation):
        same(gradients(twin, twin), expected_of(implementation))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_16_bit_stream(recompute: bool) -> None:
    """No effect without autocast; with it, tokens between layers are 16-bit, and the loss is the same within their rounding."""
    model, twin = twins()
    twin.stream, twin.recompute = "16bit", recompute
    same(gradients(twin, twin), gradients(model, model))
    dtypes = []
    for block in twin.blocks:
        block.register_forward_hook(lambda module, args, out: dtypes.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [m(IMAGES, noise=NOISE).loss for m in (model, twin)]
    assert dtypes == [(torch.bfloat16, torch.bfloat16)] * 2
    assert error(losses[1], losses[0]) < 2e-3
