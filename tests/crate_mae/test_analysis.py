"""The white-box view: quantities against an independent computation in float64, and what is seen of models against their own."""

from __future__ import annotations

import threading
import warnings
from functools import partial
from itertools import pairwise

import numpy as np
import official
import pytest
import torch
from golden import Golden
from independent import OfficialInNumpy, rate
from support import small_classifier
from torch import Tensor

import crate_mae
from crate_kernels import accelerate
from crate_mae import analysis
from crate_mae.data import IMAGENET_MEAN, IMAGENET_STD, Normalization

NORMALIZATION = Normalization(IMAGENET_MEAN, IMAGENET_STD, 3)
SMALL = dict(decoder_depth=1, embed_dim=32, num_heads=2, decoder_num_heads=2, img_size=32)


@pytest.mark.parametrize("which", ["golden", "random"])
def test_every_measure_is_that_of_an_independent_computation(which: str, request: pytest.FixtureRequest) -> None:
    """Of the golden model on its golden images, and of one that needs no files, to 1e-6; mean and spread over the two."""
    if which == "golden":
        golden = request.getfixturevalue("golden")
        model, images = golden.model().double(), golden.tensors["input/images"].double()
    else:
        torch.manual_seed(0)
        model = crate_mae.create_model("crate_mae_tiny", depth=2, **SMALL | {"decoder_depth": 2}).double()
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    independent = OfficialInNumpy(model)
    for image in images.numpy():
        independent.forward(image)
    found = analysis.analyze(model, [images])
    assert found.images == 2
    for stack, layers in independent.seen.items():
        depth, compared = len(layers) // 2, found.stacks[stack]
        assert {*layers[0]} | {"attention_distance"} == {name for name in compared if not name.endswith("by_head")}
        for name in layers[0]:
            values = np.array([[layers[image * depth + layer][name] for layer in range(depth)] for image in range(2)])
            for measured, expected in zip(compared[name], (values.mean(0), values.std(0, ddof=1)), strict=True):
                np.testing.assert_allclose(measured, expected, rtol=1e-6, atol=1e-6, err_msg=f"{stack} {name}")
        by_head = np.sum(compared["coding_rate_after_by_head"].mean, axis=-1)
        np.testing.assert_allclose(by_head, compared["coding_rate_after"].mean, rtol=1e-12)


def test_the_golden_attention_map_and_keys(golden: Golden) -> None:
    layers = analysis.trace(golden.model(), golden.tensors["input/images"])
    last = next(layer for layer in layers if (layer.stack, layer.index) == ("encoder", 1))
    keys = last.projected.transpose(1, 2).flatten(2)
    for found, name in ((last.attention, "attention_last"), (keys, "features_key_last")):
        torch.testing.assert_close(found, golden.tensors[f"output/{name}"], atol=1e-5, rtol=0)


DEGENERATE = {
    "one token": torch.randn(2, 1, 8),
    "equal tokens": torch.randn(2, 1, 8).expand(2, 5, 8),
    "zeros": torch.zeros(2, 5, 8),
    "no tokens": torch.zeros(2, 0, 8),
    "1e4": 1e4 * torch.randn(2, 197, 64),
    "1e-30": 1e-30 * torch.randn(2, 7, 64),
    "float16": (1e4 * torch.randn(2, 197, 64)).half(),
    "1e200 beside 1e-200": torch.tensor([[[1e200, 0.0], [0.0, 1e-200]]] * 2, dtype=torch.float64),
}


@pytest.mark.parametrize("tokens", DEGENERATE.values(), ids=DEGENERATE)
def test_never_nan(tokens: Tensor) -> None:
    values = [
        analysis.coding_rate(tokens),
        analysis.coding_rate(tokens, normalize=bool((tokens > 1e100).any())),
        analysis.effective_rank(tokens),
        analysis.relative_update(tokens, tokens),
        analysis.sparse_rate_reduction(tokens, tokens[:, None], lambd=0.1),
    ]
    for value in values:
        assert value.shape == (2,) and value.dtype == torch.float64 and value.isfinite().all()
    rank = 0 if not tokens.any() else min(tokens.shape[1:])
    assert ((values[2] >= min(rank, 1) - 1e-9) & (values[2] <= rank + 1e-9)).all()


