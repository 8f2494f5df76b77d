"""What the gate compiles: uses of the public operators, forward and backward, on meta tensors.

A new operator adds a function that makes its cases. A case of each new kernel or tile stands in ``tiles``, which every
architecture compiles; one of a choice that changes a kernel's code in ``flags``, which sm_90 compiles; one past 2^31
elements in ``far``. ``gate`` and ``everything`` are made of these three. The gate says itself what is missing: a kernel or
a shipped tile that no case reaches, and a kernel that no case takes past 2^31 elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

import crate_kernels
from benchmarks.ahead_of_time.collecting import Case

# "tf32" is float32 tensors with tensor cores allowed to round their operands; "autocast" a float32 stream with bfloat16 operands.
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
    "autocast": torch.float32,
}

# Why kernels that read such tensors may be slow.
SCATTERED = "the features of a token do not lie side by side: no copy into shared memory runs beside the products"

# The architectures that the gate compiles for by default.
GATE_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

FLAGS = (False, True)
# One of each shipped tile's width; 48 and 80 are CRATE-MAE-Small's and a Large's.
HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128)
TOKENS = 197


def empty(dtype: str, *memory: int, order: tuple[int, ...] | None = None) -> Tensor:
    """A meta tensor that wants a gradient: sizes as they lie in ``memory``, dimensions in another ``order`` if given."""
    tensor = torch.empty(memory, dtype=DTYPES[dtype], device="meta")
    return (tensor if order is None else tensor.permute(order)).requires_grad_()


def backward(out: Tensor | tuple[Tensor, ...]) -> None:
    """Run the backward of an operator's result, with a gradient that lies in memory as the result does."""
    assert isinstance(out, Tensor)
    out.backward(torch.empty_like(out))


def norm_of(dtype: str, width: int) -> dict[str, Any]:
    """The arguments that ask an operator for a LayerNorm before it."""
    return {"norm_weight": empty(dtype, width), "norm_bias": empty(dtype, width)}


def attention(
    dtype: str,
    head_dim: int = 64,
    is_causal: bool = False,
    tokens: int = TOKENS,
    batch: int = 8,
    memory: str = "batch token head feature",
    padded: bool = False,
    dropout: float = 0.0,
    window: int | None = None,
    packed: bool = False,
    key_mask: bool = False,
    learned: bool = False,
) -> Case:
    """Shared-QKV attention of 12 heads, at first on the view that the projection leaves."""
    sizes = {"batch": batch, "head": 12, "token": tokens, "feature": head_dim}
    names = memory.split()

    def call() -> None:
        w = empty(dtype, *(sizes[name] for name in names), order=tuple(map(names.index, sizes)))
        options: dict[str, Any] = dict(is_causal=is_causal, window=window, dropout=dropout)
        options["lengths"] = torch.empty(batch, dtype=torch.int64, device="meta") if padded else None
        options["cu_seqlens"] = torch.empty(5, dtype=torch.int32, device="meta") if packed else None
        options["key_mask"] = torch.empty(batch, tokens, dtype=torch.bool, device="meta") if key_mask else None
        options["scale"] = empty("float32", 12) if learned else None
        backward(crate_kernels.shared_qkv_attention(w, **options))

    shape = f"d={head_dim} N={tokens}" + " causal" * is_causal + " padded" * padded + " dropout" * (dropout > 0)
    shape += " window" * (window is not None) + " packed" * packed + " keys" * key_mask + " learned scales" * learned
    shape += f" B={batch} {memory}" * (batch != 8)
    return Case("attention", dtype, shape, call, slow="" if names[-1] == "feature" else SCATTERED)


def ista(
    dtype: str,
    images: int = 64,
    width: int = 768,
    norm: bool = False,
    soft: bool = False,
    learned: bool = False,
    feature_major: bool = False,
) -> Case:
    """ISTA on the tokens of so many images: more tokens than the width make it the one-product form."""

    def call() -> None:
        memory, order = ((width, images * TOKENS), (1, 0)) if feature_major else ((images * TOKENS, width), None)
        arguments: dict[str, Any] = {"threshold": "soft" if soft else "relu"}
        if norm:
            arguments |= norm_of(dtype, width)
        if learned:  # a number on the device, whose gradient is no kernel of ours
            arguments["lambd"] = empty("float32", 1).detach()
        y = crate_kernels.ista(empty(dtype, *memory, order=order), empty(dtype, width, width), **arguments)
        y.backward(torch.empty(memory, dtype=y.dtype, device="meta").permute(order or (0, 1)))

    form = "one-product" if images * TOKENS > width else "two-product"
    flags = " LN" * norm + " soft" * soft + " learned" * learned + " feature-major" * feature_major
    return Case(
        "ista", dtype, f"D={width} M={images * TOKENS} {form}{flags}", call, slow=SCATTERED if feature_major else ""
    )


