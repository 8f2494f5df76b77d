"""How fast a run goes, compared with what its device can do, and how much memory it takes."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from crate_kernels.cpu import CPU_PRODUCT_DTYPES
from crate_mae.training.fitting import forget_peak, peak_memory
from crate_mae.training.precision import DTYPES

OF_THE_MACHINE = (
    "images_per_second",
    "waiting",
    "flops_per_second",
    "product_share",
    "memory_bytes",
    "hours",
    "hours_left",
)
"""Values in rows of metrics.jsonl that describe the machine: they differ each time the same steps are taken."""

_SIDE = {"cuda": 8192}
"""Side of the square matrices with whose product a GPU is measured: large enough to reach its full rate. On a CPU it is 768."""
_TURNS = 5


def product_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a device in one large matrix product, the best of a few repetitions; measured once in a process.

    On a CPU without 16-bit matrix instructions the operators multiply in float32 in any precision, and so does this.

    Args:
        device: to measure.
        precision: of the run.
    """
    dtype = DTYPES[precision]
    if device.type == "cpu" and dtype not in CPU_PRODUCT_DTYPES:
        dtype = torch.float32
    return _measured_rate(device, dtype, torch.get_num_threads())


@functools.cache
def _measured_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """The measurement; `threads`, on which a CPU's rate depends, is there for the cache."""
    side = _SIDE.get(device.type, 768)
    generator = torch.Generator(device).manual_seed(0)  # not the run's own generator
    left, right = torch.randn(2, side, side, device=device, generator=generator).to(dtype).unbind()
    seconds = []
    for _ in range(1 + _TURNS):
        began = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds[1:])  # without the first, in which libraries are loaded


class Pace:
    """Turns images per second into the values by which a run is watched; its clock starts with `begin`.

    Args:
        flops_an_image: FLOPs of a step, divided by its images.
        device: whose memory is measured.
        total_steps: of the run.

    Attributes:
        product_rate: FLOP/s of all devices together in large matrix products.
    """

    def __init__(self, flops_an_image: float, device: torch.device, total_steps: int) -> None:
        self._flops_an_image, self._device, self._total_steps = flops_an_image, device, total_steps
        self._hours_before, self._first_step = 0.0, 0
        self._began: float | None = None
        self.product_rate = float("nan")

    @property
    def hours(self) -> float:
        """Hours that the run has taken so far, earlier starts included, with validations and saves."""
        return self._hours_before + self._seconds / 3600

    @property
    def _seconds(self) -> float:
        return 0.0 if self._began is None else time.perf_counter() - self._began

    def go_on(self, hours: float) -> None:
        """Go on from the hours that the run took in earlier starts."""
        self._hours_before = hours

    def begin(self, step: int, product_rate: float) -> None:
        """Start the clock at the first step of this start, after `step` others."""
        forget_peak(self._device)  # without the measured product and the batches that were tried
        self._began, self._first_step, self.product_rate = time.perf_counter(), step, product_rate

    def in_words(self, images_per_second: float) -> str:
        """FLOP/s of the steps, and their share of what the devices reach in large products, in words."""
        flops = images_per_second * self._flops_an_image
        return f"{flops / 1e12:.3g} TFLOP/s ({flops / self.product_rate:.0%} of large products)"

    def row(self, step: int, images_per_second: float) -> dict[str, Any]:
        """The values for a row of metrics.jsonl.

        ``product_share`` is the share of the devices' product rate. ``memory_bytes`` is the peak since the first step: of tensors
        on this process' CUDA device, or of the whole process on a CPU; it is left out if unknown. ``hours`` go on from the
        last row that the run still has.
        """
        flops = images_per_second * self._flops_an_image
        memory = peak_memory(self._device)
        return {
            "flops_per_second": flops,
            "product_share": flops / self.product_rate,
            **({} if memory is None else {"memory_bytes": memory}),
            "hours": self.hours,
            "hours_left": self._seconds / 3600 / (step - self._first_step) * (self._total_steps - step),
        }
