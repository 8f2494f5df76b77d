"""The options of commands that compute features of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from crate_mae.cli.parsers import add_device
from crate_mae.evaluation import FeatureSpec


def add_features(parser: ArgumentParser) -> None:
    """Add the options that say which features are computed; `spec_of` reads them."""
    parser.add_argument(
        "--pool", default="mean", choices=["mean", "cls", "both"], help="Patch tokens, class token, or both."
    )
    parser.add_argument(
        "--layer",
        type=int,
        default=-1,
        help="Of the encoder: 1, 2, ... or back from its end -1, -2, whose tokens are taken.",
    )
    parser.add_argument("--last", type=int, default=1, help="So many layers up to that one, joined.")
    parser.add_argument("--norm", type=bool, default=True, help="After the final norm; else as the layers leave them.")


def add_computing(parser: ArgumentParser) -> None:
    """Add the options that say where and how features are computed, except the batch size."""
    add_device(parser)
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="As --run.precision of pretrain.",
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads that compute; 0 leaves the number to torch."
    )
    parser.add_argument("--num_workers", type=str, default="auto", help='Processes that load images, or "auto".')


def spec_of(asked: Namespace, depths: Sequence[int]) -> FeatureSpec:
    """The features that the options ask for. Options count layers from 1, as pictures do.

    Args:
        asked: the options.
        depths: how many layers the encoder of each model has.

    Raises:
        ValueError: a model lacks the layers.
    """
    for depth in depths:
        if not (1 <= asked.layer <= depth or -depth <= asked.layer <= -1):
            raise ValueError(f"--layer: expected 1 to {depth}, or -1 to -{depth} from the end, got {asked.layer}")
        layers = asked.layer if asked.layer > 0 else depth + 1 + asked.layer
        if not 1 <= asked.last <= layers:
            raise ValueError(
                f"--last: expected 1 to {layers}, the layers up to --layer {asked.layer}, got {asked.last}"
            )
    layer = asked.layer - 1 if asked.layer > 0 else asked.layer
    return FeatureSpec(asked.pool, layer, asked.last, asked.norm)


def number_or_auto(asked: Namespace, name: str) -> int | Literal["auto"]:
    """The number that the option --`name` says, or "auto".

    Raises:
        ValueError: it is neither.
    """
    value: str = asked[name]
    if value == "auto":
        return "auto"
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"--{name}: expected a whole number, or auto, got {value!r}")
    return int(value)
