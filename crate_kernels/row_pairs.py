"""The two numbers that attention's backward reads of each row of scores, side by side, so that one load brings both.

They are written by attention's own kernel (``row_pairs_kernel``), or behind the product that makes the gradient of attention's
output, where that is in registers (``input_gradient_kernel``).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def store_row_pairs(pairs, lse, rows, delta, scale, mask):
    """At ``rows`` of ``pairs`` [all rows, 2], float32: the log-sum-exp times log2(e), or 0 for a row without a key, whose
    probabilities are all masked; and scale * delta, for delta = rowsum(dO * O)."""
    exponent = tl.load(lse + rows, mask=mask, other=0.0) * LOG2_E
    tl.store(pairs + 2 * rows, tl.where(exponent == float("-inf"), 0.0, exponent), mask=mask)
    tl.store(pairs + 2 * rows + 1, scale * delta, mask=mask)
