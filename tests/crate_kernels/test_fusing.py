"""No edit of a model is silently passed by: fused or not, it computes what the official steps would."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random

import pytest
import torch
from edits import EDITS, NothingFits
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from official import Alpha, Model, officially
from support import error, small_model
from torch import Tensor, nn

import crate_kernels
from crate_kernels import accelerate

OFFICIAL: dict[str, Callable[[], nn.Module]] = {
    "CRATE-MAE": lambda: Model(dim=16, heads=2),
    "CRATE-alpha": lambda: Alpha(decouple=True),
}
WHOLE = {"crate_mae": lambda: small_model(embed_dim=16, img_size=12)}
MODELS = OFFICIAL | WHOLE
IMAGES, NOISE, TOKENS = torch.randn(2, 3, 12, 12), torch.rand(2, 9), torch.randn(2, 20, 16)


def edited(model: nn.Module, names: list[str], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    random = Random(seed)
    for name in names:
        model = EDITS[name](model, random) or model
    return model


def run(model: nn.Module) -> dict[str, Tensor]:
    """Output and all gradients by name, that of the input included."""
    own = dict(model.named_parameters())
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in own.values()) else torch.float32
    is_whole = hasattr(model, "patch_embed")
    x = (IMAGES if is_whole else TOKENS).to(dtype, copy=True).requires_grad_()
    out = model(x, noise=NOISE).pred if is_whole else model(x)
    grads: dict[str, Tensor] = {}
    if out.requires_grad:
        out.square().sum().backward()
        grads = {name: p.grad for name, p in {**own, "input": x}.items() if p.grad is not None}
    return {"output": out.detach(), **grads}


def outcome(build: Callable[[], nn.Module]) -> dict[str, Tensor] | Exception:
    try:
        return run(build())
    except Exception as problem:
        return problem


def compare(kind: str, names: list[str], seed: int, swap_first: bool, dtype: torch.dtype, margin: float) -> bool:
    """Whether the model has what these edits want; if so, edited and fused it agrees with itself edited and unfused."""
    torch.manual_seed(seed)
    original = MODELS[kind]().to(dtype)
    expected = outcome(lambda: edited(officially(copy.deepcopy(original)), names, seed))
    if isinstance(expected, NothingFits):
        return False

    def fused() -> nn.Module:
        model = copy.deepcopy(original)
        if kind in OFFICIAL and swap_first:
            assert not accelerate(model).left_alone
        model = edited(model, names, seed)
        if kind in OFFICIAL and not swap_first:
            accelerate(model)
        return model

    found = outcome(fused)
    if isinstance(expected, Exception):
        assert isinstance(found, Exception), f"{kind} ran, though unfused it raises {expected!r}"
        return True
    if isinstance(found, Exception):
        raise found
    for name, value in expected.items():
        other = found.get(name, torch.zeros_like(value))
        bound = margin * torch.finfo(value.dtype).eps * value.norm()
        assert (other - value).norm() <= bound, f"{name} of {kind}, {names}, {seed}: off by {error(other, value):.1e}"
    assert not [name for name in found.keys() - expected.keys() if found[name].any()]
    return True


pytestmark = pytest.mark.filterwarnings("ignore:.*modules are called one by one:UserWarning")


@pytest.mark.parametrize("name", EDITS)
def test_every_edit(name: str) -> None:
    """By itself, on all models: with float64's rounding, nothing hides."""
    with crate_kernels.use("composed"):
        applied = [
            compare(kind, [name], seed, swap_first, torch.float64, 2000)
            for kind in MODELS
            for seed in range(3)
            for swap_first in ((True, False) if kind in OFFICIAL else (True,))
        ]
    assert any(applied)


DRAWS = given(
    kind=st.sampled_from(list(MODELS)),
    names=st.lists(st.sampled_from(list(EDITS)), min_size=2, max_size=5),
    number=st.integers(0, 2**31),
    swap_first=st.booleans(),
)
# 300 draws each, in parts that can run side by side.
PARTS, OF_A_PART = range(4), settings(max_examples=75, deadline=None, database=None, phases=[Phase.generate])


@pytest.mark.parametrize("part", PARTS)
def test_drawn_edits(part: int) -> None:
    @seed(part)
    @OF_A_PART
    @DRAWS
    def draw(kind: str, names: list[str], number: int, swap_first: bool) -> None:
        with crate_kernels.use("composed"):
            compare(kind, names, number, swap_first, torch.float64, 1e5)

    draw()


@pytest.mark.parametrize("part", PARTS)
def test_drawn_edits_on_triton(part: int) -> None:
    @seed(part)
    @OF_A_PART
    @DRAWS
    def draw(kind: str, names: list[str], number: int, swap_first: bool) -> None:
        with crate_kernels.use("triton"):
            compare(kind, names, number, swap_first, torch.float32, 1e3)

    draw()
