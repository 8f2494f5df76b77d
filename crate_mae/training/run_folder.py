"""The folder of a run: its files, and the checks before a run writes to it."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from crate_mae.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from crate_mae.files import remove, remove_unfinished
from crate_mae.pictures.inside import SHOWS
from crate_mae.training.config import TrainingConfig
from crate_mae.training.sections import by_name
from crate_mae.training.sinks import clear_sinks
from crate_mae.training.states import remove_unused_tensors, saved_states

Config = TypeVar("Config", bound=TrainingConfig)

METRICS, PICTURE, BREAKDOWN = "metrics.jsonl", "reconstructions.png", "breakdown.json"
STARTS = "starts.jsonl"
"""A line for each start of the run: its step, time, machine and versions, and the settings that were changed."""
UNREADABLE, IMAGES = "unreadable.txt", "images.safetensors"
"""The list of unreadable images; and, if the images are in a folder, the names of all in the order of the run."""
STATES, BEST = "states", "best"
RUN_FILES = (METRICS, CONFIG_FILE, WEIGHTS_FILE, PICTURE, BREAKDOWN, UNREADABLE, IMAGES, STARTS)
PROFILE, TRACE, OPERATIONS = "profile", "trace.json.gz", "operations.txt"
SUMMARY = "summary.png"
"""Written by the demo only."""
ANALYSIS, ANALYSIS_PICTURE, INSIDE = "analysis.json", "analysis.png", "inside"
"""Written by `crate-mae analyze`, and the folder by `crate-mae visualize`, of the run's model."""
FEATURES, FINETUNED, EVALUATION, EVALUATION_PICTURE = "features", "finetuned", "evaluation.json", "evaluation.png"
"""Written by `crate-mae evaluate`: a folder of .safetensors files, a folder of fine-tunings, and the results."""


