"""The learning rate of each step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, peak: float, final: float, warmup_steps: int, total_steps: int) -> float:
    """Linear from peak / warmup_steps to `peak` at the end of the warm-up, then half a cosine down to `final`.

    The rate of the first step is above zero, and that of the last (total_steps - 1) is `final`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
