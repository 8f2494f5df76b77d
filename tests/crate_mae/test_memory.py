"""Bytes that a layer keeps for its backward, counted by saved-tensor hooks, against the official order under autocast."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import saved_by_layer

BATCH, TOKENS, WIDTH = 256, 197, 768
UNIT = BATCH * TOKENS * WIDTH * 2  # one 16-bit [tokens, width] tensor


def kept(layer: str, name: str) -> int:
    return saved_by_layer(layer, name, "crate_mae_base", {}, BATCH, torch.bfloat16)


@pytest.mark.parametrize(("layer", "official_tensors"), [("encoder_layer", 21), ("decoder_layer", 19)])
def test_share_of_the_official_order(layer: str, official_tensors: int) -> None:
    official = kept(layer, "reference")
    assert round(official / UNIT) == official_tensors, f"{official / UNIT:.2f} tensors"
    bounds = {"triton 16bit": 0.22, "triton recompute": 0.12, "triton": 0.30, "triton float32 recompute": 0.20}
    for name, bound in bounds.items():
        ours = kept(layer, name)
        print(
            f"{layer}, {name}: {ours / UNIT:.2f} tensors of the official {official / UNIT:.2f}, {ours / official:.1%}"
        )
        assert 0 < ours <= bound * official
