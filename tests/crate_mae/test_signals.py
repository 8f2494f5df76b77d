"""Runs with worker processes, as batch systems, terminals and the kernel end them or parts of them."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_runs import metric_lines, saved_steps

ROOT = Path(__file__).resolve().parents[2]
FAULTS = int(os.environ.get("CRATE_MAE_FAULTS", "20"))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs POSIX signals, and finds workers in /proc")


class Run:
    """`crate-mae pretrain` in a session of its own, with two worker processes."""

    def __init__(self, config: Path, *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "crate_mae",
            "pretrain",
            f"--config={config}",
            "--images.num_workers=2",
            *options,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )

    def to_all(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr once it has ended, which takes it no minute."""
        said, complained = self.process.communicate(timeout=60)
        return self.process.returncode, said, complained


@pytest.fixture
def started(config, tmp_path) -> Iterator[Callable[..., Run]]:
    """Starts runs of 4000 steps, each with a row in metrics.jsonl, or as options say; none is left in the end."""
    file, runs = tmp_path / "settings.json", []
    file.write_text(json.dumps(config.to_dict()))

    def start(*options: str) -> Run:
        runs.append(Run(file, "--schedule.epochs=1000", "--run.save_every=40", "--run.log_every=1", *options))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.to_all(signal.SIGKILL)
            run.process.communicate()


def wait_for(step: int, run: Run, out: Path) -> None:
    """Until that step has its row."""
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < step:
        assert run.process.poll() is None, run.end()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_saved_and_said(run: Run, number: int, out: Path) -> None:
    code, said, complained = run.end()
    assert code == 128 + number, (code, said, complained)
    notice, last = complained.strip().splitlines()
    assert notice.startswith("stopping after this step")
    step = re.fullmatch(
        rf"crate-mae: stopped at step (\d+) of 4000, saved in {re.escape(str(out))}; --resume goes on", last
    )
    assert step and max(saved_steps(out)) == int(step[1])
    assert [row["step"] for row in metric_lines(out) if "loss" in row] == [*range(1, int(step[1]) + 1)]


@pytest.mark.parametrize(
    "number, seed",
    [*((signal.SIGTERM, seed) for seed in range(max(2, FAULTS // 10))), (signal.SIGHUP, 0)],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else str(value),
)
def test_a_signal_to_the_whole_group_saves_the_step(number, seed, started, config):
    run = started()
    wait_for(random.Random(seed).randint(1, 200), run, config.out)
    run.to_all(number)
    assert_saved_and_said(run, number, config.out)


@pytest.mark.parametrize("pause", [0.02, *[1] * max(1, FAULTS // 40)])  # while it saves, and later
def test_slurms_warning_and_its_signal_afterwards_count_as_one(pause, started, config):
    run = started()
    wait_for(20, run, config.out)
    run.to_all(signal.SIGUSR1)
    time.sleep(pause)
    if run.process.poll() is None:
        run.to_all(signal.SIGTERM)
    assert_saved_and_said(run, signal.SIGUSR1, config.out)


def test_a_signal_that_is_ignored_stays_ignored(started, config):
    """As SIGHUP is by nohup, and SIGINT by shells for what they start in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = started("--schedule.epochs=25")
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(20, run, config.out)
    run.to_all(signal.SIGHUP)
    code, _, complained = run.end()
    assert (code, complained) == (0, "")


def test_a_killed_worker_is_replaced(started, config):
    run = started("--schedule.epochs=25")
    wait_for(20, run, config.out)
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    code, said, complained = run.end()
    assert code == 0 and complained == "", (code, said, complained)
    assert len(re.findall("^a process that loads images was lost .* started again$", said, re.MULTILINE)) == 1
    assert [row["step"] for row in metric_lines(config.out) if "loss" in row] == [*range(1, 101)]


def test_a_folder_has_one_run_at_a_time(started, config):
    first = started()
    wait_for(1, first, config.out)
    code, said, complained = started("--overwrite").end()
    assert code == 2 and said == ""
    assert complained.count("\n") == 1
    assert f"process {first.process.pid} on {socket.gethostname()}" in complained
    first.process.kill()  # and no worker of it
    first.process.wait()
    code, said, complained = started("--overwrite", "--schedule.epochs=2").end()
    assert code == 0, complained
    assert (config.out / "states/step_8.pt").exists()


@pytest.mark.parametrize("streams", ["0<&- 1>&- 2>&-", "| true"])
def test_a_run_goes_on_without_anybody_who_reads(streams, config, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(config.to_dict()))
    command = f'"{sys.executable}" -m crate_mae pretrain --config="{file}" {streams}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert saved_steps(config.out)[0] == 12
    assert (config.out / "reconstructions.png").exists()
