"""The gate's command line; see the package."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import ROOT, records
from benchmarks.ahead_of_time import __doc__ as description
from benchmarks.ahead_of_time import cases, compiling, warming
from benchmarks.ahead_of_time.compiling import Figures
from benchmarks.ahead_of_time.targets import TARGETS
from benchmarks.gpu.archiving import add_argument, archive_of

RESULTS = ROOT / "benchmarks" / "results" / "ahead_of_time" / f"{triton.__version__}.jsonl"

COLUMNS = (
    "kernel", "target", "dtype", "shape", "tile", "warps", "stages", "registers", "spill B", "shared KB",
    "matrix instructions", "occupancy %",
)  # fmt: skip
LOOP_COLUMNS = (
    "kernel", "dtype", "shape", "tile", "warps", "cycles a step of each pipe", "binds", "wgmma in flight", "instructions a warp",
)  # fmt: skip
LOOPS = "Main loops, 16-bit products on sm_90"


def line(figures: Figures) -> list[Any]:
    """Figures as they are printed."""
    return [
        figures.kernel,
        figures.arch,
        figures.dtype,
        figures.shape,
        figures.tile,
        figures.warps,
        figures.stages,
        figures.registers,
        figures.spill_bytes,
        round(figures.shared_bytes / 1024, 1),
        ", ".join(f"{count} {kind}" for kind, count in figures.matrix.items()),
        round(100 * figures.occupancy),
    ]


def loop_lines(figures: Iterable[Figures]) -> list[list[Any]]:
    """The main loops of kernels that multiply by wgmma, as they are printed."""
    lines = []
    for one in figures:
        if one.wgmma and one.wgmma.loops:
            main = one.wgmma.loops[0]
            names = [one.kernel, one.dtype, one.shape, one.tile, one.warps]
            lines.append([*names, _counts(main.cycles), main.binds, main.in_flight, _counts(main.instructions)])
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]) if count)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: kernels would be interpreted, not compiled. Unset it.", file=sys.stderr)
        return 2
    if arguments.warm:
        commit = records.environment(torch.device("cpu"))["commit"]
        archive = archive_of(arguments.archive, "-".join(arguments.arch), commit, "warm")
        return warming.warm(arguments.arch, arguments.jobs, archive)
    chosen = cases.everything if arguments.all else cases.gate
    available = {arch: chosen(arch) for arch in arguments.arch}
    wanted = {
        arch: [
            case
            for case in some
            if case.dtype in (arguments.dtypes or [case.dtype])
            and case.operator in (arguments.operators or [case.operator])
        ]
        for arch, some in available.items()
    }
    with compiling.unused_tiles() as unused:
        figures, broken = compiling.compile_all(wanted, arguments.jobs)
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(records.table(COLUMNS, map(line, figures)))
    print(f"\n{LOOPS}\n{records.table(LOOP_COLUMNS, loop_lines(figures))}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(versions | asdict(one)) + "\n" for one in figures]
        arguments.json.write_text("".join(lines), encoding="utf-8")

    broken += [breach for one in figures for breach in compiling.breaches(one)]
    if wanted == available and set(cases.GATE_TARGETS) <= set(arguments.arch):
        broken += compiling.missing(figures, unused)
    for one in figures:
        if one.slow and (found := compiling.slowness(one)):
            print(*(f"MAY BE SLOW {line}" for line in found), f"    for {one.slow}", sep="\n")
    for breach in broken:
        print(f"BREACH {breach}")
    names = {one.path for one in figures}
    shapes = {(case.dtype, case.shape) for some in wanted.values() for case in some}
    print(
        f"{len(figures)} compilations of {len(names)} kernels at {len(shapes)} shapes for {len(arguments.arch)} targets, "
        f"{len(broken)} bounds broken"
    )
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ahead_of_time", description=description.partition("\n")[0]
    )
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(cases.GATE_TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=list(cases.DTYPES), help="only these; all by default")
    operators = sorted({case.operator for target in cases.GATE_TARGETS for case in cases.gate(target)})
    parser.add_argument("--operators", nargs="+", choices=operators, help="only these; all by default")
    parser.add_argument("--all", action="store_true", help="all combinations of the cases: some twenty minutes")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile at the same time")
    parser.add_argument(
        "--warm",
        action="store_true",
        help="instead of the cases, compile into Triton's cache what benchmarks.gpu will launch, and check no bounds",
    )
    add_argument(parser)
    parser.add_argument(
        "--json", metavar="FILE", type=Path, nargs="?", const=RESULTS,
        help=f"write the figures there, in place of what it held; without FILE to {RESULTS.relative_to(ROOT)}",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwinds, so that the archive is made
    sys.exit(main())
