"""Which implementation runs, and why: the one place that looks at the device.

Every operator has three. ``reference`` states the meaning in the official order of operations; ``composed`` is the faster
algebra in standard PyTorch calls; ``triton`` is our kernels. Left alone, CUDA tensors take ``triton`` where its kernels can
run (not float64, not heads wider than 128), and everything else takes ``composed``. ``use`` or the environment variable
``CRATE_KERNELS_IMPL`` forces one for every operator. Which of PyTorch's libraries then multiplies for ``composed``, ``matmul``
says.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

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


# A plain global, not a ContextVar: torch.compile guards on globals and cannot read context variables.
_forced = _checked(os.environ.get("CRATE_KERNELS_IMPL", ""), "environment variable CRATE_KERNELS_IMPL")


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Force one implementation for every operator inside the ``with`` block (or the decorated function).

    Args:
        implementation: "reference", "composed" or "triton"; "auto" gives the choice back to device and dtype.

    The choice is made when an operator is called; its backward runs the same implementation, wherever it happens.
    It holds for the whole process, all threads included.

    Raises:
        ValueError: ``implementation`` is none of these names.
        RuntimeError: raised by the operators, when the forced implementation cannot run on their tensors.
    """
    global _forced
    previous, _forced = _forced, _checked(implementation, "implementation")
    try:
        yield
    finally:
        _forced = previous


def choose(tensor: Tensor, dtype: torch.dtype, obstacle: str | None = None) -> str:
    """The implementation for an operator whose input is ``tensor`` and whose products run in ``dtype``.

    ``obstacle`` says in words what about the operator's own arguments its Triton kernels cannot take, if anything.

    Raises:
        RuntimeError: the forced implementation cannot run here; there is no silent fallback.
    """
    device = tensor.device.type
    if obstacle is None and dtype not in TRITON_DTYPES:
        obstacle = f"its kernels take float32, float16 and bfloat16, not {dtype}"
    elif obstacle is None and device != "cuda" and not (device == "cpu" and _INTERPRETING):
        obstacle = f"its kernels need CUDA tensors (or TRITON_INTERPRET=1 on the CPU), got a tensor on {device}"
    elif obstacle is None and not _TRITON_INSTALLED:
        obstacle = "the triton package is not installed"
    if _forced == "triton" and obstacle:
        raise RuntimeError(f"the triton implementation was forced, but {obstacle}")
    if _forced is not None:
        return _forced
    # Triton's interpreter proves kernels on a CPU; it is never what a CPU should run.
    return "triton" if device == "cuda" and obstacle is None else "composed"


def load(operator: str, implementation: str) -> ModuleType:
    """The module ``crate_kernels.<operator>.<implementation>``, imported only now: nobody pays for a path not taken."""
    return importlib.import_module(f"crate_kernels.{operator}.{implementation}")
