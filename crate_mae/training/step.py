"""One step of the optimizer: micro-batches, ranks, loss scaling, clipping, and a guard against values that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from crate_mae.classifiers import Classifier
from crate_mae.layers import PreNorm
from crate_mae.model import CrateMAE
from crate_mae.training.average import Average
from crate_mae.training.feed import Batch
from crate_mae.training.graph import StepGraph
from crate_mae.training.metrics import StepMeter
from crate_mae.training.parallel import Alone, whole

LossOf = Callable[[Callable[..., Any], torch.Tensor, torch.Tensor, int], torch.Tensor]
"""The mean loss of (forward, pixels, beside, step)."""


class Step:
    """Takes steps on the gradient of the mean loss over all images of a batch, whose parts may be on several ranks.

    The loss of a micro-batch is weighted by its share of the images, so that parts of different sizes give the mean over all.
    Ranks sum their gradients in the last micro-batch of a step only.

    Args:
        parallel: the model.
        optimizer: of its parameters.
        loss_of: the mean loss of a micro-batch.
        batch_size: images in a step, of all ranks and micro-batches.
        accumulate: micro-batches in a step, on each rank.
        clip_grad: the largest norm of the whole gradient; 0 for no clipping.
        average: a moving average of the weights, if one is kept.
        graph: replays the work of steps, if they are captured; not of scaled losses, and of several ranks neither.
        by_part: whether `grad_norms` will be asked for.
        scaled: whether the loss is scaled for a backward in float16 (arXiv 1710.03740). Then a step whose gradient is not finite
            is skipped, and the scale lowered.

    Attributes:
        scaler: of the loss.
        grad_norms: gradient norms by part of the model, of the last step for which they were asked.
    """

    def __init__(
        self,
        parallel: Alone[CrateMAE | Classifier],
        optimizer: torch.optim.Optimizer,
        loss_of: LossOf,
        *,
        batch_size: int,
        accumulate: int,
        clip_grad: float,
        average: Average | None,
        scaled: bool,
        graph: StepGraph | None = None,
        by_part: bool = False,
    ) -> None:
        self.parallel, self.optimizer, self.loss_of, self.average = parallel, optimizer, loss_of, average
        self.graph, self._by_part = graph, by_part
        self.batch_size, self.accumulate = batch_size, accumulate
        self._longest = clip_grad or float("inf")
        device = next(parallel.model.parameters()).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self._broken = torch.zeros((), device=device)
        optimizer.found_inf = self._broken  # type: ignore[attr-defined]  # fused optimizers look for it, undeclared
        self.grad_norms: dict[str, float] = {}
        self._parts: list[str] = []
        self._is_shown = False

    def __call__(
        self, batches: Iterator[Batch], lr: float, step: int, meter: StepMeter, *, by_part: bool = False
    ) -> torch.Tensor:
        """Take a step on the next micro-batches; returns its loss, the mean over all images.

        Args:
            batches: micro-batches.
            lr: the learning rate.
            step: how many steps were taken before.
            meter: takes the loss and the gradient's norm.
            by_part: measure `grad_norms`, which waits for the device.
        """
        for group in self.optimizer.param_groups:
            rate = lr * group.get("lr_scale", 1.0)
            # A captured step reads it in float32: so do all steps, that a resumed run, which captures later, has the same bits.
            group["lr"] = rate if self.graph is None else float(np.float32(rate))
        if self.graph is None:
            found = self._work(batches, step, by_part)
        else:
            found = self.graph(lambda batches: self._work(batches, step, self._by_part), batches)
        values, norms = found[:2], found[2:]
        if by_part:
            self.grad_norms = dict(zip(self._parts, norms.tolist(), strict=True))
        meter.add(step + 1, values, self.batch_size)
        if self.average:
            self.average.update(step + 1)
        return values[0]

    def _work(self, batches: Iterator[Batch], step: int, by_part: bool) -> torch.Tensor:
        """All that the device does in a step, but for the average; returns, in float32, the loss, the norm of the gradient, and,
        if they are asked for, its norms by part."""
        loss = self._backward(batches, step)
        self.scaler.unscale_(self.optimizer)
        norms = []
        if by_part:
            gradients = _gradients_by_part(self.parallel.model)
            self._parts = list(gradients)
            norms = [whole(torch.nn.utils.get_total_norm(of_part)).float() for of_part in gradients.values()]
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.parallel.model.parameters(), self._longest)).detach()
        values = torch.stack([loss.float(), grad_norm.float()])
        # From the first step on that is not finite, this flag on the device keeps the optimizer from changing anything. The host
        # does not wait for it: when it reads the loss, some steps later, the weights are still those before the bad step.
        must_be_finite = values[:1] if self.scaler.is_enabled() else values
        not_finite = must_be_finite.isfinite().all().logical_not().float()
        self._broken.copy_(torch.maximum(self._broken, not_finite))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.cat([values, torch.stack(norms)]) if norms else values

    def _backward(self, batches: Iterator[Batch], step: int) -> torch.Tensor:
        ranks, device = self.parallel.ranks, self._broken.device
        total = torch.zeros((), device=device)
        summed: Callable[[], object] = bool
        self.optimizer.zero_grad(set_to_none=True)
        for index in range(self.accumulate):
            is_last = index == self.accumulate - 1
            pixels, beside = next(batches)
            share = len(pixels) / self.batch_size
            with self.parallel.synced(is_last):
                loss = self.loss_of(self.parallel.forward, pixels, beside, step)
                total += loss.detach() * share
                if is_last:
                    summed = ranks.sum(total)
                if self.scaler.is_enabled():  # the scaler would take steps again after a loss that was not finite
                    loss = loss * torch.where(
                        self._broken > 0, torch.nan, 1.0
                    )  # as a factor it makes gradients NaN, too
                # DDP and FSDP2 divide the sum of gradients by the number of ranks.
                self.scaler.scale(loss * (share * ranks.count)).backward()
        summed()
        return total

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While the block lasts, the model has the weights that are validated and exported: the average, if one is kept."""
        if self.average is None or self._is_shown:
            yield
            return
        self._is_shown = True
        try:
            with self.average.in_place():
                self.parallel.changed()
                yield
            self.parallel.changed()
        finally:
            self._is_shown = False


def _gradients_by_part(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The gradients by part of the model: each half of each layer (attention, or sparse step, with its LayerNorm), and each
    module or token outside the layers, by its name."""
    steps = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PreNorm))
    parts: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = next((step[:-1] for step in steps if name.startswith(step)), name.partition(".")[0])
            parts.setdefault(part, []).append(parameter.grad)
    return parts
