"""What a run writes to its folder as it goes, and restores when it is resumed: rows, states and weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from crate_mae.checkpoints import CONFIG_FILE, WEIGHTS_FILE, save_model
from crate_mae.files import remove
from crate_mae.training.config import TrainingConfig
from crate_mae.training.divergence import DivergenceWatch, Measured
from crate_mae.training.metrics import MetricsLog, NonFiniteLoss, StepAverages, StepMeter
from crate_mae.training.pace import Pace
from crate_mae.training.parallel import local, whole_weights
from crate_mae.training.ranks import Ranks, TorchrunRanks
from crate_mae.training.run_folder import BEST, BREAKDOWN, METRICS, STATES, other_images, remove_leftovers
from crate_mae.training.shards import TENSORS
from crate_mae.training.states import (
    check_fits,
    exported,
    forget_states,
    random_state,
    read_state,
    restore,
    saved_states,
    write_state,
)
from crate_mae.training.step import Step

if TYPE_CHECKING:
    from crate_mae.training.shard_files import BackgroundSave

_LEAST_SCALE = 1.0
"""The least scale of a loss in float16: if gradients are still too large below it, the scale is not the reason."""


class Record:
    """The rows, the states and the weights of a run, and whether it diverges.

    A state holds all that later steps and rows depend on, so that a run logs the same however often it was interrupted. It is
    written after the rows before it, and before the weights and pictures that are made of it.

    Every rank has a record with the same values. The first one writes the files, but each writes its own shard of a state's
    tensors. States of several ranks are written in the background: `save` begins one, and `settle` ends it.

    Args:
        config: the run's settings.
        stepping: the model, its optimizer, and what else a step changes.
        ranks: of the run.
        images, image_count: the fingerprint of the images to train on, and how many they are.
        steps_per_epoch: of the run.
        pace: how fast the run goes.
        watch: the class that finds divergence and the best validation.
        say: takes a line for the user.

    Attributes:
        step: optimiser steps taken.
        watch: whether the run diverges, and which validation is the best.
        meter: losses and gradient norms since the last row.
        written: called on all ranks with each row that has been written.
    """

    def __init__(
        self,
        config: TrainingConfig,
        stepping: Step,
        ranks: Ranks,
        *,
        images: str,
        image_count: int,
        steps_per_epoch: int,
        pace: Pace,
        watch: type[DivergenceWatch] = DivergenceWatch,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.stepping, self.ranks = config, stepping, ranks
        self.model, self.optimizer, self._scaler = stepping.parallel.model, stepping.optimizer, stepping.scaler
        self.images, self.image_count, self.steps_per_epoch, self.say = images, image_count, steps_per_epoch, say
        self.pace = pace
        self.written: Callable[[dict[str, Any]], object] = bool
        self.step = 0
        self.meter = StepMeter(skips=self._scaler.is_enabled())
        self.watch = watch()
        self._unreadable: set[Path] = set()
        self._going_back = False
        self._metrics = MetricsLog(config.out / METRICS, writes=ranks.is_first)
        self._saving: BackgroundSave | None = None
        self._weights: dict[str, torch.Tensor] = {}
        self._best: int | None = None  # the best of the last state: there is no state of a later one yet

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch

    @property
    def validated(self) -> bool:
        """Whether the validation of this step is done."""
        return self.watch.last_step == self.step

    def go_on_from(self, wanted: bool | str | int) -> str:
        """Restore the state that `Resume` calls `wanted`; returns in words what was restored, and what could not be."""
        folder = self.config.out / STATES
        # The first rank finds one that can be read, and the others read the same.
        found: list[Any] = []

        def choose() -> tuple[int, dict[Path, str]]:
            found.extend(read_state(folder, wanted, self._check_fits))
            return found[0]["step"], found[1]

        step, passed_over = self.ranks.of_first(choose)
        state = found[0] if found else read_state(folder, step, self._check_fits, passed_over)[0]
        if state["images"] != self.images:
            why = other_images(self.config, state["image_count"], self.image_count)
            raise ValueError(f"{folder} is of a run on other images: {why}")
        not_restored = restore(state, self.model, self.optimizer, self.stepping.average, self._scaler, self.ranks)
        self.step = state["step"]
        self.meter.load_state(state["meter"], next(self.model.parameters()).device)
        self.watch = type(self.watch)(**state["watch"])
        self._best = self.watch.best_step
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
        """Remove unfinished files, and the rows, states and best model of steps after the present one."""
        if self.ranks.of_first(self._tidied):
            self.watch.forget_best()

    def _tidied(self) -> bool:
        """Do what `tidy` says; returns whether the best model is lost."""
        if leftovers := remove_leftovers(self.config.out):
            names = ", ".join(str(path.relative_to(self.config.out)) for path in leftovers)
            self.say(f"removed what was never finished: {names}")
        remove(self.config.out / BREAKDOWN)
        if self._going_back and (forgotten := self._forget_states()):  # else the next state replaces them
            self.say(f"forgot {', '.join(path.name for path in forgotten)}")
        is_lost = self._write_best_again()
        if self.step >= self.config.run.log_every and not self._metrics.path.exists():
            self.say(f"there is no {METRICS}: the rows of the steps so far are lost")
        # A validation of the state's own step is done again if the state was saved before it.
        broken = self._metrics.keep(
            lambda row: (
                row["step"] < self.step or (row["step"] == self.step and (self.validated or "val_loss" not in row))
            )
        )
        for row in self.rows():
            if isinstance(hours := row.get("hours"), int | float):
                self.pace.go_on(hours)
        if broken:
            self.say(f"removed {broken} broken lines of {METRICS}")
        return is_lost

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows written so far."""
        return self._metrics.rows()

    def log(self, lr: float) -> StepAverages:
        """Write the row of the steps since the last one.

        Raises:
            NonFiniteLoss: there was a step with a loss or gradient that was NaN or infinite.
        """
        averages = self.meter.read()
        with self._divergence_told():
            self.watch.read(averages)
        self._write(
            epoch=self.epoch,
            loss=averages.loss,
            lr=lr,
            grad_norm=averages.grad_norm,
            images_per_second=averages.images_per_second,
            waiting=averages.waiting,
            **self.pace.row(self.step, averages.images_per_second),
            **({"skipped": averages.skipped, "loss_scale": self._scaler.get_scale()} if self.meter.skips else {}),
            **({"diverging": True} if self.watch.of_steps else {}),
        )
        if self.meter.skips and self._scaler.get_scale() < _LEAST_SCALE:
            raise NonFiniteLoss(self.step, averages.loss, math.inf)
        return averages

    def log_validation(self, errors: Measured) -> None:
        """Write the row of a validation, and the weights, as they stand in the model now, if they are the best so far."""
        if self.watch.measures_anew(errors):
            self.say(f"step {self.step}: validations are of other images or masks than before: the best starts over")
        with self._divergence_told():
            is_best = self.watch.validated(self.step, errors)
        if is_best:
            with self.stepping.parallel.whole() as model:
                if model is not None:
                    self._write_best(model)
        diverging = {"diverging": True} if self.watch.of_validation else {}
        self._write(epoch=int(self.epoch), **errors._asdict(), **diverging)

    def log_inside(self, values: dict[str, Any]) -> None:
        """Write the row of a look inside, `inside.values_of`."""
        self._write(epoch=int(self.epoch), inside=values)

    def log_grad_norms(self, norms: dict[str, float]) -> None:
        """Write the row of the gradient's norm by part of the model, unless the step was skipped for too large a gradient.

        Raises:
            NonFiniteLoss: as of `log`, where that would raise it.
        """
        self.meter.check()
        if all(map(math.isfinite, norms.values())):
            self._write(epoch=self.epoch, grad_norms=norms)

    def _write(self, **values: Any) -> None:
        row = {"step": self.step, **values}
        self._metrics.append(**row)
        self.written(row)

    def save(self) -> None:
        """Write the state, then the weights.

        Raises:
            NonFiniteLoss: as of `log`; nothing is replaced then.
            OSError: a file could not be written; the error names it, and older states are still there.
        """
        self.settle()
        if (
            self.ranks.is_first and not self.config.out.is_dir()
        ):  # it must not be made again with only some of its files
            raise FileNotFoundError(f"cannot write {self.config.out}: the folder is gone")
        meter = self.meter.state()
        self._check_weights()
        random = self.ranks.gathered(random_state(self.ranks))
        average = self.stepping.average
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()[
                "state"
            ],  # without its settings, which are those of the configuration
            "step": self.step,
            "images": self.images,
            "image_count": self.image_count,
            "random": random[0],
            "meter": meter,
            "watch": self.watch.state(),
            **({"random_of_others": random[1:]} if random[1:] else {}),
            **({"average": average.state()} if average else {}),
            **({"scaler": self._scaler.state_dict()} if self._scaler.is_enabled() else {}),
        }
        self._metrics.sync()
        folder, diverging = self.config.out / STATES, bool(self.watch.diverging)
        self._best = self.watch.best_step
        if isinstance(self.ranks, TorchrunRanks):
            with self.stepping.shown():
                self._weights = whole_weights(self.model, self.ranks)
            rest = {name: value for name, value in state.items() if name not in TENSORS}

            def commit(shards: dict[str, Any]) -> None:
                self._written = write_state(folder, rest | {"shards": shards}, diverging=diverging)

            from crate_mae.training.shard_files import BackgroundSave

            self._saving = BackgroundSave(folder, state, self.ranks, commit)
            return
        self._made_of(write_state(folder, state, diverging=diverging))
        with self.stepping.shown():
            save_model(self.model, self.config.out)

    def settle(self, *, wait: bool = True) -> None:
        """End the save in the background, if there is one, and write the weights that belong to it.

        Args:
            wait: if False, only do so if the save is over already.

        Raises:
            OSError: as of `save`.
        """
        saving = self._saving
        if saving is None or not (wait or saving.is_over()):
            return
        self._saving = None
        saving.wait()
        if self.ranks.is_first:
            self._made_of(self._written)
            whole = self.stepping.parallel.copy()
            whole.load_state_dict(self._weights)
            save_model(whole, self.config.out)
        self._weights = {}

    def _made_of(self, written: Path) -> None:
        """Delete the states that are not needed any more after the one just written."""
        for path in self._unreadable - {written}:  # they must not count among the last states that are kept
            remove(path)
        self._unreadable.clear()
        self._forget_states()

    def _check_weights(self) -> None:
        finite = torch.stack([local(parameter).isfinite().all() for parameter in self.model.parameters()]).tolist()
        first = finite.index(False) if False in finite else len(finite)
        if (first := -self.ranks.largest(-first)) < len(finite):
            name = [name for name, _ in self.model.named_parameters()][first]
            raise NonFiniteLoss(self.step, math.nan, math.nan, weights=name)

    def saved(self) -> str:
        """The last state, in words."""
        states = saved_states(self.config.out / STATES)
        return f"the last state saved is {states[0].path}" if states else "no state had been saved yet"

    def is_kept(self, step: int) -> bool:
        """Whether `run.keep_every` keeps the state of a step."""
        every = self.config.run.keep_every * self.steps_per_epoch
        return every > 0 and step % every == 0

    def told_at_the_end(self) -> None:
        """Say so if the run diverges at its end."""
        if self.watch.diverging:
            self.say(f"the run ended diverging: {self.watch.diverging}{self._way_back()}")

    def _forget_states(self) -> list[Path]:
        folder, keep = self.config.out / STATES, self.config.run.keep_states
        return forget_states(folder, step=self.step, keep=keep, best=self._best, is_kept=self.is_kept)

    def _write_best(self, model: nn.Module) -> None:
        save_model(model, self.config.out / BEST, **self.config.meaning)

    def _write_best_again(self) -> bool:
        """Write the best model anew from its state: its files may be lost, or of a later step. Returns whether it is lost."""
        step, folder = self.watch.best_step, self.config.out / BEST
        is_lost = False
        if step is not None:
            try:
                model = self.stepping.parallel.copy()
                model.load_state_dict(exported(read_state(self.config.out / STATES, step, self._check_fits)[0]))
                self._write_best(model)
                return False
            except (OSError, ValueError) as error:
                self.say(f"the best model so far is lost: {error}")
                is_lost = True
        remove(folder / WEIGHTS_FILE)
        remove(folder / CONFIG_FILE)
        return is_lost

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
