"""The base class of sinks, and the numbers that they take of a row."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from crate_mae.data import MissingLibrary


class Sink(ABC):
    """A further place for the rows of metrics.jsonl.

    What was sent to it cannot be taken back. So it goes on only if it was closed in order with exactly the rows that
    metrics.jsonl has now; otherwise it starts anew.

    Args:
        out: the run's folder.
        config: the run's settings, as config.json has them.
        identity: its `identity` when it was closed, to go on from there; None to start anew.
        say: takes a line for the user.

    Attributes:
        name: its name in `run.log_to`.
        place: the file or folder in the run's folder for what it does not send elsewhere.
        library, installed_by: the module that it needs, and the command that installs it.
        in_files: whether it writes files of the run; then its errors end the run, as those of metrics.jsonl do.
        identity: the tracker's id of the run; empty if there is none.
        goes_on: whether it holds the earlier rows; otherwise it is empty.

    Raises:
        MissingLibrary: an ImportError: its library is not installed.
        Exception: its library cannot open it; the library's own error.
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
        """Raise a MissingLibrary if its library is not installed."""
        try:
            if cls.library:
                importlib.import_module(cls.library)
        except ImportError as error:
            raise MissingLibrary(f"run.log_to: {cls.name} needs a library ({error}): {cls.installed_by}") from error

    @abstractmethod
    def row(self, step: int, scalars: dict[str, float]) -> None:
        """Take a row; it may still be on its way when this returns."""

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
            ended: how the run ended: "finished", "stopped" or "failed".

        Raises:
            Exception: it may lack rows.
        """


def scalars_of(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by name, without its step and texts; true is 1, false 0.

    Numbers in dictionaries and lists have a path for a name, such as "inside/encoder/zeros/1"; lists are counted from 1."""
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
