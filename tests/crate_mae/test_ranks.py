"""Runs of several ranks: on this CPU, most of them forked, and some as torchrun starts them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import bring_about
from ranks import (
    ENDS_WITHIN,
    Ended,
    ForkedRanks,
    attempt,
    cannot_read,
    leave_one_by_one,
    rows_of,
    under_torchrun,
    unnamed_tensors,
)
from support import error
from tiny_runs import assert_same_weights, saved_steps, tiny_config, uneven_config, weights, with_run, write_photographs

from crate_mae.cli import main
from crate_mae.training import OptimizerConfig, PretrainConfig, pretrain
from crate_mae.training.average import Average
from crate_mae.training.step import Step

ROOT = Path(__file__).resolve().parents[2]
MODES = ("ddp", "fsdp2")

ROUNDING = 16 * torch.finfo(torch.float32).eps
"""Relative, of a number in a row. The sum over a batch is the same terms in other groups, each a rounding or two of half an eps,
and the steps before shift it by as much again; one image that counted wrongly would shift it by a hundredth."""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="finds ranks in /proc, and forks processes with PyTorch"
)


class Torchrun:
    """The command under torchrun, on two ranks."""

    def __init__(self, config: PretrainConfig, *options: str) -> None:
        file = config.out.with_suffix(".json")
        file.write_text(json.dumps(config.to_dict()))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        self.process = subprocess.Popen(
            [*torchrun, "-m", "crate_mae", "pretrain", f"--config={file}", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,
        )

    def rank(self, number: int) -> int:
        """The process of a rank."""
        agent = self.process.pid
        for process in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
            if f"RANK={number}\0".encode() in b"\0" + Path(f"/proc/{process}/environ").read_bytes():
                return int(process)
        raise AssertionError(f"there is no rank {number}")

    def end(self, seconds: float = 90.0) -> tuple[int, str]:
        """Exit status, and what was printed, after at most so many seconds."""
        try:
            printed, _ = self.process.communicate(timeout=seconds)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode, printed


def wait_for_state(step: int, out: Path) -> None:
    until = time.monotonic() + 90
    while step not in saved_steps(out):
        assert time.monotonic() < until
        time.sleep(0.002)


def forked(count: int, config: PretrainConfig, folder: Path, **how: Any) -> Ended:
    return ForkedRanks(count, partial(attempt, config, **how), folder / "printed").end()


def go_on(count: int, config: PretrainConfig, folder: Path, resume: bool | int = True) -> None:
    ended = forked(count, config, folder, resume=resume)
    assert ended.statuses == [0] * count, ended


def copied(config: PretrainConfig, folder: Path, **settings: Any) -> PretrainConfig:
    """The same run in another folder, to go on with other settings."""
    shutil.copytree(config.out, folder / "run")
    return with_run(config, out=folder / "run", **settings)


def assert_same_curve(found: Path, expected: Path, tolerance: float = ROUNDING) -> None:
    rows, wanted = rows_of(found), rows_of(expected)
    assert [row.keys() for row in rows] == [row.keys() for row in wanted]
    for row, truth in zip(rows, wanted, strict=True):
        assert row == pytest.approx(truth, rel=tolerance, abs=0)


def assert_same_bits(found: Path, expected: Path) -> None:
    assert rows_of(found) == rows_of(expected)
    for file in ("model.safetensors", "best/model.safetensors"):
        assert (found / file).read_bytes() == (expected / file).read_bytes(), file


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> PretrainConfig:
    """A run of one process."""
    config = uneven_config(tmp_path_factory.mktemp("alone"))
    pretrain(config)
    return config


@pytest.fixture(scope="module")
def by_torchrun(alone) -> Callable[[str], PretrainConfig]:
    """The same run under torchrun, of each mode once."""
    done = {}

    def run(mode: str) -> PretrainConfig:
        if mode not in done:
            done[mode] = with_run(alone, out=alone.out.with_name(mode), parallel=mode)
            status, printed = Torchrun(done[mode]).end()
            assert status == 0, printed
        return done[mode]

    return run


@pytest.mark.parametrize("mode", MODES)
class TestTorchrun:
    def test_the_curve_is_that_of_one_process(self, mode, alone, by_torchrun):
        assert_same_curve(by_torchrun(mode).out, alone.out)

    @pytest.mark.parametrize("count", [1, 4])
    def test_a_state_goes_on_with_other_ranks_in_the_other_mode(self, mode, count, alone, by_torchrun, tmp_path):
        config = copied(by_torchrun(mode), tmp_path, parallel=MODES[mode == "ddp"])
        if count == 1:
            pretrain(config, resume=8)
        else:
            go_on(count, config, tmp_path, resume=8)
        assert_same_curve(config.out, alone.out)


def test_kill_9_of_one_rank_ends_all_and_no_bit_is_lost(by_torchrun, tmp_path):
    expected = by_torchrun("ddp")
    config = with_run(expected, out=tmp_path / "run")
    run = Torchrun(config)
    wait_for_state(2, config.out)
    os.kill(run.rank(1), signal.SIGKILL)
    status, printed = run.end(ENDS_WITHIN)
    assert status == 1
    lines = [line for line in printed.splitlines() if line.startswith("crate-mae:")]
    assert len(lines) == 1 and lines[0].startswith("crate-mae: another process of the run was lost; "), printed
    go_on(2, config, tmp_path)
    assert_same_bits(config.out, expected.out)


def test_sigterm_to_torchrun_saves_and_no_bit_is_lost(by_torchrun, tmp_path):
    expected = by_torchrun("fsdp2")
    config = with_run(expected, out=tmp_path / "run")
    agent = ForkedRanks(1, partial(under_torchrun, config), tmp_path / "printed")
    wait_for_state(2, config.out)
    agent.signal(signal.SIGTERM)
    ended = agent.end()
    step = saved_steps(config.out)[0]
    assert ended.statuses == [1] and not ended.hung
    assert ended.printed.count(f"crate-mae: stopped at step {step} of 12, saved in {config.out}") == 1, ended
    go_on(2, config, tmp_path)
    assert_same_bits(config.out, expected.out)


def test_sigterm_to_one_rank_stops_all(by_torchrun, tmp_path):
    config = with_run(by_torchrun("ddp"), out=tmp_path / "run")
    ranks = ForkedRanks(2, partial(attempt, config, before=leave_one_by_one), tmp_path / "printed")
    wait_for_state(2, config.out)
    ranks.signal(signal.SIGTERM, 1)
    ended = ranks.end()
    assert ended.statuses == [128 + signal.SIGTERM] * 2, ended
    assert f"crate-mae: stopped at step {saved_steps(config.out)[0]} of 12" in ended.printed
    go_on(2, config, tmp_path)
    assert_same_bits(config.out, by_torchrun("ddp").out)


def test_an_error_of_one_rank_ends_all_with_its_message(config, tmp_path):
    ended = forked(2, config, tmp_path, before=partial(cannot_read, 1))
    assert not ended.hung and ended.statuses[1] == 2 and ended.statuses[0] != 0
    lines = [line for line in ended.printed.splitlines() if line.startswith("crate-mae:")]
    assert len(lines) == 1 and "on purpose" in lines[0] and lines[0].endswith("(rank 1)"), ended.printed
    assert "Traceback" not in ended.printed


class TestDamage:
    """To the last state of several ranks: the run goes on from the one before it, and ends as it had."""

    @staticmethod
    def flip_a_byte(tensors: Path) -> None:
        file = max(tensors.glob("*.distcp"))
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    @staticmethod
    def lose_the_list(tensors: Path) -> None:
        (tensors / ".metadata").unlink()

    @staticmethod
    def plant_code(tensors: Path) -> None:
        """What a list would run that Python's own reader reads; its checksum is right."""
        data = pickle.dumps(Evil(tensors.parents[2] / "ran"))
        (tensors / ".metadata").write_bytes(data)
        file = next(tensors.parent.glob("step_12.pt"))
        state = torch.load(file, weights_only=True)
        state["shards"]["files"][".metadata"] = [len(data), zlib.crc32(data)]
        torch.save(state, file)

    @pytest.mark.parametrize("damage", [flip_a_byte, lose_the_list, plant_code])
    def test_the_state_before_it_is_taken(self, damage, alone, by_torchrun, tmp_path, capsys):
        config = copied(by_torchrun("ddp"), tmp_path)
        [tensors] = (config.out / "states").glob("step_12-*")
        damage(tensors)
        pretrain(config, resume=True)
        printed = capsys.readouterr().out
        assert "step_12.pt" in printed and "going on from a state before it" in printed
        assert "from step 10 " in printed
        assert not (tmp_path / "ran").exists()
        assert_same_curve(config.out, alone.out)

    def test_what_a_killed_save_left_is_removed(self, by_torchrun, tmp_path, capsys):
        config = copied(by_torchrun("ddp"), tmp_path)
        rubbish = config.out / "states/step_7-0123abcd"
        rubbish.mkdir()
        (rubbish / "__0_0.distcp").write_bytes(b"half")
        pretrain(config, resume=True)
        assert "removed what was never finished: states/step_7-0123abcd" in capsys.readouterr().out
        assert not rubbish.exists() and not unnamed_tensors(config.out)


