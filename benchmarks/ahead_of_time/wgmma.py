"""How a kernel for sm_90 multiplies by wgmma: what keeps its loops from the tensor cores' rate, and what a step costs at least.

A product runs at that rate only where its loop copies tiles into shared memory and multiplies them there, while the
multiplication of the step before still runs. Three things end that, and no result shows them: ptxas serialises wgmma whose
registers it cannot keep apart (C7510, C7515); a factor that something is done to on its way lies in registers; a step waits
for all that it has started. The first is read from ptxas' own words, the second from Triton's intermediate code (TTGIR), the
third from the machine code (SASS).

A loop's cycles are counted on each pipe as if all else were free: the highest count binds, and a program that waits is slower.
"""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import triton
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_manager

from benchmarks.ahead_of_time.addresses import NAME, Operation, found, parse


@dataclass(frozen=True)
class Loop:
    """One step of an innermost loop, as most steps are.

    instructions: of one warp, by kind.
    cycles: of a multiprocessor, for all warps of a block, by pipe; what TMA copies is not counted.
    in_flight: groups of wgmma that still run when the next step begins.
    """

    instructions: dict[str, int]
    cycles: dict[str, int]
    in_flight: int

    @property
    def binds(self) -> str:
        """The pipe that takes longest."""
        return max(self.cycles, key=lambda pipe: self.cycles[pipe])


@dataclass(frozen=True)
class Wgmma:
    """How one kernel multiplies by wgmma.

    loops: those that multiply, the one that multiplies most a step first.
    warnings: ptxas' own, of lost performance.
    from_registers: products (rows x inner) whose left factor lies in registers, though it came from memory.
    tails: loops told not to overlap their steps (``tl.range(..., num_stages=1)``): what is left of a walk, a step or two.
    """

    loops: list[Loop]
    warnings: list[str]
    from_registers: list[str]
    tails: int

    def breaches(self) -> list[str]:
        """What keeps the kernel from the tensor cores' rate, a line each."""
        lines = [f"ptxas: {warning}" for warning in self.warnings]
        if self.from_registers:
            factors = ", ".join(self.from_registers)
            lines.append(f"products whose left factor goes through registers: {factors} (rows x inner)")
        waiting = sum(not loop.in_flight for loop in self.loops)
        if waiting > self.tails or (waiting and not self.loops[0].in_flight):
            of = f"{waiting} of {len(self.loops)} loops"
            lines.append(
                f"{of} wait for every wgmma in each step; tails, which may beside one that does not: {self.tails}"
            )
        return lines


def read(compiled: Any) -> Wgmma:
    """Read the machine code of a ``triton.compiler.CompiledKernel``."""
    log = _kept(compiled, "ptxas", lambda: _ptxas_log(compiled))
    bodies = _innermost_loops(_kept(compiled, "sass", lambda: _disassemble(compiled.asm["cubin"])))
    loops = [_loop(body, compiled.metadata.num_warps) for body in bodies if any("HGMMA" in line for line in body)]
    from_registers, tails = _products(parse(compiled.asm["ttgir"]))
    return Wgmma(
        loops=sorted(loops, key=lambda loop: -loop.cycles["tensor"]),
        warnings=[line.partition(" : ")[2] for line in log.splitlines() if re.search("Performance Loss|warning", line)],
        from_registers=from_registers,
        tails=tails,
    )


def _kept(compiled: Any, name: str, make: Callable[[], str]) -> str:
    """The text that ``make`` makes of a kernel, kept beside the kernel in Triton's disk cache."""
    cache = get_cache_manager(compiled.hash)
    path = cache.get_file(name) or cache.put(make(), name, binary=False)
    return Path(path).read_text(encoding="utf-8")


