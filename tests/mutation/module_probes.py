"""The modules, and what stands around them in a model, against the official steps in float64; their choices, in words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from mutation.composed_probes import EXACT, random, truth
from mutation.modules import kernel_modules
from mutation.probes import Probe
from official import officially
from torch import Tensor, nn

from crate_kernels import ISTA, MSSA, DecoderStep, OvercompleteISTA, fusing, mssa, use

Build = Callable[[], nn.Module]
Call = Callable[[nn.Module, Tensor], Tensor]
X, SKIP = random((3, 5, 8), (3, 5, 8))
LENGTHS = torch.tensor([5, 2, 4])
KEY_MASK = torch.arange(15).view(3, 5) % 4 > 1


def found_of(build: Build, call: Call, official: bool, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of a module that is made anew, always with the same numbers."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        module = build().double()
        module = officially(module) if official else module
        leaf = x.detach().clone().requires_grad_(x.is_floating_point())
        torch.manual_seed(1)
        out = call(module, leaf)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).sin())
        grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        return {"output": out.detach(), "input": leaf.grad, **grads}


def module_probe(
    name: str,
    build: Build,
    call: Call = lambda module, x: module(x),
    formula: Call | None = None,
    by: str = "reference",
    x: Tensor = X,
) -> Probe:
    """The module as it runs, and the formula of the official one."""
    with use(by):
        expected = found_of(build, formula or call, by == "reference", x)

    def run() -> dict[str, Tensor]:
        with use("composed"):
            found = found_of(build, call, False, x)
        assert found.keys() >= expected.keys(), "a gradient is not there"
        return found

    return Probe(name, run, expected, dict.fromkeys(expected, EXACT))


def refusals(name: str, **calls: tuple[Callable[[], object], str]) -> Probe:
    """Each call raises an error that says so."""

    def run() -> dict[str, object]:
        said = {}
        for what, (call, words) in calls.items():
            try:
                call()
            except (ValueError, RuntimeError) as problem:
                said[what] = words in str(problem)
        return said

    return truth(name, run, **dict.fromkeys(calls, True))


def edited(build: Build, edit: Callable[[Any], object]) -> Build:
    def built() -> nn.Module:
        module = build()
        edit(module)
        return module

    return built


def hooked(name: str) -> Callable[[nn.Module], object]:
    return lambda module: module.get_submodule(name).register_forward_hook(lambda *_: None)


# --- crate_kernels.nn -------------------------------------------------------------------------------------------------


def kernel_module_probes() -> list[Probe]:
    norm = nn.LayerNorm(8, eps=0.1).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    plain: Build = lambda: MSSA(8, 2, 3)  # noqa: E731
    builds: dict[str, Build] = {
        "fused": plain,
        "children": edited(plain, hooked("to_out.0")),
        "official steps": edited(plain, hooked("attend")),
        "one head": lambda: MSSA(8, 1, 8),
        "no bias": lambda: MSSA(8, 2, 3, out_bias=False),
        "one narrow head": lambda: MSSA(8, 1, 3),
        "wide heads": lambda: MSSA(8, 2, 8),
        "a plain projection": edited(plain, lambda module: setattr(module, "to_out", nn.Linear(6, 8))),
        "another softmax": edited(plain, lambda module: setattr(module.attend, "dim", 1)),
        "no attend": edited(plain, lambda module: module._modules.pop("attend")),
        "no attend, in steps": edited(edited(plain, lambda module: module._modules.pop("attend")), hooked("dropout")),
    }

    def around(sign: float) -> tuple[Call, Call]:
        return (
            lambda module, x: module(x, norm=norm, skip=SKIP, subtract=sign < 0),
            lambda module, x: SKIP + sign * module(norm(x)),
        )

    def formula(x: Tensor, module: nn.Module, **options: Any) -> Tensor:
        out = next((m for m in module.to_out.modules() if isinstance(m, nn.Linear)), None)
        projection = (None, None) if out is None else (out.weight, out.bias)
        return mssa(x, module.qkv.weight, *projection, num_heads=module.heads, **{"scale": module.scale, **options})

    def causal(module: nn.Module, x: Tensor) -> Tensor:
        module.is_causal = True
        return module(x)

    def windowed(module: nn.Module, x: Tensor) -> Tensor:
        module.window = 1
        return module(x, key_mask=KEY_MASK)

    def scaled(module: nn.Module, x: Tensor) -> Tensor:
        module.scale = torch.linspace(0.2, 0.6, module.heads, dtype=x.dtype)[:, None, None]
        return module(x)

    probes = []
    for name, build in builds.items():
        if not name.startswith("no attend"):
            probes.append(module_probe(f"MSSA, {name}", build))
            probes += [module_probe(f"MSSA, {name}, {sign}", build, *around(sign)) for sign in (1, -1)]
            weights: Call = lambda module, x: module(x, return_attention=True)  # noqa: E731
            keys: Call = lambda module, x: module(x, return_key=True)  # noqa: E731
            probes += [module_probe(f"MSSA, {name}, keys", build, _normed_keys(norm, True), _normed_keys(norm, False))]
            probes += [module_probe(f"MSSA, {name}, {i}", build, call) for i, call in enumerate((weights, keys))]
        if name == "another softmax":
            continue
        probes += [
            module_probe(f"MSSA, {name}, causal", build, causal, lambda m, x: formula(x, m, is_causal=True)),
            module_probe(
                f"MSSA, {name}, padded", build, lambda m, x: m(x, lengths=LENGTHS),
                lambda m, x: formula(x, m, lengths=LENGTHS),
            ),
            module_probe(
                f"MSSA, {name}, window", build, windowed, lambda m, x: formula(x, m, window=1, key_mask=KEY_MASK)
            ),
            module_probe(
                f"MSSA, {name}, scales", build, scaled,
                lambda m, x: formula(x, m, scale=torch.linspace(0.2, 0.6, m.heads, dtype=x.dtype)),
            ),
        ]  # fmt: skip
    dropped: Build = lambda: MSSA(8, 2, 3, dropout=0.5)  # noqa: E731
    in_one: Call = lambda m, x: formula(x, m, dropout=0.5)  # noqa: E731
    evaluated: Build = lambda: dropped().eval()  # noqa: E731
    numbers = dict(step_size=0.3, lambd=0.2)
    steps: dict[str, Build] = {
        "ISTA": lambda: ISTA(8, **numbers),
        "ISTA, soft": lambda: ISTA(8, **numbers, threshold="soft"),
        "DecoderStep": lambda: DecoderStep(8),
        "decoupled": lambda: OvercompleteISTA(8, 2),
        "coupled": lambda: OvercompleteISTA(8, decouple=False),
    }
    for name, build in steps.items():
        probes.append(module_probe(name, build))
        probes.append(module_probe(f"{name}, norm", build, lambda m, x: m(x, norm=norm), lambda m, x: m(norm(x))))
    add: Call = lambda m, x: m(x, norm=norm, skip=SKIP)  # noqa: E731
    probes.append(module_probe("overcomplete, skip", steps["decoupled"], add, lambda m, x: SKIP + m(norm(x))))

    def words() -> dict[str, object]:
        edits: dict[str, Callable[[Any], object]] = {
            "plain": lambda m: None,
            "bias": lambda m: setattr(m, "qkv", nn.Linear(8, 6)),
            "projection": lambda m: m.to_out.__setitem__(0, nn.Identity()),
            "dropout behind": lambda m: m.to_out.__setitem__(1, nn.Identity()),
            "rates": lambda m: setattr(m.to_out[1], "p", 0.5),
            "steps": lambda m: m.to_out.append(nn.Identity()),
            "other": lambda m: setattr(m, "to_out", nn.Linear(6, 8)),
            "hook": lambda m: m.to_out.register_forward_hook(lambda *_: None),
            "dimension": lambda m: setattr(m.attend, "dim", 1),
            "last dimension": lambda m: setattr(m.attend, "dim", 3),
            "softmax": lambda m: setattr(m, "attend", nn.Identity()),
            "attention's dropout": lambda m: setattr(m, "dropout", nn.Identity()),
            "all dropped": lambda m: setattr(m.dropout, "p", 1.0),
            "scale": lambda m: setattr(m, "scale", torch.tensor(1.0)),
            "scales": lambda m: setattr(m, "scale", torch.ones(2, 1, 1)),
            "scales of features": lambda m: setattr(m, "scale", torch.ones(2)),
            "scales of three heads": lambda m: setattr(m, "scale", torch.ones(3, 1, 1)),
            "scales of samples": lambda m: setattr(m, "scale", torch.ones(2, 1, 1, 1)),
            "scales of three samples": lambda m: setattr(m, "scale", torch.ones(3, 2, 1, 1)),
            "scales that count": lambda m: setattr(m, "scale", torch.ones(2, 1, 1, dtype=torch.long)),
            "scale in words": lambda m: setattr(m, "scale", "small"),
            "causal": lambda m: setattr(m, "is_causal", True),
            "window": lambda m: setattr(m, "window", 0),
            "one step": lambda m: m.to_out.__delitem__(1),
            "no qkv": lambda m: setattr(m, "qkv", nn.Identity()),
            "bias and hook": lambda m: [setattr(m, "qkv", nn.Linear(8, 6)), hooked("attend")(m)],
            "rates and hook": lambda m: [setattr(m.to_out[1], "p", 0.5), hooked("attend")(m)],
            "rates and a hooked projection": lambda m: [setattr(m.to_out[1], "p", 0.5), hooked("to_out.0")(m)],
            "both drop": lambda m: [setattr(m.to_out[1], "p", 0.5), setattr(m.dropout, "p", 0.5)],
            "identity": lambda m: setattr(m, "to_out", nn.Identity()),
            "identity hooked": lambda m: [setattr(m, "to_out", nn.Identity()), hooked("to_out")(m)],
        }
        found: dict[str, object] = {}
        for name, edit in edits.items():
            module = plain()
            edit(module)
            found[name] = module.obstacle(), module.attention_obstacle(), module.restriction()
        return found

    expected = words()  # of the modules as they are: read once, below, by whoever changes the words
    rates = lambda: dict(training=dropped().dropout_rate, evaluation=evaluated().dropout_rate)  # noqa: E731
    takes = {
        "MSSA": (plain, True), "ISTA": (steps["ISTA"], True), "DecoderStep": (steps["DecoderStep"], True),
        "Overcomplete": (steps["coupled"], True), "Linear": (lambda: nn.Linear(8, 8), False),
        "hooked": (edited(plain, hooked("")), False),
    }  # fmt: skip
    wrong = torch.zeros(3, 5, 7, dtype=torch.float64)
    children = lambda: builds["official steps"]().double()  # noqa: E731
    in_steps = edited(dropped, hooked("attend"))
    return [
        *probes,
        *_frozen_probes(numbers),
        module_probe("MSSA, dropout", dropped, lambda m, x: m(x), in_one, by="composed"),
        module_probe("MSSA, official steps, dropout", in_steps, lambda m, x: m(x)),
        module_probe(
            "MSSA, no dropout", edited(edited(plain, hooked("attend")), lambda m: m._modules.pop("dropout")),
            lambda m, x: m(x, lengths=LENGTHS), lambda m, x: formula(x, m, lengths=LENGTHS),
        ),
        truth("parameters", lambda: {name: list(build().state_dict()) for name, build in steps.items()}, coupled=["D"]),
        truth("MSSA, who is called", _called, hooked=1, told=1, plain=0),
        module_probe("MSSA, dropout, evaluation", evaluated, lambda m, x: m(x), lambda m, x: m(x)),
        truth("MSSA, obstacles", words, **expected),
        truth("MSSA, rates", rates, training=0.5, evaluation=0.0),
        truth(
            "who takes a norm", lambda: {name: kernel_modules.takes_norm(build()) for name, (build, _) in takes.items()},
            **{name: expected for name, (_, expected) in takes.items()},
        ),
        refusals(
            "MSSA",
            negative=(lambda: MSSA(8, dropout=-0.1), "dropout"),
            one=(lambda: MSSA(8, dropout=1.0), "dropout"),
            no_skip=(lambda: children()(X, subtract=True), "without a skip"),
            skip=(lambda: children()(X, skip=wrong), "skip: expected"),
            lengths=(lambda: children()(X, lengths=LENGTHS + 9), "lengths"),
        ),
    ]  # fmt: skip


def _normed_keys(norm: nn.Module, given: bool) -> Call:
    if given:
        return lambda module, x: module(x, return_key=True, norm=norm)
    return lambda module, x: module(norm(x), return_key=True)


def _called() -> dict[str, object]:
    """How often a child with a hook was called, and how often something was said of it, and of a module without one."""
    calls: list[object] = []
    found: dict[str, object] = {}
    module = MSSA(8, 2, 3).double()
    with patch.object(fusing, "_said", set()), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        module(X)
        found["plain"] = len(told)
        module.to_out[0].register_forward_hook(lambda *_: calls.append(None))
        module(X)
        return found | {"hooked": len(calls), "told": len(told)}


def _frozen_probes(numbers: dict[str, float]) -> list[Probe]:
    def frozen(m: nn.Module, x: Tensor) -> Tensor:
        m.weight.requires_grad_(False)
        m.freeze()
        return m(x)

    def loaded(m: nn.Module, x: Tensor) -> Tensor:
        m.weight.requires_grad_(False)
        m.freeze()
        m.load_state_dict({"weight": 0.5 * m.weight})
        return m(x)

    def constant(factor: float) -> Call:
        def call(m: nn.Module, x: Tensor) -> Tensor:
            m.weight.requires_grad_(False).mul_(factor)
            return m(x)

        return call

    def states() -> dict[str, object]:
        module = ISTA(8)
        found = {"new": "combined" in module._buffers}
        module.freeze()
        found["frozen"], found["state"] = "combined" in module._buffers, sorted(module.state_dict())
        module.unfreeze()
        module.unfreeze()
        found["unfrozen"] = "combined" in module._buffers
        return found

    def frozen_with_gradient() -> None:
        module = ISTA(8).double()
        module.freeze()
        module(X)

    build: Build = lambda: ISTA(8, **numbers)  # noqa: E731
    return [
        module_probe("ISTA, frozen", build, frozen, constant(1.0)),
        module_probe("ISTA, frozen and loaded", build, loaded, constant(0.5)),
        truth("ISTA, states", states, new=False, frozen=True, unfrozen=False, state=["weight"]),
        refusals("ISTA", frozen=(frozen_with_gradient, "unfreeze")),
    ]
