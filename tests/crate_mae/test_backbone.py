"""What all models share: the tokens of any layer, on images of any size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import small_classifier, small_model
from torch import Tensor, nn

from crate_mae.backbone import Backbone

MODELS: dict[str, Callable[..., Backbone]] = {
    "CRATE-MAE": small_model,
    **{family: partial(small_classifier, family) for family in ("crate", "crate_alpha", "crate_mae")},
}
of_all = pytest.mark.parametrize("kind", MODELS)


def by_hooks(model: Backbone, images: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *args: seen.append(args[-1])) for block in model.encoder_layers]
    model.forward_features(images)
    for hook in hooks:
        hook.remove()
    return seen


@of_all
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"stream": "16bit"}], ids=str)
def test_intermediates_are_what_hooks_see(kind: str, options: dict[str, Any]) -> None:
    model, images = MODELS[kind](depth=3), torch.randn(2, 3, 8, 24)  # configured for 16 x 16
    model.encoder_layers[1] = nn.Sequential(model.encoder_layers[1])  # a wrapper, which takes tokens alone
    vars(model).update(options)
    with torch.autocast("cpu", torch.bfloat16, enabled="stream" in options):
        tokens, every = model.forward_features(images), by_hooks(model, images)
        for indices, layers in ((None, (0, 1, 2)), (2, (1, 2)), ([-1, 0], (0, 2)), ((1, 1), (1,))):
            seen = [every[layer] for layer in layers]
            last, found = model.forward_intermediates(images, indices, output_fmt="NLC", return_prefix_tokens=True)
            assert torch.equal(last, tokens)
            assert all(torch.equal(torch.cat(both[::-1], 1), x) for both, x in zip(found, seen, strict=True))
            maps = model.forward_intermediates(images, indices, intermediates_only=True, norm=True)
            for chosen, x in zip(maps, seen, strict=True):
                assert chosen.shape == (2, model.num_features, 2, 6)
                assert torch.equal(chosen.flatten(2).mT, model.last_norm(x)[:, 1:])


@of_all
def test_stopping_early_runs_no_layer_behind_the_last_chosen(kind: str) -> None:
    model, images = MODELS[kind](depth=3), torch.randn(1, 3, 16, 16)
    (expected,) = model.forward_intermediates(images, [1], intermediates_only=True)
    model.encoder_layers[2].forward = None  # it cannot be called
    last, (found,) = model.forward_intermediates(images, [1], stop_early=True)
    assert torch.equal(found, expected) and last.shape == (1, 17, model.num_features)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"indices": 3}, ValueError, "indices: expected 1 to 2, the number of layers, got 3"),
        ({"indices": 0}, ValueError, "indices: expected 1 to 2, the number of layers, got 0"),
        ({"indices": []}, ValueError, r"indices: expected numbers of layers, got \[\]"),
        ({"indices": [0, 2]}, IndexError, "indices: expected -2 to 1, got 2"),
        ({"output_fmt": "NHWC"}, ValueError, "output_fmt: expected 'NCHW' or 'NLC', got 'NHWC'"),
    ],
)
def test_what_cannot_be_chosen(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        small_model(depth=2).forward_intermediates(torch.randn(1, 3, 16, 16), **arguments)
