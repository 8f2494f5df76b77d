"""Tiles of shared-QKV attention, keyed (kernel, bytes an element, head width rounded up to what its tiles hold).

A program owns BLOCK_ROWS rows and goes over all tokens in tiles of BLOCK_COLUMNS. float32 tiles are small because exact products
("ieee") keep whole rows of both operands in registers; TF32 takes the same entries, though larger ones would fit. Keys that
sm_90 does not list are taken from the default.
"""

from __future__ import annotations

WIDTHS = (16, 32, 48, 64, 80, 96, 128)


def _tile(rows: int, columns: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "num_warps": num_warps, "num_stages": num_stages}


def _rows(rows: int) -> dict[str, int]:
    return {"BLOCK_ROWS": rows, "num_warps": 4, "num_stages": 1}


# For the last rows of a head on sm_90, where there are at most so many: one warp does 16 rows with the tensor cores' small
# instruction, in a third to a half of the time that a program of 64 rows takes for them by the model of the machine code
# (benchmarks/NOTES.md). From how many heads on that is worth a launch is an assumption: nobody has measured it.
LAST_ROWS = {
    **{("forward_kernel", width): _tile(16, 16, 1, 3) for width in WIDTHS},
    **{("backward_kernel", width): _tile(16, 16, 1, 3) for width in WIDTHS},
    ("backward_kernel", 128): _tile(16, 32, 2, 3),
}
MANY_HEADS = 1024

TABLE = {
    "sm_90": {
        # wgmma takes at least 64 rows, and one warp group does them.
        **{("forward_kernel", 2, width): _tile(64, 64, 4, 3) for width in WIDTHS},
        # Three blocks fit as without a cap, but the compiler orders the code of long walks better.
        ("forward_kernel", 2, 128): _tile(64, 64, 4, 3) | {"maxnreg": 168},
        **{("backward_kernel", 2, width): _tile(64, 32, 4, 3) for width in WIDTHS},
        # A third stage takes so many registers that only two blocks fit on a multiprocessor.
        ("backward_kernel", 2, 96): _tile(64, 32, 4, 2),
    },
    # Triton 3.7 spills at the default's 64 x 32.
    "sm_100": {("forward_kernel", 2, 64): _tile(64, 64, 4, 2)},
    "default": {
        **{("forward_kernel", 2, width): _tile(64, 32, 4, 2) for width in (16, 32, 48, 64)},
        **{("forward_kernel", 2, width): _tile(32, 32, 4, 2) for width in (80, 96, 128)},
        **{("forward_kernel", 4, width): _tile(32, 32, 4, 2) for width in (16, 32, 48, 64)},
        **{("forward_kernel", 4, width): _tile(32, 16, 4, 2) for width in (80, 96, 128)},
        **{("row_pairs_kernel", 2, width): _rows(64) for width in (16, 32, 48, 64)},
        **{("row_pairs_kernel", 2, width): _rows(32) for width in (80, 96, 128)},
        **{("row_pairs_kernel", 4, width): _rows(32) for width in (16, 32, 48, 64)},
        **{("row_pairs_kernel", 4, width): _rows(16) for width in (80, 96, 128)},
        **{("backward_kernel", 2, width): _tile(64, 32, 4, 2) for width in (16, 32)},
        **{("backward_kernel", 2, width): _tile(32, 32, 4, 2) for width in (48, 64)},
        ("backward_kernel", 2, 80): _tile(64, 32, 8, 2),
        ("backward_kernel", 2, 96): _tile(64, 16, 8, 2),  # 32 columns spill on sm_80
        ("backward_kernel", 2, 128): _tile(32, 32, 4, 1),  # a second stage spills on sm_80 with Triton 3.6
        ("backward_kernel", 4, 16): _tile(32, 32, 4, 2),
        ("backward_kernel", 4, 32): _tile(32, 16, 8, 2),  # 32 columns spill on sm_90 with Triton 3.9
        **{("backward_kernel", 4, width): _tile(32, 32, 8, 2) for width in (48, 64)},
        **{("backward_kernel", 4, width): _tile(16, 16, 8, 2) for width in (80, 96, 128)},
    },
}
