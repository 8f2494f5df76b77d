"""A profile of a few steps: a trace for a viewer, and the operations that took the longest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from crate_mae.files import make_folder, replaced
from crate_mae.training.run_folder import OPERATIONS, PROFILE, TRACE

_BEFORE, _WARM = 2, 1
"""Steps before the profile, in which libraries and compilers get ready, and steps in which the profiler warms up."""

_ROWS = 40
_BY = {
    "self_device_time_total": "time of their own on the device",
    "self_cpu_time_total": "time of their own on the CPU",
}


class Profiler:
    """Profiles some of the first steps of a process.

    Args:
        steps: how many; 0 for none.
        left: steps that the run has left; if they are too few, there is no profile, and a line says so.
        out: folder of the run; trace and table are written into its folder profile/.
        device: where the run computes.
        say: takes a line for the user.
    """

    def __init__(self, steps: int, left: int, out: Path, device: torch.device, say: Callable[[str], None]) -> None:
        self._out, self._on_cuda, self._say = out, device.type == "cuda", say
        self._steps = steps
        self._profile: profile | None = None
        least = _BEFORE + _WARM + steps
        if steps and left < least:
            say(f"run.profile: no profile of {steps} steps, for which {least} must be left to take, and {left} are")
        elif steps:
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])],
                schedule=schedule(wait=_BEFORE, warmup=_WARM, active=steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self._profile.start()

    def stepped(self) -> bool:
        """To be called after each step; returns whether it wrote the profile, which takes some time."""
        if self._profile is None:
            return False
        self._profile.step()
        return self._profile is None

    def close(self) -> None:
        """To be called after the last step; there is no profile if the run ends before all its steps were profiled."""
        if self._profile:
            self._profile.on_trace_ready = None
            self._profile.stop()
            self._profile = None

    def _write(self, done: profile) -> None:
        self._profile = None
        folder = self._out / PROFILE
        make_folder(folder)
        done.export_chrome_trace(str(folder / TRACE))
        by = "self_device_time_total" if self._on_cuda else "self_cpu_time_total"
        table = done.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=80)
        with replaced(folder / OPERATIONS) as file:
            heading = (
                f"{self._steps} steps, after {_BEFORE + _WARM} others; the {_ROWS} operations with the most {_BY[by]}"
            )
            file.write(f"{heading}\n{table}\n".encode())
        self._say(
            f"profiled {self._steps} steps: what took the longest is in {folder / OPERATIONS}; chrome://tracing and "
            f"ui.perfetto.dev show {folder / TRACE}"
        )