def _ptxas_log(compiled: Any) -> str:
    """What ptxas prints when it is called as Triton calls it; Triton itself drops that."""
    backend = make_backend(compiled.metadata.target)
    stages: dict[str, Callable[[Any, dict[str, Any]], Any]] = {}
    backend.add_stages(stages, backend.parse_options(compiled.metadata._asdict()), compiled.src.language)
    with triton.knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as printed:
        triton.knobs.nvidia.dump_ptxas_log = True
        stages["cubin"](compiled.asm["ptx"], {})
    return printed.getvalue()


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _products(kernel: list[Operation]) -> tuple[list[str], int]:
    """Products that take from registers what need not be there, and tails: see ``Wgmma``.

    Where a factor is computed from another product, as attention's weights are, registers are where it is: through shared memory
    it would only go a longer way. A factor that came from memory need never have left it.
    """
    computed: set[str] = set()  # values that depend on a product
    left_in_registers: dict[str, str] = {}
    tails: set[str] = set()

    def walk(operations: list[Operation]) -> list[str]:
        """Names that the last of the operations yields."""
        for one in operations:
            yielded = [walk(region) for region in one.regions]
            if one.name == "scf.for":
                # What a loop carries depends on what it starts from, and on what a step leaves.
                pairs = re.findall(rf"({NAME}) = ({NAME})", one.text.partition("iter_args(")[2])
                for result, (inside, first), last in zip(one.results, pairs, *yielded, strict=False):
                    if not computed.isdisjoint((inside, first, last)):
                        computed.update((result, inside))
                if "tt.num_stages = 1 :" in one.end and any(each.name == _PRODUCT for each in one.regions[0]):
                    tails.add(one.text)
            elif one.name == "scf.if":
                for result, *ends in zip(one.results, *yielded, strict=False):
                    if not computed.isdisjoint(ends):
                        computed.add(result)
            elif one.name == _PRODUCT:
                where, shape = found(r" : ([\w!.]+)<(\d+x\d+)x", one.text).groups()
                if where == "tensor":
                    left_in_registers[one.results[0]] = shape
                if one.operands[0] in computed:
                    left_in_registers.pop(one.results[0], None)
                computed.update(one.results)
            elif not computed.isdisjoint(one.operands):
                computed.update(one.results)
        return operations[-1].operands if operations and operations[-1].name == "scf.yield" else []

    known = -1
    while len(computed) > known:
        known = len(computed)
        walk(kernel)
    return list(left_in_registers.values()), len(tails)


_PRODUCT = "ttng.warp_group_dot"


def _innermost_loops(sass: str) -> list[list[str]]:
    """The instructions, without predicates, of each stretch from a label to a jump back to it that no other such jump lies in.

    Without those that a step may jump over and that store to global memory and do not multiply: the epilogue of a persistent
    kernel, which runs once a tile within the loop over all steps of all tiles.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    conditional: list[tuple[int, str]] = []  # jumps that are not always taken: place and label
    loops, last_jump = [], -1
    for line in map(str.strip, sass.splitlines()):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"/\*[0-9a-f]{4,}\*/\s+\{?\s*(@!?U?P\w+\s+)?(.*?)\s*;", line):
            here = len(instructions)
            instructions.append(instruction[2])
            jump = re.match(r"BRA.*`\((\.L\w+)\)", instruction[2])
            if jump and jump[1] in labels:
                if labels[jump[1]] > last_jump:
                    loops.append(range(labels[jump[1]], here + 1))
                last_jump = here
            elif jump and instruction[1]:
                conditional.append((here, jump[1]))
    bodies = []
    for loop in loops:
        stretches = [
            range(here + 1, labels[label]) for here, label in conditional if here in loop and labels[label] in loop
        ]
        epilogues = [one for one in stretches if _is_epilogue([instructions[at] for at in one])]
        bodies.append([instructions[at] for at in loop if not any(at in one for one in epilogues)])
    return bodies


def _is_epilogue(instructions: Sequence[str]) -> bool:
    stores, multiplies = (any(map(re.compile(kind).match, instructions)) for kind in (r"STG\b|UTMASTG", "HGMMA"))
    return stores and not multiplies


# Kinds of instructions, the first that matches; the pipe, and cycles that one instruction of a warp takes of a multiprocessor's
# quarter at least: 32 lanes over the lanes a clock in the CUDA programming guide's table for compute capability 9.0.
_KINDS: tuple[tuple[str, str, str | None, int], ...] = (
    ("HGMMA", "HGMMA", None, 0),
    ("HMMA", "HMMA", "tensor", 4),
    ("LDGSTS", "LDGSTS", None, 0),
    ("LDS", "LDS", None, 0),
    ("STS", "STS|ATOMS", None, 0),
    ("LDG", r"LDG\b|LD\b", None, 0),
    ("STG", r"STG\b|ST\b|RED\b|ATOM", None, 0),
    ("TMA", "UTMA|UBLK", None, 0),
    ("SHFL", "SHFL", None, 0),
    ("MUFU", "MUFU", "MUFU", 8),
    ("BAR", "BAR|SYNCS", None, 0),
    ("wait", "WARPGROUP|DEPBAR|LDGDEPBAR|FENCE|MEMBAR|WARPSYNC|NOP", None, 0),
    ("FFMA", "FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2", "FFMA", 1),
    ("IMAD", "IMAD", "FFMA", 2),
    ("uniform", "U[A-Z]|R2UR|S2R|S2UR|CS2R|LDC", None, 0),
    ("branch", "BRA|EXIT|BSSY|BSYNC|CALL|RET", None, 0),
    ("ALU", "", "ALU", 2),
)
# Bytes a clock of a multiprocessor's shared memory, and its share of the 5,120 that NVIDIA's paper gives for the A100's L2 cache.
_SHARED, _L2 = 128, 5120 / 132
# Floating-point operations a clock of a multiprocessor's tensor cores, on 16-bit factors.
_TENSOR = 4096


def _loop(body: list[str], warps: int) -> Loop:
    instructions: Counter[str] = Counter()
    # Of one warp in a quarter, and of one warp in what the quarters share.
    quarter: dict[str, float] = dict(tensor=0, issue=len(body), MUFU=0, FFMA=0, ALU=0)
    shared: dict[str, float] = dict(shared=0, L2=0)
    for text in body:
        name = text.split()[0]
        kind, _, pipe, count = next(entry for entry in _KINDS if re.match(entry[1], name))
        instructions[kind] += 1
        if pipe:
            quarter[pipe] += count
        width = found(r"\.(?:(128|64)|[US](16|8))\b|$", name)
        size = 32 * int(width[1] or width[2] or 32) // 8  # bytes of 32 lanes
        if kind == "HGMMA":  # four warps multiply together
            columns, depth = map(int, found(r"\AHGMMA\.64x(\d+)x(\d+)", name).groups())
            wide = 2 if ".TF32" in name else 1
            quarter["tensor"] += 2 * 64 * columns * depth * wide / _TENSOR
            rows = columns if re.search(r" R\d+, R\d+\S*, gdesc", text) else columns + 64
            shared["shared"] += rows * depth * 2 * wide / _SHARED / 4
        elif kind == "SHFL":
            shared["shared"] += 1
        elif re.match("LDSM|STSM", name):  # so many matrices of 128 bytes
            shared["shared"] += int(found(r"\.(\d)$|$", name)[1] or 1)
        elif kind in ("LDS", "STS", "LDGSTS"):
            shared["shared"] += max(1, size / _SHARED)
        if kind == "LDGSTS":
            shared["L2"] += size / _L2
    cycles = {pipe: ceil(count * warps / 4) for pipe, count in quarter.items()}
    cycles |= {pipe: ceil(count * warps) for pipe, count in shared.items()}
    return Loop(dict(instructions), cycles, _in_flight(body))


def _in_flight(body: list[str]) -> int:
    """Groups of wgmma that run on when a step ends, if the step before left as many."""
    running = 0
    for text in body + body:
        if re.match(r"HGMMA.*\bgsb0\b", text):  # the last of a group
            running += 1
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", text):
            running = min(running, int(wait[1], 16))
    return running
