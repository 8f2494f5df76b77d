"""When a module may compute in one fused call what its children do.

It may if its children are of the plain classes, have the expected settings, and have nothing attached (hooks, parametrizations, a
replaced forward). Otherwise it calls its children one by one, as the official modules do, and warns once with the reason. This is
checked at each call, since something may be attached at any time; it costs a few dictionary look-ups a child. As everywhere in
PyTorch, ``torch.compile`` checks when it traces.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils.module_tracker import ModuleTracker

from crate_kernels.dispatch import is_plain
from crate_kernels.dtypes import is_autocast
from crate_kernels.products.norm_folding import NormOptions, norm_options

# The forward of each class as it was when this was imported, or when ``known`` decorated the class.
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward
    for kind in (nn.Conv2d, nn.Dropout, nn.Identity, nn.LayerNorm, nn.Linear, nn.ModuleList, nn.Sequential, nn.Softmax)
}
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_HOOKS_OF_ALL_MODULES = [getattr(_module, f"_global{hooks}") for hooks in HOOKS]


def obstacle(name: str, module: nn.Module | None, kind: type[nn.Module]) -> str | None:
    """Why ``module`` must be called as it is, in words; None where it is a plain ``kind`` with nothing attached."""
    if type(module) is not kind:
        return f"{name} is of class {type(module).__name__}, not a plain {kind.__name__}"
    if kind.forward is not _FORWARDS.get(kind):
        return f"the forward of {kind.__name__} was replaced"
    return attached(name, module)


def known(kind: type[nn.Module]) -> type[nn.Module]:
    """Decorates a class that ``obstacle`` may be asked about, and remembers its forward."""
    _FORWARDS[kind] = kind.forward
    return kind


def attached(name: str, module: nn.Module) -> str | None:
    """What is attached to ``module`` that runs when it is called, in words, if anything."""
    own = module.__dict__
    # One expression, not a loop: this is asked of every child at every call.
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return f"{name} has hooks"
    return f"{name} has a replaced forward" if "forward" in own else None


def linear_obstacle(name: str, module: nn.Module | None) -> str | None:
    """As ``obstacle``, for a Linear whose weight goes into a kernel: the weight must be plain too, not a quantised one, say."""
    if reason := obstacle(name, module, nn.Linear):
        return reason
    assert isinstance(module, nn.Linear)
    weight = module.weight
    return None if is_plain(weight) else f"{name} has a weight of class {type(weight).__name__}"


def hooks_of_all_modules() -> str | None:
    """Says in words that there are hooks on all modules; None where there are none.

    Those of ``ModuleTracker``, which PyTorch's FLOP counter uses, are left out: they change nothing, and the counter should see
    what runs without it.
    """
    forward, before_forward, backward, before_backward = _HOOKS_OF_ALL_MODULES
    if not (forward or before_forward or backward or before_backward):
        return None
    hooks = (hook for registered in _HOOKS_OF_ALL_MODULES for hook in registered.values())
    if all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks):
        return None
    return "there are hooks on all modules (torch.nn.modules.module.register_module_...)"


def norm_obstacle(norm: nn.Module, x: Tensor) -> str | None:
    """Why ``norm`` cannot be folded into a product of x [..., width], in words; None if it can."""
    if reason := obstacle("norm", norm, nn.LayerNorm):
        return reason
    assert isinstance(norm, nn.LayerNorm)
    weight = norm.weight
    if weight is None:
        return "norm has no weight"
    if not is_plain(weight):
        return f"norm has a weight of class {type(weight).__name__}"
    if len(norm.normalized_shape) != 1:
        return f"norm normalizes over {len(norm.normalized_shape)} dimensions"
    if weight.dtype != x.dtype and not is_autocast(x):
        return f"norm is in {weight.dtype} and its tokens in {x.dtype}"
    return None


def fold(owner: str, norm: nn.Module | None, x: Tensor) -> tuple[Tensor, NormOptions]:
    """x, and ``norm`` as operators take it. A norm that cannot be folded into a product is called: then norm(x), and nothing."""
    if norm is None:
        return x, {}
    if reason := norm_obstacle(norm, x) or hooks_of_all_modules():
        say(owner, reason)
        return norm(x), {}
    assert isinstance(norm, nn.LayerNorm)  # norm_obstacle has seen that
    return x, norm_options(norm)


_said: set[str] = set()


def say(owner: str, reason: str) -> None:
    """Warn, once a process for each reason, that a module takes the slower path."""
    if torch.compiler.is_compiling() or reason in _said:
        return
    _said.add(reason)
    warnings.warn(
        f"{owner}: {reason}, so modules are called one by one rather than fused: the same computation, more slowly",
        stacklevel=2,
    )


@contextmanager
def unsaid() -> Iterator[None]:
    """A block in which modules are only tried out: ``say`` gives no warnings there, and will give them later."""
    said = set(_said)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    _said.intersection_update(said)
