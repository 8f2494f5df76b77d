"""The pre-training run."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from crate_mae.checkpoints import CONFIG_FILE, load_weights, save_model
from crate_mae.config import grid_of
from crate_mae.data import (
    BatchSampler,
    ImageLoader,
    Normalization,
    PretrainImages,
    UnreadableImage,
    pretrain_loader,
)
from crate_mae.files import replaced, write_json
from crate_mae.model import CrateMAE
from crate_mae.pictures import reconstruction_sheet
from crate_mae.registry import count_parameters
from crate_mae.training.config import PretrainConfig, of_section
from crate_mae.training.image_sets import image_sets
from crate_mae.training.interrupts import stop_requests
from crate_mae.training.metrics import MetricsLog, NonFiniteLoss, ProgressLines, StepMeter
from crate_mae.training.optimizer import build_optimizer
from crate_mae.training.precision import (
    autocast,
    check_compiler,
    check_implementation,
    check_single_process,
    check_threads,
    choose_device,
    choose_precision,
    cpu_threads,
)
from crate_mae.training.run_folder import METRICS, PICTURE, STATE, check_run_folder, clear_run_folder, make_run_folder
from crate_mae.training.schedule import warmup_cosine
from crate_mae.training.state import load_state, save_state
from crate_mae.training.validation import CentreCropped, Validation, ValidationErrors

_MASK_STREAM = 1
"""Sets the random numbers of the masks apart from those of the image order, which have the same seed."""


class PretrainResult(NamedTuple):
    """How a run ended; `errors` is None where there were no images to validate on."""

    out: Path
    steps: int
    errors: ValidationErrors | None


class RunStopped(Exception):
    """The run was interrupted, after its state had been saved."""


def pretrain(config: PretrainConfig, *, resume: bool = False, overwrite: bool = False) -> PretrainResult:
    """Pre-train a CRATE-MAE, and leave its files in `config.out`.

    A run is a function of its configuration and its images: interrupted and resumed, it ends with the same weights.
    An opening line on stdout says what it does; where stderr is no terminal, and so has no progress bar, lines follow.

    Args:
        resume: go on with the run in `config.out`; its model, seed, batch size and images must be the same.
        overwrite: delete the run in `config.out` first.

    Raises:
        FileExistsError: `config.out` holds a run, and neither `resume` nor `overwrite` is given.
        FileNotFoundError: there are no images, or there is no run to resume.
        NotADirectoryError, PermissionError: `config.out` cannot be written to.
        ValueError: a setting cannot be used; the message names it.
        UnreadableImage: a ValueError: a file is no image; if training had begun, the state has been saved.
        NonFiniteLoss: training broke down; the last state saved is kept.
        RunStopped: Ctrl-C or a termination signal; the state has been saved.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    check_single_process()
    check_run_folder(config, resume=resume, overwrite=overwrite)
    run = _Run(config, resume=resume)
    # Only now: settings or images that cannot be used must not cost the run that is there.
    if overwrite:
        clear_run_folder(config.out)
    with cpu_threads(config.run.threads):
        return run.train()


