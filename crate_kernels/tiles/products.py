"""Tiles of the large products, keyed (kernel, bytes an element of the operands, bytes an element of the stream).

The stream is x, y and their gradients; under autocast it may stay float32 while the operands are 16-bit: loops read operands,
epilogues the stream. The ``default`` entries fit the 99 KB a block may use on consumer devices.
"""

from __future__ import annotations


def _tile(block_m: int, block_n: int, block_k: int, group: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "GROUP": group,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


TABLE = {
    "sm_90": {
        ("project", 2, 2): _tile(128, 128, 64, 8, 8, 3),
        ("project", 2, 4): _tile(128, 128, 64, 8, 8, 3),
        ("project", 4, 4): _tile(64, 64, 32, 8, 4, 3),
        ("input_gradient", 2, 2): _tile(64, 128, 64, 8, 4, 4),
        ("input_gradient", 2, 4): _tile(64, 128, 64, 8, 4, 4),
        ("input_gradient", 4, 4): _tile(64, 64, 32, 8, 4, 3),
    },
    "default": {
        ("project", 2, 2): _tile(128, 128, 32, 8, 8, 4),
        ("project", 2, 4): _tile(128, 128, 32, 8, 8, 4),
        ("project", 4, 4): _tile(64, 64, 32, 8, 4, 3),
        ("input_gradient", 2, 2): _tile(128, 128, 32, 8, 8, 3),
        ("input_gradient", 2, 4): _tile(64, 128, 32, 8, 8, 3),
        ("input_gradient", 4, 4): _tile(64, 64, 32, 8, 4, 2),
    },
}
