"""CRATE-MAE-Tiny's training step in float32: the forward that keeps what the backward needs, and the backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import crate_kernels
import crate_mae
from benchmarks.conftest import IMPLEMENTATIONS


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_training_step(compare, device, mode, implementation):
    model = crate_mae.create_model("crate_mae_tiny").to(device).train()
    images, noise = torch.randn(2, 3, 224, 224, device=device), torch.rand(2, 196, device=device)

    def outputs(implementation: str, dtype: torch.dtype) -> dict[str, Tensor]:
        own = copy.deepcopy(model).to(dtype)
        with crate_kernels.use(implementation):
            loss = own(images.to(dtype), noise=noise).loss
            loss.backward()
        gradients = [parameter.grad.flatten() for parameter in own.parameters() if parameter.grad is not None]
        return {"loss": loss.detach(), "gradient": torch.cat(gradients)}

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward() -> Tensor:
        return model(images, noise=noise).loss

    with crate_kernels.use(implementation):
        loss = forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)

    work = forward if mode == "forward" else backward
    compare(f"training step of crate_mae_tiny, {mode}", outputs, work, implementation, rounds=5)