def check_run_folder(config: TrainingConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuse to resume where there is no run or one of other settings, and to start where there is one already."""
    held, early = _held(config.out), stopped_early(config.out)
    stopped = f"the run in {config.out} stopped before its first save; --overwrite starts it anew"
    if resume and has_state(config.out):
        _refuse_other_run(config)
    elif resume:
        nothing = f"nothing to resume: there is no state in {config.out / STATES}"
        raise FileNotFoundError(stopped if early else nothing)
    elif held and not overwrite:
        if has_state(config.out):
            raise FileExistsError(f"{config.out} holds a run already; --resume continues it, --overwrite deletes it")
        lost = f"{config.out} holds {', '.join(held)}; name another --out, or delete them with --overwrite"
        raise FileExistsError(stopped if early else lost)


def clear_run_folder(out: Path) -> None:
    """Delete the files of a run, and nothing else."""
    files = [out / name for name in (*RUN_FILES, SUMMARY, ANALYSIS, ANALYSIS_PICTURE, EVALUATION, EVALUATION_PICTURE)]
    files += (out / FEATURES).glob("*.safetensors")
    files += [out / INSIDE / name for name in SHOWS]
    files += [out / BEST / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
    files += [out / PROFILE / name for name in (TRACE, OPERATIONS)]
    files += [state.path for state in saved_states(out / STATES)]
    for path in files:
        remove(path)
    clear_sinks(out)
    remove_leftovers(out)
    for folder in (out / INSIDE, out / FEATURES):
        remove_unfinished(folder)
    for folder in (out / STATES, out / BEST, out / INSIDE, out / FEATURES, out / PROFILE):
        with suppress(OSError):  # it is not there, or holds something else
            folder.rmdir()


def remove_leftovers(out: Path) -> list[Path]:
    """Delete the unfinished files of a run that was killed while it saved; returns them."""
    unfinished = [path for folder in (out, out / STATES, out / BEST) for path in remove_unfinished(folder)]
    return unfinished + remove_unused_tensors(out / STATES)


def has_state(out: Path) -> bool:
    """Whether there is a state to resume from."""
    return bool(saved_states(out / STATES))


def progress(out: Path) -> str:
    """How far the run has come by its last state, such as "110 of 110 epochs"; empty if the folder does not tell."""
    try:
        epochs = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))["schedule"]["epochs"]
        *_, last = (out / METRICS).read_bytes().splitlines()
        row, (state, *_) = json.loads(last), saved_states(out / STATES)
        done = state.step * row["epoch"] / row["step"]
        return f"{f'{done:.2g}' if done < 1 else f'{round(done, 2):g}'} of {epochs} epochs"
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):  # no run, or one without a row or a state
        return ""


def kind_of(settings: dict[str, Any]) -> str:
    """The command of a run, by its config.json."""
    return "finetune" if "augment" in settings else "pretrain"


def stopped_early(out: Path) -> bool:
    """Whether the folder holds a run that ended before its first save."""
    held = _held(out)
    return CONFIG_FILE in held and WEIGHTS_FILE not in held and not has_state(out)


def _held(out: Path) -> list[str]:
    names = [name for name in RUN_FILES if (out / name).exists()]
    return names + [folder for folder in (STATES, BEST) if (out / folder).exists()]


def existing(out: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())


def refuse_unwritable(out: Path, option: str = "--out") -> None:
    """Raise an OSError if the folder cannot be written to, or not be made."""
    there = existing(out)
    if not there.is_dir():
        raise NotADirectoryError(f"{option} {out}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {out}: {there} cannot be written to")


def _refuse_other_run(config: TrainingConfig) -> None:
    """Refuse a run of another kind, and changes of settings that a resumed run must keep."""
    file, asked = config.out / CONFIG_FILE, config.to_dict()
    kept = {
        name: value
        for name, value in by_name(asked).items()
        if name in config.kept or name.partition(".")[0] in config.kept
    }
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        kind, had = kind_of(saved), by_name(saved)
        pairs = {name: (had[name], value) for name, value in kept.items()} if kind == config.kind else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is missing or broken, and --resume needs it: mend it, or start anew with --overwrite"
        ) from error
    if kind != config.kind:
        raise ValueError(f"{config.out} holds a run of crate-mae {kind}, and that resumes it; --overwrite deletes it")
    pairs["init"] = (saved.get("init"), asked["init"])
    if config.schedule.batch_size == "auto":  # the number that was found when the run was started stays
        pairs.pop("schedule.batch_size", None)
    for name, (had, got) in pairs.items():
        if had != got:
            raise ValueError(
                f"{name}: the run in {config.out} has {had}, got {got}; a resumed run keeps it, --overwrite starts anew"
            )


def with_its_batch_size(config: Config) -> Config:
    """The settings, with the batch size of the run that is resumed in place of "auto"."""
    if config.schedule.batch_size != "auto":
        return config
    return config.with_schedule(batch_size=_settings_of_run(config)["schedule.batch_size"])


def changed_settings(config: TrainingConfig) -> str:
    """The settings that differ from those of the run in the folder, in words."""
    had, has = _settings_of_run(config), by_name(config.to_dict())
    changes = [f"{name} {had[name]} -> {has[name]}" for name in has if name in had and had[name] != has[name]]
    return ", ".join(change for change in changes if not change.startswith("out "))


def other_images(config: TrainingConfig, had: int, has: int) -> str:
    """Why the images to train on may differ from those of the run in the folder, in words.

    Args:
        config: the present settings.
        had, has: how many images there were, and how many there are.
    """
    before, now = _settings_of_run(config), by_name(config.to_dict())
    changed = [
        f"{name} was {before.get(name)}, got {now[name]}"
        for name in ("data", "val", "images.val_fraction")
        if before.get(name) != now[name]
    ]
    return "; ".join(changed) or (
        f"files were added, removed or renamed since, {had} there were and {has} there are; put them back"
    )


def _settings_of_run(config: TrainingConfig) -> dict[str, Any]:
    return by_name(json.loads((config.out / CONFIG_FILE).read_text(encoding="utf-8")))
