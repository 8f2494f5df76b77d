"""GPU architectures that kernels are compiled for: what a multiprocessor offers, and what a compiled kernel takes of it."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses: registers and spilled bytes a thread, shared memory and warps a block.

    spilled_registers, spilled_scalars: as AMD's compiler counts them. Scalars go to lanes of vector registers: no memory.
    tensor_memory: columns of a block (sm_100).
    matrix: matrix instructions in the assembly, by kind.
    """

    warps: int
    registers: int
    spill_bytes: int
    spilled_registers: int
    spilled_scalars: int
    shared_bytes: int
    tensor_memory: int
    matrix: dict[str, int]


class Target(ABC):
    """One architecture; ``shared_bytes`` are those of a multiprocessor."""

    shared_bytes: int

    @property
    @abstractmethod
    def gpu(self) -> GPUTarget:
        """The architecture as Triton names it."""

    @property
    @abstractmethod
    def shared_bytes_per_block(self) -> int: ...

    @abstractmethod
    def occupancy(self, usage: Usage) -> float:
        """The fraction of the warp slots that blocks like this one fill."""

    @abstractmethod
    def usage(self, compiled: Any) -> Usage:
        """What a ``triton.compiler.CompiledKernel`` uses, read from its machine code."""


@dataclass(frozen=True)
class Nvidia(Target):
    """An NVIDIA GPU; numbers from the CUDA programming guide's table of compute capabilities."""

    capability: int
    shared_bytes: int
    warps: int
    blocks: int
    tensor_memory: int = 0

    REGISTERS = 65536
    # The driver keeps 1 KB of shared memory for each block.
    RESERVED = 1024

    @property
    def gpu(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    @property
    def shared_bytes_per_block(self) -> int:
        return self.shared_bytes - self.RESERVED

    def occupancy(self, usage: Usage) -> float:
        # A warp's registers are given out in units of 256.
        registers = 256 * math.ceil(32 * usage.registers / 256) * usage.warps
        blocks = min(
            self.blocks,
            self.warps // usage.warps,
            self.REGISTERS // registers,
            self.shared_bytes // (usage.shared_bytes + self.RESERVED),
        )
        if usage.tensor_memory:
            blocks = min(blocks, self.tensor_memory // usage.tensor_memory)
        return blocks * usage.warps / self.warps

    def usage(self, compiled: Any) -> Usage:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
        return Usage(
            warps=compiled.metadata.num_warps,
            registers=found["REG"],
            spill_bytes=found["STACK"] + found["LOCAL"],
            spilled_registers=0,
            spilled_scalars=0,
            shared_bytes=compiled.metadata.shared,
            tensor_memory=compiled.metadata.tmem_size or 0,
            matrix=_matrix_instructions(compiled.asm["ptx"]),
        )


@dataclass(frozen=True)
class Amd(Target):
    """A compute unit of CDNA3, from its instruction set's manual and LLVM's description of the AMDGPU target.

    Four SIMDs hold up to eight waves each; the waves of a SIMD share 512 registers a lane, accumulators included.
    """

    name: str
    shared_bytes: int = 64 * 1024
    simds: int = 4
    waves: int = 8
    registers: int = 512

    # Units in which registers of a wave and shared memory of a block are given out.
    REGISTER_UNIT = 8
    SHARED_UNIT = 512

    @property
    def gpu(self) -> GPUTarget:
        return GPUTarget("hip", self.name, 64)

    @property
    def shared_bytes_per_block(self) -> int:
        return self.shared_bytes

    def occupancy(self, usage: Usage) -> float:
        taken = self.REGISTER_UNIT * math.ceil(usage.registers / self.REGISTER_UNIT)
        blocks = self.simds * min(self.waves, self.registers // taken) // usage.warps
        if usage.shared_bytes:
            blocks = min(
                blocks, self.shared_bytes // (self.SHARED_UNIT * math.ceil(usage.shared_bytes / self.SHARED_UNIT))
            )
        return blocks * usage.warps / (self.simds * self.waves)

    def usage(self, compiled: Any) -> Usage:
        assembly = compiled.asm["amdgcn"]
        # The YAML that the runtime reads; .vgpr_count includes accumulation registers on this family.
        found = {name: int(value) for name, value in re.findall(r"^ +-? *\.(\w+): +(\d+)$", assembly, re.MULTILINE)}
        return Usage(
            warps=compiled.metadata.num_warps,
            registers=found["vgpr_count"],
            spill_bytes=found["private_segment_fixed_size"],
            spilled_registers=found["vgpr_spill_count"],
            spilled_scalars=found["sgpr_spill_count"],
            # Triton asks for its shared memory at launch; the assembly knows only what is fixed besides.
            shared_bytes=compiled.metadata.shared + found["group_segment_fixed_size"],
            tensor_memory=0,
            matrix=_matrix_instructions(assembly),
        )


# How PTX spells the matrix instructions of Ampere, Hopper and Blackwell, and AMD's assembly those of CDNA.
_MATRIX_INSTRUCTIONS = {
    "mma": r"\bmma\.sync\b",
    "wgmma": r"\bwgmma\.mma_async\b",
    "tcgen05": r"\btcgen05\.mma\b",
    "mfma": r"\bv_mfma_\w+",
}


def _matrix_instructions(assembly: str) -> dict[str, int]:
    counts = {kind: len(re.findall(pattern, assembly)) for kind, pattern in _MATRIX_INSTRUCTIONS.items()}
    return {kind: count for kind, count in counts.items() if count}


TARGETS: dict[str, Target] = {
    "sm_80": Nvidia(80, 164 * 1024, warps=64, blocks=32),
    "sm_86": Nvidia(86, 100 * 1024, warps=48, blocks=16),
    "sm_89": Nvidia(89, 100 * 1024, warps=48, blocks=24),
    "sm_90": Nvidia(90, 228 * 1024, warps=64, blocks=32),
    "sm_100": Nvidia(100, 228 * 1024, warps=64, blocks=32, tensor_memory=512),
    "gfx942": Amd("gfx942"),
}
