"""Faster layers for a model that exists already: its official modules, swapped in place."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from crate_kernels.dispatch import use
from crate_kernels.nn import ISTA, MSSA, DecoderStep, OvercompleteISTA


class Kind(NamedTuple):
    """How the official counterpart of one of our classes is known, and what both are tried on.

    attributes: what it has, whatever their values.
    states: the names of its parameters and buffers, one set for each official form.
    width: the parameter, and which of its sizes, that says how wide the tokens are.
    tokens, gain: of the trial; the parameters are random, of norm ``gain`` a row.
    """

    attributes: tuple[str, ...]
    states: tuple[set[str], ...]
    width: tuple[str, int]
    tokens: int = 20
    gain: float = 1.0


KINDS = {
    MSSA: Kind(
        ("heads", "scale", "qkv", "attend", "to_out"),
        ({"qkv.weight"}, {"qkv.weight", "to_out.0.weight"}, {"qkv.weight", "to_out.0.weight", "to_out.0.bias"}),
        ("qkv.weight", 1),
        tokens=130,  # enough to notice a window of 64 tokens on either side
        gain=0.25,  # scores so small that every token counts, not mostly the token itself
    ),
    ISTA: Kind(("step_size", "lambd", "weight"), ({"weight"},), ("weight", 1)),
    DecoderStep: Kind(("step_size", "lambd", "weight"), ({"weight"},), ("weight", 1)),  # official, and unused there
    OvercompleteISTA: Kind(("eta", "lmbda", "D"), ({"D"}, {"D", "D1"}), ("D", 0)),
}


_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


@dataclass
class Acceleration:
    """What ``accelerate`` did: printed, it says so in words.

    Attributes:
        swapped: name of a module in the model -> the class that it is now.
        left_alone: name of a module that looked like one of ours -> why it was not swapped.
    """

    swapped: dict[str, type[nn.Module]] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    _originals: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every swapped module its official class back; parameters keep their current values."""
        for module, original in self._originals:
            if isinstance(module, ISTA):
                module.unfreeze()
            module.__class__ = original
        self.swapped.clear()
        self._originals.clear()

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)} modules"]
        if not self.swapped and not self.left_alone:
            lines[0] += (
                ": none has the structure of an official one (crate_mae's and accelerated models run on the kernels as they are)"
            )
        lines += [f"  {name}: {kind.__name__}" for name, kind in self.swapped.items()]
        if self.left_alone:
            lines.append(f"left {len(self.left_alone)} alone")
            lines += [f"  {name}: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Acceleration:
    """Swap the attention and sparse-step modules of an official CRATE, CRATE-MAE or CRATE-alpha model for ours, in place.

    Modules are found by structure, wherever their classes were imported from: an attention has ``heads``, ``scale``, one
    projection ``qkv``, a softmax ``attend`` and ``to_out``; a sparse step has ``weight``, ``step_size`` and ``lambd``, as has
    CRATE-MAE's linear decoder step; CRATE-alpha's overcomplete step has ``D``, ``eta`` and ``lmbda``. Structure is not
    meaning, so each candidate must also have the official parameters and no others, no methods, arguments or hooks that a
    swap would lose, and must compute what our class makes of the same object: both are called on random tokens with random
    parameters, in its own dtype, in training and in evaluation mode. What raises an exception there is left alone.

    All of this happens before the first swap, on shallow copies, and leaves parameters, modes and random state as they
    were. A swap changes the class of the module object and nothing else. So its parameters, buffers and state-dict
    names, references to it, optimisers over it, hooks on it and copies made of it later all stay valid; so do the
    official keyword arguments ``return_attention`` and ``return_key``.

    Returns:
        What was swapped and what was left alone, and why. ``print`` it; ``undo()`` it.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    done, decided = Acceleration(), []
    for name, module in model.named_modules():
        obstacles = {target: _obstacle(module, target) for target in _candidates(module)}
        fitting = [target for target, obstacle in obstacles.items() if obstacle is None]
        if fitting:
            decided.append((name, module, fitting[0]))
        elif obstacles:
            done.left_alone[name] = "; ".join(dict.fromkeys(obstacles.values()))
    for name, module, target in decided:
        done._originals.append((module, type(module)))
        module.__class__ = target
        done.swapped[name] = target
    return done


def _candidates(module: nn.Module) -> list[type[nn.Module]]:
    """The classes of ours that ``module`` has the structure of; none for what is ours already."""
    if isinstance(module, tuple(KINDS)):
        return []
    return [target for target, kind in KINDS.items() if all(hasattr(module, name) for name in kind.attributes)]


def _obstacle(module: nn.Module, target: type[nn.Module]) -> str | None:
    """Why ``module`` cannot become a ``target``, in words; None where nothing stands in the way."""
    try:
        return _change(module, target) or _difference(module, target)
    except Exception as error:  # the model's own code runs here, and may do anything
        return textwrap.shorten(f"calling it failed: {type(error).__name__}: {error}", 120)


def _change(module: nn.Module, target: type[nn.Module]) -> str | None:
    """What would be lost with the class of ``module``."""
    if set(_state(module)) not in KINDS[target].states:
        return f"its parameters and buffers are {', '.join(_state(module)) or 'none'}, which are not the official ones"
    if replaced := [name for name in vars(module) if callable(getattr(target, name, None))]:
        return f"its {replaced[0]} was replaced on the instance"
    if lost := _lost_methods(type(module)):
        return f"its class defines {', '.join(lost)}, which {target.__name__} does not"
    ours = list(inspect.signature(target.forward).parameters)[1:]
    theirs = list(inspect.signature(type(module).forward).parameters)[1:]
    if theirs[1:] != ours[1 : len(theirs)]:
        return f"its forward takes {', '.join(theirs)}, which {target.__name__} does not"
    for name, child in list(module.named_modules())[1:]:
        if any(vars(child)[hooks] for hooks in _HOOKS) or "forward" in vars(child):
            return f"{name} has hooks or a replaced forward, which one fused call would pass by"
        if isinstance(child, nn.Dropout) and child.p > 0:
            return f"{name}: its dropout is above 0, and what is random cannot be compared"
        if child._parameters and type(child) is not nn.Linear:
            return f"{name}: expected a plain Linear, found {type(child).__name__}"
    return None


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; one that bears two names is listed under both."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _lost_methods(kind: type[nn.Module]) -> list[str]:
    """Public methods and properties that ``kind`` adds to nn.Module, and what it overrides there, besides its forward."""

    def matters(name: str) -> bool:
        overrides = hasattr(nn.Module, name) and not name.startswith("__")
        return not name.startswith("_") or overrides or name == "__call__"

    bases = [vars(base) for base in kind.__mro__ if base not in nn.Module.__mro__]
    methods = {name for base in bases for name, value in base.items() if hasattr(value, "__get__") and matters(name)}
    return sorted(methods - {"forward", "extra_repr"})


@torch.no_grad()
def _difference(module: nn.Module, target: type[nn.Module]) -> str | None:
    """What ``target`` would do otherwise than ``module``, found by running both on random tokens and parameters."""
    generator = torch.Generator().manual_seed(0)
    state, kind = _state(module), KINDS[target]
    name, axis = kind.width
    weight = state[name]

    def random(shape: tuple[int, ...], scale: float, like: Tensor) -> Tensor:
        numbers = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        return (scale * numbers).to(like.device, like.dtype)

    values = {name: random(v.shape, kind.gain * v.shape[-1] ** -0.5, v) for name, v in state.items()}
    x = random((2, kind.tokens, weight.shape[axis]), 1.0, weight)
    devices = {value.device for value in state.values() if value.is_cuda}
    with torch.random.fork_rng(devices), torch.autocast(weight.device.type, enabled=False), use("composed"):
        for training in (True, False):
            expected, changed = _run(module, type(module), values, x, training)
            found, _ = _run(module, target, values, x, training)
            if changed:
                return f"its forward changes its own {', '.join(changed)}"
            if not isinstance(expected, Tensor) or (expected.shape, expected.dtype) != (found.shape, found.dtype):
                return f"it does not compute {target.__name__}: its result is of another type, shape or dtype"
            # Not <=, which all zeros would pass: behind a threshold above all tokens nothing can be told apart.
            if not (found - expected).norm() < torch.finfo(weight.dtype).eps ** 0.75 * expected.norm():
                mode = "training" if training else "evaluation"
                return f"it does not compute {target.__name__} in {mode} mode"
    return None


def _run(
    module: nn.Module, kind: type[nn.Module], values: dict[str, Tensor], x: Tensor, training: bool
) -> tuple[object, list[str]]:
    """What ``module`` as a ``kind`` makes of x with these parameters, and the attributes that it sets while it does."""
    twin = object.__new__(type(module))  # a shallow copy: what it does to its attributes does not reach the module
    vars(twin).update(vars(module), training=training, **{hooks: {} for hooks in _HOOKS})
    twin.__class__ = kind
    before = dict(vars(twin))
    modes = [(child, child.training) for child in module.modules() if child is not module]
    try:
        for child, _ in modes:
            child.training = training
        out = functional_call(twin, values, (x.clone(),), tie_weights=False)
    finally:
        for child, mode in modes:
            child.training = mode
    return out, [name for name, value in vars(twin).items() if before.get(name, vars) is not value]
