"""Tiles of MSSA's projection and attention in one launch, keyed (kernel, bytes an element of the operands, head width up to).

A program takes the tokens of a sample in tiles of BLOCK_ROWS, first to project them, BLOCK_K features at a time, then as queries
that walk the keys in tiles of BLOCK_COLUMNS. It runs where its multiprocessor has little else to do, so on sm_90 the tiles are
tall and the warps eight. The default's spill in none of the gate's cases; beyond those, narrow causal heads (16-bit on sm_100,
float32 on sm_90) and float32 on sm_100 spill 8 to 16 bytes.
"""

from __future__ import annotations

WIDTHS = (64, 96, 128)


def _tile(rows: int, columns: int, inner: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_COLUMNS": columns,
        "BLOCK_K": inner,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


TABLE = {
    "sm_90": {
        # 64 rows for each of two warp groups, the least that wgmma takes.
        ("attend_kernel", 2, 64): _tile(128, 64, 64, 8, 3),
        ("attend_kernel", 2, 96): _tile(128, 64, 64, 8, 2),
        ("attend_kernel", 2, 128): _tile(128, 64, 64, 8, 2),
    },
    "default": {
        ("attend_kernel", 2, 64): _tile(64, 32, 32, 4, 2),
        ("attend_kernel", 2, 96): _tile(32, 32, 32, 4, 2),
        ("attend_kernel", 2, 128): _tile(64, 32, 32, 4, 2),
        ("attend_kernel", 4, 64): _tile(32, 16, 16, 8, 1),
        ("attend_kernel", 4, 96): _tile(32, 16, 32, 4, 2),
        ("attend_kernel", 4, 128): _tile(32, 16, 16, 8, 1),
    },
}
