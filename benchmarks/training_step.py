"""How long one training step takes, of CRATE-MAE or a supervised model, against the official order of operations and other peers.

    python -m benchmarks.training_step --device cpu --batch 1 8 --dtype float32 bfloat16
    python -m benchmarks.training_step --batch 256 --providers reference "official compiled" "best composed" triton "triton 16bit"
    python -m benchmarks.training_step --model crate_base --optimizer    # supervised: cross entropy
    python -m benchmarks.training_step --batch 64 --first-step        # from the start of a process, every cache empty

A step is forward, backward and the release of the gradients; ``--optimizer`` adds AdamW's update. All providers but ViT-MAE share
one model, the images, and the masking noise or labels. Before any is timed, losses and gradients must be as close to float32 as
those of the official order with the same stream between layers. 16-bit dtypes run under autocast with float32 parameters.

Providers:

    reference           the official order, eager; the baseline
    triton, composed    ours; with "compiled": under torch.compile; with "16bit": tokens have 16 bits between layers
    ... recompute       16bit, and the backward projects and attends again; "float32 recompute" has float32 tokens
    ... graph           16bit, replayed from a CUDA graph
    best composed       plain PyTorch under torch.compile
    vit-mae             ViT-MAE-Base of transformers on the same images
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import crate_mae
from benchmarks import ROOT, harness, peers
from benchmarks.command_line import add_common_arguments, add_model_arguments, check_model, device_named, positive
from benchmarks.gpu.parts import run_while_it_tells
from benchmarks.harness import Ceilings
from benchmarks.peers import STEPS, Absent, Model, Step, Stream
from benchmarks.records import BASELINE, Record, in_one_line
from crate_mae.classifiers import Classifier
from crate_mae.config import ClassifierConfig, ModelConfig, grid_of
from crate_mae.flops import least_flops
from crate_mae.registry import CLASSIFIERS, MODELS, published

# What float32 rounding grows to through two dozen layers, relative; 2e-6 is usual.
FLOAT32_ROUNDING = 64 * torch.finfo(torch.float32).eps

# Where rounding moves an activation across the threshold, its gradient is switched on or off. In float32 a few of a step's
# millions are that close. Each is 1e-5 to 1e-4 of the whole gradient's norm; the error of a wrong formula is 1e-2 and more.
THRESHOLD_CROSSINGS = 5e-4

# The float32 step that others are compared with keeps all attention scores: a large batch is taken in parts of so many images.
EXACT_AT_A_TIME = 32


@dataclass(frozen=True)
class Batch:
    """Random images for a model, with masking noise or a classifier's labels, and the dtype of the products."""

    images: Tensor
    target: Tensor
    dtype: torch.dtype

    @classmethod
    def random(
        cls, config: ModelConfig | ClassifierConfig, size: int, device: torch.device, dtype: torch.dtype
    ) -> Batch:
        rows, columns = grid_of(config.image_shape, config.patch_size)
        images = torch.randn(size, config.in_chans, *config.image_shape, device=device)
        if isinstance(config, ClassifierConfig):
            return cls(images, torch.randint(config.num_classes, (size,), device=device), dtype)
        return cls(images, torch.rand(size, rows * columns, device=device), dtype)

    def split(self, size: int, dtype: torch.dtype) -> list[Batch]:
        parts = zip(self.images.split(size), self.target.split(size), strict=True)
        return [Batch(images, target, dtype) for images, target in parts]


class Stepper:
    """A ``Step`` on one batch.

    Raises:
        Absent: it cannot run on this machine.
    """

    def __init__(self, step: Step, model: Model, batch: Batch) -> None:
        self.step, self.crate, self.batch = step, model, batch
        device, config = batch.images.device, model.config
        if step.implementation == "triton" and device.type != "cuda" and not _interpreting():
            raise Absent("Triton's kernels need a CUDA device")
        if step.graph and device.type != "cuda":
            raise Absent("CUDA graphs need a CUDA device")
        if step.model is peers.ViTMAE:
            if isinstance(model, Classifier):
                raise Absent("ViT-MAE is no classifier")
            self.model: nn.Module = peers.ViTMAE(config.image_shape[0], config.patch_size).to(device).train()
        else:
            self.model = step.model(model)
        self.call: peers.Function = self.model
        if step.mode is not None:
            self.call = peers.compiled(self.model, step.mode, device, fullgraph=step.model is not peers.ViTMAE)
        self.call = peers.forced(step.implementation, self.call)
        self.replay: Callable[[], tuple[Tensor, list[Tensor | None]]] | None = None
        self.error: dict[str, float] = {}
        self.loss = float("nan")

    def forward_backward(self) -> Tensor:
        """The loss, detached; the gradients stay in the parameters."""
        if self.replay is not None:
            loss, gradients = self.replay()
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            return loss
        loss = self.forward()
        loss.backward()
        return loss.detach()

    def forward(self) -> Tensor:
        images = self.batch.images
        self.crate.stream, self.crate.recompute = self.step.stream, self.step.recompute
        with harness.autocast(images.device, self.batch.dtype):
            return self.call(images, self.batch.target)

    def capture(self) -> None:
        """Capture the step in a CUDA graph, which all later calls replay.

        Raises:
            Absent: the step cannot be captured.
        """

        def run() -> tuple[Tensor, list[Tensor | None]]:
            loss = self.forward_backward()
            gradients = [parameter.grad for parameter in self.model.parameters()]
            self.model.zero_grad(set_to_none=True)
            return loss, gradients

        replay, how = harness.captured(run, self.batch.images.device)
        if how != "CUDA graph":
            raise Absent(how)
        self.replay = replay

    def provider(self, optimizer: torch.optim.Optimizer | None = None) -> harness.Provider:
        """Takes one step and leaves no gradients behind."""

        def run() -> None:
            self.forward_backward()
            if optimizer is not None:
                optimizer.step()
            self.model.zero_grad(set_to_none=True)

        return run

    def outputs(self) -> dict[str, Tensor]:
        """What must agree between implementations: the loss, and all gradients as one vector."""
        loss = self.forward_backward().clone()
        gradients = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        self.model.zero_grad(set_to_none=True)
        return {"loss": loss, "gradient": gradients}


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def official(model: Model, batch: Batch, dtype: torch.dtype, stream: Stream = "float32") -> dict[str, Tensor]:
    """``Stepper.outputs`` of the official order, some images at a time: every image has as many patches removed."""
    total: dict[str, Tensor] = {}
    for part in batch.split(EXACT_AT_A_TIME, dtype):
        share = len(part.images) / len(batch.images)
        for name, value in Stepper(Step(stream=stream), model, part).outputs().items():
            total[name] = total.get(name, 0) + share * value
    return total


