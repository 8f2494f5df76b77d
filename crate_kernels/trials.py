"""Whether one of our modules computes the same as a module that it is to replace: both run, and outputs and gradients are
compared."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from crate_kernels.dispatch import use
from crate_kernels.fusing import HOOKS, unsaid
from crate_kernels.renamed import is_causal_mask

MANY_TOKENS = 300
# Attributes of modules that are single numbers, and the factor by which one trial changes each.
_NUMBERS = {"step_size": 0.7, "eta": 0.7, "lambd": 0.6, "lmbda": 0.6, "scale": 0.8}


class Trial(NamedTuple):
    """One run of both modules.

    Attributes:
        words: how it differs from the other trials, as the end of a sentence.
        x: the tokens.
        values: the parameters, by name.
        numbers: factors for single numbers, by name.
        training: whether the modules are in training mode.
        flags: further arguments of the forward.
        dropping: the child whose dropout drops everything; the others drop nothing.
        may_be_zero: whether the output may be all zeros.
        beyond_mask: whether there are more tokens than the module's causal mask has, so that it must fail.
    """

    words: str
    x: Tensor
    values: dict[str, Tensor]
    numbers: dict[str, float]
    training: bool
    flags: dict[str, Any]
    dropping: str | None = None
    may_be_zero: bool = False
    beyond_mask: bool = False


def arguments(kind: type[nn.Module]) -> list[str]:
    """The names of its forward's arguments after the module and the tokens."""
    return list(inspect.signature(kind.forward).parameters)[2:]


def difference(
    module: nn.Module, target: type[nn.Module], width: tuple[str, int], tokens: int, gain: float
) -> str | None:
    """In words, how the outputs or gradients of ``target`` differ from those of ``module``; None if no trial shows a difference.

    Args:
        module: the module that is to be replaced.
        target: the type of ours that would take its parameters.
        width: the name of a parameter and the index of its size that is the width of the tokens.
        tokens: the number of tokens in most trials.
        gain: the norm of a row of the random parameters in most trials.
    """
    try:
        weight = attrgetter(width[0])(module)
    except AttributeError:
        weight = None
    if not isinstance(weight, Tensor):
        return f"it has no tensor {width[0]} to be known by; what wraps it may be put around it after accelerate"
    devices, before = {p.device for p in module.parameters() if p.is_cuda}, random.getstate()
    try:
        with torch.random.fork_rng(devices), torch.autocast(weight.device.type, enabled=False), torch.enable_grad():
            with use("composed"), unsaid():
                found = (_found(module, target, trial) for trial in _trials(module, weight, width[1], tokens, gain))
                return next((f"it does not compute {target.__name__}{words}" for words in found if words), None)
    finally:
        random.setstate(before)


def _found(module: nn.Module, target: type[nn.Module], trial: Trial) -> str | None:
    """How both differ in one trial, as the end of a sentence."""
    if trial.beyond_mask:
        try:
            _run(module, type(module), trial)
        except Exception:
            return None
        return f"{trial.words}, where it runs"
    (expected, changed), (found, _) = (_run(module, kind, trial) for kind in (type(module), target))
    if changed:
        return f": its forward changes its own {', '.join(changed)}"
    out = expected[0]
    if not isinstance(out, Tensor) or (out.shape, out.dtype) != (found[0].shape, found[0].dtype):
        return f"{trial.words}: its result is of another type, shape or dtype"
    if [one is None for one in expected] != [one is None for one in found]:
        return f"{trial.words}: other tensors get a gradient"
    for what, one, other in zip(("", *[", in its gradients"] * len(found)), expected, found, strict=False):
        # With <= all zeros would pass. A threshold above all tokens makes them, whatever else the modules compute.
        close = one is None or (other - one).norm() < torch.finfo(one.dtype).eps ** 0.75 * one.norm()
        if not (close or ((trial.may_be_zero or what) and torch.equal(other, one))):
            return f"{trial.words}{what}"
    return None


