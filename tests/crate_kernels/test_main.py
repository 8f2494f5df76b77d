"""What heads a bug report."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import crate_kernels
from crate_kernels import tiles


def parts(text: str) -> dict[str, list[str]]:
    """The lines by heading."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in text.splitlines():
        heading = line[:14].strip() or heading
        found.setdefault(heading, []).append(line[15:])
    return found


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("crate_kernels", run_name="__main__")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 40
    return parts(printed)


def on_the_cpu(found: dict[str, list[str]]) -> dict[str, str]:
    """What is taken there, with the reason, by what it is taken for."""
    lines = [line.partition(": ") for line in found["auto, on CPUs"]]
    return {one: choice for names, _, choice in lines for one in names.split(", ")}


def of_a_process(code: str = "", **variables: str) -> dict[str, list[str]]:
    """What one without a GPU prints, after ``code``."""
    others = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CRATE_KERNELS_IMPL")
    }
    code += "\nimport runpy; runpy.run_module('crate_kernels', run_name='__main__')"
    environment = {**others, "CUDA_VISIBLE_DEVICES": "", **variables}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and len(result.stdout.splitlines()) < 40, result.stderr
    return parts(result.stdout)


def test_it_names_versions_and_what_is_taken_and_why() -> None:
    found = of_a_process()
    assert found["crate_kernels"] == [crate_kernels.__version__]
    assert found["torch"][0].startswith(torch.__version__)
    assert not any("not known" in line for name in ("environment", "CPU", "tiles") for line in found[name])
    taken = on_the_cpu(found)
    assert set(taken) == {"float64", "float32", "float16", "bfloat16", "heads wider than 128"}
    assert "not torch.float64" in taken["float64"] and "heads of 1 to 128" in taken["heads wider than 128"]
    assert taken["bfloat16"].startswith("composed; its kernels need CUDA tensors")


def test_what_is_forced_is_not_what_auto_takes() -> None:
    found = of_a_process(TRITON_INTERPRET="1", CRATE_KERNELS_IMPL="reference")
    assert "CRATE_KERNELS_IMPL=reference, TRITON_INTERPRET=1" in found["environment"][0]
    assert on_the_cpu(found)["float32"] == "composed; triton runs where it is forced"


def test_it_names_gpus_and_what_is_taken_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name="Card", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(tiles, "family", lambda device: "sm_90")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="580.1\n580.1\n"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = report(capsys)
    assert found["GPUs"] == ["2 x Card, sm_90, 80.0 GiB", "driver 580.1"]
    assert "float32, float16, bfloat16: triton" in found["auto, on CUDA"]


def test_what_is_broken_says_so_and_ends_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA driver\ntoo old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", broken)
    monkeypatch.setattr(tiles, "this_device", broken)
    found = report(capsys)
    assert found["GPUs"] == found["tiles"] == ["not known: RuntimeError: CUDA driver too old"]
    assert on_the_cpu(found)


def test_it_needs_no_triton() -> None:
    found = of_a_process("import sys; sys.modules['triton'] = None  # any import of it now fails")
    assert "not known" in found["triton"][0] and found["tiles"][0].startswith("default: ")
