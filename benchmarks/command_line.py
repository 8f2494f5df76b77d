"""Arguments that several of the programs have, and what is said of those that cannot be."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch


def device_named(name: str) -> torch.device:
    """The device that ``--device`` asks for.

    Raises:
        SystemExit: it is neither the CPU nor a CUDA device that torch finds.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise SystemExit(f"--device {name}: expected cpu, cuda or cuda:NUMBER")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(f"--device {name}: torch finds no CUDA device; --device cpu measures this machine's CPU")
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise SystemExit(f"--device {name}: expected a number below {count}, which is how many torch finds")
    return device


def make_folder(argument: str, folder: Path) -> None:
    """Make the folder of an argument where it is missing, and write to it once.

    Raises:
        SystemExit: that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        raise SystemExit(
            f"{argument}: expected a folder that can be written, got {folder}: {problem.strerror}"
        ) from None


def positive(text: str) -> int:
    """The type of an argument that counts something.

    Raises:
        ArgumentTypeError: it is no whole number of at least 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