def test_what_degenerate_tokens_have() -> None:
    alike = torch.randn(1, 1, 64).expand(1, 197, 64)
    # n equal unit tokens: one eigenvalue, n, times d / (n eps).
    torch.testing.assert_close(analysis.coding_rate(alike), torch.tensor([np.log1p(6400) / 2], dtype=torch.float64))
    assert analysis.effective_rank(alike).item() == pytest.approx(1, abs=1e-12)
    assert analysis.effective_rank(torch.eye(5)).item() == pytest.approx(5)
    large = 1e9 * torch.randn(40, 40, dtype=torch.float64)  # where 1 is lost beside the products
    expected = np.linalg.slogdet(large.numpy() / 0.1)[1] + 20 * np.log(40 / 40)
    assert analysis.coding_rate(large, normalize=False).item() == pytest.approx(expected, rel=1e-6)
    assert [
        analysis.relative_update(torch.zeros(2, 2), after).item() for after in (torch.eye(2), torch.zeros(2, 2))
    ] == [1, 0]
    assert analysis.zero_fraction(torch.zeros(2, 0, 8)).tolist() == [0, 0]
    huge = torch.full((3, 2), 1.7e308, dtype=torch.float64)
    assert analysis.relative_update(huge, -huge).item() == pytest.approx(2)
    with pytest.raises(ValueError, match=r"after: expected the shape of before, \(3, 2\), got \(2, 2\)"):
        analysis.relative_update(huge, huge[:2])


@pytest.mark.parametrize("scale", [1, 1e-30, 1e200])
@pytest.mark.parametrize("eps", [0.01, 0.5])
def test_the_objective_is_that_of_the_papers_for_tokens_of_any_norm(scale: float, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 7, 8, dtype=torch.float64, generator=generator).relu()
    weight = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    found = analysis.sparse_rate_reduction(
        scale * tokens, analysis.projections(scale * tokens, weight, 4), lambd=0.3, eps=eps
    )
    for value, z in zip(found.tolist(), tokens.numpy(), strict=True):
        of_heads = sum(rate(w, eps) for w in np.split(z @ weight.numpy().T, 4, axis=-1))
        assert value == pytest.approx(rate(z, eps) - of_heads - 0.3 * np.count_nonzero(z), rel=1e-9)


@pytest.mark.parametrize(("size", "eps"), [(1.0, 1e-14), (1e4, 0.01), (1e7, 0.01), (1e200, 0.01)])
def test_equal_tokens_of_any_size_have_one_eigenvalue(size: float, eps: float) -> None:
    token = torch.randn(1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = (size * token / token.norm()).expand(197, 64)
    expected = np.log(np.hypot(1, size * np.sqrt(64 / eps)))
    assert analysis.coding_rate(tokens, normalize=False, eps=eps).item() == pytest.approx(expected, rel=1e-6)


def test_coherence_of_known_subspaces() -> None:
    plane, turned = torch.eye(6)[:2], torch.tensor([[1.0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]])  # 45 degrees, 90 degrees
    found = analysis.subspace_coherence(torch.cat([plane, 3 * plane, turned, torch.zeros(2, 6)]), 4)
    expected = [[1, 1, 0.25, 0], [1, 1, 0.25, 0], [0.25, 0.25, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(found, expected, atol=1e-7)
    line = torch.tensor([[1.0, 0, 0, 0, 0, 0]] * 2)  # in the plane: of dimension 1
    assert analysis.mean_coherence(torch.cat([plane, line]), 2) == pytest.approx(1)
    assert analysis.mean_coherence(torch.randn(8, 8), 1) == 0
    assert analysis.mean_coherence(torch.cat([plane, turned]), 2) == pytest.approx(0.25)


def test_attention_entropy_distance_and_segmentation() -> None:
    alike, own = torch.full((1, 7, 7), 1 / 7), torch.eye(7)[None]
    np.testing.assert_allclose(analysis.attention_entropy(torch.cat([alike, own])), [np.log(7), 0], atol=1e-7)
    corners = np.array([(row, column) for row in range(2) for column in range(3)], float)
    mean = np.linalg.norm(corners[:, None] - corners, axis=-1).mean()
    found = analysis.attention_distance(torch.cat([alike, own]), (2, 3), 16)
    np.testing.assert_allclose(found, [16 * mean, 0], rtol=1e-6)
    uneven = torch.rand(7, 7, generator=torch.Generator().manual_seed(0)).double()
    among = uneven[1:, 1:].numpy() / uneven[1:, 1:].sum(-1, keepdim=True).numpy()
    expected = (among * np.linalg.norm(corners[:, None] - corners, axis=-1)).sum(-1).mean()
    assert analysis.attention_distance(uneven, (2, 3)).item() == pytest.approx(expected)
    only_class = torch.zeros(1, 7, 7)
    only_class[..., 0] = 1
    assert analysis.attention_distance(only_class, (2, 3)).item() == 0
    with pytest.raises(ValueError, match="grid: expected at most the 7 tokens"):
        analysis.attention_distance(alike, (2, 4))
    for of_scores in (analysis.attention_entropy, lambda scores: analysis.attention_distance(scores, (2, 3))):
        with pytest.raises(ValueError, match="attention: expected no negative values, got -1"):
            of_scores(-own)
    map_ = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])
    assert analysis.most_attended(map_, 0.6).tolist() == [False, True, False, True, False]
    assert analysis.most_attended(map_, 1.0).tolist() == [True, True, False, True, True]
    assert analysis.most_attended(torch.zeros(3)).sum() == 1


def test_principal_components_do_not_depend_on_order_or_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(300, 6, generator=generator) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1]) + 7
    first = analysis.PrincipalComponents.of(tokens)
    other = analysis.PrincipalComponents.of(4 * tokens[torch.randperm(300, generator=generator)].view(10, 30, 6))
    torch.testing.assert_close(other.directions, first.directions)
    torch.testing.assert_close(other.colours(4 * tokens), first.colours(tokens))
    assert all(torch.equal(a, b) for a, b in zip(first, analysis.PrincipalComponents.of(tokens), strict=True))
    _, _, right = np.linalg.svd(tokens.numpy() - tokens.numpy().mean(0))
    np.testing.assert_allclose(first.directions.abs().numpy(), np.abs(right[:3]), atol=1e-5)
    assert (first.directions.gather(1, first.directions.abs().argmax(1, keepdim=True)) > 0).all()
    assert ((first.colours(1e6 * tokens) >= 0) & (first.colours(1e6 * tokens) <= 1)).all()
    for dull in (torch.ones(4, 6), torch.zeros(1, 6), torch.randn(5, 2)):
        colours = analysis.PrincipalComponents.of(dull).colours(dull)
        assert colours.shape == (len(dull), 3) and (colours[:, 2] == 0.5).all()


