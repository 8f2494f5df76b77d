"""The pre-training run."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm

from crate_mae.checkpoints import CONFIG_FILE, load_weights
from crate_mae.config import grid_of
from crate_mae.data import (
    BatchSampler,
    CentreCropped,
    ImageLoader,
    LostWorkers,
    Normalization,
    PretrainImages,
    UnreadableImage,
)
from crate_mae.data.progress import say
from crate_mae.files import write_json
from crate_mae.model import CrateMAE
from crate_mae.registry import count_parameters
from crate_mae.training.breakdown import cause
from crate_mae.training.config import PretrainConfig, of_section
from crate_mae.training.feed import Feed, workers_for
from crate_mae.training.image_sets import image_sets
from crate_mae.training.inside import LookInside, in_words, values_of
from crate_mae.training.interrupts import RunStopped, StopRequest, stop_requests
from crate_mae.training.metrics import NonFiniteLoss, ProgressLines
from crate_mae.training.optimizer import build_optimizer
from crate_mae.training.ownership import owned
from crate_mae.training.picture import Picture
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
from crate_mae.training.validation import Validation, ValidationErrors


class PretrainResult(NamedTuple):
    """How a run ended; `errors` is None where there were no images to validate on."""

    out: Path
    steps: int
    errors: ValidationErrors | None


def pretrain(
    config: PretrainConfig, *, resume: bool | Literal["best"] | int = False, overwrite: bool = False
) -> PretrainResult:
    """Pre-train a CRATE-MAE, and leave its files in `config.out`.

    A run is a function of its configuration and its images: interrupted and resumed, it ends with the same weights, and
    has logged the same.
    An opening line on stdout says what it does; where stderr is no terminal, and so has no progress bar, lines follow.

    Args:
        resume: go on with the run in `config.out`, from its last state that can be read; its model, seed, batch size and
            images must be the same, all other settings are as given now. "best": from the state with the best
            validation; a number: from that of this step. What came after it is forgotten.
        overwrite: delete the run in `config.out` first.

    Raises:
        FileExistsError: `config.out` holds a run, and neither `resume` nor `overwrite` is given.
        BlockingIOError: another process runs in `config.out`.
        FileNotFoundError: there are no images, or there is no run, or not the state, to resume.
        NotADirectoryError, PermissionError: `config.out` cannot be written to.
        OSError: it could not be written to any more, as when the disk is full; the last state saved is kept.
        ValueError: a setting cannot be used, or no state be read; the message names it.
        TooManyUnreadable: more images than `images.max_unreadable` cannot be read; the state has been saved.
        UnreadableImage: a ValueError: none of a hundred images tried can be read.
        MissingLibrary: an ImportError: a library that `config.data` or `config.val` needs is not installed.
        LostWorkers: processes that load images died again and again; the state has been saved.
        NonFiniteLoss: training broke down; the last state saved is kept.
        RunStopped: Ctrl-C, SIGTERM, SIGHUP or SIGUSR1; the state has been saved.
    """
    if not (resume == "best" or isinstance(resume, int)):
        raise ValueError(f'resume: expected True, False, "best" or the number of a step, got {resume!r}')
    if resume is not False and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    check_single_process()
    refuse_unwritable(config.out)
    with owned(config.out):
        check_run_folder(config, resume=resume is not False, overwrite=overwrite)
        run = _Run(config, resume)
        # Only now: settings or images that cannot be used must not cost the run that is there.
        if overwrite:
            clear_run_folder(config.out)
        with cpu_threads(config.run.threads):
            return run.train()


class _Run:
    """One run in progress."""

    def __init__(self, config: PretrainConfig, resume: bool | str | int) -> None:
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

        torch.manual_seed(config.run.seed)
        self.model = CrateMAE(config.model).to(self.device).train()
        self.model.stream, self.model.recompute = config.run.stream, config.run.recompute
        if config.init and resume is False:
            try:
                load_weights(self.model, config.init)
            except (OSError, RuntimeError, ValueError) as error:
                raise ValueError(f"--init: {error}") from error
        # Of the steps alone: validation and pictures are few, and would be graphs of their own.
        self.forward = torch.compile(self.model, fullgraph=True) if config.run.compile else self.model
        images, schedule = config.images, config.schedule
        with of_section("images"):
            self.normalization = Normalization(images.mean, images.std, config.model.in_chans)
        self.images = image_sets(config, config.out / IMAGES if resume is not False else None)
        self.train_images, self.val_images = self.images.train, self.images.val
        if schedule.batch_size > len(self.train_images):
            raise ValueError(
                f"schedule.batch_size: expected 1 to {len(self.train_images)}, the number of training images, "
                f"got {schedule.batch_size}; lower --schedule.batch_size"
            )
        self.steps_per_epoch = len(self.train_images) // schedule.batch_size
        self.total_steps = schedule.epochs * self.steps_per_epoch
        self.optimizer = build_optimizer(self.model, config.optimizer, schedule.batch_size)
        self.peak_lr = self.optimizer.param_groups[0]["lr"]
        size = config.model.image_shape
        rows, columns = grid_of(size, config.model.patch_size)
        self.patches = rows * columns
        self.crops = PretrainImages(
            self.train_images,
            size,
            config.run.seed,
            channels=config.model.in_chans,
            patches=self.patches,
            scale=images.crop_scale,
            ratio=images.crop_ratio,
            flip=images.flip,
            blur=images.blur,
            solarize=images.solarize,
        )
        self.unreadable = UnreadableImages(
            config.out / UNREADABLE,
            len(self.train_images) + len(self.val_images or ()),
            images.max_unreadable,
            say,
        )
        batch_bytes = schedule.batch_size * config.model.in_chans * size[0] * size[1]
        self.num_workers = workers_for(images.num_workers, self.device, config.run.threads, batch_bytes)
        if int(self.patches * (1 - schedule.mask_ratio)) == 0:
            raise ValueError(f"schedule.mask_ratio: {schedule.mask_ratio} leaves no patch of {self.patches} visible")
        self.shown = CentreCropped(self.val_images or self.train_images, size, config.model.in_chans)
        self.validation = self.val_images and Validation(
            self.shown,
            self.normalization,
            patches=self.patches,
            mask_ratio=schedule.mask_ratio,
            batch_size=schedule.batch_size,
            seed=config.run.seed,
            precision=self.precision,
            num_workers=self.num_workers,
            say=say,
            unreadable=self.unreadable,
        )

        if config.run.analyze_every and not self.validation:
            raise ValueError(
                f"run.analyze_every: expected 0, or images to validate on, which are those looked at, got "
                f"{config.run.analyze_every}; give --val, or an --images.val_fraction above 0"
            )
        self.look_inside = LookInside(self.shown, self.normalization, schedule.batch_size, say)
        self.picture = Picture(self.shown, self.normalization, config, say)

        self.errors: ValidationErrors | None = None
        self.broken = torch.zeros((), device=self.device)
        self.optimizer.found_inf = self.broken
        self.record = Record(
            config,
            self.model,
            self.optimizer,
            images=self.train_images.fingerprint(),
            image_count=len(self.train_images),
            steps_per_epoch=self.steps_per_epoch,
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

    @property
    def step(self) -> int:
        return self.record.step

    def train(self) -> PretrainResult:
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
            self._save(picture=True)  # what a run killed between its last state and the files made of it did not write
        loader = ImageLoader(
            self.crops,
            self._batches(self.step, max(self.step, self.total_steps)),
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            say=say,
            unreadable=self.unreadable,
        )
        progress = tqdm(total=self.total_steps, initial=self.step, unit="step", desc="pretrain", disable=None)
        with stop_requests() as stop, progress, self._breakdown_told(), self._saved_all_the_same():
            say(self._opening_line())
            for said in self.images.said:
                say(said)
            if self.changed:
                say(f"changed since it was started: {self.changed}")
            if self._pending():
                self._validate_and_save(stop)
            with contextlib.closing(iter(loader)) as batches:
                self._take_steps(Feed(batches, self.device), progress, stop)
        self.record.told_at_the_end()
        if counted := self.unreadable.counted():
            say(f"images that could not be read, others stood in: {counted}; they are listed in {self.unreadable.file}")
        if self.errors is None and self.validation:
            self.errors = self.validation(self.model)
        return PretrainResult(self.config.out, self.step, self.errors)

    def _batches(self, start_step: int, end_step: int) -> BatchSampler:
        batch_size, seed = self.config.schedule.batch_size, self.config.run.seed
        return BatchSampler(self.train_images, batch_size, seed, start_step=start_step, end_step=end_step)

    def _take_steps(self, feed: Feed, progress: tqdm, stop: StopRequest) -> None:
        lines = ProgressLines(self.step, self.total_steps) if progress.disable else None
        self.record.meter.restart_clock()
        for pixels, noise in feed:
            self.record.meter.waited = feed.waited
            loss = self._take_step(pixels, noise)
            progress.update()
            if lines and not stop and (line := lines.after(self.step, loss, self._lr, len(pixels), feed.waited)):
                say(line)
            due, look_is_due = self._validation_is_due(), self._is_due(self.config.run.analyze_every)
            if due or look_is_due or self.step % self.config.run.log_every == 0:
                averages = self.record.log(self._lr)
                progress.set_postfix_str(
                    f"loss {averages.loss:.4f}, lr {self._lr:.2e}, {averages.images_per_second:.0f} images/s, "
                    f"{averages.waiting:.0%} waiting for images",
                    refresh=False,
                )
            if look_is_due:
                self._look_inside()
            if due:
                self._validate_and_save(stop)
            elif stop or self._save_is_due():
                self._save(picture=not stop)
            if stop and self.step < self.total_steps:
                self._stop(stop)

    def _validate_and_save(self, stop: StopRequest) -> None:
        """What a stop keeps from being done is done when the run is resumed."""
        done = self._validate(stop)
        self._save(picture=done)
        if not done:
            self._stop(stop)

    def _pending(self) -> bool:
        """Whether the run goes on from a step whose validation is due, and was not done."""
        return self.step > 0 and self.validation is not None and self._validation_is_due() and not self.record.validated

    def _stop(self, stop: StopRequest) -> None:
        assert stop.signal is not None
        raise RunStopped(f"stopped at step {self.step} of {self.total_steps}, saved in {self.config.out}", stop.signal)

    def _take_step(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """One optimiser step; returns its loss."""
        schedule = self.config.schedule
        lr = warmup_cosine(
            self.step,
            peak=self.peak_lr,
            final=schedule.min_lr,
            warmup_steps=round(schedule.warmup_epochs * self.steps_per_epoch),
            total_steps=self.total_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._loss(self.forward, pixels, noise)
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

    def _loss(self, forward: Callable[..., Any], pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        images = self.normalization(pixels)
        with autocast(self.precision, self.device):
            return forward(images, mask_ratio=self.config.schedule.mask_ratio, noise=noise).loss

    @property
    def _lr(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def _validation_is_due(self) -> bool:
        return self._is_due(self.config.run.save_every) or self.record.is_kept(self.step)

    def _is_due(self, every: int) -> bool:
        """Whether a multiple of so many epochs is done, or the run; of 0, never."""
        epoch, into_epoch = divmod(self.step, self.steps_per_epoch)
        return every > 0 and into_epoch == 0 and (epoch % every == 0 or self.step == self.total_steps)

    def _look_inside(self) -> None:
        """Before the state of this step, which says that it is done."""
        if (seen := self.look_inside(self.model)) is not None:
            self.record.log_inside(values_of(seen))
            say(f"epoch {self.step // self.steps_per_epoch}/{self.config.schedule.epochs}: {in_words(seen)}")
        self.record.meter.restart_clock()  # behind a row: none of its images are forgotten

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
        say(
            f"epoch {self.step // self.steps_per_epoch}/{self.config.schedule.epochs}: validation error {errors.val_loss:.4f}, "
            f"mean fill {errors.mean_fill_loss:.4f}, best blur {errors.blur_loss:.4f}"
        )
        return True

    def _save(self, *, picture: bool) -> None:
        self.record.save()
        if picture:
            self.picture.write(self.model)
        self.saved_at = time.monotonic()
        self.record.meter.restart_clock()

    @contextlib.contextmanager
    def _saved_all_the_same(self) -> Iterator[None]:
        """Save the state where images cannot be loaded, and say so."""
        try:
            yield
        except (TooManyUnreadable, UnreadableImage, LostWorkers) as error:
            self._save(picture=False)
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
        batches = self._batches(error.step - 1, error.step)

        def again() -> torch.Tensor:
            loader = ImageLoader(self.crops, batches, unreadable=lambda errors: None)
            [(pixels, noise)] = Feed(loader, self.device)
            return self._loss(self.model, pixels, noise)

        names = [self.train_images.name(index) for [*keys] in batches for _, index in keys]
        return cause(error, self.model, again, names, self.config.out / BREAKDOWN)

    def _opening_line(self) -> str:
        config, held_out = self.config, len(self.val_images or ())
        workers = f", loaded by {self.num_workers} process{'es' * (self.num_workers > 1)}" if self.num_workers else ""
        precision = self.precision + " compiled" * config.run.compile
        return (
            f"pretrain: {count_parameters(self.model)[0]:,} parameters ({config.model.depth} + {config.model.decoder_depth} "
            f"layers of width {config.model.embed_dim}), {len(self.train_images)} images to train on and {held_out} to "
            f"validate on{workers}, {precision} on {self.device}, {self.steps_per_epoch} steps an epoch, "
            f"{config.schedule.epochs} epochs, {self.start}, into {config.out}"
        )
