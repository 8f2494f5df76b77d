"""No edit of a model is silently passed by: fused or not, it computes what the official steps would."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from random import Random

import pytest
import torch
import torch.nn.functional as F
from edits import EDITS, LayerNormPlusOne, LoRA, NothingFits, is_attention, replace
from hypothesis import Phase, assume, given, seed, settings
from hypothesis import strategies as st
from official import Alpha, Model, officially
from support import error, small_classifier, small_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import crate_kernels
from crate_kernels import ISTA, MSSA, DecoderStep, OvercompleteISTA, accelerate, fusing

OFFICIAL: dict[str, Callable[[], nn.Module]] = {
    "CRATE-MAE": lambda: Model(dim=16, heads=2),
    "CRATE-alpha": lambda: Alpha(decouple=True),
}
WHOLE = {"crate_mae": lambda: small_model(embed_dim=16, img_size=12)}
MODELS = OFFICIAL | WHOLE
CLASSIFIERS = {
    family: functools.partial(small_classifier, family, embed_dim=16, img_size=12, depth=1)
    for family in ("crate", "crate_alpha")
}
REFUSED = "the triton implementation was forced, but its kernels take no"  # tensors of other classes
IMAGES, NOISE, TOKENS = torch.randn(2, 3, 12, 12), torch.rand(2, 9), torch.randn(2, 20, 16)


def edited(model: nn.Module, names: Sequence[str], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    random = Random(seed)
    for name in names:
        model = EDITS[name](model, random) or model
    return model


def run(model: nn.Module) -> dict[str, Tensor]:
    """Output and all gradients by name, that of the input included."""
    own = dict(model.named_parameters())
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in own.values()) else torch.float32
    is_mae, is_whole = hasattr(model, "mask_token"), hasattr(model, "cls_token")
    x = (IMAGES if is_whole else TOKENS).to(dtype, copy=True).requires_grad_()
    out = model(x, noise=NOISE).pred if is_mae else model(x)
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


@functools.cache
def originals(kind: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A model, and the same accelerated if it is official; both to be copied."""
    torch.manual_seed(0)
    original = (MODELS | CLASSIFIERS)[kind]().to(dtype)
    accelerated = copy.deepcopy(original)
    if kind in OFFICIAL:
        assert not accelerate(accelerated).left_alone
    return original, accelerated


def compare(kind: str, names: Sequence[str], seed: int, swap_first: bool, dtype: torch.dtype, margin: float) -> str:
    """Edited and fused the model agrees with itself edited and unfused, which "ran" or "raised"; or it is "refused" by name.

    "" if the model has nothing that fits the edits.
    """
    original, accelerated = originals(kind, dtype)
    with crate_kernels.use("reference"):  # where crate_mae's model embeds its patches as the official one does, too
        expected = outcome(lambda: edited(officially(copy.deepcopy(original)), names, seed))
        truth = expected
        if dtype != torch.float64:
            truth = outcome(lambda: edited(officially(copy.deepcopy(original).double()), names, seed))
    if isinstance(expected, NothingFits):
        return ""

    def fused() -> nn.Module:
        model = edited(copy.deepcopy(accelerated if swap_first else original), names, seed)
        if kind in OFFICIAL and not swap_first:
            accelerate(model)
        return model

    found = outcome(fused)
    if isinstance(expected, Exception):
        assert isinstance(found, Exception), f"{kind} ran, though unfused it raises {expected!r}"
        return "raised"
    if isinstance(found, RuntimeError) and REFUSED in str(found):
        return "refused"
    if isinstance(found, Exception):
        raise found
    for name, value in expected.items():
        other = found.get(name, torch.zeros_like(value))
        # Of a sum that nearly cancels, as one number's gradient may, the unfused model has lost as much itself.
        lost = (value - truth[name]).norm() if isinstance(truth, dict) else 0.0
        bound = margin * torch.finfo(value.dtype).eps * value.norm() + 4 * lost
        assert (other - value).norm() <= bound, f"{name} of {kind}, {names}, {seed}: off by {error(other, value):.1e}"
    assert not [name for name in found.keys() - expected.keys() if found[name].any()]
    return "ran"


pytestmark = pytest.mark.filterwarnings("ignore:.*modules are called one by one:UserWarning")


