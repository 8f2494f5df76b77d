"""Supervised CRATE and CRATE-alpha, and CRATE-MAE's encoder with a head, against the formulas in plain PyTorch and float64."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support import SMALL_CLASSIFIER, error, small_classifier, small_model
from torch import Tensor, nn

import crate_kernels
from crate_mae import CLASSIFIERS, Classifier, classifier_of, create_model, load_model, load_transform, save_model
from crate_mae.checkpoints import load_weights
from crate_mae.cli.runs import model_of as model_of_run
from crate_mae.registry import count_parameters

FAMILIES = pytest.mark.parametrize("family", ["crate", "crate_alpha", "crate_mae"])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # White-Box Transformers via Sparse Rate Reduction, table 1: 6.09M, 13.12M, 22.80M, 77.64M.
        ("crate_tiny", 6_090_856),
        ("crate_small", 13_116_328),
        ("crate_base", 22_796_008),
        ("crate_large", 77_641_192),
        # The official files have 289 MB and 1.01 GB, four bytes a parameter.
        ("crate_alpha_base", 72_328_936),
        ("crate_alpha_large", 253_650_920),
    ],
)
def test_official_parameters(name: str, parameters: int) -> None:
    """By name and number, written down from model/crate.py and torch_inference/model/crate_alpha.py."""
    with torch.device("meta"):
        model = create_model(name)
    assert count_parameters(model) == (parameters, parameters)
    norm = ["norm.weight", "norm.bias"]
    if name.startswith("crate_alpha"):
        layer = [*(f"0.{n}" for n in norm), "0.fn.qkv.weight", "0.fn.to_out.0.weight"]
        layer += [*(f"1.{n}" for n in norm), "1.fn.D", "1.fn.D1"]
        embedding = ["conv1.weight", "conv1.bias"]
    else:
        layer = [*(f"0.{n}" for n in norm), "0.fn.qkv.weight", "0.fn.to_out.0.weight", "0.fn.to_out.0.bias"]
        layer += [*(f"1.{n}" for n in norm), "1.fn.weight"]
        embedding = [f"to_patch_embedding.{step}.{kind}" for step in (1, 2, 3) for kind in ("weight", "bias")]
    layers = [f"transformer.layers.{i}.{n}" for i in range(CLASSIFIERS[name].depth) for n in layer]
    head = [f"mlp_head.{step}.{kind}" for step in (0, 1) for kind in ("weight", "bias")]
    assert [*model.state_dict()] == ["pos_embedding", "cls_token", *embedding, *layers, *head]


def in_formulas(model: Classifier, p: dict[str, Tensor], images: Tensor) -> Tensor:
    """Logits of the family's formulas on float64 parameters, in the official order."""
    config, width = model.config, model.config.embed_dim
    heads, size, is_alpha = config.num_heads, config.patch_size, config.family == "crate_alpha"

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    patches = images.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    if config.family == "crate":
        x = norm(
            linear(norm(patches, "to_patch_embedding.1", 1e-5), "to_patch_embedding.2"), "to_patch_embedding.3", 1e-5
        )
    else:
        kernel, bias = (p[f"{'conv1' if is_alpha else 'patch_embed.proj'}.{kind}"] for kind in ("weight", "bias"))
        x = F.linear(patches, kernel.permute(0, 2, 3, 1).flatten(1), bias)
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + (p["decoder_pos_embed"] if config.family == "crate_mae" else p["pos_embedding"])
    eps, eta, lambd = 1e-6 if is_alpha else 1e-5, config.step_size, config.lambd
    for index in range(config.depth):
        name = f"blocks.{index}.layers.0" if config.family == "crate_mae" else f"transformer.layers.{index}"
        w = linear(norm(x, f"{name}.0.norm", eps), f"{name}.0.fn.qkv").unflatten(-1, (heads, -1)).transpose(1, 2)
        attention = (w @ w.mT * (width // heads) ** -0.5).softmax(-1)
        x = x + linear((attention @ w).transpose(1, 2).flatten(2), f"{name}.0.fn.to_out.0")
        n = norm(x, f"{name}.1.norm", eps)
        if is_alpha:
            first, second = p[f"{name}.1.fn.D"], p[f"{name}.1.fn.D1"]
            z = F.relu(eta * n @ first - eta * lambd)
            z = F.relu(z - eta * (z @ first.T - n) @ first - eta * lambd)
            x = x + z @ second.T
        else:
            u = p[f"{name}.1.fn.weight"]
            x = F.relu(n + eta * (n @ u - n @ u.T @ u) - eta * lambd)
    if config.family != "crate_mae":
        return linear(norm(x.mean(1) if config.pool == "mean" else x[:, 0], "mlp_head.0", 1e-5), "mlp_head.1")
    if config.pool == "mean":
        return linear(norm(x[:, 1:].mean(1), "fc_norm", 1e-6), "head")
    return linear(norm(x, "norm", 1e-6)[:, 0], "head")


def moved(model: Classifier) -> Classifier:
    """All parameters off what they are initialised as."""
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("pool", ["cls", "mean"])
@FAMILIES
def test_logits_and_gradients_are_those_of_the_formulas(family: str, pool: str) -> None:
    model, images, labels = (
        moved(small_classifier(family, pool=pool).double()),
        torch.randn(3, 3, 16, 16).double(),
        [0, 4, 2],
    )
    own = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    expected = in_formulas(model, own, images)
    F.cross_entropy(expected, torch.tensor(labels)).backward()
    with crate_kernels.use("composed"):
        logits = model(images)
        F.cross_entropy(logits, torch.tensor(labels)).backward()
    assert error(logits, expected) < 1e-12
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, own[name].grad) < 1e-12, name


@pytest.mark.parametrize("family", ["crate", "crate_alpha"])
def test_kernels_agree_with_the_formulas(family: str, device: str) -> None:
    pytest.importorskip("triton")
    model, images = moved(small_classifier(family, depth=1)).to(device), torch.randn(1, 3, 16, 16, device=device)
    own = {name: value.detach().double().requires_grad_() for name, value in model.state_dict().items()}
    expected = in_formulas(model, own, images.double())
    expected.square().sum().backward()
    with crate_kernels.use("triton"):
        logits = model(images)
        logits.square().sum().backward()
    assert error(logits, expected) < 1e-5
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, own[name].grad) < 1e-5, name


