"""The official model's own numbers: loss, prediction, every layer's activation, every gradient."""

from __future__ import annotations

import pytest
import torch
from golden import Golden
from support import error
from torch import Tensor

import crate_kernels
from crate_mae import CrateMAE, create_model

TOLERANCE = 2e-5  # the official code's own float32 error reaches 1e-5


def layers(model: CrateMAE) -> dict[str, torch.nn.Module]:
    named = {f"block.{i}": block for i, block in enumerate(model.blocks)}
    return named | {f"decoder_block.{i}": block for i, block in enumerate(model.decoder_blocks)}


def worst(errors: dict[str, float]) -> None:
    name = max(errors, key=errors.get)
    print(f"{len(errors)} tensors, worst {name}: {errors[name]:.1e}")
    assert all(value <= TOLERANCE for value in errors.values()), errors


@pytest.mark.parametrize("implementation", ["reference", "composed", "triton"])
def test_whole_model(golden: Golden, implementation: str, device: str) -> None:
    model, activations = golden.model(device), {}
    for name, layer in layers(model).items():
        layer.register_forward_hook(lambda module, args, out, name=name: activations.__setitem__(name, out))
    with crate_kernels.use(implementation):
        images, noise = (golden.tensors[f"input/{name}"].to(device) for name in ("images", "noise"))
        loss, pred, mask = model(images, golden.config["mask_ratio"], noise)
        loss.backward()
    assert torch.equal(mask.cpu(), golden.tensors["output/mask"])
    errors = {"loss": error(loss, golden.tensors["output/loss"]), "pred": error(pred, golden.tensors["output/pred"])}
    errors |= {name: error(activations[name], value) for name, value in golden.group("activation/").items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == golden.group("grad/").keys()
    errors |= {name: error(gradients[name], value) for name, value in golden.group("grad/").items()}
    worst(errors)


@pytest.mark.parametrize("implementation", ["composed", "triton"])
@pytest.mark.parametrize("name", ["block.1", "decoder_block.0", "decoder_block.1"])
def test_layer_by_layer(golden: Golden, implementation: str, name: str, device: str) -> None:
    """One layer on the official activation before it: its output against the official one, its gradients against float64."""
    previous = {"block.1": "block.0", "decoder_block.1": "decoder_block.0"}.get(name)
    x = golden.tensors[f"activation/{previous or 'block.1'}"]
    model = golden.model(device)
    if previous is None:  # the encoder's final norm lies between
        x = model.norm(x.to(device)).detach().cpu()
    upstream = torch.randn_like(x)

    def run(layer: torch.nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        out = layer(x)
        out.backward(upstream)
        return {"out": out, "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}

    with crate_kernels.use("reference"):
        truth = run(layers(golden.model().double())[name], x.double(), upstream.double())
    with crate_kernels.use(implementation):
        found = run(layers(model)[name], x.to(device), upstream.to(device))
    worst(
        {key: error(found[key], truth[key]) for key in truth}
        | {"official": error(found["out"], golden.tensors[f"activation/{name}"])}
    )


def test_attention_and_projection_of_the_last_encoder_layer(golden: Golden) -> None:
    model, images = golden.model(), golden.tensors["input/images"]
    worst({"attention": error(model.attention_map(images), golden.tensors["output/attention_last"])})
    keys = []
    attention = model.blocks[-1].layers[0][0]
    model.blocks[-1].register_forward_pre_hook(lambda m, args: keys.append(attention(args[0], return_key=True)))
    model.encode(images)
    worst({"projection": error(keys[0], golden.tensors["output/features_key_last"])})


def test_positions_are_the_official_ones(golden: Golden) -> None:
    model = create_model("crate_mae_tiny", img_size=64, patch_size=8, embed_dim=96, num_heads=2, decoder_num_heads=2)
    assert (model.decoder_pos_embed - golden.tensors["state/decoder_pos_embed"]).abs().max() < 1e-6
