"""Faster layers for a model that exists already: its official modules, swapped in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from crate_kernels.ista import reference as ista_reference
from crate_kernels.mssa import reference as mssa_reference
from crate_kernels.nn import ISTA, MSSA


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
            module.__class__ = original
        self.swapped.clear()
        self._originals.clear()

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)} modules"]
        lines += [f"  {name}: {kind.__name__}" for name, kind in self.swapped.items()]
        if self.left_alone:
            lines.append(f"left {len(self.left_alone)} alone")
            lines += [f"  {name}: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Acceleration:
    """Swap the attention and sparse-step modules of an official CRATE or CRATE-MAE model for ours, in place.

    Modules are found by structure, wherever their classes were imported from: an attention has ``heads``, ``scale``, one
    projection ``qkv``, a softmax ``attend`` and ``to_out``; a sparse step has a square ``weight``, ``step_size`` and ``lambd``.
    Structure is not meaning (CRATE-MAE's decoder step looks like ISTA and is linear), so each candidate is also called once on
    a few random tokens and swapped only if it computes what our module computes.

    A swap changes the class of the module object and nothing else. So its parameters, buffers and state-dict names, references
    to it, optimisers over it, hooks on it and copies made of it later all stay valid; so do the official
    keyword arguments ``return_attention`` and ``return_key``.

    Returns:
        What was swapped and what was left alone, and why. ``print`` it; ``undo()`` it.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    done = Acceleration()
    for name, module in model.named_modules():
        target = _target(module)
        if target is None:
            continue
        if reason := _obstacle(module, target):
            done.left_alone[name] = reason
            continue
        done._originals.append((module, type(module)))
        module.__class__ = target
        done.swapped[name] = target
    return done


def _target(module: nn.Module) -> type[nn.Module] | None:
    """The class of ours that ``module`` has the structure of."""
    if isinstance(module, (MSSA, ISTA)):
        return None
    if all(hasattr(module, name) for name in ("heads", "scale", "qkv", "attend", "to_out")):
        return MSSA
    weight = getattr(module, "weight", None)
    is_square = isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == weight.shape[1]
    return ISTA if is_square and hasattr(module, "step_size") and hasattr(module, "lambd") else None


def _obstacle(module: nn.Module, target: type[nn.Module]) -> str | None:
    """Why ``module`` cannot become a ``target``, in words; None where nothing stands in the way."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    children = [child for child in module.modules() if child is not module]
    if any(child._forward_hooks or child._forward_pre_hooks or child._backward_hooks for child in children):
        return "a module inside it has hooks, which one fused call would pass by"
    if any(isinstance(child, nn.Dropout) and child.p > 0 for child in children):
        return "its dropout is above 0, which the fused attention does not support"
    if target is MSSA:
        return _attention_obstacle(module)
    return None if _computes(module, _ista, module.weight) else "it does not compute ISTA (a linear decoder step, say)"


def _attention_obstacle(module: nn.Module) -> str | None:
    projection = module.to_out[0] if isinstance(module.to_out, nn.Sequential) else module.to_out
    if type(module.qkv) is not nn.Linear or module.qkv.bias is not None:
        return f"qkv: expected a plain Linear without bias, found {module.qkv}"
    if type(projection) not in (nn.Linear, nn.Identity):
        return f"to_out: expected a plain Linear or Identity, found {projection}"
    return None if _computes(module, _mssa, module.qkv.weight) else "it does not compute MSSA"


def _ista(module: nn.Module, x: Tensor) -> Tensor:
    return ista_reference.ista(x, module.weight, module.step_size, module.lambd, soft=False)


def _mssa(module: nn.Module, x: Tensor) -> Tensor:
    projection = module.to_out[0] if isinstance(module.to_out, nn.Sequential) else None
    weight, bias = (None, None) if projection is None else (projection.weight, projection.bias)
    return mssa_reference.mssa(x, module.qkv.weight, weight, bias, module.heads, module.scale, is_causal=False)


@torch.no_grad()
def _computes(module: nn.Module, meaning: Callable[[nn.Module, Tensor], Tensor], weight: Tensor) -> bool:
    """``module`` maps random tokens to what ``meaning`` makes of them, up to rounding."""
    generator = torch.Generator().manual_seed(0)  # its own, so that the caller's random numbers stay as they were
    x = torch.randn(2, 5, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    with torch.autocast(weight.device.type, enabled=False):
        found, expected = module.forward(x), meaning(module, x)
    if found.shape != expected.shape:
        return False
    return bool((found - expected).norm() <= torch.finfo(weight.dtype).eps ** 0.75 * expected.norm())
