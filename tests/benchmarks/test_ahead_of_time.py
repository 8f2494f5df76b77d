"""Every kernel compiles for the GPUs it ships for, within its bounds; no GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.ahead_of_time import wgmma
from benchmarks.ahead_of_time.__main__ import main
from benchmarks.ahead_of_time.targets import TARGETS, Usage
from benchmarks.gpu.parts import run_while_it_tells

ROOT = Path(__file__).resolve().parents[2]

# A process of its own: whether Triton interprets or compiles is decided when a kernel's module is imported.
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
COMPILING["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])

# What `make test` may compile; all else is behind --all.
MOST_COMPILATIONS = 311


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_while_it_tells([sys.executable, *arguments], cwd=ROOT, env=COMPILING)


def breaches(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stdout.splitlines() if line.startswith("BREACH")]


def test_every_kernel_compiles_within_bounds(tmp_path, capsys):
    figures_file = tmp_path / "figures.jsonl"
    result = run("-m", "benchmarks.ahead_of_time", "--json", str(figures_file))
    with capsys.disabled():
        print("\n" + result.stdout)
    assert result.returncode == 0, "\n".join(breaches(result)) + result.stderr

    figures = [json.loads(line) for line in figures_file.read_text().splitlines()]
    assert len(figures) <= MOST_COMPILATIONS
    loops = [one["wgmma"]["loops"] for one in figures if one["wgmma"]]
    assert len(loops) > 20 and all(loops), "16-bit products on sm_90, each in a loop"
    assert all(one["instructions"]["HGMMA"] and max(one["cycles"].values()) > 0 for of_one in loops for one in of_one)
    listing = run("-c", "from benchmarks.ahead_of_time import compiling; print(*compiling.entry_kernels())")
    kernels = set(listing.stdout.split())
    assert kernels, listing.stderr
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert {f"{one['module']}.{one['kernel']}" for one in figures if one["arch"] == arch} == kernels
    units = {"sm_80": {"mma"}, "sm_90": {"wgmma"}, "sm_100": {"mma", "tcgen05"}, "gfx942": {"mfma"}}
    for one in figures:
        assert one["registers"] > 0 and 0 < one["occupancy"] <= 1, one
        # wgmma takes no fewer than 64 rows: the last rows of attention go to the small instruction.
        has_few_rows = one["arch"] == "sm_90" and one["products"] and int(one["tile"].split("x")[0]) < 64
        unit = {"mma"} if has_few_rows else units[one["arch"]]
        assert not one["products"] or unit & set(one["matrix"]), one


BAD_TILES = """
import sys, torch
import crate_kernels
from benchmarks.ahead_of_time import cases, collecting
from benchmarks.ahead_of_time.__main__ import main
from crate_kernels.tiles import products

# Elsewhere than on sm_90 an accumulator of 256 registers a thread, and 96 KB of tiles in flight; on sm_90 twelve stages of
# 32 KB, and fewer warps than wgmma takes.
for entry in products.TABLE["default"].values():
    entry.update(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=4, num_stages=3)
for entry in products.TABLE["sm_90"].values():
    entry.update(BLOCK_M=64, BLOCK_N=64, BLOCK_K=128, num_warps=2, num_stages=12)
products.TABLE["sm_70"] = {("never", 1): {}}

def forward():
    with torch.no_grad():
        crate_kernels.ista(*(torch.empty(rows, 768, dtype=torch.float16, device="meta") for rows in (1000, 768)))

def broken():
    raise MemoryError("no such shape")

some = [collecting.Case("ista", "float16", "forward only", forward), collecting.Case("ista", "float16", "broken", broken)]
cases.gate = lambda target: some
sys.exit(main(["--jobs", "1"]))
"""


def test_broken_bounds_are_reported():
    result = run("-c", BAD_TILES)
    assert result.returncode == 1, result.stdout + result.stderr
    found = breaches(result)

    def reported(*words: str) -> bool:
        return any(all(word in line for word in words) for line in found)

    assert reported("project_kernel sm_80", "spills"), found
    assert reported("project_kernel gfx942", "bytes of shared memory, the device has 65536"), found
    assert reported("project_kernel sm_90", "bytes of shared memory"), found
    assert reported("project_kernel sm_90", "not on wgmma: 64x"), found
    assert reported("backward_kernel: no case compiles it"), found
    assert reported("project_kernel: no case takes its addresses past 2^31 elements"), found
    assert reported("tile of products for sm_70 ('never', 1): no case compiles it"), found
    assert reported("ista sm_100 float16 broken: not launched, MemoryError: no such shape"), found


KERNELS = """
import triton
import triton.language as tl

