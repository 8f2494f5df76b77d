"""Tiles of the large products, keyed (kernel, use, bytes an element of the operands, bytes an element of the stream).

The stream is x, y and their gradients. Under autocast it may stay float32 while the operands of the products are 16-bit: the loop
of a kernel reads operands, its epilogue (what follows the product) reads the stream.

The use says how much an epilogue holds in registers:
    "plain": a product and what is added to it.
    "norm": of ``project``, a product of folded tokens; of ``input_gradient``, the gradient of any LayerNorm.
    "masked": ISTA's, with threshold and skip.
    "moments": of ``project``, a plain product that also gives the moments of its result.
An epilogue works on its tile in PARTS, groups of columns one after the other. ``maxnreg`` caps the registers of a thread where an
epilogue would take all that there are. The ``default`` entries fit the 99 KB of shared memory that a block may use on consumer
devices.

With PERSISTENT = 1 as many programs as the device has multiprocessors go through all tiles, and the copy engine (TMA) loads the
factors by descriptors: the first loads of a tile run during the epilogue of the one before. Where a descriptor cannot name a
factor (``launchers``), the tile of the ``default`` family is taken.

With LIBRARY = 1 PyTorch multiplies, into a float32 matrix, and the kernel does only the epilogue. No shipped tile does: on an
H100 ``torch.mm`` takes 82 us for 50,432 x 768 x 768 within a training step, and the epilogue then has to read 155 MB that it
otherwise has in registers. (Weight gradients have no epilogue, and are ``torch.mm`` on every device.)
"""

from __future__ import annotations

USES = ("plain", "norm", "masked")


def _tile(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int, **more: int) -> dict[str, int]:
    sizes = dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=8, PARTS=1, LIBRARY=0, PERSISTENT=0)
    return {**sizes, "num_warps": num_warps, "num_stages": num_stages, **more}


def _persistent(parts: int, **more: int) -> dict[str, int]:
    """The widest tile whose sums fit the registers of 8 warps; steps so short that six of them are under way. The more of the
    stream an epilogue reads, the more parts it needs beside the sums."""
    return _tile(128, 256, 32, 8, 6, PARTS=parts, PERSISTENT=1, **more)


TABLE = {
    "sm_90": {
        ("project", "plain", 2, 2): _persistent(2),
        ("project", "moments", 2, 2): _persistent(2, maxnreg=248),
        ("project", "norm", 2, 2): _persistent(4),
        ("project", "masked", 2, 2): _persistent(4),
        ("input_gradient", "plain", 2, 2): _persistent(2),
        ("input_gradient", "norm", 2, 2): _persistent(4),
        ("input_gradient", "masked", 2, 2): _persistent(4),
        ("project", "plain", 2, 4): _persistent(4),
        ("project", "masked", 2, 4): _persistent(4),
        ("input_gradient", "plain", 2, 4): _persistent(4),
        ("input_gradient", "norm", 2, 4): _persistent(8),
        ("input_gradient", "masked", 2, 4): _persistent(16),
        **{("project", use, 4, 4): _tile(64, 64, 32, 4, 3) for use in ("plain", "masked")},
        **{("input_gradient", use, 4, 4): _tile(64, 64, 32, 4, 3) for use in USES},
    },
    # Here sums lie in tensor memory, which holds those of two tiles.
    "sm_100": {
        (kernel, use, 2, 2): _tile(128, 256, 64, 8, 4, PARTS=4, PERSISTENT=1)
        for kernel, uses in (("project", (*USES, "moments")), ("input_gradient", USES))
        for use in uses
    },
    "default": {
        **{("project", use, 2, 2): _tile(128, 128, 32, 8, 4) for use in USES},
        **{("project", use, 2, 2): _tile(128, 128, 32, 8, 4, PARTS=2) for use in ("masked", "moments")},
        **{("project", use, 2, 4): _tile(128, 128, 32, 8, 4) for use in ("plain", "masked")},
        **{("project", use, 4, 4): _tile(64, 64, 32, 4, 3) for use in ("plain", "masked")},
        **{("input_gradient", use, 2, 2): _tile(128, 128, 32, 8, 3) for use in USES},
        **{("input_gradient", use, 2, 4): _tile(64, 128, 32, 8, 3) for use in USES},
        **{("input_gradient", use, 4, 4): _tile(64, 64, 32, 4, 2) for use in USES},
    },
}
