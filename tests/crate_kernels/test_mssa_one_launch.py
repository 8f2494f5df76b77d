"""MSSA's projection and attention in one launch, against the two launches that it stands in for, and float64."""

from __future__ import annotations

import os
import re
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support import a_few_roundings, error, gradients
from torch import Tensor

pytest.importorskip("triton")

import crate_kernels
from benchmarks import ROOT
from benchmarks.parts import run_while_it_tells
from crate_kernels import mssa
from crate_kernels.mssa import one_launch as together
from crate_kernels.mssa import triton as kernels
from crate_kernels.products.operand import Norm, Operand
from crate_kernels.products.preparation import prepare

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def problem(
    tokens: int, head_dim: int, width: int = 40, heads: int = 2, batch: int = 2, mean: float = 0.5
) -> tuple[Tensor, Tensor, Norm]:
    """x, U and a LayerNorm, in float32."""
    norm = Norm(1 + torch.randn(width) / 4, torch.randn(width) / 4, 1e-5)
    return mean + torch.randn(batch, tokens, width), torch.randn(heads * head_dim, width) / width**0.5, norm


def exactly(x: Tensor, qkv: Tensor, norm: Norm | None, form: kernels.Form) -> list[Tensor]:
    """w, out, lse and stats by their formulas, in float64."""
    x, qkv, stats = x.double(), qkv.double(), []
    if norm is not None:
        mean = x.mean(-1, keepdim=True)
        rstd = ((x - mean).square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        stats = [torch.stack([mean.flatten(), rstd.flatten()])]
        x = (x - mean) * rstd * norm.weight.double() + norm.bias.double()
    w = (x @ qkv.T).unflatten(-1, (form.num_heads, -1)).transpose(1, 2)
    scores = form.scale * w @ w.mT
    if form.is_causal:
        scores = scores + torch.full_like(scores, float("-inf")).triu(1)
    w, out = (t.transpose(1, 2).flatten(2).flatten(0, 1) for t in (w, scores.softmax(-1) @ w))
    return [w, out, scores.logsumexp(-1), *stats]


def operand(qkv: Tensor, norm: Norm | None, dtype: torch.dtype, device: str) -> tuple[Operand, Norm | None]:
    norm = norm and Norm(norm.weight.to(device), norm.bias.to(device), norm.eps)
    return prepare(qkv.to(device, dtype).mT, None, norm, dtype), norm


def agree(
    x: Tensor, qkv: Tensor, norm: Norm | None, dtype: torch.dtype, device: str, is_causal: bool = False, heads: int = 2
) -> None:
    """One launch is as near to float64 as two are, gives the same shapes and dtypes, and the same bits again."""
    form = kernels.Form(heads, (qkv.shape[0] // heads) ** -0.5, is_causal, False)
    x, (qkv_operand, on_device) = x.to(device), operand(qkv, norm, dtype, device)
    one, again, two = (kernels.attend(x, on_device, qkv_operand, form, n) for n in (True, True, False))
    assert (one.stats is None) == (two.stats is None) == (norm is None)
    pairs = zip(one[: 4 - (norm is None)], again, two, exactly(x.cpu(), qkv, norm, form), strict=False)
    for name, (found, repeated, other, exact) in zip(kernels.Kept._fields, pairs, strict=False):
        assert found.dtype == other.dtype and found.is_contiguous(), name
        assert torch.equal(found, repeated), name
        assert error(found, exact) <= 1.25 * error(other, exact) + a_few_roundings(found.dtype), name


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "head_dim", "norm", "is_causal"),
    [
        (1, 16, True, False),
        (1, 48, False, True),
        (17, 72, True, True),
        (37, 16, False, False),
        (37, 48, True, True),
        (37, 80, True, False),
        (50, 24, True, False),
        (50, 80, False, True),
        (50, 128, True, False),
        (64, 64, True, False),  # no tail
        (90, 16, True, True),  # more rows than a tile has
    ],
)
def test_gives_what_two_launches_give(
    tokens: int, head_dim: int, norm: bool, is_causal: bool, dtype: torch.dtype, device: str
) -> None:
    """Parts of heads, tails of tokens, a width that no tile divides."""
    x, qkv, layer_norm = problem(tokens, head_dim)
    agree(x.to(dtype), qkv.to(dtype).float(), layer_norm if norm else None, dtype, device, is_causal)


def test_tokens_of_an_image(device: str) -> None:
    x, qkv, norm = problem(197, 48)
    agree(x.half(), qkv.half().float(), norm, torch.float16, device)


def test_any_stream_layout_and_count_of_heads(device: str) -> None:
    x, qkv, norm = problem(21, 24, width=32, heads=3)
    interleaved = torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    amid_others = F.pad(x, (3, 5, 2, 1))[:, 2:-1, 3:-5]
    for layout in (x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1), interleaved, amid_others):
        agree(layout, qkv, norm, torch.float32, device, heads=3)
    half = qkv.half().float()
    # As under autocast: a float32 stream, of which a LayerNorm must see what rounding would lose.
    agree(x, half, None, torch.float16, device, heads=3)
    agree(x, half, norm, torch.float16, device, heads=3)
    agree(x.half()[:1].expand(2, 21, 32), half, norm, torch.float16, device, heads=3)


def test_tokens_far_from_zero(device: str) -> None:
    x, qkv, norm = problem(19, 16, mean=20.0)
    agree(x, qkv, norm, torch.float32, device)
    agree(x.half(), qkv.half().float(), norm, torch.float16, device)


