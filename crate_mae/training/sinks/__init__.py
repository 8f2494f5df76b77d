"""Sinks: further places for the rows of metrics.jsonl. CSV, TensorBoard, Weights & Biases, MLflow.

metrics.jsonl is cut back when a run is resumed from an earlier state, but what was sent to a sink cannot be taken back. Hence one
rule: a sink goes on if it was closed in order, with exactly the rows that metrics.jsonl has now; any other starts anew and gets
all rows. sinks.json, which is there only while no run is going on, tells how sinks were closed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from crate_mae.data import MissingLibrary
from crate_mae.files import remove, remove_tree, replaced, sync_folder, write_json
from crate_mae.training.sinks import csv, mlflow, tensorboard, wandb
from crate_mae.training.sinks.sink import Sink, scalars_of

__all__ = ["PLACES", "Sink", "Sinks", "check_sinks", "clear_sinks", "open_sinks", "scalars_of"]

_KINDS: dict[str, type[Sink]] = {
    kind.name: kind for kind in (csv.CSVSink, tensorboard.TensorBoardSink, wandb.WandbSink, mlflow.MLflowSink)
}
PLACES = {kind.name: kind.place for kind in _KINDS.values()}
"""The file or folder of each sink in the run's folder, for what it does not send elsewhere."""

_CLOSED = "sinks.json"
_OURS = ".sinks"
"""The file that names the sinks ever opened in a folder. A file in the place of another sink is not the run's, and left alone."""


class Sinks:
    """The sinks of a run.

    If a tracker fails, a line says so, and nothing more is sent to it.

    Args:
        sinks: that are open.
        out: the run's folder.
        rows: how many rows there are already.
        say: takes a line for the user.
    """

    def __init__(self, sinks: Sequence[Sink], out: Path, rows: int, say: Callable[[str], None]) -> None:
        self._sinks, self._out, self._rows, self._say = list(sinks), out, rows, say

    def row(self, row: dict[str, Any]) -> None:
        """Send a row, as it was written to metrics.jsonl.

        Raises:
            OSError: a file could not be written; the message names it.
        """
        self._rows += 1
        scalars = scalars_of(row)
        for sink in tuple(self._sinks):
            with self._failure_told(sink):
                sink.row(row["step"], scalars)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Send a PNG file, as it is now; errors as of `row`."""
        for sink in tuple(self._sinks):
            with self._failure_told(sink):
                sink.picture(step, name, path)

    def close(self, ended: str) -> None:
        """Wait until all is sent, and note which sinks can go on; a line tells of each that fails.

        Args:
            ended: how the run ended: "finished", "stopped" or "failed".
        """
        closed = {}
        for sink in self._sinks:
            try:
                sink.close(ended)
                closed[sink.name] = {"identity": sink.identity, "rows": self._rows}
            except Exception as error:
                self._say(f"{sink.name}: {_in_words(error)}; it may lack rows, and metrics.jsonl has all")
        self._sinks = []
        if closed:
            try:
                write_json(self._out / _CLOSED, closed)
            except OSError as error:
                self._say(f"{error}; resumed, the run sends all rows to {', '.join(closed)} again")

    def _fill(self, rows: Sequence[dict[str, Any]]) -> None:
        for sink in tuple(self._sinks):
            if rows and not sink.goes_on:
                self._say(f"{sink.name}: starts anew, with all {len(rows)} rows of metrics.jsonl")
                with self._failure_told(sink):
                    sink.fill(rows)

    @contextmanager
    def _failure_told(self, sink: Sink) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._sinks.remove(sink)
            if sink.in_files:
                raise
            self._say(f"{sink.name}: {_in_words(error)}; nothing more is sent to it, and metrics.jsonl has all rows")


def open_sinks(
    names: Sequence[str],
    out: Path,
    config: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    *,
    say: Callable[[str], None],
) -> Sinks:
    """Open the sinks of a run, and give them the rows of metrics.jsonl that they lack.

    Args:
        names: of the sinks, `run.log_to`; each one of `PLACES`.
        out: the run's folder.
        config: the run's settings, as config.json has them.
        rows: of metrics.jsonl, so far.
        say: takes a line for the user.

    Raises:
        MissingLibrary: an ImportError: a library is not installed.
        ValueError: there is no such sink, or a tracker cannot be opened.
        OSError: a file cannot be written.
    """
    for name in names:
        if name not in _KINDS:
            raise ValueError(f"run.log_to: expected some of {', '.join(_KINDS)}, got {name!r}")
    check_sinks(names, out)
    if {*names} - {*_ours(out)}:  # before they write, so that a killed run's files are known as its own
        with replaced(out / _OURS) as file:
            file.write("\n".join(sorted({*_ours(out), *names})).encode())
    before, opened = _closed_before(out), []
    with ExitStack() as undoing:
        for name in dict.fromkeys(names):
            closed = before.get(name, {})
            identity = closed["identity"] if closed.get("rows") == len(rows) else None
            sink = _opened(name, out, config, identity, say)
            opened.append(sink)
            undoing.callback(_abandon, sink)
        if (out / _CLOSED).exists():  # it is not true any more once rows are sent
            remove(out / _CLOSED)
            sync_folder(out)
        sinks = Sinks(opened, out, len(rows), say)
        sinks._fill(rows)
        undoing.pop_all()
    return sinks


def clear_sinks(out: Path) -> None:
    """Delete what sinks wrote into a run's folder, and nothing else."""
    remove(out / _CLOSED)
    for name in _ours(out):
        remove_tree(out / PLACES[name])
    remove(out / _OURS)


def check_sinks(names: Sequence[str], out: Path) -> None:
    """Refuse sinks that cannot be opened in the folder of a run.

    Raises:
        MissingLibrary: an ImportError: a library is not installed.
        ValueError: there is something in the place of a sink that no run in this folder wrote.
    """
    for name in names:
        _KINDS[name].check()
        place = out / PLACES[name]
        if name not in _ours(out) and os.path.lexists(place):
            raise ValueError(
                f"run.log_to: {place} is there already, and is not of a run in this folder; name another --out"
            )


def _ours(out: Path) -> list[str]:
    try:
        return [name for name in (out / _OURS).read_text(encoding="utf-8").split() if name in PLACES]
    except OSError:
        return []


def _opened(name: str, out: Path, config: dict[str, Any], identity: str | None, say: Callable[[str], None]) -> Sink:
    kind = _KINDS[name]
    try:
        return kind(out, config, identity, say)
    except Exception as error:
        if kind.in_files or isinstance(error, MissingLibrary):
            raise
        going_on = f" (to begin a new run there, delete {out / _CLOSED})" if identity else ""
        raise ValueError(f"run.log_to: {name} cannot be opened: {_in_words(error)}{going_on}") from error


def _abandon(sink: Sink) -> None:
    """Close a sink of a run that could not begin."""
    with suppress(Exception):  # another error is being raised already
        sink.close("failed")


def _closed_before(out: Path) -> dict[str, dict[str, Any]]:
    """The identity and the number of rows with which each sink was closed, by its name; empty if that is not known."""
    try:
        closed = json.loads((out / _CLOSED).read_text(encoding="utf-8"))
        return {name: {"identity": str(one["identity"]), "rows": int(one["rows"])} for name, one in closed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _in_words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