@pytest.mark.parametrize("name", EDITS)
def test_every_edit(name: str) -> None:
    """By itself, on all models: with float64's rounding, nothing hides."""
    with crate_kernels.use("composed"):
        applied = [
            compare(kind, [name], seed, swap_first, torch.float64, 2000)
            for kind in MODELS | CLASSIFIERS
            for seed in range(2 if kind in MODELS else 1)
            for swap_first in ((True, False) if kind in OFFICIAL else (True,))
        ]
    assert any(applied)


@pytest.mark.parametrize(
    "names",
    [
        ("weight norm", "other values loaded"),
        ("pruned", "other values loaded"),
        ("learned step size", "learned lambda"),
        ("adapter", "wrapped block", "some frozen"),
    ],
    ids=" then ".join,
)
@pytest.mark.parametrize("implementation", ["composed", "triton"])
def test_edits_that_were_once_passed_by(implementation: str, names: tuple[str, ...]) -> None:
    dtype, numbers = (torch.float64, range(2)) if implementation == "composed" else (torch.float32, range(1))
    with crate_kernels.use(implementation):
        assert all(compare(kind, names, number, True, dtype, 1e4) == "ran" for kind in MODELS for number in numbers)


def pair(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A model that is fused, and the same unfused."""
    model = MODELS[kind]().to(dtype)
    unfused = officially(copy.deepcopy(model))
    if kind in OFFICIAL:
        assert not accelerate(model).left_alone
    return model, unfused


def same(found: nn.Module, expected: nn.Module) -> None:
    found_values, expected_values = run(found), run(expected)
    assert found_values.keys() == expected_values.keys()
    assert max(error(found_values[name], value) for name, value in expected_values.items()) < 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_learn_and_merge(kind: str) -> None:
    model, unfused = (with_adapters(each) for each in pair(kind))
    same(model, unfused)
    adapters = {name: p.grad for name, p in model.named_parameters() if "lora" in name}
    assert len(adapters) >= 4 and all(grad is not None and grad.any() for grad in adapters.values())
    out = run(model)["output"]
    for module in list(model.modules()):
        if isinstance(module, LoRA):
            replace(model, module, module.merged())
    assert error(run(model)["output"], out) < 1e-6


def with_adapters(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for module in list(model.modules()):
        if is_attention(module):
            module.qkv = LoRA(module.qkv)
            if isinstance(module.to_out, nn.Sequential):
                module.to_out[0] = LoRA(module.to_out[0])
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_hooks_fire_on_every_module(kind: str) -> None:
    model, unfused = pair(kind)
    expected, fired = run(unfused), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    found = run(model)
    assert fired == {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    assert max(error(found[name], value) for name, value in expected.items()) < 1e-6


def coding_rate(w: Tensor, heads: int) -> Tensor:
    """R^c of every image as the official hook computes it: tokens of unit norm, eps 0.01, summed over heads."""
    x = F.normalize(w.unflatten(-1, (heads, -1)).transpose(1, 2), dim=-1)
    tokens, features = x.shape[-2:]
    gram = torch.eye(tokens) + features / (tokens * 0.01) * x @ x.mT
    return torch.logdet(gram).sum(1) / 2


def test_the_official_hook_script_sees_what_it_saw() -> None:
    """It hooks the projection and the sparse step's PreNorm of each layer: coding rate and share of zeros, mean and spread."""
    seen = []
    for model in pair("CRATE-MAE", torch.float32):
        quantities: list[Tensor] = []
        for attention, sparsify in model.encoder:
            heads = attention.fn.heads
            attention.fn.qkv.register_forward_hook(
                lambda m, args, out, kept=quantities, heads=heads: kept.extend(torch.std_mean(coding_rate(out, heads)))
            )
            sparsify.register_forward_hook(
                lambda m, args, out, kept=quantities: kept.extend(torch.std_mean((out == 0).float().mean((1, 2))))
            )
        with torch.no_grad():
            model.eval()(TOKENS)
        seen.append(torch.stack(quantities))
    fused, official = seen
    assert len(fused) == 8 and error(fused, official) < 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_dynamic_quantisation(kind: str) -> None:
    model, unfused = pair(kind, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        quantised, expected = (torch.ao.quantization.quantize_dynamic(each, {nn.Linear}) for each in (model, unfused))
    assert any("quantized" in type(module).__module__ for module in quantised.modules())
    with torch.no_grad():
        assert error(run(quantised)["output"], run(expected)["output"]) < 1e-6


def test_a_hook_on_a_block_may_change_the_next() -> None:
    """After the weights of all layers were prepared together, were it not for the hook."""
    model, found = small_model(embed_dim=16, depth=2, img_size=12), []
    for each, implementation in ((model, "reference"), (copy.deepcopy(model), "triton")):
        later = each.blocks[1].layers[0][0].fn

        def change(*_: object, later: nn.Module = later) -> None:
            later.qkv.register_forward_hook(lambda module, args, out: 2 * out)
            later.to_out[0].weight.data.mul_(3)

        each.blocks[0].register_forward_hook(change)
        with crate_kernels.use(implementation):
            found.append(run(each))
    assert max(error(found[1][name], value) for name, value in found[0].items()) < 1e-5


@pytest.mark.parametrize(
    "kind", [nn.Linear, nn.Softmax, nn.LayerNorm, MSSA, ISTA, DecoderStep], ids=lambda kind: kind.__name__
)
def test_a_forward_replaced_on_the_class_is_called(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, original, called = MODELS["crate_mae"](), kind.forward, []

    def forward(self: nn.Module, *args: object, **options: object) -> Tensor:
        called.append(self)
        return original(self, *args, **options)

    before = run(model)["output"]
    monkeypatch.setattr(kind, "forward", forward)
    assert error(run(model)["output"], before) < 1e-6
    assert len({id(one) for one in called}) == sum(type(module).forward is forward for module in model.modules())


@pytest.mark.parametrize(
    "options",
    [
        dict(subtract=True),
        dict(skip=torch.ones(16)),
        dict(lengths=torch.tensor([0, 3])),
        dict(lengths=torch.tensor([3.0, 3.0])),
        dict(lengths=torch.tensor([3])),
        dict(key_mask=torch.ones(2, 19, dtype=torch.bool)),
        dict(cu_seqlens=torch.tensor([0, 20])),
    ],
    ids=str,
)
def test_what_the_fused_call_refuses_the_children_refuse(options: dict) -> None:
    module = MSSA(16, 2, 8)
    errors = []
    for _ in range(2):
        with pytest.raises((ValueError, TypeError)) as caught:
            module(TOKENS, **options)
        errors.append(str(caught.value).split(":")[0])
        module.attend.register_forward_hook(lambda *_: None)
    assert errors[0] == errors[1]


def test_masks_count_whether_children_are_called_or_not() -> None:
    """Windows, keys and packed sequences, and a scale that each head learns."""
    packed, ends = TOKENS[:1], torch.tensor([0, 8, 17])
    options = [(TOKENS, dict(key_mask=torch.arange(20).expand(2, 20) % 3 > 0)), (packed, dict(cu_seqlens=ends))]
    for tokens, hiding in options:
        module = MSSA(16, 2, 8).double()
        module.window, module.scale = 4, nn.Parameter(torch.tensor([0.2, 0.9], dtype=torch.float64)[:, None, None])
        found = []
        for _ in range(2):
            module.zero_grad()
            out = module(tokens.double(), **hiding)
            out.square().sum().backward()
            found.append([out, module.scale.grad, module.qkv.weight.grad])
            module.attend.register_forward_hook(lambda *_: None)
        for fused, by_children in zip(*found, strict=True):
            assert error(fused, by_children) < 1e-12
        weights = module(tokens.double(), return_attention=True, **hiding)
        place = torch.arange(20)
        assert not weights[..., (place - place[:, None]).abs() > 4].any()
        if "key_mask" in hiding:
            assert not weights.transpose(1, 3)[~hiding["key_mask"]].any()
        else:
            assert not weights[..., :8, 8:].any() and not weights[..., 17:, :].any()


def test_padding_is_no_part_of_an_attention_map() -> None:
    module, lengths = MSSA(16, 2, 8), torch.tensor([20, 7])
    padded = module(TOKENS, return_attention=True, lengths=lengths)
    alone = module(TOKENS[1:, :7], return_attention=True)
    assert not padded[1, :, :, 7:].any() and error(padded[1:, :, :7, :7], alone) < 1e-6


class SquaredISTA(ISTA):
    def forward(self, x: Tensor, **options: object) -> Tensor:
        return super().forward(x, **options).square()


def set_in_model(path: str, name: str, value: object) -> tuple[nn.Module, Tensor]:
    """crate_mae's model with another setting, and what it gives without."""
    model = MODELS["crate_mae"]()
    before = run(model)["output"]
    setattr(model.get_submodule(path), name, value)
    return model, before


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("blocks.0.layers.0.1.fn", "__class__", SquaredISTA),
        ("blocks.0.layers.0.1.fn", "threshold", "soft"),
        ("blocks.0.layers.0.1.fn", "step_size", 0.3),
        ("blocks.0.layers.0.0.fn", "is_causal", True),
        ("blocks.0.layers.0.0.fn", "window", 1),
        ("decoder_blocks.0.layers.0.1.fn", "window", 1),
        ("blocks.0.layers.0.0.fn", "scale", torch.tensor([0.1, 2.0])[:, None, None]),
        ("decoder_blocks.0.layers.0.1.fn", "scale", torch.tensor(2.0)),
        ("decoder_blocks.0.layers.0.1.fn", "scale", 2.0),
        ("decoder_blocks.0.layers.0.1.fn.dropout", "p", 0.5),
    ],
)
def test_settings_of_inner_modules_count_on_every_path(path: str, name: str, value: object) -> None:
    model, before = set_in_model(path, name, value)
    found = []
    for implementation in ("reference", "composed", "triton"):
        torch.manual_seed(0)
        with crate_kernels.use(implementation):
            found.append(run(model)["output"])
    assert error(found[0], before) > 1e-3
    if name != "p":  # each path draws its own
        assert error(found[1], found[0]) < 1e-5 and error(found[2], found[0]) < 1e-5


NORMS = {
    "no weights": lambda: nn.LayerNorm(16, elementwise_affine=False),
    "no bias": lambda: nn.LayerNorm(16, bias=False),
    "subclass": lambda: LayerNormPlusOne(16),
    "of two dimensions": lambda: nn.LayerNorm((20, 16)),
    "RMSNorm": lambda: nn.RMSNorm(16),
    "GroupNorm": lambda: nn.GroupNorm(4, 20),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("implementation", ["reference", "composed", "triton"])
def test_any_norm_before_any_module(implementation: str, kind: str) -> None:
    norm = NORMS[kind]()
    for module in (MSSA(16, 2, 8), ISTA(16), DecoderStep(16), OvercompleteISTA(16)):
        with crate_kernels.use(implementation):
            assert error(module(TOKENS, norm=norm), module(norm(TOKENS))) < 1e-5


def test_a_reason_is_said_once_and_a_plain_model_says_nothing() -> None:
    model, _ = pair("CRATE-MAE")
    fusing._said.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model)
    model.encoder[0][0].fn.qkv.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="MSSA: qkv has hooks, so modules are called one by one") as said:
        run(model)
        run(model)
    assert len(said) == 1


