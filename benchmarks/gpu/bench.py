"""The measurement: what the table of targets needs, or every sweep, in parts, the most important first.

Rows are appended to ``benchmarks/results/<device>/<program>.jsonl`` as soon as their part is over; then the report is written. A
lack of time costs the least important parts: one that would take longer than is left is not begun.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks import ROOT, records
from benchmarks.command_line import make_folder
from benchmarks.gpu import parts
from benchmarks.gpu.archiving import Archive
from benchmarks.gpu.parts import RESULTS, Part, Runner
from benchmarks.kernels.operators import OPERATORS

# Compiling two whole models one after the other says nothing for minutes.
QUIET_SECONDS = 400
FULL_QUIET_SECONDS = 3600

OURS = "triton 'triton 16bit' 'triton recompute'"
COMPILED = "'official compiled' 'best composed'"
VIT = "'vit-mae sdpa' 'vit-mae compiled'"
STEP = "--dtype bfloat16 --providers reference"
ALL_BATCHES = "--batch 1 8 64 128 256 512"
GRAPHS = "reference 'reference graph' 'official compiled' 'official compiled graph' triton 'triton graph'"
LARGEST = "reference 'triton 16bit' 'triton recompute'"
LIBRARIES = "--peers library compiled"
MASKS = "--modes forward backward --sweep mask --rounds 30"

# Name, program, arguments, and seconds on an H100 whose kernels are compiled: estimates, of a part's start (10), of what
# torch.compile compiles (30 a model, 8 a kernel) and of the float32 step that losses are compared with. In order of importance.
TARGETS = (
    ("step 256", "training_step", f"--batch 256 --rounds 20 {STEP} {OURS} {COMPILED}", 150),
    ("attention 197", "kernels", f"attention --modes forward backward --sweep head_dim --rounds 50 {LIBRARIES}", 110),
    ("ista", "kernels", f"ista --batch 256 --rounds 50 {LIBRARIES}", 50),
    ("memory 256", "memory", "--batch 256 --dtype bfloat16", 40),
    ("step 8, graphs", "training_step", f"--batch 8 --dtype bfloat16 --providers {GRAPHS}", 90),
    ("step 1, graphs", "training_step", f"--batch 1 --dtype bfloat16 --providers {GRAPHS}", 90),
    ("vit-mae 256", "training_step", f"--batch 256 --rounds 15 {STEP} {OURS} {VIT}", 90),
    ("attention 785", "kernels", f"attention --modes forward backward --tokens 785 --batch 16 --rounds 30 {LIBRARIES}", 40),
    ("attention 3137", "kernels", f"attention --modes forward backward --tokens 3137 --batch 4 --rounds 30 {LIBRARIES}", 40),
    ("first step", "training_step", "--batch 64 --dtype bfloat16 --first-step --providers 'triton 16bit'", 60),
    ("step, other batches, eager", "training_step", f"--batch 64 128 512 --rounds 15 {STEP} {OURS}", 80),
    ("largest batch", "memory", f"--batch 256 --dtype bfloat16 --largest --providers {LARGEST}", 90),
    ("layers", "kernels", f"encoder_layer decoder_layer mssa norm_linear --rounds 30 {LIBRARIES}", 130),
    ("step 64", "training_step", f"--batch 64 {STEP} {OURS} {COMPILED}", 110),
    ("step 512", "training_step", f"--batch 512 --rounds 15 {STEP} {OURS} {COMPILED}", 170),
    ("step 128", "training_step", f"--batch 128 {STEP} {OURS} {COMPILED}", 120),
    ("masks 785", "kernels", f"attention {MASKS} --tokens 785 --batch 16 {LIBRARIES}", 240),
    ("masks 3137", "kernels", f"attention {MASKS} --tokens 3137 --batch 4 {LIBRARIES}", 240),
)  # fmt: skip
FULL = (
    *TARGETS,
    ("steps, all", "training_step", f"{ALL_BATCHES} {STEP} composed {OURS} 'triton float32 recompute' {COMPILED} "
     f"'official max-autotune' {VIT}", 0),
    ("steps, other dtypes", "training_step", f"{ALL_BATCHES} --dtype float16 tf32 float32 --providers reference triton", 0),
    ("memory, all", "memory", f"{ALL_BATCHES} --dtype bfloat16 float32 --largest", 0),
    *((f"sweeps of {name}", "kernels", f"{name} --sweep all", 0) for name in OPERATORS),
)  # fmt: skip

# What counters are taken of: one layer of each kind starts every kernel that a step of 24 starts, at the same sizes.
_ONE_STEP = "--one-step --batch 256 --dtype bfloat16 --providers 'triton 16bit' --set depth=1 decoder_depth=1"
COUNTED = Part(
    "counters",
    "training_step",
    (sys.executable, "-m", "benchmarks.training_step", *shlex.split(_ONE_STEP)),
    QUIET_SECONDS,
)

TINY = {
    "kernels": "--batch 2 --tokens 17 --width 32 --heads 2 --rounds 2 --peers library",
    "training_step": "--model crate_mae_tiny --batch 2 --dtype float32 --rounds 2 --set img_size=32 embed_dim=48 depth=1 "
    "num_heads=3 decoder_depth=1 decoder_num_heads=3",
    "memory": "--model crate_mae_tiny --batch 2 --set depth=1 decoder_depth=1",
}
REHEARSAL = (
    ("a step", "training_step", "", 0),
    ("first step", "training_step", "--first-step --providers composed", 0),
    ("attention and ista", "kernels", "attention ista", 0),
    ("memory", "memory", "", 0),
)


def bench_parts(device: str, full: bool) -> list[Part]:
    """The parts in order; the kind of each is its program."""
    chosen = REHEARSAL if device == "cpu" else FULL if full else TARGETS
    quiet = FULL_QUIET_SECONDS if full else QUIET_SECONDS
    found = []
    for name, program, arguments, estimate in chosen:
        words = shlex.split(f"{arguments} {TINY[program] if device == 'cpu' else ''}")
        command = (sys.executable, "-m", f"benchmarks.{program}", *words, "--device", device, "--json", RESULTS)
        found.append(Part(name, program, command, quiet, estimate=estimate))
    return found


def chosen_parts(some: Iterable[Part], only: Sequence[str], without: Sequence[str]) -> list[Part]:
    """Those with one of the words ``only`` in their names, or all without such words, and none of ``without``."""
    return [
        part
        for part in some
        if (not only or any(word in part.name for word in only)) and not any(word in part.name for word in without)
    ]


def that_fit(some: Iterable[Part], seconds: float) -> list[Part]:
    """Those that are begun in so many seconds, if each takes what is estimated."""
    found = []
    for part in some:
        if part.estimate <= seconds:
            seconds -= part.estimate
            found.append(part)
    return found


def main(arguments: argparse.Namespace, scratch: Path, archive: Archive) -> int:
    """Run all parts; ``scratch`` is an empty folder for what they leave. The exit status."""
    begin, seconds = time.time(), arguments.seconds or (float("inf") if arguments.full else 520)
    chosen = chosen_parts(bench_parts(arguments.device, arguments.full), arguments.only, arguments.without)
    if arguments.dry_run:
        fit = that_fit(chosen, seconds)
        lines = (
            [part.kind, part.name, part.estimate, "" if part in fit else "no time", shlex.join(part.command[3:])]
            for part in chosen
        )
        print(records.table(("program", "part", "seconds (estimate)", "", "arguments"), lines))
        return 0
    if arguments.device == "cpu" and arguments.out is None:
        print("gpu bench: a rehearsal's times mean nothing; name a folder for them with --out", file=sys.stderr)
        return 2
    name = records.environment(torch.device(arguments.device))["device"]
    folder = arguments.out or ROOT / "benchmarks" / "results" / records.slug(name)
    make_folder("--out", folder)
    archive.paths.append(folder)
    runner = Runner(scratch, seconds)
    statuses: Counter[str] = Counter()
    late: list[str] = []
    for part in chosen:
        record = runner.run(part)
        records.write_json_lines(folder / f"{part.kind}.jsonl", record["figures"])
        archive.write()
        statuses[record["status"]] += 1
        parts.tell(record)
        if not record["exit_status"]:
            late.append(part.name)
        elif record["status"] != "passed":
            print(record["output"][-2000:])
    print(", ".join(f"{count} {status}" for status, count in statuses.items()) + f"; {folder}")
    if late:
        print(f"not begun, for want of time: {', '.join(late)}")
    report = [sys.executable, "-m", "benchmarks.report"]
    reported = arguments.out is not None or subprocess.run(report, cwd=ROOT).returncode == 0
    print(f"{time.time() - begin:.0f} s")
    return 0 if reported and set(statuses) == {"passed"} else 1
