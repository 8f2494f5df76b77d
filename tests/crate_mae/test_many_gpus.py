"""The commands of docs/many-gpus.md, each as it stands there, at toy size and on the CPU."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import metric_lines, tiny_config, write_photographs

from crate_mae.training import pretrain

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "many-gpus.md").read_text(encoding="utf-8")
ONE, EIGHT, TWO_MACHINES, SLURM = re.findall(r"```(?:bash)?\n(.*?)```", PAGE, flags=re.DOTALL)

PROGRAMS = {
    "crate-mae": f'exec {sys.executable} -m crate_mae "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    "scontrol": "echo localhost; echo another-machine",
    # As srun does with one task on each node: both tasks have the variables of the step.
    "srun": 'export SLURM_STEP_NUM_TASKS=2; "$@" & "$@"; first=$?; wait $! && exit $first',
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands are given: there are photographs, and the programs that they name."""
    write_photographs(tmp_path / "photos")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "machines[1-2]")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    return tmp_path


def toy(command: str, folder: Path, *, processes: int = 1, epochs: int = 1) -> str:
    """The command with a small model, batch and number of processes, none of which it may lack."""
    settings = tiny_config(folder / "unused", folder / "photos").to_dict()
    del settings["out"], settings["data"]
    settings["schedule"] |= {"epochs": epochs, "warmup_epochs": 0}
    (folder / "tiny.json").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for old, new in {
        "--architecture crate_mae_base": "--config tiny.json",
        "--schedule.batch_size 4096": "--schedule.batch_size 4",
        **({"--nproc_per_node 8": f"--nproc_per_node {processes}"} if "torchrun" in command else {}),
        **({":29500": f":{port}"} if "--nnodes" in command else {}),
        **({"first-machine": "localhost"} if "first-machine" in command else {}),
    }.items():
        assert old in command
        command = command.replace(old, new)
    return command


def said_by(script: str, folder: Path, times: int = 1) -> list[str]:
    """What is on the screen of each of so many terminals in which a script is run at the same time, and does its work."""
    started = [
        subprocess.Popen(
            ["bash", "-c", script], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(times)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * times, "\n".join(said)
    return said


def assert_trained(folder: Path, said: list[str], where: str, *, epochs: int = 1) -> None:
    """As so many processes should, and one of them has spoken."""
    lines = "".join(said).splitlines()
    opening = next(line for line in lines if line.startswith("pretrain: "))
    assert f"float32 on {where}, 3 steps" in opening
    assert sum(line.startswith(f"Results of {3 * epochs} steps are in ") for line in lines) == 1, lines
    assert metric_lines(folder / "runs/base")[-1]["step"] == 3 * epochs
    assert (folder / "runs/base/model.safetensors").exists()


def test_one_gpu(folder: Path) -> None:
    said = said_by(toy(ONE, folder), folder)
    assert_trained(folder, said, "cpu")
    assert "batch of 4 images in 1 part: " in said[0]


def test_eight_gpus(folder: Path) -> None:
    assert_trained(folder, said_by(toy(EIGHT, folder, processes=2), folder), "2 x cpu (ddp)")


def test_two_machines(folder: Path) -> None:
    assert_trained(folder, said_by(toy(TWO_MACHINES, folder), folder, times=2), "2 x cpu (ddp)")


def test_slurm(folder: Path) -> None:
    """The second job goes on with the run of the first, here one of a single process."""
    config = tiny_config(folder / "runs/base", folder / "photos")
    schedule = dict(batch_size=4, epochs=1, warmup_epochs=0)
    pretrain(type(config)(**vars(config) | {"schedule": type(config.schedule)(**vars(config.schedule) | schedule)}))
    said = said_by(toy(SLURM, folder, epochs=2), folder)
    assert_trained(folder, said, "2 x cpu (ddp)", epochs=2)
    assert "from step 3 (weights, optimizer, random numbers restored" in said[0]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_on_all_gpus_of_this_machine(folder: Path, mode: str) -> None:
    """By NCCL, with one process for each GPU: the curve of one process, within the rounding of sums in another order."""
    of_one, of_all = (toy(command, folder, processes=torch.cuda.device_count()) for command in (ONE, EIGHT))
    settings = " --run.device auto --optimizer.average 0.9 --run.parallel " + mode
    said_by(of_one.strip().replace("runs/base", "runs/one") + settings, folder)
    said_by(of_all.strip() + settings, folder)
    rows = [metric_lines(folder / "runs" / name) for name in ("one", "base")]
    for expected, found in zip(*rows, strict=True):
        for measure in {"loss", "grad_norm", "val_loss"} & expected.keys():
            assert found[measure] == pytest.approx(expected[measure], rel=1e-4)
