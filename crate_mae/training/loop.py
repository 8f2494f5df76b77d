"""The pre-training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crate_mae.checkpoints import load_weights
from crate_mae.config import grid_of
from crate_mae.data import CentreCropped
from crate_mae.data.progress import say
from crate_mae.flops import least_flops
from crate_mae.model import CrateMAE
from crate_mae.registry import count_parameters
from crate_mae.training.callbacks import Callback
from crate_mae.training.config import PretrainConfig
from crate_mae.training.graph import CudaCapture, StepGraph, obstacle_to_graph
from crate_mae.training.inside import LookInside, layers_in_words, values_of
from crate_mae.training.optimizer import build_optimizer
from crate_mae.training.picture import Picture
from crate_mae.training.planning import Plan, planned
from crate_mae.training.ranks import Ranks, TorchrunRanks
from crate_mae.training.run import Resume, Run, train
from crate_mae.training.run_folder import PICTURE
from crate_mae.training.validation import Validation, ValidationErrors


class PretrainResult(NamedTuple):
    """How a run ended; `errors` is None if there were no images to validate on."""

    out: Path
    steps: int
    errors: ValidationErrors | None


def pretrain(
    config: PretrainConfig, *, resume: Resume = False, overwrite: bool = False, callbacks: Sequence[Callback] = ()
) -> PretrainResult:
    """Pre-train a CRATE-MAE, and leave its files in `config.out`.

    A run is a function of its configuration and its images: interrupted and resumed, it ends with the same weights and the same
    log. It prints an opening line, and progress lines if stderr is not a terminal, which would show a progress bar.

    Under torchrun, all processes do one run together, each a part of every step, and all return its result; the first writes and
    speaks. The process group is made and destroyed here.

    Args:
        config: the settings.
        resume: go on with the run in `config.out`. Its model, seed, batch size and images must be the same; other settings may
            differ. True: from the last state that can be read; "best": from the state of the best validation; a number: from
            the state of this step. What came after that state is deleted.
        overwrite: delete the run in `config.out` first.
        callbacks: called by the first process with (step, metrics, model) after each row of metrics.jsonl; see `Callback`. Every
            process must give as many. If one returns True, the run is saved and ends; an error in one is raised when the run
            has been saved.

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
        LostWorkers: processes that load images died again and again; the state has been saved, if there is one process.
        LostRank: another process of the run is gone; the last state saved is kept.
        NonFiniteLoss: training broke down; the last state saved is kept.
        RunStopped: Ctrl-C, SIGTERM, SIGHUP or SIGUSR1; the state has been saved.
    """
    run = train(PretrainRun, config, resume, overwrite, callbacks)
    return PretrainResult(config.out, run.step, run.errors)


def plan(config: PretrainConfig, *, resume: Resume = False, overwrite: bool = False) -> Plan:
    """What `pretrain` with the same arguments would do: sizes, memory, time and files. Nothing is written.

    Some of the first steps are taken and measured, and then forgotten. Errors as of `pretrain`.
    """
    return planned(PretrainRun, config, resume, overwrite)


class PretrainRun(Run[PretrainConfig, CrateMAE, ValidationErrors]):
    """Pre-training: removed patches are reconstructed. The loss also takes the noise that fixes which are removed."""

    beside = "noise"
    pictures = (PICTURE,)

    def __init__(self, config: PretrainConfig, resume: Resume, device: torch.device, ranks: Ranks) -> None:
        rows, columns = grid_of(config.model.image_shape, config.model.patch_size)
        self.patches, ratio = rows * columns, config.schedule.mask_ratio
        if int(self.patches * (1 - ratio)) == 0:
            raise ValueError(f"schedule.mask_ratio: {ratio} leaves no patch of {self.patches} visible")
        super().__init__(config, resume, device, ranks)

    def _model(self, resumed: bool) -> CrateMAE:
        model, init = CrateMAE(self.config.model), self.config.init
        if init and not resumed:
            try:
                load_weights(model, init)
            except (OSError, RuntimeError, ValueError) as error:
                raise ValueError(f"--init: {error}") from error
        return model

    def _optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.config.optimizer, self.batch_size)

    def _graph(self, optimizer: torch.optim.Optimizer) -> StepGraph | None:
        run, shared = self.config.run, isinstance(self.ranks, TorchrunRanks)
        reason = obstacle_to_graph(self.device, self.precision, compiled=run.compile, shared=shared)
        if run.graph == "on" and reason is not None:
            raise ValueError(f'run.graph: expected "auto" or "off", as {reason}, got "on"')
        if run.graph == "auto" and reason is not None:
            self.why = [*self.why, f"graph: off ({reason})"]
        if run.graph == "off" or reason is not None:
            return None
        return StepGraph(self.model, optimizer, CudaCapture(self.device), self.accumulate, say)

    def _of_samples(self) -> dict[str, Any]:
        return {"patches": self.patches}

    def _validation(self) -> Validation | None:
        config, schedule, model = self.config, self.config.schedule, self.config.model
        if config.run.analyze_every and not self.val_images:
            raise ValueError(
                f"run.analyze_every: expected 0, or images to validate on, which are those looked at, got "
                f"{config.run.analyze_every}; give --val, or an --images.val_fraction above 0"
            )
        shown = CentreCropped(self.val_images or self.train_images, model.image_shape, model.in_chans)
        self.look_inside = LookInside(shown, self.normalization, self.micro_batch, say)
        self.picture = Picture(shown, self.normalization, config, say)
        if self.val_images is None:
            return None
        return Validation(
            shown,
            self.normalization,
            patches=self.patches,
            mask_ratio=schedule.mask_ratio,
            seed=config.run.seed,
            **self._measuring(),
        )

    def _loss(self, forward: Callable[..., Any], images: torch.Tensor, beside: torch.Tensor, step: int) -> torch.Tensor:
        return forward(images, mask_ratio=self.config.schedule.mask_ratio, noise=beside).loss

    def _look_is_due(self) -> bool:
        return self._is_due(self.config.run.analyze_every)

    def _look(self, model: CrateMAE) -> dict[str, Any] | None:
        if (seen := self.look_inside(model)) is None:
            return None
        say(f"{self.epochs_done}: {layers_in_words(seen)}")
        return values_of(seen)

    def _flops(self) -> int:
        return least_flops(self.config.model, self.batch_size, mask_ratio=self.config.schedule.mask_ratio)

    def _draw(self, model: CrateMAE) -> None:
        self.picture.write(model)

    def _said_of(self, errors: ValidationErrors) -> str:
        return f"validation error {errors.val_loss:.4f}, mean fill {errors.mean_fill_loss:.4f}, best blur {errors.blur_loss:.4f}"

    def _opening_line(self) -> str:
        model = self.config.model
        return (
            f"pretrain: {count_parameters(self.model)[0]:,} parameters ({model.depth} + {model.decoder_depth} layers of width "
            f"{model.embed_dim}), {self._computed_by()}"
        )
