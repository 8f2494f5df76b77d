"""A step of the optimizer as one CUDA graph: the device does its work without waiting for the host to start each kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from crate_mae.training.feed import Batch

WARM_UP = 3
"""Steps before the capture: they compile kernels, choose algorithms, and make the optimizer's means."""

MOST_CAPTURES = 3
"""Captures of one run: a step that is captured anew all the time is slower than one that never is."""


def obstacle_to_graph(device: torch.device, precision: str, *, compiled: bool, shared: bool) -> str | None:
    """Why a step cannot be captured in a CUDA graph, in words; None where it can.

    Args:
        device: where the run trains.
        precision: "float32", "bfloat16" or "float16".
        compiled: whether torch.compile made the model's kernels.
        shared: whether processes of torchrun share a step.
    """
    if device.type != "cuda":
        return f"a {device.type.upper()} has no CUDA graphs"
    if shared:
        return "processes of torchrun sum their gradients in each step"
    if compiled:
        return "run.compile starts kernels in its own way"
    return "run.precision float16 changes the loss scale from step to step" if precision == "float16" else None


class Capture(Protocol):
    """What repeats the work of a function on a device."""

    def aside(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Do the work now, where it will be captured, and return its result."""
        ...

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Note the work without doing it; returns the tensor that will hold its result after each replay."""
        ...

    def replay(self) -> None:
        """Do the work that was noted."""
        ...

    def forget(self) -> None:
        """Free what was noted, if anything was."""
        ...


class CudaCapture:
    """Captures work in a CUDA graph, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()

    def forget(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def aside(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        step = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(step)
        with torch.cuda.stream(self._stream):
            result = work()
        step.wait_stream(self._stream)
        return result

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        # Other threads, which load images and write states, go on with what they do.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        self._graph.replay()


class StepGraph:
    """Does the work of steps: the first ones as they come, then it captures one, and replays it for all others.

    A replay reads the batch and the learning rates from tensors that stay where they are, and new ones are copied into these
    before. All else that a step reads and writes lies on the device: weights, the optimizer's means, flags. A batch of other
    shapes is not replayed. If weights or means are other tensors than before, or the optimizer has other settings, a step is
    captured anew. If a capture fails, all steps are done as they come, and the run says so once. Hooks that are put on the model
    later do nothing in a replay.

    Args:
        model: whose weights, buffers and modes a step reads.
        optimizer: whose learning rates a step reads; fused.
        capture: how a step is captured.
        accumulate: micro-batches in a step.
        say: takes a line for the user.

    Attributes:
        captured: whether a step was captured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        capture: Capture,
        accumulate: int,
        say: Callable[[str], object],
    ) -> None:
        self._model, self._optimizer, self._capture, self._say = model, optimizer, capture, say
        self._accumulate = accumulate
        self._steps_done = self._captures = 0
        self._failed = False
        self._batches: list[Batch] = []
        self._rates: list[torch.Tensor] = []
        self._result = torch.empty(0)
        self._read: list[object] = []

    @property
    def captured(self) -> bool:
        return bool(self._batches)

    def __call__(self, work: Callable[[Iterator[Batch]], torch.Tensor], batches: Iterator[Batch]) -> torch.Tensor:
        """Do the work of a step, and return its result in memory of its own.

        Args:
            work: the whole step on micro-batches; it waits for nothing, and returns a tensor on the device.
            batches: micro-batches, of which those of one step are taken.
        """
        if self.captured and self._read != self._what_is_read():
            self.forget()
        if self._failed:
            return work(batches)
        if self._steps_done < WARM_UP:
            self._steps_done += 1
            return self._capture.aside(lambda: work(batches))
        if not self.captured:
            first = [next(batches) for _ in range(self._accumulate)]
            static: list[Batch] = [(pixels.clone(), beside.clone()) for pixels, beside in first]
            if not self._is_captured(work, static):
                self._failed = True
                return work(iter(static))
            taken = static
        else:
            taken = [self._in_place(static, next(batches)) for static in self._batches]
        if any(one is not static for one, static in zip(taken, self._batches, strict=True)):
            return work(iter(taken))
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._capture.replay()
        # PyTorch counts the writes to a tensor when it starts them; those of a replay are counted here.
        torch.autograd.graph.increment_version(
            [one for group in self._optimizer.param_groups for one in group["params"]]
        )
        return self._result.clone()

    def forget(self) -> None:
        """Free the memory of the captured step; another one is captured after some that are done as they come."""
        self._optimizer.zero_grad(set_to_none=True)
        self._capture.forget()
        self._steps_done, self._batches, self._result = 0, [], torch.empty(0)

    @staticmethod
    def _in_place(static: Batch, new: Batch) -> Batch:
        """The micro-batch that a replay reads, with the values of a new one; the new one itself, if its shapes are others."""
        if [one.shape for one in static] != [one.shape for one in new]:
            return new
        for here, there in zip(static, new, strict=True):
            here.copy_(there, non_blocking=True)
        return static

    def _what_is_read(self) -> list[object]:
        """What a captured step has once and for all: where weights, buffers and means are, which are trained, and settings."""
        read: list[object] = [torch.get_float32_matmul_precision()]
        read += [module.training for module in self._model.modules()]
        read += [one.data_ptr() for one in self._model.buffers()]
        for one in self._model.parameters():
            read += [one.data_ptr(), one.requires_grad]
            read += [mean.data_ptr() for mean in self._optimizer.state.get(one, {}).values()]
        for group in self._optimizer.param_groups:
            settings = [(name, value) for name, value in group.items() if name not in ("params", "lr")]
            read += [(n, (v.data_ptr(), v._version) if isinstance(v, torch.Tensor) else v) for n, v in settings]
        return read

    def _is_captured(self, work: Callable[[Iterator[Batch]], torch.Tensor], static: list[Batch]) -> bool:
        if self._captures == MOST_CAPTURES:
            self._say(
                "graph: off, as a step was captured anew again and again: its weights or settings change all the time"
            )
            return False
        device = static[0][0].device
        self._rates = [torch.zeros((), device=device) for _ in self._optimizer.param_groups]
        self._optimizer.zero_grad(set_to_none=True)  # a captured step makes gradients of its own

        def captured() -> torch.Tensor:
            with self._reading_rates():
                return work(iter(static))

        try:
            self._result = self._capture.capture(captured)
        except Exception as error:  # of CUDA, PyTorch, Triton; out of memory, too
            why = " ".join(str(error).split())[:200]
            self._say(f"graph: off, as a step cannot be captured ({type(error).__name__}: {why})")
            self.forget()
            return False
        if not self._captures:
            self._say("graph: a step is one CUDA graph from here on")
        self._captures += 1
        self._batches, self._read = static, self._what_is_read()
        return True

    @contextmanager
    def _reading_rates(self) -> Iterator[None]:
        """While the block lasts, the optimizer reads its learning rates on the device."""
        groups = self._optimizer.param_groups
        kept = [(group["lr"], group["capturable"]) for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"], group["capturable"] = rate, True
            yield
        finally:
            for group, (rate, capturable) in zip(groups, kept, strict=True):
                group["lr"], group["capturable"] = rate, capturable
