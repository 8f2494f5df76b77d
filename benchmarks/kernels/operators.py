"""Every operator with its inputs, its peers, and the least work it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import crate_kernels
from benchmarks import harness, peers
from benchmarks.kernels.masks import MASKS
from benchmarks.peers import Function, Peer
from crate_kernels import AttentionWeights, Norm

STEP_SIZE, LAMBD = 0.1, 0.5

# Makes, from inputs and upstream gradient, a provider that runs library products alone; copies are made beforehand.
Products = Callable[[list[Tensor], Tensor], harness.Provider]
# A normal sample of a size, on the device, in the dtype of the run or in float32.
Random = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    width: int
    heads: int
    mask: str = ""  # of ``MASKS``; attention alone has any

    def of(self, operator: str) -> dict[str, Any]:
        """``operator`` and ``shape`` as rows have them: behind a mask there is other work, and so it has another name."""
        sizes = asdict(self)
        mask = sizes.pop("mask")
        return {"operator": f"{operator}_{mask}" if mask else operator, "shape": sizes}

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def product(self) -> int:
        """FLOPs of tokens times one square matrix."""
        return 2 * self.rows * self.width**2

    @property
    def small(self) -> int:
        """FLOPs of one product of two square matrices."""
        return 2 * self.width**3

    @property
    def scores(self) -> int:
        """FLOPs of one product of all tokens with all tokens, every head."""
        return 2 * self.rows * self.tokens * self.width

    def heads_of(self, tokens: Tensor) -> Tensor:
        """[batch, tokens, width] -> the view [batch, heads, tokens, head_dim]."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


@dataclass(frozen=True)
class Comparison:
    """An operator, and what it is compared with.

    inputs: draws the operator's random inputs, the tokens first; all of them get a gradient.
    operator: our public function.
    flops: the least that forward and backward take.
    best: the same from PyTorch's own calls, for torch.compile; None where the official order is that already.
    peers: other code that computes the same.
    products: the library products of the same shape, a mode; a mark to measure by, not the same result.
    upstream: draws a gradient for the output, whose shape is that of the tokens.
    inner_threshold: it has a threshold inside, near which ``upstream`` cannot set gradients to zero.
    """

    inputs: Callable[[], list[Tensor]]
    operator: Function
    flops: tuple[int, int]
    upstream: Callable[[list[Tensor]], Tensor]
    best: Function | None = None
    peers: dict[str, Peer] = field(default_factory=dict)
    products: dict[str, dict[str, Products]] = field(default_factory=dict)
    inner_threshold: bool = False

    def everyone(self) -> dict[str, Peer]:
        """All peers: the official order under torch.compile, the best composed, and those that only this operator has."""
        found = {
            "official compiled": Peer(self.operator, mode="default", implementation="reference"),
            "official max-autotune": Peer(self.operator, mode=peers.MAX_AUTOTUNE, implementation="reference"),
        }
        if self.best is not None:
            found["best composed"] = Peer(self.best, mode="default")
        return found | self.peers

    def least_flops(self, mode: str) -> int:
        forward, backward = self.flops
        return {"forward": forward, "backward": backward}.get(mode, forward + backward)