def tolerances(baseline: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Relative errors allowed against the official order in float32: for the gradient, about the official order's own.

    16-bit rounding moves activations across the threshold and is amplified by every layer, so no constant would fit all
    depths. The loss is a single number, whose error may vanish by luck: it gets one unit in the last place instead.
    """
    own_error = harness.relative_error(baseline["gradient"], truth["gradient"])
    return {
        "loss": torch.finfo(dtype).eps + FLOAT32_ROUNDING,
        "gradient": 1.5 * own_error + THRESHOLD_CROSSINGS,
    }


def ready(names: Sequence[str], model: Model, batch: Batch) -> tuple[dict[str, Stepper], dict[str, str]]:
    """Steppers that have taken a step and agree with float32, and why the others cannot take part.

    Raises:
        ValueError: one of ours does not agree; a peer that does not takes no part.
    """
    precision = torch.get_float32_matmul_precision()
    harness.float32_products("highest")
    truth = official(model, batch, torch.float32)
    harness.float32_products(precision)
    allowed: dict[str, dict[str, float]] = {}
    steppers: dict[str, Stepper] = {}
    absent: dict[str, str] = {}
    for name in names:
        step = STEPS[name]
        try:
            stepper = Stepper(step, model, batch)
            if step.graph:
                stepper.capture()
            found = stepper.outputs()
            stepper.loss = found["loss"].item()
            if step.model is not peers.ViTMAE:
                if step.stream not in allowed:
                    own = official(model, batch, batch.dtype, step.stream)
                    allowed[step.stream] = tolerances(own, truth, batch.dtype)
                stepper.error = harness.check_agreement({name: found}, truth, allowed[step.stream])[name]
            elif not math.isfinite(stepper.loss):
                raise ValueError("the loss is not finite")
            steppers[name] = stepper
        except Exception as problem:  # not installed, no compiler, out of memory, or wrong there
            if step.ours and not isinstance(problem, (Absent, torch.OutOfMemoryError)):
                raise
            absent[name] = in_one_line(problem)
        model.zero_grad(set_to_none=True)
    return steppers, absent


def measure(
    record: Record, arguments: argparse.Namespace, ceilings: Ceilings, device: torch.device, dtype_name: str, size: int
) -> None:
    """One result row a provider, all timed in turns."""
    harness.clean(device)
    torch.manual_seed(arguments.seed)
    overrides = dict(arguments.set)
    model = crate_mae.create_model(arguments.model, **overrides).to(device).train()
    batch = Batch.random(model.config, size, device, harness.torch_dtype(dtype_name))
    steppers, absent = ready(arguments.providers, model, batch)
    common = {
        "operator": "training_step",
        "model": arguments.model,
        "overrides": overrides,
        "shape": list(batch.images.shape),
        "dtype": dtype_name,
        "mode": "forward+backward" + "+adamw" * arguments.optimizer,
        "baseline": BASELINE,
        "rounds": arguments.rounds,
    }
    providers: dict[str, harness.Provider] = {}
    peaks: dict[str, int | None] = {}
    for name, stepper in steppers.items():
        parameters = stepper.model.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=1e-5) if arguments.optimizer else None
        providers[name] = stepper.provider(optimizer)
        added = None if stepper.replay else harness.added_bytes(providers[name], device)
        peaks[name] = None if added is None else added + harness.bytes_of(stepper.model)
    for name, reason in absent.items():
        record.add(**common | of_model(name), provider=name, unavailable=reason)
    times = harness.time_interleaved(providers, device, rounds=arguments.rounds)
    for name, sample in times.items():
        ms = harness.Spread.of(sample)
        of_crate = STEPS[name].model is not peers.ViTMAE
        rates = ceilings.rates(ms.p50, least_flops(model.config, size)) if of_crate else {}
        timed_by = "host clock" if device.type != "cuda" else "CUDA graph" if STEPS[name].graph else "events"
        record.add(
            **common | of_model(name),
            provider=name,
            timed_by=timed_by,
            loss=steppers[name].loss,
            error=steppers[name].error or None,
            ms=asdict(ms),
            peak_bytes=peaks[name],
            images_per_second=size * 1e3 / ms.p50,
            ratio=harness.ratios_to(times.get(BASELINE), sample),
            **rates,
        )


def of_model(name: str) -> dict[str, Any]:
    """What a row of this provider says of its model, where it is not the CRATE-MAE that the others share."""
    return {"model": "vit_mae_base", "overrides": None} if STEPS[name].model is peers.ViTMAE else {}


def first_step(
    record: Record, arguments: argparse.Namespace, name: str, dtype: str, batch_size: int, device: torch.device
) -> None:
    """Time, once, a new process with empty caches: from its start to the end of its first step."""
    model = [f"{key}={json.dumps(value)}" for key, value in arguments.set]
    command = [sys.executable, "-m", "benchmarks.training_step", "--one-step", "--device", arguments.device]
    command += ["--model", arguments.model, *(["--set", *model] if model else [])]
    command += ["--batch", str(batch_size), "--dtype", dtype, "--providers", name, "--seed", str(arguments.seed)]
    row: dict[str, Any] = {
        "operator": "training_step",
        "dtype": dtype,
        "mode": "first step",
        "provider": name,
        "rounds": 1,
    }
    config = published(arguments.model, **dict(arguments.set))
    row |= {"model": arguments.model, "overrides": dict(arguments.set)} | of_model(name)
    row |= {"shape": [batch_size, config.in_chans, *config.image_shape], "timed_by": "host clock"}
    with tempfile.TemporaryDirectory() as folder:
        variables = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME")
        environment = os.environ | {variable: os.path.join(folder, variable) for variable in variables}
        begin = time.time()
        process = run_while_it_tells(command, cwd=ROOT, env=environment, quiet_seconds=600)
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["no output"])[-1]
            record.add(**row, unavailable=last)
            return
        seconds = float(process.stdout.splitlines()[-1]) - begin
    record.add(**row, ms=harness.Spread.single(seconds * 1e3))


def one_step(arguments: argparse.Namespace, device: torch.device) -> None:
    """Take one step and print the time at its end; ``first_step`` runs this in a process of its own."""
    torch.manual_seed(arguments.seed)
    dtype = harness.torch_dtype(arguments.dtype[0])
    model = crate_mae.create_model(arguments.model, **dict(arguments.set)).to(device).train()
    batch = Batch.random(model.config, arguments.batch[0], device, dtype)
    stepper = Stepper(STEPS[arguments.providers[0]], model, batch)
    if stepper.step.graph:
        stepper.capture()
    loss = stepper.forward_backward().item()  # waits for the forward only
    if device.type == "cuda":
        torch.cuda.synchronize()
    end = time.time()
    if not math.isfinite(loss):
        raise ValueError("the loss is not finite")
    print(end)


def default_providers(device: torch.device) -> list[str]:
    return [BASELINE, *(["triton"] if device.type == "cuda" else ["composed", "composed 16bit compiled"])]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = _parser().parse_args(argv)
    device = device_named(arguments.device)
    check_model(arguments.model, dict(arguments.set))
    arguments.rounds = arguments.rounds or (30 if device.type == "cuda" else 5)
    arguments.providers = arguments.providers or default_providers(device)
    with harness.side_stream(device):
        if arguments.one_step:
            one_step(arguments, device)
            return []
        record = Record(device, arguments.seed, arguments.json)
        for dtype in arguments.dtype:
            if arguments.first_step:
                for batch in arguments.batch:
                    for name in arguments.providers:
                        first_step(record, arguments, name, dtype, batch, device)
                continue
            ceilings = harness.ceilings(record, device, dtype)
            for batch in arguments.batch:
                measure(record, arguments, ceilings, device, dtype, batch)
    record.show()
    record.refuse_nothing()
    return record.rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__.partition("\n")[0])
    add_common_arguments(parser)
    add_model_arguments(parser, {**MODELS, **CLASSIFIERS})
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 8], help="images a step")
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=["float32", "bfloat16"])
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=STEPS,
        metavar="NAME",
        help="default: reference, and triton on CUDA, else composed and composed 16bit compiled; of "
        + ", ".join(map(repr, STEPS)),
    )
    parser.add_argument("--rounds", type=positive, help="timed turns (default: 30 on CUDA, 5 on the CPU)")
    parser.add_argument("--optimizer", action="store_true", help="AdamW's update is part of the step")
    parser.add_argument("--first-step", action="store_true", help="time the first step of a new process instead")
    parser.add_argument("--one-step", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
