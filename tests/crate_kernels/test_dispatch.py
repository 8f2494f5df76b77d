"""Which implementation runs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

import crate_kernels
from crate_kernels import dispatch


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_cpu_takes_composed_and_cuda_takes_triton() -> None:
    assert dispatch.choose("ista", torch.randn(2), torch.float32) == "composed"
    if torch.cuda.is_available():
        assert dispatch.choose("ista", torch.randn(2, device="cuda"), torch.bfloat16) == "triton"
        assert dispatch.choose("ista", torch.randn(2, device="cuda"), torch.float64) == "composed"


@pytest.mark.parametrize("name", dispatch.IMPLEMENTATIONS)
def test_use_forces_nests_and_restores(name: str) -> None:
    x = torch.randn(2)
    with crate_kernels.use(name):
        assert dispatch.choose("ista", x, torch.float32) == name
        with crate_kernels.use("auto"):
            assert dispatch.choose("ista", x, torch.float32) == "composed"
        assert dispatch.choose("ista", x, torch.float32) == name
    assert dispatch.choose("ista", x, torch.float32) == "composed"


def in_a_thread(function: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


def chosen() -> str:
    return dispatch.choose("ista", torch.randn(2), torch.float32)


def test_use_holds_for_its_thread() -> None:
    """Blocks of two threads that overlap, the first to open the first to close."""
    opened, closed = threading.Event(), threading.Event()

    def other() -> tuple[str, str]:
        before = chosen()
        with crate_kernels.use("reference"):
            opened.set()
            assert closed.wait(60)
            inside = chosen()
        return before, inside

    with ThreadPoolExecutor(1) as pool:
        with crate_kernels.use("triton"):
            waiting = pool.submit(other)
            assert opened.wait(60)
            assert chosen() == "triton"
        closed.set()
        assert waiting.result(timeout=60) == ("composed", "reference")
    assert chosen() == in_a_thread(chosen) == "composed"


class Nested(torch.autograd.Function):
    """A backward that calls a backward, and so on: deep enough, autograd goes on in a thread of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, seen: set) -> Tensor:
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen.add((threading.get_ident(), chosen()))
        if ctx.depth:
            with torch.enable_grad():
                Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.seen).backward()
        return grad, None, None


def test_autograds_own_threads_know_what_is_forced() -> None:
    """As on a GPU, whose backward never runs in the thread that calls it."""
    for name in ("reference", "triton"):
        seen: set[tuple[int, str]] = set()
        with crate_kernels.use(name):
            Nested.apply(torch.ones(1, requires_grad=True), 70, seen).backward()
        assert len({thread for thread, _ in seen}) > 1 and {one for _, one in seen} == {name}


def test_a_checkpoint_that_is_told_takes_the_forwards_implementation() -> None:
    x, w = torch.randn(9, 8, requires_grad=True), torch.randn(8, 8)
    expected = torch.autograd.grad(crate_kernels.ista(x, w).sum(), x)[0]
    contexts = dict(context_fn=lambda: (nullcontext(), crate_kernels.use("reference")))
    for options, backward in ((contexts, "composed"), ({}, "reference")):
        with crate_kernels.use("reference"):
            y = checkpoint(crate_kernels.ista, x, w, use_reentrant=False, **options)
        with crate_kernels.use(backward):
            assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], expected, atol=1e-6)
    with crate_kernels.use("reference"):
        y = checkpoint(crate_kernels.ista, x, w, use_reentrant=False)
    with crate_kernels.use("composed"), pytest.raises(CheckpointError):
        y.sum().backward()


def test_use_restores_after_an_error() -> None:
    with pytest.raises(KeyError), crate_kernels.use("reference"):
        raise KeyError
    assert dispatch.choose("ista", torch.randn(2), torch.float32) == "composed"


def test_unknown_implementation_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"implementation: expected one of reference, composed, triton.*'cuda'"):
        with crate_kernels.use("cuda"):
            pass


def test_forced_triton_refuses_float64() -> None:
    with crate_kernels.use("triton"), pytest.raises(RuntimeError, match="float64"):
        crate_kernels.shared_qkv_attention(torch.randn(1, 1, 4, 16, dtype=torch.float64))


def test_forced_triton_refuses_heads_its_kernels_cannot_hold() -> None:
    with crate_kernels.use("triton"), pytest.raises(RuntimeError, match="heads of 1 to 128 features, not 256"):
        crate_kernels.shared_qkv_attention(torch.randn(1, 1, 4, 256))
    with crate_kernels.use("triton"), pytest.raises(RuntimeError, match="heads of 1 to 128 features, not 256"):
        crate_kernels.mssa(torch.randn(1, 4, 256), torch.randn(256, 256), None, num_heads=1)


def test_forced_triton_without_a_gpu_is_an_error_not_a_fallback() -> None:
    result = run_python(
        "import torch, crate_kernels\ncrate_kernels.shared_qkv_attention(torch.randn(1, 1, 4, 16))",
        CRATE_KERNELS_IMPL="triton",
        CUDA_VISIBLE_DEVICES="",
    )
    assert result.returncode != 0
    assert "the triton implementation was forced, but its kernels need CUDA tensors" in result.stderr


def test_environment_variable_forces_and_is_checked() -> None:
    forced = run_python(
        "import torch; from crate_kernels import dispatch; print(dispatch.choose('ista', torch.randn(2), torch.float32))",
        CRATE_KERNELS_IMPL="reference",
    )
    assert forced.stdout.strip() == "reference"
    wrong = run_python("import crate_kernels", CRATE_KERNELS_IMPL="cudnn")
    assert wrong.returncode != 0
    assert "CRATE_KERNELS_IMPL: expected one of" in wrong.stderr


def test_backward_takes_the_implementation_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    load = dispatch.load
    monkeypatch.setattr(dispatch, "load", lambda operator, name: taken.append((operator, name)) or load(operator, name))
    w = torch.randn(1, 1, 5, 16, requires_grad=True)
    with crate_kernels.use("composed"):
        out = crate_kernels.shared_qkv_attention(w)
    with crate_kernels.use("reference"):
        out.sum().backward()
    assert taken == [("shared_attention", "composed")] * 2


IMPORT_WITHOUT_TRITON = """
import sys, time
sys.modules["triton"] = None  # any import of it now fails
import torch
start = time.perf_counter()
import crate_kernels
print(time.perf_counter() - start)
y = crate_kernels.ista(torch.randn(3, 8), torch.randn(8, 8))
assert y.shape == (3, 8)
assert not torch.cuda.is_initialized()
try:
    with crate_kernels.use("triton"):
        crate_kernels.ista(torch.randn(3, 8), torch.randn(8, 8))
except RuntimeError as e:
    assert "triton" in str(e), e
else:
    raise SystemExit("a forced triton path ran without triton")
"""


def test_import_needs_no_triton_and_no_driver() -> None:
    result = run_python(IMPORT_WITHOUT_TRITON)
    assert result.returncode == 0, result.stderr
    print(f"import crate_kernels after torch: {float(result.stdout):.2f} s")


def test_import_is_light() -> None:
    """Neither our kernels nor torch.compile's machinery, which takes seconds, are imported before they are needed."""
    result = run_python(
        "import crate_kernels, sys; print([name for name in sys.modules if 'dynamo' in name or 'crate' in name])"
    )
    assert "torch._dynamo" not in result.stdout
    assert "crate_kernels.ista.op" in result.stdout and "crate_kernels.ista.triton" not in result.stdout, result.stderr