def test_hooks_on_all_modules_see_them() -> None:
    model, _ = pair("CRATE-MAE")
    seen: set[type] = set()
    handle = register_module_forward_hook(lambda module, *_: seen.add(type(module)))
    try:
        run(model)
    finally:
        handle.remove()
    assert {nn.Linear, nn.Softmax, nn.Dropout, nn.LayerNorm, MSSA} <= seen


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("adapted", [False, True])
def test_compiles_to_one_graph(kind: str, adapted: bool) -> None:
    model, unfused = pair(kind)
    if adapted:
        model, unfused = with_adapters(model), with_adapters(unfused)
    torch.compiler.reset()
    expected = run(unfused)
    model.compile(fullgraph=True, backend="aot_eager")
    found = run(model)
    assert max(error(found[name], value) for name, value in expected.items()) < 1e-6


DRAWS = given(
    kind=st.sampled_from(list(MODELS)),
    names=st.lists(st.sampled_from(list(EDITS)), min_size=2, max_size=5),
    number=st.integers(0, 2**31),
    swap_first=st.booleans(),
)
# 160 draws, in parts that can run side by side, and 12 in the slow interpreter; CRATE_KERNELS_DRAWS says how many more times.
TIMES = int(os.environ.get("CRATE_KERNELS_DRAWS", "1"))
PARTS, EACH = range(4), {"composed": 40 * TIMES, "triton": 3 * TIMES}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("implementation", "dtype", "margin"), [("composed", torch.float64, 1e5), ("triton", torch.float32, 1e3)]
)
def test_drawn_edits(implementation: str, dtype: torch.dtype, margin: float, part: int) -> None:
    @seed(part)
    @settings(max_examples=EACH[implementation], deadline=None, database=None, phases=[Phase.generate])
    @DRAWS
    def draw(kind: str, names: list[str], number: int, swap_first: bool) -> None:
        with crate_kernels.use(implementation):
            assume(compare(kind, names, number, swap_first, dtype, margin) == "ran")

    draw()