class Evil:
    """Makes a file when it is unpickled as Python does it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


class TestAccumulation:
    def test_4_times_16_are_64(self, tmp_path):
        config = tiny_config(tmp_path / "whole", write_photographs(tmp_path / "photographs", 64))
        schedule = replace(config.schedule, epochs=4, batch_size=64)
        whole = with_run(replace(config, schedule=schedule, optimizer=OptimizerConfig(base_lr=0.02)), log_every=1)
        parts = replace(whole, out=tmp_path / "parts", schedule=replace(schedule, accumulate=4))
        pretrain(whole)
        pretrain(parts)
        assert_same_curve(parts.out, whole.out, 1e-6)
        for name, expected in weights(whole.out).items():
            assert error(weights(parts.out)[name], expected) < 1e-6, name


@pytest.fixture(scope="module")
def averaged(alone, tmp_path_factory) -> tuple[PretrainConfig, list[dict[str, torch.Tensor]]]:
    """The run with an average, and the weights before its first step and after each."""
    config = replace(alone, out=tmp_path_factory.mktemp("averaged") / "run")
    config = replace(config, optimizer=replace(config.optimizer, average=0.5))
    recorded: list[dict[str, torch.Tensor]] = []

    def record(average: Average) -> None:
        recorded.append({name: value.double().clone() for name, value in average.parameters.items()})

    class Recording(Step):
        def __call__(self, *args: Any, **settings: Any) -> torch.Tensor:
            if not recorded:
                record(self.average)
            loss = super().__call__(*args, **settings)
            record(self.average)
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crate_mae.training.parts.Step", Recording)
        pretrain(config)
    return config, recorded


class TestAverage:
    """Of the weights, whose decay is as asked from the step on at which (1 + t) / (10 + t) has come to it, the 8th."""

    def test_is_what_is_exported(self, averaged):
        config, (expected, *after) = averaged
        for step, raw in enumerate(after, start=1):
            decay = min(0.5, (1 + step) / (10 + step))
            expected = {name: decay * value + (1 - decay) * raw[name] for name, value in expected.items()}
        exported = weights(config.out)
        assert len(after) == 12
        for name, value in expected.items():
            assert error(exported[name], value) < 4 * torch.finfo(torch.float32).eps, name
        assert error(exported["mask_token"], after[-1]["mask_token"]) > 1e-4

    def test_takes_no_part_in_training(self, averaged, alone):
        """Which validations would, if the raw weights did not come back to the bit."""
        config, _ = averaged
        raw, expected = (torch.load(run.out / "states/step_12.pt", weights_only=True) for run in (config, alone))
        assert_same_weights(raw["model"], expected["model"])
        trained = [row for row in rows_of(alone.out) if "loss" in row]
        assert [row for row in rows_of(config.out) if "loss" in row] == trained

    def test_is_the_same_of_two_ranks(self, averaged, tmp_path):
        expected, _ = averaged
        config = with_run(expected, out=tmp_path / "run", parallel="fsdp2")
        ended = forked(2, config, tmp_path)
        assert ended.statuses == [0, 0], ended
        assert_same_curve(config.out, expected.out)
        found = weights(config.out)
        for name, value in weights(expected.out).items():
            assert error(found[name], value) < ROUNDING, name


class TestFloat16:
    def test_the_curve_is_near_that_of_float32(self, alone, tmp_path):
        config = with_run(alone, out=tmp_path / "run", precision="float16")
        pretrain(config)
        rows = rows_of(config.out)
        assert {row["skipped"] for row in rows if "loss" in row} == {0}
        for row, truth in zip(rows, rows_of(alone.out), strict=True):
            for name in {"loss", "val_loss"} & truth.keys():
                assert row[name] == pytest.approx(truth[name], rel=4 * torch.finfo(torch.float16).eps)

    def test_an_overflow_skips_the_step_and_no_bit_is_lost(self, alone, tmp_path, monkeypatch):
        config = with_run(alone, out=tmp_path / "run", precision="float16")
        monkeypatch.setattr(torch.amp.GradScaler.__init__, "__defaults__", (2.0**23, 2.0, 0.5, 2000, True))
        pretrain(config)
        rows = [row for row in rows_of(config.out) if "loss" in row]
        scale = 2.0**23
        for row in rows:
            scale *= 0.5 ** row["skipped"]
            assert row["loss_scale"] == scale
        assert 2 < sum(row["skipped"] for row in rows) < 12
        monkeypatch.undo()
        again = copied(config, tmp_path / "again")
        pretrain(again, resume=2)
        assert_same_bits(again.out, config.out)


@pytest.mark.parametrize("command", ["demo", "analyze"])
def test_other_commands_are_refused_under_torchrun(command, monkeypatch, capsys):
    for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert main([command]) == 2
    assert f"crate-mae {command} is one process: start it without torchrun" in capsys.readouterr().err


def test_no_kill_costs_a_run_or_a_row(tmp_path):
    assert bring_about(tmp_path, int(os.environ.get("CRATE_MAE_KILLS", "3")), seed=0)
