"""Faster layers for a model that exists already: its official modules, swapped in place."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from crate_kernels.dispatch import use
from crate_kernels.fusing import HOOKS, unsaid
from crate_kernels.nn import ISTA, MSSA, DecoderStep, OvercompleteISTA
from crate_kernels.renamed import CausalMSSA, CausalMSSAOfGPT, ISTAOfD, OvercompleteISTAOfCLIPA


class Kind(NamedTuple):
    """How the counterpart of one of our classes is known, and what both are tried on.

    attributes: what it has, whatever their values.
    width: the parameter, and which of its sizes, that says how wide the tokens are.
    optional: further parameters, buffers and children of its own that our class uses, or may leave unused.
    tokens, gain: of the trial; the parameters are random, of norm ``gain`` a row.
    """

    attributes: tuple[str, ...]
    width: tuple[str, int]
    optional: tuple[str, ...] = ()
    tokens: int = 20
    gain: float = 1.0


# Enough tokens to notice a window of 64 on either side, and scores so small that every token counts, not mostly the token itself.
_TRIAL_OF_ATTENTION = dict(tokens=130, gain=0.25)
_OFFICIAL = Kind(("heads", "scale", "qkv", "to_out"), ("qkv.weight", 1), ("attend", "dropout"), **_TRIAL_OF_ATTENTION)
_OF_GPT = ("n_head", "c_attn", "c_proj"), ("c_attn.weight", 1), ("attn_dropout", "resid_dropout")

# In this order: the first that computes the same is taken.
KINDS = {
    MSSA: _OFFICIAL,
    CausalMSSA: _OFFICIAL,
    CausalMSSAOfGPT: Kind(*_OF_GPT, **_TRIAL_OF_ATTENTION),
    ISTA: Kind(("step_size", "lambd", "weight"), ("weight", 1)),
    DecoderStep: Kind(("step_size", "lambd", "weight"), ("weight", 1)),  # the numbers are official, and unused there
    ISTAOfD: Kind(("eta", "lmbda", "D"), ("D", 1)),
    OvercompleteISTA: Kind(("eta", "lmbda", "D", "decouple"), ("D", 0), ("D1",)),
    OvercompleteISTAOfCLIPA: Kind(("eta", "lmbda", "c_fc", "c_proj"), ("c_fc", 0)),
}

# What attentions and sparse steps are called, and what they are made of, where their structure is none of the above.
_ATTENTION = re.compile("attention|attn|mssa|tssa|cbsa", re.IGNORECASE)
_SPARSE_STEP = re.compile("ista|feed_?forward|sparsif|proximal", re.IGNORECASE)
_NUMBERS = "step_size", "lambd", "lmbda", "lambda_", "eta"


@dataclass
class Acceleration:
    """What ``accelerate`` did: printed, it says so in a table.

    Attributes:
        swapped: name of a module in the model -> the class that it is now.
        left_alone: name of a module that looks like one of ours -> why it was not swapped.
    """

    swapped: dict[str, type[nn.Module]] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    _originals: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every swapped module its official class back; parameters keep their current values.

        Raises:
            RuntimeError: a module's class was changed since, by a parametrization for one. Nothing is undone then.
        """
        for (name, kind), (module, _) in zip(self.swapped.items(), self._originals, strict=True):
            if type(module) is not kind:
                raise RuntimeError(
                    f"{name}: accelerate made it {kind.__name__}, and now it is {type(module).__name__}; "
                    f"take off first what changed that (a parametrization, for one)"
                )
        for module, original in self._originals:
            if isinstance(module, ISTA):
                module.unfreeze()
            module.__class__ = original
        self.swapped.clear()
        self._originals.clear()

    def __str__(self) -> str:
        title = f"swapped {len(self.swapped)} modules, left {len(self.left_alone)} alone"
        rows = [("module", "swapped", "as, or why not")]
        for (name, kind), (module, _) in zip(self.swapped.items(), self._originals, strict=True):
            reason = module.obstacle() if isinstance(module, MSSA) else None
            rows.append((name, "yes", kind.__name__ + (f"; not fused as it stands: {reason}" if reason else "")))
        rows += [(name, "no", reason) for name, reason in self.left_alone.items()]
        if len(rows) == 1:
            return (
                f"{title}: none has the structure of an official one (crate_mae's and accelerated models run on the "
                f"kernels as they are)"
            )
        wide = max(len(name) for name, *_ in rows)
        return "\n".join(
            [title, *(f"  {name:{wide}}  {swapped:7}  {reason}".rstrip() for name, swapped, reason in rows)]
        )


