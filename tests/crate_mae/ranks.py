"""Several ranks of a run, started as torchrun starts them but from a process that has PyTorch already; and kills of them.

    python tests/crate_mae/ranks.py --kills 20 --seed 0

Each kill takes one rank, or all of them, of a run that saves at almost every step: half of them at any time, half while a state is
written. What is saved by then must be what the run goes on from, and what it leaves in the end is compared with what a run left
that nothing disturbed, bit for bit. Runs are replicated and sharded in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest has it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from tiny_runs import tiny_config, write_photographs

from crate_mae.__main__ import main as crate_mae_main
from crate_mae.training.states import saved_states

ENDS_WITHIN = 30.0
"""Seconds from the end of one rank that fails to the end of the last; then the others are killed, and that counts as hung."""

DEADLINE = 60.0
"""Seconds after which ranks, of about two, count as hung."""

OF_TIME = ("images_per_second", "waiting")

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch._dynamo", "torch.distributed.checkpoint", "crate_mae.cli", "crate_mae.training"])


class Ended(NamedTuple):
    """How ranks ended: their exit statuses, -9 for one that was killed; what all printed; whether they were killed for hanging."""

    statuses: list[int]
    printed: str
    hung: bool


class Ranks:
    """Processes that do the same work, each as one rank; they run when this is made.

    This process does to them what torchrun's agent does: it keeps the store in which they meet, and when one fails it sends
    SIGTERM to the others, and SIGKILL to what is left after half a minute.

    Args:
        work: done by each; with "spawn" semantics, what it is made of must be found by import.
        printed: file for what they print.
    """

    def __init__(self, count: int, work: Callable[[], object], printed: Path) -> None:
        self.printed = printed
        printed.write_bytes(b"")
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        common = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": self._store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_ERROR_FILE": os.devnull,
            "CUDA_VISIBLE_DEVICES": "",
        }
        ranks = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
        self.processes = [_processes.Process(target=_be_rank, args=(work, each, printed)) for each in ranks]
        for process in self.processes:
            process.start()

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to ranks, or to all; those that have ended do not hear it."""
        for process in [self.processes[rank] for rank in ranks] or self.processes:
            with contextlib.suppress(ProcessLookupError):
                if process.exitcode is None:
                    os.kill(process.pid, number)

    def end(self) -> Ended:
        """Returns when all have ended."""
        until, hung, told = time.monotonic() + DEADLINE, False, False
        while left := [process for process in self.processes if process.exitcode is None]:
            wait([process.sentinel for process in left], timeout=max(0.0, until - time.monotonic()))
            if not told and any(process.exitcode for process in self.processes):
                self.signal(signal.SIGTERM)
                until, told = time.monotonic() + ENDS_WITHIN, True
            elif time.monotonic() >= until:
                self.signal(signal.SIGKILL)
                until, hung = time.monotonic() + DEADLINE, True
        statuses = [process.exitcode for process in self.processes]
        return Ended(statuses, self.printed.read_text(), hung)


def _be_rank(work: Callable[[], object], environment: dict[str, Any], printed: Path) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    for descriptor in (1, 2):
        os.dup2(os.open(printed, os.O_WRONLY | os.O_APPEND), descriptor)
    torch.set_num_threads(1)
    work()


def command(*arguments: str, before: Callable[[], object] | None = None) -> None:
    """Be the command with these arguments, after what a test does to this process."""
    if before:
        before()
    sys.argv = ["crate-mae", *arguments]
    sys.exit(crate_mae_main())


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows of a run, without what the clock decides."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    return [{name: value for name, value in row.items() if name not in OF_TIME} for row in rows]


def unnamed_tensors(out: Path) -> list[str]:
    """Folders of tensors that no state names."""
    named = {torch.load(state.path, weights_only=True)["shards"]["folder"] for state in saved_states(out / "states")}
    return sorted({path.name for path in (out / "states").glob("step_*-*")} - named)


class Left(NamedTuple):
    """What a run left."""

    rows: list[dict[str, Any]]
    states: list[int]
    others: dict[str, bytes]


def left_in(out: Path) -> Left:
    """All of it but the insides of the states, of which what the run goes on from tells."""
    paths = [path for path in out.rglob("*") if path.is_file() and out / "states" not in path.parents]
    others = {str(path.relative_to(out)): path.read_bytes() for path in paths if path.name != "metrics.jsonl"}
    return Left(rows_of(out), sorted(state.step for state in saved_states(out / "states")), others)


def differences(found: Left, expected: Left) -> Iterator[str]:
    had, wanted = (Counter((row["step"], len(row)) for row in left.rows) for left in (found, expected))
    yield from (f"rows doubled: of step {step}" for step, _ in had - wanted)
    yield from (f"rows missing: of step {step}" for step, _ in wanted - had)
    if had == wanted and found.rows != expected.rows:
        yield f"curves differ: {[row for row in found.rows if row not in expected.rows]}"
    if max(found.states, default=0) != max(expected.states):
        yield f"states left: of steps {found.states}, expected {expected.states}"
    for name in sorted(found.others.keys() | expected.others.keys()):
        if found.others.get(name) != expected.others.get(name):
            yield f"files differ: {name}"


