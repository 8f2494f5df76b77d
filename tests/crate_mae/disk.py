"""A disk under the `files` modules that fails when told to, and a model of it that knows what a power cut would take."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pickle
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What befalls a process: at the `nth` call of a kind or, where none is named, `delay` seconds after its start."""

    what: str = "none"
    """none, fail, short (a write that takes half of the data), kill, or signal."""

    call: str = ""
    nth: int = 1
    delay: float = 0.0
    number: int = 0
    """The errno, or the signal."""
    after: bool = False
    """The kill comes once the call took effect, of a write half of it; else before."""
    lasting: bool = False
    """Every later call fails, too, or every later write is short."""
    power_cut: bool = False
    """When the process has ended, what was not synced is lost."""

    def __str__(self) -> str:
        what = self.what
        if what == "none":
            return "undisturbed"
        if self.number:
            what = errno.errorcode[self.number] if what == "fail" else signal.Signals(self.number).name
        where = f"{'after' if self.after else 'at'} {self.call} ({self.nth})" if self.call else f"at {self.delay:.3f} s"
        return what + " for ever" * self.lasting + f" {where}" + ", power cut" * self.power_cut


class NotingOs:
    """Stands in for `os` in the `files` modules: notes each call, then whether it was done, and brings about the fault.

    A note is the name of the call, its path, and its other arguments, where the number of an `open` stands for the descriptor.

    Args:
        unsynced: "files" or "folders", whose fsync does nothing.
    """

    def __init__(self, notes: Path, root: Path, fault: Fault, unsynced: str = "") -> None:
        self._notes = os.open(notes, os.O_WRONLY | os.O_CREAT)
        self._root, self._fault, self._unsynced = root, fault, unsynced
        self._opened: dict[int, tuple[str, int]] = {}
        self._handles = itertools.count()
        self._uses: Counter[str] = Counter()
        self._met = False

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
            self._call("fsync", path, (handle,), lambda *_: None)  # the note is all that the power cut asks about

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
        fault, kind = self._fault, kind_of(name, path, self._root)
        self._uses[kind] += 1
        met = (fault.call, fault.nth) == (kind, self._uses[kind])
        self._met |= met
        strikes = fault.what if met or (self._met and fault.lasting) else ""
        if strikes == "fail":
            raise OSError(fault.number, os.strerror(fault.number), path)
        if strikes == "signal":
            signal.raise_signal(fault.number)
        if strikes == "kill" and not fault.after:
            os.kill(os.getpid(), signal.SIGKILL)
        if strikes in ("short", "kill") and name == "write":
            handle, data = arguments
            arguments = handle, data[: (len(data) + 1) // 2]
        self._note((name, path, *arguments))
        try:
            result = do(*arguments)
        except OSError:
            self._note(False)
            raise
        self._note(True)
        if strikes == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def _note(self, note: Any) -> None:
        os.write(self._notes, pickle.dumps(note))


def kind_of(name: str, path: str, root: Path) -> str:
    """A call by its name and its file, of whatever step that is."""
    return f"{name} {re.sub('[0-9]+', '#', os.path.relpath(path, root))}"


Notes = list[tuple[tuple[Any, ...], bool | None]]
"""Calls, and whether each was done; None of the last where the process was killed meanwhile."""


def read_notes(path: Path) -> Notes:
    read = []
    with contextlib.suppress(FileNotFoundError, EOFError, pickle.UnpicklingError), path.open("rb") as file:
        while True:
            read.append(pickle.load(file))
    return list(itertools.zip_longest(read[::2], read[1::2]))


class _File:
    def __init__(self) -> None:
        self.now, self.synced = bytearray(), b""

    def lose_power(self, rng: random.Random) -> None:
        now, old = bytes(self.now), self.synced
        if now != old:
            same = next((i for i, (a, b) in enumerate(zip(now, old, strict=False)) if a != b), min(len(now), len(old)))
            torn = rng.randint(same, len(now))
            self.now = bytearray(rng.choice((now, old, now[:torn], now[:torn] + bytes(len(now) - torn))))
        self.synced = bytes(self.now)


class _Folder:
    """Its entries as they have been one after the other, since the first of them were synced."""

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

    def files(self, path: Path) -> dict[Path, bytes]:
        """The content of each file in it and below, where `path` is its own."""
        found: dict[Path, bytes] = {}
        for name, entry in self.now.items():
            found |= entry.files(path / name) if isinstance(entry, _Folder) else {path / name: bytes(entry.now)}
        return found

    def write(self, path: Path) -> None:
        for name, entry in self.now.items():
            if isinstance(entry, _Folder):
                (path / name).mkdir()
                entry.write(path / name)
            else:
                (path / name).write_bytes(entry.now)


class Disk:
    """A model of a folder, empty at first, that knows what of it would outlive a power cut.

    Of a file that was not synced a power cut leaves the old content or the new, the new cut off anywhere, or zeros from there on.
    Of a folder that was not synced it leaves what was in there at any moment since it was.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.tree = root, _Folder()

    def replay(self, notes: Notes) -> list[Path]:
        """Do what a process did; returns the files in which the real folder differs, written past the `files` modules."""
        opened: dict[int, list[Any]] = {}
        for note, done in notes:
            if done:
                self._apply(opened, *note)
        if notes and notes[-1][1] is None and self._differences():  # it was killed once that was done, too
            name, path, *arguments = notes[-1][0]
            if name == "write":  # of which any part may be
                arguments[1] = arguments[1][: os.path.getsize(path) - len(self._entry(path).now)]
            self._apply(opened, name, path, *arguments)
        return self._differences()

    def lose_power(self, rng: random.Random) -> None:
        """Leave of the real folder what a power cut might."""
        self.tree.lose_power(rng)
        for folder in self.root.iterdir():
            shutil.rmtree(folder)
        self.tree.write(self.root)

    def _apply(self, opened: dict[int, list[Any]], name: str, path: str, *arguments: Any) -> None:
        base = os.path.basename(path)
        match name, *arguments:
            case "open", handle, flags:
                if (entry := self._entry(path)) is None:
                    entry = _File()
                    self._folder(path).change(**{base: entry})
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
                opened[handle][1] = offset + (0, position, len(entry.now))[whence]
            case "fsync", handle:
                entry = opened[handle][0]
                if isinstance(entry, _Folder):
                    del entry.history[:-1]
                else:
                    entry.synced = bytes(entry.now)
            case "close", handle:
                del opened[handle]
            case "replace", source:
                assert os.path.dirname(source) == os.path.dirname(path)
                self._folder(path).change(**{os.path.basename(source): None, base: self._entry(source)})
            case ("unlink",):
                self._folder(path).change(**{base: None})
            case ("mkdir",):
                self._folder(path).change(**{base: _Folder()})

    def _folder(self, path: str) -> _Folder:
        return self._entry(os.path.dirname(path))

    def _entry(self, path: str) -> Any:
        entry = self.tree
        for part in Path(path).relative_to(self.root).parts:
            entry = entry.now.get(part)
        return entry

    def _differences(self) -> list[Path]:
        real = {path: path.read_bytes() for path in self.root.rglob("*") if path.is_file() and path.name != ".lock"}
        modelled = self.tree.files(self.root)
        return sorted(path for path in real.keys() | modelled.keys() if real.get(path) != modelled.get(path))
