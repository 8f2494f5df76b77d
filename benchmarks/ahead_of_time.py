"""Compiles every Triton kernel for named GPU architectures, without a GPU, and bounds what the machine code uses.

    python -m benchmarks.ahead_of_time --arch sm_80 sm_90

The operators' own launchers are called on meta tensors: they choose tiles and launch options as they would on the device,
Triton specialises strides and alignment as it would there, and a hook takes the request where it would be compiled. So the
kernels compiled here are those that run. Exit status 1, and a line for each breach, when a kernel spills registers, wants more
shared memory than the device has, leaves a 16-bit product of 64 rows or more off wgmma on sm_90, or is reached by no case.
"""

from __future__ import annotations

import argparse
import importlib
import math
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import crate_kernels
from benchmarks import harness
from crate_kernels import tiles


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor offers, from the CUDA programming guide's table of compute capabilities."""

    shared_bytes: int
    warps: int
    blocks: int
    registers: int = 65536

    # The driver keeps 1 KB of shared memory for each block.
    RESERVED = 1024

    @property
    def shared_bytes_per_block(self) -> int:
        return self.shared_bytes - self.RESERVED

    def occupancy(self, registers: int, warps: int, shared_bytes: int) -> float:
        """The fraction of the warp slots that blocks of ``warps`` warps fill; registers are those of one thread."""
        # A warp's registers are given out in units of 256.
        registers_per_block = 256 * math.ceil(32 * registers / 256) * warps
        blocks = min(
            self.blocks,
            self.warps // warps,
            self.registers // registers_per_block,
            self.shared_bytes // (shared_bytes + self.RESERVED),
        )
        return blocks * warps / self.warps


ARCHITECTURES = {
    "sm_80": Multiprocessor(164 * 1024, warps=64, blocks=32),
    "sm_86": Multiprocessor(100 * 1024, warps=48, blocks=16),
    "sm_89": Multiprocessor(100 * 1024, warps=48, blocks=24),
    "sm_90": Multiprocessor(228 * 1024, warps=64, blocks=32),
    "sm_100": Multiprocessor(228 * 1024, warps=64, blocks=32),
}


@dataclass(frozen=True)
class Case:
    """One use of an operator; ``launch`` calls its launchers on meta tensors."""

    operator: str
    dtype: str
    shape: str
    launch: Callable[[], object]


@dataclass(frozen=True)
class Request:
    """One kernel that a case would have compiled: ``specialization`` is Triton's own record of signature and options."""

    module: str
    kernel: str
    arch: str
    specialization: str


@dataclass(frozen=True)
class Figures:
    """What one compiled kernel uses."""

    kernel: str
    arch: str
    dtype: str
    shape: str
    tile: str
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    wgmma: int
    products_without_wgmma: list[str]
    occupancy: float


# "tf32" is float32 tensors with tensor cores allowed to round their operands; "autocast" a float32 stream with bfloat16 operands.
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
    "autocast": torch.float32,
}

# A batch of 64 images and one image of 197 tokens: more tokens than the width, and fewer.
TOKENS = (64 * 197, 197)


def attention_case(dtype: str, head_dim: int, is_causal: bool) -> Case:
    """Forward and backward of shared-QKV attention on the transposed view that the projection leaves."""

    def launch() -> None:
        from crate_kernels.shared_attention import triton as kernels

        def head_view() -> Tensor:
            tokens = torch.empty(8, 197, 12 * head_dim, dtype=DTYPES[dtype], device="meta")
            return tokens.view(8, 197, 12, head_dim).transpose(1, 2)

        w, scale = head_view(), head_dim**-0.5
        out, lse = kernels.forward(w, scale, is_causal)
        kernels.backward(head_view(), w, out, lse, scale, is_causal)

    return Case("attention", dtype, f"d={head_dim}" + (" causal" if is_causal else ""), launch)


def ista_case(dtype: str, width: int, tokens: int, soft: bool) -> Case:
    """Forward and both gradients of ISTA; more tokens than the width make it the one-product form."""

    def launch() -> None:
        from crate_kernels.ista import triton as kernels

        x = torch.empty(tokens, width, dtype=DTYPES[dtype], device="meta")
        operand = x.bfloat16() if dtype == "autocast" else x
        weight = torch.empty(width, width, dtype=DTYPES[dtype], device="meta")
        y, matrix = kernels.forward(x, operand, weight, 0.1, 0.1, soft)
        kernels.backward(torch.empty_like(y), operand, weight, y, matrix, 0.1, True, True)

    form = "one-product" if tokens > width else "two-product"
    return Case("ista", dtype, f"D={width} {form}" + (" soft" if soft else ""), launch)