@triton.jit
def double(value):
    return 2 * value

@triton.jit
def forward_kernel(x, BLOCK: tl.constexpr):
    entries = x + tl.arange(0, BLOCK)
    tl.store(entries, double(tl.load(entries)))
"""
ONE_NAME = """
import sys, torch
import twins.first
from benchmarks.ahead_of_time import cases, collecting, compiling
from benchmarks.ahead_of_time.__main__ import main

def call():
    twins.first.forward_kernel[(1,)](torch.empty(64, dtype=torch.float16, device="meta"), BLOCK=64)

compiling.crate_kernels = twins
cases.gate = lambda target: [collecting.Case("double", "float16", "of 64", call)]
sys.exit(main(["--jobs", "1"]))
"""


def test_kernels_of_one_name_are_two(tmp_path, monkeypatch):
    (tmp_path / "twins").mkdir()
    called_by_nobody = KERNELS.replace("def double", "def double_kernel").replace("double(tl", "2 * (tl")
    # The third module's own ``double`` starts by itself: that others call one of that name says nothing of it.
    alone = KERNELS.partition("@triton.jit\ndef forward_kernel")[0]
    for name, text in {"__init__": "", "first": KERNELS, "second": called_by_nobody, "third": alone}.items():
        (tmp_path / "twins" / f"{name}.py").write_text(text)
    monkeypatch.setitem(COMPILING, "PYTHONPATH", os.pathsep.join([COMPILING["PYTHONPATH"], str(tmp_path)]))
    result = run("-c", ONE_NAME)
    missing = {line.split()[1] for line in breaches(result) if line.endswith(": no case compiles it")}
    kernels = {"twins.second.forward_kernel:", "twins.second.double_kernel:", "twins.third.double:"}
    assert {name for name in missing if name.startswith("twins.")} == kernels, result.stdout + result.stderr


ADDRESSES = """
import json
import addressing, torch
from benchmarks.ahead_of_time import compiling
from benchmarks.ahead_of_time.collecting import Case

