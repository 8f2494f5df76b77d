"""How fast a run goes, held against what its device can do, and how much memory it takes."""

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
"""Values in rows of metrics.jsonl that tell of the machine, and are others each time the same steps are taken."""

_SIDE = {"cuda": 8192}
"""Of the square matrices by whose product a device is measured, large enough that it reaches its rate; on a CPU 768."""
_TURNS = 5


def product_rate(device: torch.device, precision: str) -> float:
    """FLOP/s that a device reaches in one large product of matrices, in the best of a few turns; measured once a process.

    On a CPU without 16-bit matrix instructions products are in float32, whatever the precision, as the operators take them.

    Args:
        precision: that of the run.
    """
    dtype = DTYPES[precision]
    if device.type == "cpu" and dtype not in CPU_PRODUCT_DTYPES:
        dtype = torch.float32
    return _measured_rate(device, dtype, torch.get_num_threads())


@functools.cache
def _measured_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Args: threads: that compute, which the rate of a CPU depends on."""
    side = _SIDE.get(device.type, 768)
    generator = torch.Generator(device).manual_seed(0)  # of its own: what a run draws must not depend on this
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
    """Makes of images a second what a run is watched by; its clock stands until `begin`.

    Args:
        flops_an_image: of a step.
        device: whose memory it is about.
        total_steps: of the run.

    Attributes:
        product_rate: FLOP/s of all devices together in products.
    """

    def __init__(self, flops_an_image: float, device: torch.device, total_steps: int) -> None:
        self._flops_an_image, self._device, self._total_steps = flops_an_image, device, total_steps
        self._hours_before, self._first_step = 0.0, 0
        self._began: float | None = None
        self.product_rate = float("nan")

    @property
    def hours(self) -> float:
        """That the run has taken in all processes it was in, with validations and saves."""
        return self._hours_before + self._seconds / 3600

    @property
    def _seconds(self) -> float:
        return 0.0 if self._began is None else time.perf_counter() - self._began

    def go_on(self, hours: float) -> None:
        """The run has taken so many hours before."""
        self._hours_before = hours

    def begin(self, step: int, product_rate: float) -> None:
        """The first step after so many others begins."""
        forget_peak(self._device)  # of the product that was measured, and of the batches that were tried
        self._began, self._first_step, self.product_rate = time.perf_counter(), step, product_rate

    def in_words(self, images_per_second: float) -> str:
        """The rate of products, and its share of what the devices can do."""
        flops = images_per_second * self._flops_an_image
        return f"{flops / 1e12:.3g} TFLOP/s ({flops / self.product_rate:.0%} of large products)"

    def row(self, step: int, images_per_second: float) -> dict[str, Any]:
        """What a row of metrics.jsonl has of it, once steps have been taken.

        ``product_share`` is that of the devices' product rate; ``memory_bytes`` the most since steps began, of CUDA's tensors on
        the device of this process, or of all that this process has on a host (left out where that is not known); ``hours`` go on
        from the last row that the run still has.
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
