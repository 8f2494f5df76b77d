"""Compares runs by what is in their folders: their course, how far they have come, and which settings differ."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from crate_mae.checkpoints import CONFIG_FILE
from crate_mae.training.divergence import is_same_guess
from crate_mae.training.metrics import MetricsLog
from crate_mae.training.ownership import LOCK
from crate_mae.training.run_folder import BREAKDOWN, METRICS, STARTS, STATES, kind_of
from crate_mae.training.sections import by_name
from crate_mae.training.states import saved_states

GUESSES = {"pretrain": ("mean_fill_loss", "mean fill"), "finetune": ("guess_loss", "guessing")}
"""By kind of run, the error of a guess that needs no model: its name in rows of validations, and in words."""

_OF_TRAINING_LOSS = (
    "model.norm_pix_loss",
    "schedule.mask_ratio",
    "augment.mixup",
    "augment.cutmix",
    "augment.switch",
    "augment.label_smoothing",
)
"""Settings on which the meaning of a training loss depends."""


class Reading(NamedTuple):
    """A row of metrics.jsonl.

    Attributes:
        step, images, hours: what training had taken by then; hours count only while the run was going on.
        diverging: whether the run was said to diverge there.
        values: the numbers in the row, by name.
    """

    step: int
    images: int
    hours: float
    diverging: bool
    values: Mapping[str, float]


class Start(NamedTuple):
    """A start of a run.

    Attributes:
        step: from which the run went on.
        changed: the settings that were changed, in words.
        forgotten: whether the run later went back to an earlier step, so that the steps of this start do not count.
    """

    step: int
    changed: str
    forgotten: bool


@dataclass(frozen=True)
class ComparedRun:
    """What the folder of a run tells about it.

    Attributes:
        name: the shortest end of the path to `folder` that no other run's path has.
        kind: the run's command, "pretrain" or "finetune".
        settings: of config.json, by section.name.
        steps: readings of steps, one or more; their values include `loss`.
        validations: readings of validations; their values include `val_loss`.
        starts: of the run, in their order, as far as the folder tells.
        step, epochs: how far the run has come by its rows and states.
        hours_estimated: whether the rows have no hours, so that these are estimated from images per second.
        diverged_at: the step since which the run diverges; None if it does not now.
        broke_down_at: the step at which the loss or weights were not finite; None if the run did not end so.
        locked: whether a process has the folder, or was killed while it had it.
    """

    name: str
    folder: Path
    kind: str
    settings: Mapping[str, Any]
    steps: tuple[Reading, ...]
    validations: tuple[Reading, ...]
    starts: tuple[Start, ...]
    step: int
    epochs: float
    hours_estimated: bool
    diverged_at: int | None
    broke_down_at: int | None
    locked: bool

    @property
    def images(self) -> int:
        return self.step * self.settings["schedule.batch_size"]

    @property
    def hours(self) -> float:
        """Hours by the last row of steps."""
        return self.steps[-1].hours

    @property
    def images_per_second(self) -> float:
        """The median over the rows."""
        return median(reading.values["images_per_second"] for reading in self.steps)

    @property
    def last(self) -> Reading | None:
        """The last validation, if there is one."""
        return self.validations[-1] if self.validations else None

    @property
    def guess(self) -> float | None:
        """The error of the guess at the last validation, if there is one."""
        return self.last.values.get(GUESSES[self.kind][0]) if self.last else None

    @property
    def best(self) -> Reading | None:
        """The best validation, if there is one, among those that did not diverge and are on the same images as the last one.

        In pre-training it has the least error; in fine-tuning the highest top-1, and among equals the least error.
        """
        guess, _ = GUESSES[self.kind]
        comparable = [
            reading
            for reading in self.validations
            if not reading.diverging and _is_same(reading.values.get(guess), self.guess)
        ]
        return min(
            comparable, key=lambda each: (-each.values.get("val_top1", 0), each.values["val_loss"]), default=None
        )

    @property
    def resumed_at(self) -> list[int]:
        """The steps from which the run was resumed, without starts that are forgotten."""
        return list(dict.fromkeys(start.step for start in self.starts if start.step > 0 and not start.forgotten))

    @property
    def progress(self) -> str:
        """Epochs done of all, such as "40 of 110"."""
        done = f"{self.epochs:.3g}" if self.epochs < 1 else f"{round(self.epochs, 2):g}"
        return f"{done} of {self.settings['schedule.epochs']}"

    @property
    def state(self) -> str:
        """The state of the run, in words."""
        if self.broke_down_at is not None:
            said = f"broke down at step {self.broke_down_at:,}: loss or weights not finite, {self.progress} epochs"
        elif self.epochs >= self.settings["schedule.epochs"]:
            said = "finished"
        else:
            said = (
                f"{'running, or killed' if self.locked else 'stopped'}, at step {self.step:,}, {self.progress} epochs"
            )
        if self.diverged_at is not None:
            said = f"diverged at step {self.diverged_at:,}: {self._error_since(self.diverged_at)}; {said}"
        elif marked := [reading.step for reading in (*self.steps, *self.validations) if reading.diverging]:
            said += f"; it diverged at step {min(marked):,}, and no longer after step {max(marked):,}"
        if self.resumed_at:
            said += f"; resumed at step {', '.join(f'{step:,}' for step in self.resumed_at)}"
        return said

    def _error_since(self, step: int) -> str:
        """The last validation's error if it is of `step` or later, else the last loss."""
        if self.last and self.last.step >= step:
            return f"validation error {self.last.values['val_loss']:.4g}"
        return f"loss {self.steps[-1].values['loss']:.4g}"