class _Run:
    """One run in progress."""

    def __init__(self, config: PretrainConfig, *, resume: bool) -> None:
        self.config = config
        self.device = choose_device(config.run.device)
        self.precision = choose_precision(config.run.precision, self.device)
        check_implementation(self.device, self.precision)
        check_threads(config.run.threads)
        if config.run.compile:
            check_compiler(self.device)
        if config.run.stream == "16bit" and self.precision == "float32":
            raise ValueError('run.stream: "16bit" needs the autocast of run.precision "bfloat16"; here it is "float32"')

        torch.manual_seed(config.run.seed)
        self.model = CrateMAE(config.model).to(self.device).train()
        self.model.stream, self.model.recompute = config.run.stream, config.run.recompute
        if config.init and not resume:
            try:
                load_weights(self.model, config.init)
            except (OSError, RuntimeError, ValueError) as error:
                raise ValueError(f"--init: {error}") from error
        # Of the steps alone: validation and pictures are few, and would be graphs of their own.
        self.forward = torch.compile(self.model, fullgraph=True) if config.run.compile else self.model
        images, schedule = config.images, config.schedule
        with of_section("images"):
            self.normalization = Normalization(images.mean, images.std, config.model.in_chans)
        self.train_folder, self.val_folder, self.parts = image_sets(config)
        if schedule.batch_size > len(self.train_folder):
            raise ValueError(
                f"schedule.batch_size: expected 1 to {len(self.train_folder)}, the number of training images, "
                f"got {schedule.batch_size}; lower --schedule.batch_size"
            )
        self.steps_per_epoch = len(self.train_folder) // schedule.batch_size
        self.total_steps = schedule.epochs * self.steps_per_epoch
        self.optimizer = build_optimizer(self.model, config.optimizer, schedule.batch_size)
        self.peak_lr = self.optimizer.param_groups[0]["lr"]
        size = config.model.image_shape
        self.crops = PretrainImages(
            self.train_folder,
            size,
            config.run.seed,
            scale=images.crop_scale,
            ratio=images.crop_ratio,
            flip=images.flip,
        )
        rows, columns = grid_of(size, config.model.patch_size)
        self.patches = rows * columns
        if int(self.patches * (1 - schedule.mask_ratio)) == 0:
            raise ValueError(f"schedule.mask_ratio: {schedule.mask_ratio} leaves no patch of {self.patches} visible")
        self.shown = CentreCropped(self.val_folder or self.train_folder, size)
        self.validation = self.val_folder and Validation(
            self.shown,
            self.normalization,
            patches=self.patches,
            mask_ratio=schedule.mask_ratio,
            batch_size=schedule.batch_size,
            seed=config.run.seed,
            precision=self.precision,
            num_workers=images.num_workers,
        )

        self.step = 0
        self.errors: ValidationErrors | None = None
        self.metrics = MetricsLog(config.out / METRICS)
        if resume:
            self.step = load_state(
                config.out / STATE, self.model, self.optimizer, images=self.train_folder.fingerprint()
            )
            self.metrics.drop_after(self.step)
        self.batches = BatchSampler(
            len(self.train_folder),
            schedule.batch_size,
            config.run.seed,
            start_step=self.step,
            end_step=self.total_steps,
        )
        self.saved_at = time.monotonic()

    def train(self) -> PretrainResult:
        make_run_folder(self.config.out)
        if self.step < self.total_steps:
            write_json(self.config.out / CONFIG_FILE, self.config.to_dict())
        else:  # the settings of steps that were never taken must not pass for the run's
            print(
                f"nothing left to do: all {self.config.schedule.epochs} epochs are done; a larger --schedule.epochs goes on, "
                "--overwrite starts anew",
                file=sys.stderr,
            )
        loader = pretrain_loader(
            self.crops,
            self.batches,
            num_workers=self.config.images.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        _say(self._opening_line())
        progress = tqdm(total=self.total_steps, initial=self.step, unit="step", desc="pretrain", disable=None)
        with stop_requests() as stop, progress:
            try:
                self._take_steps(loader, StepMeter(), progress, stop)
            except NonFiniteLoss as error:
                raise self._explained(error) from None
        if self.errors is None and self.validation:
            self.errors = self.validation(self.model)
        return PretrainResult(self.config.out, self.step, self.errors)

    def _take_steps(self, loader: ImageLoader, meter: StepMeter, progress: tqdm, stop: threading.Event) -> None:
        lines = ProgressLines(self.step, self.total_steps) if progress.disable else None
        try:
            for pixels in loader:
                loss = self._take_step(pixels, meter)
                progress.update()
                if lines and not stop.is_set() and (line := lines.after(self.step, loss, self._lr, len(pixels))):
                    _say(line)
                validate, stopping = self._validation_is_due(), stop.is_set()
                save = validate or stopping or self._save_is_due()
                # Before each save, too: what has diverged must not take the place of the last good state.
                if save or self.step % self.config.run.log_every == 0:
                    self._log(meter, progress)
                if validate:
                    self._validate()
                if save:
                    self._save()
                    meter.restart_clock()
                if stopping and self.step < self.total_steps:
                    raise RunStopped(f"stopped at step {self.step} of {self.total_steps}, saved in {self.config.out}")
        except UnreadableImage as error:
            if meter.pending:
                self._log(meter, progress)
            self._save_state()
            remedy = (
                f"step {self.step} of {self.total_steps} is saved in {self.config.out}: put a readable image in its place, "
                "and --resume goes on exactly; without it, the training images would be others, for a new run"
            )
            raise UnreadableImage(error.path, error.reason, remedy) from None

    def _take_step(self, pixels: torch.Tensor, meter: StepMeter) -> torch.Tensor:
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
        images = self.normalization(pixels.to(self.device, non_blocking=True))
        with autocast(self.precision, self.device):
            loss = self.forward(images, mask_ratio=schedule.mask_ratio, noise=self._mask_noise(len(images))).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        longest = self.config.optimizer.clip_grad or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), longest)
        self.optimizer.step()
        self.step += 1
        meter.add(self.step, loss, grad_norm, len(images))
        return loss.detach()

    @property
    def _lr(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def _validation_is_due(self) -> bool:
        epoch, into_epoch = divmod(self.step, self.steps_per_epoch)
        return into_epoch == 0 and (epoch % self.config.run.save_every == 0 or self.step == self.total_steps)

    def _save_is_due(self) -> bool:
        minutes = self.config.run.save_minutes
        return minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    def _mask_noise(self, batch: int) -> torch.Tensor:
        """Drawn on the CPU for each step anew, so that masks depend neither on the device nor on interruptions."""
        rng = np.random.default_rng((self.config.run.seed, _MASK_STREAM, self.step))
        return torch.from_numpy(rng.random((batch, self.patches), dtype=np.float32)).to(self.device, non_blocking=True)

    def _log(self, meter: StepMeter, progress: tqdm) -> None:
        averages = meter.read()
        self.metrics.append(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            loss=averages.loss,
            lr=self._lr,
            grad_norm=averages.grad_norm,
            images_per_second=averages.images_per_second,
        )
        progress.set_postfix_str(
            f"loss {averages.loss:.4f}, lr {self._lr:.2e}, {averages.images_per_second:.0f} images/s", refresh=False
        )

    def _validate(self) -> None:
        if not self.validation:
            return
        self.errors = self.validation(self.model)
        epoch = self.step // self.steps_per_epoch
        self.metrics.append(step=self.step, epoch=epoch, **self.errors._asdict())
        _say(
            f"epoch {epoch}/{self.config.schedule.epochs}: validation error {self.errors.val_loss:.4f}, "
            f"mean fill {self.errors.mean_fill_loss:.4f}, best blur {self.errors.blur_loss:.4f}"
        )

    def _save(self) -> None:
        self._save_state()
        with replaced(self.config.out / PICTURE) as file:
            self._picture().save(file, format="PNG")

    def _save_state(self) -> None:
        out = self.config.out
        save_model(self.model, out)
        save_state(
            out / STATE,
            self.model,
            self.optimizer,
            step=self.step,
            epoch=self.step // self.steps_per_epoch,
            images=self.train_folder.fingerprint(),
        )
        self.saved_at = time.monotonic()

    def _opening_line(self) -> str:
        config, held_out = self.config, len(self.val_folder) if self.val_folder else 0
        weights = f"from the weights of {config.init}" if config.init else "from the start"
        start = f"from step {self.step}" if self.step else weights
        precision = self.precision + " compiled" * config.run.compile
        return (
            f"pretrain: {count_parameters(self.model)[0]:,} parameters ({config.model.depth} + {config.model.decoder_depth} "
            f"layers of width {config.model.embed_dim}), {len(self.train_folder)} images to train on and {held_out} to "
            f"validate on, {precision} on {self.device}, {self.steps_per_epoch} steps an epoch, "
            f"{config.schedule.epochs} epochs, {start}, into {config.out}{self.parts and '; '}{self.parts}"
        )

    def _picture(self) -> Image.Image:
        count = min(self.config.run.pictures, len(self.shown))
        # Spread over the set, so that every class has its turn.
        chosen = np.linspace(0, len(self.shown) - 1, count).round().astype(int).tolist()
        pixels = torch.stack([self.shown[index] for index in chosen])
        noise = torch.rand(count, self.patches, generator=torch.Generator().manual_seed(self.config.run.seed))
        return reconstruction_sheet(
            self.model, pixels, self.normalization, mask_ratio=self.config.schedule.mask_ratio, noise=noise
        )

    def _explained(self, error: NonFiniteLoss) -> NonFiniteLoss:
        state = self.config.out / STATE
        kept = f"the last good state is in {state}" if state.exists() else "no state had been saved yet"
        error.args = (f"{error}; {kept}",)
        return error


def _say(line: str) -> None:
    """A line on stdout that leaves the progress bar whole, and is there at once in a file, too."""
    tqdm.write(line)
    sys.stdout.flush()
