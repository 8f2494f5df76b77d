"""The benchmark of the host's time, and the launches and small operations of a layer that it counts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import ROOT


def test_launches_of_a_layer() -> None:
    """They are counted where kernels are compiled, in a process of its own; each more is microseconds in every layer and step."""
    pytest.importorskip("triton")
    from benchmarks.host_time import TIMES, in_a_process

    found = in_a_process(ROOT)
    assert all(found[kind][name] > 0 for kind in ("encoder", "decoder") for name in TIMES)
    counts = {kind: {name: value for name, value in of.items() if name not in TIMES} for kind, of in found.items()}
    launches = {"launches forward": 5, "launches backward": 8}
    assert counts == {
        "encoder": {**launches, "library products": 4, "small operations": 3},
        "decoder": {**launches, "library products": 3, "small operations": 5},
    }


def test_another_checkout_that_is_none(tmp_path) -> None:
    (tmp_path / "crate_kernels").mkdir()
    command = [sys.executable, "-m", "benchmarks.host_time", "--rounds", "1", "--against", str(tmp_path), "--json"]
    ended = subprocess.run([*command, str(tmp_path / "host.json")], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and str(tmp_path) in ended.stderr and len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "host.json").exists() and not ended.stdout
