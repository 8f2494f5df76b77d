"""The kernels of cases compiled, what they use, and which bounds that breaks."""

from __future__ import annotations

import importlib
import multiprocessing
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import triton

import crate_kernels
from benchmarks.ahead_of_time import addresses, wgmma
from benchmarks.ahead_of_time.addresses import Launch
from benchmarks.ahead_of_time.collecting import Case, requests
from benchmarks.ahead_of_time.targets import TARGETS, Usage
from benchmarks.ahead_of_time.wgmma import Wgmma
from crate_kernels import tiles
from crate_kernels.tiles.compiling import Request, brief, compile, jit_function


@dataclass(frozen=True)
class Figures(Usage):
    """What one compiled kernel uses, which it is, and how its products and addresses are made.

    module, kernel: where it is defined, and its name there.
    dtype, shape: those of the first case that asks for it.
    products: 16-bit products in the kernel's code; matrix: matrix instructions in its assembly, by kind.
    reach: the largest offset, in elements, that an address has at any launch of it.
    wgmma: how it multiplies, where it has 16-bit products and multiplies by wgmma; slow: why that need not be fast, if so.
    """

    module: str
    kernel: str
    arch: str
    dtype: str
    shape: str
    tile: str
    stages: int
    occupancy: float
    products: int
    products_without_wgmma: list[str]
    reach: int
    address_breaches: list[str]
    wgmma: Wgmma | None
    slow: str

    @property
    def path(self) -> str:
        """Module and name: two modules may have kernels of one name."""
        return f"{self.module}.{self.kernel}"


def compile_request(
    request: Request, launches: Sequence[Launch], arch: str, dtype: str, shape: str, slow: str
) -> Figures:
    """Compile one kernel (or find it in Triton's disk cache), read its assembly, and check its addresses at ``launches``.

    Runs in a process other than the one that collects requests: there, Triton would try to launch what it has compiled.
    """
    compiled, _ = compile(request)
    target = TARGETS[arch]
    usage = target.usage(compiled)
    names = compiled.src.fn.arg_names
    blocks = [value for (index, *_), value in compiled.src.constants.items() if names[index].startswith("BLOCK")]
    # A product that Triton leaves to the older mma instructions is still a tt.dot after lowering; wgmma's is warp_group_dot.
    older = _products(compiled.asm["ttgir"]) if arch == "sm_90" else []
    products = len(_products(compiled.asm["ttir"]))
    reports = [addresses.check(compiled.asm["ttir"], launch) for launch in launches]
    return Figures(
        **vars(usage),
        module=request.module,
        kernel=request.kernel,
        arch=arch,
        dtype=dtype,
        shape=shape,
        tile="x".join(map(str, blocks)),
        stages=compiled.metadata.num_stages,
        occupancy=target.occupancy(usage),
        products=products,
        products_without_wgmma=older,
        reach=max(report.reach for report in reports),
        address_breaches=sorted({breach for report in reports for breach in report.breaches}),
        wgmma=wgmma.read(compiled) if products and "wgmma" in usage.matrix else None,
        slow=slow,
    )


def _products(code: str) -> list[str]:
    """The 16-bit products in intermediate code, as rows x inner x columns."""
    found = re.findall(r"tt\.dot .* : tensor<(\d+x\d+)x(?:bf16|f16).* \* tensor<\d+x(\d+)x", code)
    return [f"{left}x{columns}" for left, columns in found]


def compile_all(wanted: Mapping[str, Sequence[Case]], jobs: int) -> tuple[list[Figures], list[str]]:
    """Figures of every kernel that the cases of each architecture launch, identical compilations once; and what failed."""
    labels: dict[Request, tuple[str, str, str]] = {}
    slow: dict[Request, str] = {}
    launches: dict[Request, dict[Launch, None]] = {}
    figures: list[Figures] = []
    failures: list[str] = []
    for arch, cases in wanted.items():
        for case in cases:
            try:
                for request, launch in requests(case, arch):
                    labels.setdefault(request, (arch, case.dtype, case.shape))
                    launches.setdefault(request, {})[launch] = None
                    # Every case that launches it must be one that may be slow.
                    slow[request] = case.slow and slow.get(request, case.slow)
            except Exception as error:  # whatever a launcher or Triton raises: the rest is still worth compiling
                failures.append(f"{case.operator} {arch} {case.dtype} {case.shape}: not launched, {brief(error)}")
    # Spawned, not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = [
            pool.submit(_figures_or_failure, one, list(launches[one]), *label, slow[one])
            for one, label in labels.items()
        ]
        for done, task in enumerate(pending, 1):
            result = task.result()
            # Whoever waits can tell work from a hang.
            print(f"{done} of {len(pending)} compiled", file=sys.stderr, flush=True)
            if isinstance(result, str):
                failures.append(result)
            else:
                figures.append(result)
    return sorted(figures, key=lambda f: (f.kernel, f.arch, f.dtype, f.shape)), failures


