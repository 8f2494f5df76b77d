"""Other CPUs, as far as libraries go: each choice that looks at the CPU, in a process whose libraries use less of this one.

``cpu.CPU`` decides in which dtype products are computed, and with it what is kept for the backward, whether attention is
PyTorch's own, and what ``--run.precision auto`` means; ``library_products.ONEDNN_IS_FASTER``, which no variable reaches,
is set to both.
"""

from __future__ import annotations

import json
import os
import sys

import pytest

from benchmarks import ROOT
from benchmarks.gpu.parts import run_while_it_tells

CPUS = {
    "AVX2": dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2"),
    "AVX-512": dict(ATEN_CPU_CAPABILITY="avx512", ONEDNN_MAX_CPU_ISA="AVX512_CORE", MKL_ENABLE_INSTRUCTIONS="AVX512"),
    "AVX-512 with bfloat16": dict(ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16"),
}

CODE = """
import json, sys, torch
from benchmarks import memory, training_step
from benchmarks.peers import STEPS
from crate_kernels import library_products
from crate_kernels.cpu import CPU_PRODUCT_DTYPES
from crate_mae import create_model
from crate_mae.training.precision import choose_precision

torch.set_num_threads(int(sys.argv[1]))
cpu = torch.device("cpu")
said = {"multiplies": [str(dtype) for dtype in CPU_PRODUCT_DTYPES], "auto": choose_precision("auto", cpu)}
sizes = dict(depth=2, decoder_depth=2, embed_dim=64, num_heads=4, decoder_num_heads=4, patch_size=8)
for onednn in (False, True) if torch.backends.mkldnn.is_available() else (False,):
    library_products.ONEDNN_IS_FASTER = onednn
    kept = {n: memory.saved_for_backward(n, "crate_mae_base", {}, 256, torch.bfloat16) for n in ("reference", "composed")}
    said.setdefault("share", []).append(kept["composed"] / kept["reference"])
    for tokens in (65, 257):  # from 257 on attention is PyTorch's own where products are float32
        overrides = sizes | {"img_size": 8 * int((tokens - 1) ** 0.5)}
        for dtype in (torch.bfloat16, torch.float32):
            torch.manual_seed(0)
            model = create_model("crate_mae_tiny", **overrides).train()
            batch = training_step.Batch.random(model.config, 2, cpu, dtype)
            ours = ["composed", "composed 16bit", "composed recompute"]
            steppers, absent = training_step.ready(["reference", *ours], model, batch)  # raises where one is wrong
            assert not absent, absent
            stepper = steppers["composed"]
            with memory.counting_saved([*model.parameters(), *model.buffers()]) as saved:
                loss = stepper.forward()
            found = saved.bytes(without=loss), memory.saved_for_backward("composed", "crate_mae_tiny", overrides, 2, dtype)
            said.setdefault("counted", []).append(found)
    print("oneDNN" if onednn else "torch.mm", file=sys.stderr, flush=True)
print(json.dumps(said))
"""


@pytest.mark.parametrize(("name", "threads"), [("AVX2", 1), ("AVX-512", 2), ("AVX-512 with bfloat16", 1)])
def test_memory_and_results_of_a_step(name: str, threads: int) -> None:
    variables = {
        key: value for key, value in os.environ.items() if key not in CPUS["AVX2"] and key != "OMP_NUM_THREADS"
    }
    ended = run_while_it_tells([sys.executable, "-c", CODE, str(threads)], cwd=ROOT, env=variables | CPUS[name])
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout.splitlines()[-1])
    most = {"AVX2": set(), "AVX-512": set(), "AVX-512 with bfloat16": {"torch.bfloat16"}}[name]
    assert set(said["multiplies"]) <= most
    assert said["auto"] == ("bfloat16" if "torch.bfloat16" in said["multiplies"] else "float32")
    print(f"{name}, {threads} threads: saved for the backward, composed against the official order: {said['share']}")
    assert max(said["share"]) <= 0.75
    for found, counted in said["counted"]:  # what is counted on fake tensors is what is kept
        assert found == pytest.approx(counted, rel=0.02)
