"""The search for the largest batch that fits."""

from __future__ import annotations

import dataclasses
import math
import random
import sys

import pytest
import torch
from tiny_runs import assert_same_weights, tiny_config, weights, write_photographs

from crate_mae.training import fitting, pretrain


@pytest.mark.parametrize("seed", range(50))
def test_the_largest_is_found_in_few_trials_and_none_is_far_beyond(seed: int) -> None:
    draws = random.Random(seed)
    constant, slope, bend = draws.uniform(0, 1e9), draws.uniform(1e5, 1e8), draws.choice((0.0, 1e3))
    room, most, fails_at = draws.uniform(1.2e9, 8e10), draws.randint(1, 5000), draws.choice((math.inf, 300))
    tried: list[int] = []

    def needs(number: int) -> float:
        tried.append(number)
        return constant + slope * number + bend * number**2 if number < fails_at else math.inf

    found = fitting.largest(needs, room, most)
    right = max(n for n in range(1, most + 1) if n < fails_at and constant + slope * n + bend * n**2 <= room)
    assert found == right
    assert len(tried) <= 25
    if fails_at == math.inf:
        # A line lies below a curve that bends up: what is tried is beyond it, and not beyond the line alone.
        assert all(constant + slope * n <= room for n in tried)


def test_one_that_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match=r"schedule.accumulate: one image .* needs 2.00 of 1.00 GiB; --run.recompute"):
        fitting.largest(lambda number: 2.0**31, 2.0**30, 8)


class OfCuda:
    """A device of so many bytes, of which a process has some, and an image takes 100."""

    def __init__(self, total: int) -> None:
        self.total, self.highest, self.emptied = total, 0, 0

    def step(self, images: int) -> None:
        self.highest = 1000 + 100 * images
        if self.highest > self.total:
            self.highest = self.total
            raise torch.OutOfMemoryError

    def empty_cache(self) -> None:
        self.emptied += 1


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peak is that of the allocator; a batch that it does not take is no error, and what it left is given back."""
    gpu = OfCuda(total=11_000)
    monkeypatch.setattr(torch.cuda, "empty_cache", gpu.empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu.total - 1000, gpu.total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: gpu.highest)
    device = torch.device("cuda", 0)
    assert fitting.fit(gpu.step, device, 1000, margin=0) == (100, 1000, 11_000, 11_000)
    assert fitting.fit(gpu.step, device, 1000, margin=0.1, later=900) == (80, 1000, 9_000, 9_000)
    assert fitting.fit(gpu.step, device, 50, margin=0).batch == 50
    meter, before = fitting._Cuda(device), gpu.emptied
    assert meter.peak(lambda: gpu.step(101)) == math.inf
    assert gpu.emptied == before + 2


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells how much memory a process had at most")
def test_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB an image, of a room for six of them: what the process has besides moves by less than one."""
    image = torch.ones(2**26, dtype=torch.uint8)

    def step(images: int) -> None:
        image.repeat(images)

    meter = fitting._Host(1)
    before = meter.peak(lambda: step(1)) - 2**26
    monkeypatch.setattr(fitting._Host, "room", lambda self: before + 6.5 * 2**26)
    assert fitting.fit(step, torch.device("cpu"), 1000, margin=0).batch in (5, 6, 7)
    assert fitting.fit(step, torch.device("cpu"), 3, margin=0).batch == 3


@pytest.mark.parametrize(
    "batch_size, accumulate, chosen", [(7, "auto", (7, 4)), ("auto", 1, (2, 1)), ("auto", 3, (6, 3))]
)
def test_a_run_takes_what_fits_and_says_so(tmp_path, monkeypatch, capsys, batch_size, accumulate, chosen) -> None:
    """Two images fit; and it is the run that these numbers make."""
    config = tiny_config(tmp_path / "auto", write_photographs(tmp_path / "photographs"))
    monkeypatch.setattr(fitting, "largest", lambda needs, room, most: min(2, most) if needs(min(2, most)) else 0)

    def run(name: str, **settings: object) -> None:
        schedule = dataclasses.replace(config.schedule, epochs=2, **settings)
        pretrain(dataclasses.replace(config, out=tmp_path / name, schedule=schedule))

    run("auto", batch_size=batch_size, accumulate=accumulate)
    said = capsys.readouterr().out
    size, parts = chosen
    assert f"batch of {size} images in {parts} part{'s' * (parts > 1)}: a device takes 2 images at once, in " in said
    run("numbers", batch_size=size, accumulate=parts)
    assert_same_weights(weights(tmp_path / "auto"), weights(tmp_path / "numbers"))
