"""The folder a run writes to, and whether it may."""

from __future__ import annotations

import json
import os
from pathlib import Path

from crate_mae.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from crate_mae.training.config import PretrainConfig

METRICS, STATE, PICTURE = "metrics.jsonl", "state.pt", "reconstructions.png"
RUN_FILES = (METRICS, CONFIG_FILE, WEIGHTS_FILE, STATE, PICTURE)
SUMMARY = "summary.png"
"""Written by the demo alone."""


def check_run_folder(config: PretrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Raise what `pretrain` says of a folder that holds a run, of one that does not, and of one that cannot be written."""
    _refuse_unwritable(config.out)
    held = _held(config.out)
    early = stopped_early(config.out)
    stopped = f"the run in {config.out} stopped before its first save; --overwrite starts it anew"
    if resume and STATE in held:
        _refuse_other_run(config)
    elif resume:
        nothing = f"nothing to resume: {config.out / STATE} does not exist"
        raise FileNotFoundError(stopped if early else nothing)
    elif held and not overwrite:
        if STATE in held:
            raise FileExistsError(f"{config.out} holds a run already; --resume continues it, --overwrite deletes it")
        lost = f"{config.out} holds {', '.join(held)}; name another --out, or delete them with --overwrite"
        raise FileExistsError(stopped if early else lost)


def make_run_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"--out {out}: {error}") from error


def clear_run_folder(out: Path) -> None:
    """Delete the files of a run, and nothing else."""
    for name in (*RUN_FILES, SUMMARY):
        (out / name).unlink(missing_ok=True)


def stopped_early(out: Path) -> bool:
    """Whether there is of a run what is written before it first saves."""
    held = _held(out)
    return CONFIG_FILE in held and not {STATE, WEIGHTS_FILE} & set(held)


def _held(out: Path) -> list[str]:
    return [name for name in RUN_FILES if (out / name).exists()]


def _refuse_unwritable(out: Path) -> None:
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"--out {out}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: {existing} cannot be written to")


def _refuse_other_run(config: PretrainConfig) -> None:
    """Refuse changes that would make the steps taken so far mean something else."""
    file, asked = config.out / CONFIG_FILE, config.to_dict()
    kept = [*(("model", name) for name in asked["model"]), ("schedule", "batch_size"), ("run", "seed")]
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        values = [saved[group][name] for group, name in kept]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is missing or broken, and --resume needs it: mend it, or start anew with --overwrite"
        ) from error
    pairs = {f"{group}.{name}": (value, asked[group][name]) for (group, name), value in zip(kept, values, strict=True)}
    pairs["init"] = (saved.get("init"), asked["init"])  # which runs of older versions do not have
    for name, (had, got) in pairs.items():
        if had != got:
            raise ValueError(
                f"{name}: the run in {config.out} has {had}, got {got}; a resumed run keeps it, --overwrite starts anew"
            )
