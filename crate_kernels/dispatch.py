"""Which implementation runs, and why: the one place that looks at the device.

Every operator has three. ``reference`` states the meaning in the official order of operations; ``composed`` is the faster
algebra in standard PyTorch calls; ``triton`` is our kernels. Left alone, CUDA tensors take ``triton`` where its kernels can
run (not float64, not heads wider than 128), and everything else takes ``composed``. ``use`` or the environment variable
``CRATE_KERNELS_IMPL`` forces one for every operator. Which of PyTorch's libraries multiplies for ``composed`` is decided in
``library_products``.

Some surroundings and inputs of a call know PyTorch's own operators only: the transforms of ``torch.func``, forward-mode
derivatives, ``torch.export``, and subclasses of Tensor, such as quantised or distributed ones. There kernels are refused, and
``reference`` runs in place of ``composed``: the same formula, in PyTorch's own operators.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from crate_kernels.private_torch import carried_into_backward, is_transformed, set_carried

IMPLEMENTATIONS = ("reference", "composed", "triton")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Read once, at import: torch.compile can then trace the choice, and Triton reads its variable no later than this.
_TRITON_INSTALLED = find_spec("triton") is not None
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _checked(name: str, source: str) -> str | None:
    if name in ("", "auto"):
        return None
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{source}: expected one of {', '.join(IMPLEMENTATIONS)} or auto, got {name!r}")
    return name


_FROM_ENVIRONMENT = _checked(os.environ.get("CRATE_KERNELS_IMPL", ""), "environment variable CRATE_KERNELS_IMPL")


class _Forced(threading.local):
    """The implementation that this thread forces. Set here, not in the class: torch.compile guards on instances only."""

    def __init__(self) -> None:
        self.implementation = _FROM_ENVIRONMENT


_forced = _Forced()
# With CUDA tensors, what a checkpoint computes again in the backward runs in a thread of autograd. PyTorch passes some state of
# the thread that called ``backward`` on to it, and the forced implementation goes the same way; torch.compile cannot trace that.
_CARRIED = f"{__package__}.implementation"


def _force(implementation: str | None) -> None:
    _forced.implementation = implementation
    if not torch.compiler.is_compiling():
        set_carried(_CARRIED, implementation)


def _forced_here() -> str | None:
    if torch.compiler.is_compiling():
        return _forced.implementation
    return carried_into_backward(_CARRIED, _forced.implementation)


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Force one implementation for every operator inside the ``with`` block (or the decorated function).

    Args:
        implementation: "reference", "composed" or "triton"; "auto" gives the choice back to device and dtype.

    The choice is made when an operator is called. Its backward runs the same implementation, inside the block or not, and so
    does what ``recompute=True`` computes again. But ``torch.utils.checkpoint`` calls operators again in the backward. So either
    call ``backward`` inside the block too, or tell the checkpoint:
    ``checkpoint(f, x, use_reentrant=False, context_fn=lambda: (nullcontext(), use("composed")))``. Otherwise PyTorch raises
    CheckpointError if the two implementations keep different tensors.

    Like ``torch.no_grad`` it holds for the calling thread, and for a backward that this thread calls. A thread that is started
    inside the block begins with what the environment variable says.

    Raises:
        ValueError: ``implementation`` is none of these names.
        RuntimeError: raised by the operators, when the forced implementation cannot run on their tensors.
    """
    name, previous = _checked(implementation, "implementation"), _forced_here()
    _force(name)
    try:
        yield
    finally:
        _force(previous)


def plain_calls_only() -> str | None:
    """Why operators of our own cannot run here, in words; None where they can."""
    if is_transformed():
        return "its kernels have no vmap, no torch.func.grad and no forward-mode derivative"
    if torch.compiler.is_exporting():
        return "torch.export is to keep PyTorch's own operators only"
    return None


def is_plain(tensor: object) -> bool:
    """A tensor of no subclass. Subclasses know only PyTorch's own operators; a fake tensor behaves as the one it stands for."""
    return type(tensor) in _PLAIN


_PLAIN = (Parameter, Tensor, FakeTensor)


def choose(
    operator: str,
    tensor: Tensor,
    dtype: torch.dtype,
    obstacle: str | None = None,
    weights: Iterable[Tensor | None] = (),
) -> str:
    """The implementation that an operator runs on its arguments.

    Args:
        operator: its name, for error messages.
        tensor: its input.
        dtype: the dtype that it multiplies in.
        obstacle: why its Triton kernels cannot take its other arguments, in words; None if they can.
        weights: its other tensors.

    Raises:
        RuntimeError: the forced implementation cannot run here; there is no silent fallback.
    """
    forced, plain = _forced_here(), plain_calls_only()
    for one in (tensor, *weights):
        if one is not None and type(one) not in _PLAIN:
            plain = plain or f"its kernels take no {type(one).__name__}"
    obstacle = obstacle or obstacle_to_kernels(tensor, dtype) or plain
    if forced == "triton" and obstacle:
        raise RuntimeError(
            f'{operator}: the triton implementation was forced, but {obstacle}; crate_kernels.use("composed") does it'
        )
    # On a CPU kernels run in Triton's interpreter, which is for tests: only where it is forced.
    chosen = forced or ("triton" if tensor.device.type == "cuda" and obstacle is None else "composed")
    return "reference" if chosen == "composed" and plain else chosen


def obstacle_to_kernels(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run on ``tensor`` with products in ``dtype``, in words; None where they can."""
    device = tensor.device.type
    if dtype not in TRITON_DTYPES:
        return f"its kernels take float32, float16 and bfloat16, not {dtype}"
    if device != "cuda" and not (device == "cpu" and _INTERPRETING):
        return f"its kernels need CUDA tensors (or TRITON_INTERPRET=1 on the CPU), got a tensor on {device}"
    return None if _TRITON_INSTALLED else "the triton package is not installed"


def load(operator: str, implementation: str) -> ModuleType:
    """The module ``crate_kernels.<operator>.<implementation>``, imported when it is first needed."""
    return importlib.import_module(f"{__package__}.{operator}.{implementation}")
