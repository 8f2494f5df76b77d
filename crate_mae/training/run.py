"""What every run does, whatever it trains: steps, rows, states, validations, stops."""

from __future__ import annotations

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import nn
from tqdm import tqdm

from crate_mae.checkpoints import CONFIG_FILE
from crate_mae.data import BatchSampler, ImageLoader, LostWorkers, Normalization, PretrainImages, UnreadableImage
from crate_mae.data.progress import say
from crate_mae.files import write_json
from crate_mae.training.breakdown import cause
from crate_mae.training.config import TrainingConfig, of_section
from crate_mae.training.divergence import DivergenceWatch, Measured
from crate_mae.training.feed import Feed, workers_for
from crate_mae.training.image_sets import image_sets
from crate_mae.training.interrupts import RunStopped, StopRequest, stop_requests
from crate_mae.training.metrics import NonFiniteLoss, ProgressLines
from crate_mae.training.ownership import owned
from crate_mae.training.precision import (
    autocast,
    check_compiler,
    check_implementation,
    check_single_process,
    check_threads,
    check_workers,
    choose_device,
    choose_precision,
    cpu_threads,
)
from crate_mae.training.record import Record
from crate_mae.training.run_folder import (
    BREAKDOWN,
    IMAGES,
    UNREADABLE,
    changed_settings,
    check_run_folder,
    clear_run_folder,
    refuse_unwritable,
)
from crate_mae.training.schedule import warmup_cosine
from crate_mae.training.unreadable import TooManyUnreadable, UnreadableImages

Resume = bool | Literal["best"] | int
"""Where a run goes on from: nowhere, its last state, that of its best validation, or that of a step."""

Config = TypeVar("Config", bound=TrainingConfig)
Errors = TypeVar("Errors", bound=Measured)


class Validates(Protocol[Errors]):
    """What measures a model on images held out."""

    def __call__(self, model: Any) -> Errors: ...

    def unless(self, model: Any, stopped: Callable[[], object]) -> Errors | None:
        """The measurement, or None where `stopped` was so before the last batch."""


def train(kind: type[Run], config: TrainingConfig, resume: Resume, overwrite: bool) -> Run:
    """Do a run of a kind in the folder of its configuration; returns it when it has ended. Errors as of `pretrain`."""
    if not (resume == "best" or isinstance(resume, int)):
        raise ValueError(f'resume: expected True, False, "best" or the number of a step, got {resume!r}')
    if resume is not False and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    check_single_process()
    refuse_unwritable(config.out)
    with owned(config.out):
        check_run_folder(config, resume=resume is not False, overwrite=overwrite)
        run = kind(config, resume)
        # Only now: settings or images that cannot be used must not cost the run that is there.
        if overwrite:
            clear_run_folder(config.out)
        with cpu_threads(config.run.threads):
            run.train()
        return run


