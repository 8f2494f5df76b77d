"""Small runs of every kernel of shared-QKV attention: several tiles with a tail each way, inputs amid NaN, exact inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import torch
from mutation.memory import amid_nan
from mutation.modules import attention, attention_mask
from mutation.probes import Probe
from support import a_few_roundings, error, pairs_hidden
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
    | {("row_pairs_kernel", 4, width): dict(BLOCK_ROWS=32, num_warps=4, num_stages=1) for width in (16, 48)}
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
        scale: float | tuple[float, ...] = 0.3,
        is_causal: bool = False,
        window: int | None = None,
        lengths: tuple[int, ...] | None = None,
        sequences: tuple[int, ...] | None = None,
        keys: Callable[[Tensor], Tensor] | None = None,
        wild: bool = False,
        dropout: bool = False,
        precision: str = "high",
    ) -> None:
        torch.manual_seed(sum(shape))
        batch, heads, tokens, _ = shape
        self.scale = torch.tensor(scale) if isinstance(scale, tuple) else scale
        self.precision = precision
        self._factor = self.scale[:, None, None] if isinstance(self.scale, Tensor) else self.scale
        given = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
        key_mask = None if keys is None else keys(torch.arange(batch * tokens).view(batch, tokens))
        cu_seqlens = spans = None
        if sequences is not None:
            cu_seqlens = torch.tensor(sequences).cumsum(0)
            behind = [sum(end <= place for end in cu_seqlens.tolist()) for place in range(tokens)]
            known = [*cu_seqlens.tolist(), cu_seqlens[-1].item()]
            spans = torch.tensor(
                [[known[one - 1] for one in behind], [known[one] for one in behind]], dtype=torch.int32
            )
            given = cu_seqlens[-1:]
        if spans is not None and wild:  # the first sequence begins, and the last one ends, outside the tensor
            spans[0] -= 1000 * (spans[0] == 0)
            spans[1] += 1000 * (spans[1] == tokens)
        self.mask = attention_mask.Mask(is_causal, window, given, spans, key_mask)
        ends = torch.full((batch,), tokens) if given is None else given.clamp(0, tokens)
        self._padding = (torch.arange(tokens) >= ends[:, None])[:, None, :, None].expand(shape)
        self._blocked = pairs_hidden(
            batch, tokens, is_causal=is_causal, window=window, lengths=ends, key_mask=key_mask, cu_seqlens=cu_seqlens
        ).expand(batch, heads, tokens, tokens)
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
                "pairs": a_few_roundings(torch.float32),
                "dw": a_few_roundings(torch.float32) + 2 * EPS * lse.abs().max().item(),
                "rows of the scale": 32 * EPS,
            }.items()
        }
        # What is stored in padding counts for nothing.
        w, grad_out = (t.masked_fill(self._padding, math.nan) for t in (w, grad_out))
        self.w, self.grad_out = amid_nan(w), amid_nan(grad_out.permute(3, 2, 1, 0)).permute(3, 2, 1, 0)
        self.out, self.lse = amid_nan(exact["out"].float()), exact["lse"].float()
        self.pairs = exact["pairs"].float().masked_fill(self._padding[..., :1], math.nan)

    def _formula(self, w: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
        w, grad_out = w.masked_fill(self._padding, 0).requires_grad_(), grad_out.masked_fill(self._padding, 0)
        factors = torch.ones(w.shape[:3], dtype=w.dtype).requires_grad_()
        scores = w @ w.mT * self._factor * factors[..., None]
        weights = scores.masked_fill(self._blocked, torch.finfo(w.dtype).min).softmax(-1)
        probabilities = weights.masked_fill(self._blocked, 0)  # a sample may be all padding, and a row may have no key
        out = ((probabilities * self._factors.to(w)) @ w).masked_fill(self._padding, 0)
        dw, rows = torch.autograd.grad(out, (w, factors), grad_out)
        lse = scores.detach().masked_fill(self._blocked, -math.inf).logsumexp(-1)
        out = out.detach()
        exponents = (lse * math.log2(math.e)).masked_fill(lse.isinf(), 0)
        pairs = torch.stack([exponents, (self._factor * out * grad_out).sum(-1)], -1)
        return {"out": out, "lse": lse, "pairs": pairs, "dw": dw, "rows of the scale": rows}

    def probe(self, name: str, results: tuple[str, ...], run: Callable[[], tuple]) -> Probe:
        def named() -> dict[str, Tensor]:
            with float32_products(self.precision):
                return dict(zip(results, run(), strict=True))

        expected = {result: self.exact[result] for result in results}
        return Probe(name, named, expected, self.allowed)

    def forward(self, name: str) -> Probe:
        def run() -> tuple:
            return attention.attend(self.w, self.scale, self.mask, self.dropout, self.seed)

        return self.probe(f"forward: {name}", ("out", "lse"), run)

    def backward(self, name: str, of_scale: bool = False) -> Probe:
        def run() -> tuple:
            rows = torch.full_like(self.lse, math.nan) if of_scale else None
            settings = self.scale, self.mask, self.dropout, self.seed, rows
            dw = attention.gradient(self.grad_out, self.w, self.pairs, *settings)
            return (dw,) if rows is None else (dw, rows)

        return self.probe(f"backward: {name}", ("dw", "rows of the scale")[: 1 + of_scale], run)

    def rounded(self, name: str) -> Probe:
        """In float16: the weights of the softmax are rounded before they are multiplied."""
        allowed = dict.fromkeys(("out", "lse"), 2.0**-9)
        run = lambda: dict(zip(allowed, attention.attend(self.w.half(), self.scale), strict=True))  # noqa: E731
        return Probe(f"forward: {name}", run, {result: self.exact[result] for result in allowed}, allowed)

    def corrected(self, name: str, of_scale: bool = False) -> Probe:
        """In float16, with a delta that is off by e: what that adds, and what the correction at the diagonal takes away."""
        w = self.w.nan_to_num().double()
        e = torch.linspace(-2, 2, w.shape[2], dtype=torch.float64)[:, None].expand(*w.shape[:3], 1)
        scores = (w @ w.mT * self._factor).masked_fill(self._blocked, -math.inf)
        p = scores.softmax(-1).nan_to_num()
        added = (
            -self._factor * (p.mT @ (e * w) + e * (p @ w)) + 2 * self._factor * e * w * p.diagonal(0, -2, -1)[..., None]
        )
        expected = {"dw": self.exact["dw"] + added.masked_fill(self._padding, 0)}
        if of_scale:
            expected["rows of the scale"] = self.exact["rows of the scale"]
        off = torch.cat([torch.zeros_like(e), self._factor * e], -1).float()

        def run() -> dict[str, Tensor]:
            rows = torch.full_like(self.lse, math.nan) if of_scale else None
            settings = self.scale, self.mask, self.dropout, self.seed, rows
            found = attention.gradient(self.grad_out.half(), self.w.half(), self.pairs + off, *settings), rows
            return dict(zip(expected, found, strict=False))

        return Probe(f"backward: {name}", run, expected, dict.fromkeys(expected, 2.0**-8))

    def row_pairs(self, name: str) -> Probe:
        def run() -> tuple:
            return (attention.row_pairs(self.grad_out, self.out, self.lse, self.scale),)

        return self.probe(f"row pairs: {name}", ("pairs",), run)


def row_pairs_probes() -> list[Probe]:
    blind = _Attention(2, 2, 40, 8, keys=lambda place: place % 40 > 4, is_causal=True, scale=(0.2, 0.5))
    return [
        _Attention(2, 2, 5, 8).row_pairs("four heads"),
        _Attention(2, 2, 37, 40).row_pairs("two parts"),
        blind.row_pairs("rows without a key, scale"),
    ]


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
    # Tiles are of 32 tokens: what is hidden begins and ends within tiles, on their borders and beyond.
    windowed = _Attention(1, 2, 110, 8, window=33, scale=(0.2, 0.5))
    near = _Attention(1, 1, 70, 8, window=3, is_causal=True, lengths=(66,))
    packed = _Attention(1, 1, 110, 8, sequences=(0, 5, 0, 27, 1, 40, 20))
    packed_causal = _Attention(1, 2, 75, 8, sequences=(0, 40, 35), is_causal=True, window=36, scale=(0.2, 0.5))
    keys = _Attention(2, 1, 75, 8, keys=lambda place: (place % 75 > 40) & (place % 4 > 0))
    keys_causal = _Attention(2, 2, 40, 8, keys=lambda place: place % 5 == 2, is_causal=True, scale=(0.2, 0.5))
    learned = _Attention(2, 2, 75, 8, scale=(0.2, 0.5), lengths=(75, 40))
    whole = _Attention(1, 2, 64, 8, scale=(0.2, 0.5))
    flat = _Attention(1, 1, 37, 8, scale=0.0)
    padded_window = _Attention(2, 1, 70, 8, window=20, lengths=(70, 41), scale=(0.4,))
    wild = _Attention(1, 1, 70, 8, sequences=(0, 30, 40), wild=True)
    learned_dropped = _Attention(1, 2, 40, 8, scale=(0.2, 0.5), dropout=True)
    return [
        parts.forward("two parts, a tail tile"),
        _Attention(1, 1, 20, 72).forward("scaled scores"),
        small.forward("four heads"),
        small.rounded("float16"),
        causal.forward("causal"),
        steep.forward("steep scores"),
        dropped.forward("dropout"),
        padded.forward("lengths"),
        windowed.forward("window"),
        near.forward("causal window, lengths"),
        packed.forward("packed"),
        packed_causal.forward("packed, causal, window"),
        whole.forward("whole tiles of rows"),
        flat.forward("no scale"),
        padded_window.forward("window, lengths"),
        wild.forward("packed, out of range"),
        keys.forward("keys"),
        keys_causal.forward("keys, causal"),
        *row_pairs_probes(),
        small.backward("four heads"),
        parts.backward("two parts, a tail tile"),
        exact.backward("exact products"),
        causal.backward("causal"),
        dropped.backward("dropout"),
        causal_dropped.backward("causal, dropout"),
        padded.backward("lengths"),
        windowed.backward("window, scale", of_scale=True),
        near.backward("causal window, lengths"),
        packed.backward("packed"),
        packed_causal.backward("packed, causal, window, scale", of_scale=True),
        whole.backward("whole tiles of rows, scale", of_scale=True),
        padded_window.backward("window, lengths, scale", of_scale=True),
        wild.backward("packed, out of range"),
        keys.backward("keys"),
        keys_causal.backward("keys, causal, scale", of_scale=True),
        learned.backward("lengths, scale", of_scale=True),
        learned_dropped.backward("dropout, scale", of_scale=True),
        small.corrected("float16, few tokens"),
        parts.corrected("float16, two parts"),
        keys.corrected("float16, keys"),
        packed.corrected("float16, packed"),
        learned.corrected("float16, lengths, scale", of_scale=True),
    ]
