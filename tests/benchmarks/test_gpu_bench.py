"""The unattended run asks for what the programs know, loses no row, and rehearses without a GPU."""

from __future__ import annotations

import json
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import memory, training_step
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import bench, everything, parts
from benchmarks.gpu.parts import RESULTS, Part, Runner
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


def python(name: str, code: str, estimate: float = 0.0) -> Part:
    return Part(name, "kernels", (sys.executable, "-c", code, RESULTS), 60, estimate=estimate)


def held_in(folder: Path) -> dict[str, str]:
    """The text files in the one archive that lies in a folder."""
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as held:
        return {one.name: held.extractfile(one).read().decode() for one in held if one.isfile()}


def test_rows_outlive_their_part(tmp_path, monkeypatch, capsys, archives):
    write = "import sys; open(sys.argv[1], 'a').write('{\"row\": %d}\\n'); "
    some = [python("crashes", write % 1 + "import os; os.abort()"), python("runs", write % 2)]
    monkeypatch.setattr(bench, "bench_parts", lambda device, full: some)
    assert gpu.main(["bench", "--device", "cpu", "--out", str(tmp_path / "rows")]) == 1
    rows = (tmp_path / "rows" / "kernels.jsonl").read_text()
    assert [json.loads(row)["row"] for row in rows.splitlines()] == [1, 2]
    assert held_in(archives) == {"rows/kernels.jsonl": rows}
    assert "1 killed by SIGABRT, 1 passed" in capsys.readouterr().out


def test_parts_that_would_not_end_in_time_are_not_begun_and_named(tmp_path, monkeypatch, capsys):
    write = "import sys; open(sys.argv[1], 'a').write('{}\\n')"
    some = [
        python("early", write, 1),
        python("late", write, 1000),
        python("short", write, 1),
        python("later", write, 999),
    ]
    monkeypatch.setattr(bench, "bench_parts", lambda device, full: some)
    assert gpu.main(["bench", "--device", "cpu", "--out", str(tmp_path / "rows"), "--seconds", "100"]) == 1
    assert len((tmp_path / "rows" / "kernels.jsonl").read_text().splitlines()) == 2
    assert "2 passed, 2 not run: out of time; " in (told := capsys.readouterr().out)
    assert "not begun, for want of time: late, later\n" in told
    assert bench.that_fit(some, 100) == [some[0], some[2]]


class Interrupted(Runner):
    def run(self, part: Part) -> dict:
        if part.name == "second":
            raise KeyboardInterrupt
        return super().run(part)


def test_an_interrupted_run_leaves_its_archive(tmp_path, monkeypatch, archives):
    write = "import sys; open(sys.argv[1], 'a').write('{}\\n')"
    monkeypatch.setattr(bench, "bench_parts", lambda device, full: [python("first", write), python("second", write)])
    monkeypatch.setattr(bench, "Runner", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["bench", "--device", "cpu", "--out", str(tmp_path / "rows")])
    assert held_in(archives) == {"rows/kernels.jsonl": "{}\n"}


ORDER = ("step 256", "attention 197", "ista", "memory 256", "step 8, graphs", "step 1, graphs")


def test_what_is_wanted_most_comes_first_in_the_bench_and_in_all(tmp_path):
    assert tuple(part.name for part in bench.bench_parts("cuda", False))[: len(ORDER)] == ORDER
    found = everything.pieces(["rest", "warm", "ista", "step"], 425.0, "sm_90", 2, tmp_path)
    assert [piece.name for piece in found] == ["warm", "step", "ista", "rest"]
    assert [piece.seconds for piece in found] == [45, 110, 35, 235]  # half of their shares
    assert [part.name for part in found[1].launches] == ["step 256"]
    assert not {part.name for part in found[-1].launches} & set(ORDER[:3])
    for piece in found[1:]:
        arguments = gpu._parser().parse_args(everything.within(piece, 100.0)[3:])
        assert arguments.seconds == 90
        chosen = bench.chosen_parts(bench.bench_parts("cuda", False), arguments.only, arguments.without)
        assert chosen == piece.launches
    assert everything.heaviest()[0] == "input_gradient_kernel" and len(everything.heaviest()) == 6


@pytest.mark.parametrize(("arguments", "status"), [(["--dry-run"], 0), ([], 2)])
def test_without_a_device_all_is_a_plan_in_an_archive(monkeypatch, capsys, archives, arguments, status):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        everything.warming, "wanted", lambda parts, arch, failures: ((part, [part.name]) for part in parts)
    )
    assert gpu.main(["all", "--jobs", "4", *arguments]) == status
    plan = (archives / "gpu_all" / "plan.txt").read_text()
    told = capsys.readouterr().out
    assert plan in told and "There is no GPU" in told
    assert held_in(archives) == {"gpu_all/plan.txt": plan}
    assert [line.split()[:2] for line in plan.splitlines()[1:8]] == [
        [name, str(of)] for name, of in everything.SHARES.items()
    ]
    assert "1500 s at most" in plan and "python -m benchmarks.gpu bench --only 'step 256' --seconds 210" in plan
    assert "rest: no time for step 128" in plan


def test_pieces_are_run_told_and_kept_and_ended_in_time(tmp_path, monkeypatch, capsys, archives):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended GPU")
    monkeypatch.setattr(gpu, "environment", lambda device: {"device": "Pretended GPU", "commit": "0123abc"})
    monkeypatch.setattr(everything.tiles, "this_device", lambda: torch.device("cpu"))
    code = "import os, sys, time; print(sys.argv[1], os.environ['OUT'], flush=True); time.sleep(float(sys.argv[2]))"
    some = [
        everything.Piece(name, seconds, [program, "-c", code, everything.LIMIT, sleep], [])
        for name, seconds, program, sleep in (
            ("right", 100.0, sys.executable, "0"), ("ncu", 1.0, "no-such-program", "0"), ("hangs", -98.0, sys.executable, "60"),
            ("late", 0.0, sys.executable, "0"),
        )
    ]  # fmt: skip
    monkeypatch.setattr(everything, "pieces", lambda *_: some)
    monkeypatch.setattr(everything, "SECONDS_TO_START", -10)
    assert gpu.main(["all"]) == 1
    told = capsys.readouterr().out
    for status in ("right  passed", "ncu    not run: there is no no-such-program", "hangs  failed with status -15"):
        assert status in told
    assert "late   not begun, for want of time" in told
    held = held_in(archives)
    assert held.keys() == {"gpu_all/right.txt", "gpu_all/hangs.txt"} and held["gpu_all/right.txt"].startswith("90 /")


def test_rehearsal_on_the_cpu(tmp_path, monkeypatch, capsys, in_this_process):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert gpu.main(["bench", "--device", "cpu", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    rows = {path.stem: parts.read_lines(path) for path in tmp_path.glob("*.jsonl")}
    assert rows.keys() == {"kernels", "training_step", "memory"}
    modes = {row["mode"] for found in rows.values() for row in found}
    assert modes >= {"forward", "backward", "forward+backward", "first step", "saved for backward", "product", "copy"}
