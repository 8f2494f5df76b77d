"""The memory benchmark counts what is saved and finds the largest batch. No device needed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import memory

TINY = ["--device", "cpu", "--model", "crate_mae_tiny", "--set", "depth=1", "decoder_depth=1", "--batch", "4"]


def test_saved_bytes_of_every_provider(tmp_path):
    file = tmp_path / "rows.jsonl"
    ours = ["composed", "composed recompute", "triton", "triton 16bit", "triton recompute"]
    names = ["reference", *ours, "best composed"]
    memory.main([*TINY, "--providers", *names, "--json", str(file)])
    rows = {row["provider"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert rows.keys() == set(names)
    assert "CUDA" in rows.pop("best composed")["unavailable"]
    for name in [name for name in rows if "unavailable" in rows[name]]:  # without Triton's interpreter
        assert name.startswith("triton") and "CUDA" in rows.pop(name)["unavailable"]
    for row in rows.values():
        assert row["mode"] == "saved for backward" and row["shape"] == [4, 3, 224, 224] and row["peak_bytes"] > 0
        ratio = rows["reference"]["peak_bytes"] / row["peak_bytes"]
        assert row["ratio"]["p20"] == row["ratio"]["p80"] == pytest.approx(ratio)
    assert rows["composed recompute"]["peak_bytes"] < rows["composed"]["peak_bytes"] < rows["reference"]["peak_bytes"]


def test_saved_bytes_of_layers(tmp_path):
    file = tmp_path / "rows.jsonl"
    memory.main([*TINY, "--layers", "--json", str(file)])
    rows = list(map(json.loads, file.read_text().splitlines()))
    assert {row["mode"] for row in rows} == {"saved by one encoder layer", "saved by one decoder layer"}
    for mode in memory.SAVED_BY.values():
        kept = {row["provider"]: row["peak_bytes"] for row in rows if row["mode"] == mode}
        assert kept["triton recompute"] < kept["triton 16bit"] < kept["triton"] < kept["reference"]
    assert all(row["shape"] == {"batch": 4, "tokens": 197, "width": 384} for row in rows)


def test_what_is_saved_is_counted_once():
    x = torch.randn(5, requires_grad=True)
    factor = torch.randn(5, requires_grad=True)
    with memory.counting_saved([factor]) as saved:
        y = (x * factor).exp()  # saves x and factor; then its result
        y = y * y  # saves that result again, twice
    assert saved.bytes(without=y) == 2 * 5 * 4


@pytest.mark.parametrize("limit", [0, 1, 5, 63, 64, 700, 1000])
@pytest.mark.parametrize("first", [1, 64, 512])
def test_the_largest_size_is_found(limit, first):
    tried = []

    def measure(size: int) -> int | None:
        tried.append(size)
        return size if size <= limit else None

    size, found = memory.largest(measure, first)
    assert len(tried) == len(set(tried)) < 25
    if limit == 0:
        assert (size, found) == (0, None)
    else:
        assert found == size and limit - max(1, limit // 64) < size <= limit


def test_the_search_ends_at_the_largest_allowed():
    size, _ = memory.largest(lambda size: size, 3, most=100)
    assert 98 < size <= 100


def test_only_a_lack_of_memory_ends_a_try(monkeypatch):
    model = torch.nn.Linear(1, 1)
    model.config = None
    monkeypatch.setattr(memory.Batch, "random", lambda *_: None)
    for problem, expected in (
        (torch.OutOfMemoryError("CUDA out of memory"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), None),
        (RuntimeError("CUDA error: out of memory"), None),
        (RuntimeError("Triton Error [CUDA]: out of memory"), None),
        (RuntimeError("an illegal memory access"), RuntimeError),
    ):

        def peak(*_: object, problem: Exception = problem) -> int:
            raise problem

        monkeypatch.setattr(memory, "peak", peak)
        if expected is None:
            assert memory.fits("reference", model, 1, torch.float32) is None
        else:
            with pytest.raises(expected):
                memory.fits("reference", model, 1, torch.float32)


def test_the_largest_batch_needs_a_device():
    with pytest.raises(SystemExit, match="CUDA"):
        memory.main([*TINY, "--largest"])