@dataclass(frozen=True)
class Comparison:
    """Runs of one kind.

    Attributes:
        runs: that are compared.
        differing: the settings in which the runs differ, by section.name in the order of config.json, with a value for each run;
            None, too, if the version of a run did not have the setting. Without `out`.
        remarks: sentences on why numbers cannot be compared, or are estimated.
    """

    runs: tuple[ComparedRun, ...]
    differing: Mapping[str, tuple[Any, ...]]
    remarks: tuple[str, ...]

    @property
    def kind(self) -> str:
        return self.runs[0].kind


def compare(runs: Sequence[Path]) -> Comparison:
    """Compare runs by their folders, to which runs may be writing meanwhile.

    Args:
        runs: the folders, of runs that are finished, stopped, broken down or going on; one or more, all of `pretrain` or all of
            `finetune`.

    Raises:
        OSError: a folder is not there, or cannot be read, or has no config.json.
        ValueError: there is none, or the same twice, or of two kinds; one holds no run, or no row of steps yet; a file in it is
            broken. The message names the folder or the file.
    """
    if not runs:
        raise ValueError("runs: expected one or more folders, got none")
    folders = [Path(os.path.realpath(run)) for run in runs]
    for number, (run, folder) in enumerate(zip(runs, folders, strict=True)):
        if folder in folders[:number]:
            raise ValueError(f"expected each run once, got {runs[folders.index(folder)]} and {run}, which are the same")
    names = _names([Path(os.path.abspath(run)) for run in runs])
    read = tuple(_read(Path(run), name) for run, name in zip(runs, names, strict=True))
    kinds = {run.kind: str(run.folder) for run in read}
    if len(kinds) > 1:
        described = " and ".join(f"{folder}, of crate-mae {kind}" for kind, folder in kinds.items())
        raise ValueError(f"expected runs of one kind, got {described}: their errors are not of one measure")
    differing = _differing(read)
    return Comparison(read, differing, tuple(_remarks(read, differing)))


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that is not an end of another path."""
    ends = [[str(Path(*path.parts[-count:])) for count in range(1, len(path.parts) + 1)] for path in paths]
    return [next(end for end in own if not any(end in others for others in ends if others is not own)) for own in ends]


def _read(folder: Path, name: str) -> ComparedRun:
    kind, settings = _settings(folder)
    batch_size = settings["schedule.batch_size"]
    rows = list(MetricsLog(folder / METRICS, writes=False).rows())
    of_steps = [row for row in rows if "loss" in row]
    if not of_steps:
        raise ValueError(
            f"{folder / METRICS}: expected rows of steps, which come every {settings.get('run.log_every')} steps "
            "(run.log_every), got none yet"
        )
    for row in of_steps:
        if not _has(row, "loss", "epoch", "images_per_second") or not row["epoch"] * row["images_per_second"] > 0:
            raise ValueError(
                f"{folder / METRICS}: expected numbers as loss, and above 0 as epoch and images_per_second, in the row of step "
                f"{row['step']}, got {row}"
            )
    estimated = not all(_has(row, "hours") for row in of_steps)
    at = [row["step"] for row in of_steps]
    hours = _estimated_hours(of_steps, batch_size) if estimated else [row["hours"] for row in of_steps]

    def readings(of: Sequence[dict[str, Any]]) -> tuple[Reading, ...]:
        taken = np.interp([row["step"] for row in of], [0, *at], [0.0, *hours]).tolist()
        return tuple(_reading(row, batch_size, each) for row, each in zip(of, taken, strict=True))

    broke_down_at = _broke_down_at(folder / BREAKDOWN)
    states = saved_states(folder / STATES)
    step = max(rows[-1]["step"], *(state.step for state in states[:1]), (broke_down_at or 1) - 1)
    return ComparedRun(
        name,
        folder,
        kind,
        settings,
        steps=readings(of_steps),
        validations=readings([row for row in rows if _has(row, "val_loss")]),
        starts=tuple(_starts(folder / STARTS)),
        step=step,
        epochs=step * of_steps[-1]["epoch"] / at[-1],
        hours_estimated=estimated,
        diverged_at=_diverged_at(rows),
        broke_down_at=broke_down_at,
        locked=(folder / LOCK).exists(),
    )


def _settings(folder: Path) -> tuple[str, dict[str, Any]]:
    """The kind of run, and its settings by section.name."""
    if not folder.is_dir():
        wrong = NotADirectoryError if folder.exists() else FileNotFoundError
        raise wrong(f"{folder}: expected the folder of a run, got {'a file' if folder.exists() else 'none there'}")
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: expected the folder of a run, got one without {CONFIG_FILE}")
    saved = _json(file)
    settings = by_name(saved) if isinstance(saved, dict) else {}
    for name in ("schedule.epochs", "schedule.batch_size"):
        value = settings.get(name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{file}: expected the settings of a run, with a whole number as {name}, got {value!r}")
    return kind_of(saved), settings


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not whole JSON ({error})") from None


def _has(row: Mapping[str, Any], *names: str) -> bool:
    """Whether the row has numbers by these names."""
    return all(isinstance(row.get(name), int | float) for name in names)


def _reading(row: Mapping[str, Any], batch_size: int, hours: float) -> Reading:
    numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
    return Reading(row["step"], row["step"] * batch_size, hours, bool(row.get("diverging")), numbers)


def _estimated_hours(rows: Iterable[Mapping[str, Any]], batch_size: int) -> list[float]:
    """Hours at each row, if all steps between two rows were as fast as the second row says."""
    hours, taken, before = [], 0.0, 0
    for row in rows:
        taken += (row["step"] - before) * batch_size / row["images_per_second"] / 3600
        before = row["step"]
        hours.append(taken)
    return hours


def _starts(file: Path) -> list[Start]:
    rows = list(MetricsLog(file, writes=False).rows())
    return [
        Start(row["step"], str(row.get("changed", "")), any(later["step"] < row["step"] for later in rows[place:]))
        for place, row in enumerate(rows)
    ]


def _broke_down_at(file: Path) -> int | None:
    if not file.exists():
        return None
    told = _json(file)
    step = told.get("step") if isinstance(told, dict) else None
    if not isinstance(step, int):
        raise ValueError(f"{file}: expected the step at which the run broke down, got {step!r}")
    return step


def _diverged_at(rows: Iterable[Mapping[str, Any]]) -> int | None:
    """The step since which the run diverges, by its last rows of steps and of validations; None if it does not."""
    of_steps = of_validations = False
    since = None
    for row in rows:
        if "loss" in row:
            of_steps = bool(row.get("diverging"))
        elif "val_loss" in row:
            of_validations = bool(row.get("diverging"))
        if not (of_steps or of_validations):
            since = None
        elif since is None:
            since = row["step"]
    return since


def _differing(runs: Sequence[ComparedRun]) -> dict[str, tuple[Any, ...]]:
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: tuple(run.settings.get(name) for run in runs) for name in names if name != "out"}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def _remarks(runs: Sequence[ComparedRun], differing: Mapping[str, object]) -> list[str]:
    said = []
    guesses = {run.name: run.guess for run in runs if run.guess is not None}
    if not all(_is_same(guess, other) for guess in guesses.values() for other in guesses.values()):
        told = ", ".join(f"{guess:.4g} ({name})" for name, guess in guesses.items())
        _, guess = GUESSES[runs[0].kind]
        said.append(f"Validation errors are not of the same images, masks or scales: {guess} has {told}.")
    if "model.norm_pix_loss" in differing:
        said.append(
            "Validation errors are not of one measure: with model.norm_pix_loss, brightness and contrast of every predicted "
            "patch are the true ones."
        )
    if changing := [name for name in _OF_TRAINING_LOSS if name in differing]:
        said.append(
            f"Training losses are not of one measure: {', '.join(changing)} {'differ' if changing[1:] else 'differs'}."
        )
    if estimated := [run.name for run in runs if run.hours_estimated]:
        said.append(f"Times of {', '.join(estimated)} are estimated, from images per second: the rows have no hours.")
    return said


def _is_same(guess: float | None, other: float | None) -> bool:
    return guess is None or other is None or is_same_guess(guess, other)
