"""What all sinks of metrics are, and what they take of a row."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from crate_mae.data import MissingLibrary


class Sink(ABC):
    """One more place for the rows of metrics.jsonl.

    What was sent to it cannot be taken back. So it goes on only where it was closed in order with just the rows that
    metrics.jsonl has now; otherwise it starts anew.

    Args:
        out: the run's folder.
        config: the run's settings, as config.json has them.
        identity: its `identity` when it was closed, to go on from there; None to start anew.
        say: takes a line for the user.

    Attributes:
        name: as `run.log_to` has it.
        place: the file or folder in the run's folder where it leaves what it does not send elsewhere.
        library, installed_by: the module that it needs, and what installs it.
        in_files: it writes files of the run, whose errors end the run as those of metrics.jsonl do.
        identity: what a tracker knows the run by; empty where there is none.
        goes_on: whether it holds the rows before; otherwise it is empty.

    Raises:
        MissingLibrary: an ImportError: its library is not installed.
        Exception: its library's own, where it cannot be opened.
    """

    name: ClassVar[str]
    place: ClassVar[str]
    library: ClassVar[str] = ""
    installed_by: ClassVar[str] = ""
    in_files: ClassVar[bool] = False

    def __init__(self, out: Path, config: dict[str, Any], identity: str | None, say: Callable[[str], None]) -> None:
        self.check()
        self.out, self.say = out, say
        self.identity = ""
        self.goes_on = False

    @classmethod
    def check(cls) -> None:
        """Raise a MissingLibrary if what it needs is not installed."""
        try:
            if cls.library:
                importlib.import_module(cls.library)
        except ImportError as error:
            raise MissingLibrary(f"run.log_to: {cls.name} needs a library ({error}): {cls.installed_by}") from error

    @abstractmethod
    def row(self, step: int, scalars: dict[str, float]) -> None:
        """Take a row; it may be on its way still when this returns."""

    def fill(self, rows: Iterable[dict[str, Any]]) -> None:
        """Take all rows so far, as metrics.jsonl has them."""
        for row in rows:
            self.row(row["step"], scalars_of(row))

    def picture(self, step: int, name: str, path: Path) -> None:  # noqa: B027 - nothing, where there is no place for one
        """Take a PNG file as it is now, where pictures can be shown."""

    @abstractmethod
    def close(self, ended: str) -> None:
        """Wait until it has all that it was given.

        Args:
            ended: how the run has: "finished", "stopped" or "failed".

        Raises:
            Exception: it may not have all.
        """


def scalars_of(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by name, beside its step: those in dictionaries and lists by path, such as "inside/encoder/zeros/1",
    counted from 1 as layers are; true as 1 and false as 0. Texts are left out."""
    scalars: dict[str, float] = {}
    for name, value in row.items():
        if name != "step":
            _gather(name, value, scalars)
    return scalars


def _gather(path: str, value: Any, scalars: dict[str, float]) -> None:
    if isinstance(value, bool | int | float):
        scalars[path] = float(value)
    elif isinstance(value, dict):
        for name, each in value.items():
            _gather(f"{path}/{name}", each, scalars)
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value, start=1):
            _gather(f"{path}/{number}", each, scalars)
