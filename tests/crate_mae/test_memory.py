"""Bytes that a layer keeps for its backward, counted by saved-tensor hooks, against the official order under autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import crate_kernels
from benchmarks.memory import counting_saved
from crate_kernels.dispatch import load
from crate_kernels.precision import layer_norm
from crate_mae import create_model

BATCH, TOKENS, WIDTH = 256, 197, 768
UNIT = BATCH * TOKENS * WIDTH * 2  # one 16-bit [tokens, width] tensor


def softmax_as_on_cuda(w: Tensor, scale: float, *_: object) -> Tensor:
    """The official attention as CUDA's autocast runs it: a float32 softmax, which CPU autocast leaves in 16 bits."""
    probabilities = (torch.matmul(w, w.transpose(-1, -2)) * scale).float().softmax(dim=-1)
    return torch.matmul(probabilities, w)


def layer_norm_as_on_cuda(*arguments: object, **_: object) -> Tensor:
    """In float32 whatever comes, which a CPU's autocast leaves in 16 bits."""
    return layer_norm(*arguments)


def kept(kind: str, implementation: str, stream: torch.dtype, recompute: bool = False) -> int:
    """Bytes of what one layer of CRATE-MAE-Base saves, parameters and its own output (the next layer's input) aside."""
    with FakeTensorMode(), crate_kernels.use(implementation):
        model = create_model("crate_mae_base", depth=1, decoder_depth=1)
        x = torch.randn(BATCH, TOKENS, WIDTH, dtype=stream, requires_grad=True)
        with counting_saved(list(model.parameters())) as saved, torch.autocast("cpu"):
            y = getattr(model, kind)[0](x, recompute=recompute)
        return saved.bytes(without=y)


@pytest.mark.parametrize(
    ("kind", "official_tensors", "in_float32"),
    [("blocks", 21, (0.287, 0.191)), ("decoder_blocks", 19, (0.264, 0.158))],  # README states these, too
)
def test_share_of_the_official_order(
    kind: str, official_tensors: int, in_float32: tuple[float, float], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(load("mssa", "reference"), "shared_qkv_attention", softmax_as_on_cuda)
        for operator in ("mssa", "norm_linear"):
            patch.setattr(load(operator, "api"), "layer_norm", layer_norm_as_on_cuda)
        official = kept(kind, "reference", torch.float32)
    assert round(official / UNIT) == official_tensors, f"{official / UNIT:.2f} tensors"
    for recompute, bound, share in ((False, 0.22, in_float32[0]), (True, 0.12, in_float32[1])):
        ours = kept(kind, "triton", torch.bfloat16, recompute)
        float32 = kept(kind, "triton", torch.float32, recompute)
        print(
            f"{kind}{', recomputed' if recompute else ''}: {ours / UNIT:.2f} tensors of the official {official / UNIT:.2f}, "
            f"{ours / official:.1%}; float32 stream {float32 / official:.1%}"
        )
        assert ours <= bound * official
        assert float32 / official == pytest.approx(share, abs=5e-4)
