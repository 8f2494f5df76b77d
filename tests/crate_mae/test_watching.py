"""What a run tells of itself while it goes: its pace, callbacks, sinks, gradients by part, a profile; and its plan before it."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import ForkedRanks
from sink_readers import accumulated, just, no_account, read  # noqa: F401
from tiny_runs import TINY, assert_same_weights, metric_lines, tiny_config, weights, with_run, write_photographs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import crate_mae
from crate_mae import ClassifierConfig, finetuning
from crate_mae.cli import main
from crate_mae.data import PretrainImages
from crate_mae.flops import least_flops
from crate_mae.model import CrateMAE
from crate_mae.training import PretrainConfig, RunStopped, pace, plan, pretrain
from crate_mae.training.counting import LiveBytes
from crate_mae.training.pace import OF_THE_MACHINE, Pace


class TestFlops:
    def test_least_work_of_a_step(self):
        """About 20 GFLOP forward and 61 GFLOP in all, an image of CRATE-MAE-Base."""
        config = crate_mae.create_model("crate_mae_tiny").config
        config = dataclasses.replace(config, embed_dim=768, num_heads=12, decoder_num_heads=12)
        assert least_flops(config, 1000) / 1000 == pytest.approx(61e9, rel=0.02)

    @pytest.mark.parametrize(("name", "gflop"), [("crate_base", 30.6), ("crate_alpha_base", 156)])
    def test_least_work_of_a_supervised_step(self, name, gflop):
        """12 layers of 197 tokens, each 3 * 2 * 197 * (2 + 1 or 2 + 16) * 768**2 and 7 * 2 * 197**2 * 768; and the embedding."""
        config = crate_mae.CLASSIFIERS[name]
        assert least_flops(config, 1000) / 1000 / 1e9 == pytest.approx(gflop, rel=0.005)

    @pytest.mark.parametrize("mask_ratio", [0.25, 0.75])
    def test_they_are_those_that_pytorch_counts(self, mask_ratio):
        model = crate_mae.create_model(
            "crate_mae_tiny", img_size=64, patch_size=8, embed_dim=64, num_heads=2, decoder_num_heads=2
        )
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(16, 3, 64, 64), mask_ratio=mask_ratio).loss.backward()
        least = least_flops(model.config, 16, mask_ratio=mask_ratio)
        assert least == pytest.approx(counter.get_total_flops(), rel=0.08)  # composed, some products are taken again


class TestPace:
    def test_flops_of_a_counted_loop_of_products(self, monkeypatch):
        side, images, steps = 512, 4, 40
        left, right = torch.randn(2, side, side).unbind()
        now = [100.0]
        monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
        found = Pace(steps * 2 * side**3 / images, torch.device("cpu"), total_steps=10)
        found.begin(0, product_rate=1e12)
        began = time.monotonic()
        for _ in range(steps):
            torch.mm(left, right)
        seconds = time.monotonic() - began
        now[0] += seconds
        row = found.row(1, images / seconds)
        assert row["flops_per_second"] == pytest.approx(steps * 2 * side**3 / seconds)
        assert row["product_share"] == pytest.approx(row["flops_per_second"] / 1e12)
        assert row["hours"] * 3600 == pytest.approx(seconds)
        assert row["hours_left"] == pytest.approx(9 * row["hours"])

    def test_the_rate_is_that_of_a_product(self, monkeypatch):
        """Of turns of 5 s (the first, in which libraries are loaded), 2, 1, 2, 2, 2 s the best."""
        ticks = itertools.accumulate(itertools.chain(*zip([0.0] * 6, [5.0, 2.0, 1.0, 2.0, 2.0, 2.0], strict=True)))
        monkeypatch.setattr(pace.time, "perf_counter", lambda: next(ticks))
        monkeypatch.setattr(pace, "_measured_rate", pace._measured_rate.__wrapped__)  # what was measured before is kept
        asked = []
        monkeypatch.setattr(torch, "mm", lambda left, right: asked.append((left.shape, right.shape)))
        rate = pace.product_rate(torch.device("cpu"), "float32")
        (rows, inner), (_, columns) = asked[0]
        assert len(asked) == 6 and rate == 2 * rows * inner * columns / 1.0

    def test_the_share_of_waiting_is_that_of_a_slow_loader(self, config, monkeypatch):
        """Against the clock of the loader itself and of a callback; within 5 points."""
        waited, when = [0.0], []
        of_loader, of_model = PretrainImages.batch, CrateMAE.forward

        def slowly(self, *arguments):
            began = time.perf_counter()
            time.sleep(0.06)
            batch = of_loader(self, *arguments)
            waited[0] += time.perf_counter() - began
            return batch

        def forward(self, *arguments, **settings):
            time.sleep(0.04 * self.training)
            return of_model(self, *arguments, **settings)

        monkeypatch.setattr(PretrainImages, "batch", slowly)
        monkeypatch.setattr(CrateMAE, "forward", forward)
        config = dataclasses.replace(config, val=None, images=dataclasses.replace(config.images, val_fraction=0.0))
        pretrain(
            with_run(config, log_every=4, save_every=100),
            callbacks=[lambda step, metrics, model: when.append((time.perf_counter(), waited[0]))],
        )
        rows = metric_lines(config.out)
        assert len(rows) == len(when) == 3
        for row, (before, waited_before), (now, waited_now) in zip(rows[1:], when, when[1:], strict=False):
            truth = (waited_now - waited_before) / (now - before)
            assert 0.3 < truth < 0.7
            assert row["waiting"] == pytest.approx(truth, abs=0.05)

    def test_hours_go_on_where_a_run_is_resumed(self, config):
        pretrain(config)
        before = metric_lines(config.out)[-2]["hours"]
        longer = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, epochs=4))
        pretrain(longer, resume=True)
        hours = [row["hours"] for row in metric_lines(config.out) if "hours" in row]
        assert hours == sorted(hours) and before < hours[6] < 2 * before + 10 / 3600
        assert metric_lines(config.out)[-2]["hours_left"] == 0


class TestStarts:
    def test_each_start_has_a_line(self, config):
        pretrain(config)
        pretrain(with_run(config, log_every=1), resume=True)  # nothing was left to do, and it was no start
        optimizer = dataclasses.replace(config.optimizer, base_lr=0.1)
        schedule = dataclasses.replace(config.schedule, epochs=4)
        pretrain(dataclasses.replace(config, optimizer=optimizer, schedule=schedule), resume=True)
        first, second = map(json.loads, (config.out / "starts.jsonl").read_text().splitlines())
        assert (first["step"], first["changed"]) == (0, "")
        assert (second["step"], second["changed"]) == (12, "optimizer.base_lr 0.2 -> 0.1, schedule.epochs 3 -> 4")
        assert first["when"] <= second["when"] and first["torch"] == torch.__version__


class TestCallbacks:
    def test_they_see_step_metrics_and_model(self, config):
        config = with_run(config, norms_every=3, analyze_every=3)
        seen, models = [], set()

        def look(step: int, metrics: dict, model: nn.Module) -> None:
            seen.append((step, dict(metrics)))
            models.add(type(model))
            metrics["loss"] = 7  # a copy

        pretrain(config, callbacks=[look])
        assert models == {CrateMAE}
        assert [row for _, row in seen] == metric_lines(config.out)
        assert all(step == row["step"] for step, row in seen)

    def test_a_run_is_the_same_with_them(self, config, tmp_path):
        def meddle(step: int, metrics: dict, model: nn.Module) -> None:
            torch.randn(3)
            model.eval()

        optimizer = dataclasses.replace(config.optimizer, average=0.9)
        config = dataclasses.replace(config, optimizer=optimizer)
        pretrain(config, callbacks=[meddle, meddle])
        other = dataclasses.replace(config, out=tmp_path / "other")
        pretrain(other)
        assert_same_weights(weights(config.out), weights(other.out))
        had, has = (
            [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in metric_lines(out)]
            for out in (config.out, other.out)
        )
        assert had == has

    def test_they_see_the_weights_that_would_be_exported(self, config):
        optimizer = dataclasses.replace(config.optimizer, average=0.9)
        last = {}

        def keep(step: int, metrics: dict, model: nn.Module) -> None:
            last.update({name: value.clone() for name, value in model.state_dict().items()})

        pretrain(dataclasses.replace(config, optimizer=optimizer), callbacks=[keep])
        exported = crate_mae.load_model(config.out).state_dict()
        assert all(torch.equal(last[name], value) for name, value in exported.items())

    def test_one_that_returns_true_ends_the_run_in_order(self, config, tmp_path):
        found = pretrain(config, callbacks=[lambda step, metrics, model: step == 6, lambda *others: 1])
        assert found.steps == 6 and (config.out / "states" / "step_6.pt").exists()
        pretrain(config, resume=True)
        other = dataclasses.replace(config, out=tmp_path / "other")
        pretrain(other)
        assert_same_weights(weights(config.out), weights(other.out))

    def test_what_one_raises_ends_the_run(self, config):
        def enough(step: int, metrics: dict, model: nn.Module) -> None:
            if step == 6:
                raise StopIteration("enough")

        with pytest.raises(StopIteration, match="enough"):
            pretrain(config, callbacks=[enough])
        assert (config.out / "states" / "step_6.pt").exists()
        with pytest.raises(TypeError, match="callbacks: expected functions"):
            pretrain(config, resume=True, callbacks=[3])

    def test_of_several_processes_the_first_calls_them(self, config, tmp_path):
        ended = ForkedRanks(2, _Called(config, tmp_path / "called"), tmp_path / "printed").end()
        assert ended.statuses == [0, 0], ended.printed
        called = [json.loads(line) for line in (tmp_path / "called").read_text().splitlines()]
        assert [(rank, step) for rank, step, _ in called] == [(0, row["step"]) for row in metric_lines(config.out)]
        assert called[-1][2] == pytest.approx(_norm_of(crate_mae.load_model(config.out)))


@dataclasses.dataclass(frozen=True)
class _Called:
    """A rank of a run with a callback; by its class it is found in a process of its own."""

    config: PretrainConfig
    file: Path

    def __call__(self) -> None:
        import os

        def note(step: int, metrics: dict, model: nn.Module) -> None:
            with self.file.open("a") as file:
                file.write(json.dumps([int(os.environ["RANK"]), step, _norm_of(model)]) + "\n")

        pretrain(with_run(self.config, parallel="fsdp2"), callbacks=[note])


def _norm_of(model: nn.Module) -> float:
    return float(sum(weight.detach().double().square().sum() for weight in model.parameters()))


class TestGradNorms:
    def test_their_squares_add_up_to_that_of_the_whole(self, config):
        config = with_run(config, log_every=1, norms_every=4)
        pretrain(config)
        rows = metric_lines(config.out)
        whole = {row["step"]: row["grad_norm"] for row in rows if "grad_norm" in row}
        norms = {row["step"]: row["grad_norms"] for row in rows if "grad_norms" in row}
        assert list(norms) == [4, 8, 12]
        for step, of_parts in norms.items():
            assert math.hypot(*of_parts.values()) == pytest.approx(whole[step], rel=1e-5)
        assert set(norms[4]) == {
            *("cls_token", "mask_token", "patch_embed", "blocks.0.layers.0.0", "blocks.0.layers.0.1", "norm"),
            *("decoder_blocks.0.layers.0.0", "decoder_blocks.0.layers.0.1", "decoder_norm", "decoder_pred"),
        }

    def test_one_that_is_not_finite_ends_the_run_as_ever(self, config, monkeypatch):
        def broken(self, *arguments, of_model=CrateMAE.forward, **settings):
            output = of_model(self, *arguments, **settings)
            return output._replace(loss=output.loss * math.nan) if self.training else output

        monkeypatch.setattr(CrateMAE, "forward", broken)
        with pytest.raises(crate_mae.training.NonFiniteLoss, match="step 1: loss nan"):
            pretrain(with_run(config, norms_every=1))


class TestProfile:
    def test_it_has_the_steps_asked_for(self, config, capsys):
        pretrain(with_run(config, profile=2))
        trace = json.loads(gzip.decompress((config.out / "profile" / "trace.json.gz").read_bytes()))
        steps = {event["name"] for event in trace["traceEvents"] if str(event.get("name")).startswith("ProfilerStep#")}
        assert steps == {"ProfilerStep#3", "ProfilerStep#4"}
        assert "aten::mm" in (config.out / "profile" / "operations.txt").read_text()
        assert "profiled 2 steps" in capsys.readouterr().out
        pretrain(config, overwrite=True)
        assert not (config.out / "profile").exists()

    def test_a_run_too_short_for_it_says_so(self, config, capsys):
        pretrain(with_run(config, profile=50))
        said = "run.profile: no profile of 50 steps, for which 53 must be left to take, and 12 are"
        assert said in capsys.readouterr().out
        assert not (config.out / "profile").exists()


class TestSinks:
    def test_a_run_by_the_command_has_every_scalar_in_all_of_them(self, tmp_path, capsys):
        """Stopped and resumed on the way."""
        config = tiny_config(tmp_path / "run", write_photographs(tmp_path / "photographs"))
        config = with_run(config, log_to=("csv", "tensorboard"), norms_every=3, analyze_every=2)

        def stop(step: int, metrics: dict, model: nn.Module) -> None:
            if step == 6:
                raise RunStopped("stopped", 2)

        with pytest.raises(RunStopped):
            pretrain(config, callbacks=[stop])
        names = ["csv", "tensorboard", "wandb", "mlflow"]
        assert main(["pretrain", f"--out={config.out}", "--resume", "--run.log_to", *names]) == 0
        for name in names:
            assert read(config.out, name) == just(metric_lines(config.out)), name
        assert [image.step for image in accumulated(config.out).Images("reconstructions")][-1] == 12
        capsys.readouterr()

    def test_one_that_was_left_out_for_a_while_has_all_rows(self, config):
        for epochs, names in ((2, ("csv",)), (3, ()), (4, ("csv",))):
            schedule = dataclasses.replace(config.schedule, epochs=epochs)
            pretrain(dataclasses.replace(with_run(config, log_to=names), schedule=schedule), resume=epochs > 2)
        assert read(config.out, "csv") == just(metric_lines(config.out))

    def test_what_no_run_made_is_left_alone(self, config):
        mine = config.out / "tensorboard" / "mine"
        mine.parent.mkdir(parents=True)
        mine.touch()
        pretrain(with_run(config, log_to=("csv",)))
        for settings in (dict(resume=True), dict(overwrite=True)):
            with pytest.raises(
                ValueError, match=r"run\.log_to: .*tensorboard is there already, and is not of a run in this"
            ):
                pretrain(with_run(config, log_to=("tensorboard",)), **settings)
        assert metric_lines(config.out)
        pretrain(config, overwrite=True)
        assert mine.exists() and not (config.out / "metrics.csv").exists()

    def test_overwriting_clears_them(self, config):
        pretrain(with_run(config, log_to=("csv", "tensorboard")))
        pretrain(config, overwrite=True)
        assert not {"metrics.csv", "tensorboard", "sinks.json"} & {path.name for path in config.out.iterdir()}

    def test_one_that_there_is_not_costs_no_run(self, config, monkeypatch):
        pretrain(config)
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ImportError, match=r"run\.log_to: wandb needs a library.*crate-kernels\[wandb\]"):
            pretrain(with_run(config, log_to=("wandb",)), overwrite=True)
        assert metric_lines(config.out)
        with pytest.raises(
            ValueError, match=r"run\.log_to: expected some of csv, tensorboard, wandb, mlflow, each once"
        ):
            with_run(config, log_to=("csv", "csv"))


class TestPlanning:
    def test_live_bytes_are_those_of_the_tensors_there_are(self):
        with LiveBytes() as live:
            first = torch.zeros(1000)
            view = first.view(10, 100)[2:]
            second = first + 1
            assert live.now == live.most == 8000
            del first
            assert live.now == 8000  # the view holds it
            del view
            assert live.now == 4000
            third = second.double()
            assert live.now == 12000 == live.most
            del second, third
        assert live.now == 0 and live.most == 12000

    def test_nothing_is_written_and_a_run_is_as_without_it(self, config, tmp_path):
        found = plan(config)
        assert not config.out.exists()
        assert (found.steps, found.steps_per_epoch, found.epochs) == (12, 4, 3)
        assert found.flops == least_flops(TINY, 3) and found.parameters == 19_168
        assert found.measured.steps > 0 and found.memory.peak > found.memory.counted > found.memory.weights
        pretrain(config)
        other = dataclasses.replace(config, out=tmp_path / "other")
        pretrain(other)
        assert_same_weights(weights(config.out), weights(other.out))
        named = {path for path, _, _ in found.files}
        written = {path for path in config.out.iterdir() if path.name != ".lock"}
        assert named == written

    def test_the_command_says_it(self, config, capsys, tmp_path):
        pretrain(config)
        assert (
            main(["pretrain", f"--config={config.out / 'config.json'}", f"--out={tmp_path / 'new'}", "--dry-run"]) == 0
        )
        printed = capsys.readouterr().out
        assert (
            "19,168 parameters" in printed
            and "an epoch of 4 steps" in printed
            and "Nothing has been written." in printed
        )
        assert not (tmp_path / "new").exists()
        assert main(["pretrain", f"--config={config.out / 'config.json'}", "--dry-run"]) == 2
        assert "holds a run already" in capsys.readouterr().err

    def test_of_a_finished_run_nothing_is_left(self, config):
        pretrain(config)
        before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
        found = plan(config, resume=True)
        assert (found.steps, found.measured.steps) == (0, 0) and "nothing left to do: all 3 epochs are done" in str(
            found
        )
        assert plan(config, overwrite=True).steps == 12
        assert before == {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}

    @pytest.mark.parametrize("family", ["crate", "crate_alpha", "crate_mae"])
    def test_of_a_fine_tuning(self, family, tmp_path):
        model = ClassifierConfig(family=family, img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
        found = finetuning.plan(
            finetuning.FinetuneConfig(
                out=tmp_path / "run",
                model=model,
                schedule=finetuning.FinetuneScheduleConfig(epochs=2, warmup_epochs=1, batch_size=100),
                run=finetuning.FinetuneRunConfig(device="cpu", precision="float32", threads=1),
            )
        )
        assert found.steps == 10 and found.measured.steps > 0 and found.memory.kept > 0
        assert not list(tmp_path.iterdir())

    def test_what_does_not_fit_is_counted_and_not_tried(self, config, monkeypatch):
        monkeypatch.setattr("crate_mae.training.planning.room", lambda *arguments: 1e5)
        found = plan(config)
        assert found.measured.steps == 0 and found.memory.peak is None
        assert "not measured: what is counted does not fit the 97.7 KiB that there are" in str(found)

    def test_memory_is_that_of_the_run(self, tmp_path):
        """In processes of their own, whose memory is mostly that of the step."""
        command = [
            *(
                sys.executable,
                "-m",
                "crate_mae",
                "pretrain",
                "--data=synthetic:96,size=128x128",
                "--architecture=crate_mae_tiny",
            ),
            *("--model.img_size=128", "--schedule.batch_size=48", "--schedule.epochs=2", "--schedule.warmup_epochs=1"),
            *("--images.val_fraction=0", "--run.threads=1", "--run.device=cpu", "--run.precision=float32"),
            *(f"--out={tmp_path / 'run'}", "--run.log_every=1", "--model.depth=4", "--model.decoder_depth=1"),
        ]
        said = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True).stdout
        size, unit = said.partition("Memory")[2].split()[:2]
        planned = float(size) * {"MiB": 2**20, "GiB": 2**30}[unit]
        subprocess.run(command, capture_output=True, check=True)
        peak = metric_lines(tmp_path / "run")[-1]["memory_bytes"]
        assert peak > 700 * 2**20, "else it is the interpreter that is compared"
        assert planned == pytest.approx(peak, rel=0.1)