def accelerate(model: nn.Module) -> Acceleration:
    """Swap the attention and sparse-step modules of a CRATE, CRATE-MAE or CRATE-alpha model for ours, in place.

    Modules are found by structure, wherever their classes were imported from: an attention has ``heads``, ``scale``, one
    projection ``qkv`` and ``to_out``; a sparse step has ``weight``, ``step_size`` and ``lambd``, as has CRATE-MAE's linear
    decoder step; CRATE-alpha's overcomplete step has ``D``, ``eta`` and ``lmbda``; and some follow-ups' other names are known
    (``crate_kernels.renamed``). Numbers may be parameters or buffers, attention may be causal and have dropout, a projection may
    be plain, in a Sequential, with or without a bias.

    Structure is not meaning, so each candidate must also have no parameters, children, methods or arguments that a swap would
    lose, and must compute what our class makes of the same object: both are called on random tokens with random parameters, in
    its own dtype, in training and in evaluation mode, with each dropout off and, if it is above 0, dropping everything. What
    raises an exception there is left alone. What has the name or parts of an attention or a sparse step, but not the structure,
    is listed as left alone, too.

    All of this happens before the first swap, on shallow copies without hooks, and leaves parameters, modes and random state as
    they were. A swap changes the class of the module object and nothing else. So its parameters, buffers and state-dict names,
    references to it, optimisers over it, hooks on it and copies made of it later all stay valid; so do the official keyword
    arguments ``return_attention`` and ``return_key``. Children with hooks, adapters or other additions, attached before or
    later, are called one by one instead of fused (``crate_kernels.fusing``).

    Returns:
        What was swapped and what was left alone, and why. ``print`` it; ``undo()`` it.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    done, decided, alike = Acceleration(), [], {}
    for name, module in model.named_modules():
        if isinstance(module, tuple(KINDS)):
            continue
        obstacles: dict[str, None] = {}
        for target in _candidates(module):
            obstacle = _obstacle(module, target)
            if obstacle is None:
                decided.append((name, module, target))
                break
            obstacles[obstacle] = None
        else:
            if obstacles:
                done.left_alone[name] = "; ".join(obstacles)
            elif reason := _likeness(module):
                alike[name] = reason
    known = [*done.left_alone, *(name for name, *_ in decided)]
    for name, reason in alike.items():
        # Of what lies inside one another, the innermost: a block is not an attention because it holds one.
        if not any(other.startswith(f"{name}." if name else "") for other in (*known, *alike) if other != name):
            done.left_alone[name] = reason
    for name, module, target in decided:
        done._originals.append((module, type(module)))
        module.__class__ = target
        done.swapped[name] = target
    return done


def _candidates(module: nn.Module) -> list[type[nn.Module]]:
    """The classes of ours that ``module`` has the structure of."""
    return [target for target, kind in KINDS.items() if all(_has(module, name) for name in kind.attributes)]


def _has(module: nn.Module, name: str) -> bool:
    """As hasattr, without running a property of the model's."""
    own = vars(module), module._parameters, module._buffers, module._modules
    return any(name in held for held in own) or hasattr(type(module), name)


def _likeness(module: nn.Module) -> str | None:
    """Why ``module``, which has the structure of none of ours, is none, if it looks like one."""
    name, kinds = type(module).__name__, []
    softmax = any(isinstance(child, (nn.Softmax, nn.MultiheadAttention)) for child in module.children())
    if _ATTENTION.search(name) or softmax or _has(module, "qkv"):
        kinds = [MSSA, CausalMSSAOfGPT]
    elif _SPARSE_STEP.search(name) or any(_has(module, number) for number in _NUMBERS):
        kinds = [ISTA, OvercompleteISTA]
    if not kinds or not any(True for _ in module.parameters()):
        return None
    nearest = max(kinds, key=lambda kind: sum(_has(module, part) for part in KINDS[kind].attributes))
    lacks = [part for part in KINDS[nearest].attributes if not _has(module, part)]
    return f"{name} has no {', '.join(lacks)}, by which {nearest.__name__} is known"


def _obstacle(module: nn.Module, target: type[nn.Module]) -> str | None:
    """Why ``module`` cannot become a ``target``, in words; None where nothing stands in the way."""
    try:
        return _change(module, target) or _difference(module, target)
    except Exception as error:  # the model's own code runs here, and may do anything
        return textwrap.shorten(f"calling it failed: {type(error).__name__}: {error}", 120)


def _change(module: nn.Module, target: type[nn.Module]) -> str | None:
    """What would be lost with the class of ``module``."""
    kind = KINDS[target]
    known = {*kind.attributes, *kind.optional}
    own = [*module._parameters, *module._buffers, *module._modules]
    masks = [
        name for name, buffer in module._buffers.items() if target.__name__.startswith("Causal") and _is_causal(buffer)
    ]
    if unknown := [name for name in own if name not in known and name not in masks]:
        return f"it has {', '.join(unknown)}, which {target.__name__} does not use"
    if replaced := [name for name in vars(module) if callable(getattr(target, name, None))]:
        return f"its {replaced[0]} was replaced on the instance"
    if issubclass(target, MSSA):
        twin = _twin(module, {})
        twin.__class__ = target
        if reason := twin.attention_obstacle():  # without hooks, which may go again
            return reason
    if lost := _lost_methods(type(module)):
        return f"its class defines {', '.join(lost)}, which {target.__name__} does not"
    ours, theirs = _arguments(target), _arguments(type(module))
    if theirs != ours[: len(theirs)]:
        return f"its forward takes x, {', '.join(theirs)}, which {target.__name__} does not"
    return None


