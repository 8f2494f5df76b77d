"""The folder a run writes to, and whether it may."""

from __future__ import annotations

import json
from pathlib import Path

from crate_mae.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from crate_mae.training.config import PretrainConfig

METRICS, STATE, PICTURE = "metrics.jsonl", "state.pt", "reconstructions.png"
RUN_FILES = (METRICS, CONFIG_FILE, WEIGHTS_FILE, STATE, PICTURE)


def check_run_folder(config: PretrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Raise what `pretrain` says of a folder that holds a run, or of one that does not."""
    if resume:
        if not (config.out / STATE).exists():
            raise FileNotFoundError(f"nothing to resume: {config.out / STATE} does not exist")
        _refuse_other_run(config)
    elif not overwrite and any((config.out / name).exists() for name in (CONFIG_FILE, STATE)):
        raise FileExistsError(f"{config.out} holds a run already; --resume continues it, --overwrite deletes it")


def clear_run_folder(out: Path) -> None:
    """Delete the files of a run, and nothing else."""
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)


def _refuse_other_run(config: PretrainConfig) -> None:
    """Refuse changes that would make the steps taken so far mean something else."""
    saved = json.loads((config.out / CONFIG_FILE).read_text(encoding="utf-8"))
    asked = config.to_dict()
    for group, names in (
        ("model", asked["model"]),
        ("schedule", ["batch_size"]),
        ("run", ["seed"]),
    ):
        for name in names:
            if saved[group][name] != asked[group][name]:
                raise ValueError(
                    f"{group}.{name}: the run in {config.out} has {saved[group][name]}, got {asked[group][name]}; "
                    "a resumed run keeps it"
                )
