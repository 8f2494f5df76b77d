"""Accidents that a run must survive, by the hundred: system calls that fail, kills, power cuts and signals.

    python tests/crate_mae/faults.py --count 200 --seed 0

Each fault, known by its number, disturbs one to three attempts at a run of 12 steps; an attempt that nothing disturbs ends it.
What is left is compared with what a run left that nothing disturbed at all, bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from errno import EINTR, EIO, ENOSPC, EROFS
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest has it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch._dynamo  # noqa: F401  # which every first optimiser imports: here once for all attempts
from disk import Disk, Fault, Notes, NotingOs, kind_of, read_notes
from tiny_runs import tiny_config, write_photographs

from crate_kernels import files as replacing_files
from crate_mae import files
from crate_mae.training import PretrainConfig, pretrain
from crate_mae.training.pace import OF_THE_MACHINE
from crate_mae.training.run_folder import STARTS

DEADLINE = 20.0
"""Seconds after which an attempt, of about 0.3 s, counts as hung."""

ANEW = "nothing was saved"
STATE = re.compile(r"states/step_([0-9]+)\.pt")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

ENDS = {
    "fail": ["OSError"],
    "kill": ["killed"],
    "signal": ["RunStopped", "KeyboardInterrupt", "killed"],  # the last two before the first step
}
"""How else than finished an attempt may end, by what befell it."""


def draw(rng: random.Random, calls: Counter[str], seconds: float) -> Fault:
    """A fault for an attempt that makes these calls, in so many seconds, where nothing disturbs it."""

    def at_one_of(some: Iterable[str]) -> dict[str, Any]:
        call = rng.choice(sorted(some))
        return dict(call=call, nth=rng.randint(1, calls[call]))

    at_a_call, at_any_time, some = at_one_of(calls), dict(delay=seconds * rng.random()), rng.random() < 0.5
    match rng.choices(("fail", "short", "kill", "power cut", "signal"), (2, 1, 2, 3, 2))[0]:
        case "fail":
            number = rng.choice((ENOSPC, EIO, EROFS, EINTR))
            return Fault("fail", **at_a_call, number=number, lasting=some, power_cut=rng.random() < 0.25)
        case "short":
            return Fault("short", **at_one_of(call for call in calls if call.startswith("write ")), lasting=some)
        case "signal":
            return Fault("signal", **rng.choice((at_a_call, at_any_time)), number=rng.choice(SIGNALS), power_cut=some)
        case "kill" if some:
            return Fault("kill", **at_any_time)
        case kind:
            return Fault("kill", **at_a_call, after=some, power_cut=kind == "power cut")


class Outcome(NamedTuple):
    """How an attempt ended: finished, killed, hung, or the class of what it raised; and what it had printed by then."""

    ended: str
    error: str
    signal: int
    printed: str


class Attempts:
    """One process after the other that attempts the same run; what they leave is in `out`, what they did in `notes`."""

    def __init__(self, folder: Path, unsynced: str = "") -> None:
        self.disk, self.unsynced = folder / "disk", unsynced
        config = tiny_config(self.disk / "run", write_photographs(folder / "photographs"))
        self.config = dataclasses.replace(config, run=dataclasses.replace(config.run, analyze_every=2))
        self._notes, self._printed, self._ended = (folder / name for name in ("notes", "printed", "ended"))

    @property
    def out(self) -> Path:
        return self.config.out

    @property
    def notes(self) -> Notes:
        return read_notes(self._notes)

    def clear(self) -> None:
        shutil.rmtree(self.disk, ignore_errors=True)
        self.disk.mkdir()

    def attempt(self, fault: Fault | None = None, *, again: bool = False) -> Outcome:
        """Start the run or, `again`, go on with it, in a process of its own."""
        fault = fault or Fault()
        for path in (self._notes, self._printed, self._ended):
            path.unlink(missing_ok=True)
        process = os.fork()
        if process == 0:
            self._attempt_here(fault, again)
        number = 0 if fault.call else fault.number or (signal.SIGKILL if fault.what == "kill" else 0)
        forked, begun, hung = time.monotonic(), None, False
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
            now = time.monotonic()
            if begun is None and self._notes.exists():
                begun = now
            if number and begun is not None and now - begun > fault.delay:
                os.kill(process, number)
                number = 0
            if not hung and now - forked > DEADLINE:
                os.kill(process, signal.SIGKILL)
                hung = True
        printed = self._printed.read_text() if self._printed.exists() else ""
        ended = json.loads(self._ended.read_text()) if self._ended.exists() else ["hung" if hung else "killed", "", 0]
        return Outcome(*ended, printed)

    def _attempt_here(self, fault: Fault, again: bool) -> None:
        """In the forked process, of which nothing more happens."""
        try:
            printed = os.open(self._printed, os.O_WRONLY | os.O_CREAT)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            files.os = replacing_files.os = NotingOs(self._notes, self.disk, fault, self.unsynced)
            try:
                _run(self.config, again)
                ended = "finished", "", 0
            except BaseException as error:
                kind = "OSError" if isinstance(error, OSError) else type(error).__name__
                ended = kind, str(error), getattr(error, "signal", 0)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            unfinished = self._ended.with_suffix(".partial")
            unfinished.write_text(json.dumps(ended))
            unfinished.rename(self._ended)
        finally:
            os._exit(0)


def _run(config: PretrainConfig, again: bool) -> None:
    """As a user would."""
    if again:
        try:
            pretrain(config, resume=True)
            return
        except FileNotFoundError:
            print(ANEW, flush=True)
    pretrain(config, overwrite=again)


def promised(notes: Notes, out: Path) -> int:
    """The last step that a process took for saved: its state was in its place, and the process went on to other files."""
    saved, placed, states = 0, 0, str(out / "states")
    for (name, path, *_), done in notes:
        if name == "replace" and done and (state := STATE.fullmatch(os.path.relpath(path, out))):
            placed = int(state[1])
        elif states not in (path, os.path.dirname(path)):
            saved = placed
    return saved


class Left(NamedTuple):
    """What a run left."""

    rows: list[dict[str, Any]]
    states: list[int]
    others: dict[str, bytes]


def left_in(out: Path) -> Left:
    left = Left([], [], {})
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if name == "metrics.jsonl":
            left.rows.extend(json.loads(line) for line in path.read_bytes().splitlines())
        elif state := STATE.fullmatch(name):
            left.states.append(int(state[1]))
        elif name != STARTS:  # which tells when each of them was
            left.others[name] = path.read_bytes()
    for row in left.rows:
        for of_time in OF_THE_MACHINE:
            row.pop(of_time, None)
    return left


def differences(found: Left, expected: Left) -> list[str]:
    problems = []
    if found.rows != expected.rows:
        had, wanted = (Counter((row["step"], len(row)) for row in rows) for rows in (found.rows, expected.rows))
        problems += [f"rows doubled: of step {step}" for step, _ in had - wanted]
        problems += [f"rows missing: of step {step}" for step, _ in wanted - had]
        changed = [row for row in found.rows if row not in expected.rows]
        problems += [f"curves differ: {changed}, expected {expected.rows}"] if had == wanted else []
    if len(found.states) > len(expected.states) or max(found.states, default=0) != max(expected.states):
        problems.append(f"states left: of steps {sorted(found.states)}, expected {sorted(expected.states)}")
    for name in sorted(found.others.keys() | expected.others.keys()):
        if found.others.get(name) != expected.others.get(name):
            there = [name in left.others for left in (found, expected)]
            how = "differs" if all(there) else "is left" if there[0] else "is missing"
            problems.append(f"files differ: {name} {how}")
    return problems


class Harness:
    """Brings about faults by their numbers.

    Args:
        attempts: what they disturb.
        seed: with it a number always means the same fault.
    """

    def __init__(self, attempts: Attempts, seed: int) -> None:
        self.attempts, self.seed = attempts, seed
        attempts.clear()
        start = time.monotonic()
        self.calls = [self._calls_of_undisturbed()]
        self.seconds = time.monotonic() - start
        self.expected = left_in(attempts.out)
        attempts.clear()
        attempts.attempt(Fault("kill", call="replace run/states/step_#.pt", after=True))
        self.calls.append(self._calls_of_undisturbed(again=True))

    def _calls_of_undisturbed(self, *, again: bool = False) -> Counter[str]:
        outcome = self.attempts.attempt(again=again)
        if outcome.ended != "finished":
            raise RuntimeError(f"nothing disturbed the run, and yet: {outcome}")
        return Counter(kind_of(name, path, self.attempts.disk) for (name, path, *_), _ in self.attempts.notes)

    def bring_about(self, number: int) -> tuple[str, list[str]]:
        """What happened at the fault of that number, and what was wrong with it."""
        rng = random.Random(f"{self.seed} {number}")
        story, problems, saved = [], [], 0
        self.attempts.clear()
        disk = Disk(self.attempts.disk)
        for left in reversed(range(1 + rng.choice((1, 1, 2, 3)))):
            again = bool(story)
            fault = draw(rng, self.calls[again], self.seconds) if left else Fault()
            outcome = self.attempts.attempt(fault, again=again)
            story.append(f"{fault}: {outcome.ended}")
            start = re.search(r"from step ([0-9]+)", outcome.printed)
            if saved and (ANEW in outcome.printed or (start and int(start[1]) < saved)):
                problems.append(f"run lost: step {saved} was saved, then began {start[0] if start else 'anew'}")
            problems += [f"written past crate_mae.files: {path}" for path in disk.replay(self.attempts.notes)]
            saved = max(saved, promised(self.attempts.notes, self.attempts.out))
            problems += self._wrong_with(outcome, fault, saved)
            if fault.power_cut:
                disk.lose_power(rng)
        if outcome.ended == "finished":
            problems += differences(left_in(self.attempts.out), self.expected)
        return "; ".join(story), problems

    def _wrong_with(self, outcome: Outcome, fault: Fault, saved: int) -> list[str]:
        ended, error, number, _ = outcome
        if ended not in ("finished", *ENDS.get(fault.what, ())):
            return [f"{ended}: {error}"]
        if ended == "OSError" and ("\n" in error or str(self.attempts.out) not in error):
            return [f"message of an error: expected one line that names a path, got {error!r}"]
        if ended == "RunStopped" and (number != fault.number or f"step {saved} of" not in error):
            return [f"stopped run: by signal {number}, with step {saved} saved, and says {error!r}"]
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20, help="how many faults")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unsynced", choices=("files", "folders"), default="", help="let their fsync do nothing")
    parser.add_argument("--stop", action="store_true", help="at the first fault that does damage")
    chosen = parser.parse_args()
    start, found, number = time.monotonic(), Counter(), chosen.first - 1
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Attempts(Path(folder), chosen.unsynced), chosen.seed)
        for number in range(chosen.first, chosen.first + chosen.count):
            story, problems = harness.bring_about(number)
            print(f"{number:4}  {story}", *(f"      FAILED: {problem}" for problem in problems), sep="\n", flush=True)
            found.update({problem.partition(":")[0] for problem in problems})
            if found and chosen.stop:
                break
    wrong = ", ".join(f"{count} {problem}" for problem, count in sorted(found.items()))
    right = "no run lost, no row doubled or missing, all bit for bit as undisturbed"
    print(f"{number + 1 - chosen.first} faults in {time.monotonic() - start:.0f} s: {wrong or right}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
