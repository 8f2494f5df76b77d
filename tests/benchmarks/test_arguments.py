"""What the programs cannot do is refused by the argument's name, in one line, before anything is measured."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from benchmarks import memory, memory_per_rank, records, training_step
from benchmarks.command_line import device_named
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.parts import Runner
from benchmarks.kernels import __main__ as kernels
from benchmarks.report import __main__ as report

PROGRAMS = pytest.mark.parametrize(
    "program", [kernels, memory, memory_per_rank, training_step], ids=["kernels", "memory", "ranks", "step"]
)
TINY = ["--device", "cpu", "--model", "crate_mae_tiny", "--batch", "2", "--dtype", "float32"]
SHALLOW = ["--set", "depth=1", "--set", "decoder_depth=1"]


@pytest.fixture
def refusal(monkeypatch, capsys):
    """``refusal(program, *arguments)``: the one line that the program ends with, nothing having been measured."""
    monkeypatch.setattr(records.Record, "add", lambda *_, **__: pytest.fail("something was measured"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(program: ModuleType, *arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            program.main(list(arguments))
        if isinstance(ended.value.code, str):
            assert "\n" not in ended.value.code
            return ended.value.code
        assert ended.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]  # after argparse's usage

    return run


@PROGRAMS
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "cuda"], "--device cuda: torch finds no CUDA device"),
        (["--device", "foo"], "--device foo: expected cpu, cuda"),
        (["--device", "meta"], "--device meta: expected cpu, cuda"),
        (["--device", "cpu", "--json", "/proc/x/y"], "--json /proc/x/y: expected a file that can be written"),
        (["--batch", "0"], "argument --batch: expected a whole number of at least 1, got '0'"),
        (["--batch", "two"], "argument --batch: expected a whole number of at least 1, got 'two'"),
    ],
)
def test_of_every_program(refusal, program, arguments, expected):
    assert expected in refusal(program, *arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rounds", "0"], "argument --rounds: expected a whole number of at least 1, got '0'"),
        (["--tokens", "0"], "argument --tokens: expected"),
        (["--heads", "0"], "argument --heads: expected"),
        (["--width", "95"], "--width 95: expected a multiple of --heads 12"),
        (["attention", "--once", "--width", "95"], "--width 95: expected a multiple of --heads 12"),
    ],
)
def test_of_kernels(refusal, arguments, expected):
    assert expected in refusal(kernels, *arguments)


def test_operators_without_heads_take_every_width():
    shape = ["--device", "cpu", "--dtype", "float32", "--batch", "1", "--tokens", "3", "--width", "7"]
    assert kernels.main(["ista", "norm_linear", "--once", *shape]) == []


@pytest.mark.parametrize("program", [memory, training_step], ids=["memory", "step"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "nope"], "argument --model: invalid choice: 'nope' (choose from "),
        (["--set", "dept=1"], "argument --set: 'dept' in 'dept=1' is not one of img_size, "),
        (["--set", "embed_dim=97"], "--set embed_dim=97: ValueError: num_heads: expected a divisor"),
        (["--set", "depth=1.5"], "--set depth=1.5: TypeError"),
    ],
)
def test_of_whole_models(refusal, program, arguments, expected):
    assert expected in refusal(program, "--device", "cpu", *arguments)


def test_a_step_takes_at_least_one_round(refusal):
    assert "argument --rounds: expected a whole number of at least 1" in refusal(training_step, "--rounds", "0")


def test_a_device_of_a_number_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_named("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(SystemExit, match="--device cuda:2: expected a number below 2"):
        device_named("cuda:2")


@pytest.mark.parametrize("program", [memory, training_step], ids=["memory", "step"])
def test_overrides_add_up_and_are_not_remembered(program):
    parse = program._parser().parse_args
    assert parse(SHALLOW).set == [("depth", 1), ("decoder_depth", 1)]
    assert parse([]).set == []


def test_every_provider_is_shown_once_with_its_overrides(capsys):
    rows = memory.main([*TINY, *SHALLOW])
    names = [row["provider"] for row in rows]
    assert len(names) == len(set(names)) and {"reference", "composed"} <= set(names)
    _, _, *table = capsys.readouterr().out.splitlines()
    assert len(table) == len(rows)
    assert all("crate_mae_tiny depth=1 decoder_depth=1  2x3x224x224" in line for line in table)


def test_nothing_measured_is_a_failure_that_says_why(monkeypatch):
    monkeypatch.setattr(training_step, "_interpreting", lambda: False)
    arguments = [*TINY, *SHALLOW, "--rounds", "1"]
    with pytest.raises(SystemExit, match=r"^nothing was measured; triton: .*CUDA device; reference graph: .*CUDA"):
        training_step.main([*arguments, "--providers", "triton", "reference graph"])
    with pytest.raises(SystemExit, match=r"^nothing was measured; best composed: .*CUDA"):
        memory.main([*TINY, *SHALLOW, "--providers", "best composed"])
    rows = training_step.main([*arguments, "--providers", "triton", "composed"])
    found = {row["provider"]: row["ms"] for row in rows if row["operator"] == "training_step"}
    assert found["triton"] is None and found["composed"]["p50"] > 0


@pytest.mark.parametrize(("command", "argument"), [("check", "--json"), ("bench", "--out")])
def test_of_the_unattended_runs(monkeypatch, command, argument):
    monkeypatch.setattr(Runner, "run", lambda *_: pytest.fail("a part was run"))
    with pytest.raises(SystemExit, match=f"{argument}: expected a folder that can be written, got /proc/x"):
        gpu.main([command, "--device", "cpu", argument, "/proc/x/y"])


def test_of_the_report(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "rows.jsonl").touch()
    for arguments, expected in (
        (["--results", str(tmp_path / "nope")], "--results .*nope: expected a folder"),
        (["--results", str(tmp_path / "cpu")], "--results .*cpu: expected a folder"),
        (["--results", str(tmp_path), "--readme", str(tmp_path / "nope")], "--readme .*nope: expected a file"),
        (["--results", str(tmp_path), "--readme", __file__, "--page", "nope"], "--page nope: expected a file"),
        (["--results", str(tmp_path), "--page", __file__, "--device", "gpu"], "--device gpu: .* has results of: cpu"),
    ):
        with pytest.raises(SystemExit, match=expected):
            report.main(["--check", *arguments])
