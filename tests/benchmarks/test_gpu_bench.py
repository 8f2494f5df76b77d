"""The unattended run asks for what the programs know, loses no row, and rehearses without a GPU."""

from __future__ import annotations

import json
import runpy
import sys

import pytest
import torch

from benchmarks import memory, training_step
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import bench, parts
from benchmarks.gpu.parts import RESULTS, Part
from benchmarks.kernels import __main__ as kernels

PROGRAMS = {"kernels": kernels, "memory": memory, "training_step": training_step}


@pytest.mark.parametrize(("device", "full"), [("cuda", False), ("cuda", True), ("cpu", False)])
def test_every_part_is_understood_by_its_program(device, full):
    found = bench.bench_parts(device, full)
    assert len({part.name for part in found}) == len(found)
    for part in found:
        arguments = PROGRAMS[part.kind]._parser().parse_args(part.command[3:])
        assert arguments.device == device and arguments.json == RESULTS
        if part.kind == "kernels":
            assert set(arguments.operators) <= set(kernels.OPERATORS)


def test_dry_run_lists_the_parts(capsys):
    assert gpu.main(["bench", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    for expected in ("step 256", "attention 197", "largest batch", "first step", "vit-mae compiled"):
        assert expected in listed


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", ["bench", "check"])
def test_its_earlier_names_are_the_commands(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"gpu_{command}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.gpu_{command}", run_name="__main__")
    assert ended.value.code == 0 and f"python -m benchmarks.gpu {command} [-h]" in capsys.readouterr().out


def test_without_a_device_nothing_is_run(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["bench"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_rehearsal_writes_no_results(capsys):
    assert gpu.main(["bench", "--device", "cpu"]) == 2
    assert "--out" in capsys.readouterr().err


def python(name: str, code: str) -> Part:
    return Part(name, "kernels", (sys.executable, "-c", code, RESULTS), 60)


def test_rows_outlive_their_part(tmp_path, monkeypatch, capsys):
    write = "import sys; open(sys.argv[1], 'a').write('{\"row\": %d}\\n'); "
    some = [python("crashes", write % 1 + "import os; os.abort()"), python("runs", write % 2)]
    monkeypatch.setattr(bench, "bench_parts", lambda device, full: some)
    assert gpu.main(["bench", "--device", "cpu", "--out", str(tmp_path)]) == 1
    rows = (tmp_path / "kernels.jsonl").read_text().splitlines()
    assert [json.loads(row)["row"] for row in rows] == [1, 2]
    assert "1 killed by SIGABRT, 1 passed" in capsys.readouterr().out


def test_parts_that_find_no_time_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "bench_parts", lambda device, full: [python("late", "pass")])
    assert gpu.main(["bench", "--device", "cpu", "--out", str(tmp_path), "--seconds", "-1"]) == 1
    assert "not run: out of time" in capsys.readouterr().out


def test_rehearsal_on_the_cpu(tmp_path, monkeypatch, capsys, in_this_process):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert gpu.main(["bench", "--device", "cpu", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    rows = {path.stem: parts.read_lines(path) for path in tmp_path.glob("*.jsonl")}
    assert rows.keys() == {"kernels", "training_step", "memory"}
    modes = {row["mode"] for found in rows.values() for row in found}
    assert modes >= {"forward", "backward", "forward+backward", "first step", "saved for backward", "product", "copy"}
