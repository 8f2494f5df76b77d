"""The model beyond the golden numbers: sizes, shapes, masks, losses, parameters."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from support import error, small_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import crate_kernels
from crate_kernels import fusing
from crate_mae import MODELS, create_model
from crate_mae.layers import Linear, PatchEmbed
from crate_mae.masks import kept_patches, removed_patches
from crate_mae.registry import count_parameters


@pytest.mark.parametrize(("name", "official"), [("crate_mae_base", 44_638_464), ("crate_mae_small", 25_405_824)])
def test_parameter_counts(name: str, official: int) -> None:
    with torch.device("meta"):
        trained, counted = count_parameters(create_model(name))
    print(f"{name}: {trained:,} parameters receive a gradient, {counted:,} as the official code counts")
    assert counted == official
    assert trained == official - 2 * 197 * MODELS[name].embed_dim - MODELS[name].embed_dim * (
        MODELS[name].embed_dim + 1
    )


def test_large_and_tiny_are_as_published() -> None:
    for name, published in (("crate_mae_tiny", 11.56e6), ("crate_mae_large", 154.27e6)):
        with torch.device("meta"):
            assert abs(count_parameters(create_model(name))[1] - published) < 0.005e6 + 1e-3 * published


@pytest.mark.parametrize("implementation", ["reference", "composed"])
def test_every_parameter_receives_a_gradient(implementation: str) -> None:
    model = small_model()
    with crate_kernels.use(implementation):
        model(torch.randn(2, 3, 16, 16)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (20, 4)])
def test_any_size_and_channels(height: int, width: int, channels: int) -> None:
    model = small_model(in_chans=channels)  # configured for 16 x 16
    images = torch.randn(2, channels, height, width)
    loss, pred, mask = model(images)
    patches = (height // 4) * (width // 4)
    assert pred.shape == (2, patches, 16 * channels) and mask.shape == (2, patches) and loss.isfinite()
    assert model.encode(images).shape == (2, 1 + patches, 32)
    assert torch.equal(model.unpatchify(model.patchify(images), (height // 4, width // 4)), images)
    configured = small_model(in_chans=channels, img_size=(height, width))
    configured.load_state_dict({**model.state_dict(), "decoder_pos_embed": configured.decoder_pos_embed})
    assert torch.equal(configured.encode(images), model.encode(images)), "positions depend on the images alone"


def test_patchify_order_is_rows_then_columns_then_channels() -> None:
    images = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12).float()
    patches = small_model().patchify(images)
    for patch, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        expected = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(0, 2, 3, 1).flatten(1)
        assert torch.equal(patches[:, patch], expected)


def test_mask_removes_the_patches_with_most_noise() -> None:
    noise = torch.rand(5, 49)
    mask = removed_patches(kept_patches(noise, 0.75), 49)
    assert (mask == 0).sum(1).tolist() == [12] * 5  # int(49 * 0.25)
    assert (noise.masked_fill(mask == 1, -1).amax(1) < noise.masked_fill(mask == 0, 2).amin(1)).all()
    assert not removed_patches(kept_patches(noise, 0.0), 49).any()


def test_removed_patches_are_not_seen() -> None:
    model, noise = small_model(), torch.rand(2, 16)
    images = torch.randn(2, 3, 16, 16)
    _, pred, mask = model(images, noise=noise)
    hidden = model.unpatchify(mask.unsqueeze(-1).expand(-1, -1, 48))
    _, other, _ = model(images + hidden * torch.randn_like(images), noise=noise)
    assert torch.equal(pred, other)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75, 0.97])  # the last removes all twelve
@pytest.mark.parametrize("channels", [1, 5])
def test_embedding_the_kept_patches_alone_changes_nothing(channels: int, mask_ratio: float) -> None:
    """The official order embeds every patch, and replaces what was removed; the other paths do not."""
    model = small_model(in_chans=channels).double()
    images, noise = torch.randn(2, channels, 8, 24, dtype=torch.float64), torch.rand(2, 12)
    found = {}
    for implementation in ("reference", "composed"):
        with crate_kernels.use(implementation):
            loss, pred, _ = model(images, mask_ratio, noise)
        found[implementation] = [pred, *torch.autograd.grad(loss, list(model.parameters()))]
    for ours, official in zip(found["composed"], found["reference"], strict=True):
        assert (ours - official).norm() <= 1e-12 * official.norm()


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_is_the_error_on_removed_patches(norm_pix_loss: bool) -> None:
    model, images = small_model(norm_pix_loss=norm_pix_loss), torch.randn(2, 3, 16, 16)
    for ratio in (0.75, 0.0):
        loss, pred, mask = model(images, mask_ratio=ratio)
        target = model.patchify(images)
        if norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        chosen = mask.bool() if ratio else torch.ones_like(mask, dtype=torch.bool)
        assert error(loss, (pred - target)[chosen].square().mean()) < 1e-6


def test_attention_maps() -> None:
    model, images = small_model(depth=3), torch.randn(2, 3, 16, 16)
    maps = model.attention_map(images, 1)
    assert maps.shape == (2, 2, 17, 17) and error(maps.sum(-1), torch.ones(2, 2, 17)) < 1e-6
    assert torch.equal(maps, model.attention_map(images, -2))
    with pytest.raises(IndexError, match="layer: expected -3 to 2, got 3"):
        model.attention_map(images, 3)


def test_initialisation() -> None:
    model = create_model("crate_mae_tiny")
    bound = (6 / 384) ** 0.5
    for weight in (model.blocks[0].layers[0][1].fn.weight, model.decoder_blocks[0].layers[0][0].fn.weight):
        assert 0.99 * bound < weight.abs().max() <= bound
    qkv = model.blocks[0].layers[0][0].fn.qkv.weight
    assert 0.99 * (6 / 768) ** 0.5 < qkv.abs().max() <= (6 / 768) ** 0.5
    assert not model.decoder_pred.bias.any() and not model.patch_embed.proj.bias.any()
    assert abs(model.mask_token.std().item() - 0.02) < 0.003


def test_compiles_whole() -> None:
    torch.compiler.reset()
    model, images, noise = small_model(), torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert error(compiled(images, noise=noise).loss, model(images, noise=noise).loss) < 1e-6


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: m(torch.randn(2, 3, 18, 16)), ValueError, "divisible by patch_size 4, got 18 x 16"),
        (lambda m: m(torch.randn(2, 1, 16, 16)), ValueError, r"images: expected \[batch, 3 channels, height, width\]"),
        (
            lambda m: m.encode(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)),
            TypeError,
            "float32, standardised .* got torch.uint8",
        ),
        (lambda m: m.encode(torch.randn(2, 3, 16, 16).half()), TypeError, "images: expected torch.float32"),
        (lambda m: m.encode(torch.randn(2, 3, 16, 16).numpy()), TypeError, "images: expected a tensor .* got ndarray"),
        (lambda m: m(torch.randn(2, 3, 16, 16), mask_ratio=1.0), ValueError, "mask_ratio: expected .* got 1.0"),
        (
            lambda m: m(torch.randn(2, 3, 16, 16), noise=torch.rand(2, 4)),
            ValueError,
            r"noise: .* \(2, 16\), got shape \(2, 4\)",
        ),
        (lambda m: create_model("crate_mae_huge"), ValueError, "name: expected one of crate_mae_tiny"),
        (lambda m: create_model("crate_mae_tiny", dim=3), TypeError, "dim: no such field"),
        (
            lambda m: create_model("crate_mae_tiny", img_size="96"),
            TypeError,
            "img_size: expected an integer .* got '96'",
        ),
        (lambda m: create_model("crate_mae_tiny", img_size=(96,)), TypeError, r"img_size: expected .* got \(96,\)"),
        (lambda m: create_model("crate_mae_tiny", depth=2.5), TypeError, "depth: expected an integer, got 2.5"),
        (lambda m: create_model("crate_mae_tiny", lambd="5"), TypeError, "lambd: expected a number, got '5'"),
        (lambda m: m.unpatchify(torch.rand(2, 24, 48)), ValueError, r"4 x 4 = 16 of them, got 24; .*grid=\(rows, col"),
        (
            lambda m: m.unpatchify(torch.rand(2, 16, 47)),
            ValueError,
            r"4 \* 4 \* 3 channels = 48\], got .*\(2, 16, 47\)",
        ),
        (lambda m: m.unpatchify(torch.rand(16, 48)), ValueError, r"patches: expected \[batch, .* got shape \(16, 48\)"),
        (lambda m: small_model(num_heads=5), ValueError, "num_heads: expected a divisor of embed_dim 32, got 5"),
        (lambda m: small_model(lambd=-1.0), ValueError, "lambd: expected at least 0, got -1.0"),
        (lambda m: small_model(step_size=0.0), ValueError, "step_size: expected above 0"),
        (lambda m: small_model(img_size=18), ValueError, "divisible by patch_size 4, got 18 x 18"),
    ],
)
def test_bad_input_says_what_was_expected(call: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(small_model())


def test_parametrized_weights_and_compiled_blocks(device: str) -> None:
    """A parametrized weight is a new tensor at each look; and blocks may be compiled while what prepares them is not."""
    pytest.importorskip("triton")
    model = small_model().to(device)
    images, noise = torch.randn(2, 3, 16, 16, device=device), torch.rand(2, 16, device=device)
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].layers[0][0].fn.qkv)
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].layers[0][1].fn)
    with crate_kernels.use("composed"):
        expected = model(images, noise=noise).loss.item()
    with crate_kernels.use("triton"):
        assert model(images, noise=noise).loss.item() == pytest.approx(expected, rel=1e-5)
        for block in model.blocks[1:]:
            block.compile(backend="aot_eager", fullgraph=True)
        assert model(images, noise=noise).loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "composed"])
def test_linear_under_autocast_is_of_its_dtype(implementation: str) -> None:
    linear, x = Linear(24, 8), torch.randn(5, 24)
    with crate_kernels.use(implementation), torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16 and error(y, nn.functional.linear(x, linear.weight, linear.bias)) < 2**-7


def test_hooks_on_all_modules_see_the_embedding() -> None:
    seen: set[type] = set()
    handle = register_module_forward_hook(lambda module, *_: seen.add(type(module)))
    try:
        with crate_kernels.use("composed"):
            small_model()(torch.randn(1, 3, 16, 16))
    finally:
        handle.remove()
    assert {PatchEmbed, nn.Conv2d} <= seen


def test_a_layer_says_why_it_is_not_fused_unless_it_drops_paths() -> None:
    images, model = torch.randn(2, 3, 16, 16), small_model().train()
    fusing._said.clear()
    model.encoder_layers[0].drop_path = 0.5
    with crate_kernels.use("composed"), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images)
    model.encoder_layers[0].drop_path = 0.0
    model.encoder_layers[0]._pairs()[0][1].register_forward_hook(lambda *_: None)
    with crate_kernels.use("composed"), pytest.warns(UserWarning, match="EncoderBlock: a step has hooks"):
        model(images)


@pytest.mark.parametrize(("replaced", "got"), [("norm", "Identity and MSSA"), ("fn", "LayerNorm and Identity")])
def test_a_layer_whose_steps_are_others_says_so(replaced: str, got: str) -> None:
    block = small_model().encoder_layers[0]
    block._pairs()[0][0]._modules[replaced] = nn.Identity()
    with pytest.raises(TypeError, match=f"step: expected a LayerNorm and MSSA, got {got}"):
        _ = block.step_size


def test_a_step_size_changed_after_building_counts(device: str) -> None:
    """In one layer or in all, on every path: weights are prepared with the step that a layer has when it runs."""
    pytest.importorskip("triton")
    model = small_model().to(device)
    images, noise = torch.randn(2, 3, 16, 16, device=device), torch.rand(2, 16, device=device)

    def loss(implementation: str) -> float:
        with crate_kernels.use(implementation):
            return model(images, noise=noise).loss.item()

    built = loss("composed")
    for changed in (model.blocks[:1], model.blocks):
        for block in changed:
            block.layers[0][1].fn.step_size = 0.3
        official = loss("reference")
        assert abs(official - built) > 1e-4
        assert loss("composed") == pytest.approx(official, rel=1e-5)
        assert loss("triton") == pytest.approx(official, rel=1e-5)
    for block in model.blocks:  # learned, and as yet all alike
        block.layers[0][1].fn.step_size = torch.nn.Parameter(torch.tensor(0.3, device=device))
    assert loss("triton") == pytest.approx(official, rel=1e-5)
    model.blocks[0].layers[0][1].fn.threshold = "soft"
    assert abs(loss("composed") - official) > 1e-6
    assert loss("triton") == pytest.approx(loss("composed"), rel=1e-5)


def test_gradients_of_each_image() -> None:
    """By torch.func, each image with a mask of its own."""
    model, images, noise = small_model(), torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor, noise: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],), {"noise": noise[None]}).loss

    each = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, images, noise)
    for index in range(3):
        one = torch.autograd.grad(
            model(images[index : index + 1], noise=noise[index : index + 1]).loss, parameters.values()
        )
        assert max(error(each[name][index], grad) for name, grad in zip(parameters, one, strict=True)) < 1e-5


def test_a_whole_model_is_exported_saved_and_loaded() -> None:
    model, images, noise, file = small_model(), torch.randn(2, 3, 16, 16), torch.rand(2, 16), io.BytesIO()
    torch.export.save(torch.export.export(model, (images,), {"noise": noise}), file)
    file.seek(0)
    found, expected = torch.export.load(file).module()(images, noise=noise), model(images, noise=noise)
    assert type(found) is type(expected)
    assert max(map(error, found, expected)) < 1e-5