def _arguments(kind: type[nn.Module]) -> list[str]:
    """Of its forward, without the module and the tokens."""
    return list(inspect.signature(kind.forward).parameters)[2:]


def _is_causal(buffer: Tensor | None) -> bool:
    """A square of ones on and below its diagonal, or of -inf above it."""
    if buffer is None or buffer.ndim < 2 or buffer.shape[-1] != buffer.shape[-2]:
        return False
    square = buffer.reshape(-1, *buffer.shape[-2:])[0]
    kept = square == 0 if square.is_floating_point() and bool(square.isinf().any()) else square != 0
    return buffer.numel() == square.numel() and torch.equal(kept, torch.ones_like(kept).tril())


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
    state, kind = dict(module.named_parameters(remove_duplicate=False)), KINDS[target]
    name, axis = kind.width
    weight = attrgetter(name)(module)
    if not isinstance(weight, Tensor):
        return f"its {name} is no tensor, but a {type(weight).__name__}"

    def random(shape: tuple[int, ...], scale: float, like: Tensor) -> Tensor:
        numbers = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        return (scale * numbers).to(like.device, like.dtype)

    values = {
        name: random(v.shape, kind.gain * v.shape[-1] ** -0.5, v) if v.numel() > 1 and v.is_floating_point() else v
        for name, v in state.items()  # a single number, such as lambda, keeps its value
    }
    most = min([kind.tokens, *(mask.shape[-1] for mask in module._buffers.values() if _is_causal(mask))])
    x = random((2, most, weight.shape[axis]), 1.0, weight)
    devices = {value.device for value in state.values() if value.is_cuda}
    with torch.random.fork_rng(devices), torch.autocast(weight.device.type, enabled=False), use("composed"), unsaid():
        for words, training, dropping, flags in _trials(module):
            expected, changed = _run(module, type(module), values, x, training, dropping, flags)
            found, _ = _run(module, target, values, x, training, dropping, flags)
            if changed:
                return f"its forward changes its own {', '.join(changed)}"
            if not isinstance(expected, Tensor) or (expected.shape, expected.dtype) != (found.shape, found.dtype):
                return f"it does not compute {target.__name__}{words}: its result is of another type, shape or dtype"
            off, bound = (found - expected).norm(), torch.finfo(weight.dtype).eps ** 0.75 * expected.norm()
            # Not <=, which all zeros would pass: behind a threshold above all tokens nothing can be told apart.
            if not (off < bound or (dropping and torch.equal(found, expected))):
                return f"it does not compute {target.__name__}{words}"
    return None


def _trials(module: nn.Module) -> Iterator[tuple[str, bool, str | None, dict[str, Any]]]:
    """What to run: words for it, training mode, the child whose dropout drops everything (the others drop nothing), arguments."""
    yield " in training mode", True, None, {}
    yield " in evaluation mode", False, None, {}
    for name, child in module.named_modules():
        if type(child) is nn.Dropout and child.p > 0:
            yield f" with its dropout ({name})", True, name, {}
    for argument in _arguments(type(module)):
        yield f" with {argument}", False, None, {argument: True}


def _run(
    module: nn.Module,
    kind: type[nn.Module],
    values: dict[str, Tensor],
    x: Tensor,
    training: bool,
    dropping: str | None,
    flags: dict[str, Any],
) -> tuple[object, list[str]]:
    """What ``module`` as a ``kind`` makes of x with these parameters, and the attributes that it sets while it does."""
    twin = _twin(module, {})
    twin.__class__ = kind
    for name, child in twin.named_modules():
        child.training = training
        if type(child) is nn.Dropout:
            child.p = float(name == dropping)
    before = dict(vars(twin))
    out = functional_call(twin, values, (x.clone(),), flags, tie_weights=False)
    return out, [name for name, value in vars(twin).items() if before.get(name, vars) is not value]


def _twin(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of a module and its children that shares their tensors, without hooks: what is done to it does not reach them."""
    if module not in made:
        made[module] = twin = object.__new__(type(module))
        own = ("_parameters", "_buffers")
        vars(twin).update(
            vars(module), **{hooks: {} for hooks in HOOKS}, **{name: dict(vars(module)[name]) for name in own}
        )
        children = module._modules.items()
        twin._modules = {name: None if child is None else _twin(child, made) for name, child in children}
    return made[module]
