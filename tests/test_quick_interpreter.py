"""What makes Triton's interpreter quick changes none of its results."""

from __future__ import annotations

import pytest
import torch
from quick_interpreter import as_released
from support import gradients
from torch import Tensor

import crate_kernels

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a device")


def block(x: Tensor, gamma: Tensor, beta: Tensor, qkv: Tensor, out: Tensor, bias: Tensor, dictionary: Tensor) -> Tensor:
    norm = dict(norm_weight=gamma, norm_bias=beta)
    z = crate_kernels.mssa(x, qkv, out, bias, num_heads=2, skip=x, **norm)
    return crate_kernels.ista(z, dictionary, **norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_same_bits_as_triton_releases_it(dtype: torch.dtype) -> None:
    shapes = [(2, 19, 24), (24,), (24,), (32, 24), (24, 32), (24,), (24, 24)]
    inputs = [torch.randn(shape).to(dtype) / shape[-1] ** 0.5 for shape in shapes]
    upstream = torch.randn(2, 19, 24).to(dtype)
    with crate_kernels.use("triton"):
        found = gradients(block, inputs, upstream)
        with as_released():
            assert interpreter._patch_lang.__module__ == "triton.runtime.interpreter"
            expected = gradients(block, inputs, upstream)
    assert interpreter._patch_lang.__module__ == "quick_interpreter"
    assert all(torch.equal(a, b) and a.isfinite().all() and a.any() for a, b in zip(found, expected, strict=True))
