"""What programs about whole models share: how a model is named on the command line, its bytes, and a step's least work."""

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
from crate_mae.config import ClassifierConfig, ModelConfig, grid_of
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


def least_flops(config: ModelConfig | ClassifierConfig, batch: int) -> int:
    """Of one step: ISTA in one product, every layer's products once forward and twice backward, attention 2 and 5.

    CRATE-alpha's sparse step is four products of four times the width. Of CRATE-MAE a quarter of the patches is kept, as it has
    it unless told otherwise, and the others are not embedded.
    """
    rows, columns = grid_of(config.image_shape, config.patch_size)
    patches, width = rows * columns, config.embed_dim
    tokens, patch = patches + 1, config.patch_size**2 * config.in_chans
    is_mae, is_alpha = isinstance(config, ModelConfig), getattr(config, "family", None) == "crate_alpha"
    layers = config.depth + (config.decoder_depth if is_mae else 0)
    layer = 3 * (2 + (4 * 4 if is_alpha else 1)) * 2 * tokens * width**2 + (2 + 5) * 2 * tokens**2 * width
    combinations = 0 if is_alpha else config.depth * 2 * 2 * width**3  # W^T W and its gradient, once a step
    embedded = int(0.25 * patches) if is_mae else patches
    embedding = 2 * 2 * embedded * width * patch  # no gradient of the images
    prediction = 3 * 2 * width * (tokens * patch if is_mae else config.num_classes)
    return batch * (layers * layer + embedding + prediction) + combinations