def gate_cases() -> list[Case]:
    """Every tile that ships and every flag that changes the code, each once; few enough for a test."""
    cases = [attention_case("bfloat16", head_dim, False) for head_dim in (16, 32, 48, 64, 128)]
    cases += [attention_case("bfloat16", head_dim, True) for head_dim in (64, 128)]
    cases += [attention_case("float32", head_dim, False) for head_dim in (16, 32, 64, 128)]
    cases += [attention_case(dtype, 64, False) for dtype in ("float16", "tf32")]
    cases += [
        ista_case(dtype, 768, tokens, False) for dtype in ("bfloat16", "autocast", "float32") for tokens in TOKENS
    ]
    cases += [ista_case(dtype, 768, TOKENS[0], False) for dtype in ("float16", "tf32")]
    cases += [ista_case("bfloat16", 768, TOKENS[0], True), ista_case("bfloat16", 576, TOKENS[0], False)]
    return cases


def all_cases() -> list[Case]:
    """The gate's cases and all their combinations, at the widths of CRATE-MAE Small and Base."""
    flags = (False, True)
    cases = [
        attention_case(dtype, head_dim, is_causal)
        for dtype, head_dim, is_causal in product(DTYPES, (16, 32, 48, 64, 80, 128), flags)
        if dtype != "autocast"  # attention sees one dtype
    ]
    return gate_cases() + cases + [ista_case(*variant) for variant in product(DTYPES, (576, 768), TOKENS, flags)]


class _PretendedDriver:
    """As much of a Triton driver as choosing a target takes. The device index is the architecture's: Triton keeps one
    compilation cache a device, and a cache serves one target."""

    def __init__(self, arch: str) -> None:
        self._target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


def requests(case: Case, arch: str) -> list[Request]:
    """What ``case`` would compile on ``arch``, in launch order; nothing is compiled."""
    found = []

    def take(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append(Request(fn.module, fn.jit_function.fn.__name__, arch, compile["specialization_data"]))
        return True  # tells Triton to neither compile nor launch

    triton.runtime.driver.set_active(_PretendedDriver(arch))
    precision = "high" if case.dtype == "tf32" else "highest"
    with tiles.pretend(arch), _matmul_precision(precision), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = take
        case.launch()
    return found


def compile_request(request: Request, dtype: str, shape: str) -> Figures:
    """Compile one kernel (or find it in Triton's disk cache) and read its machine code; dtype and shape are labels.

    Runs in a process other than the one that collects requests: there, Triton would try to launch what it has compiled.
    """
    triton.runtime.driver.set_active(_PretendedDriver(request.arch))
    knobs = triton.knobs.nvidia
    kernel = _jit_function(getattr(importlib.import_module(request.module), request.kernel))
    compiled = kernel.preload(request.specialization)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _output(knobs.cuobjdump, "-res-usage", cubin.name)))
        # Disassembling takes as long as compiling: only where there is wgmma to find.
        machine_code = _output(knobs.nvdisasm, "-c", cubin.name) if "wgmma" in compiled.asm["ptx"] else ""
    constants = compiled.src.constants
    blocks = [value for (index, *_), value in constants.items() if kernel.arg_names[index].startswith("BLOCK")]
    registers, warps, shared = int(usage["REG"]), compiled.metadata.num_warps, compiled.metadata.shared
    # A product that Triton leaves to the older mma instructions is still a tt.dot after lowering; wgmma's is warp_group_dot.
    older = re.findall(r"tt\.dot .* : tensor<(\d+x\d+)x(?:bf16|f16).* \* tensor<\d+x(\d+)x", compiled.asm["ttgir"])
    return Figures(
        kernel=request.kernel,
        arch=request.arch,
        dtype=dtype,
        shape=shape,
        tile="x".join(map(str, blocks)),
        warps=warps,
        stages=compiled.metadata.num_stages,
        registers=registers,
        spill_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared_bytes=shared,
        wgmma=len(re.findall(r"\bHGMMA\b", machine_code)),
        products_without_wgmma=[f"{left}x{columns}" for left, columns in older],
        occupancy=ARCHITECTURES[request.arch].occupancy(registers, warps, shared),
    )


