"""What the folder of a run tells of the model that it made, for those who are given the model without the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from crate_mae.checkpoints import CONFIG_FILE, WEIGHTS_FILE, read_config
from crate_mae.comparing import ComparedRun, Comparison, compare
from crate_mae.data.specification import without_folders
from crate_mae.state_dicts import checksum, read_weights
from crate_mae.training.run_folder import BEST, EVALUATION, METRICS

RECIPE = "recipe"
"""The section of a shared ``config.json`` that says how the model was trained."""

_SECTIONS = {
    "images": ("mean", "std", "num_workers", "cache_mb", "max_unreadable"),
    "augment": (),
    "optimizer": (),
    "schedule": (),
}
"""Of a run's settings those that say what is learnt, and which of each are left out: said elsewhere, or of the machine."""

_OF_RUN = ("precision", "seed")
"""Likewise, of the section run."""


@dataclass(frozen=True)
class Score:
    """How often ``method`` found the class of a test image, as a fraction, and models with random weights on the same images.

    ``data`` names the images, of which there were ``train`` to learn from and ``test`` to test on.
    """

    method: str
    top1: float
    untrained: float | None
    data: str
    train: int
    test: int


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Attributes:
        recipe: how it was trained, in plain values without paths of the machine; empty where its folder does not tell.
        mean, std: by which its images were standardised; None where the folder does not say.
        classes: their names, of a classifier.
        comparison: the course of its training, of one run; None of a folder without rows.
        best: whether it is the model of the best validation, and not the last.
        scores: what was measured of just these weights.
    """

    recipe: Mapping[str, Any]
    mean: list[float] | None
    std: list[float] | None
    classes: list[str] | None
    comparison: Comparison | None
    best: bool
    scores: tuple[Score, ...]

    @property
    def run(self) -> ComparedRun | None:
        return self.comparison.runs[0] if self.comparison else None


def origin_of(run: Path, weights: Mapping[str, Tensor]) -> Origin:
    """What the folder of a run, or of a model, tells of a model with these weights.

    Args:
        weights: as ``weights_to_save`` gives them.

    Raises:
        FileNotFoundError: there is no model in the folder.
        ValueError: the model there, the best one included, has other weights, so that nothing told there is of this one; or a
            file in the folder is damaged.
    """
    content = json.loads(_read(run / CONFIG_FILE)) if read_config(run) else {}
    given = checksum(weights)
    if checksum(read_weights(run / WEIGHTS_FILE)) == given:
        best = False
    elif (run / BEST / WEIGHTS_FILE).exists() and checksum(read_weights(run / BEST / WEIGHTS_FILE)) == given:
        best = True
    else:
        raise ValueError(
            f"run: the weights of the model are not those in {run}, nor in {run / BEST}, which its card would be of: leave run "
            f"out, and give mean, std and classes yourself"
        )
    images = content.get("images")
    mean, std = (images.get("mean"), images.get("std")) if isinstance(images, dict) else (None, None)
    return Origin(
        recipe=content.get(RECIPE) or _recipe(content),
        mean=mean,
        std=std,
        classes=content.get("classes"),
        comparison=compare([run]) if (run / METRICS).exists() else None,
        best=best,
        scores=_scores(run / EVALUATION, given),
    )


def _recipe(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that say what is learnt; of no run, nothing."""
    if "schedule" not in content:
        return {}
    recipe: dict[str, Any] = {"data": without_folders(content.get("data"))}
    if content.get("init"):
        recipe["init"] = Path(content["init"]).name
    for section, others in _SECTIONS.items():
        if section in content:
            recipe[section] = {name: value for name, value in content[section].items() if name not in others}
    recipe["run"] = {name: content["run"][name] for name in _OF_RUN if name in content.get("run", {})}
    return recipe


def _scores(file: Path, weights: str) -> tuple[Score, ...]:
    """Of evaluation.json, what was measured of the weights with this checksum."""
    if not file.exists():
        return ()
    found = json.loads(_read(file))
    names = [name for name, of in found.get("weights", {}).items() if of == weights]
    if not names:
        return ()
    images, untrained = found["images"], found["summary"]
    return tuple(
        Score(
            method,
            scores["top1"],
            untrained[method].get("untrained", {}).get("top1"),
            found["data"]["name"],
            images["train"],
            images["test"],
        )
        for method, scores in found["runs"][names[0]].items()
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not whole JSON ({error})") from error
