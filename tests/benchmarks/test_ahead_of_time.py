"""Every kernel compiles for the GPUs it ships for, within its bounds; no GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]

# A process of its own: whether Triton interprets or compiles is decided when a kernel's module is imported.
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments: str, environment: dict[str, str] = COMPILING) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


def test_every_kernel_compiles_within_bounds(tmp_path, capsys):
    figures_file = tmp_path / "figures.jsonl"
    result = run("-m", "benchmarks.ahead_of_time", "--arch", "sm_80", "sm_90", "--json", str(figures_file))
    with capsys.disabled():
        print("\n" + result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr

    figures = [json.loads(line) for line in figures_file.read_text().splitlines()]
    listing = run("-c", "from benchmarks import ahead_of_time; print(*ahead_of_time.entry_kernels())")
    kernels = set(listing.stdout.split())
    assert kernels, listing.stderr
    for arch in ("sm_80", "sm_90"):
        assert {one["kernel"] for one in figures if one["arch"] == arch} == kernels
    on_tensor_cores = [one for one in figures if one["arch"] == "sm_90" and one["dtype"] in ("bfloat16", "float16")]
    assert all(one["wgmma"] for one in on_tensor_cores if one["kernel"] != "delta_kernel")


BAD_TILES = """
import sys, torch
from benchmarks import ahead_of_time
from crate_kernels.ista import triton as kernels

# On sm_80 an accumulator of 256 registers a thread; on sm_90 twelve stages of 32 KB, and fewer warps than wgmma takes.
for entry in kernels.TABLE["default"].values():
    entry.update(BLOCK_M=128, BLOCK_N=256, BLOCK_K=32, num_warps=4, num_stages=2)
for entry in kernels.TABLE["sm_90"].values():
    entry.update(BLOCK_M=64, BLOCK_N=64, BLOCK_K=128, num_warps=2, num_stages=12)

def forward():
    x, weight = (torch.empty(rows, 768, dtype=torch.float16, device="meta") for rows in (1000, 768))
    kernels.forward(x, x, weight, 0.1, 0.1, False)

ahead_of_time.gate_cases = lambda: [ahead_of_time.Case("ista", "float16", "forward only", forward)]
sys.exit(ahead_of_time.main(["--arch", "sm_80", "sm_90"]))
"""


def test_broken_bounds_are_reported():
    result = run("-c", BAD_TILES)
    assert result.returncode == 1, result.stdout + result.stderr
    breaches = [line for line in result.stdout.splitlines() if line.startswith("BREACH")]

    def reported(*words: str) -> bool:
        return any(all(word in line for word in words) for line in breaches)

    assert reported("token_product_kernel sm_80", "spills"), breaches
    assert reported("token_product_kernel sm_90", "bytes of shared memory"), breaches
    assert reported("token_product_kernel sm_90", "not on wgmma: 64x"), breaches
    assert reported("backward_kernel: no case compiles it"), breaches


def test_the_interpreter_is_refused():
    result = run("-m", "benchmarks.ahead_of_time", environment={**COMPILING, "TRITON_INTERPRET": "1"})
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr
