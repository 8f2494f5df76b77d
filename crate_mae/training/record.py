"""What a run writes down as it goes, and takes up again."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crate_mae.checkpoints import CONFIG_FILE, WEIGHTS_FILE, save_model
from crate_mae.files import remove
from crate_mae.training.config import TrainingConfig
from crate_mae.training.divergence import DivergenceWatch, Measured
from crate_mae.training.metrics import MetricsLog, NonFiniteLoss, StepAverages, StepMeter
from crate_mae.training.run_folder import BEST, BREAKDOWN, METRICS, STATES, other_images, remove_leftovers
from crate_mae.training.states import (
    check_fits,
    forget_states,
    random_state,
    read_state,
    restore,
    saved_states,
    write_state,
)


class Record:
    """The rows, the states and the weights of a run, and whether it diverges.

    A state holds all that the steps after it depend on, and what has been gathered for the rows to come, so that a run logs the
    same however often it was interrupted. It is on the disk after the rows before it and before what else is made of it.

    Args:
        images, image_count: the fingerprint of the images to train on, and how many they are. Their order and crops are
            functions of the seed and the step.
        watch: which kind of watch knows the best validation.
        say: takes a line for the user.

    Attributes:
        step: optimiser steps taken.
        watch: whether it diverges, and which validation is the best.
        meter: what was gathered since the last row.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        images: str,
        image_count: int,
        steps_per_epoch: int,
        watch: type[DivergenceWatch] = DivergenceWatch,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.model, self.optimizer = config, model, optimizer
        self.images, self.image_count, self.steps_per_epoch, self.say = images, image_count, steps_per_epoch, say
        self.step = 0
        self.meter = StepMeter()
        self.watch = watch()
        self._unreadable: set[Path] = set()
        self._going_back = False
        self._metrics = MetricsLog(config.out / METRICS)

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch

    @property
    def validated(self) -> bool:
        """Whether the validation of this step is done."""
        return self.watch.last_step == self.step

    def go_on_from(self, wanted: bool | str | int) -> str:
        """Take up the state that a run calls so; returns what was restored, and what could not be, in words."""
        folder = self.config.out / STATES
        state, passed_over = read_state(folder, wanted, self._check_fits)
        if state["images"] != self.images:
            why = other_images(self.config, state["image_count"], self.image_count)
            raise ValueError(f"{folder} is of a run on other images: {why}")
        not_restored = restore(state, self.model, self.optimizer)
        self.step = state["step"]
        self.meter.load_state(state["meter"], next(self.model.parameters()).device)
        self.watch = type(self.watch)(**state["watch"])
        self._unreadable = set(passed_over)
        for line in passed_over.values():
            self.say(f"{line}; going on from a state before it")
        self._going_back = wanted is not True
        if self.watch.diverging:
            self.say(
                f"the state of step {self.step} is of a run that diverges: {self.watch.diverging}{self._way_back()}"
            )
        without = f", without {' and '.join(not_restored)}" if not_restored else ""
        return f"from step {self.step} (weights, optimizer, random numbers restored{without})"

    def _check_fits(self, state: dict[str, Any]) -> None:
        check_fits(state, self.model, self.optimizer)
        StepMeter().load_state(state["meter"], torch.device("cpu"))
        type(self.watch)(**state["watch"])

    def tidy(self) -> None:
        """Remove what belongs to none of the steps taken: unfinished files, and rows, states and a best model of later steps."""
        if leftovers := remove_leftovers(self.config.out):
            names = ", ".join(str(path.relative_to(self.config.out)) for path in leftovers)
            self.say(f"removed what was never finished: {names}")
        remove(self.config.out / BREAKDOWN)
        if self._going_back and (forgotten := self._forget_states()):  # else they make way for the next state
            self.say(f"forgot {', '.join(path.name for path in forgotten)}")
        self._write_best_again()
        if self.step >= self.config.run.log_every and not self._metrics.path.exists():
            self.say(f"there is no {METRICS}: the rows of the steps so far are lost")
        # Of the state's own step, all but a validation that came after it.
        broken = self._metrics.keep(
            lambda row: (
                row["step"] < self.step or (row["step"] == self.step and (self.validated or "val_loss" not in row))
            )
        )
        if broken:
            self.say(f"removed {broken} broken lines of {METRICS}")

    def log(self, lr: float) -> StepAverages:
        """Write the row of the steps since the last one.

        Raises:
            NonFiniteLoss: there was a step with a loss or gradient that was NaN or infinite.
        """
        averages = self.meter.read()
        with self._divergence_told():
            self.watch.read(averages)
        self._metrics.append(
            step=self.step,
            epoch=self.epoch,
            loss=averages.loss,
            lr=lr,
            grad_norm=averages.grad_norm,
            images_per_second=averages.images_per_second,
            waiting=averages.waiting,
            **({"diverging": True} if self.watch.of_steps else {}),
        )
        return averages

    def log_validation(self, errors: Measured) -> None:
        """Write the row of a validation, and the weights if they are the best so far."""
        if self.watch.measures_anew(errors):
            self.say(f"step {self.step}: validations are of other images or masks than before: the best starts over")
        with self._divergence_told():
            is_best = self.watch.validated(self.step, errors)
        if is_best:
            self._write_best(self.model)
        diverging = {"diverging": True} if self.watch.of_validation else {}
        self._metrics.append(step=self.step, epoch=int(self.epoch), **errors._asdict(), **diverging)

    def log_inside(self, values: dict[str, Any]) -> None:
        """Write the row of a look inside, `inside.values_of`."""
        self._metrics.append(step=self.step, epoch=int(self.epoch), inside=values)

    def save(self) -> None:
        """Write the state, then the weights.

        Raises:
            NonFiniteLoss: as of `log`; what broke down takes the place of nothing.
            OSError: it could not be written; it names the file, and older states are there still.
        """
        if not self.config.out.is_dir():  # nothing of it shall be made again without the rest
            raise FileNotFoundError(f"cannot write {self.config.out}: the folder is gone")
        meter = self.meter.state()
        finite = torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).tolist()
        for (name, _), is_finite in zip(self.model.named_parameters(), finite, strict=True):
            if not is_finite:
                raise NonFiniteLoss(self.step, math.nan, math.nan, weights=name)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],  # and no settings, which are the configuration's
            "step": self.step,
            "images": self.images,
            "image_count": self.image_count,
            "random": random_state(),
            "meter": meter,
            "watch": self.watch.state(),
        }
        self._metrics.sync()
        written = write_state(self.config.out / STATES, state, diverging=bool(self.watch.diverging))
        for path in self._unreadable - {written}:  # which must not count among the last ones
            remove(path)
        self._unreadable.clear()
        self._forget_states()
        save_model(self.model, self.config.out)

    def saved(self) -> str:
        """The last state, in words."""
        states = saved_states(self.config.out / STATES)
        return f"the last state saved is {states[0].path}" if states else "no state had been saved yet"

    def is_kept(self, step: int) -> bool:
        """Whether the state of a step is kept for good."""
        every = self.config.run.keep_every * self.steps_per_epoch
        return every > 0 and step % every == 0

    def told_at_the_end(self) -> None:
        """Say that the run has come to its end diverging, if it has."""
        if self.watch.diverging:
            self.say(f"the run ended diverging: {self.watch.diverging}{self._way_back()}")

    def _forget_states(self) -> list[Path]:
        keep, best = self.config.run.keep_states, self.watch.best_step
        return forget_states(self.config.out / STATES, step=self.step, keep=keep, best=best, is_kept=self.is_kept)

    def _write_best(self, model: nn.Module) -> None:
        save_model(model, self.config.out / BEST, **self.config.meaning)

    def _write_best_again(self) -> None:
        """The best model may be lost or damaged, or of a step that was forgotten."""
        step, folder, model = self.watch.best_step, self.config.out / BEST, self.model
        if step is not None and step != self.step:
            try:
                model = copy.deepcopy(self.model)
                model.load_state_dict(read_state(self.config.out / STATES, step, self._check_fits)[0]["model"])
            except (OSError, ValueError) as error:
                self.say(f"the best model so far is lost: {error}")
                self.watch.forget_best()
                step = None
        if step is not None:
            self._write_best(model)
        else:
            remove(folder / WEIGHTS_FILE)
            remove(folder / CONFIG_FILE)

    @contextlib.contextmanager
    def _divergence_told(self) -> Iterator[None]:
        before = bool(self.watch.diverging)
        yield
        if self.watch.diverging and not before:
            self.say(f"step {self.step}: diverging: {self.watch.diverging}; older states are kept{self._way_back()}")
        elif before and not self.watch.diverging:
            self.say(f"step {self.step}: no longer diverging")

    def _way_back(self) -> str:
        best, rate = self.watch.best_step, self.config.optimizer.base_lr
        lower = f"with an --optimizer.base_lr below {rate:g}"
        return "" if best is None else f"; to go back to the best validation, of step {best}, --resume best, {lower}"
