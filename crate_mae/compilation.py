"""What torch.compile needs of a machine."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import torch


def obstacle_to_compiling(device: torch.device) -> str | None:
    """What this machine lacks for torch.compile on the device, in words; None if nothing."""
    on_cuda = device.type == "cuda"
    if on_cuda and find_spec("triton") is None:
        return "torch.compile needs Triton on a GPU"
    language, variable, usual = ("C", "CC", ("gcc", "clang")) if on_cuda else ("C++", "CXX", ("g++", "clang++"))
    if any(shutil.which(name) for name in (os.environ.get(variable), *usual) if name):
        return None
    return f"torch.compile needs a {language} compiler on PATH, and there is none"
