"""What is in the folder of a run, for the commands that take one; errors name the file, and are a user's."""

from __future__ import annotations

import json
from pathlib import Path

from crate_mae.checkpoints import CONFIG_FILE, load_model, read_normalization
from crate_mae.data.transforms import Normalization
from crate_mae.model import CrateMAE


def normalization_of(run: Path) -> Normalization:
    """How its images were standardised. Errors as of ``read_normalization``, and a ValueError where that says no numbers."""
    try:
        return read_normalization(run)
    except TypeError as error:  # what is there are no numbers
        raise ValueError(
            f"{run / CONFIG_FILE}: images: expected mean and std, a number for each channel: {error}"
        ) from None


def model_of(run: Path) -> CrateMAE:
    """Its model. Errors as of ``load_model``; weights that do not fit their config are a ValueError, too."""
    try:
        return load_model(run)
    except RuntimeError as error:  # weights that are not its config's
        raise ValueError(str(error)) from error


def trained_ratio(run: Path) -> float:
    """The share of patches removed in training; of a model alone, what is usual."""
    schedule = json.loads((run / CONFIG_FILE).read_text(encoding="utf-8")).get("schedule", {})
    ratio = schedule.get("mask_ratio", 0.75) if isinstance(schedule, dict) else schedule
    if not isinstance(ratio, int | float):
        raise ValueError(f"{run / CONFIG_FILE}: schedule.mask_ratio: expected a number, got {ratio!r}")
    return ratio


def is_run(folder: Path) -> bool:
    """Whether a folder with a config.json says how a model was trained; else it holds a model alone."""
    return "schedule" in json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