def case(name, rows):
    def call():
        x, out = (torch.empty(rows, 768, dtype=torch.float16, device="meta") for _ in range(2))
        getattr(addressing, name)[(rows // 64,)](x, out, x.stride(0), rows // 64, WIDTH=768, BLOCK=64)
    return Case("copy", "float16", name + " of " + str(rows), call)

names = [name for name in vars(addressing) if name not in ("triton", "tl", "copy", "annotations") and name[0] != "_"]
# A target for each size: a kernel launched with both would be compiled once, and judged by both launches.
rows_of = {"sm_80": 2**12, "sm_90": 2**22}
wanted = {arch: [case(name, rows) for name in names] for arch, rows in rows_of.items()}
figures, failures = compiling.compile_all(wanted, 1)
assert not failures, failures
for one in figures:
    print(json.dumps([one.shape, one.reach, one.address_breaches]))
"""


def test_addresses_in_32_bits_are_reported():
    result = run("-c", ADDRESSES)
    assert result.returncode == 0, result.stderr
    found = {shape: (reach, lines) for shape, reach, lines in map(json.loads, result.stdout.splitlines())}
    small = {shape: lines for shape, (_, lines) in found.items() if shape.endswith(" of 4096")}
    large = {shape.partition(" ")[0]: lines for shape, (_, lines) in found.items() if shape.endswith(" of 4194304")}
    assert len(small) == len(large) == 8
    assert not any(small.values()), small
    assert {name for name, lines in large.items() if not lines} == {"wide", "stepping_pointer"}, large
    assert all("addressing.py:" in line and "32 bits" in line for lines in large.values() for line in lines), large
    # rows - 1 times the width: the last row's first element.
    assert found["wide of 4194304"][0] == (2**22 - 1) * 768


MULTIPLYING = """
import sys
import multiplying, torch
from benchmarks.ahead_of_time import cases, collecting
from benchmarks.ahead_of_time.__main__ import main

def case(name, doubled=False, twice=False, loop_stages=None, columns=128, num_warps=8, num_stages=3, slow=""):
    def call():
        shapes = (1024, 768), (768, columns), (1024, columns)
        tensors = [torch.empty(shape, dtype=torch.float16, device="meta") for shape in shapes]
        multiplying.multiply[(8,)](
            *tensors, 768, DOUBLED=doubled, TWICE=twice, STAGES=loop_stages, BLOCK_M=128, BLOCK_N=columns, BLOCK_K=64,
            num_warps=num_warps, num_stages=num_stages,
        )
    return collecting.Case("multiply", "float16", name, call, slow)

some = [
    case("plain"), case("twice", twice=True), case("doubled", doubled=True), case("one stage", num_stages=1),
    case("tail alone", loop_stages=1), case("wide", columns=256, num_warps=4),
    case("with a reason", doubled=True, num_stages=2, slow="a reason"),
]
cases.gate = lambda target: some
sys.exit(main(["--arch", "sm_90", "--jobs", "1", "--json", sys.argv[1]]))
"""


def test_what_keeps_products_from_the_tensor_cores_rate_is_reported(tmp_path):
    result = run("-c", MULTIPLYING, str(tmp_path / "figures.jsonl"))
    assert result.returncode == 1, result.stdout + result.stderr
    reasons = {
        "doubled": {"products whose left factor goes through registers"},
        "one stage": {"1 of 1 loops wait for every wgmma in each step"},
        "tail alone": {"1 of 1 loops wait for every wgmma in each step"},
        "wide": {"wgmma.mma_async instructions are serialized", "255 registers", "loops wait", "spills"},
    }
    found = breaches(result)
    for name, words in reasons.items():
        lines = [line for line in found if f"float16 {name}," in line]
        assert len(lines) == len(words) and all(any(word in line for line in lines) for word in words), (name, lines)
    assert {line.partition(" float16 ")[2].partition(",")[0] for line in found} == set(reasons), found
    assert "MAY BE SLOW multiply sm_90 float16 with a reason" in result.stdout
    assert "    for a reason" in result.stdout.splitlines()

    figures = map(json.loads, (tmp_path / "figures.jsonl").read_text().splitlines())
    (loop,) = next(one["wgmma"]["loops"] for one in figures if one["shape"] == "plain")
    assert loop["in_flight"] == 1
    # Of a step's 128 x 128 x 64 products a warp issues 64 x 128 x 16 at a time, and copies 32 KB / 8 warps, 512 bytes at a time.
    assert {kind: loop["instructions"].get(kind) for kind in ("HGMMA", "LDGSTS", "BAR", "SHFL", "MUFU")} == {
        "HGMMA": 4, "LDGSTS": 8, "BAR": 2, "SHFL": None, "MUFU": None,
    }  # fmt: skip
    cycles = loop["cycles"]
    assert cycles["tensor"] == 2 * 128 * 128 * 64 / 4096 and cycles["MUFU"] == 0
    assert cycles["L2"] == -(-32768 * 132 // 5120)
    # wgmma reads 64 rows of x and all of the matrix for each half of the rows; copies write both once.
    assert 640 <= cycles["shared"] < 740
    assert cycles["issue"] == 2 * sum(loop["instructions"].values())


def test_only_an_epilogue_is_left_out_of_a_loop():
    """What a step may jump over is no epilogue if it does not store: a wait in it may be every step's."""

    def loop(skipped: str) -> list[str]:
        lines = [
            ".L_0:",
            "@!P0 BRA `(.L_1)",
            *skipped.split(", "),
            ".L_1:",
            "HGMMA.64x256x16 gsb0",
            "@P1 BRA `(.L_0)",
            "EXIT",
        ]
        code = [line if line.endswith(":") else f"/*{16 * at:04x}*/ {line} ;" for at, line in enumerate(lines)]
        (body,) = wgmma._innermost_loops("\n".join(code))
        return body

    wait, store = "WARPGROUP.DEPBAR.LE gsb0 0x0", "STG.E.128 [R2.64] R4"
    step = ["BRA `(.L_1)", "HGMMA.64x256x16 gsb0", "BRA `(.L_0)"]
    assert loop(f"{wait}, {store}") == step
    assert loop(wait) == [step[0], wait, *step[1:]]
    assert loop(f"{store}, HGMMA.64x64x16 gsb0") == [step[0], store, "HGMMA.64x64x16 gsb0", *step[1:]]


HITS = """
import functools, sys
import launching_nothing
from benchmarks.ahead_of_time import cases, collecting, warming
from benchmarks.ahead_of_time.__main__ import main
from benchmarks.gpu import bench
from benchmarks.kernels.operators import Shape

if __name__ == "__main__":
    some = bench.chosen_parts(bench.bench_parts("cuda", full=False), ["step 256", "ista"], [])
    warming.gpu_parts = lambda: some
    for _ in range(2):
        assert main(["--warm", "--arch", "sm_90", "--archive", sys.argv[1]]) == 0
    # On fake tensors as on the meta tensors of the gate's cases.
    for name, of_the_gate in {"ista": cases.ista("bfloat16"), "attention": cases.attention("bfloat16", batch=64)}.items():
        call = functools.partial(warming._operator, name, Shape(64, 197, 768, 12), "bfloat16", "triton")
        found = [collecting.requests(one, "sm_90") for one in (of_the_gate, collecting.Case(name, "bfloat16", "", call))]
        assert found[0] and len({frozenset(request for request, _ in some) for some in found}) == 1, found
    hits = launching_nothing.activate()
    for part in some:
        for case in warming.cases(part):
            with collecting.as_if_on("sm_90", case.dtype):
                case.call()
    print(len(hits), sum(hits), launching_nothing.launches)
"""


def test_a_launch_finds_what_was_compiled_before_it(tmp_path, monkeypatch):
    """By Triton's own launch, of operators and of a step of the whole model, up to where a driver would start the kernel."""
    monkeypatch.setitem(COMPILING, "PYTHONPATH", os.pathsep.join([COMPILING["PYTHONPATH"], str(ROOT / "tests")]))
    monkeypatch.setitem(COMPILING, "TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "hits.py").write_text(HITS)
    archive = tmp_path / "warm.tar.gz"
    result = run(str(tmp_path / "hits.py"), str(archive))
    assert result.returncode == 0, result.stdout + result.stderr
    kernels, hits, launches = map(int, result.stdout.splitlines()[-1].split())
    assert kernels == hits > 30 and launches > 500
    for counts in (
        f"{kernels} compiled, 0 already cached, 0 failed",
        f"0 compiled, {kernels} already cached, 0 failed",
    ):
        assert f"{kernels} kernels for sm_90: {counts}; " in result.stdout
    with tarfile.open(archive) as held:
        told = held.extractfile("warm.jsonl").read().splitlines()
    assert [json.loads(line)["outcome"] for line in told] == ["cached"] * kernels


FAILURES = """
import os, sys
import triton
from triton.backends.compiler import GPUTarget
from crate_kernels.tiles.compiling import Compilers, Request

target = GPUTarget("cuda", 90, 32)
if __name__ == "__main__":
    with Compilers(1) as compilers:
        wrong = Request("crate_kernels.products.kernels", "project_kernel", target, "{}")
        print(compilers.failures([wrong, wrong], 100), len(compilers))
        deadly = Request("deadly", "kernel", target, "{}")
        print(compilers.failures([deadly, wrong._replace(specialization="")], 100))
        print(compilers.failures([wrong._replace(kernel="moments_kernel")], 100))
"""


def test_what_cannot_be_compiled_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(COMPILING, "PYTHONPATH", os.pathsep.join([COMPILING["PYTHONPATH"], str(tmp_path)]))
    (tmp_path / "deadly.py").write_text("import os; os.abort()")
    (tmp_path / "failures.py").write_text(FAILURES)
    result = run(str(tmp_path / "failures.py"))
    wrong, *after_a_death = result.stdout.splitlines()
    assert wrong == """["KeyError: 'name'"] 1""", result.stdout + result.stderr
    assert len(after_a_death) == 2 and all("a compiler's process died" in line for line in after_a_death)


@pytest.mark.parametrize(
    "arch, registers, warps, shared_bytes, tensor_memory, blocks, slots",
    [
        ("sm_90", 128, 8, 0, 0, 2, 64),  # 65536 registers / (256 threads * 128)
        ("sm_90", 32, 4, 100 * 1024, 0, 2, 64),  # 228 KB / 101 KB
        ("sm_100", 32, 4, 0, 256, 2, 64),  # 512 columns / 256
        ("gfx942", 128, 4, 0, 0, 4, 32),  # 512 registers / 128, on each of four SIMDs
        ("gfx942", 130, 4, 0, 0, 3, 32),  # 136: registers come in units of 8
        ("gfx942", 128, 4, 24 * 1024, 0, 2, 32),  # 64 KB / 24 KB
    ],
)
def test_occupancy(arch, registers, warps, shared_bytes, tensor_memory, blocks, slots):
    usage = Usage(warps, registers, 0, 0, 0, shared_bytes, tensor_memory, {})
    assert TARGETS[arch].occupancy(usage) == blocks * warps / slots


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