@FAMILIES
def test_other_sizes_have_resampled_positions(family: str) -> None:
    """Bicubic between the places of patches; the class token's stays, and a constant table is the same everywhere."""
    model = small_classifier(family)
    assert model(torch.randn(2, 3, 8, 24)).shape == (2, 5)
    if family == "crate_mae":
        return
    table = model.pos_embedding
    columns = torch.arange(4.0).repeat(4)  # patches at column 0 to 3 of their row
    table.data[0, 1:] = columns[:, None]
    wide = model._positions((4, 8))
    assert torch.equal(wide[:, 0], table[:, 0])
    found = wide[0, 1:, 0].view(4, 8)
    # Between the middles of old patches, where no edge is near: halfway steps of a plane.
    assert torch.allclose(found[:, 3:5], torch.tensor([1.25, 1.75]), atol=1e-6)
    table.data.fill_(0.5)
    assert torch.allclose(model._positions((2, 6)), torch.tensor(0.5))
    new = classifier_of(model, 3, img_size=(8, 24))
    assert new.pos_embedding.shape == (1, 13, 32) and new.config.image_shape == (8, 24)


@FAMILIES
def test_stochastic_depth(family: str) -> None:
    model, images = moved(small_classifier(family, depth=3)), torch.randn(64, 3, 8, 8)
    whole = model(images)
    model.set_drop_path(0.5)
    assert [layer.drop_path for layer in model.encoder_layers] == [0.0, 0.25, 0.5]
    assert torch.equal(model.eval()(images), whole), "in training only"
    layer = model.train().encoder_layers[2]
    branches = 2 if family == "crate_alpha" else 1
    x = torch.randn(1, 5, 32).expand(4000, -1, -1).clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one fused call a step, which nobody need be told
        out = layer(x)
    kinds, counts = out.detach().round(decimals=4).flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 2**branches, "each branch of each sample is there, twice, or not"
    assert (counts / 4000 - 0.5**branches).abs().max() < 0.05
    (attention, sparsify), n = (layer._steps()), x[:1].detach()
    for keeps in itertools.product((0.0, 2.0), repeat=branches):
        z = n + keeps[0] * attention[1](attention[0](n))
        step = sparsify[1](sparsify[0](z))
        expected = z + keeps[1] * step if family == "crate_alpha" else step
        assert min((kind.view(1, 5, 32) - expected).abs().max() for kind in kinds) < 2e-4
    out.square().sum().backward()
    assert x.grad.flatten(1).round(decimals=3).unique(dim=0).shape[0] == 2**branches
    recomputed = []
    for recompute in (False, True):
        torch.manual_seed(1)
        model.recompute = recompute
        recomputed.append(torch.autograd.grad(model(images).square().sum(), list(model.parameters())))
    assert max(map(error, *recomputed)) < 1e-5
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match=f"drop_path: expected at least 0 and below 1, got {rate}"):
            model.set_drop_path(rate)
    model.encoder_layers[0] = nn.Identity()
    with pytest.raises(ValueError, match="drop_path: layer 0 is of class Identity"):
        model.set_drop_path(0.1)


