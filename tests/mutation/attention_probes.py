"""Small runs of every kernel of shared-QKV attention: several tiles with a tail each way, inputs amid NaN, exact inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
from mutation.memory import amid_nan
from mutation.modules import attention
from mutation.probes import Probe
from support import a_few_roundings, error
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


@contextmanager
def float32_products(precision: str):
    """PyTorch's switch: "highest" for exact products, "high" for TF32, which the interpreter computes exactly as well."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


_WALK = dict(BLOCK_ROWS=32, BLOCK_COLUMNS=32, num_warps=4, num_stages=1)
ATTENTION_TILES = {
    "default": {
        (kernel, itemsize, width): _WALK | ({"BLOCK_COLUMNS": 64} if width == 32 else {})
        for kernel in ("forward_kernel", "backward_kernel")
        for width in (16, 32, 48, 64, 80, 96, 128)
        for itemsize in (2, 4)
    }
    | {("delta_kernel", 4, width): dict(BLOCK_ROWS=32, num_warps=4, num_stages=1) for width in (16, 48)}
}
SEED = 0x0123456789ABCDEF >> 1


def _philox(seed: int, counters: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """Philox 4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3; 2011), in 64-bit words."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(counter, np.uint64) for counter in counters]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        half = np.uint64(32)
        c = [(b >> half) ^ c[1] ^ np.uint64(key[0]), b & low, (a >> half) ^ c[3] ^ np.uint64(key[1]), a & low]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def _uniform(heads: int, tokens: int) -> Tensor:
    """What dropout compares with its probability, [heads, query, key]; as ``dropout_factors`` documents."""
    head, query, key = np.meshgrid(np.arange(heads), np.arange(tokens), np.arange(tokens), indexing="ij")
    words = _philox(SEED, (np.minimum(query, key), np.maximum(query, key), head, np.zeros_like(head)))
    word = np.where(query <= key, words[0], words[1])
    return torch.from_numpy((word >> np.uint64(8)).astype(np.float64) * 2.0**-24)


class _Attention:
    """Inputs of one case of softmax(scale * w w^T) w, float32 amid NaN, with all results in float64 and their margins."""

    def __init__(
        self,
        *shape: int,
        scale: float = 0.3,
        is_causal: bool = False,
        lengths: tuple[int, ...] | None = None,
        dropout: bool = False,
        precision: str = "high",
    ) -> None:
        torch.manual_seed(sum(shape))
        batch, heads, tokens, _ = shape
        self.scale, self.is_causal, self.precision = scale, is_causal, precision
        self.lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
        ends = torch.full((batch,), tokens) if lengths is None else self.lengths.clamp(0, tokens)
        self._padding = (torch.arange(tokens) >= ends[:, None])[:, None, :, None].expand(shape)
        self._blocked = self._padding[..., 0][..., None, :].expand(batch, heads, tokens, tokens).clone()
        if is_causal:
            self._blocked |= torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        self._factors, self.dropout, self.seed = torch.ones(()), 0.0, None
        if dropout:
            uniform = _uniform(batch * heads, tokens).view(batch, heads, tokens, tokens)
            # One of the numbers that are compared with it: what is not below it stays.
            self.dropout = uniform[uniform < 0.3].max().item()
            self._factors = (uniform >= self.dropout) / (1 - self.dropout)
            self.seed = torch.tensor(SEED)
        w, grad_out = torch.randn(shape), torch.randn(shape)
        exact, eager = self._formula(w.double(), grad_out.double()), self._formula(w, grad_out)
        self.exact = exact
        lse = exact["lse"][exact["lse"].isfinite()]
        self.allowed = {
            name: 1.5 * error(eager[name].nan_to_num(neginf=0), exact[name].nan_to_num(neginf=0)) + margin
            for name, margin in {
                "out": a_few_roundings(torch.float32),
                "lse": 2 * EPS,
                "delta": a_few_roundings(torch.float32),
                "dw": a_few_roundings(torch.float32) + 2 * EPS * lse.abs().max().item(),
            }.items()
        }
        # What is stored in padding counts for nothing.
        w, grad_out = (t.masked_fill(self._padding, math.nan) for t in (w, grad_out))
        self.w, self.grad_out = amid_nan(w), amid_nan(grad_out.permute(3, 2, 1, 0)).permute(3, 2, 1, 0)
        self.out, self.lse = amid_nan(exact["out"].float()), exact["lse"].float()
        self.delta = exact["delta"].float().masked_fill(self._padding[..., 0], math.nan)

    def _formula(self, w: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
        w, grad_out = w.masked_fill(self._padding, 0).requires_grad_(), grad_out.masked_fill(self._padding, 0)
        scores = (w @ w.mT * self.scale).masked_fill(self._blocked, -math.inf)
        probabilities = scores.softmax(-1).masked_fill(self._blocked, 0)  # a sample may be all padding
        out = ((probabilities * self._factors.to(w)) @ w).masked_fill(self._padding, 0)
        (dw,) = torch.autograd.grad(out, w, grad_out)
        lse = scores.logsumexp(-1).masked_fill(self._padding[..., 0], -math.inf)
        out = out.detach()
        return {"out": out, "lse": lse.detach(), "delta": (out * grad_out).sum(-1), "dw": dw.nan_to_num()}

    def probe(self, name: str, results: tuple[str, ...], run: Callable[[], tuple]) -> Probe:
        def named() -> dict[str, Tensor]:
            with float32_products(self.precision):
                return dict(zip(results, run(), strict=True))

        expected = {result: self.exact[result] for result in results}
        return Probe(name, named, expected, self.allowed)

    def forward(self, name: str) -> Probe:
        def run() -> tuple:
            return attention.forward(
                self.w, self.scale, self.is_causal, lengths=self.lengths, dropout=self.dropout, seed=self.seed
            )

        return self.probe(f"forward: {name}", ("out", "lse"), run)

    def backward(self, name: str) -> Probe:
        def run() -> tuple:
            return (
                attention.backward_from_delta(
                    self.grad_out, self.w, self.lse, self.delta, self.scale, self.is_causal, self.lengths,
                    self.dropout, self.seed,
                ),
            )  # fmt: skip

        return self.probe(f"backward: {name}", ("dw",), run)

    def rounded(self, name: str) -> Probe:
        """In float16: the weights of the softmax are rounded before they are multiplied."""
        allowed = dict.fromkeys(("out", "lse"), 2.0**-9)
        run = lambda: dict(zip(allowed, attention.forward(self.w.half(), self.scale, False), strict=True))  # noqa: E731
        return Probe(f"forward: {name}", run, {result: self.exact[result] for result in allowed}, allowed)

    def row_sums(self, name: str) -> Probe:
        def run() -> tuple:
            with patch.object(attention, "backward_from_delta", lambda grad_out, w, lse, delta, *rest: delta):
                return (attention.backward(self.grad_out, self.w, self.out, self.lse, self.scale, self.is_causal),)

        return self.probe(f"delta: {name}", ("delta",), run)


def attention_probes() -> list[Probe]:
    """The first of each kernel are small and meet most mistakes."""
    small = _Attention(2, 2, 5, 8)
    parts = _Attention(1, 1, 75, 40)
    exact = _Attention(1, 1, 37, 8, precision="highest")
    causal = _Attention(1, 1, 70, 8, is_causal=True)
    causal_dropped = _Attention(1, 2, 20, 8, is_causal=True, dropout=True)
    padded = _Attention(4, 1, 43, 40, lengths=(99, 20, 32, -3))
    dropped = _Attention(1, 2, 40, 24, dropout=True)
    steep = _Attention(1, 1, 37, 8, scale=30.0)
    sums = _Attention(2, 2, 37, 40)
    return [
        parts.forward("two parts, a tail tile"),
        small.forward("four heads"),
        small.rounded("float16"),
        causal.forward("causal"),
        steep.forward("steep scores"),
        dropped.forward("dropout"),
        padded.forward("lengths"),
        small.row_sums("four heads"),
        sums.row_sums("two parts"),
        small.backward("four heads"),
        parts.backward("two parts, a tail tile"),
        exact.backward("exact products"),
        causal.backward("causal"),
        dropped.backward("dropout"),
        causal_dropped.backward("causal, dropout"),
        padded.backward("lengths"),
    ]