def test_a_sample_has_the_same_bits_alone(device: str) -> None:
    x, qkv, norm = problem(37, 24, batch=3)
    form = kernels.Form(2, 0.2, False, False)
    qkv_operand, norm = operand(qkv, norm, torch.float32, device)
    every = kernels.attend(x.to(device), norm, qkv_operand, form, True)
    alone = kernels.attend(x[1:2].to(device), norm, qkv_operand, form, True)
    assert torch.equal(every.out[37:74], alone.out) and torch.equal(every.w[37:74], alone.w)
    assert torch.equal(every.lse[1:2], alone.lse) and torch.equal(every.stats[:, 37:74], alone.stats)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter
def test_nan_stays_in_its_sample(device: str) -> None:
    x, qkv, norm = problem(21, 24)
    x[1, 5, 7] = torch.nan
    qkv_operand, norm = operand(qkv, norm, torch.float32, device)
    kept = kernels.attend(x.to(device), norm, qkv_operand, kernels.Form(2, 0.2, False, False), True)
    assert not kept.out[:21].isnan().any() and kept.out[21:].isnan().all()
    assert kept.w[21 + 5].isnan().all() and kept.w.isnan().any(1).sum() == 1


@pytest.mark.parametrize("norm", [False, True])
def test_empty_batch(norm: bool, device: str) -> None:
    x, qkv, layer_norm = problem(5, 16, batch=0)
    layer_norm = layer_norm if norm else None
    qkv_operand, on_device = operand(qkv, layer_norm, torch.float32, device)
    one, two = (
        kernels.attend(x.to(device), on_device, qkv_operand, kernels.Form(2, 0.2, False, False), n)
        for n in (True, False)
    )
    assert [t is not None and t.shape for t in one] == [t is not None and t.shape for t in two]


@pytest.mark.parametrize("one_launch", [True, False], ids=["one launch", "two launches"])
@pytest.mark.parametrize(("norm", "is_causal"), [(False, True), (True, False)])
@DTYPES
def test_gradients(
    dtype: torch.dtype, norm: bool, is_causal: bool, one_launch: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the public function, either form forced: the error is that of the official order, or of the composed path.

    In float32 the two differ: what keeps the log-sum-exp for the backward rounds it, and probabilities made from it again.
    """
    monkeypatch.setattr(kernels, "attend", partial(kernels.attend, one_launch=one_launch))
    x, qkv, layer_norm = problem(37, 24)
    inputs = [x, qkv, torch.randn(40, 48) / 48**0.5, torch.randn(40), layer_norm.weight, layer_norm.bias]
    inputs = [value.to(device, dtype) for value in inputs]
    upstream = torch.randn(2, 37, 40).to(device, dtype)

    def operator(x, qkv, out, bias, gamma, beta):
        before = dict(norm_weight=gamma, norm_bias=beta) if norm else {}
        return mssa(x, qkv, out, bias, num_heads=2, is_causal=is_causal, skip=x, **before)

    with crate_kernels.use("reference"):
        truth = gradients(operator, [value.double() for value in inputs], upstream.double())
        official = gradients(operator, inputs, upstream)
    with crate_kernels.use("composed"):
        composed = gradients(operator, inputs, upstream)
    with crate_kernels.use("triton"):
        found = gradients(operator, inputs, upstream)
    for ours, exact, *others in zip(found, truth, official, composed, strict=True):
        assert (ours is None) == (exact is None)
        if exact is not None:
            assert ours.dtype == dtype
            assert error(ours, exact) <= 1.25 * max(error(plain, exact) for plain in others) + a_few_roundings(dtype)


def test_small_batches_take_one_launch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word from the caller the shape decides; each form is known by the launcher it goes through."""
    assert together.is_chosen(1, 12, 197) and together.is_chosen(11, 12, 256)
    assert not together.is_chosen(12, 12, 197) and not together.is_chosen(1, 12, 257)

    taken = []

    def noted(name: str, launcher):
        def run(*arguments, **options):
            taken.append(name)
            return launcher(*arguments, **options)

        return run

    monkeypatch.setattr(together, "attend", noted("one", together.attend))
    monkeypatch.setattr(kernels.attention, "forward", noted("two", kernels.attention.forward))
    for tokens, expected in ((5, "one"), (257, "two")):
        taken.clear()
        x, qkv, _ = problem(tokens, 16, width=16, heads=1, batch=1)
        with crate_kernels.use("triton"):
            mssa(x.to(device), qkv.to(device), torch.randn(16, 16, device=device), num_heads=1)
        assert taken == [expected]


# In a process of its own: whether Triton interprets or compiles is decided when a kernel's module is imported.
INTERMEDIATE_CODE = """
from benchmarks.ahead_of_time import cases, collecting
from crate_kernels.mssa import one_launch
asked = [request for request, _ in collecting.requests(cases.one_launch("bfloat16"), "sm_90")]
(request,) = [request for request in asked if request.kernel == "attend_kernel"]
with collecting.as_if_on("sm_90"):
    print(one_launch.attend_kernel.preload(request.specialization).asm["ttir"])
"""


def test_a_barrier_lies_between_writing_w_and_reading_it() -> None:
    """The interpreter cannot tell; a device's threads read what others wrote only behind one that orders global memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = run_while_it_tells([sys.executable, "-c", INTERMEDIATE_CODE], cwd=ROOT, env=environment)
    before, *after = re.split(r"^ *(?:ttg\.barrier all|gpu\.barrier).*$", ended.stdout, flags=re.MULTILINE)
    assert len(after) == 1, ended.stderr
    assert "tt.store" in before and "tt.load" in after[0]
