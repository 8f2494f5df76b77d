"""What commands read of a run, with errors that say whose file is to blame."""

from __future__ import annotations

import json
from pathlib import Path

from crate_mae.checkpoints import CONFIG_FILE, load_model, read_normalization
from crate_mae.data.transforms import Normalization
from crate_mae.model import CrateMAE


def normalization_of(run: Path) -> Normalization:
    """How the images of a run were standardised; errors as of `read_normalization`, and what is there may be no numbers."""
    try:
        return read_normalization(run)
    except TypeError as error:  # what is there are no numbers
        raise ValueError(
            f"{run / CONFIG_FILE}: images: expected mean and std, a number for each channel: {error}"
        ) from None


def model_of(run: Path) -> CrateMAE:
    """A run's model; errors as of `load_model`, and weights that are not its config's are a ValueError, too."""
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
