"""Accidents that a run must survive, by the hundred: system calls that fail, kills, power cuts and signals.

    python tests/crate_mae/faults.py --count 200 --seed 0

Each fault, known by its number, disturbs one to three attempts at a run of 12 steps; an attempt without disturbance then ends it. What
the folder holds is compared with that of a run which nothing disturbed, bit for bit.

Every write of a run goes through `crate_mae.files`, whose `os` is replaced by one that notes each system call before it is made, and
lets the chosen one fail or be the last. From the notes a model of the disk is kept that knows what had been synced, so that a power cut
can take the rest. It has to agree with the real folder after every attempt, so that no write passes by unseen.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from crate_mae import files
from crate_mae.config import ModelConfig
from crate_mae.training import OptimizerConfig, PretrainConfig, RunConfig, ScheduleConfig, pretrain

DEADLINE = 20.0
"""Seconds after which an attempt, of about 0.3 s, counts as hung."""

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EINTR)
LOCK = ".lock"
STATE = re.compile(r"states/step_([0-9]+)\.pt")
ANEW = "begun anew"

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Fault:
    """What befalls one attempt: at the `nth` call of a kind or, where none is named, `delay` seconds after the start."""

    what: str
    """fail, short (a write that takes half of the data), kill, or signal."""

    call: str = ""
    nth: int = 1
    delay: float = 0.0
    after: bool = False
    """The kill comes once the call took effect, of a write half of it; else before."""
    number: int = 0
    """The errno, or the signal."""
    lasting: bool = False
    """Every later call fails, too, or every later write is short."""
    power_cut: bool = False
    """What was not synced when the attempt ended is lost."""

    def __str__(self) -> str:
        names = {"fail": errno.errorcode, "signal": {each: each.name for each in SIGNALS}}
        what = names[self.what][self.number] if self.what in names else self.what
        where = f"{'after' if self.after else 'at'} {self.call} ({self.nth})" if self.call else f"at {self.delay:.3f} s"
        return what + " for ever" * self.lasting + f" {where}" + ", power cut" * self.power_cut


def draw(rng: random.Random, calls: Counter[str], seconds: float) -> Fault:
    """A fault for an attempt that makes these calls, in so many seconds, where nothing disturbs it."""

    def one_of(calls: list[str]) -> dict[str, Any]:
        call = rng.choice(calls)
        return dict(call=call, nth=rng.randint(1, counts[call]))

    counts, some = calls, rng.random() < 0.5
    at_a_call, at_any_time = one_of(sorted(calls)), dict(delay=seconds * rng.random())
    match rng.choice(
        ("fail", "fail", "short", "kill", "kill", "power cut", "power cut", "power cut", "signal", "signal")
    ):
        case "fail":
            return Fault("fail", **at_a_call, number=rng.choice(ERRORS), lasting=some)
        case "short":
            return Fault("short", **one_of(sorted(call for call in calls if call.startswith("write "))), lasting=some)
        case "signal":
            return Fault("signal", **rng.choice((at_a_call, at_any_time)), number=rng.choice(SIGNALS), power_cut=some)
        case "kill" if some:
            return Fault("kill", **at_any_time)
        case kind:
            return Fault("kill", **at_a_call, after=some, power_cut=kind == "power cut")


class NotingOs:
    """Stands in for `os` in `crate_mae.files`: notes each call, and whether it was done, and brings the fault about.

    A note is the name of a call, its path, and its other arguments, where the number of an `open` stands for the descriptor.
    """

    def __init__(self, notes: Path, root: Path, fault: Fault | None, unsynced: str = "") -> None:
        self._notes = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._root, self._fault, self._unsynced = root, fault, unsynced
        self._opened: dict[int, tuple[str, int]] = {}
        self._handles = itertools.count()
        self._uses: Counter[str] = Counter()
        self._struck = False

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        path, handle = os.fspath(path), next(self._handles)
        descriptor = self._call("open", path, (handle, flags), lambda *_: os.open(path, flags, mode))
        self._opened[descriptor] = path, handle
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        path, handle = self._opened[descriptor]
        return self._call("write", path, (handle, bytes(data)), lambda _, taken: os.write(descriptor, taken))

    def lseek(self, descriptor: int, offset: int, whence: int) -> int:
        path, handle = self._opened[descriptor]
        return self._call("lseek", path, (handle, offset, whence), lambda *_: os.lseek(descriptor, offset, whence))

    def fsync(self, descriptor: int) -> None:
        path, handle = self._opened[descriptor]
        if self._unsynced != ("folders" if os.path.isdir(path) else "files"):
            self._call("fsync", path, (handle,), lambda *_: None)  # the note is all that a power cut asks about

    def close(self, descriptor: int) -> None:
        path, handle = self._opened.pop(descriptor)
        try:
            self._call("close", path, (handle,), lambda *_: os.close(descriptor))
        except OSError:
            os.close(descriptor)  # as Linux does, whatever it reports
            raise

    def replace(self, source: Any, target: Any) -> None:
        self._call("replace", os.fspath(target), (os.fspath(source),), lambda *_: os.replace(source, target))

    def unlink(self, path: Any) -> None:
        self._call("unlink", os.fspath(path), (), lambda: os.unlink(path))

    def mkdir(self, path: Any) -> None:
        self._call("mkdir", os.fspath(path), (), lambda: os.mkdir(path))

    def _call(self, name: str, path: str, arguments: tuple[Any, ...], do: Callable[..., Any]) -> Any:
        kind = kind_of(name, path, self._root)
        self._uses[kind] += 1
        fault = self._fault if self._fault and self._fault.call else None
        met = fault is not None and (fault.call, fault.nth) == (kind, self._uses[kind])
        still = fault is not None and self._struck and fault.lasting
        self._struck |= met
        if (met or (still and name not in ("close", "lseek"))) and fault.what == "fail":
            raise OSError(fault.number, os.strerror(fault.number), path)
        if met and fault.what == "signal":
            signal.raise_signal(fault.number)
        if met and fault.what == "kill" and not fault.after:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "write" and (((met or still) and fault.what == "short") or (met and fault.what == "kill")):
            handle, data = arguments
            arguments = handle, data[: (len(data) + 1) // 2]
        self._note((name, path, *arguments))
        try:
            result = do(*arguments)
        except OSError:
            self._note(False)
            raise
        self._note(True)
        if met and fault.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def _note(self, note: Any) -> None:
        os.write(self._notes, pickle.dumps(note))


def kind_of(name: str, path: str, root: Path) -> str:
    """A call by its name and its file, of whatever step that is."""
    return f"{name} {re.sub('[0-9]+', '#', os.path.relpath(path, root))}"


def read_notes(path: Path) -> list[tuple[tuple[Any, ...], bool | None]]:
    """The calls, and whether each was done; None of the last where the process was killed meanwhile."""
    read = []
    if not path.exists():
        return []
    with path.open("rb") as file, contextlib.suppress(EOFError, pickle.UnpicklingError):
        while True:
            read.append(pickle.load(file))
    return list(itertools.zip_longest(read[::2], read[1::2]))


class _File:
    def __init__(self, content: bytes = b"") -> None:
        self.now, self.synced = bytearray(content), content

    def lose_power(self, rng: random.Random) -> None:
        now, synced = bytes(self.now), self.synced
        if now != synced:
            kept = len(os.path.commonprefix([now, synced]))
            torn = rng.randint(kept, len(now))
            self.now = bytearray(rng.choice((now, synced, now[:torn], now[:torn] + bytes(len(now) - torn))))
        self.synced = bytes(self.now)


class _Folder:
    """Its entries as they have been one after the other, the first of them synced."""

    def __init__(self) -> None:
        self.history: list[dict[str, _File | _Folder]] = [{}]

    @property
    def now(self) -> dict[str, _File | _Folder]:
        return self.history[-1]

    def change(self, **entries: _File | _Folder | None) -> None:
        self.history.append({name: entry for name, entry in (self.now | entries).items() if entry is not None})

    def lose_power(self, rng: random.Random) -> None:
        self.history = [rng.choice(self.history)]
        for entry in self.now.values():
            entry.lose_power(rng)


class Disk:
    """A model of what is in a folder, and of what of it would outlive a power cut.

    Of a file that was not synced a power cut leaves the old content or the new, the new cut off anywhere, or zeros from there on. Of
    a folder that was not synced it leaves what was there at any moment since it was.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.tree = root, _Folder()

    def replay(self, notes: list[tuple[tuple[Any, ...], bool | None]]) -> None:
        """Do what a process did.

        Raises:
            AssertionError: the folder is not what comes of it: something was written that `crate_mae.files` does not know of.
        """
        opened: dict[int, list[Any]] = {}
        for note, done in notes:
            if done:
                self._apply(opened, *note)
        if notes and notes[-1][1] is None and self._differences():
            (name, path, *arguments), _ = notes[-1]
            if name == "write":  # of which a kill may let any part through
                arguments[1] = arguments[1][: os.path.getsize(path) - len(self._entry(path).now)]
            self._apply(opened, name, path, *arguments)
        found = self._differences()
        assert not found, f"written past crate_mae.files: {', '.join(found)}"

    def lose_power(self, rng: random.Random) -> None:
        """Leave of the real folder what a power cut might."""
        self.tree.lose_power(rng)
        for entry in self.root.iterdir():
            shutil.rmtree(entry)
        self._write(self.root, self.tree)

    def _apply(self, opened: dict[int, list[Any]], name: str, path: str, *arguments: Any) -> None:
        match name, *arguments:
            case "open", handle, flags:
                entry = self._entry(path)
                if entry is None:
                    entry = _File()
                    self._folder(path).change(**{os.path.basename(path): entry})
                if flags & os.O_TRUNC:
                    entry.now.clear()
                opened[handle] = [entry, 0, flags & os.O_APPEND]
            case "write", handle, data:
                entry, position, appends = opened[handle]
                position = len(entry.now) if appends else position
                entry.now[position : position + len(data)] = data
                opened[handle][1] = position + len(data)
            case "lseek", handle, offset, whence:
                entry, position, _ = opened[handle]
                opened[handle][1] = (
                    offset + {os.SEEK_SET: 0, os.SEEK_CUR: position, os.SEEK_END: len(entry.now)}[whence]
                )
            case "fsync", handle:
                entry = opened[handle][0]
                if isinstance(entry, _Folder):
                    del entry.history[:-1]
                else:
                    entry.synced = bytes(entry.now)
            case "close", handle:
                del opened[handle]
            case "replace", source:
                folder, entry = self._folder(path), self._entry(source)
                assert self._folder(source) is folder
                folder.change(**{os.path.basename(source): None, os.path.basename(path): entry})
            case ("unlink",):
                self._folder(path).change(**{os.path.basename(path): None})
            case ("mkdir",):
                self._folder(path).change(**{os.path.basename(path): _Folder()})

    def _folder(self, path: str) -> _Folder:
        return self._entry(os.path.dirname(path))

    def _entry(self, path: str) -> Any:
        entry = self.tree
        for part in Path(path).relative_to(self.root).parts:
            entry = entry.now.get(part)
        return entry

    def _differences(self) -> list[str]:
        real = {str(path): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}
        modelled = _contents(self.root, self.tree)
        names = sorted(real.keys() | modelled.keys())
        return [name for name in names if real.get(name) != modelled.get(name) and os.path.basename(name) != LOCK]

    def _write(self, path: Path, folder: _Folder) -> None:
        for name, entry in folder.now.items():
            if isinstance(entry, _Folder):
                (path / name).mkdir()
                self._write(path / name, entry)
            else:
                (path / name).write_bytes(entry.now)