def away_from_threshold(random: Random, function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
    """A random gradient of the function's output, zero near the threshold, where rounding decides which side an element is on.

    Near is within step_size * LAMBD, as ``function(*inputs, lambd=...)`` in float64 tells.
    """
    with torch.no_grad(), crate_kernels.use("reference"):
        inputs = [value.double() for value in inputs]
        passed = [function(*inputs, lambd=lambd) > 0 for lambd in (0.0, 2 * LAMBD)]
    return random(*inputs[0].shape) * (passed[0] == passed[1])


def attend(w: Tensor, key_mask: Tensor | None = None, **options: Any) -> Tensor:
    """``shared_qkv_attention`` of a batch, or of a few of its samples; its second result comes only where it is asked for."""
    out = crate_kernels.shared_qkv_attention(w, key_mask=None if key_mask is None else key_mask[: len(w)], **options)
    assert isinstance(out, Tensor)
    return out


def attention(shape: Shape, random: Random) -> Comparison:
    def forward_products(inputs: list[Tensor], _: Tensor) -> harness.Provider:
        w = inputs[0].flatten(0, 1)

        def products() -> list[Tensor]:
            scores = torch.bmm(w, w.mT)
            return [scores, torch.bmm(scores, w)]

        return products

    def backward_products(inputs: list[Tensor], upstream: Tensor) -> harness.Provider:
        w, grad = inputs[0].flatten(0, 1), upstream.flatten(0, 1)

        def products() -> list[Tensor]:
            scores, grad_scores = torch.bmm(w, w.mT), torch.bmm(grad, w.mT)
            as_rows = [torch.bmm(scores.mT, grad), torch.bmm(grad_scores, w), torch.bmm(grad_scores.mT, w)]
            return [scores, grad_scores, *as_rows]

        return products

    plain = Comparison(
        inputs=lambda: [shape.heads_of(random(shape.batch, shape.tokens, shape.width))],
        operator=attend,
        flops=(2 * shape.scores, 5 * shape.scores),
        upstream=lambda _: shape.heads_of(random(shape.batch, shape.tokens, shape.width)),
        best=peers.attention,
        peers=dict(peers.ATTENTION),
        products={"products": with_both({"forward": forward_products, "backward": backward_products})},
    )
    if not shape.mask:
        return plain
    device = random(0).device
    mask = MASKS[shape.mask](shape.batch, shape.tokens, device)
    scores = 2 * shape.batch * mask.pairs * shape.width
    return replace(
        plain,
        operator=partial(attend, **mask.options),
        flops=(2 * scores, 5 * scores),
        best=partial(peers.attention, **mask.for_sdpa(shape.tokens, device)),
        peers=mask.peers(shape.tokens, device),
        products={},  # which compute all pairs
    )


def ista(shape: Shape, random: Random) -> Comparison:
    def operator(x: Tensor, weight: Tensor, lambd: float = LAMBD) -> Tensor:
        return crate_kernels.ista(x, weight, step_size=STEP_SIZE, lambd=lambd)

    def epilogue(inputs: list[Tensor], _: Tensor) -> harness.Provider:
        bias = torch.full_like(inputs[1][0], -STEP_SIZE * LAMBD)
        return lambda: torch._addmm_activation(bias, *inputs)

    products: dict[str, Products] = {
        "forward": lambda inputs, _: lambda: torch.mm(*inputs),
        "backward": lambda inputs, grad: lambda: [torch.mm(grad, inputs[1].T), torch.mm(inputs[0].T, grad)],
    }
    # cuBLAS has no epilogue that the backward could use.
    with_epilogue = with_both({**products, "forward": epilogue})
    del with_epilogue["backward"]
    return Comparison(
        inputs=lambda: [random(shape.rows, shape.width), random(shape.width, shape.width) * (2 / shape.width) ** 0.5],
        operator=operator,
        flops=(shape.product + shape.small, 2 * shape.product + shape.small),
        upstream=lambda inputs: away_from_threshold(random, operator, inputs),
        best=lambda x, weight: peers.ista(x, weight, step_size=STEP_SIZE, lambd=LAMBD),
        products={"products": with_both(products), "products with epilogue": with_epilogue},
    )


def mssa(shape: Shape, random: Random) -> Comparison:
    """Without LayerNorm and residual; its library products are the projections, without the attention between them."""

    def forward_products(inputs: list[Tensor], _: Tensor) -> harness.Provider:
        x = inputs[0].flatten(0, 1)
        return lambda: [torch.mm(x, weight.T) for weight in inputs[1:3]]

    def backward_products(inputs: list[Tensor], upstream: Tensor) -> harness.Provider:
        x, grad = inputs[0].flatten(0, 1), upstream.flatten(0, 1)
        return lambda: [product for weight in inputs[1:3] for product in (torch.mm(grad, weight), torch.mm(grad.T, x))]

    return Comparison(
        inputs=lambda: [random(shape.batch, shape.tokens, shape.width), *_attention_weights(shape, random)],
        operator=lambda x, *weights: crate_kernels.mssa(x, *weights, num_heads=shape.heads),
        flops=(2 * (shape.product + shape.scores), 4 * shape.product + 5 * shape.scores),
        upstream=lambda inputs: random(*inputs[0].shape),
        best=lambda x, *weights: peers.mssa(x, AttentionWeights(*weights), shape.heads),
        products={"products": with_both({"forward": forward_products, "backward": backward_products})},
    )


def encoder_layer(shape: Shape, random: Random) -> Comparison:
    """Its tokens are float32, as the official stream between encoder layers is."""

    def of(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *weights: Tensor, lambd: float = LAMBD) -> Tensor:
            attention, first, second, dictionary = _weights_of_layer(weights)
            numbers = dict(num_heads=shape.heads, step_size=STEP_SIZE, lambd=lambd)
            return layer(x, first, attention, second, dictionary, **numbers)

        return run

    def inputs() -> list[Tensor]:
        x = random(shape.batch, shape.tokens, shape.width, dtype=torch.float32)
        dictionary = random(shape.width, shape.width) * (2 / shape.width) ** 0.5
        return [x, *_attention_weights(shape, random), *_norm(shape, random), *_norm(shape, random), dictionary]

    operator = of(crate_kernels.encoder_layer)
    return Comparison(
        inputs=inputs,
        operator=operator,
        flops=(3 * shape.product + 2 * shape.scores + shape.small, 6 * shape.product + 5 * shape.scores + shape.small),
        upstream=lambda inputs: away_from_threshold(random, operator, inputs).float(),
        best=of(peers.encoder_layer),
    )


def decoder_layer(shape: Shape, random: Random) -> Comparison:
    def of(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *weights: Tensor) -> Tensor:
            attention, first, second, matrix = _weights_of_layer(weights)
            return layer(x, first, matrix, second, attention, num_heads=shape.heads)

        return run

    def inputs() -> list[Tensor]:
        x, matrix = random(shape.batch, shape.tokens, shape.width), random(shape.width, shape.width) * shape.width**-0.5
        return [x, *_attention_weights(shape, random), *_norm(shape, random), *_norm(shape, random), matrix]

    return Comparison(
        inputs=inputs,
        operator=of(crate_kernels.decoder_layer),
        flops=(3 * shape.product + 2 * shape.scores, 6 * shape.product + 5 * shape.scores),
        upstream=lambda inputs: random(*inputs[0].shape),
        best=of(peers.decoder_layer),
    )


def norm_linear(shape: Shape, random: Random) -> Comparison:
    def inputs() -> list[Tensor]:
        matrix = random(shape.width, shape.width) * shape.width**-0.5
        return [random(shape.rows, shape.width), matrix, *_norm(shape, random)]

    products: dict[str, Products] = {
        "forward": lambda inputs, _: lambda: torch.mm(inputs[0], inputs[1].T),
        "backward": lambda inputs, grad: lambda: [torch.mm(grad, inputs[1]), torch.mm(grad.T, inputs[0])],
    }
    return Comparison(
        inputs=inputs,
        operator=lambda x, matrix, *norm: crate_kernels.norm_linear(x, matrix, norm_weight=norm[0], norm_bias=norm[1]),
        flops=(shape.product, 2 * shape.product),
        upstream=lambda inputs: random(*inputs[0].shape),
        best=lambda x, matrix, weight, bias: peers.norm_linear(x, matrix, Norm(weight, bias)),
        products={"products": with_both(products)},
    )


def overcomplete_ista(shape: Shape, random: Random) -> Comparison:
    """Four times as many codes as features, two dictionaries, as the published models have them."""
    codes = 4 * shape.width

    def inputs() -> list[Tensor]:
        dictionaries = [random(shape.width, codes) * codes**-0.5 for _ in range(2)]
        return [random(shape.rows, shape.width), *dictionaries]

    product = 2 * shape.rows * shape.width * codes
    return Comparison(
        inputs=inputs,
        operator=lambda x, *dictionaries: crate_kernels.overcomplete_ista(
            x, *dictionaries, step_size=STEP_SIZE, lambd=LAMBD
        ),
        # Backward: five products of the tokens' gradients, four of the dictionaries'; one is the residual again.
        flops=(4 * product, 9 * product),
        upstream=lambda inputs: random(*inputs[0].shape),
        inner_threshold=True,
    )


def with_both(products: dict[str, Products]) -> dict[str, Products]:
    """Forward's and backward's products, and those of both one after the other."""

    def both(inputs: list[Tensor], upstream: Tensor) -> harness.Provider:
        providers = [products[mode](inputs, upstream) for mode in ("forward", "backward")]
        return lambda: [provider() for provider in providers]

    return {**products, "forward+backward": both}


def _attention_weights(shape: Shape, random: Random) -> list[Tensor]:
    """qkv, out, out_bias"""
    return [*(random(shape.width, shape.width) * shape.width**-0.5 for _ in range(2)), random(shape.width)]


def _norm(shape: Shape, random: Random) -> list[Tensor]:
    """Weight and bias of a LayerNorm, float32 like every model's."""
    weight, bias = (0.1 * random(shape.width, dtype=torch.float32) for _ in range(2))
    return [1 + weight, bias]


def _weights_of_layer(weights: Sequence[Tensor]) -> tuple[AttentionWeights, Norm, Norm, Tensor]:
    """The eight tensors of a layer, as its inputs have them, put together: attention, two norms, the last matrix."""
    qkv, out, out_bias, weight, bias, second_weight, second_bias, matrix = weights
    return AttentionWeights(qkv, out, out_bias), Norm(weight, bias), Norm(second_weight, second_bias), matrix


OPERATORS: dict[str, Callable[[Shape, Random], Comparison]] = {
    "attention": attention,
    "ista": ista,
    "mssa": mssa,
    "encoder_layer": encoder_layer,
    "decoder_layer": decoder_layer,
    "norm_linear": norm_linear,
    "overcomplete_ista": overcomplete_ista,
}
WITH_HEADS = ("attention", "mssa", "encoder_layer", "decoder_layer")
