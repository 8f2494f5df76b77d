"""Reads the folder of a run, for the commands that take one. Errors name the file, and count as the user's."""

from __future__ import annotations

import json
from pathlib import Path

from crate_mae.checkpoints import CONFIG_FILE, WEIGHTS_FILE, load_model, read_mae_config
from crate_mae.classifiers import Classifier
from crate_mae.cli.settings import read_json
from crate_mae.data.transforms import Normalization
from crate_mae.model import CrateMAE
from crate_mae.preprocessing import read_normalization
from crate_mae.sharing.origin import RECIPE
from crate_mae.training.config import MAX_SEED


def check_run(run: Path) -> None:
    """Refuse what is not the folder of a run or of a model.

    Raises:
        FileNotFoundError, NotADirectoryError: it is not there, or not a folder, or has no weights yet.
        ValueError: its config is not JSON.
    """
    if not run.is_dir():
        wrong = NotADirectoryError if run.exists() else FileNotFoundError
        raise wrong(
            f"RUN: expected the folder of a run, got {run}, {'a file' if run.exists() else 'which is not there'}"
        )
    read_json(run / CONFIG_FILE)
    if (run / CONFIG_FILE).exists() and not (run / WEIGHTS_FILE).exists():
        raise FileNotFoundError(
            f"RUN: {run} has no {WEIGHTS_FILE}: its run has not saved yet, or lost it; crate-mae pretrain --out {run} --resume "
            "writes it again where there is a state"
        )


def check_seed(seed: int) -> None:
    """Raise a ValueError for a seed that no generator takes."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"--seed: expected 0 to 2**64 - 1, got {seed}")


def normalization_of(run: Path) -> Normalization:
    """How the run's images were standardised. Errors as of ``read_normalization``; a ValueError if its values are not numbers."""
    try:
        return read_normalization(run)
    except TypeError as error:  # the values are not numbers
        raise ValueError(
            f"{run / CONFIG_FILE}: images: expected mean and std, a number for each channel: {error}"
        ) from None


def model_of(run: Path) -> CrateMAE:
    """The run's model, which must be a CrateMAE. Errors as of ``backbone_of`` and ``read_mae_config``."""
    read_mae_config(run)
    model = backbone_of(run)
    assert isinstance(model, CrateMAE)
    return model


def backbone_of(run: Path) -> CrateMAE | Classifier:
    """The run's model. Errors as of ``load_model``, but a ValueError if weights do not fit the config."""
    try:
        return load_model(run)
    except RuntimeError as error:  # the weights do not fit the config
        raise ValueError(str(error)) from error


def trained_ratio(run: Path) -> float:
    """The fraction of patches removed in training; 0.75 if the folder holds a model alone."""
    content = json.loads((run / CONFIG_FILE).read_text(encoding="utf-8"))
    recipe = content.get(RECIPE)  # a shared model has the run's settings there
    schedule = (recipe if isinstance(recipe, dict) else content).get("schedule", {})
    ratio = schedule.get("mask_ratio", 0.75) if isinstance(schedule, dict) else schedule
    if not isinstance(ratio, int | float):
        raise ValueError(f"{run / CONFIG_FILE}: schedule.mask_ratio: expected a number, got {ratio!r}")
    return ratio


def is_run(folder: Path) -> bool:
    """Whether a folder with a config.json is that of a run; else it holds a model alone."""
    return "schedule" in json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
