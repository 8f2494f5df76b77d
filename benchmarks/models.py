"""What programs about whole models share: how a model is named on the command line, and its bytes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import nn

import crate_mae
from benchmarks.records import in_one_line
from crate_mae.config import ClassifierConfig, ModelConfig
from crate_mae.registry import MODELS


def add_model_arguments(parser: argparse.ArgumentParser, models: Iterable[str] = MODELS) -> None:
    """Those that every program about whole models has; ``models`` are the names of those that it is about."""
    names = list(models)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help=f"torch device (here: {default_device})")
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="append the results as JSON lines")


def check_model(arguments: argparse.Namespace) -> None:
    """``--model`` with ``--set``, made without memory.

    Raises:
        SystemExit: the overrides do not make a model.
    """
    overrides = dict(arguments.set)
    try:
        with torch.device("meta"):
            crate_mae.create_model(arguments.model, **overrides)
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


def bytes_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
