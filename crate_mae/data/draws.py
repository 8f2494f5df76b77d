"""The random numbers of images, drawn for a whole batch at once.

A NumPy generator for each image would take a tenth of the time of decoding it. These are the numbers of SplitMix64 (Steele, Lea,
Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), which computes any number of a sequence by itself. The
sequence of an image begins at a hash of (seed, pass, image).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_STEP = 0x9E3779B97F4A7C15


def uniform(seed: int, keys: Sequence[tuple[int, int]], count: int) -> np.ndarray:
    """float64 [len(keys), count]: numbers in [0, 1) of 53 bits, each row a function of the seed and its key (pass, image).

    Args:
        seed: 0 to 2**64 - 1.
    """
    passes, images = np.array(keys, dtype=np.uint64).reshape(-1, 2).T
    step = np.uint64(_STEP)
    begin = np.array([seed], dtype=np.uint64)
    for part in (passes, images):
        begin = _mixed(begin + step) + part
    steps = np.arange(1, count + 1, dtype=np.uint64) * step
    return (_mixed(_mixed(begin + step)[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: one to one, and each bit depends on all bits."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
