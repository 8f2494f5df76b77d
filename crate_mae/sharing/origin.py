"""Where a model comes from, as the folder of its run tells, for those who get the model without that folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from crate_mae.checkpoints import CONFIG_FILE, WEIGHTS_FILE, read_config
from crate_mae.comparing import ComparedRun, Comparison, compare
from crate_mae.data.specification import without_folders
from crate_mae.evaluation.classes import TITLES
from crate_mae.state_dicts import checksum, read_weights
from crate_mae.training.run_folder import BEST, EVALUATION, METRICS, STATES
from crate_mae.training.states import saved_states

RECIPE = "recipe"
"""The section of a shared ``config.json`` that says how the model was trained."""

_SECTIONS = {
    "images": ("mean", "std", "num_workers", "cache_mb", "max_unreadable"),
    "augment": (),
    "optimizer": (),
    "schedule": (),
}
"""The sections of a run's settings that say what is learnt, each with the settings that a card leaves out: those that are told
elsewhere, or belong to the machine."""

_OF_RUN = ("precision", "seed")
"""The settings of the section run that a card has."""


@dataclass(frozen=True)
class Score:
    """How often ``method`` found the class of a test image, as a fraction, and models with random weights on the same images.

    ``deviation`` is the standard deviation over ``seeds`` such models. ``data`` names the images, of which there were ``train``
    to learn from and ``test`` to test on; ``features`` says which features were taken.
    """

    method: str
    top1: float
    untrained: float | None
    deviation: float | None
    seeds: int
    features: str
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
        step: at which it was saved; None where that is not known.
        scores: what was measured of just these weights.
    """

    recipe: Mapping[str, Any]
    mean: list[float] | None
    std: list[float] | None
    classes: list[str] | None
    comparison: Comparison | None
    best: bool
    step: int | None
    scores: tuple[Score, ...]

    @property
    def run(self) -> ComparedRun | None:
        return self.comparison.runs[0] if self.comparison else None


def origin_of(run: Path, weights: Mapping[str, Tensor]) -> Origin:
    """The origin of a model with these weights, by the folder of a run or of a model.

    Args:
        run: the folder; of a run's ``best``, that of the run is looked at.
        weights: as ``weights_to_save`` gives them.

    Raises:
        FileNotFoundError: there is no model in the folder.
        ValueError: the model there, the best one included, has other weights, so that nothing told there is of this one; or a
            file in the folder is damaged.
    """
    run = Path(os.path.abspath(run))
    run = run.parent if run.name == BEST and (run.parent / METRICS).exists() else run
    config, given = run / CONFIG_FILE, checksum(weights)
    read_config(run)
    folder = next((each for each in (run, run / BEST) if _checksum(each) == given), None)
    if folder is None:
        raise ValueError(
            f"run: the weights of the model are not those in {run}, nor in {run / BEST}, which its card would be of: leave run "
            f"out, and give mean, std and classes yourself"
        )
    best = folder != run
    comparison = compare([run]) if (run / METRICS).exists() else None
    with _naming(config):
        content = json.loads(config.read_text(encoding="utf-8"))
        images = content.get("images", {})
        recipe = content.get(RECIPE) or _recipe(content)
        if not isinstance(recipe, dict):
            raise TypeError(f"{RECIPE}: expected a section of settings, got {recipe!r}")
        mean, std, classes = images.get("mean"), images.get("std"), content.get("classes")
    step = None
    if comparison and best:
        step = comparison.runs[0].best.step if comparison.runs[0].best else None
    elif comparison and (states := saved_states(run / STATES)):
        step = states[0].step
    return Origin(recipe, mean, std, classes, comparison, best, step, _scores(folder / EVALUATION, given))


def _checksum(folder: Path) -> str | None:
    """The checksum of the weights in a folder; None where it has no weights."""
    file = folder / WEIGHTS_FILE
    return checksum(read_weights(file)) if folder.name != BEST or file.exists() else None


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """A block in which errors are raised again as a ValueError that names the file."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"{file}: not as it was written ({type(error).__name__}: {error})") from error


def _recipe(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that say what is learnt; empty where the content is not that of a run."""
    if "schedule" not in content:
        return {}
    recipe: dict[str, Any] = {"data": without_folders(content.get("data"))}
    if content.get("val"):
        recipe["val"] = without_folders(content["val"])
    if content.get("init"):
        init = Path(content["init"])
        recipe["init"] = f"{init.parent.name}/{BEST}" if init.name == BEST else init.name
    for section, others in _SECTIONS.items():
        if section in content:
            recipe[section] = {name: value for name, value in content[section].items() if name not in others}
    recipe["run"] = {name: content["run"][name] for name in _OF_RUN if name in content.get("run", {})}
    return recipe


def _scores(file: Path, weights: str) -> tuple[Score, ...]:
    """The scores in an evaluation.json that were measured of the weights with this checksum."""
    if not file.exists():
        return ()
    with _naming(file):
        found = json.loads(file.read_text(encoding="utf-8"))
        names = [name for name, of in found.get("weights", {}).items() if of == weights]
        if not names:
            return ()
        images, scores = found["images"], []
        for method, of in found["runs"][names[0]].items():
            untrained = found["summary"][method].get("untrained", {})
            numbers = of["top1"], untrained.get("top1"), untrained.get("standard_deviation")
            if not all(number is None or 0 <= number <= 1 for number in numbers) or numbers[0] is None:
                raise ValueError(f"{method}: expected fractions, got {numbers}")
            about = found["features"], found["data"]["name"], images["train"], images["test"]
            scores.append(Score(TITLES[method], *numbers, untrained.get("count", 0), *about))
    return tuple(scores)
