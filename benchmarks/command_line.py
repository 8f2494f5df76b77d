"""Arguments that several of the programs have, and how those that make no sense are refused."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import crate_mae
from benchmarks.records import in_one_line
from crate_mae.config import ClassifierConfig, ModelConfig
from crate_mae.registry import MODELS


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


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """``--device``, ``--seed`` and ``--json``."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help=f"torch device (here: {default_device})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="append the results as JSON lines")


def add_model_arguments(parser: argparse.ArgumentParser, models: Iterable[str] = MODELS) -> None:
    """``--model``, one of the names in ``models``, and ``--set``, which overrides fields of its configuration."""
    names = list(models)
    parser.add_argument(
        "--model", default="crate_mae_base", choices=names, metavar="NAME", help=f"one of {', '.join(names)}"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        type=_override,
        metavar="NAME=VALUE",
        help="model overrides: depth=1",
    )


def check_model(name: str, overrides: Mapping[str, Any]) -> None:
    """Make the model of ``--model`` and ``--set`` once, without memory.

    Raises:
        SystemExit: the overrides do not make a model.
    """
    try:
        with torch.device("meta"):
            crate_mae.create_model(name, **overrides)
    except (TypeError, ValueError) as problem:
        words = " ".join(f"{name}={json.dumps(value)}" for name, value in overrides.items())
        raise SystemExit(f"--set {words}: {in_one_line(problem)}") from None


def _override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    known = list(dict.fromkeys(field.name for config in (ModelConfig, ClassifierConfig) for field in fields(config)))
    if name not in known:
        raise argparse.ArgumentTypeError(f"{name!r} in {text!r} is not one of {', '.join(known)}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"{value!r} in {text!r} is not a number, true, false or a [list]") from None
