"""How many images a step has, and in how many parts each device computes its share."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from crate_mae.backbone import Backbone
from crate_mae.training.config import TrainingConfig

Config = TypeVar("Config", bound=TrainingConfig)


def with_batch_chosen(run: Any, model: Backbone) -> tuple[Any, list[str]]:
    """The settings of a run with numbers for `schedule.batch_size` and `schedule.accumulate`, and why these, in words.

    Args:
        model: of this process alone, before it is shared.

    Raises:
        ValueError: there are too few images, or too few for so many processes and parts; or not even one image fits.
    """
    config, ranks = run.config, run.ranks
    schedule, images, why = config.schedule, len(run.train_images), []
    if schedule.batch_size != "auto" and schedule.batch_size > images:
        raise ValueError(
            f"schedule.batch_size: expected 1 to {images}, the number of training images, got {schedule.batch_size}; "
            "lower --schedule.batch_size"
        )
    batch_size, accumulate = schedule.batch_size, schedule.accumulate
    if "auto" in (batch_size, accumulate):
        raise NotImplementedError
    most = batch_size // ranks.count
    if not 1 <= accumulate <= most:
        raise ValueError(
            f"schedule.accumulate: expected 1 to {most}, as a step has {batch_size} images and {ranks.count} processes, got "
            f"{accumulate}"
            if most
            else f"schedule.batch_size: expected at least {ranks.count}, one for each process, got {batch_size}"
        )
    schedule = dataclasses.replace(schedule, batch_size=batch_size, accumulate=accumulate)
    return dataclasses.replace(config, schedule=schedule), why