def _figures_or_failure(
    request: Request, launches: Sequence[Launch], arch: str, dtype: str, shape: str, slow: str
) -> Figures | str:
    """``compile_request``, or its error in words: an exception would lose its cause on the way between processes."""
    try:
        return compile_request(request, launches, arch, dtype, shape, slow)
    except Exception as error:
        return f"{request.kernel} {arch} {dtype} {shape}: not compiled, {brief(error)}"


# A thread of sm_90 has 255. A kernel that takes them all may have wanted more, and spills by another version of ptxas.
MOST_REGISTERS = 254


def breaches(figures: Figures) -> list[str]:
    """The bounds that ``figures`` break, one line each."""
    name = _name(figures)
    found = []
    if figures.spill_bytes or figures.spilled_registers:
        registers = f" ({figures.spilled_registers} registers)" * bool(figures.spilled_registers)
        found.append(f"{name}: spills {figures.spill_bytes} bytes a thread{registers}")
    limit = TARGETS[figures.arch].shared_bytes_per_block
    if figures.shared_bytes > limit:
        found.append(f"{name}: {figures.shared_bytes} bytes of shared memory, the device has {limit}")
    tall = [product for product in figures.products_without_wgmma if int(product.split("x")[0]) >= 64]
    if tall:
        found.append(f"{name}: 16-bit products not on wgmma: {', '.join(tall)} (rows x inner x columns)")
    if not figures.slow:
        found += slowness(figures)
    return found + [f"{name}: {breach}" for breach in figures.address_breaches]


def slowness(figures: Figures) -> list[str]:
    """What keeps a kernel from the tensor cores' rate, one line each: breaches, unless it need not be fast."""
    if figures.wgmma is None:
        return []
    found = figures.wgmma.breaches()
    if figures.registers > MOST_REGISTERS:
        found.append(f"{figures.registers} registers a thread, at most {MOST_REGISTERS} are asked for")
    return [f"{_name(figures)}: {breach}" for breach in found]


def _name(figures: Figures) -> str:
    return f"{figures.kernel} {figures.arch} {figures.dtype} {figures.shape}, tile {figures.tile}"


def missing(figures: Sequence[Figures], unused_tiles: Sequence[str]) -> list[str]:
    """A line for each kernel and shipped tile that no case compiles, and each kernel that no case takes past 2^31 elements."""
    reach: dict[str, int] = {}
    for one in figures:
        reach[one.path] = max(one.reach, reach.get(one.path, 0))
    found = [f"{kernel}: no case compiles it" for kernel in sorted(entry_kernels() - set(reach))]
    for kernel, furthest in sorted(reach.items()):
        if furthest < addresses.REACH_OF_32_BITS:
            found.append(f"{kernel}: no case takes its addresses past 2^31 elements, {furthest} is the furthest")
    return found + [f"{tile}: no case compiles it" for tile in unused_tiles]


def _modules(package: ModuleType) -> list[ModuleType]:
    return [
        importlib.import_module(found.name) for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]


def entry_kernels() -> set[str]:
    """Paths of the kernels that launchers start: the JIT functions in crate_kernels that no other JIT function calls."""
    kernels = {
        jit_function(value)
        for module in _modules(crate_kernels)
        for value in vars(module).values()
        if isinstance(value, triton.runtime.KernelInterface)
    }
    functions = [kernel.fn for kernel in kernels]
    # By what a name stands for where it is called: elsewhere a kernel may have the same name.
    called = {function.__globals__.get(name) for function in functions for name in function.__code__.co_names}
    return {f"{kernel.module}.{kernel.fn.__name__}" for kernel in kernels if kernel not in called}


class _Watched(dict):
    """A family's tiles, remembering which were asked for."""

    def __init__(self, entries: Mapping[tuple, Any]) -> None:
        super().__init__(entries)
        self.asked: set[tuple] = set()

    def __getitem__(self, key: tuple) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: tuple, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


@contextmanager
def unused_tiles() -> Iterator[list[str]]:
    """A list that on leaving the block has the shipped tiles that no launcher asked for within it."""
    unused: list[str] = []
    tables = [(module, module.TABLE, dict(module.TABLE)) for module in _modules(tiles) if hasattr(module, "TABLE")]
    for _, table, shipped in tables:
        table.update({family: _Watched(entries) for family, entries in shipped.items()})
    try:
        yield unused
    finally:
        for module, table, shipped in tables:
            name = module.__name__.rpartition(".")[2]
            for family, watched in table.items():
                unused += [f"tile of {name} for {family} {key}" for key in watched if key not in watched.asked]
            table.update(shipped)
