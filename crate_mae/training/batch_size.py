"""The batch size of a step, and the number of micro-batches in which each device computes its share of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from crate_mae.training.config import TrainingConfig
from crate_mae.training.fitting import fit
from crate_mae.training.ranks import Ranks

Config = TypeVar("Config", bound=TrainingConfig)


def with_batch_chosen(
    config: Config,
    model: nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    *,
    images: int,
    device: torch.device,
    ranks: Ranks,
) -> tuple[Config, list[str]]:
    """Replace "auto" in `schedule.batch_size` and `schedule.accumulate` by numbers; also returns why these, in words.

    Args:
        config: the run's settings.
        model: the model of this process, before it is replicated or sharded.
        loss_of: the loss of a batch of the given number of images.
        images: how many images there are to train on.
        device: on which the batch must fit.
        ranks: the processes of the run.

    Raises:
        ValueError: there are too few images, or too few in a step for so many processes and parts; or not even one fits.
    """
    schedule, count = config.schedule, ranks.count
    asked, parts = schedule.batch_size, schedule.accumulate
    if asked == "auto" and images < count:
        raise ValueError(f"schedule.batch_size: expected an image for each of {count} processes, there are {images}")
    if asked != "auto" and asked > images:
        raise ValueError(
            f"schedule.batch_size: expected 1 to {images}, the number of training images, got {asked}; "
            "lower --schedule.batch_size"
        )
    if asked != "auto" and asked < count:
        raise ValueError(f"schedule.batch_size: expected {count} or more, an image for each process, got {asked}")
    why = []
    if asked == "auto" or parts == "auto":
        share = (images if asked == "auto" else -(-asked // count * count)) // count
        trials = _Trials(loss_of, device)
        fitting = fit(trials, device, share, later=_allocated_later(config, model, count), processes=ranks.local_count)
        model.zero_grad(set_to_none=True)
        fitting = min(ranks.gathered(fitting))  # the device with the least room decides
        most = fitting.batch
        if asked == "auto":
            parts = 1 if parts == "auto" else parts
            size = min(most * count * parts, images)
        else:
            size, parts = asked, -(-share // most)
        of_all = ", all there are," * (size == images)
        why.append(f"batch of {size} images{of_all} in {parts} part{'s' * (parts > 1)}: {fitting.in_words}")
    else:
        size = asked
    if parts > size // count:
        raise ValueError(
            f"schedule.accumulate: expected 1 to {size // count}, an image of the {size} of a step for each part of each of "
            f"{count} process{'es' * (count > 1)}, got {parts}"
        )
    return config.with_schedule(batch_size=size, accumulate=parts), why


class _Trials:
    """Does the forward and backward of a batch, without a trace in the random numbers."""

    def __init__(self, loss_of: Callable[[int], torch.Tensor], device: torch.device) -> None:
        self._loss_of = loss_of
        self._devices = [device] if device.type == "cuda" else []

    def __call__(self, images: int) -> None:
        with torch.random.fork_rng(self._devices):
            self._loss_of(images).backward()


def _allocated_later(config: TrainingConfig, model: nn.Module, count: int) -> int:
    """Bytes that a run allocates beyond those of a trial: AdamW's means and the average of the weights.

    With FSDP2 the weights are sharded then, which saves memory; gradients may stay whole until the last micro-batch of a step."""
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
    share = 1 / count if config.run.parallel == "fsdp2" else 1.0
    kept = 2 + bool(config.optimizer.average)
    return round(weights * (kept * share - (1 - share)))
