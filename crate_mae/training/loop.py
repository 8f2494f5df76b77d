"""The pre-training run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from crate_mae.checkpoints import CONFIG_FILE, save_model
from crate_mae.config import grid_of
from crate_mae.data import FLOWERS, BatchSampler, ImageFolder, Normalization, PretrainImages, pretrain_loader
from crate_mae.model import CrateMAE
from crate_mae.pictures import reconstruction_sheet
from crate_mae.training.config import PretrainConfig
from crate_mae.training.files import replaced, write_json
from crate_mae.training.interrupts import stop_requests
from crate_mae.training.metrics import MetricsLog, NonFiniteLoss, StepMeter
from crate_mae.training.optimizer import build_optimizer
from crate_mae.training.precision import autocast, choose_device, choose_precision, cpu_threads
from crate_mae.training.run_folder import METRICS, PICTURE, STATE, check_run_folder, clear_run_folder
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

    Args:
        resume: go on with the run in `config.out`; its model, seed, batch size and images must be the same.
        overwrite: delete the run in `config.out` first.

    Raises:
        FileExistsError: `config.out` holds a run, and neither `resume` nor `overwrite` is given.
        FileNotFoundError: there are no images, or there is no run to resume.
        ValueError: a setting or an image cannot be used; the message names it.
        NonFiniteLoss: training broke down; the last state saved is kept.
        RunStopped: Ctrl-C or a termination signal; the state has been saved.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
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
        if config.run.stream == "16bit" and self.precision == "float32":
            raise ValueError('run.stream: "16bit" needs the autocast of run.precision "bfloat16"; here it is "float32"')

        torch.manual_seed(config.run.seed)
        self.model = CrateMAE(config.model).to(self.device).train()
        self.model.stream, self.model.recompute = config.run.stream, config.run.recompute
        images, schedule = config.images, config.schedule
        self.normalization = Normalization(images.mean, images.std, config.model.in_chans)
        self.train_folder, self.val_folder = _image_folders(config)
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

    def train(self) -> PretrainResult:
        self.config.out.mkdir(parents=True, exist_ok=True)
        if self.step < self.total_steps:
            write_json(self.config.out / CONFIG_FILE, self.config.to_dict())
        else:  # the settings of steps that were never taken must not pass for the run's
            print(
                f"nothing left to do: all {self.config.schedule.epochs} epochs are done; a larger --schedule.epochs goes on",
                file=sys.stderr,
            )
        loader = pretrain_loader(
            self.crops,
            self.batches,
            num_workers=self.config.images.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        progress = tqdm(total=self.total_steps, initial=self.step, unit="step", desc="pretrain", disable=None)
        meter = StepMeter()
        with stop_requests() as stop, progress:
            try:
                for pixels in loader:
                    lr = self._take_step(pixels, meter)
                    progress.update()
                    epoch_ended = self.step % self.steps_per_epoch == 0
                    epoch = self.step // self.steps_per_epoch
                    due = epoch_ended and (epoch % self.config.run.save_every == 0 or self.step == self.total_steps)
                    if due or stop.is_set() or self.step % self.config.run.log_every == 0:
                        self._log(meter, lr, progress)
                    if due:
                        self._validate(progress)
                        self._save()
                        meter.restart_clock()
                    if stop.is_set() and self.step < self.total_steps:
                        self._save()
                        raise RunStopped(
                            f"stopped at step {self.step} of {self.total_steps}, saved in {self.config.out}"
                        )
            except NonFiniteLoss as error:
                raise self._explained(error) from None
        if self.errors is None and self.validation:
            self.errors = self.validation(self.model)
        return PretrainResult(self.config.out, self.step, self.errors)

    def _take_step(self, pixels: torch.Tensor, meter: StepMeter) -> float:
        """One optimiser step; returns the learning rate it used."""
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
            loss = self.model(images, mask_ratio=schedule.mask_ratio, noise=self._mask_noise(len(images))).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        longest = self.config.optimizer.clip_grad or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), longest)
        self.optimizer.step()
        self.step += 1
        meter.add(self.step, loss, grad_norm, len(images))
        return lr

    def _mask_noise(self, batch: int) -> torch.Tensor:
        """Drawn on the CPU for each step anew, so that masks depend neither on the device nor on interruptions."""
        rng = np.random.default_rng((self.config.run.seed, _MASK_STREAM, self.step))
        return torch.from_numpy(rng.random((batch, self.patches), dtype=np.float32)).to(self.device, non_blocking=True)

    def _log(self, meter: StepMeter, lr: float, progress: tqdm) -> None:
        averages = meter.read()
        self.metrics.append(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            loss=averages.loss,
            lr=lr,
            grad_norm=averages.grad_norm,
            images_per_second=averages.images_per_second,
        )
        progress.set_postfix_str(
            f"loss {averages.loss:.4f}, lr {lr:.2e}, {averages.images_per_second:.0f} images/s", refresh=False
        )

    def _validate(self, progress: tqdm) -> None:
        if not self.validation:
            return
        self.errors = self.validation(self.model)
        epoch = self.step // self.steps_per_epoch
        self.metrics.append(step=self.step, epoch=epoch, **self.errors._asdict())
        progress.write(
            f"epoch {epoch}/{self.config.schedule.epochs}: validation error {self.errors.val_loss:.4f}, "
            f"mean fill {self.errors.mean_fill_loss:.4f}"
        )

    def _save(self) -> None:
        out = self.config.out
        save_model(self.model, out)
        with replaced(out / PICTURE) as temporary:
            self._picture().save(temporary, format="PNG")
        save_state(
            out / STATE,
            self.model,
            self.optimizer,
            step=self.step,
            epoch=self.step // self.steps_per_epoch,
            images=self.train_folder.fingerprint(),
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


def _image_folders(config: PretrainConfig) -> tuple[ImageFolder, ImageFolder | None]:
    def folder(root: Path) -> ImageFolder:
        return ImageFolder(root, channels=config.model.in_chans, cache_bytes=config.images.cache_mb * 2**20)

    train = folder(config.data or FLOWERS / "train")
    val_root = config.val or (None if config.data else FLOWERS / "val")
    if val_root is not None:
        return train, folder(val_root)
    if config.images.val_fraction:
        return train.split(config.images.val_fraction, config.run.seed)
    return train, None