class Run(ABC, Generic[Config, Errors]):
    """One run in progress. What its kind adds: the model, the batches, the loss, the validation, and what is said and drawn.

    Attributes:
        beside: the field of the samples that a loss takes beside the pixels.
        watch: which kind of watch knows the best validation.
        errors: of the last validation.
    """

    beside: ClassVar[str]
    watch: ClassVar[type[DivergenceWatch]] = DivergenceWatch

    def __init__(self, config: Config, resume: Resume) -> None:
        self.config = config
        self.device = choose_device(config.run.device)
        self.precision = choose_precision(config.run.precision, self.device)
        check_implementation(self.device, self.precision)
        check_threads(config.run.threads)
        check_workers(config.images.num_workers)
        if config.run.compile:
            check_compiler(self.device)
        if config.run.stream == "16bit" and self.precision == "float32":
            raise ValueError('run.stream: "16bit" needs the autocast of run.precision "bfloat16"; here it is "float32"')

        images, schedule, channels = config.images, config.schedule, config.model.in_chans
        with of_section("images"):
            self.normalization = Normalization(images.mean, images.std, channels)
        self.images = image_sets(config, config.out / IMAGES if resume is not False else None)
        self.train_images, self.val_images = self.images.train, self.images.val
        self.config = config = self._settled(resume is not False)
        if schedule.batch_size > len(self.train_images):
            raise ValueError(
                f"schedule.batch_size: expected 1 to {len(self.train_images)}, the number of training images, "
                f"got {schedule.batch_size}; lower --schedule.batch_size"
            )
        self.steps_per_epoch = len(self.train_images) // schedule.batch_size
        self.total_steps = schedule.epochs * self.steps_per_epoch

        torch.manual_seed(config.run.seed)
        self.model = self._model(resume is not False).to(self.device).train()
        self.model.stream, self.model.recompute = config.run.stream, config.run.recompute
        # Of the steps alone: validation and pictures are few, and would be graphs of their own.
        self.forward = torch.compile(self.model, fullgraph=True) if config.run.compile else self.model
        self.optimizer = self._optimizer()
        self.lr = config.peak_lr
        size = config.model.image_shape
        self.crops = PretrainImages(
            self.train_images,
            size,
            config.run.seed,
            channels=channels,
            scale=images.crop_scale,
            ratio=images.crop_ratio,
            flip=images.flip,
            blur=images.blur,
            solarize=images.solarize,
            **self._of_samples(),
        )
        self.unreadable = UnreadableImages(
            config.out / UNREADABLE,
            len(self.train_images) + len(self.val_images or ()),
            images.max_unreadable,
            say,
        )
        batch_bytes = schedule.batch_size * channels * size[0] * size[1]
        self.num_workers = workers_for(images.num_workers, self.device, config.run.threads, batch_bytes)
        self.validation = self._validation()

        self.errors: Errors | None = None
        self.broken = torch.zeros((), device=self.device)
        self.optimizer.found_inf = self.broken
        self.record = Record(
            config,
            self.model,
            self.optimizer,
            images=self.train_images.fingerprint(),
            image_count=len(self.train_images),
            steps_per_epoch=self.steps_per_epoch,
            watch=self.watch,
            say=say,
        )
        self.start = f"from the weights of {config.init}" if config.init else "from the start"
        self.changed = ""
        if resume is not False:
            self.start, self.changed = self.record.go_on_from(resume), changed_settings(config)
        if self.step > self.total_steps:
            raise ValueError(
                f"schedule.epochs: the run in {config.out} has done {self.step / self.steps_per_epoch:g}, got {schedule.epochs}"
            )
        self.saved_at = time.monotonic()

    def _settled(self, resumed: bool) -> Config:
        """The settings, with those that the images decide."""
        return self.config

    @abstractmethod
    def _model(self, resumed: bool) -> nn.Module:
        """The model, with the weights that the run starts from unless it is resumed; its images are known."""

    @abstractmethod
    def _optimizer(self) -> torch.optim.Optimizer:
        """Of the model. Where a group has an `lr_scale`, its learning rate is so many times that of the schedule."""

    @abstractmethod
    def _of_samples(self) -> dict[str, Any]:
        """What `PretrainImages` needs besides for the batches of this kind."""

    @abstractmethod
    def _validation(self) -> Validates[Errors] | None:
        """The validation, if there are images for it; called when all else is there, but the state that is resumed."""

    @abstractmethod
    def _loss(self, forward: Callable[..., Any], images: torch.Tensor, beside: torch.Tensor, step: int) -> torch.Tensor:
        """The loss of the step after so many others, on images as the model takes them; called under autocast."""

    @abstractmethod
    def _opening_line(self) -> str: ...

    @abstractmethod
    def _said_of(self, errors: Errors) -> str:
        """A validation, in words."""

    def _draw(self) -> None:
        """Draw the picture of the run, if it has one."""

    def _look_is_due(self) -> bool:
        """Whether this step has a row of its own beside those of losses and validations."""
        return False

    def _look(self) -> None:
        """Write that row."""

    @property
    def step(self) -> int:
        return self.record.step

    @property
    def epochs_done(self) -> str:
        return f"epoch {self.step // self.steps_per_epoch}/{self.config.schedule.epochs}"

    def train(self) -> None:
        """Do all steps that are left."""
        self.record.tidy()
        if self.step < self.total_steps or self._pending():
            if self.images.listed:
                self.images.listed.save_list(self.config.out / IMAGES)
            write_json(self.config.out / CONFIG_FILE, self.config.to_dict())
        else:  # the settings of steps that were never taken must not pass for the run's
            print(
                f"nothing left to do: all {self.config.schedule.epochs} epochs are done; a larger --schedule.epochs goes on, "
                "--overwrite starts anew",
                file=sys.stderr,
            )
            self._save(draw=True)  # what a run killed between its last state and the files made of it did not write
        loader = ImageLoader(
            self.crops,
            self._batches(self.step, max(self.step, self.total_steps)),
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            say=say,
            unreadable=self.unreadable,
        )
        progress = tqdm(total=self.total_steps, initial=self.step, unit="step", desc=self.config.kind, disable=None)
        with stop_requests() as stop, progress, self._breakdown_told(), self._saved_all_the_same():
            say(self._opening_line())
            for said in self.images.said:
                say(said)
            if self.changed:
                say(f"changed since it was started: {self.changed}")
            if self._pending():
                self._validate_and_save(stop)
            with contextlib.closing(iter(loader)) as batches:
                self._take_steps(Feed(batches, self.device, self.beside), progress, stop)
        self.record.told_at_the_end()
        if counted := self.unreadable.counted():
            say(f"images that could not be read, others stood in: {counted}; they are listed in {self.unreadable.file}")
        if self.errors is None and self.validation:
            self.errors = self.validation(self.model)

    def _batches(self, start_step: int, end_step: int) -> BatchSampler:
        batch_size, seed = self.config.schedule.batch_size, self.config.run.seed
        return BatchSampler(self.train_images, batch_size, seed, start_step=start_step, end_step=end_step)

    def _take_steps(self, feed: Feed, progress: tqdm, stop: StopRequest) -> None:
        lines = ProgressLines(self.step, self.total_steps) if progress.disable else None
        self.record.meter.restart_clock()
        for pixels, beside in feed:
            self.record.meter.waited = feed.waited
            loss = self._take_step(pixels, beside)
            progress.update()
            if lines and not stop and (line := lines.after(self.step, loss, self.lr, len(pixels), feed.waited)):
                say(line)
            due, look_is_due = self._validation_is_due(), self._look_is_due()
            if due or look_is_due or self.step % self.config.run.log_every == 0:
                averages = self.record.log(self.lr)
                progress.set_postfix_str(
                    f"loss {averages.loss:.4f}, lr {self.lr:.2e}, {averages.images_per_second:.0f} images/s, "
                    f"{averages.waiting:.0%} waiting for images",
                    refresh=False,
                )
            if look_is_due:  # before the state of this step, which says that it is done
                self._look()
                self.record.meter.restart_clock()  # behind a row: none of its images are forgotten
            if due:
                self._validate_and_save(stop)
            elif stop or self._save_is_due():
                self._save(draw=not stop)
            if stop and self.step < self.total_steps:
                self._stop(stop)

    def _validate_and_save(self, stop: StopRequest) -> None:
        """What a stop keeps from being done is done when the run is resumed."""
        done = self._validate(stop)
        self._save(draw=done)
        if not done:
            self._stop(stop)

    def _pending(self) -> bool:
        """Whether the run goes on from a step whose validation is due, and was not done."""
        return self.step > 0 and self.validation is not None and self._validation_is_due() and not self.record.validated

    def _stop(self, stop: StopRequest) -> None:
        assert stop.signal is not None
        raise RunStopped(f"stopped at step {self.step} of {self.total_steps}, saved in {self.config.out}", stop.signal)

    def _take_step(self, pixels: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
        """One optimiser step; returns its loss."""
        schedule = self.config.schedule
        self.lr = warmup_cosine(
            self.step,
            peak=self.config.peak_lr,
            final=schedule.min_lr,
            warmup_steps=round(schedule.warmup_epochs * self.steps_per_epoch),
            total_steps=self.total_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)
        loss = self._loss_of(self.forward, pixels, beside, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        longest = self.config.optimizer.clip_grad or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), longest)
        # From the first step on that is not finite, this number keeps the optimizer from changing anything, and nobody waits for
        # it: when the loss is read, some steps later, the weights are still those that it went bad with.
        not_finite = self.record.meter.add(self.step + 1, loss, grad_norm, len(pixels))
        self.broken.copy_(torch.maximum(self.broken, not_finite))
        self.optimizer.step()
        self.record.step += 1
        return loss.detach()

    def _loss_of(
        self, forward: Callable[..., Any], pixels: torch.Tensor, beside: torch.Tensor, step: int
    ) -> torch.Tensor:
        images = self.normalization(pixels)
        with autocast(self.precision, self.device):
            return self._loss(forward, images, beside, step)

    def _validation_is_due(self) -> bool:
        return self._is_due(self.config.run.save_every) or self.record.is_kept(self.step)

    def _is_due(self, every: int) -> bool:
        """Whether a multiple of so many epochs is done, or the run; of 0, never."""
        epoch, into_epoch = divmod(self.step, self.steps_per_epoch)
        return every > 0 and into_epoch == 0 and (epoch % every == 0 or self.step == self.total_steps)

    def _save_is_due(self) -> bool:
        minutes = self.config.run.save_minutes
        return minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    def _validate(self, stop: StopRequest) -> bool:
        """Returns whether it was done before a stop was asked for."""
        if not self.validation:
            return True
        errors = self.validation.unless(self.model, lambda: stop)
        if errors is None:
            return False
        self.errors = errors
        self.record.log_validation(errors)
        say(f"{self.epochs_done}: {self._said_of(errors)}")
        return True

    def _save(self, *, draw: bool) -> None:
        self.record.save()
        if draw:
            self._draw()
        self.saved_at = time.monotonic()
        self.record.meter.restart_clock()

    @contextlib.contextmanager
    def _saved_all_the_same(self) -> Iterator[None]:
        """Save the state where images cannot be loaded, and say so."""
        try:
            yield
        except (TooManyUnreadable, UnreadableImage, LostWorkers) as error:
            self._save(draw=False)
            saved = f"step {self.step} of {self.total_steps} is saved in {self.config.out}, and --resume goes on"
            if isinstance(error, UnreadableImage):
                raise UnreadableImage(error.name, error.cause, error.reason, saved) from None
            raise type(error)(f"{error}; {saved}") from None

    @contextlib.contextmanager
    def _breakdown_told(self) -> Iterator[None]:
        """Say what is left of a run that cannot go on, and of one that is not finite, where it went bad."""
        try:
            yield
        except NonFiniteLoss as error:
            rate, exact = (
                self.config.optimizer.base_lr,
                "" if self.precision == "float32" else ", or --run.precision float32",
            )
            remedy = f"--resume with an --optimizer.base_lr below {rate:g}, a longer --schedule.warmup_epochs{exact} may help"
            error.args = (f"{error}{self._cause(error)}; {remedy}; {self.record.saved()}",)
            raise
        except OSError as error:
            told = type(error)(f"{error}; {self.record.saved()}")
            told.errno = error.errno
            raise told from error

    def _cause(self, error: NonFiniteLoss) -> str:
        step = error.step - 1
        batches = self._batches(step, error.step)

        def again() -> torch.Tensor:
            loader = ImageLoader(self.crops, batches, unreadable=lambda errors: None)
            [(pixels, beside)] = Feed(loader, self.device, self.beside)
            return self._loss_of(self.model, pixels, beside, step)

        names = [self.train_images.name(index) for [*keys] in batches for _, index in keys]
        return cause(error, self.model, again, names, self.config.out / BREAKDOWN)

    def _computed_by(self) -> str:
        """The end of an opening line: images, processes, precision, steps."""
        config, held_out = self.config, len(self.val_images or ())
        workers = f", loaded by {self.num_workers} process{'es' * (self.num_workers > 1)}" if self.num_workers else ""
        precision = self.precision + " compiled" * config.run.compile
        return (
            f"{len(self.train_images)} images to train on and {held_out} to validate on{workers}, {precision} on {self.device}, "
            f"{self.steps_per_epoch} steps an epoch, {config.schedule.epochs} epochs, {self.start}, into {config.out}"
        )
