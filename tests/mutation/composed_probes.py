"""The composed paths against the references in float64, values and all gradients; and what they promise of dtypes and memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from mutation.modules import (
    attention_op,
    composed_attention,
    composed_ista,
    cpu,
    form,
    library_products,
)
from mutation.probes import Probe
from support import gradients, pairs_hidden
from torch import Tensor, nn

from crate_kernels import ista, mssa, norm_linear, overcomplete_ista, shared_qkv_attention, use
from crate_kernels.ista.api import combine

EXACT, ROUNDED = 1e-12, 2**-6


def random(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@contextlib.contextmanager
def this_cpu(onednn: bool = False, dtypes: tuple[torch.dtype, ...] = ()) -> Iterator[None]:
    """One whose float32 products are oneDNN's or not, and that multiplies in these 16-bit dtypes."""
    with (
        patch.object(library_products, "ONEDNN_IS_FASTER", onednn),
        patch.object(cpu, "CPU_PRODUCT_DTYPES", dtypes),
    ):
        yield


def values(function: Callable[..., Any], inputs: Sequence[Tensor], upstream: Tensor | None = None) -> dict[str, Tensor]:
    """What it gives, and its gradients in all inputs, by name."""
    if upstream is None:
        upstream = torch.randn(function(*inputs).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = ["output", *(f"gradient {index}" for index in range(len(inputs)))]
    found = gradients(function, list(inputs), upstream)
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


def agreement(
    name: str,
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    formula: Callable[..., Tensor] | None = None,
    *,
    autocast: torch.dtype | None = None,
    allowed: float = EXACT,
    around: Callable[[], contextlib.AbstractContextManager] = this_cpu,
) -> Probe:
    """The function on the composed path, and in float64 the formula, or itself by the references; dtypes as the references'."""
    autocasts = functools.partial(torch.autocast, "cpu", autocast or torch.bfloat16, enabled=autocast is not None)
    with use("reference"), torch.random.fork_rng():
        expected = values(formula or function, [value.double() for value in inputs])
        with autocasts():
            dtypes = {what: value.dtype for what, value in values(formula or function, inputs).items()}

    def run() -> dict[str, Tensor]:
        before = [value.clone() for value in inputs]
        with use("composed"), around(), torch.random.fork_rng(), autocasts():
            found = values(function, inputs)
        assert {what: value.dtype for what, value in found.items()} == dtypes, "dtypes"
        assert all(map(torch.equal, before, inputs)), "changed what it was given"
        return found

    return Probe(name, run, expected, dict.fromkeys(expected, allowed))


def truth(name: str, run: Callable[[], dict[str, object]], **expected: object) -> Probe:
    """What it finds is just this."""

    def check() -> dict[str, Tensor]:
        found = run()
        for what, value in expected.items():
            assert found[what] == value, f"{what}: {found[what]}"
        return {}

    return Probe(name, check, {}, {})


# --- The sparse steps and the projections -----------------------------------------------------------------------------


def ista_probes() -> list[Probe]:
    x, few, w, gamma, beta = random((9, 6), (5, 6), (6, 6), (6,), (6,))
    numbers = dict(step_size=0.3, lambd=0.2)

    def step(threshold: str = "relu", **options: Any) -> Callable[..., Tensor]:
        def function(x: Tensor, w: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
            return ista(x, w, threshold=threshold, norm_weight=gamma, norm_bias=beta, **numbers, **options)

        return function

    def with_combined(x: Tensor) -> Tensor:
        return ista(x, w.to(x.dtype), combined=combine(w), **numbers)

    def without(x: Tensor, w: Tensor, *norm: Tensor) -> Tensor:
        return step()(x, w.to(x.dtype), *(n.to(x.dtype) for n in norm))

    def memory() -> dict[str, object]:
        given = x, None, x.dtype, w, None, 0.3, 0.2, False, x.dtype
        few_given = few, *given[1:]
        combined = combine(w)
        with_given = x, None, x.dtype, w, combined, 0.3, 0.2, False, x.dtype
        kept = [composed_ista.forward(*g)[1] for g in (given, few_given, with_given)]
        return {
            "kept": [len(k) for k in kept],
            "aliases": [k[0].data_ptr() in (w.data_ptr(), combined.data_ptr()) for k in kept],
            "one": [form.one_product(n, 6) for n in (5, 6, 7)],
        }

    half = [value.float() for value in (x, w, gamma, beta)]
    half_few = [value.float() for value in (few, w, gamma, beta)]
    in_bf16 = functools.partial(this_cpu, dtypes=(torch.bfloat16,))
    rounded = dict(autocast=torch.bfloat16, allowed=ROUNDED)
    return [
        agreement("one product, relu", step(), [x, w]),
        agreement("one product, soft, LayerNorm", step("soft"), [x, w, gamma, beta]),
        agreement("two products, relu, LayerNorm", step(), [few, w, gamma, beta]),
        agreement("two products, soft", step("soft"), [few, w]),
        agreement("LayerNorm without bias", step(), [x, w, gamma]),
        agreement("combined before", with_combined, [x], lambda x: step()(x, w.to(x.dtype))),
        agreement("combined before, few", with_combined, [few], lambda x: step()(x, w.to(x.dtype))),
        agreement("weight constant", lambda x, *norm: without(x, w, *norm), [x, gamma, beta]),
        agreement("weight constant, no LayerNorm", lambda x: without(x, w), [x]),
        agreement("tokens constant", lambda w: without(x.to(w.dtype), w), [w]),
        agreement("few tokens constant", lambda w: without(few.to(w.dtype), w), [w]),
        agreement("tokens constant, LayerNorm", lambda w, *norm: step()(x.to(w.dtype), w, *norm), [w, gamma, beta]),
        agreement("bfloat16 emulated", step(), half, **rounded),
        agreement("bfloat16 emulated, few", step(), half_few, **rounded),
        agreement("bfloat16", step(), half, around=in_bf16, **rounded),
        agreement("bfloat16, few, soft", step("soft"), half_few, around=in_bf16, **rounded),
        agreement("bfloat16, no LayerNorm", step(), half[:2], around=in_bf16, **rounded),
        agreement("bfloat16, no LayerNorm, few", step(), half_few[:2], around=in_bf16, **rounded),
        agreement("all in bfloat16", step(), [t.bfloat16() for t in half], allowed=ROUNDED),
        truth("memory and work", memory, kept=[1, 1, 1], aliases=[False] * 3, one=[False, False, True]),
    ]


def mssa_probes() -> list[Probe]:
    x, qkv, out, bias = random((2, 5, 6), (8, 6), (6, 8), (6,))
    lengths = torch.tensor([3, 5])

    def projected(
        x: Tensor, qkv: Tensor, out: Tensor | None = None, bias: Tensor | None = None, **options: Any
    ) -> Tensor:
        return mssa(x, qkv, out, bias, num_heads=2, **options)

    def dropped(x: Tensor, qkv: Tensor, out: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(5)
        return projected(x, qkv, out, bias, dropout=0.5)

    def dropped_in_steps(x: Tensor, qkv: Tensor, out: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(5)
        with use("composed"):
            w = F.linear(x, qkv).unflatten(-1, (2, -1)).transpose(1, 2)
            attended = shared_qkv_attention(w, dropout=0.5).transpose(1, 2).flatten(2)
        return F.dropout(F.linear(attended, out, bias), 0.5)

    return [
        agreement("bias", projected, [x, qkv, out, bias]),
        agreement("no projection", projected, [x, qkv]),
        agreement("causal", functools.partial(projected, is_causal=True), [x, qkv, out, bias]),
        agreement("padded", functools.partial(projected, lengths=lengths, scale=0.7), [x, qkv, out, bias]),
        agreement("dropout", dropped, [x, qkv, out, bias], dropped_in_steps),
    ]


def norm_linear_probes() -> list[Probe]:
    inputs = random((3, 5, 6), (6, 6), (6,))
    rounded = dict(autocast=torch.bfloat16, allowed=ROUNDED)
    return [
        agreement("float64", norm_linear, inputs),
        agreement("autocast", norm_linear, [value.float() for value in inputs], **rounded),
    ]


def overcomplete_probes() -> list[Probe]:
    inputs = random((3, 5, 6), (6, 10), (6, 10))

    def step(x: Tensor, dictionary: Tensor, out_dictionary: Tensor | None = None) -> Tensor:
        return overcomplete_ista(x, dictionary, out_dictionary, step_size=0.3, lambd=0.2)

    rounded = dict(autocast=torch.bfloat16, allowed=2 * ROUNDED)
    return [
        agreement("decoupled", step, inputs),
        agreement("one dictionary", step, inputs[:2]),
        agreement("autocast", step, [value.float() for value in inputs], **rounded),
    ]


# --- Attention --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sizes(scores: int = 2**21, long: int = 257, short: int = 512) -> Iterator[None]:
    """Bytes of scores at a time, and the tokens from which flash attention is taken, and up to which probabilities are kept."""
    with (
        this_cpu(),
        patch.object(composed_attention, "_SCORES_ON_CPU", scores),
        patch.object(attention_op, "_LONG", long),
        patch.object(attention_op, "_SHORT", short),
    ):
        yield


def attention_probes() -> list[Probe]:
    (w,) = random((3, 2, 7, 4))
    lengths = torch.tensor([7, 2, 5])
    padded = dict(lengths=lengths)
    parts = {
        "at once": sizes,
        "heads apart": functools.partial(sizes, scores=8 * 7 * 7 * 2),
        "samples apart": functools.partial(sizes, scores=8 * 7 * 7 * 4),
        "rows apart": functools.partial(sizes, scores=8 * 7 * 3),
        "nothing kept": functools.partial(sizes, short=6),
        "nothing kept, rows apart": functools.partial(sizes, scores=8 * 7 * 3, short=6),
        "flash": functools.partial(sizes, long=7),
    }
    options = {
        "plain": {}, "causal": dict(is_causal=True), "padded": padded, "causal, padded": dict(is_causal=True, **padded),
        "window": dict(window=2, **padded), "keys": dict(key_mask=torch.arange(21).view(3, 7) % 4 > 1, is_causal=True),
        "scales": dict(scale=torch.tensor([0.3, 0.8])),
    }  # fmt: skip

    def both(w: Tensor, **options: Any) -> Tensor:
        """Output and log-sum-exp side by side; of the latter only what is finite."""
        out, lse = shared_qkv_attention(w, return_lse=True, **options)
        return torch.cat([out, lse[..., None].to(out.dtype).nan_to_num(neginf=-3.0)], -1)

    probes = []
    for part, around in parts.items():
        for option, given in options.items():
            function = functools.partial(shared_qkv_attention, **{"scale": 0.4, **given})
            probes.append(agreement(f"{option}, {part}", function, [w], around=around))
        learned = lambda w, scale: shared_qkv_attention(w, scale=scale, **padded)  # noqa: E731
        scales = torch.tensor([0.3, 0.8], dtype=torch.float64)
        probes.append(agreement(f"learned scales, {part}", learned, [w, scales], around=around))
        probes.append(agreement(f"log-sum-exp, {part}", functools.partial(both, **padded), [w], around=around))
        half = [w.bfloat16()]
        probes.append(agreement(f"bfloat16, {part}", shared_qkv_attention, half, around=around, allowed=ROUNDED))
        probes.append(_dropped(f"dropout, {part}", w, around))
    return probes


def mask_probes() -> list[Probe]:
    """Every option that hides keys, on the reference and on the composed path, against a list of pairs."""
    key_mask = torch.tensor([[False, True, False, False, True, True, False], [False] * 7, [True] * 7])
    lengths, ends = torch.tensor([7, 2, 5]), torch.tensor([0, 2, 2, 6])
    options: dict[str, dict[str, Any]] = {
        "lengths": dict(lengths=lengths), "causal": dict(is_causal=True), "window": dict(window=2),
        "causal window": dict(window=2, is_causal=True), "wide window": dict(window=9), "keys": dict(key_mask=key_mask),
        "keys, causal": dict(key_mask=key_mask, is_causal=True), "keys, window": dict(key_mask=key_mask, window=1),
        "keys, lengths": dict(key_mask=key_mask, lengths=lengths), "padded window": dict(window=1, lengths=lengths),
        "plain": {}, "packed": dict(cu_seqlens=ends), "packed, window": dict(cu_seqlens=ends, window=2),
        "packed, all": dict(cu_seqlens=ends, is_causal=True, window=2, key_mask=key_mask[:1]),
    }  # fmt: skip
    probes = []
    for name, given in options.items():
        (w,) = random((1 if "cu_seqlens" in given else 3, 2, 7, 4))
        hidden = pairs_hidden(len(w), 7, **given)

        def formula(w: Tensor, hidden: Tensor = hidden) -> Tensor:
            weights = (w @ w.mT * 0.5).masked_fill(hidden, -1e300).softmax(-1).masked_fill(hidden, 0.0)
            lse = (w @ w.mT * 0.5).detach().masked_fill(hidden, -torch.inf).logsumexp(-1, keepdim=True)
            return torch.cat([weights @ w, lse.nan_to_num(neginf=-3.0)], -1)

        def attend(w: Tensor, given: dict[str, Any] = given, implementation: str = "composed") -> Tensor:
            with use(implementation):
                out, lse = shared_qkv_attention(w, return_lse=True, **given)
            return torch.cat([out, lse[..., None].nan_to_num(neginf=-3.0)], -1)

        for implementation in ("composed", "reference"):
            run = functools.partial(attend, implementation=implementation)
            # From 7 tokens on flash attention is taken, where a mask leaves it.
            around = functools.partial(sizes, long=7)
            probes.append(agreement(f"{name}, {implementation}", run, [w], formula, around=around))
    return probes


def _dropped(name: str, w: Tensor, around: Callable[[], contextlib.AbstractContextManager]) -> Probe:
    """The same seed gives the same factors, as often as they are asked for: the rows of a w of ones count them."""
    batch, heads, tokens, _ = w.shape

    def dropped(w: Tensor) -> Tensor:
        return shared_qkv_attention(w, scale=0.4, dropout=0.25, seed=3)

    with use("composed"), around():
        factors = torch.stack([_column_of_factors(batch, heads, tokens, column) for column in range(tokens)], -1)

    def formula(w: Tensor) -> Tensor:
        return ((w @ w.mT * 0.4).softmax(-1) * factors.to(w.dtype)) @ w

    return agreement(name, dropped, [w], formula, around=around)


def _column_of_factors(batch: int, heads: int, tokens: int, column: int) -> Tensor:
    """What dropout multiplies P[:, column] with: the scores are all alike, and only this token has a value."""
    w = torch.zeros(batch, heads, tokens, 4, dtype=torch.float64)
    w[:, :, column, 0] = 1
    return shared_qkv_attention(w, scale=1e-300, dropout=0.25, seed=3)[..., 0] * tokens


# --- Products by libraries --------------------------------------------------------------------------------------------


def product_probes() -> list[Probe]:
    x, weight, bias, total, a, b = random((2, 5, 6), (4, 6), (4,), (6, 6), (6, 6), (6, 6))
    single = [t.float() for t in (x, weight, bias)]
    linear = library_products.linear

    def gradients_of(product: Callable[..., Tensor], batched: bool) -> Callable[..., Tensor]:
        """The gradients as a function: as a loss may have them, or of several directions at once."""

        def function(x: Tensor, weight: Tensor) -> Tensor:
            leaves = [x.requires_grad_(), weight.requires_grad_()]
            out = product(*leaves)
            directions = torch.stack([out.detach(), 1 - out.detach()])
            in_direction = functools.partial(
                torch.autograd.grad, out, leaves, retain_graph=True, create_graph=not batched
            )
            found = torch.vmap(in_direction)(directions) if batched else in_direction(out)
            return torch.cat([grad.flatten() for grad in found]) + 0 * (x.sum() + weight.sum())

        return function

    def constant(product: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], ...]:
        """With a weight, or tokens, that ask for no gradient."""
        return lambda x: product(x, weight.to(x.dtype)), lambda weight: product(x.to(weight.dtype), weight)

    def mixed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    def updates() -> dict[str, Tensor]:
        t, one, two = total.float(), a.float(), b.float()
        return {
            "a b": library_products.product(one, two),
            "t + a b": library_products.plus_product(t, one, two),
            "2 t - 3 a b^T": library_products.plus_product(t, one, two.t(), beta=2, alpha=-3),
            "a^T b / 2 - t": library_products.plus_product(t, one.t(), two, beta=-1, alpha=0.5),
        }

    def float32_products() -> dict[str, Tensor]:
        found = {str(d): library_products.float32_product(a.to(d), b.to(d)) for d in (torch.float32, torch.bfloat16)}
        assert all(product.dtype == torch.float32 for product in found.values())
        return found

    def which_library(onednn: bool) -> dict[str, object]:
        rows, matrix = single[0].flatten(0, 1), single[1]
        given = {
            "float32": rows,
            "parameter": nn.Parameter(rows),
            "float64": rows.double(),
            "strided": rows.t().contiguous().t(),
        }
        with (
            this_cpu(onednn=onednn),
            patch.object(library_products, "_onednn", wraps=library_products._onednn) as by_onednn,
        ):
            found: dict[str, object] = {}
            for name, x in given.items():
                by_onednn.reset_mock()
                linear(x, matrix.to(x.dtype))
                found[name] = by_onednn.called
            return found

    exact = {
        "a b": a @ b,
        "t + a b": total + a @ b,
        "2 t - 3 a b^T": 2 * total - 3 * a @ b.mT,
        "a^T b / 2 - t": a.mT @ b / 2 - total,
    }
    probes = [
        agreement("float64", linear, [x, weight, bias], F.linear),
        agreement("no bias", linear, [x, weight], F.linear),
    ]
    for onednn in (True, False):
        around = functools.partial(this_cpu, onednn=onednn)
        close, rounded = dict(around=around, allowed=1e-6), dict(around=around, allowed=ROUNDED)
        name, empty, strided = f"oneDNN: {onednn}, ", single[0][:0], torch.randn(6, 8).t()[::2]
        (of_x, of_weight), (exact_of_x, exact_of_weight) = constant(linear), constant(F.linear)
        probes += [
            agreement(f"{name}float32", linear, single, F.linear, **close),
            agreement(f"{name}no bias", linear, single[:2], F.linear, **close),
            agreement(f"{name}a bias strided", linear, [*single[:2], torch.randn(8)[::2]], F.linear, **close),
            agreement(f"{name}a weight strided", linear, [single[0], strided], F.linear, **close),
            agreement(f"{name}no tokens", linear, [empty, *single[1:]], F.linear, **close),
            agreement(f"{name}a constant weight", of_x, single[:1], exact_of_x, **close),
            agreement(f"{name}constant tokens", of_weight, single[1:2], exact_of_weight, **close),
            agreement(f"{name}mixed", linear, [single[0].bfloat16(), *single[1:]], mixed, **rounded),
            agreement(f"{name}float16", linear, [t.half() for t in single], F.linear, **rounded),
            Probe(f"{name}updates", _within(around, updates), exact, dict.fromkeys(exact, 1e-6)),
            truth(
                f"{name}taken", functools.partial(which_library, onednn),
                float32=onednn, parameter=onednn, float64=False, strided=False,
            ),
        ]  # fmt: skip
        for batched in (True, False):
            of_linear, exactly = gradients_of(linear, batched), gradients_of(F.linear, batched)
            probes.append(agreement(f"{name}gradients, batched: {batched}", of_linear, single[:2], exactly, **close))
            halves = [t.half() for t in single[:2]]
            probes.append(
                agreement(f"{name}gradients, float16, batched: {batched}", of_linear, halves, exactly, **rounded)
            )
    in_bf16 = functools.partial(this_cpu, dtypes=(torch.bfloat16,))
    inputs = [single[0].bfloat16(), *single[1:]]
    rounded = {str(d): a.to(d).double() @ b.to(d).double() for d in (torch.float32, torch.bfloat16)}
    return [
        *probes,
        agreement("mixed, in bfloat16", linear, inputs, mixed, around=in_bf16, allowed=ROUNDED),
        Probe("products in float32", float32_products, rounded, dict.fromkeys(rounded, 1e-6)),
    ]


def _within(around: Callable[[], contextlib.AbstractContextManager], run: Callable[[], Any]) -> Callable[[], Any]:
    def inside() -> Any:
        with around():
            return run()

    return inside