def _trials(module: nn.Module, weight: Tensor, axis: int, tokens: int, gain: float) -> Iterator[Trial]:
    generator, width, device = torch.Generator().manual_seed(0), weight.shape[axis], weight.device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    sizes = [buffer.shape[-1] for buffer in module._buffers.values() if buffer is not None and is_causal_mask(buffer)]
    most, few = min([tokens, *sizes]), min([16, *sizes])

    def normal(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device="cpu", dtype=dtype)).to(device)

    def parameters(gain: float) -> dict[str, Tensor]:
        """Random parameters; a single number, such as lambda, keeps its value."""
        state = module.named_parameters(remove_duplicate=False)
        floats = {name: value.detach() for name, value in state if value.is_floating_point()}
        return {
            name: normal(value.shape, gain * value.shape[-1] ** -0.5) if value.numel() > 1 else value.to(dtype)
            for name, value in floats.items()
        }

    first = Trial(" in training mode", normal((2, most, width)), parameters(gain), {}, True, {})
    yield first
    yield first._replace(words=" in evaluation mode", training=False)
    short, flags = first._replace(x=normal((2, few, width)), may_be_zero=True), arguments(type(module))
    for flag in flags:
        for words, training in ((f" with {flag} in training", True), (f" with {flag}", False)):
            yield short._replace(words=words, training=training, flags={flag: True})
    for name, child in module.named_modules():
        if type(child) is nn.Dropout:
            for given in ({}, *({flag: True} for flag in flags)):
                words = "".join(f" and {flag}" for flag in given)
                yield short._replace(words=f" with its dropout ({name}){words}", dropping=name, flags=given)
    yield first._replace(words=" with other numbers", x=short.x, numbers=_NUMBERS)
    yield short._replace(words=" of large values", x=10 * short.x, values=parameters(4 * gain))
    yield short._replace(words=" of one token", x=normal((1, 1, width)))
    if (many := min([MANY_TOKENS, *sizes])) > most:
        yield first._replace(words=f" of {many} tokens", x=normal((1, many, width)), training=False)
    if most < tokens:
        yield first._replace(words=" beyond its mask", x=normal((1, most + 1, width)), beyond_mask=True)


def _run(module: nn.Module, kind: type[nn.Module], trial: Trial) -> tuple[list[Any], list[str]]:
    """Runs ``module`` as a ``kind``. Returns [output, gradients of tokens and parameters], and the attributes that it changed."""
    twin = without_hooks(module, kind)
    for name, child in twin.named_modules():
        child.training = trial.training
        if type(child) is nn.Dropout:
            child.p = float(name == trial.dropping)
    values = {name: trial.numbers.get(name, 1.0) * value for name, value in trial.values.items()}
    for name in _NUMBERS:
        # Properties are ours: another name for a number, which is changed under its own.
        if name in values or isinstance(getattr(kind, name, None), property):
            continue
        value = getattr(twin, name, None)
        if isinstance(value, Tensor):
            value = value.to(trial.x.dtype)
        if isinstance(value, (float, Tensor)):
            setattr(twin, name, trial.numbers.get(name, 1.0) * value)
    x, *parameters = leaves = [value.detach().clone().requires_grad_() for value in (trial.x, *values.values())]
    before = _contents(twin)
    out = functional_call(
        twin, dict(zip(values, parameters, strict=True)), (x.clone(),), trial.flags, tie_weights=False
    )
    changed = [name for name, value in _contents(twin).items() if before.get(name) != value]
    if not isinstance(out, Tensor) or not out.requires_grad:
        return [out, *[None] * len(leaves)], changed
    # Weights that differ between elements: with equal ones, the gradient of a softmax would be zero.
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream, allow_unused=True)], changed


def _contents(module: nn.Module) -> dict[str, object]:
    """The identity of each attribute and buffer, and of what is in collections; so a change of any can be seen."""

    def of(value: object) -> object:
        if isinstance(value, dict):
            return [(key, id(one)) for key, one in value.items()]
        return [id(one) for one in value] if isinstance(value, (list, set)) else id(value)

    own = {name: value for name, value in vars(module).items() if name not in ("_parameters", "_modules")}
    return {name: of(value) for name, value in own.items()}


def _twin(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of a module and its children, without hooks. It shares their tensors, but setting its attributes leaves theirs."""
    if module not in made:
        made[module] = twin = object.__new__(type(module))
        vars(twin).update(vars(module))
        # Collections are copied, that of buffers too, so that they can be changed on the twin alone.
        vars(twin).update({k: copy.copy(v) for k, v in vars(module).items() if isinstance(v, (list, dict, set))})
        vars(twin).update({hooks: {} for hooks in HOOKS})
        children = module._modules.items()
        twin._modules = {name: None if child is None else _twin(child, made) for name, child in children}
    return made[module]


def without_hooks(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A copy of ``module`` (see ``_twin``) whose type is ``kind``."""
    twin = _twin(module, {})
    twin.__class__ = kind
    return twin


def signature(module: nn.Module) -> object:
    """A value that is equal for modules that compute the same with equal parameters; unique where that is not certain."""
    own: list[object] = []
    for child in module.modules():
        for name, value in vars(child).items():
            if name in ("_modules", *HOOKS) or (name.startswith("_") and not value):
                continue
            if name == "_parameters":
                own += [(name, None if one is None else _as_seen(one)) for name, one in value.items()]
            elif isinstance(value, (bool, int, float, str, tuple, type(None))):
                own.append((name, value))
            else:
                return object()
        own.append((type(child), tuple(child._modules)))
    return tuple(own)


def _as_seen(parameter: Tensor) -> tuple[object, ...]:
    number = parameter.item() if parameter.numel() == 1 and not parameter.is_meta else None
    return type(parameter), parameter.shape, parameter.dtype, parameter.device, number