class Kills:
    """Kills ranks of runs in one folder, each of which goes on until it is left in peace."""

    def __init__(self, folder: Path, seed: int, count: int = 2) -> None:
        self.folder, self.out, self.count = folder, folder / "run", count
        config = tiny_config(self.out, write_photographs(folder / "photographs"))
        self._settings = folder / "settings.json"
        self._settings.write_text(json.dumps(config.to_dict()))
        self._rng = random.Random(seed)
        self._undisturbed: dict[str, tuple[Left, float]] = {}
        self.in_writes = 0

    def bring_about(self, mode: str, kills: int) -> Iterator[tuple[str, list[str]]]:
        """What happened at each kill of a run, and what was wrong with it; and at the end of the run."""
        expected, seconds = self._end_undisturbed(mode)
        shutil.rmtree(self.out, ignore_errors=True)
        saved = 0
        for _ in range(kills):
            victims = self._rng.choice(([0], [1], [*range(self.count)]))
            moment = partial(self._at_any_time, seconds) if self._rng.random() < 0.3 else self._while_writing
            ranks = self._start(mode, saved)
            when = moment(ranks)
            ranks.signal(signal.SIGKILL, *victims)
            killed = time.monotonic()
            ended = ranks.end()
            took = time.monotonic() - killed
            problems = self._wrong_with(ended, victims, saved)
            before, saved = saved, max((state.step for state in saved_states(self.out / "states")), default=0)
            problems += [f"run lost: step {before} was saved, and is gone"] if saved < before else []
            cut = unnamed_tensors(self.out)
            self.in_writes += bool(cut)
            yield f"{mode}: killed {victims} {when}, {'in a write, ' * bool(cut)}step {saved} saved, over in {took:.1f} s", problems
        ended = self._start(mode, saved).end()
        problems = self._wrong_with(ended, [], saved)
        if not any(ended.statuses):
            problems += differences(left_in(self.out), expected)
            problems += [f"never removed: {name}" for name in unnamed_tensors(self.out)]
        yield f"{mode}: left in peace", problems

    def _start(self, mode: str, saved: int) -> Ranks:
        how = ["--resume"] if saved else ["--overwrite"]
        # 6 ms: as often as steps allow, each while the state before it is written.
        options = [f"--config={self._settings}", f"--run.parallel={mode}", "--run.save_minutes=0.0001", *how]
        return Ranks(self.count, partial(command, "pretrain", *options), self.folder / "printed")

    def _end_undisturbed(self, mode: str) -> tuple[Left, float]:
        if mode not in self._undisturbed:
            shutil.rmtree(self.out, ignore_errors=True)
            began = time.monotonic()
            if any((ended := self._start(mode, 0).end()).statuses):
                raise RuntimeError(f"nothing disturbed the run, and yet: {ended}")
            self._undisturbed[mode] = left_in(self.out), time.monotonic() - began
        return self._undisturbed[mode]

    def _at_any_time(self, seconds: float, ranks: Ranks) -> str:
        delay = self._rng.uniform(0, seconds)
        wait([process.sentinel for process in ranks.processes], timeout=delay)
        return f"after {delay:.2f} s"

    def _while_writing(self, ranks: Ranks) -> str:
        """Some time after one of the next states has begun to be written."""
        nth, delay = self._rng.randint(1, 8), self._rng.uniform(0, 0.03)
        seen = set(self._writing())
        until = len(seen) + nth
        while len(seen) < until and all(process.exitcode is None for process in ranks.processes):
            seen.update(self._writing())
            time.sleep(0.001)
        time.sleep(delay)
        return f"{1000 * delay:.0f} ms into write {nth}"

    def _writing(self) -> list[str]:
        return [path.name for path in (self.out / "states").glob("step_*-*")]

    def _wrong_with(self, ended: Ended, victims: list[int], saved: int) -> list[str]:
        """What is wrong with how ranks ended that were to go on from a saved step."""
        problems = [f"hung: {ended}"] if ended.hung else []
        begun = re.search(r", from (?:step ([0-9]+)|the start)", ended.printed)
        if begun and int(begun[1] or 0) != saved:
            problems.append(f"run lost: step {saved} was saved, and it went on{begun[0]}")
        if not victims and not begun:
            problems.append(f"run lost: it does not go on: {ended}")
        if "Traceback" in ended.printed:
            problems.append(f"told of by a traceback: {ended.printed}")
        for rank, status in enumerate(ended.statuses):
            # One that was killed may have come to its end before; the others are told by the agent, or by what breaks.
            fine = (0, -signal.SIGKILL) if rank in victims else (0, 1, -signal.SIGTERM) if victims else (0,)
            if status not in fine:
                problems.append(f"exit status: {status} of rank {rank}, expected {fine}: {ended.printed}")
        return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    start, found, left, modes = time.monotonic(), Counter(), chosen.kills, ["ddp", "fsdp2"]
    with tempfile.TemporaryDirectory() as folder:
        kills = Kills(Path(folder), chosen.seed)
        while left:
            some = min(left, random.Random(chosen.seed + left).choice((1, 1, 2, 3)))
            for story, problems in kills.bring_about(modes[0], some):
                print(story, *(f"      FAILED: {problem}" for problem in problems), sep="\n", flush=True)
                found.update({problem.partition(":")[0] for problem in problems})
            left, modes = left - some, modes[::-1]
    wrong = ", ".join(f"{count} {problem}" for problem, count in sorted(found.items()))
    right = "no run lost, no row doubled or missing, all bit for bit as undisturbed"
    print(f"{chosen.kills} kills, {kills.in_writes} in writes, in {time.monotonic() - start:.0f} s: {wrong or right}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
