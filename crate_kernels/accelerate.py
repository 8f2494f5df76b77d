"""Makes a model faster that exists already, by swapping its official modules for ours in place."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from inspect import getattr_static
from typing import NamedTuple

from torch import nn

from crate_kernels import trials
from crate_kernels.nn import ISTA, MSSA, DecoderStep, OvercompleteISTA
from crate_kernels.renamed import CausalMSSA, CausalMSSAOfGPT, ISTAOfD, OvercompleteISTAOfCLIPA, is_causal_mask


class Kind(NamedTuple):
    """How to recognise a module that one of our classes can replace, and what to try both on.

    attributes: the module has all of these, with any values.
    width: the parameter, and which of its dimensions, that has the width of the tokens.
    optional: further parameters, children and settings that the module may have: our class uses them or does not need them.
    tokens: how many tokens both are tried on.
    gain: they are tried with random parameters, whose rows have this norm.
    """

    attributes: tuple[str, ...]
    width: tuple[str, int]
    optional: tuple[str, ...] = ()
    tokens: int = 20
    gain: float = 1.0


_OFFICIAL = Kind(
    ("heads", "scale", "qkv", "to_out"),
    ("qkv.weight", 1),
    ("attend", "dropout", "dim_head"),
    tokens=130,  # enough to notice a window of 64 on either side
    gain=0.25,  # so small that the softmax is spread over all tokens, instead of on the token itself
)
_OF_GPT = _OFFICIAL._replace(
    attributes=("n_head", "n_embd", "c_attn", "c_proj"),
    width=("c_attn.weight", 1),
    optional=("attn_dropout", "resid_dropout", "flash"),
)

# Classes are tried in this order, and the first that computes the same as the module is taken.
KINDS = {
    MSSA: _OFFICIAL,
    CausalMSSA: _OFFICIAL,
    CausalMSSAOfGPT: _OF_GPT,
    ISTA: Kind(("step_size", "lambd", "weight"), ("weight", 1)),
    # The official decoder step has numbers that it does not use.
    DecoderStep: Kind(("step_size", "lambd", "weight"), ("weight", 1)),
    ISTAOfD: Kind(("eta", "lmbda", "D"), ("D", 1)),
    OvercompleteISTA: Kind(("eta", "lmbda", "D"), ("D", 0), ("D1", "decouple")),
    OvercompleteISTAOfCLIPA: Kind(("eta", "lmbda", "c_fc", "c_proj"), ("c_fc", 0), ("decouple",)),
}

# Names of classes, children and numbers by which a module that has none of these structures still looks like one of ours.
_ATTENTION = re.compile("attention|attn|mssa|tssa|cbsa", re.IGNORECASE)
_SPARSE_STEP = re.compile("ista|feed_?forward|sparsif|proximal", re.IGNORECASE)
_PROJECTIONS = re.compile("qkv|^(query|key|value|in_proj)$", re.IGNORECASE)
_NUMBERS = "step_size", "lambd", "lmbda", "lambda_", "lam", "eta", "threshold"


@dataclass
class Acceleration:
    """What ``accelerate`` did. ``print`` shows it as a table.

    Attributes:
        swapped: for each swapped module, by its name in the model, its class now.
        left_alone: for each module that looks like one of ours and was not swapped, by its name, the reason.
    """

    swapped: dict[str, type[nn.Module]] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    _originals: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every swapped module its official class back; parameters keep their current values.

        Raises:
            RuntimeError: a module's class was changed since, by a parametrization, for example. Then nothing is undone.
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
            reason = _now(module)
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

    The same structure may compute something else. So a module is swapped only if it has no parameters, children, methods or
    arguments that a swap would lose, if its forward reads no settings that ours does not, and if both compute the same. For that
    both are called on random tokens with random parameters, in float64, and their outputs and gradients are compared: for small
    and large values, one token and 300, in training and evaluation mode, with each argument, and with each dropout at 0 and 1.
    This is no proof for every input: a module that behaves differently beyond 300 tokens would be swapped. A module that raises
    an exception is left alone. Modules that have only the name or some parts of an attention or a sparse step are listed as left
    alone, too.

    All of this happens before the first swap, on shallow copies without hooks, and leaves parameters, modes and random state as
    they were. A swap changes the class of the module object and nothing else. So its parameters, buffers and state-dict names,
    references to it, optimisers over it, hooks on it and later copies of it all stay valid, and so do the official keyword
    arguments ``return_attention`` and ``return_key``. Children that have hooks, adapters or other additions, attached before or
    later, are called one by one instead of fused (``crate_kernels.fusing``). A wrapper around the projection that has no
    ``weight`` of its own hides the structure: put it there after the swap.

    Returns:
        What was swapped and what was left alone, and why. ``print`` it; ``undo()`` it.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    done, decided, ours, alike = Acceleration(), [], [], {}
    tried: dict[object, Obstacle | None] = {}  # layers that are alike are tried once
    for name, module in model.named_modules():
        if isinstance(module, tuple(KINDS)):
            ours.append(name)
            continue
        obstacles: list[Obstacle] = []
        for target in _candidates(module):
            key = target, trials.signature(module)
            if key not in tried:
                tried[key] = _obstacle(module, target)
            if (obstacle := tried[key]) is None:
                decided.append((name, module, target))
                break
            obstacles.append(obstacle)
        else:
            if obstacles:  # the reason of the first class that it was tried as, else of the first class
                done.left_alone[name] = max(obstacles, key=lambda obstacle: obstacle.was_tried).reason
            elif reason := _likeness(module):
                alike[name] = reason
    known = [*ours, *done.left_alone, *(name for name, *_ in decided)]
    for name, reason in alike.items():
        # Only the innermost is listed: a block that contains an attention is not an attention.
        if not any(other.startswith(f"{name}." if name else "") for other in (*known, *alike) if other != name):
            done.left_alone[name] = reason
    for name, module, target in decided:
        done._originals.append((module, type(module)))
        module.__class__ = target
        done.swapped[name] = target
    return done


def _now(module: nn.Module) -> str | None:
    """Why a swapped module would not run fused now, in words; None if it would."""
    try:
        return module.obstacle() if isinstance(module, MSSA) else None
    except Exception as error:  # whatever was done to it since
        return f"{type(error).__name__}: {error}"


def _candidates(module: nn.Module) -> list[type[nn.Module]]:
    """Our classes whose structure ``module`` has."""
    return [target for target, kind in KINDS.items() if all(_has(module, name) for name in kind.attributes)]


def _has(module: nn.Module, name: str) -> bool:
    """Like hasattr, but without running a property of the module."""
    own = vars(module), module._parameters, module._buffers, module._modules
    return any(name in held for held in own) or hasattr(type(module), name)


def _likeness(module: nn.Module) -> str | None:
    """What ``module`` lacks to have the structure of one of ours, in words; None if it does not look like one of ours."""
    name = type(module).__name__
    kinds: list[type[nn.Module]] = []
    softmax = any(isinstance(child, (nn.Softmax, nn.MultiheadAttention)) for child in module.children())
    if _ATTENTION.search(name) or softmax or any(_PROJECTIONS.search(child) for child, _ in module.named_children()):
        kinds = [MSSA, CausalMSSAOfGPT]
    elif _SPARSE_STEP.search(name) or any(_has(module, number) for number in _NUMBERS):
        kinds = [ISTA, OvercompleteISTA]
    if not kinds or not any(True for _ in module.parameters()):
        return None
    nearest = max(kinds, key=lambda kind: sum(_has(module, part) for part in KINDS[kind].attributes))
    lacks = [part for part in KINDS[nearest].attributes if not _has(module, part)]
    return f"{name} has no {', '.join(lacks)}, by which {nearest.__name__} is known"


class Obstacle(NamedTuple):
    """Why a module cannot become one of ours, in words; and whether it was called and compared."""

    reason: str
    was_tried: bool


def _obstacle(module: nn.Module, target: type[nn.Module]) -> Obstacle | None:
    """Why ``module`` cannot become a ``target``; None if it can."""
    kind, was_tried = KINDS[target], False
    try:
        if reason := _change(module, target):
            return Obstacle(reason, was_tried)
        was_tried = True
        reason = trials.difference(module, target, kind.width, kind.tokens, kind.gain)
    except Exception as error:  # the model's own code runs here, and may do anything
        reason = textwrap.shorten(f"calling it failed: {type(error).__name__}: {error}", 120)
    return Obstacle(reason, was_tried) if reason else None


def _change(module: nn.Module, target: type[nn.Module]) -> str | None:
    """What ``module`` would lose as a ``target``, in words; None if nothing."""
    kind = KINDS[target]
    known = {*kind.attributes, *kind.optional}
    own = [*module._parameters, *module._buffers, *module._modules]
    masks = [name for name, mask in module._buffers.items() if issubclass(target, CausalMSSA) and is_causal_mask(mask)]
    if unknown := [name for name in own if name not in known and name not in masks]:
        return f"it has {', '.join(unknown)}, which {target.__name__} does not use"
    if replaced := [name for name in vars(module) if callable(getattr(target, name, None))]:
        return f"its {replaced[0]} was replaced on the instance"
    as_ours = trials.without_hooks(module, target) if issubclass(target, MSSA) else None
    if isinstance(as_ours, MSSA) and (reason := as_ours.attention_obstacle()):
        return reason
    if read := sorted(_settings_read(module) - known):
        return f"its forward reads {', '.join(read)}, which {target.__name__} does not"
    if lost := _lost_methods(type(module)):
        return f"its class defines {', '.join(lost)}, which {target.__name__} does not"
    ours, theirs = trials.arguments(target), trials.arguments(type(module))
    if theirs != ours[: len(theirs)]:
        return f"its forward takes x, {', '.join(theirs)}, which {target.__name__} does not"
    return None


def _settings_read(module: nn.Module) -> set[str]:
    """Attributes named in the code of its forward that are numbers, flags or strings."""
    code = getattr(type(module).forward, "__code__", None)
    named = {name: getattr_static(module, name, None) for name in (code.co_names if code else ())}
    return {name for name, value in named.items() if isinstance(value, (bool, int, float, str))} - {"training"}


def _lost_methods(kind: type[nn.Module]) -> list[str]:
    """Public methods and properties that ``kind`` adds to nn.Module, and those of nn.Module that it overrides."""

    def matters(name: str) -> bool:
        overrides = hasattr(nn.Module, name) and not name.startswith("__")
        return not name.startswith("_") or overrides or name == "__call__"

    bases = [vars(base) for base in kind.__mro__ if base not in nn.Module.__mro__]
    methods = {name for base in bases for name, value in base.items() if hasattr(value, "__get__") and matters(name)}
    return sorted(methods - {"forward", "extra_repr"})
