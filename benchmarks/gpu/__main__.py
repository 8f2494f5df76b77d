"""The command line of the unattended runs; see the package."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from benchmarks.command_line import make_folder
from benchmarks.gpu import __doc__ as description
from benchmarks.gpu import archiving, bench, check, everything
from benchmarks.records import environment, slug


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    on_cuda = torch.cuda.is_available()
    if arguments.device == "cuda" and not (arguments.dry_run or arguments.command == "all" or on_cuda):
        found = f"no CUDA device that torch {torch.__version__} can use"
        print(f"gpu {arguments.command}: {found}; nothing was run, nothing written", file=sys.stderr)
        return 2
    program = {"check": check.main, "bench": bench.main, "all": everything.main}[arguments.command]
    around = environment(torch.device(arguments.device if on_cuda else "cpu"))
    device = slug(around["device"]) if on_cuda else "no_gpu"
    archive = archiving.archive_of(arguments.archive, device, around["commit"], arguments.command)
    only_lists = arguments.dry_run and arguments.command != "all"
    if not only_lists:
        make_folder("--archive", archive.path.parent)
    with tempfile.TemporaryDirectory() as scratch, nullcontext() if only_lists else archive:
        return program(arguments, Path(scratch), archive)


def _parser() -> argparse.ArgumentParser:
    about = (description or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="tests, memory checker, a few times; one JSON file")
    checking.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="default: benchmarks/results/<device>/gpu_check.json (runs/rehearsal/gpu_check.json on a CPU)",
    )
    checking.add_argument("--seconds", type=float, default=460, help="time for everything (default: 460)")
    jobs = max(1, min(6, (os.cpu_count() or 1) // 2))
    checking.add_argument("--jobs", type=int, default=jobs, help="parts that share the device")
    measuring = commands.add_parser("bench", help="what the table of targets needs; rows of results")
    measuring.add_argument("--full", action="store_true", help="every sweep and every peer")
    measuring.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="parts with one of these in their names"
    )
    measuring.add_argument(
        "--without", nargs="+", default=[], metavar="WORD", help="no parts with these in their names"
    )
    measuring.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the rows, rather than benchmarks/results; no report"
    )
    measuring.add_argument("--seconds", type=float, help="time for all parts (default: 520; with --full no limit)")
    whole = commands.add_parser(
        "all", help="kernels compiled, check, measurements, counters; each a piece with a share of the time"
    )
    whole.add_argument(
        "--only", nargs="+", choices=everything.SHARES, default=list(everything.SHARES), metavar="PIECE",
        help=f"of {', '.join(everything.SHARES)} (default: all of them)",
    )  # fmt: skip
    whole.add_argument(
        "--seconds", type=float, help=f"for all pieces together (default: their shares of {everything.SECONDS})"
    )
    whole.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (default: cores)")
    whole.set_defaults(device="cuda")
    for command in (checking, measuring):
        command.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal, tiny")
    for command in (checking, measuring, whole):
        command.add_argument("--dry-run", action="store_true", help="list the parts; needs no device")
        archiving.add_argument(command)
    return parser


if __name__ == "__main__":
    # An end asked for from outside unwinds like Ctrl-C, so that no part outlives this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