def layers_of_ours(family: str) -> tuple[torch.nn.Module, Tensor]:
    layers = small_classifier(family, embed_dim=16).encoder_layers
    return torch.nn.Sequential(*layers), torch.randn(2, 7, 16)


FAMILY = {
    "CRATE-MAE": lambda: (official.Model(), torch.randn(2, 7, 16)),
    "CRATE-alpha": lambda: (official.Alpha(True), torch.randn(2, 7, 16)),
    **{family: partial(layers_of_ours, family) for family in ("crate", "crate_alpha")},
}


def test_adapters_count() -> None:
    class Adapter(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base, self.down, self.up = base, torch.nn.Linear(16, 2, bias=False), torch.nn.Linear(2, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    model, x = official.Model().double(), torch.randn(2, 7, 16, dtype=torch.float64)
    attention = model.encoder[0][0].fn
    plain = analysis.analyze(model, [x]).stacks["encoder"]["coherence"].mean
    attention.qkv = Adapter(attention.qkv).double()
    effective = attention.qkv.base.weight + attention.qkv.up.weight @ attention.qkv.down.weight
    found = analysis.analyze(model, [x]).stacks["encoder"]["coherence"].mean
    assert found[0] == pytest.approx(analysis.mean_coherence(effective, 2), rel=1e-9)
    assert found[0] != pytest.approx(plain[0], rel=1e-6) and found[1] == plain[1]


@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_accelerated_models_show_what_they_did(make) -> None:
    torch.manual_seed(0)
    model, x = make()
    expected = analysis.trace(model, x)
    expected_numbers = analysis.analyze(model, [x])
    output = model(x)
    assert expected[0].lambd == (0.5 if isinstance(model, official.Model) else 0.1)
    torch.testing.assert_close(expected[-1].output, output)  # the whole model's is its last layer's
    accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that hooks unfuse is no news to who traces
        found = analysis.trace(model, x)
    for layer, reference in zip(found, expected, strict=True):
        assert (layer.name, layer.stack, layer.index) == (reference.name, reference.stack, reference.index)
        for value, wanted in zip(layer, reference, strict=True):
            if isinstance(wanted, Tensor):
                torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
    numbers = analysis.analyze(model, [x])
    for stack, measures in expected_numbers.stacks.items():
        for name, measured in measures.items():
            np.testing.assert_allclose(numbers.stacks[stack][name].mean, measured.mean, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model(x), output, atol=1e-5, rtol=1e-5)


def test_a_trace_leaves_the_model_as_it_was_and_says_what_it_cannot_see() -> None:
    model = crate_mae.create_model("crate_mae_tiny", depth=1, **SMALL)
    model.blocks.eval()
    modes: list[bool] = []
    model.decoder_pred.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    analysis.trace(model, torch.randn(2, 3, 32, 32))
    assert modes == [False]
    with pytest.raises(ValueError, match="images: expected"):
        analysis.trace(model, torch.randn(2, 3, 31, 32))
    assert model.training and not model.blocks.training
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="model: expected layers of two steps"):
        analysis.trace(torch.nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.raises(ValueError, match="batches: expected one image"):
        analysis.analyze(model, [])
    with torch.no_grad():
        model.blocks[0].layers[0][1].fn.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"blocks.0.layers.0: tokens: expected finite values"):
        analysis.analyze(model, [torch.randn(1, 3, 32, 32)])


class OfficialCall(torch.nn.Module):
    """Called as the official CRATE-MAE is, which draws its noise itself."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75):
        return self.inner(imgs, mask_ratio=mask_ratio)


WRAPPERS = [torch.compile, torch.nn.DataParallel, torch.optim.swa_utils.AveragedModel, OfficialCall]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_whole_images_are_seen_by_wrapped_and_official_models_too(wrap) -> None:
    model, images = crate_mae.create_model("crate_mae_tiny", depth=1, **SMALL), torch.randn(2, 3, 32, 32)
    wrapped = wrap(model)
    for found, expected in zip(analysis.trace(wrapped, images), analysis.trace(model, images), strict=True):
        torch.testing.assert_close(found.output, expected.output)
    numbers = analysis.analyze(wrapped, [images[:0], images], grid=(2, 2), patch_size=16)
    assert numbers.stacks == analysis.analyze(model, [images]).stacks


def test_what_is_seen_is_of_this_thread_under_autocast_and_once_a_call() -> None:
    torch.manual_seed(0)
    model, x = official.Model(), torch.randn(2, 7, 16)
    seen: list[analysis.LayerTrace] = []
    with analysis.traced(model, seen.append):
        other = threading.Thread(target=model, args=(x,))
        other.start()
        other.join()
    assert not seen
    with torch.autocast("cpu", torch.bfloat16):
        layers = analysis.trace(model, x)
    for layer, exact in zip(layers, analysis.trace(model, x), strict=True):
        torch.testing.assert_close(layer.projected_after.float(), exact.projected_after, atol=0.1, rtol=0.1)
    for before, layer in pairwise(layers):
        torch.testing.assert_close(layer.tokens, before.output)
    assert [layer.lambd is None for layer in layers] == [layer.stack == "decoder" for layer in layers]
    layers[0].module.is_causal = True
    assert not layers[0].attention.triu(1).any() and layers[0].attention[..., 0, 0].eq(1).all()
    layers[1].module.window = 2
    place = torch.arange(7)
    assert not layers[1].attention[..., (place - place[:, None]).abs() > 2].any()
    layers[1].module.scale = torch.ones(2, 1, 1)
    with pytest.raises(ValueError, match="scale: expected one number, got one for each of 2 heads"):
        print(layers[1].scale)
    with pytest.raises(ValueError, match=r"each layer once in a call, got 0.* again"):
        analysis.analyze(torch.nn.Sequential(model, model), [x])


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ([], "images: expected one or more"),
        ([torch.rand(3, 32, 32)], "images: expected uint8 .*, pixels as stored, got torch.float32"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"images: expected uint8 .* got torch.uint8 \(32, 32\)"),
        ([torch.zeros(3, 31, 32, dtype=torch.uint8)], "images: expected height and width divisible"),
    ],
)
def test_what_is_no_image_to_view_is_refused(images, says) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        analysis.view(crate_mae.create_model("crate_mae_tiny", depth=1, **SMALL), images, NORMALIZATION)
    windowed = crate_mae.create_model("crate_mae_tiny", depth=1, **SMALL)
    windowed.blocks[0].layers[0][0].fn.window = 3
    with pytest.raises(ValueError, match=r"model: blocks.0.layers.0.0.fn: its attention has a window, .* trace shows"):
        analysis.view(windowed, images, NORMALIZATION)
    with pytest.raises(TypeError, match="model: expected a CrateMAE, got Model; trace shows"):
        analysis.view(official.Model(), images, NORMALIZATION)


def test_views_are_of_the_models_own_numbers_and_of_each_images_size() -> None:
    torch.manual_seed(0)
    model = crate_mae.create_model("crate_mae_tiny", depth=2, **SMALL)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((32, 32), (16, 48))]
    views = analysis.view(model, images, NORMALIZATION)
    for image, view in zip(images, views, strict=True):
        standardised = NORMALIZATION(image[None])
        torch.testing.assert_close(view.layers[1].attention, model.attention_map(standardised, 1)[0].detach())
        layers = analysis.trace(model, standardised)
        assert len(layers) == len(view.layers) == 3
        for seen, layer in zip(view.layers, layers, strict=True):
            assert seen.zeros.shape == view.grid == (image.shape[1] // 16, image.shape[2] // 16)
            torch.testing.assert_close(seen.zeros.flatten(), (layer.sparsified[0, 1:] == 0).float().mean(-1))
            change = (layer.compressed - layer.attended)[0, 1:].norm(dim=-1) / layer.attended[0, 1:].norm(dim=-1)
            torch.testing.assert_close(seen.compression.flatten(), change)
            after = analysis.coding_rate(layer.projected_after).sum().item()
            assert seen.coding_rates[1] == pytest.approx(after, rel=1e-5)
            assert seen.token_colours.shape == (*view.grid, 3) and seen.token_colours.dtype == torch.uint8
