"""All of it, piece by piece, for a machine that is there for half an hour: kernels compiled, the check, the most wanted
measurements, counters of the heaviest kernels, the other measurements.

Each piece is a command of its own with a share of the time; what it leaves goes to those after it. What it says is kept in the
folder gpu_all beside the archive, and both are complete after each piece: ``--only`` goes on in another session.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import ROOT, records
from benchmarks.ahead_of_time import warming
from benchmarks.gpu import bench, check
from benchmarks.gpu.archiving import Archive
from benchmarks.gpu.parts import Part, environment_variables
from crate_kernels import tiles

# Pieces in their order, and the seconds that are their shares.
SHARES = {"warm": 90, "check": 400, "step": 220, "attention": 130, "ista": 70, "ncu": 120, "rest": 470}
SECONDS = sum(SHARES.values())
MEASURED_FIRST = {"step": "step 256", "attention": "attention 197", "ista": "ista"}
# What a command that has begun is given to end in, and stands in it for the seconds that it is told.
SECONDS_TO_END, LIMIT = 10, "{seconds}"
# Estimates: a kernel with its launcher, compiled by one process; all processes started; counters of one layer of each kind.
SECONDS_A_KERNEL, SECONDS_TO_START, SECONDS_OF_COUNTERS = 1.0, 15, 60

NCU = "--clock-control none --set detailed --page raw --csv --target-processes application-only --log-file"


class Piece(NamedTuple):
    """A command, the seconds it may take, the parts whose kernels it launches, and an estimate; None: that of its parts."""

    name: str
    seconds: float
    command: list[str]
    launches: list[Part]
    estimate: float | None = None


def pieces(names: Sequence[str], seconds: float | None, arch: str, jobs: int, counters: Path) -> list[Piece]:
    """The pieces of these names, whose times add up to ``seconds``."""
    python, every, found = [sys.executable, "-m"], warming.gpu_parts(), []
    targets, chosen = bench.bench_parts("cuda", full=False), [name for name in SHARES if name in names]
    scale = seconds / sum(SHARES[name] for name in chosen) if seconds else 1.0
    for name in chosen:
        own = scale * SHARES[name]
        if name == "warm":
            command = f"benchmarks.ahead_of_time --warm --arch {arch} --jobs {jobs}".split()
            found.append(Piece(name, own, [*python, *command], every))
        elif name == "check":
            some = [part for part in every if part not in (*targets, bench.COUNTED)]
            command = [*python, "benchmarks.gpu", "check", "--seconds", LIMIT]
            found.append(Piece(name, own, command, some, own - SECONDS_TO_END))  # it takes what it gets
        elif name == "ncu":
            kernels = f"regex:^({'|'.join(heaviest())})$"
            command = [check.find_tool("ncu") or "ncu", *NCU.split(), str(counters), "--kernel-name", kernels]
            found.append(Piece(name, own, [*command, *bench.COUNTED.command], [bench.COUNTED], SECONDS_OF_COUNTERS))
        else:
            only = [MEASURED_FIRST[name]] if name in MEASURED_FIRST else []
            without = [] if only else list(MEASURED_FIRST.values())
            words = ["--only", *only] if only else ["--without", *without]
            command = [*python, "benchmarks.gpu", "bench", *words, "--seconds", LIMIT]
            found.append(Piece(name, own, command, bench.chosen_parts(targets, only, without)))
    return found


def heaviest() -> list[str]:
    """The six kernels of ours that take most of a step, by the newest profile among the results."""
    profiles = [
        json.loads(line)
        for file in (ROOT / "benchmarks" / "results").glob("*/counters/kernels_of_a_step.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    ours = [one for one in profiles if one["provider"] == "triton 16bit" and one["batch"] == 256]
    newest = max(enumerate(ours), key=lambda found: (found[1]["date"], found[0]))[1]["kernels"]
    # Kernels of libraries have other endings, or spaces in their names.
    return [one["name"] for one in newest if str(one["name"]).endswith("_kernel") and " " not in one["name"]][:6]


def main(arguments: argparse.Namespace, scratch: Path, archive: Archive) -> int:
    """Run the pieces, or list them. The exit status."""
    begin, on_cuda = time.time(), torch.cuda.is_available()
    told = archive.path.parent / "gpu_all"
    told.mkdir(parents=True, exist_ok=True)
    archive.paths.append(told)
    arch = tiles.family(tiles.this_device()) if on_cuda else "sm_90"
    chosen = pieces(arguments.only, arguments.seconds, arch, arguments.jobs, told / "counters.csv")
    if arguments.dry_run or not on_cuda:
        plan = plan_of(chosen, arch, arguments.jobs)
        (told / "plan.txt").write_text(plan + "\n", encoding="utf-8")
        print(plan if on_cuda else f"There is no GPU that torch can use. With one, this is what would run:\n{plan}")
        return 0 if arguments.dry_run else 2
    archive.paths.append(ROOT / "benchmarks" / "results" / records.slug(torch.cuda.get_device_name()))
    statuses: dict[str, str] = {}
    end = begin
    for piece in chosen:
        end += piece.seconds
        left = end - time.time()
        if not shutil.which(piece.command[0]):
            statuses[piece.name] = f"not run: there is no {piece.command[0]}"
        elif left < SECONDS_TO_START + SECONDS_TO_END:
            statuses[piece.name] = "not begun, for want of time"
        else:
            command = within(piece, left)
            print(f"\n{piece.name}, at most {left:.0f} s: {shlex.join(command)}", flush=True)
            status = run_and_keep(command, left, told / f"{piece.name}.txt", OUT=str(scratch))
            statuses[piece.name] = "passed" if status == 0 else f"failed with status {status}"
        archive.write()
    print("\n" + records.table(("piece", "status"), list(statuses.items())))
    print(f"{time.time() - begin:.0f} s; what the pieces said: {told}")
    return 0 if set(statuses.values()) == {"passed"} else 1


def within(piece: Piece, seconds: float) -> list[str]:
    """Its command, told to take no more than so many seconds."""
    return [f"{seconds - SECONDS_TO_END:.0f}" if word == LIMIT else word for word in piece.command]


def plan_of(chosen: Sequence[Piece], arch: str, jobs: int) -> str:
    """What would run, as text."""
    lines, notes = list[list[Any]](), list[str]()
    every = {part.name: part for piece in chosen for part in piece.launches}.values()
    launched = {part.name: found for part, found in warming.wanted(every, arch, notes)}
    for piece in chosen:
        name, seconds, command, parts, estimate = piece
        count = len({request for part in parts for request in launched[part.name]})
        fit = bench.that_fit(parts, seconds - SECONDS_TO_END)
        if name == "warm":
            estimate = SECONDS_TO_START + count * SECONDS_A_KERNEL / jobs
        elif estimate is None:
            estimate = sum(part.estimate for part in fit)
            notes += [f"{name}: no time for {part.name} ({part.estimate} s)" for part in parts if part not in fit]
        if not shutil.which(command[0]):
            notes.append(f"{name}: there is no {command[0]} on this machine")
        text = shlex.join(["python" if word == sys.executable else word for word in within(piece, seconds)])
        lines.append([name, round(seconds), round(estimate), count, text])
    columns = ("piece", "seconds at most", "seconds (estimate)", "kernels to compile", "command")
    whole = f"{sum(line[1] for line in lines)} s at most; estimates are of an H100, and no measurement"
    return "\n".join([records.table(columns, lines), whole, *notes])


def run_and_keep(command: Sequence[str], seconds: float, file: Path, **variables: str) -> int:
    """Run a command, show and keep what it says, and end it with all that it started when its time is over. Its exit status."""
    pipes: dict[str, Any] = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    environment = {**environment_variables(), **variables}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes, errors="replace", start_new_session=True)

    def end(how: signal.Signals) -> None:
        if process.poll() is None:
            os.killpg(process.pid, how)

    timers = [threading.Timer(seconds + late, end, [how]) for late, how in ((0, signal.SIGTERM), (20, signal.SIGKILL))]
    try:
        for timer in timers:
            timer.start()
        assert process.stdout
        with file.open("w", encoding="utf-8") as kept:
            for line in process.stdout:
                print(line, end="", flush=True)
                print(line, end="", flush=True, file=kept)
        return process.wait()
    finally:
        for timer in timers:
            timer.cancel()
        end(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        end(signal.SIGKILL)
