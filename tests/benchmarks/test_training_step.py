"""The training-step benchmark runs, checks what it times, and writes complete rows. Speed is not asserted here."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
import types

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

import crate_mae
from benchmarks import command_line, harness, peers, records, training_step

OVERRIDES = ("img_size=32", "embed_dim=48", "depth=1", "num_heads=3", "decoder_depth=1", "decoder_num_heads=3")
TINY = ["--model", "crate_mae_tiny", "--set", *OVERRIDES, "--device", "cpu"]
SURROUNDINGS = ("device", "driver", "torch", "triton", "python", "threads", "commit", "dirty", "date")


@pytest.mark.parametrize("optimizer", [False, True])
def test_rows_are_complete(tmp_path, capsys, optimizer):
    results = tmp_path / "results.jsonl"
    arguments = [*TINY, "--batch", "1", "3", "--rounds", "2", "--json", str(results)]
    arguments += ["--providers", "reference", "composed"]  # compiling takes long
    training_step.main(arguments + ["--optimizer"] * optimizer)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    ceilings = [row for row in rows if row["operator"] == "ceilings"]
    assert [(row["dtype"], row["mode"]) for row in ceilings] == [
        (dtype, mode) for dtype in ("float32", "bfloat16") for mode in ("product", "copy")
    ]
    rows = [row for row in rows if row["operator"] == "training_step"]
    cases = [(row["dtype"], row["shape"][0], row["provider"]) for row in rows]
    dtypes, batches, providers = ("float32", "bfloat16"), (1, 3), ("reference", "composed")
    assert cases == [(dtype, batch, name) for dtype in dtypes for batch in batches for name in providers]
    for row in rows:
        assert row["shape"][1:] == [3, 32, 32]
        assert row["mode"] == ("forward+backward+adamw" if optimizer else "forward+backward")
        assert row["images_per_second"] > 0 and row["tflops"] > 0 and row["roofline_percent"] > 0
        assert math.isfinite(row["loss"])
        assert row["error"].keys() == {"loss", "gradient"}
        for name in ("ms", "ratio"):
            assert 0 < row[name]["p20"] <= row[name]["p50"] <= row[name]["p80"]
        assert all(name in row for name in SURROUNDINGS)
        assert row["torch"] == torch.__version__
    assert all(row["ratio"]["p50"] == 1 for row in rows if row["provider"] == "reference")

    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[:6] == ["operator", "model", "shape", "dtype", "mode", "provider"]
    assert len(printed) == 2 + len(rows) + len(ceilings)


def test_every_way_to_step_is_measured_or_absent(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(training_step, "_interpreting", lambda: False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    arguments = [*TINY, "--batch", "2", "--rounds", "1", "--dtype", "bfloat16", "--providers", *peers.STEPS]
    rows = {row["provider"]: row for row in training_step.main(arguments) if row["operator"] == "training_step"}
    assert rows.keys() == peers.STEPS.keys()
    reasons = {name: row["unavailable"] for name, row in rows.items() if "unavailable" in row}
    measured = {"reference", "composed", "composed 16bit", "composed recompute", "composed float32 recompute"}
    assert rows.keys() - reasons.keys() == measured
    for name, reason in reasons.items():
        word = {"vit-mae": "transformers", "triton": "CUDA"}.get(
            name.split()[0], "CUDA" if "graph" in name else "compiler"
        )
        assert word in reason and rows[name]["ms"] is None
    assert rows["vit-mae sdpa"]["model"] == "vit_mae_base"


def test_vit_mae_is_made_and_run_as_transformers_has_it(monkeypatch):
    class Model(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.scale = config, torch.nn.Parameter(torch.ones(()))

        @classmethod
        def _from_config(cls, config, attn_implementation):
            config._attn_implementation = attn_implementation
            return cls(config)

        def forward(self, pixel_values, noise=None):
            assert noise.shape == (pixel_values.shape[0], 4)
            return types.SimpleNamespace(loss=(self.scale * pixel_values).square().mean())

    config = {}
    fake = types.ModuleType("transformers")
    fake.ViTMAEConfig = lambda **given: types.SimpleNamespace(**config, **given)
    fake.ViTMAEForPreTraining = Model
    monkeypatch.setitem(sys.modules, "transformers", fake)
    rows = training_step.main(
        [*TINY, "--batch", "2", "--rounds", "1", "--dtype", "float32", "--providers", "reference", "vit-mae sdpa"]
    )
    (row,) = (row for row in rows if row["provider"] == "vit-mae sdpa")
    assert row["model"] == "vit_mae_base" and row["images_per_second"] > 0 and row["ratio"]["p50"] > 0
    assert row["tflops"] is None and row["error"] is None


def test_the_exact_step_in_chunks_is_the_step(monkeypatch):
    model = crate_mae.create_model("crate_mae_tiny", **dict(map(command_line._override, OVERRIDES)))
    batch = training_step.Batch.random(model.config, 5, torch.device("cpu"), torch.float32)
    whole = training_step.official(model, batch, torch.float32)
    monkeypatch.setattr(training_step, "EXACT_AT_A_TIME", 2)
    chunks = training_step.official(model, batch, torch.float32)
    for name in ("loss", "gradient"):
        torch.testing.assert_close(chunks[name], whole[name])


@pytest.mark.parametrize("name", ["crate_mae_tiny", "crate_tiny"])
def test_best_composed_is_the_model(name):
    overrides = OVERRIDES if name in crate_mae.MODELS else OVERRIDES[:4]  # no decoder
    model = crate_mae.create_model(name, **dict(map(command_line._override, overrides)))
    batch = training_step.Batch.random(model.config, 2, torch.device("cpu"), torch.float32)
    official = peers.forced("reference", peers.Official(model))(batch.images, batch.target)
    torch.testing.assert_close(peers.BestComposed(model)(batch.images, batch.target), official)


@pytest.mark.parametrize("name", ["crate_tiny", "crate_alpha_base"])
def test_supervised_models_take_steps_too(name):
    sizes = [*OVERRIDES[:4], "patch_size=16", "num_classes=7"]
    arguments = ["--model", name, "--set", *sizes, "--device", "cpu", "--optimizer", "--batch", "3", "--rounds", "1"]
    arguments += ["--dtype", "float32", "--providers", "reference", "composed", "vit-mae sdpa"]
    rows = {row["provider"]: row for row in training_step.main(arguments) if row["operator"] == "training_step"}
    assert "is no classifier" in rows["vit-mae sdpa"]["unavailable"]
    assert all(row["model"] == name for provider, row in rows.items() if provider != "vit-mae sdpa")
    assert rows["composed"]["error"]["gradient"] < 1e-3 and rows["composed"]["tflops"] > 0


def test_ours_that_disagrees_is_not_timed(monkeypatch):
    right = training_step.Stepper.outputs

    def wrong(self):
        found = right(self)
        return found if self.step.implementation == "reference" else {**found, "gradient": found["gradient"] * 1.1}

    monkeypatch.setattr(training_step.Stepper, "outputs", wrong)
    with pytest.raises(ValueError, match=r"composed: gradient is .* off"):
        training_step.main([*TINY, "--batch", "2", "--rounds", "1", "--dtype", "float32"])


def test_the_first_step_of_a_process(tmp_path):
    rows = training_step.main(
        [*TINY, "--batch", "2", "--dtype", "float32", "--first-step", "--providers", "composed", "vit-mae sdpa"]
    )
    found, absent = rows
    assert found["mode"] == "first step" and found["shape"] == [2, 3, 32, 32] and found["overrides"]["depth"] == 1
    assert found["ms"]["p50"] > 100, "a process cannot even import torch in less"
    if importlib.util.find_spec("transformers") is None:
        assert "transformers" in absent["unavailable"]


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


def test_a_compilers_error_is_told_by_its_cause():
    wrapped = TorchDynamoException("Observed exception. Hint: ...")
    wrapped.__cause__ = NotImplementedError("no backward\n on this device")
    assert records.in_one_line(wrapped) == "NotImplementedError: no backward on this device"
    assert records.in_one_line(ValueError()) == "ValueError"
