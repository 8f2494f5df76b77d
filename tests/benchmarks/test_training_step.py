"""The training-step benchmark runs, checks what it times, and writes complete rows. Speed is not asserted here."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import harness, training_step

OVERRIDES = ("img_size=32", "embed_dim=48", "depth=1", "num_heads=3", "decoder_depth=1", "decoder_num_heads=3")
TINY = ["--model", "crate_mae_tiny", "--set", *OVERRIDES, "--device", "cpu"]
SURROUNDINGS = ("device", "driver", "torch", "triton", "python", "threads", "commit", "dirty", "date")


@pytest.mark.parametrize("optimizer", [False, True])
def test_rows_are_complete(tmp_path, capsys, optimizer):
    results = tmp_path / "results.jsonl"
    arguments = [*TINY, "--batch", "1", "3", "--rounds", "2", "--json", str(results)]
    training_step.main(arguments + ["--optimizer"] * optimizer)
    rows = [json.loads(line) for line in results.read_text().splitlines()]

    cases = [(row["dtype"], row["shape"][0], row["provider"]) for row in rows]
    dtypes, batches, providers = ("float32", "bfloat16"), (1, 3), ("reference", "composed")
    assert cases == [(dtype, batch, name) for dtype in dtypes for batch in batches for name in providers]
    for row in rows:
        assert row["shape"][1:] == [3, 32, 32]
        assert row["mode"] == ("forward+backward+adamw" if optimizer else "forward+backward")
        assert row["images_per_second"] > 0
        assert math.isfinite(row["loss"])
        assert row["error"].keys() == {"loss", "gradient"}
        for name in ("ms", "ratio"):
            assert 0 < row[name]["p20"] <= row[name]["p50"] <= row[name]["p80"]
        assert all(name in row for name in SURROUNDINGS)
        assert row["torch"] == torch.__version__
    assert all(row["ratio"]["p50"] == 1 for row in rows if row["provider"] == "reference")

    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[:4] == ["model", "batch", "dtype", "provider"]
    assert len(printed) == 2 + len(rows)


def test_an_unknown_override_is_named(capsys):
    with pytest.raises(SystemExit):
        training_step.main([*TINY, "--set", "depth"])
    assert "NAME=VALUE" in capsys.readouterr().err


def test_disagreement_is_caught_before_timing():
    truth, tolerances = {"loss": torch.tensor([1.0, 2.0])}, {"loss": 1e-3}
    right = {"loss": torch.tensor([1.0, 2.0001])}
    assert harness.check_agreement({"a": truth, "b": right}, truth, tolerances)["b"]["loss"] < 1e-3
    with pytest.raises(ValueError, match=r"b: loss is .* off"):
        harness.check_agreement({"a": truth, "b": {"loss": torch.tensor([1.0, 2.1])}}, truth, tolerances)
    with pytest.raises(ValueError, match="b: loss is not finite"):
        harness.check_agreement({"a": truth, "b": {"loss": torch.tensor([1.0, math.nan])}}, truth, tolerances)


def test_turns_are_interleaved():
    calls: list[str] = []
    providers = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = harness.time_interleaved(providers, torch.device("cpu"), rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(len(times[name]) == 3 for name in "abc")


def test_spread_of_a_sample():
    assert harness.Spread.of([4.0]) == harness.Spread(4.0, 4.0, 4.0)
    spread = harness.Spread.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert spread == harness.Spread(2.0, 3.5, 5.0)