@FAMILIES
def test_a_head_is_reset_and_its_features_stay(family: str) -> None:
    model, images = moved(small_classifier(family)).double(), torch.randn(2, 3, 16, 16).double()
    tokens = model.forward_features(images)
    features = model.forward_head(tokens, pre_logits=True)
    assert features.shape == (2, model.num_features) and tokens.shape == (2, 17, model.num_features)
    model.reset_classifier(0)
    assert torch.equal(model(images), features) and model.num_classes == 0
    model.reset_classifier(7, "mean" if model.config.pool == "cls" else "cls")
    assert model(images).shape == (2, 7) and model(images).dtype == torch.float64
    assert model.num_classes == model.config.num_classes == 7
    with pytest.raises(ValueError, match="pool: expected one of cls, mean, got 'max'"):
        model.reset_classifier(7, "max")
    assert model.config.pool in ("cls", "mean")


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_classifier_of_a_trained_encoder(pool: str) -> None:
    trained = small_model(depth=2, lambd=0.3).eval()
    moved(trained)
    new, images = classifier_of(trained, 5, pool=pool), torch.randn(2, 3, 8, 24)
    assert (new.config.family, new.config.lambd, new.config.pool, new.training) == ("crate_mae", 0.3, pool, False)
    tokens = new.forward_features(images)
    if pool == "cls":
        assert torch.equal(tokens, trained.encode(images))
    else:
        assert torch.equal(trained.norm(tokens), trained.encode(images)) and not hasattr(new, "norm")
    new.blocks[0].layers[0][1].fn.weight.data.zero_()
    assert trained.blocks[0].layers[0][1].fn.weight.any(), "weights are copied"
    other = classifier_of(new, 3)
    assert other.num_classes == 3 and other.config.pool == pool
    assert torch.equal(other.forward_features(images), new.forward_features(images))
    with pytest.raises(TypeError, match="model: expected a CrateMAE or a Classifier, got Linear"):
        classifier_of(nn.Linear(2, 2), 3)


@FAMILIES
def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model, images = moved(small_classifier(family, img_size=(16, 24))), torch.randn(2, 3, 16, 24)
    save_model(torch.nn.DataParallel(model), tmp_path, mean=[0.5] * 3, std=[0.2] * 3)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and torch.equal(loaded(images), model(images))
    assert load_transform(tmp_path)(Image.new("RGB", (50, 40), "red")).shape == (3, 16, 24)
    for refused in (lambda: model_of_run(tmp_path), lambda: load_weights(small_model(), tmp_path)):
        with pytest.raises(ValueError, match=rf"expected a CRATE-MAE, found a classifier \(family {family}\)"):
            refused()


def test_official_checkpoints_load_strictly(tmp_path: Path) -> None:
    model, file = small_classifier("crate"), tmp_path / "checkpoint.pth"
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "arch": "CRATE_tiny", "state_dict": wrapped}, file)
    loaded = load_model(file, "crate_tiny", **SMALL_CLASSIFIER)
    assert (loaded.config.lambd, loaded.config.step_size) == (0.1, 0.1)
    assert all(value.equal(loaded.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="head is for 5 classes, and num_classes is 10: load it with num_classes=5"):
        load_model(file, "crate_tiny", **SMALL_CLASSIFIER | {"num_classes": 10})
    with pytest.raises(RuntimeError, match=r"lacks conv1.bias .* has unknown to_patch_embedding"):
        load_model(file, "crate_alpha_base", **SMALL_CLASSIFIER)
    del wrapped["module.cls_token"]
    torch.save(wrapped, file)
    with pytest.raises(RuntimeError, match="lacks cls_token"):
        load_model(file, "crate_tiny", **SMALL_CLASSIFIER)


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        ({"num_classes": 2**17}, ValueError, "num_classes: expected at least 0 and at most 65536, got 131072"),
        ({"img_size": 18}, ValueError, "divisible by patch_size 4, got 18 x 18"),
        ({"family": "vit"}, ValueError, "family: expected one of crate, crate_alpha, crate_mae, got 'vit'"),
        ({"pool": "max"}, ValueError, "pool: expected one of cls, mean, got 'max'"),
        ({"num_classes": -1}, ValueError, "num_classes: expected at least 0"),
        ({"num_classes": "ten"}, TypeError, "num_classes: expected an integer, got 'ten'"),
        ({"decoder_depth": 2}, TypeError, "decoder_depth: no such field of ClassifierConfig"),
        ({"num_heads": 5}, ValueError, "num_heads: expected a divisor of embed_dim 32, got 5"),
        ({"family": "crate_mae", "embed_dim": 6}, ValueError, "embed_dim: expected a multiple of 4"),
    ],
)
def test_bad_settings_say_what_was_expected(overrides: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        create_model("crate_tiny", **SMALL_CLASSIFIER | overrides)


def test_compiles_whole() -> None:
    torch.compiler.reset()
    model, images = small_classifier("crate_alpha", depth=1), torch.randn(2, 3, 8, 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert error(compiled(images), model(images)) < 1e-6


def test_positions_of_one_column_are_those_of_one_row_turned() -> None:
    """By ``interpolate`` alone they are not: PyTorch makes something else of a single column."""
    model = small_classifier("crate")
    turned = small_classifier("crate")
    places = model.pos_embedding.data[0, 1:].view(4, 4, -1)
    turned.pos_embedding.data[0] = torch.cat([model.pos_embedding.data[0, :1], places.transpose(0, 1).flatten(0, 1)])
    assert torch.allclose(turned._positions((6, 1))[0, 1:], model._positions((1, 6))[0, 1:], atol=1e-6)
