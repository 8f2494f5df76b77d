"""`crate-mae check`: whether all images of a source can be read."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from crate_mae.cli.pack import STOPPING, add_workers, workers_of
from crate_mae.cli.parsers import command_parser
from crate_mae.cli.settings import path_of
from crate_mae.data.checking import check
from crate_mae.data.in_processes import Stopped
from crate_mae.data.unreadable import TooManyUnreadable, by_cause, write_list
from crate_mae.training.interrupts import stop_requests

HELP = "Read all images, and list those that cannot be read."


def make_parser() -> ArgumentParser:
    """The parser of `check`."""
    parser = command_parser(
        "Reads and decodes every image of a source, and says which cannot be read, and why. Shards that have a "
        "checksums.sha256 beside them are compared with it.",
        "Exit status 0: all can be read; 1: one cannot, or a shard is not as its checksum says.",
    )
    parser.add_argument("source", metavar="SOURCE", type=str, help="Images, as --data of pretrain names them.")
    parser.add_argument("--out", type=Path, help="File for the whole list: cause, name and reason, with tabs between.")
    add_workers(parser)
    return parser


def run(parser: ArgumentParser, chosen: Namespace) -> str:
    """Check; returns what to print.

    Raises:
        TooManyUnreadable: an image cannot be read, or a shard is damaged; all is printed already.
        Exception: as of opening the source, and of `crate_mae.data.checking.check`.
    """
    from crate_mae.data.specification import open_source

    asked = chosen.check
    out = asked.out and path_of(str(asked.out))
    if out and not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    if out and out.is_dir():
        raise IsADirectoryError(f"--out {out}: expected the name of a file, and this is a folder")
    source = open_source(asked.source)
    with stop_requests(STOPPING) as stop:
        try:
            report = check(source, workers=workers_of(asked.workers), should_stop=lambda: bool(stop))
        except Stopped as error:
            raise stop.stopped("stopped before all was read") from error
    if out:
        write_list(out, report.unreadable)
    lines = "\n".join(report.lines())
    if not report.unreadable and not report.damaged_shards:
        return lines
    print(lines, flush=True)
    wrong = [f"{len(report.unreadable):,} images cannot be read ({by_cause(report.unreadable)})"] * bool(
        report.unreadable
    )
    wrong += [f"{len(report.damaged_shards):,} shards are not as their checksums say"] * bool(report.damaged_shards)
    listed = f"{out} lists them" if out else "--out FILE lists them"
    raise TooManyUnreadable("; ".join([*wrong, *([listed] if report.unreadable else [])]))