def mssa(dtype: str, subtract: bool = False, norm: bool = True, bias: bool = True, images: int = 64) -> Case:
    """MSSA of width 768 with its residual: x + MSSA(LN x), or the decoder's g - MSSA(LN g)."""

    def call() -> None:
        x = empty(dtype, images, TOKENS, 768)
        arguments = norm_of(dtype, 768) if norm else {}
        weights = empty(dtype, 768, 768), empty(dtype, 768, 768), empty(dtype, 768) if bias else None
        backward(crate_kernels.mssa(x, *weights, num_heads=12, skip=x, subtract=subtract, **arguments))

    flags = " LN" * norm + " bias" * bias + " subtract" * subtract
    return Case("mssa", dtype, f"D=768 M={images * TOKENS}{flags}", call)


def preparation(dtype: str, is_encoder: bool = True, layers: int = 12, width: int = 768) -> Case:
    """The preparation of the weights of many layers for their products."""

    def call() -> None:
        from crate_kernels.products.norm_folding import Norm

        def norm() -> Norm:
            return Norm(empty("float32", width), empty("float32", width))

        def matrix() -> Tensor:
            return empty("float32", width, width)

        x = torch.empty((1, 1, width), dtype=DTYPES[dtype], device="meta")
        attention = [crate_kernels.AttentionWeights(matrix(), matrix(), empty("float32", width)) for _ in range(layers)]
        encoder = [crate_kernels.EncoderWeights(norm(), one, norm(), matrix()) for one in attention]
        decoder = [crate_kernels.DecoderWeights(norm(), matrix(), norm(), one) for one in attention]
        crate_kernels.prepare_layers(x, encoder if is_encoder else decoder, num_heads=12)

    kind = "encoder" if is_encoder else "decoder"
    return Case("preparation", dtype, f"D={width} {kind} layers={layers}", call)


def norm_linear(dtype: str, bias: bool = False, images: int = 64) -> Case:
    """The decoder's linear step LN(x) W^T, of width 768."""

    def call() -> None:
        x, weight = empty(dtype, images * TOKENS, 768), empty(dtype, 768, 768)
        backward(crate_kernels.norm_linear(x, weight, empty(dtype, 768) if bias else None, **norm_of(dtype, 768)))

    return Case("norm_linear", dtype, f"D=768 M={images * TOKENS} LN" + " bias" * bias, call)


def overcomplete(dtype: str, images: int = 64) -> Case:
    """CRATE-alpha's sparse step with its skip, of width 768 and four times as many codes."""

    def call() -> None:
        x, dictionary, out = empty(dtype, images * TOKENS, 768), empty(dtype, 768, 3072), empty(dtype, 768, 3072)
        backward(crate_kernels.overcomplete_ista(x, dictionary, out, skip=x, **norm_of(dtype, 768)))

    return Case("overcomplete", dtype, f"D=768 codes=3072 M={images * TOKENS} LN", call)


def layer(dtype: str, is_encoder: bool = True, images: int = 64) -> Case:
    """A layer of CRATE-MAE-Base, whose steps give moments to each other."""

    def call() -> None:
        from crate_kernels.products.norm_folding import Norm

        def norm() -> Norm:
            return Norm(empty(dtype, 768), empty(dtype, 768))

        x, matrix = empty(dtype, images, TOKENS, 768), empty(dtype, 768, 768)
        attention = crate_kernels.AttentionWeights(empty(dtype, 768, 768), empty(dtype, 768, 768), empty(dtype, 768))
        if is_encoder:
            backward(crate_kernels.encoder_layer(x, norm(), attention, norm(), matrix, num_heads=12))
        else:
            backward(crate_kernels.decoder_layer(x, norm(), matrix, norm(), attention, num_heads=12))

    return Case("layer", dtype, f"D=768 M={images * TOKENS} {'encoder' if is_encoder else 'decoder'}", call)


