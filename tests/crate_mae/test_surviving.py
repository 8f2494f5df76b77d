"""What a pre-training run outlives: lost files, other settings, divergence, signals, lost workers, a second run."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import (
    TINY,
    assert_same_weights,
    die_after,
    interrupt_after,
    metric_lines,
    saved_steps,
    visited,
    weights,
)
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from crate_mae import files
from crate_mae.data import ImageFolder, ImageLoader, LostWorkers, in_order
from crate_mae.model import CrateMAE, DecoderBlock
from crate_mae.training import NonFiniteLoss, PretrainConfig, RunStopped, pretrain, warmup_cosine
from crate_mae.training.divergence import DivergenceWatch
from crate_mae.training.interrupts import EndedAtOnce, StopRequest
from crate_mae.training.metrics import StepAverages
from crate_mae.training.ownership import LOCK, owned
from crate_mae.training.pace import OF_THE_MACHINE
from crate_mae.training.states import forget_states, saved_states
from crate_mae.training.validation import Validation, ValidationErrors


def change(config: PretrainConfig, **settings) -> PretrainConfig:
    """`optimizer__base_lr=1.0` for a setting in a section."""
    for name, value in settings.items():
        section, _, field = name.rpartition("__")
        if section:
            value = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section or field: value})
    return config


@pytest.fixture
def config(config: PretrainConfig) -> PretrainConfig:
    """A run that looks inside, too."""
    return change(config, run__analyze_every=2)


def rows(out: Path) -> list[dict]:
    """What is logged, without what the clock decides."""
    return [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in metric_lines(out)]


@pytest.fixture
def whole(config, tmp_path) -> Path:
    """The folder of the run that nothing happened to."""
    return pretrain(dataclasses.replace(config, out=tmp_path / "whole")).out


def assert_as_if_nothing_had_happened(out: Path, whole: Path) -> None:
    assert_same_weights(weights(out), weights(whole))
    assert rows(out) == rows(whole)
    assert saved_steps(out) == saved_steps(whole)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.parametrize("step", [0, 2, 4, 6])
def test_an_interruption_leaves_no_trace_in_what_is_logged(config, whole, monkeypatch, step):
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        with pytest.raises(RunStopped):
            pretrain(config)
    pretrain(config, resume=True)
    assert_as_if_nothing_had_happened(config.out, whole)


def test_a_validation_that_was_cut_short_is_done_again(config, whole, monkeypatch, capsys):
    unless, calls = Validation.unless, itertools.count()

    def interrupted(self, model, stopped):
        if next(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return unless(self, model, stopped)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "unless", interrupted)
        with pytest.raises(RunStopped, match="step 8 of 12"):
            pretrain(config)
    assert [row["step"] for row in rows(config.out) if "val_loss" in row] == [4]
    with (
        monkeypatch.context() as patch
    ):  # and again, after the row of the validation is there, and before the next save
        patch.setattr("crate_mae.training.record.write_state", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        patch.setattr("crate_mae.training.interrupts.STOPPING", [])
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, resume=True)
    assert [row["step"] for row in rows(config.out) if "val_loss" in row] == [4, 8]
    pretrain(config, resume=True)
    assert_as_if_nothing_had_happened(config.out, whole)


class TestStates:
    def test_the_last_the_best_and_those_of_some_epochs_stay(self, config):
        config = change(config, schedule__epochs=7, run__keep_states=2, run__keep_every=3, run__save_every=2)
        pretrain(config)
        validations = {row["step"]: row["val_loss"] for row in rows(config.out) if "val_loss" in row}
        assert list(validations) == [8, 12, 16, 24, 28]
        best = min(validations, key=validations.__getitem__)
        assert set(saved_steps(config.out)) == {28, 24, 12, best}

    def test_those_of_a_diverging_run_push_no_other_out(self, tmp_path):
        names = [
            "step_4",
            "step_8",
            "step_12",
            "step_16_diverging",
            "step_20_diverging",
            "step_24_diverging",
            "step_99",
        ]
        for name in names:
            (tmp_path / f"{name}.pt").touch()
        (tmp_path / "notes.txt").touch()
        forget_states(tmp_path, step=24, keep=2, best=4, is_kept=lambda step: False)
        kept = [state.path.stem for state in saved_states(tmp_path)]
        assert kept == ["step_24_diverging", "step_20_diverging", "step_12", "step_8", "step_4"]
        (tmp_path / "step_28.pt").touch()
        forget_states(tmp_path, step=28, keep=2, best=4, is_kept=lambda step: False)
        assert [state.path.stem for state in saved_states(tmp_path)] == ["step_28", "step_12", "step_4"]
        assert (tmp_path / "notes.txt").exists()

    def damage(self, path: Path, how: str) -> None:
        content = path.read_bytes()
        if how == "another model's":
            other = CrateMAE(dataclasses.replace(TINY, embed_dim=16))
            state = torch.load(path, weights_only=True)
            torch.save(state | {"model": other.state_dict()}, path)
        elif how == "lacks a part":
            state = torch.load(path, weights_only=True)
            del state["images"]
            torch.save(state, path)
        else:
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            zeros = content[:middle] + bytes(len(content) - middle)
            path.write_bytes(
                {"empty": b"", "cut": content[:middle], "a bit": flipped, "zeros": zeros, "text": b"hi"}[how]
            )

    @pytest.mark.parametrize("how", ["empty", "cut", "a bit", "zeros", "text", "another model's", "lacks a part"])
    def test_one_that_cannot_be_read_falls_back_to_the_one_before(self, config, whole, monkeypatch, capsys, how):
        with monkeypatch.context() as patch:
            die_after(patch, 9)
            with pytest.raises(MemoryError):
                pretrain(config)
        assert saved_steps(config.out) == [8, 4]
        newest = config.out / "states" / "step_8.pt"
        self.damage(newest, how)
        pretrain(config, resume=True)
        said = [line for line in capsys.readouterr().out.splitlines() if "cannot read" in line]
        assert len(said) == 1 and str(newest) in said[0] and "weights_only" not in said[0]
        assert_as_if_nothing_had_happened(config.out, whole)

    def test_one_that_cannot_be_read_pushes_no_other_out(self, config, monkeypatch):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 9)
            with pytest.raises(RunStopped):
                pretrain(config)
        assert saved_steps(config.out) == [10, 8]
        self.damage(config.out / "states" / "step_10.pt", "cut")
        pretrain(config, resume=True)
        assert saved_steps(config.out) == [12, 8]

    def test_where_none_can_be_read_each_is_named_in_a_line(self, config):
        pretrain(config)
        for state in saved_states(config.out / "states"):
            self.damage(state.path, "cut")
        with pytest.raises(ValueError, match=r"none of the states.*step_12\.pt.*step_8\.pt") as raised:
            pretrain(config, resume=True)
        assert "\n" not in str(raised.value) and "weights_only" not in str(raised.value)

    def test_a_run_goes_back_to_a_step_or_to_its_best(self, config, whole, capsys):
        pretrain(config)
        capsys.readouterr()
        with pytest.raises(FileNotFoundError, match="no state of step 5, but of 8, 12"):
            pretrain(config, resume=5)
        pretrain(config, resume=8)
        assert "from step 8" in capsys.readouterr().out
        assert_as_if_nothing_had_happened(config.out, whole)
        best = min((row for row in rows(config.out) if "val_loss" in row), key=lambda row: row["val_loss"])["step"]
        longer = change(config, schedule__epochs=4)
        assert pretrain(longer, resume="best").steps == 16
        assert f"from step {best}" in capsys.readouterr().out

    def test_what_came_later_is_gone_at_once_the_best_model_too(self, config, monkeypatch, capsys):
        config = change(config, run__keep_states=3)
        pretrain(config)
        validations = {row["step"]: row["val_loss"] for row in rows(config.out) if "val_loss" in row}
        assert min(validations, key=validations.__getitem__) == 12
        with monkeypatch.context() as patch:
            die_after(patch, 0)
            with pytest.raises(MemoryError):
                pretrain(change(config, schedule__epochs=4), resume=8)
        assert "forgot step_12.pt" in capsys.readouterr().out
        assert saved_steps(config.out) == [8, 4]
        assert metric_lines(config.out)[-1]["step"] == 8
        best = min((4, 8), key=validations.__getitem__)
        state = torch.load(config.out / "states" / f"step_{best}.pt", weights_only=True)
        assert_same_weights(weights(config.out / "best"), state["model"])

    def test_a_best_model_that_is_lost_is_written_again(self, config, whole):
        pretrain(config)
        (config.out / "best" / "model.safetensors").write_bytes(b"lost")
        pretrain(config, resume=True)
        assert_same_weights(weights(config.out / "best"), weights(whole / "best"))

    @pytest.mark.parametrize("resume", ["latest", None, 1.5])
    def test_what_is_no_state_to_resume_from_is_named(self, config, resume):
        with pytest.raises(ValueError, match="resume: expected True"):
            pretrain(config, resume=resume)

    def test_a_run_cannot_be_shorter_than_it_is(self, config):
        pretrain(config)
        with pytest.raises(ValueError, match=r"schedule\.epochs: the run .* has done 3, got 2"):
            pretrain(change(config, schedule__epochs=2), resume=True)

    def test_a_run_that_ends_where_it_was_stopped_is_validated(self, config, monkeypatch):
        longer = change(config, schedule__epochs=5, run__save_every=5)
        with monkeypatch.context() as patch:
            interrupt_after(patch, 7)
            with pytest.raises(RunStopped, match="step 8 of 20"):
                pretrain(longer)
        pretrain(change(longer, schedule__epochs=2), resume=True)
        assert [row["step"] for row in rows(config.out) if "val_loss" in row] == [8]
        assert json.loads((config.out / "config.json").read_text())["schedule"]["epochs"] == 2

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_what_killed_saves_left_is_removed(self, config, capsys, overwrite):
        pretrain(config)
        left = [config.out / f".{name}.partial" for name in ("model.safetensors", "metrics.jsonl", "config.json")]
        left += [config.out / "states" / ".step_12.pt.partial", config.out / "best" / ".model.safetensors.partial"]
        for path in left:
            path.write_bytes(bytes(1000))
        (config.out / ".mine").touch()
        pretrain(config, resume=not overwrite, overwrite=overwrite)
        assert not any(path.exists() for path in left)
        assert (config.out / ".mine").exists()
        assert overwrite or "states/.step_12.pt.partial" in capsys.readouterr().out

    def test_broken_rows_are_removed_and_said(self, config, whole, capsys):
        pretrain(config)
        log = config.out / "metrics.jsonl"
        lines = log.read_bytes().splitlines()
        for broken in (b'{"loss": 1.0}', b"[4]", bytes(20), b"\xff\xfe", b'{"step": "4"}', b'{"step": 12, "lo'):
            lines.insert(3, broken)
        log.write_bytes(b"\n".join(lines))
        pretrain(config, resume=True)
        assert "removed 6 broken lines of metrics.jsonl" in capsys.readouterr().out
        assert rows(config.out) == rows(whole)


def test_a_last_row_without_an_end_does_not_swallow_the_next(config, whole):
    pretrain(change(config, schedule__epochs=2))
    log = config.out / "metrics.jsonl"
    log.write_bytes(log.read_bytes().rstrip())
    pretrain(config, resume=True)
    assert [row["step"] for row in rows(config.out)] == [row["step"] for row in rows(whole)]


def test_settings_of_the_optimizer_are_those_given_at_the_resume(config, monkeypatch):
    pretrain(change(config, schedule__epochs=2))
    groups, step = [], torch.optim.AdamW.step

    def recorded(self, closure=None):
        groups.append([(group["lr"], group["betas"], group["weight_decay"]) for group in self.param_groups])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    given = {"optimizer__base_lr": 0.4, "optimizer__betas": (0.1, 0.2), "optimizer__weight_decay": 5.0}
    pretrain(change(config, **given), resume=True)
    assert len(groups) == 4
    schedule = {"peak": 0.4 * 3 / 256, "final": 0.0, "warmup_steps": 4, "total_steps": 12}
    assert [lr for [(lr, _, _), _] in groups] == [warmup_cosine(step, **schedule) for step in range(8, 12)]
    assert {(betas, decay) for [(_, betas, decay), _] in groups} == {((0.1, 0.2), 5.0)}
    assert {(betas, decay) for [_, (_, betas, decay)] in groups} == {((0.1, 0.2), 0.0)}


def test_a_state_holds_no_setting(config):
    """So that none can go over what is given at a resume."""
    pretrain(config)
    state = torch.load(config.out / "states" / "step_12.pt", weights_only=True)
    of_images = {"images", "image_count"}
    assert state.keys() == {"model", "optimizer", "step", "random", "meter", "watch", *of_images}
    assert {name for kept in state["optimizer"].values() for name in kept} == {"step", "exp_avg", "exp_avg_sq"}
    assert state["meter"].keys() == {"steps", "values"}


@pytest.mark.parametrize("name", ["data", "val_fraction"])
def test_other_images_are_refused_by_the_setting_that_chose_them(config, tmp_path, name):
    config = dataclasses.replace(config, val=None)
    pretrain(config)
    if name == "data":
        (tmp_path / "elsewhere").mkdir()
        for path in Path(config.data).iterdir():
            (tmp_path / "elsewhere" / f"other_{path.name}").write_bytes(path.read_bytes())
    other = {"data": {"data": tmp_path / "elsewhere"}, "val_fraction": {"images__val_fraction": 0.5}}[name]
    with pytest.raises(ValueError, match=rf"other images: .*{name} was .*, got "):
        pretrain(change(config, schedule__epochs=4, **other), resume=True)


class TestDivergence:
    def test_the_good_state_outlives_it_and_can_be_gone_back_to(self, config, capsys):
        config = change(config, schedule__epochs=4, optimizer__clip_grad=0.0, run__log_every=1)
        pretrain(config)
        best = min((row for row in rows(config.out) if "val_loss" in row), key=lambda row: row["val_loss"])
        longer = change(config, schedule__epochs=5)
        capsys.readouterr()
        pretrain(change(longer, optimizer__base_lr=1e4, schedule__warmup_epochs=0), resume=True)
        said = capsys.readouterr().out
        assert re.search(
            rf"diverging: loss .*of step {best['step']}, --resume best, with an --optimizer.base_lr below", said
        )
        assert "changed since it was started: optimizer.base_lr 0.2 -> 10000.0, schedule.epochs 4 -> 5" in said
        assert re.search(r"the run ended diverging: ", said)
        assert best["step"] in saved_steps(config.out)
        diverged = [row for row in rows(config.out) if row.get("diverging")]
        assert any("val_loss" in row for row in diverged) and any("loss" in row for row in diverged)
        assert any(state.diverging for state in saved_states(config.out / "states"))
        best_model = weights(config.out / "best")
        pretrain(longer, resume="best")
        assert not any(row.get("diverging") for row in rows(config.out))
        assert not any(state.diverging for state in saved_states(config.out / "states"))
        last = [row["val_loss"] for row in rows(config.out) if "val_loss" in row][-1]
        assert last < 2 * best["val_loss"]
        assert all(value.isfinite().all() for value in best_model.values())

    def averages(self, loss: float, grad_norm: float = 1.0) -> StepAverages:
        return StepAverages(loss, grad_norm, 1.0, 0.0)

    def test_learning_is_none(self):
        watch = DivergenceWatch()
        for step in range(1000):
            watch.read(self.averages(2.0 * 0.99**step + 0.3 * (step % 7 == 0), grad_norm=(step % 13 + 1) / 2))
            assert not watch.diverging

    @pytest.mark.parametrize("averages", [(11.0, 1.0), (1.0, 101.0)], ids=["loss", "gradient"])
    def test_a_jump_is_until_it_is_back(self, averages):
        watch = DivergenceWatch()
        watch.read(self.averages(1.0))
        for _ in range(100):
            watch.read(self.averages(*averages))
            assert watch.diverging
        watch.read(self.averages(2.0))
        assert not watch.diverging

    def test_a_validation_far_above_the_best_and_the_mean_fill_is_and_no_best(self):
        watch, errors = DivergenceWatch(), ValidationErrors(1.2, 1.0, 0.9, 4.0)
        assert watch.validated(1, errors) and not watch.diverging
        assert not watch.validated(2, errors._replace(val_loss=3.7)) and watch.diverging
        assert not watch.validated(3, errors._replace(val_loss=3.5)) and not watch.diverging
        assert watch.validated(4, errors._replace(val_loss=1.1)) and watch.best_step == 4
        # Images of almost one colour are filled with almost no error, however well a model learns.
        for fill in (0.008, 0.0):
            watch = DivergenceWatch()
            for step, error in enumerate((3.9, 3.1, 2.8)):
                assert (
                    watch.validated(step, errors._replace(val_loss=error, mean_fill_loss=fill)) and not watch.diverging
                )

    def test_the_best_starts_over_with_another_measure(self, config, capsys):
        pretrain(config)
        harder = change(config, schedule__epochs=5, schedule__mask_ratio=0.9)
        pretrain(harder, resume=True)
        assert "the best starts over" in capsys.readouterr().out
        validations = {row["step"]: row["val_loss"] for row in rows(config.out) if "val_loss" in row}
        best = min((16, 20), key=validations.__getitem__)
        state = torch.load(config.out / "states" / f"step_{best}.pt", weights_only=True)
        assert state["watch"]["best_step"] == best
        assert_same_weights(weights(config.out / "best"), state["model"])


class TestBreakdown:
    def poison_after(self, monkeypatch, step: int) -> None:
        """From the step after `step` on, the decoder's layers give NaN."""
        forward, model_forward, calls = DecoderBlock.forward, CrateMAE.forward, itertools.count()
        poisoned = []

        def counted(self, *args, **kwargs):
            if self.training and next(calls) == step:
                poisoned.append(True)
            return model_forward(self, *args, **kwargs)

        def poisonous(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            return output * math.nan if poisoned else output

        monkeypatch.setattr(CrateMAE, "forward", counted)
        monkeypatch.setattr(DecoderBlock, "forward", poisonous)

    def test_names_the_layer_the_images_and_the_state(self, config, monkeypatch):
        self.poison_after(monkeypatch, 6)
        config = change(config, run__log_every=100)
        with pytest.raises(NonFiniteLoss, match=r"step 7: loss nan.*output of decoder_blocks\.0.*step_4\.pt") as raised:
            pretrain(config)
        found = json.loads((config.out / "breakdown.json").read_text())
        batch = [str(path) for path in visited(config, 1)[6:9]]
        assert found["step"] == 7 and found["images"] == batch
        assert all(Path(path).name in str(raised.value) for path in batch)

    def test_what_the_second_pass_meets_does_not_hide_it(self, config, monkeypatch):
        self.poison_after(monkeypatch, 6)
        monkeypatch.setattr("crate_mae.training.breakdown.first_bad", lambda *_: {}["lost"])
        with pytest.raises(NonFiniteLoss, match=r"step 7: loss nan.*not found out \('lost'\).*step_4\.pt"):
            pretrain(config)

    def test_names_weights_that_went_bad(self, config, monkeypatch):
        step = torch.optim.AdamW.step

        def overflowing(self, closure=None):
            step(self, closure)
            self.param_groups[1]["params"][-1].data[0] = math.inf

        monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
        with pytest.raises(
            NonFiniteLoss, match=r"step 2: .*not finite first: weights of decoder_pred\.bias before the step"
        ):
            pretrain(config)
        once = change(config, run__save_minutes=1e-9)  # after each step
        with pytest.raises(NonFiniteLoss, match=r"step 1: weights of decoder_pred\.bias are not finite after it"):
            pretrain(once, overwrite=True)
        assert not saved_steps(config.out)

    def test_no_weight_changes_after_the_step_that_went_bad(self, config, monkeypatch):
        seen: list[torch.Tensor] = []
        step = torch.optim.AdamW.step

        def recorded(self, closure=None):
            step(self, closure)
            seen.append(torch.cat([p.detach().flatten() for group in self.param_groups for p in group["params"]]))

        monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
        self.poison_after(monkeypatch, 4)
        with pytest.raises(NonFiniteLoss, match="step 5"):
            pretrain(change(config, run__log_every=100))
        assert len(seen) == 8
        assert not torch.equal(seen[3], seen[2])
        assert all(torch.equal(later, seen[3]) for later in seen[4:])

    def test_is_no_longer_told_once_the_run_goes_on(self, config, monkeypatch):
        with monkeypatch.context() as patch:
            self.poison_after(patch, 6)
            with pytest.raises(NonFiniteLoss):
                pretrain(config)
        assert (config.out / "breakdown.json").exists()
        pretrain(config, resume=True)
        assert not (config.out / "breakdown.json").exists()


class TestSignals:
    @pytest.fixture
    def clock(self, monkeypatch) -> list[float]:
        now = [100.0]
        monkeypatch.setattr("crate_mae.training.interrupts.time.monotonic", lambda: now[0])
        return now

    def test_the_second_ends_it_at_once(self, clock):
        stop = StopRequest()
        assert not stop
        stop.take(signal.SIGTERM)
        assert stop and stop.signal == signal.SIGTERM
        clock[0] += 1
        with pytest.raises(EndedAtOnce) as raised:
            stop.take(signal.SIGINT)
        assert raised.value.signal == signal.SIGINT

    def test_the_second_ends_it_at_once_while_it_saves(self, config, monkeypatch):
        """torch makes errors of its own of what comes while it writes."""
        write, calls = files.os.write, itertools.count()

        def interrupted(descriptor, data):
            if next(calls) == 20:
                raise EndedAtOnce(signal.SIGTERM)
            return write(descriptor, data)

        monkeypatch.setattr(files.os, "write", interrupted)
        with pytest.raises(EndedAtOnce):
            pretrain(config)

    def test_what_comes_twice_at_once_is_one(self, clock):
        stop = StopRequest()
        stop.take(signal.SIGHUP)
        clock[0] += 0.01
        stop.take(signal.SIGHUP)
        assert stop.signal == signal.SIGHUP

    def test_a_warning_is_followed_by_a_first_signal(self, clock):
        stop = StopRequest()
        stop.take(signal.SIGUSR1)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            clock[0] += 60
            stop.take(number)
        assert stop.signal == signal.SIGUSR1
        clock[0] += 1
        with pytest.raises(EndedAtOnce):
            stop.take(signal.SIGTERM)


class TestOwner:
    def test_a_second_run_is_told_who_has_the_folder(self, config):
        with owned(config.out):
            with pytest.raises(
                BlockingIOError, match=rf"process {os.getpid()} on {socket.gethostname()}, writes to it"
            ):
                pretrain(config)
        assert not config.out.exists()
        pretrain(config)
        assert not (config.out / LOCK).exists()

    def test_children_do_not_inherit_it(self, tmp_path):
        """Workers outlive a run that is killed by some seconds."""
        waits = f"import os, sys, time; sys.path[:0] = [{str(Path.cwd())!r}]; from pathlib import Path; "
        waits += "from crate_mae.training.ownership import owned\nwith owned(Path(sys.argv[1])):\n"
        waits += " child = os.fork()\n if child: print(child, flush=True)\n time.sleep(60)\n"
        process = subprocess.Popen([sys.executable, "-c", waits, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        child = int(process.stdout.readline())
        try:
            with pytest.raises(BlockingIOError, match=f"process {process.pid} "), owned(tmp_path):
                pass
            process.kill()
            process.wait()
            with owned(tmp_path):
                os.kill(child, 0)  # it is still there
        finally:
            os.kill(child, signal.SIGKILL)
            process.stdout.close()

    def test_a_link_in_the_place_of_the_lock_is_not_followed(self, tmp_path):
        (tmp_path / "mine").write_text("words")
        (tmp_path / LOCK).symlink_to("mine")
        with pytest.raises(OSError, match=re.escape(LOCK)), owned(tmp_path):
            pass
        assert (tmp_path / "mine").read_text() == "words"

    @pytest.mark.parametrize("holder", ["alive", "dead", "own number", "elsewhere", "nonsense"])
    def test_without_locks_the_file_decides(self, tmp_path, monkeypatch, holder):
        monkeypatch.setattr("crate_mae.training.ownership.fcntl", None)
        gone = subprocess.Popen(["true"])
        gone.wait()
        pid = {"alive": os.getppid(), "own number": os.getpid()}.get(holder, gone.pid)
        host = "elsewhere" if holder == "elsewhere" else socket.gethostname()
        text = "[1" if holder == "nonsense" else json.dumps({"host": host, "pid": pid, "since": "today"})
        (tmp_path / LOCK).write_text(text)
        if holder in ("alive", "elsewhere"):
            with pytest.raises(BlockingIOError, match=f"process {pid} on {host}.*delete {LOCK}"), owned(tmp_path):
                pass
        else:
            with owned(tmp_path):
                assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


class Mortal(torch.utils.data.Dataset):
    """Numbers by key; the processes that load some of them die at it."""

    def __init__(self, graves: Path, deadly: set[int], *, always: bool) -> None:
        self.graves, self.deadly, self.always = graves, deadly, always

    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: int) -> torch.Tensor:
        grave = self.graves / str(key)
        if key in self.deadly and (self.always or not grave.exists()):
            grave.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(key)


class TestWorkers:
    @pytest.fixture(autouse=True)
    def soon_found(self, monkeypatch) -> None:
        monkeypatch.setattr(
            _MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.3,)
        )  # seconds, 5 otherwise

    def batches(self, dataset: Mortal) -> tuple[list[int], list[str]]:
        said: list[str] = []
        loader = ImageLoader(dataset, in_order(12, 2), num_workers=2, say=said.append)
        return [int(key) for batch in loader for key in batch], said

    def test_lost_ones_cost_no_batch(self, tmp_path):
        others = set(multiprocessing.active_children())
        keys, said = self.batches(Mortal(tmp_path, {0, 5, 11}, always=False))
        assert keys == list(range(12))
        assert 1 <= len(said) <= 3 and all("started again" in line and "\n" not in line for line in said)
        assert not set(multiprocessing.active_children()) - others

    def test_a_batch_that_kills_each_is_given_up(self, tmp_path):
        with pytest.raises(LostWorkers, match=r"3 times in a row.*--images\.num_workers"):
            self.batches(Mortal(tmp_path, {7}, always=True))

    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("error", [RuntimeError("sizes"), FileNotFoundError("gone"), KeyError("name")], ids=repr)
    def test_what_images_raise_is_no_loss(self, num_workers, error):
        class Failing(Mortal):
            def __getitem__(self, key):
                raise error

        said = []
        loader = ImageLoader(
            Failing(Path(), set(), always=False), in_order(12, 2), num_workers=num_workers, say=said.append
        )
        with pytest.raises(type(error), match=re.escape(str(error))):
            next(iter(loader))
        assert not said

    def test_a_run_that_loses_them_all_is_saved(self, config, whole, monkeypatch):
        config = change(config, images__num_workers=1, images__cache_mb=0)
        image, main = ImageFolder.image, os.getpid()
        deadly = str(visited(config, 1)[4])  # of the sixth step

        def mortal(self, index):
            if os.getpid() != main and self.name(index) == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            return image(self, index)

        with monkeypatch.context() as patch:
            patch.setattr(ImageFolder, "image", mortal)
            with pytest.raises(LostWorkers, match=r"step \d of 12 is saved"):
                pretrain(config)
        pretrain(config, resume=True)
        assert_as_if_nothing_had_happened(config.out, whole)


class TestTerminal:
    """That is gone, with whoever had opened it."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    def test_a_run_goes_on_without(self, config, whole, monkeypatch):
        monkeypatch.setattr("sys.stdout", self.Gone())
        pretrain(config)
        assert_as_if_nothing_had_happened(config.out, whole)

    def test_its_hangup_is_saved(self, config, monkeypatch):
        def gone(descriptor: int, text: bytes) -> int:
            raise OSError(errno.EIO, "Input/output error")

        interrupt_after(monkeypatch, 5, signal.SIGHUP)
        monkeypatch.setattr("sys.stdout", self.Gone())
        monkeypatch.setattr("crate_mae.training.interrupts.os", SimpleNamespace(write=gone))
        with pytest.raises(RunStopped, match="step 6 of 12") as raised:
            pretrain(config)
        assert raised.value.signal == signal.SIGHUP and saved_steps(config.out)[0] == 6
