"""The plan of a run (--dry-run): its size, memory, time and files. Nothing is written."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from crate_mae.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from crate_mae.data import ImageLoader
from crate_mae.data.progress import say
from crate_mae.registry import count_parameters
from crate_mae.training.config import TrainingConfig
from crate_mae.training.counting import LiveBytes
from crate_mae.training.feed import Feed
from crate_mae.training.fitting import forget_peak, peak_memory, room
from crate_mae.training.graph import WARM_UP
from crate_mae.training.pace import product_rate
from crate_mae.training.parallel import local
from crate_mae.training.parts import Resume
from crate_mae.training.precision import choose_device, cpu_threads
from crate_mae.training.ranks import local_rank, met
from crate_mae.training.run import Run, check_start
from crate_mae.training.run_folder import (
    BEST,
    IMAGES,
    METRICS,
    PROFILE,
    STARTS,
    STATES,
    check_run_folder,
    existing,
    refuse_unwritable,
)
from crate_mae.training.sinks import PLACES

SECONDS = 10.0
"""Steps are measured for so long, within the limits below."""

_LEAST, _MOST = 3, 200
"""The least and the largest number of steps that are measured."""


class Memory(NamedTuple):
    """Bytes on the device of one process.

    Attributes:
        weights: the model's weights.
        means: AdamW's two running means of the gradient.
        average: the moving average of the weights, if there is one.
        kept: what a forward keeps for the backward, and the batch.
        made: the peak, within a step, of gradients and all other tensors beside those above; without what libraries take.
        peak: the measured peak of some steps: of tensors on a CUDA device; on a CPU of the whole process, with Python, the
            libraries and the images that it keeps. None if it cannot be measured.
    """

    weights: int
    means: int
    average: int
    kept: int
    made: int
    peak: int | None

    @property
    def counted(self) -> int:
        """The sum of what is counted."""
        return self.weights + self.means + self.average + self.kept + self.made


class Measured(NamedTuple):
    """Some measured steps: how many, seconds for each, and the fraction of the time in which the host waited for images."""

    steps: int
    seconds: float
    waiting: float


class Plan(NamedTuple):
    """What a run would be.

    Attributes:
        opening: the opening line of the run: model, parameters, images, device and steps.
        steps: that are left to take.
        steps_per_epoch, epochs: of the whole run.
        parameters: that are trained.
        flops: of a step, on all devices together; see `least_flops`.
        product_rate: FLOP/s that all devices together reach in large matrix products.
        memory: of the first process.
        measured: some of the first steps; none if the counted memory does not fit.
        room: bytes that the device has for this process.
        files: what would be written: path, content, and bytes (0 if few).
        free: free bytes on the disk of these files.
    """

    opening: str
    steps: int
    steps_per_epoch: int
    epochs: int
    parameters: int
    flops: int
    product_rate: float
    memory: Memory
    measured: Measured
    room: float
    files: list[tuple[Path, str, int]]
    free: int

    @property
    def seconds_an_epoch(self) -> float:
        """Seconds that the steps of an epoch take, without validations and saves."""
        return self.measured.seconds * self.steps_per_epoch

    def __str__(self) -> str:
        memory, steps = self.memory, self.measured
        counted = {
            "weights": memory.weights,
            "AdamW's means": memory.means,
            "average": memory.average,
            "kept for the backward": memory.kept,
            "gradients and what else a step makes": memory.made,
        }
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in counted.items() if size)
        rate = self.flops / steps.seconds
        products, peak = "", ""
        taken = f"not measured: what is counted does not fit the {_bytes(self.room)} that there are"
        if not self.steps:
            taken = f"nothing left to do: all {self.epochs} epochs are done"
        elif steps.steps:
            products = f"; {rate / 1e12:.3g} TFLOP/s, {rate / self.product_rate:.0%} of what large products reach here"
            taken = (
                f"{_seconds(steps.seconds)} a step, of which {steps.waiting:.0%} waiting for images; "
                f"{_seconds(self.seconds_an_epoch)} an epoch of {self.steps_per_epoch:,} steps, "
                f"{_seconds(steps.seconds * self.steps)} for {self.steps:,} steps; validations and saves come on top"
            )
        if memory.peak:
            peak = f"{_bytes(memory.peak)} at the peak of {steps.steps} steps, with libraries and all else; of these, "
        width = max(len(str(path)) for path, _, _ in self.files)
        return "\n".join(
            [
                self.opening,
                f"Products  {self.flops / 1e9:,.4g} GFLOP a step{products}",
                f"Memory    {peak}counted {_bytes(memory.counted)}: {parts}",
                f"Time      {taken}",
                f"Written   ({_bytes(self.free)} free there)",
                *(
                    f"  {path!s:{width}}  {what}{f', {_bytes(size)}' if size else ''}"
                    for path, what, size in self.files
                ),
                "Nothing has been written.",
            ]
        )


def planned(
    kind: type[Run[Any, Any, Any]], config: TrainingConfig, resume: Resume = False, overwrite: bool = False
) -> Plan:
    """The plan of a run: memory is counted, and some of its first steps are taken, measured and forgotten.

    Under torchrun, all processes must call it, and each gets a plan. Arguments and errors as of `train`.
    """
    check_start(resume, overwrite)
    device = choose_device(config.run.device, rank=local_rank())
    with met(device) as ranks:

        def check() -> None:
            refuse_unwritable(config.out)
            check_run_folder(config, resume=resume is not False, overwrite=overwrite)

        ranks.of_first(check)
        run = kind(config, resume, device, ranks)
        with cpu_threads(config.run.threads):
            rate = sum(ranks.gathered(product_rate(device, run.precision)))
            kept, made = _counted(run)
            own = sum(local(weight).nbytes for weight in run.model.parameters())
            trained = sum(local(weight).nbytes for weight in run.model.parameters() if weight.requires_grad)
            memory = Memory(own, 2 * trained, own if run.stepping.average else 0, kept, made, None)
            first, there = run.step, room(device, ranks.local_count)
            measured = Measured(0, math.nan, math.nan)
            if first < run.total_steps and not ranks.largest(memory.counted > there):
                forget_peak(device)
                measured = _measured(run)
                memory = memory._replace(peak=peak_memory(device))
    return Plan(
        opening=run._opening_line(),
        steps=run.total_steps - first,
        steps_per_epoch=run.steps_per_epoch,
        epochs=run.config.schedule.epochs,
        parameters=count_parameters(run.model)[0],
        flops=run._flops(),
        product_rate=rate,
        memory=memory,
        measured=measured,
        room=there,
        files=_files(run),
        free=shutil.disk_usage(existing(config.out)).free,
    )


def _counted(run: Run[Any, Any, Any]) -> tuple[int, int]:
    """Bytes that the forward of a micro-batch keeps, and the peak of what is alive beside these and the weights.

    They are counted on fake tensors, by the operations that the device would do; a compiled model counts as if it were not.
    """
    pixels, beside = run.batch_of(1)
    with torch.random.fork_rng([]):
        model = run._model(resumed=True).train()  # with any weights: they are only counted
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, torch.device(run.device):
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    made = torch.empty(weight.shape, dtype=weight.dtype)
                    module._parameters[name] = nn.Parameter(made, weight.requires_grad)
            for name, constant in module._buffers.items():
                if constant is not None:
                    module._buffers[name] = torch.empty(constant.shape, dtype=constant.dtype)
        model.stream, model.recompute = run.config.run.stream, run.config.run.recompute
        weights = live.now
        images = run.micro_batch
        pixels, beside = (
            torch.empty(images, *of_one.shape[1:], dtype=of_one.dtype, device=run.device) for of_one in (pixels, beside)
        )
        before = live.now
        loss = run._loss_of(model, pixels, beside, 0)
        kept = live.now - before + pixels.nbytes + beside.nbytes
        loss.backward()
    return kept, live.most - weights - kept


def _measured(run: Run[Any, Any, Any]) -> Measured:
    """Takes and measures some of the first steps.

    Unmeasured steps come first, in which libraries get ready, and the batches that loaders made ahead are used up.
    """
    unreadable: set[str] = set()
    before = 2 + 3 * run.num_workers
    if run.stepping.graph is not None:
        before = max(before, WARM_UP + 1)  # and the capture
    end = min(run.total_steps, run.step + before + _MOST)
    if end - run.step <= before + _LEAST:
        before = 0
    loader = ImageLoader(
        run.crops,
        run._batches(run.step, end),
        num_workers=run.num_workers,
        pin_memory=run.device.type == "cuda",
        say=say,
        unreadable=lambda errors: unreadable.update(error.name for error in errors),
    )
    progress = tqdm(total=SECONDS, unit="s", desc="measuring", disable=None)
    with contextlib.closing(iter(loader)) as batches, progress:
        feed = Feed(batches, run.device, run.beside)
        steps = iter(feed)
        for _ in range(before):
            run._take_step(steps)
        run.record.meter.check()  # waits for the device
        began, waited, first = time.perf_counter(), feed.waited, run.step
        while run.step < end:
            run._take_step(steps)
            run.record.meter.check()
            elapsed = time.perf_counter() - began
            progress.update(min(elapsed, SECONDS) - progress.n)
            enough = elapsed >= SECONDS and run.step - first >= _LEAST
            if run.ranks.largest(enough):  # all ranks must end at the same step
                break
    if unreadable := set().union(*run.ranks.gathered(unreadable)):
        say(
            f"{len(unreadable)} of the images met cannot be read, such as {min(unreadable)}; crate-mae check finds all there are"
        )
    taken = run.step - first
    return Measured(taken, elapsed / taken, (feed.waited - waited) / elapsed)


def _files(run: Run[Any, Any, Any]) -> list[tuple[Path, str, int]]:
    """The files that the run would write: path, content, bytes."""
    config, out = run.config, run.config.out
    weights = sum(weight.nbytes for weight in run.model.state_dict().values())
    state = weights * (3 + bool(run.stepping.average))
    states = min(config.run.keep_states + 1, -(-config.schedule.epochs // config.run.save_every))
    if config.run.keep_every:
        states += config.schedule.epochs // config.run.keep_every
    files = [
        (out / CONFIG_FILE, "the settings", 0),
        (out / METRICS, f"a line every {config.run.log_every} steps", 0),
        (out / STARTS, "a line for each start", 0),
        (out / WEIGHTS_FILE, "the model", weights),
        (out / STATES, f"to resume from, up to {states} of {_bytes(state)}", states * state),
    ]
    files += [(out / BEST, "the model of the best validation", weights)] * bool(run.validation)
    files += [(out / IMAGES, "the names of the images", 0)] * bool(run.images.listed)
    files += [(out / PROFILE, f"profile of {config.run.profile} steps", 0)] * bool(config.run.profile)
    files += [(out / name, "a picture", 0) for name in run.pictures]
    return files + [(out / PLACES[name], f"the lines of {METRICS}, for {name}", 0) for name in config.run.log_to]


def _bytes(size: float) -> str:
    power = min(3, max(0, int(math.log2(max(size, 1)) // 10)))
    return f"{size / 1024**power:.3g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


def _seconds(seconds: float) -> str:
    """A duration in words, no more exact than the measurement."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.3g} minutes"
    return f"{seconds / 3600:,.3g} hours"