def tiles(*dtypes: str, head_dims: Sequence[int] = HEAD_DIMS) -> list[Case]:
    """Every tile that ships for the dtypes, each once, and the steps and layers of CRATE-MAE."""
    cases = [attention(dtype, head_dim) for dtype in dtypes if dtype != "autocast" for head_dim in head_dims]
    cases += [layer(dtype, is_encoder) for dtype in dtypes if dtype == "bfloat16" for is_encoder in FLAGS]
    return cases + [use for dtype in dtypes for use in (ista(dtype, norm=True), mssa(dtype), preparation(dtype))]


def flags() -> list[Case]:
    """Each choice that changes the code, at the size of CRATE-MAE-Base."""
    cases = [attention("bfloat16", is_causal=True)]
    # Tails of 0, 16 (as of 197), 32 and 64 tokens.
    cases += [attention("bfloat16", tokens=tokens) for tokens in (256, 785, 50)]
    # As many heads as give the last rows a launch of their own.
    cases += [attention("bfloat16", padded=True, batch=256), attention("bfloat16", dropout=0.1)]
    cases += [attention("bfloat16", head_dim, batch=256) for head_dim in (80, 128)]
    cases += [attention("bfloat16", window=64), attention("bfloat16", is_causal=True, packed=True, batch=1, tokens=785)]
    cases += [attention("bfloat16", key_mask=True), attention("bfloat16", learned=True, batch=256)]
    cases += [use(dtype) for use in (attention, mssa) for dtype in ("float16", "tf32")]
    cases += [ista("bfloat16", images) for images in (1, 64)]
    cases += [ista("bfloat16", soft=True), ista("bfloat16", norm=True, learned=True)]
    cases += [norm_linear("autocast"), overcomplete("autocast")]
    return [*cases, mssa("bfloat16", subtract=True)]


def far() -> list[Case]:
    """Tensors of more than 2^31 elements whose strides fit 32 bits, from one image to the next, one token, one feature.

    Offsets are computed alike in every dtype: one will do.
    """
    cases = [attention("bfloat16", is_causal=is_causal, batch=2**20) for is_causal in FLAGS]
    cases += [attention("float32", batch=2**20), attention("bfloat16", window=64, key_mask=True, batch=2**20)]
    cases += [attention("bfloat16", batch=2**19, memory="token batch head feature")]
    cases += [attention("bfloat16", batch=2**19, memory="feature batch head token")]
    cases += [ista("bfloat16", 2**15, norm=True), ista("bfloat16", 2**15, feature_major=True)]
    cases += [use("bfloat16", images=2**15) for use in (mssa, norm_linear, overcomplete)]
    return [
        *cases,
        layer("bfloat16", images=2**15),
        ista("bfloat16", 2**8, width=2**16),
        ista("bfloat16", 2**9, width=2**16, norm=True),
        preparation("bfloat16", layers=40, width=2**13),
    ]


def gate(target: str) -> list[Case]:
    """Few enough for a test: on sm_90 every tile and every flag, elsewhere the default tiles."""
    if target == "sm_90":
        return tiles("bfloat16", "autocast", "float32") + flags() + far()
    if target == "sm_80":
        wide = [use for dtype in ("autocast", "float32") for use in (ista(dtype, norm=True), mssa(dtype))]
        return [*tiles("bfloat16"), *wide, overcomplete("autocast")]
    return tiles("bfloat16", head_dims=(48, 64, 128))


def everything(target: str) -> list[Case]:
    """The gate's cases and all combinations, at the widths of CRATE-MAE Small and Base."""
    cases = tiles(*DTYPES) + flags() + far()
    cases += [attention(*variant) for variant in product(DTYPES, HEAD_DIMS, FLAGS) if variant[0] != "autocast"]
    cases += [attention("bfloat16", d, c, window=64, key_mask=True) for d, c in product(HEAD_DIMS, FLAGS)]
    cases += [attention("bfloat16", d, c, packed=True, learned=True, batch=1) for d, c in product(HEAD_DIMS, FLAGS)]
    cases += [ista(*variant) for variant in product(DTYPES, (1, 64), (576, 768), FLAGS, FLAGS, FLAGS)]
    cases += [mssa(*variant) for variant in product(DTYPES, FLAGS, FLAGS, FLAGS)]
    cases += [norm_linear(*variant) for variant in product(DTYPES, FLAGS)]
    return cases + [overcomplete(dtype) for dtype in DTYPES]
