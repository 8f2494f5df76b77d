"""Builds the parts of a run: images, model, optimizer, validation and record."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch

from crate_kernels.tiles import check_same_on_all_ranks
from crate_mae.data import BatchSampler, Normalization, PretrainImages, Sample
from crate_mae.data.progress import say
from crate_mae.flops import least_flops
from crate_mae.training.average import Average
from crate_mae.training.batch_size import with_batch_chosen
from crate_mae.training.callbacks import Callback
from crate_mae.training.config import TrainingConfig, of_section
from crate_mae.training.divergence import DivergenceWatch
from crate_mae.training.feed import Batch, Feed, workers_for
from crate_mae.training.graph import StepGraph
from crate_mae.training.held_out import Errors, HeldOut, Model
from crate_mae.training.image_sets import image_sets
from crate_mae.training.pace import Pace
from crate_mae.training.parallel import Alone, mode_of
from crate_mae.training.precision import (
    autocast,
    check_compiler,
    check_implementation,
    check_threads,
    check_workers,
    choose_precision,
)
from crate_mae.training.ranks import Ranks, TorchrunRanks
from crate_mae.training.record import Record
from crate_mae.training.run_folder import IMAGES, UNREADABLE, changed_settings, with_its_batch_size
from crate_mae.training.sections import by_name
from crate_mae.training.sinks import check_sinks
from crate_mae.training.step import Step
from crate_mae.training.unreadable import UnreadableImages

Resume = bool | Literal["best"] | int
"""The state from which a run goes on: False for none, True for the last, "best" for the best validation's, or a step."""

_FEW = 8
"""A batch for trials repeats so many images: only its size matters."""

Config = TypeVar("Config", bound=TrainingConfig)