def _output(tool: Any, option: str, path: str) -> str:
    return subprocess.run([tool.path, option, path], capture_output=True, text=True, check=True).stdout


def breaches(figures: Figures) -> list[str]:
    """The bounds that ``figures`` break, one line each."""
    name = f"{figures.kernel} {figures.arch} {figures.dtype} {figures.shape}, tile {figures.tile}"
    found = []
    if figures.spill_bytes:
        found.append(f"{name}: spills {figures.spill_bytes} bytes a thread")
    limit = ARCHITECTURES[figures.arch].shared_bytes_per_block
    if figures.shared_bytes > limit:
        found.append(f"{name}: {figures.shared_bytes} bytes of shared memory, the device has {limit}")
    if figures.arch == "sm_90":
        tall = [product for product in figures.products_without_wgmma if int(product.split("x")[0]) >= 64]
        if tall:
            found.append(f"{name}: 16-bit products not on wgmma: {', '.join(tall)} (rows x inner x columns)")
    return found


def _jit_function(kernel: Any) -> Any:
    """The ``triton.JITFunction`` under autotuners and heuristics."""
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    return kernel


def entry_kernels() -> set[str]:
    """Names of the kernels that launchers start: the JIT functions in crate_kernels that no other JIT function calls."""
    modules = [
        importlib.import_module(found.name) for found in pkgutil.walk_packages(crate_kernels.__path__, "crate_kernels.")
    ]
    kernels = [
        _jit_function(value)
        for module in modules
        for value in vars(module).values()
        if isinstance(value, triton.runtime.KernelInterface)
    ]
    called = {name for kernel in kernels for name in kernel.fn.__code__.co_names}
    return {kernel.fn.__name__ for kernel in kernels} - called


def compile_cases(cases: Sequence[Case], archs: Sequence[str], jobs: int) -> list[Figures]:
    """Figures of every kernel that the cases launch, identical compilations once, under the first case that asks for it."""
    labels: dict[Request, tuple[str, str]] = {}
    for case in cases:
        for arch in archs:
            for request in requests(case, arch):
                labels.setdefault(request, (case.dtype, case.shape))
    # Spawned, not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(compile_request, request, *label) for request, label in labels.items()]
        return sorted((task.result() for task in pending), key=lambda f: (f.kernel, f.arch, f.dtype, f.shape))


COLUMNS = (
    "kernel", "arch", "dtype", "shape", "tile", "warps", "stages", "registers", "spill B", "shared KB", "wgmma", "occupancy %"
)  # fmt: skip


def line(figures: Figures) -> list[Any]:
    """Figures as they are printed."""
    return [
        figures.kernel,
        figures.arch,
        figures.dtype,
        figures.shape,
        figures.tile,
        figures.warps,
        figures.stages,
        figures.registers,
        figures.spill_bytes,
        round(figures.shared_bytes / 1024, 1),
        figures.wgmma,
        round(100 * figures.occupancy),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: kernels would be interpreted, not compiled. Unset it.", file=sys.stderr)
        return 2
    cases = all_cases() if arguments.all else gate_cases()
    wanted = [case for case in cases if case.dtype in arguments.dtypes and case.operator in arguments.operators]
    figures = compile_cases(wanted, arguments.arch, arguments.jobs)
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    print(harness.table(COLUMNS, map(line, figures)))
    if arguments.json:
        harness.write_json_lines(arguments.json, map(asdict, figures))

    broken = [breach for one in figures for breach in breaches(one)]
    if len(wanted) == len(cases):
        compiled = {one.kernel for one in figures}
        broken += [f"{kernel}: no case compiles it" for kernel in sorted(entry_kernels() - compiled)]
    for breach in broken:
        print(f"BREACH {breach}")
    print(f"{len(figures)} kernels compiled, {len(broken)} bounds broken")
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ahead_of_time", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=["sm_80", "sm_90"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--operators", nargs="+", choices=["attention", "ista"], default=["attention", "ista"])
    parser.add_argument("--all", action="store_true", help="all combinations of the cases: about ten minutes")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile at the same time")
    parser.add_argument("--json", metavar="FILE", help="append the figures as JSON lines")
    return parser


if __name__ == "__main__":
    sys.exit(main())
