"""The course of every kind of run: steps, rows, states, validations, and how it stops."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from crate_kernels import __version__
from crate_mae.checkpoints import CONFIG_FILE
from crate_mae.data import BatchSampler, ImageLoader, LostWorkers, UnreadableImage
from crate_mae.data.progress import say
from crate_mae.files import append, write_json
from crate_mae.training.breakdown import cause
from crate_mae.training.callbacks import Callback, call
from crate_mae.training.config import TrainingConfig
from crate_mae.training.feed import Batch, Feed
from crate_mae.training.interrupts import ONE_REQUEST_OF_RANKS, SAID, RunStopped, StopRequest, stop_requests
from crate_mae.training.metrics import NonFiniteLoss, ProgressLines
from crate_mae.training.ownership import owned
from crate_mae.training.pace import product_rate
from crate_mae.training.parts import Config, Errors, Model, Parts, Resume
from crate_mae.training.precision import choose_device, cpu_threads
from crate_mae.training.profiling import Profiler
from crate_mae.training.ranks import LostRank, check_launcher, is_of_a_collective, local_rank, met
from crate_mae.training.run_folder import (
    BREAKDOWN,
    IMAGES,
    STARTS,
    check_run_folder,
    clear_run_folder,
    refuse_unwritable,
)
from crate_mae.training.schedule import warmup_cosine
from crate_mae.training.sinks import Sinks, open_sinks
from crate_mae.training.unreadable import TooManyUnreadable

T = TypeVar("T")
AnyRun = TypeVar("AnyRun", bound="Run[Any, Any, Any]")


def train(
    kind: type[AnyRun], config: TrainingConfig, resume: Resume, overwrite: bool, callbacks: Sequence[Callback] = ()
) -> AnyRun:
    """Do a run in the folder of its configuration, together with torchrun's other processes; returns it when it has ended.

    Errors as of `pretrain`."""
    check_start(resume, overwrite)
    if not all(map(callable, callbacks)):
        raise TypeError(f"callbacks: expected functions of (step, metrics, model), got {callbacks!r}")
    device = choose_device(config.run.device, rank=local_rank())
    with met(device) as ranks, contextlib.ExitStack() as owning:

        def own() -> None:
            refuse_unwritable(config.out)
            owning.enter_context(owned(config.out))
            check_run_folder(config, resume=resume is not False, overwrite=overwrite)

        ranks.of_first(own)
        run = kind(config, resume, device, ranks)
        run.callbacks = callbacks
        ranks.check_alike({"callbacks": len(callbacks)})
        # Only now is the old run deleted: settings or images that cannot be used must not cost it.
        if overwrite:
            ranks.of_first(lambda: clear_run_folder(config.out))
        with cpu_threads(config.run.threads):
            run.train()
        return run


def check_start(resume: Resume, overwrite: bool) -> None:
    """Raise a ValueError if the arguments contradict each other, or this process is one of several without torchrun."""
    if not (resume == "best" or isinstance(resume, int)):
        raise ValueError(f'resume: expected True, False, "best" or the number of a step, got {resume!r}')
    if resume is not False and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    check_launcher()


class Run(Parts[Config, Model, Errors]):
    """A run in progress. Every rank has one, and they do all together; only the first speaks and writes."""

    _sinks: Sinks | None = None
    _is_enough = False
    _raised: Exception | None = None

    @property
    def step(self) -> int:
        return self.record.step

    @property
    def epochs_done(self) -> str:
        return f"epoch {self.step // self.steps_per_epoch}/{self.config.schedule.epochs}"

    def train(self) -> None:
        """Do all steps that are left."""
        self.record.tidy()
        left = self.step < self.total_steps or self._pending()
        if left:
            self.ranks.of_first(self._write_down)
        else:  # these settings are not written down: no step is taken with them
            print(
                f"nothing left to do: all {self.config.schedule.epochs} epochs are done; a larger --schedule.epochs goes on, "
                "--overwrite starts anew",
                file=sys.stderr,
            )
            self._save(
                draw=True
            )  # in case the run was killed after its last state, before it wrote the files made of it
        loader = ImageLoader(
            self.crops,
            self._batches(self.step, max(self.step, self.total_steps)),
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            say=say,
            unreadable=self.unreadable,
        )
        progress = tqdm(total=self.total_steps, initial=self.step, unit="step", desc=self.config.kind, disable=None)
        opened = self._sinks_open() if left else contextlib.nullcontext()
        with self._stop_requests() as stop, opened, progress, self._breakdown_told(), self._saved_all_the_same():
            say(self._opening_line())
            for said in (*self.why, *self.images.said):
                say(said)
            if self.changed:
                say(f"changed since it was started: {self.changed}")
            self.record.written = self._tell
            if self._pending():
                self._validate_and_save(stop)
            # On all ranks at once, as they will compute.
            rates = self.ranks.gathered(product_rate(self.device, self.precision))
            self.record.pace.begin(self.step, sum(rates))
            to_profile = self.config.run.profile if self.ranks.is_first else 0
            profiler = Profiler(to_profile, self.total_steps - self.step, self.config.out, self.device, say)
            with contextlib.closing(iter(loader)) as batches, contextlib.closing(profiler):
                self._take_steps(Feed(batches, self.device, self.beside), progress, stop, profiler)
            self.record.settle()
            self.record.told_at_the_end()
            if self.errors is None and self.validation:
                with self.stepping.shown():
                    self.errors = self.validation(self.model)
            self.unreadable.share()
        if counted := self.unreadable.counted():
            say(f"images that could not be read, others stood in: {counted}; they are listed in {self.unreadable.file}")

    def _write_down(self) -> None:
        """Write the settings, the list of images and a line on this start, before the first step."""
        if self.images.listed:
            self.images.listed.save_list(self.config.out / IMAGES)
        write_json(self.config.out / CONFIG_FILE, self.config.to_dict())
        start = {
            "step": self.step,
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "changed": self.changed,
            "processes": self.ranks.count,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "crate_kernels": __version__,
        }
        append(self.config.out / STARTS, json.dumps(start) + "\n")

    def _tell(self, row: dict[str, Any]) -> None:
        """Pass a row that has been written on to the sinks and the callbacks."""
        if self._sinks:
            self._sinks.row(row)
        if self.callbacks:
            try:
                self._is_enough |= self._shown(lambda model: call(self.callbacks, row, model))
            except Exception as error:
                if is_of_a_collective(error):
                    raise
                self._raised = error  # raised when the run has been saved
            self.record.meter.restart_clock()

    @contextlib.contextmanager
    def _sinks_open(self) -> Iterator[None]:
        """While the block lasts, the first rank sends rows to the run's sinks."""
        ended = "finished"
        self.ranks.of_first(
            self._open_sinks
        )  # even for no sinks: former ones must be marked as lacking the rows to come
        try:
            yield
        except BaseException as error:
            ended = "stopped" if isinstance(error, RunStopped) else "failed"
            raise
        finally:
            if self._sinks:
                self._sinks.close(ended)

    def _open_sinks(self) -> None:
        config, names = self.config, self.config.run.log_to
        rows = list(self.record.rows()) if names else []
        self._sinks = open_sinks(names, config.out, config.to_dict(), rows, say=say)

    def _stop_requests(self) -> contextlib.AbstractContextManager[StopRequest]:
        if self.ranks.count == 1:
            return stop_requests()
        return stop_requests(SAID if self.ranks.is_first else b"", ONE_REQUEST_OF_RANKS)

    def _take_steps(self, feed: Feed, progress: tqdm, stop: StopRequest, profiler: Profiler) -> None:
        lines = ProgressLines(self.step, self.total_steps, self.record.pace) if progress.disable else None
        self.record.meter.restart_clock()
        batches = iter(feed)
        while self.step < self.total_steps:
            loss = self._take_step(batches)
            self.record.meter.waited = feed.waited
            progress.update()
            # Saves are numbered: what is agreed on comes a step late, and the save may have been done by then.
            ours = stop.signal or self.ranks.abandoned()
            asked, save_asked = self.ranks.agreed(ours, (self.saves + 1) * self._save_is_due())
            if lines and not asked and (line := lines.after(self.step, loss, self.lr, self.batch_size, feed.waited)):
                say(line)
            due, look_is_due = self._validation_is_due(), self._look_is_due()
            if due or look_is_due or self.step % self.config.run.log_every == 0:
                averages = self.record.log(self.lr)
                self.unreadable.share()
                progress.set_postfix_str(
                    f"loss {averages.loss:.4f}, lr {self.lr:.2e}, {averages.images_per_second:.0f} images/s, "
                    f"{averages.waiting:.0%} waiting for images, {self.record.pace.in_words(averages.images_per_second)}",
                    refresh=False,
                )
            if self._norms_are_due(self.step):
                self.record.log_grad_norms(self.stepping.grad_norms)
            if profiler.stepped():
                self.record.meter.restart_clock()
            self.record.settle(wait=False)
            if look_is_due:  # before the state of this step, so that a resumed run does not look again
                if (seen := self._shown(self._look)) is not None:
                    self.record.log_inside(seen)
                self.record.meter.restart_clock()  # directly after a row, so that no images go uncounted
            if due:
                self._validate_and_save(stop)
            elif asked or save_asked > self.saves or self._is_enough or self._raised:
                self._save(draw=not asked)
            if self._raised:
                self.record.settle()
                raise self._raised
            if asked and self.step < self.total_steps:
                self._stop(asked)
            if self._is_enough and self.step < self.total_steps:
                say(f"ended at step {self.step} of {self.total_steps}, by a callback; --resume goes on")
                return

    def _validate_and_save(self, stop: StopRequest) -> None:
        """Validate and save. If a stop interrupts the validation, it is done when the run is resumed."""
        done = self._validate(stop)
        self._save(draw=done)
        if not done:
            self._stop(self.ranks.largest(stop.signal or 0))

    def _pending(self) -> bool:
        """Whether the validation of the present step is due, but has not been done."""
        return self.step > 0 and self.validation is not None and self._validation_is_due() and not self.record.validated

    def _stop(self, signal: int) -> None:
        self.record.settle()
        raise RunStopped(f"stopped at step {self.step} of {self.total_steps}, saved in {self.config.out}", signal)

    def _take_step(self, batches: Iterator[Batch]) -> torch.Tensor:
        """One optimiser step; returns its loss."""
        schedule = self.config.schedule
        self.lr = warmup_cosine(
            self.step,
            peak=self.config.peak_lr,
            final=schedule.min_lr,
            warmup_steps=round(schedule.warmup_epochs * self.steps_per_epoch),
            total_steps=self.total_steps,
        )
        by_part = self._norms_are_due(self.step + 1)
        loss = self.stepping(batches, self.lr, self.step, self.record.meter, by_part=by_part)
        self.record.step += 1
        return loss

    def _norms_are_due(self, step: int) -> bool:
        every = self.config.run.norms_every
        return every > 0 and step % every == 0

    def _validation_is_due(self) -> bool:
        return self._is_due(self.config.run.save_every) or self.record.is_kept(self.step)

    def _is_due(self, every: int) -> bool:
        """Whether a multiple of `every` epochs is done, or the whole run; never if `every` is 0."""
        epoch, into_epoch = divmod(self.step, self.steps_per_epoch)
        return every > 0 and into_epoch == 0 and (epoch % every == 0 or self.step == self.total_steps)

    def _save_is_due(self) -> bool:
        minutes = self.config.run.save_minutes
        return minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    def _validate(self, stop: StopRequest) -> bool:
        """Validate; returns False if a stop was asked for first."""
        if not self.validation:
            return True
        with self.stepping.shown():
            errors = self.validation.unless(self.model, lambda: self.ranks.largest(stop.signal or 0))
            if errors is None:
                return False
            self.errors = errors
            self.record.log_validation(errors)
        self.unreadable.share()
        say(f"{self.epochs_done}: {self._said_of(errors)}")
        return True

    def _save(self, *, draw: bool) -> None:
        self.record.save()
        if draw:
            self._shown(self._draw)
            for path in (self.config.out / name for name in self.pictures):
                if self._sinks and path.exists():
                    self._sinks.picture(self.step, path.stem, path)
        self.saves, self.saved_at = self.saves + 1, time.monotonic()
        self.record.meter.restart_clock()

    def _shown(self, show: Callable[[Model], T]) -> T:
        """What the first rank makes of the whole model with the weights that are exported; returned on all ranks."""
        with self.stepping.shown():
            return self._of_whole(show)

    def _of_whole(self, show: Callable[[Model], T]) -> T:
        """What the first rank makes of the whole model as it stands; returned on all ranks."""
        with self.parallel.whole() as model:

            def on_first() -> T:
                assert model is not None
                return show(model)

            return self.ranks.of_first(on_first)

    @contextlib.contextmanager
    def _saved_all_the_same(self) -> Iterator[None]:
        """If images cannot be loaded, save the state, and say so in the error."""
        try:
            yield
        except (TooManyUnreadable, UnreadableImage, LostWorkers) as error:
            if self.ranks.count > 1 and not isinstance(error, TooManyUnreadable):  # the other ranks do not know of it
                saved = f"{self.record.saved()}, and --resume goes on"
            else:
                self._save(draw=False)
                self.record.settle()
                saved = f"step {self.step} of {self.total_steps} is saved in {self.config.out}, and --resume goes on"
            if isinstance(error, UnreadableImage):
                raise UnreadableImage(error.name, error.cause, error.reason, saved) from None
            raise type(error)(f"{error}; {saved}") from None

    @contextlib.contextmanager
    def _breakdown_told(self) -> Iterator[None]:
        """Add to the errors that end a run which state was saved last, and to a loss that is not finite where it comes from."""
        try:
            yield
        except NonFiniteLoss as error:
            with contextlib.suppress(OSError):  # a state on its way to the disk is of a sound step
                self.record.settle()
            rate = self.config.optimizer.base_lr
            exact = "" if self.precision == "float32" else ", or --run.precision float32"
            remedy = f"--resume with an --optimizer.base_lr below {rate:g}, a longer --schedule.warmup_epochs{exact} may help"
            error.args = (f"{error}{self._cause(error)}; {remedy}; {self.record.saved()}",)
            raise
        except OSError as error:
            if type(error).__module__ != "builtins":  # a library's own class, whose arguments may be others
                raise
            told = type(error)(f"{error}; {self.record.saved()}")
            told.errno = error.errno
            raise told from error
        except RuntimeError as error:
            if self.ranks.count > 1 and is_of_a_collective(error):
                raise LostRank.told_by(error, f"; {self.record.saved()}") from error
            raise

    def _cause(self, error: NonFiniteLoss) -> str:
        """Where the loss went bad, in words: the first rank takes the step again, micro-batch by micro-batch."""
        if self.stepping.graph is not None:
            self.stepping.graph.forget()  # its memory is needed
        step = error.step - 1
        parts = self.ranks.count * self.accumulate
        batches = BatchSampler(
            self.train_images,
            self.batch_size,
            self.config.run.seed,
            start_step=step,
            end_step=error.step,
            accumulate=parts,
        )
        names = [self.train_images.name(index) for keys in batches for _, index in keys]

        def look(model: Model) -> str:
            def again() -> Iterator[torch.Tensor]:
                loader = ImageLoader(self.crops, batches, unreadable=lambda errors: None)
                for pixels, beside in Feed(loader, self.device, self.beside):
                    yield self._loss_of(model, pixels, beside, step) * (len(pixels) / self.batch_size)

            return cause(error, model, again, names, self.config.out / BREAKDOWN)

        return self._of_whole(look)
