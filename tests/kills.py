"""Kills of ranks, by the dozen: of a run that saves at almost every step, replicated and sharded in turn.

    python tests/kills.py --count 20 --seed 0

Each run is killed three times, one rank or all of them, at any time or, more often, while a state is written; then it is left
in peace. What is saved by then must be what the run goes on from, and what it leaves in the end is compared with what a run left
that nothing disturbed, bit for bit.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as pytest has it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ranks import Ended, ForkedRanks, attempt, rows_of, unnamed_tensors
from tiny_runs import tiny_config, with_run, write_photographs

from crate_mae.training.run_folder import METRICS, STARTS
from crate_mae.training.states import saved_states

KILLS_OF_A_RUN = 3


class Left(NamedTuple):
    """What a run left."""

    rows: list[dict[str, Any]]
    states: list[int]
    others: dict[str, bytes]


def left_in(out: Path) -> Left:
    """All of it but the insides of the states, of which what the run goes on from tells."""
    paths = [path for path in out.rglob("*") if path.is_file() and out / "states" not in path.parents]
    others = {str(path.relative_to(out)): path.read_bytes() for path in paths if path.name not in (METRICS, STARTS)}
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
        self._config = tiny_config(self.out, write_photographs(folder / "photographs"))
        self._rng = random.Random(seed)
        self._undisturbed: dict[str, tuple[Left, float]] = {}
        self.in_writes = 0
        ForkedRanks(1, int, folder / "printed").end()  # from now on, nothing imports PyTorch

    def bring_about(self, mode: str, kills: int) -> Iterator[tuple[str, list[str]]]:
        """What happened at each kill of a run, and what was wrong with it; and at the end of the run."""
        expected, seconds = self._end_undisturbed(mode)
        shutil.rmtree(self.out, ignore_errors=True)
        saved = 0
        for _ in range(kills):
            victims = self._rng.choice(([0], [1], [*range(self.count)]))
            moment = partial(self._at_any_time, seconds) if self._rng.random() < 0.3 else self._while_writing
            ranks = self._start(mode, saved)
            left, when = set(unnamed_tensors(self.out)), moment(ranks)
            ranks.signal(signal.SIGKILL, *victims)
            killed = time.monotonic()
            ended = ranks.end()
            took = time.monotonic() - killed
            problems = self._wrong_with(ended, victims, saved)
            before, saved = saved, max((state.step for state in saved_states(self.out / "states")), default=0)
            problems += [f"run lost: step {before} was saved, and is gone"] if saved < before else []
            cut = set(unnamed_tensors(self.out)) - left
            self.in_writes += bool(cut)
            of_write = ", in a write" * bool(cut)
            yield f"{mode}: killed {victims} {when}{of_write}, step {saved} saved, over in {took:.1f} s", problems
        ended = self._start(mode, saved).end()
        problems = self._wrong_with(ended, [], saved)
        if not any(ended.statuses):
            problems += differences(left_in(self.out), expected)
            problems += [f"never removed: {name}" for name in unnamed_tensors(self.out)]
        yield f"{mode}: left in peace", problems

    def _start(self, mode: str, saved: int) -> ForkedRanks:
        # 6 ms: as often as steps allow, each while the state before it is written.
        config = with_run(self._config, parallel=mode, log_every=1, save_minutes=1e-4, pictures=1)
        how = {"resume": True} if saved else {"overwrite": True}
        return ForkedRanks(self.count, partial(attempt, config, **how), self.folder / "printed")

    def _end_undisturbed(self, mode: str) -> tuple[Left, float]:
        if mode not in self._undisturbed:
            shutil.rmtree(self.out, ignore_errors=True)
            began = time.monotonic()
            if any((ended := self._start(mode, 0).end()).statuses):
                raise RuntimeError(f"nothing disturbed the run, and yet: {ended}")
            self._undisturbed[mode] = left_in(self.out), time.monotonic() - began
        return self._undisturbed[mode]

    def _at_any_time(self, seconds: float, ranks: ForkedRanks) -> str:
        delay = self._rng.uniform(0, seconds)
        wait([process.sentinel for process in ranks.processes], timeout=delay)
        return f"after {delay:.2f} s"

    def _while_writing(self, ranks: ForkedRanks) -> str:
        """Some time after one of the next states has begun to be written."""
        nth, delay = self._rng.randint(1, 4), self._rng.uniform(0, 0.1)
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


def bring_about(folder: Path, count: int, seed: int) -> bool:
    """Kill so many times in an empty folder, and print what comes of it; returns whether nothing was wrong."""
    start, found, left, modes = time.monotonic(), Counter(), count, ["ddp", "fsdp2"]
    kills = Kills(folder, seed)
    while left:
        some = min(left, KILLS_OF_A_RUN)
        for story, problems in kills.bring_about(modes[0], some):
            print(story, *(f"      FAILED: {problem}" for problem in problems), sep="\n", flush=True)
            found.update({problem.partition(":")[0] for problem in problems})
        left, modes = left - some, modes[::-1]
    wrong = ", ".join(f"{count} {problem}" for problem, count in sorted(found.items()))
    right = "no run lost, no row doubled or missing, all bit for bit as undisturbed"
    print(f"{count} kills, {kills.in_writes} in writes, in {time.monotonic() - start:.0f} s: {wrong or right}")
    return not found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20, help="how many kills")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return 0 if bring_about(Path(folder), chosen.count, chosen.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
