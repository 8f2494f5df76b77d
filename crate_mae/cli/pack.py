"""`crate-mae pack`: stores images, made small, in tar shards."""

from __future__ import annotations

import os
import re
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from crate_mae.cli.parsers import command_parser
from crate_mae.cli.settings import path_of
from crate_mae.data import parts_of
from crate_mae.data.in_processes import Stopped, usable_cores
from crate_mae.data.packing import UNREADABLE, PackSettings, pack
from crate_mae.data.unreadable import by_cause
from crate_mae.training.interrupts import stop_requests
from crate_mae.training.ownership import owned

STOPPING = b"\nstopping; a second Ctrl-C, or signal, ends it at once\n"

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


HELP = "Store images, made small, in tar shards."


def make_parser() -> ArgumentParser:
    """The parser of `pack`."""
    default = PackSettings()
    parser = command_parser(
        "Stores all images of a source, made small, in tar shards that training reads fastest: a folder for --data. "
        "If it ends before it is done, the same command goes on.",
        "Exit status 1: more images than --max_unreadable allows cannot be read, or the disk is full.",
    )
    parser.add_argument("source", metavar="SOURCE", type=str, help="Images, as --data of pretrain names them.")
    parser.add_argument("out", metavar="OUT", type=Path, help="Folder for the shards, their index and checksums.")
    parser.add_argument(
        "--short_side",
        "--short-side",
        type=int,
        default=default.short_side,
        help="Pixels; an image whose short side is longer is made smaller, and no image is enlarged.",
    )
    parser.add_argument(
        "--shard_size",
        "--shard-size",
        type=str,
        default="1GB",
        help="The most a shard has: 1GB, 500MB, 64MiB, or bytes.",
    )
    parser.add_argument("--quality", type=int, default=default.quality, help="Of the JPEGs that are written, 1 to 100.")
    parser.add_argument("--name", type=str, default=default.name, help="Of the shards, before their numbers.")
    parser.add_argument(
        "--max_unreadable",
        "--max-unreadable",
        type=float,
        default=0.01,
        help="Fraction of the images that may be left out because they cannot be read, rounded up to a whole image.",
    )
    add_workers(parser)
    parser.add_argument("--overwrite", action="store_true", help="Delete the shards in OUT and start anew.")
    return parser


def run(parser: ArgumentParser, chosen: Namespace) -> str:
    """Pack; returns what to print. Errors as of `crate_mae.data.packing.pack`, and those of opening the source."""
    from crate_mae.data.specification import is_folder, members, open_source

    asked = chosen.pack
    out = path_of(str(asked.out))
    settings = PackSettings(asked.short_side, bytes_of(asked.shard_size), asked.quality, asked.name)
    for folder in [Path(member) for member in members(asked.source) if is_folder(member)]:
        if parts := parts_of(folder):
            held = ", ".join(part.name for part in parts.values())
            one = parts["train"].name
            raise ValueError(
                f"SOURCE {folder}: it holds {held}; pack each by itself, such as {folder / one} into {out / one}"
            )
        if os.path.realpath(folder) == os.path.realpath(out):
            raise ValueError(f"OUT: expected another folder than SOURCE, got {out}; shards would lie among the images")
    source = open_source(asked.source)
    with owned(out, "OUT"), stop_requests(STOPPING) as stop:
        try:
            packed = pack(
                source,
                out,
                settings,
                workers=workers_of(asked.workers),
                max_unreadable=asked.max_unreadable,
                overwrite=asked.overwrite,
                should_stop=lambda: bool(stop),
            )
        except Stopped as error:
            raise stop.stopped(f"stopped; finished shards are kept in {out}") from error
    pace = f"{packed.images_per_second:,.1f} images/s" if packed.images_per_second else "all there already"
    lines = [
        f"{packed.images:,} images in {len(packed.shards):,} shards of {packed.size / 1e6:,.1f} MB together "
        f"({pace}); train on them with --data {out}",
        *source.remarks(),
    ]
    if packed.unreadable:
        lines.append(
            f"{len(packed.unreadable):,} cannot be read and are left out ({by_cause(packed.unreadable)}); "
            f"{out / UNREADABLE} lists them"
        )
    return "\n".join(lines)


def add_workers(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, help="Processes; by default one for each core. With 0 the command's own does all."
    )


def workers_of(asked: int | None) -> int:
    """How many processes to start; by default one for each core.

    Raises:
        ValueError: the number is negative.
    """
    if asked is not None and asked < 0:
        raise ValueError(f"--workers: expected 0 or more, got {asked}")
    cores = usable_cores()
    return asked if asked is not None else cores if cores > 1 else 0


def bytes_of(text: str) -> int:
    """The bytes of a size such as 1GB, 64MiB or 1000000.

    Raises:
        ValueError: it is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if not found:
        raise ValueError(f"--shard_size: expected a size such as 1GB, 500MB, 64MiB or a number of bytes, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2] or ""])
