"""Tiles of shared-QKV attention, keyed (kernel, bytes an element, head_dim padded to a power of two).

float32 tiles are small because exact products ("ieee") keep whole rows of both operands in registers; TF32, which takes
the same entries, would stand larger ones. What sm_90 does not list, it takes from the default.
"""

from __future__ import annotations

TABLE = {
    "sm_90": {
        # 64 rows are the least that wgmma takes, and one warp group works them.
        ("forward_kernel", 2, 16): {"BLOCK_QUERIES": 64, "BLOCK_KEYS": 64, "num_warps": 4, "num_stages": 3},
        ("forward_kernel", 2, 32): {"BLOCK_QUERIES": 64, "BLOCK_KEYS": 64, "num_warps": 4, "num_stages": 3},
        ("forward_kernel", 2, 64): {"BLOCK_QUERIES": 64, "BLOCK_KEYS": 64, "num_warps": 4, "num_stages": 3},
        ("forward_kernel", 2, 128): {"BLOCK_QUERIES": 64, "BLOCK_KEYS": 64, "num_warps": 4, "num_stages": 3},
        ("backward_kernel", 2, 16): {"BLOCK_J": 64, "BLOCK_I": 64, "num_warps": 4, "num_stages": 2},
        ("backward_kernel", 2, 32): {"BLOCK_J": 64, "BLOCK_I": 64, "num_warps": 4, "num_stages": 2},
        ("backward_kernel", 2, 64): {"BLOCK_J": 64, "BLOCK_I": 64, "num_warps": 4, "num_stages": 2},
        ("backward_kernel", 2, 128): {"BLOCK_J": 64, "BLOCK_I": 32, "num_warps": 4, "num_stages": 2},
    },
    "default": {
        ("forward_kernel", 2, 16): {"BLOCK_QUERIES": 64, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 2},
        ("forward_kernel", 2, 32): {"BLOCK_QUERIES": 64, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 2},
        ("forward_kernel", 2, 64): {"BLOCK_QUERIES": 64, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 2},
        ("forward_kernel", 2, 128): {"BLOCK_QUERIES": 32, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 2},
        ("forward_kernel", 4, 16): {"BLOCK_QUERIES": 32, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 2},
        ("forward_kernel", 4, 32): {"BLOCK_QUERIES": 32, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 2},
        ("forward_kernel", 4, 64): {"BLOCK_QUERIES": 32, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 2},
        ("forward_kernel", 4, 128): {"BLOCK_QUERIES": 32, "BLOCK_KEYS": 16, "num_warps": 4, "num_stages": 2},
        ("delta_kernel", 2, 16): {"BLOCK_ROWS": 64, "num_warps": 4, "num_stages": 1},
        ("delta_kernel", 2, 32): {"BLOCK_ROWS": 64, "num_warps": 4, "num_stages": 1},
        ("delta_kernel", 2, 64): {"BLOCK_ROWS": 64, "num_warps": 4, "num_stages": 1},
        ("delta_kernel", 2, 128): {"BLOCK_ROWS": 32, "num_warps": 4, "num_stages": 1},
        ("delta_kernel", 4, 16): {"BLOCK_ROWS": 32, "num_warps": 4, "num_stages": 1},
        ("delta_kernel", 4, 32): {"BLOCK_ROWS": 32, "num_warps": 4, "num_stages": 1},
        ("delta_kernel", 4, 64): {"BLOCK_ROWS": 32, "num_warps": 4, "num_stages": 1},
        ("delta_kernel", 4, 128): {"BLOCK_ROWS": 16, "num_warps": 4, "num_stages": 1},
        ("backward_kernel", 2, 16): {"BLOCK_J": 64, "BLOCK_I": 32, "num_warps": 4, "num_stages": 2},
        ("backward_kernel", 2, 32): {"BLOCK_J": 64, "BLOCK_I": 32, "num_warps": 4, "num_stages": 2},
        ("backward_kernel", 2, 64): {"BLOCK_J": 32, "BLOCK_I": 32, "num_warps": 4, "num_stages": 2},
        ("backward_kernel", 2, 128): {"BLOCK_J": 32, "BLOCK_I": 32, "num_warps": 4, "num_stages": 2},
        ("backward_kernel", 4, 16): {"BLOCK_J": 32, "BLOCK_I": 32, "num_warps": 4, "num_stages": 2},
        ("backward_kernel", 4, 32): {"BLOCK_J": 32, "BLOCK_I": 32, "num_warps": 4, "num_stages": 2},
        ("backward_kernel", 4, 64): {"BLOCK_J": 32, "BLOCK_I": 32, "num_warps": 8, "num_stages": 2},
        ("backward_kernel", 4, 128): {"BLOCK_J": 16, "BLOCK_I": 16, "num_warps": 8, "num_stages": 2},
    },
}