def _contents(path: Path, folder: _Folder) -> dict[str, bytes]:
    """Of each file under a folder of the model."""
    contents: dict[str, bytes] = {}
    for name, entry in folder.now.items():
        contents |= (
            _contents(path / name, entry) if isinstance(entry, _Folder) else {str(path / name): bytes(entry.now)}
        )
    return contents


class Outcome(NamedTuple):
    """How an attempt ended: finished, killed, hung, or the class of what it raised; and what it had said by then."""

    ended: str
    error: str = ""
    signal: int = 0
    said: str = ""


class Place:
    """Where one process after the other attempts the same run."""

    def __init__(self, folder: Path, unsynced: str = "") -> None:
        self.folder, self.unsynced = folder, unsynced
        self.root, self.notes, self.said, self.outcome = (
            folder / name for name in ("disk", "notes", "said", "outcome")
        )
        self.config = PretrainConfig(
            out=self.root / "run",
            data=_photographs(folder / "photographs"),
            val=folder / "photographs",
            model=ModelConfig(
                img_size=32,
                patch_size=8,
                embed_dim=32,
                depth=1,
                num_heads=2,
                decoder_depth=1,
                decoder_num_heads=2,
                lambd=0.1,
            ),
            optimizer=OptimizerConfig(base_lr=0.2),
            schedule=ScheduleConfig(epochs=3, warmup_epochs=1, batch_size=3),
            run=RunConfig(
                device="cpu", precision="float32", threads=1, log_every=2, save_every=1, save_minutes=0, pictures=2
            ),
        )

    def clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()

    def attempt(self, fault: Fault | None = None, *, again: bool = False) -> Outcome:
        """Run it in a process of its own; `again`: go on with what is there."""
        for path in (self.notes, self.said, self.outcome):
            path.unlink(missing_ok=True)
        process = os.fork()
        if process == 0:
            self._attempt_here(fault, again)
        forked, begun = time.monotonic(), None
        to_send, hung = fault is not None and not fault.call, False
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
            now = time.monotonic()
            if (
                begun is None and self.notes.exists()
            ):  # from here on the child ends without a trace, whatever it is sent
                begun = now
            if to_send and begun is not None and now - begun > fault.delay:
                os.kill(process, fault.number or signal.SIGKILL)
                to_send = False
            if now - forked > DEADLINE and not hung:
                os.kill(process, signal.SIGKILL)
                hung = True
        ended, *more = json.loads(self.outcome.read_text()) if self.outcome.exists() else ["killed", "", 0]
        return Outcome("hung" if hung else ended, *more, self.said.read_text() if self.said.exists() else "")

    def _attempt_here(self, fault: Fault | None, again: bool) -> None:
        """In the forked process, which ends here."""
        try:
            output = os.open(self.said, os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            files.os = NotingOs(self.notes, self.root, fault, self.unsynced)
            try:
                _run(self.config, again)
                outcome = "finished", "", 0
            except BaseException as error:
                kind = "OSError" if isinstance(error, OSError) else type(error).__name__
                outcome = kind, str(error), getattr(error, "signal", 0)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            written = self.outcome.with_suffix(".partial")
            written.write_text(json.dumps(outcome))
            written.rename(self.outcome)
        finally:
            os._exit(0)


def _run(config: PretrainConfig, again: bool) -> None:
    if again:
        try:
            pretrain(config, resume=True)
            return
        except FileNotFoundError as error:
            print(f"{ANEW}: {error}", flush=True)
    pretrain(config, overwrite=again)


def _photographs(folder: Path) -> Path:
    """12 small smooth pictures, 4 batches of 3."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        corners = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        corners.resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{index:02}.png")
    return folder


class Left(NamedTuple):
    """What a run that ended left."""

    rows: list[dict[str, Any]]
    states: list[str]
    others: dict[str, bytes]


def left_in(out: Path) -> Left:
    rows, states, others = [], [], {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if name == "metrics.jsonl":
            rows = [_row(line) for line in path.read_bytes().splitlines()]
        elif STATE.fullmatch(name):
            states.append(name)
        else:
            others[name] = path.read_bytes()
    return Left(rows, sorted(states, key=_step_of), others)


def _row(line: bytes) -> dict[str, Any]:
    try:
        return {name: value for name, value in json.loads(line).items() if name != "images_per_second"}
    except ValueError:
        return {"step": f"none, but {line[:20]!r}"}


def _step_of(state: str) -> int:
    return int(STATE.fullmatch(state)[1])


def compared(found: Left, expected: Left) -> list[str]:
    """In what one differs from the other."""
    problems = []
    if found.rows != expected.rows:
        lines, wanted = (Counter(json.dumps(row) for row in rows) for rows in (found.rows, expected.rows))
        shapes = [[(row["step"], len(row)) for row in rows] for rows in (found.rows, expected.rows)]
        doubled, missing = Counter(shapes[0]) - Counter(shapes[1]), Counter(shapes[1]) - Counter(shapes[0])
        if doubled:
            problems.append(f"rows doubled: of steps {[step for step, _ in doubled]}")
        if missing:
            problems.append(f"rows missing: of steps {[step for step, _ in missing]}")
        if not (doubled or missing):
            problems.append(f"curves differ: {list(lines - wanted)}, expected {list(wanted - lines)}")
    if len(found.states) > len(expected.states) or found.states[-1:] != expected.states[-1:]:
        problems.append(f"states left: {found.states}, expected the last of them to be {expected.states[-1:]}")
    for name in sorted(found.others.keys() ^ expected.others.keys()):
        problems.append(f"files left: {name} is {'unexpected' if name in found.others else 'missing'}")
    for name in sorted(found.others.keys() & expected.others.keys()):
        if found.others[name] != expected.others[name]:
            problems.append(f"weights or files differ: {name}")
    return problems


def promised(notes: list[tuple[tuple[Any, ...], bool | None]], out: Path) -> int:
    """The last step that a process took for saved: it had put the state in its place, and went on to other files."""
    kept, placed = 0, 0
    for (name, path, *_), done in notes:
        state = STATE.fullmatch(os.path.relpath(path, out))
        if name == "replace" and state and done:
            placed = int(state[1])
        elif os.path.dirname(path) != str(out / "states") and path != str(out / "states"):
            kept = placed
    return kept


class Harness:
    """Runs disturbed by faults that are known by their numbers, against one that nothing disturbs."""

    def __init__(self, place: Place, seed: int) -> None:
        self.place, self.seed = place, seed
        start = time.monotonic()
        self.fresh = self._undisturbed()
        self.seconds = time.monotonic() - start
        self.expected = left_in(place.config.out)
        # Another half way, for what a run does that goes on.
        place.clear()
        half = next(call for call in self.fresh if call.startswith("replace run/states/"))
        place.attempt(Fault("kill", call=half, nth=1))
        self.resumed = self._undisturbed(again=True)

    def _undisturbed(self, **how: bool) -> Counter[str]:
        if not how:
            self.place.clear()
        outcome = self.place.attempt(**how)
        if outcome.ended != "finished":
            raise RuntimeError(f"undisturbed, and yet {outcome}")
        notes = read_notes(self.place.notes)
        return Counter(kind_of(name, path, self.place.root) for (name, path, *_), _ in notes)

    def bring_about(self, number: int) -> tuple[str, list[str]]:
        """What happened at the fault of a number, and what was wrong with that."""
        rng = random.Random(f"{self.seed} {number}")
        story, problems = [], []
        disk, place = Disk(self.place.root), self.place
        place.clear()
        saved, attempts = 0, rng.choice((1, 1, 2, 3))
        for index in range(attempts + 1):
            fault = draw(rng, self.resumed if index else self.fresh, self.seconds) if index < attempts else None
            outcome = place.attempt(fault, again=index > 0)
            story.append(f"{fault or 'undisturbed'}: {outcome.ended}")
            problems += self._wrong_with(outcome, fault)
            start = re.search(r"from step ([0-9]+)", outcome.said)
            if saved and (ANEW in outcome.said or (start and int(start[1]) < saved)):
                problems.append(f"run lost: step {saved} was saved, began {start[0] if start else 'anew'}")
            notes = read_notes(place.notes)
            try:
                disk.replay(notes)
            except AssertionError as error:
                problems.append(str(error))
            saved = max(saved, promised(notes, place.config.out))
            if fault and fault.power_cut:
                disk.lose_power(rng)
        if outcome.ended == "finished":
            problems += compared(left_in(place.config.out), self.expected)
        return "; ".join(story), problems

    def _wrong_with(self, outcome: Outcome, fault: Fault | None) -> list[str]:
        what = fault.what if fault else ""
        allowed = {
            "fail": {"OSError"},
            "kill": {"killed"},
            "signal": {"RunStopped", "KeyboardInterrupt", "killed"},
        }.get(what, set())
        if outcome.ended not in {"finished", *allowed}:
            return [f"{outcome.ended}: {outcome.error}"]
        if outcome.ended == "OSError" and ("\n" in outcome.error or str(self.place.config.out) not in outcome.error):
            return [f"message of an error: expected a line that names the path, got {outcome.error!r}"]
        if outcome.ended == "RunStopped" and outcome.signal != fault.number:
            return [f"signal: expected {fault.number}, got {outcome.signal}"]
        return []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=20, help="how many faults")
    parser.add_argument("--first", type=int, default=0, help="number of the first, to see one again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unsynced", choices=("files", "folders"), default="", help="let their fsync do nothing")
    chosen = parser.parse_args(arguments)
    found: Counter[str] = Counter()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Place(Path(folder), chosen.unsynced), chosen.seed)
        for number in range(chosen.first, chosen.first + chosen.count):
            story, problems = harness.bring_about(number)
            print(f"{number:4}  {story}", flush=True)
            for problem in problems:
                print(f"      FAILED  {problem}", flush=True)
            found.update({problem.partition(":")[0] for problem in problems})
    wrong = ", ".join(f"{count} {problem}" for problem, count in sorted(found.items()))
    print(
        f"{chosen.count} faults in {time.monotonic() - start:.0f} s: {wrong or 'no run lost, no row doubled or missing, bit for bit as undisturbed'}"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