class Parts(ABC, Generic[Config, Model, Errors]):
    """The parts of a run. Each kind of run adds its model, batches, loss and validation, and what it says and draws.

    Attributes:
        beside: the field of the samples that the loss takes beside the pixels.
        pictures: names of the files that the run draws.
        watch: the class that finds divergence and the best validation.
        errors: the result of the last validation.
        callbacks: called with each row; as many on all ranks.
    """

    beside: ClassVar[str]
    watch: ClassVar[type[DivergenceWatch]] = DivergenceWatch
    pictures: ClassVar[tuple[str, ...]] = ()
    callbacks: Sequence[Callback] = ()

    def __init__(self, config: Config, resume: Resume, device: torch.device, ranks: Ranks) -> None:
        if resume is not False:
            config = with_its_batch_size(config)
        self.config, self.device, self.ranks = config, device, ranks
        self.precision = choose_precision(config.run.precision, self.device)
        check_implementation(self.device, self.precision)
        check_threads(config.run.threads)
        check_workers(config.images.num_workers)
        if config.run.compile:
            check_compiler(self.device)
        ranks.of_first(lambda: check_sinks(config.run.log_to, config.out))
        if config.run.stream == "16bit" and self.precision == "float32":
            raise ValueError('run.stream: "16bit" needs the autocast of another run.precision; here it is "float32"')

        images, channels = config.images, config.model.in_chans
        with of_section("images"):
            self.normalization = Normalization(images.mean, images.std, channels).to(device)
        kept = config.out / IMAGES if resume is not False else None
        self.images = ranks.each_after_first(lambda: image_sets(config, kept))
        self.train_images, self.val_images = self.images.train, self.images.val
        self.config = config = self._settled(resume is not False)
        self.crops = PretrainImages(
            self.train_images,
            config.model.image_shape,
            config.run.seed,
            channels=channels,
            scale=images.crop_scale,
            ratio=images.crop_ratio,
            flip=images.flip,
            blur=images.blur,
            solarize=images.solarize,
            **self._of_samples(),
        )

        torch.manual_seed(config.run.seed)
        self.model: Model = self._model(resume is not False)
        model = self.model.to(self.device).train()
        model.stream, model.recompute = config.run.stream, config.run.recompute
        self.config, self.why = config, _ = with_batch_chosen(
            config,
            model,
            lambda images: self._loss_of(model, *self.batch_of(images), 0),
            images=len(self.train_images),
            device=device,
            ranks=ranks,
        )
        self.accumulate = int(config.schedule.accumulate)
        self.batch_size = batch_size = int(config.schedule.batch_size)
        self.steps_per_epoch = len(self.train_images) // batch_size
        self.total_steps = config.schedule.epochs * self.steps_per_epoch
        self.micro_batch = -(-batch_size // (ranks.count * self.accumulate))

        # The ranks may be on several machines, whose files and tuned tiles can differ.
        ranks.check_alike(by_name(config.to_dict()) | {"--data": self.train_images.fingerprint()})
        if ranks.count > 1 and device.type == "cuda":
            check_same_on_all_ranks(device)
        mode = mode_of(config.run.parallel) if isinstance(ranks, TorchrunRanks) else Alone
        self.parallel: Alone[Model] = mode(self.model, ranks, compiled=config.run.compile, accumulate=self.accumulate)
        decay = config.optimizer.average
        optimizer = self._optimizer()
        self.stepping = Step(
            self.parallel,
            optimizer,
            self._loss_of,
            batch_size=batch_size,
            accumulate=self.accumulate,
            clip_grad=config.optimizer.clip_grad,
            average=Average(model, decay) if decay else None,
            scaled=self.precision == "float16",
            graph=self._graph(optimizer),
            by_part=config.run.norms_every > 0,
        )
        if not ranks.is_first:  # each rank draws its own random numbers in steps, such as for stochastic depth
            of_rank = np.random.SeedSequence((config.run.seed, ranks.rank)).generate_state(1, np.uint64)
            torch.manual_seed(int(of_rank[0]))
        self.lr = config.peak_lr
        self.unreadable = UnreadableImages(
            config.out / UNREADABLE,
            len(self.train_images) + len(self.val_images or ()),
            images.max_unreadable,
            say,
            ranks,
        )
        batch_bytes = self.micro_batch * channels * math.prod(config.model.image_shape)
        self.num_workers = workers_for(
            images.num_workers, self.device, config.run.threads, batch_bytes, ranks.local_count
        )
        self.validation = self._validation()

        self.errors: Errors | None = None
        self.record = Record(
            config,
            self.stepping,
            ranks,
            images=self.train_images.fingerprint(),
            image_count=len(self.train_images),
            steps_per_epoch=self.steps_per_epoch,
            pace=Pace(self._flops() / batch_size, device, self.total_steps),
            watch=self.watch,
            say=say,
        )
        self.start = f"from the weights of {config.init}" if config.init else "from the start"
        self.changed = ""
        if resume is not False:
            self.start, self.changed = self.record.go_on_from(resume), changed_settings(config)
        if self.record.step > self.total_steps:
            raise ValueError(
                f"schedule.epochs: the run in {config.out} has done {self.record.step / self.steps_per_epoch:g}, "
                f"got {config.schedule.epochs}"
            )
        self.saves, self.saved_at = 0, time.monotonic()

    def _settled(self, resumed: bool) -> Config:
        """The settings, completed by those that depend on the images."""
        return self.config

    @abstractmethod
    def _model(self, resumed: bool) -> Model:
        """The model; with the weights that the run starts from, unless it is resumed. Called when the images are known."""

    @abstractmethod
    def _optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the model. A group's learning rate is the schedule's times its `lr_scale`, if it has one."""

    @abstractmethod
    def _of_samples(self) -> dict[str, Any]:
        """Further arguments of `PretrainImages`, for the batches of this kind."""

    @abstractmethod
    def _validation(self) -> HeldOut[Model, Errors] | None:
        """The validation, if there are images for it; called last, before a state is restored."""

    def _measuring(self) -> dict[str, Any]:
        """The arguments of `HeldOut` that every kind of run gives."""
        return {
            "batch_size": self.micro_batch * self.ranks.count,
            "precision": self.precision,
            "num_workers": self.num_workers,
            "say": say,
            "unreadable": self.unreadable,
            "ranks": self.ranks,
        }

    def _graph(self, optimizer: torch.optim.Optimizer) -> StepGraph | None:
        """What captures steps; None if nothing does."""
        return None

    @abstractmethod
    def _loss(self, forward: Callable[..., Any], images: torch.Tensor, beside: torch.Tensor, step: int) -> torch.Tensor:
        """The loss of step number `step`, from 0, on normalised images; called under autocast."""

    @abstractmethod
    def _opening_line(self) -> str: ...

    @abstractmethod
    def _said_of(self, errors: Errors) -> str:
        """The result of a validation, in words."""

    def _draw(self, model: Model) -> None:
        """Draw the picture of the run, if it has one."""

    def _look_is_due(self) -> bool:
        """Whether a look inside the model is due at this step, which has a row of its own."""
        return False

    def _look(self, model: Model) -> dict[str, Any] | None:
        """The values of that row; None for no row."""
        return None

    def _flops(self) -> int:
        """The FLOPs of a step."""
        return least_flops(self.config.model, self.batch_size)

    def _batches(self, start_step: int, end_step: int) -> BatchSampler:
        return BatchSampler(
            self.train_images,
            self.batch_size,
            self.config.run.seed,
            start_step=start_step,
            end_step=end_step,
            rank=self.ranks.rank,
            ranks=self.ranks.count,
            accumulate=self.accumulate,
        )

    def _loss_of(
        self, forward: Callable[..., Any], pixels: torch.Tensor, beside: torch.Tensor, step: int
    ) -> torch.Tensor:
        images = self.normalization(pixels)
        with autocast(self.precision, self.device):
            return self._loss(forward, images, beside, step)

    def batch_of(self, images: int) -> Batch:
        """A batch of so many images as steps have them, for trials; a few images are repeated in it."""
        few = self.crops.batch([(0, index) for index in range(min(images, _FEW, len(self.crops)))], [])
        repeated = Sample(*(field[torch.arange(images) % len(field)] for field in few))
        [batch] = Feed([repeated], self.device, self.beside)
        return batch

    def _computed_by(self) -> str:
        """The end of an opening line: images, processes, precision, steps."""
        config, held_out = self.config, len(self.val_images or ())
        workers = f", loaded by {self.num_workers} process{'es' * (self.num_workers > 1)}" if self.num_workers else ""
        precision = self.precision + " compiled" * config.run.compile
        where = str(self.device)
        if isinstance(self.ranks, TorchrunRanks):
            where = f"{self.ranks.count} x {self.device.type} ({config.run.parallel})"
        return (
            f"{len(self.train_images)} images to train on and {held_out} to validate on{workers}, {precision} on {where}, "
            f"{self.steps_per_epoch} steps an epoch, {config.schedule.epochs} epochs, {self.start}, into {config.out}"
        )
