"""The layers of the models, one fused call each, and what embeds their patches, by the official parameter names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crate_kernels import (
    ISTA,
    MSSA,
    DecoderStep,
    DecoderWeights,
    EncoderWeights,
    Norm,
    OvercompleteISTA,
    PreparedLayer,
    decoder_layer,
    encoder_layer,
    library_products,
)
from crate_kernels.dispatch import choose, is_plain
from crate_kernels.dtypes import compute_dtype, no_autocast
from crate_kernels.fusing import hooks_of_all_modules, known, norm_obstacle, obstacle, say
from crate_kernels.nn import takes_norm
from crate_mae.config import ClassifierConfig, ModelConfig

DROPS_PATHS = "it drops paths"
"""The obstacle that nobody need be told of: stochastic depth was asked for, and its branch is still one fused call."""


@known
class PreNorm(nn.Module):
    """A LayerNorm and the step it precedes, under their official names; a step of ours does both at once."""

    def __init__(self, dim: int, fn: nn.Module, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        if takes_norm(self.fn):
            return self.fn(x, norm=self.norm, **kwargs)
        return self.fn(self.norm(x), **kwargs)


class Block(nn.Module):
    """What all kinds of layers share: one fused call where their modules are what they were made as, else the modules.

    See ``crate_kernels.fusing`` for the rule. ``recompute`` holds in either case.

    The two steps have the names that they have in the official CRATE-MAE, ``layers.0.0`` and ``layers.0.1``, or with
    ``nested=False`` those of the official CRATE and CRATE-alpha, ``0`` and ``1``.

    drop_path: probability of stochastic depth (arXiv 1603.09382), in training only: of each sample by itself a residual branch
        is left out, and where it stays it counts 1 / (1 - drop_path). 0, as it is at first, draws nothing.
    """

    drop_path: float = 0.0

    def __init__(self, *steps: PreNorm, nested: bool = True) -> None:
        super().__init__()
        if nested:
            self.layers = nn.ModuleList([nn.ModuleList(steps)])
            return
        for index, step in enumerate(steps):
            self.add_module(str(index), step)

    def forward(self, x: Tensor, *, recompute: bool = False, prepared: PreparedLayer | None = None) -> Tensor:
        """``prepared``: of ``self.weights()``, by someone who has seen that there is no ``obstacle`` for these tokens."""
        reason = None if prepared is not None else self.obstacle(x)
        if reason is None:
            return self._fused(x, recompute, prepared)
        if reason != DROPS_PATHS:
            say(type(self).__name__, reason)
        return checkpoint(self._official, x, use_reentrant=False) if recompute else self._official(x)

    def obstacle(self, x: Tensor) -> str | None:
        """Why the modules must be called one by one on x, in words; None where one fused call stands for all of them."""
        if self.training and self.drop_path:
            return DROPS_PATHS
        layers, steps = self._modules.get("layers"), list(self._modules.values())
        if layers is not None:
            if reason := obstacle("layers", layers, nn.ModuleList):
                return reason
            pairs = list(layers._modules.values())
            steps = list(pairs[0]._modules.values()) if len(pairs) == 1 else []
        if len(steps) != 2:
            return "it has other steps than it was made with"
        for step, kind in zip(steps, self._kinds, strict=True):
            if reason := obstacle("a step", step, PreNorm):
                return reason
            norm, fn = step._modules["norm"], step._modules["fn"]
            if reason := obstacle("fn", fn, kind) or norm_obstacle(norm, x) or self._obstacle_of(fn):
                return reason
        return None

    def _steps(self) -> list[tuple[nn.Module, nn.Module]]:
        """The norm and the step of each PreNorm. Out of the dictionaries: attributes of modules cost a microsecond each."""
        layers = self._modules.get("layers")
        steps = (self if layers is None else layers._modules["0"])._modules.values()
        return [(step._modules["norm"], step._modules["fn"]) for step in steps]

    def _pairs(self) -> Iterable[Iterable[nn.Module]]:
        """The steps that stand here now, two by two; one pair, unless someone added others."""
        return self.layers if "layers" in self._modules else [self._modules.values()]

    def attention(self, x: Tensor) -> Tensor:
        """Attention weights [batch, heads, tokens, tokens] of an encoder's layer on its input x."""
        attention, _ = next(iter(self._pairs()))
        return attention(x, return_attention=True)

    def _kept(self, branch: Tensor) -> Tensor:
        """A residual branch [batch, tokens, width] after stochastic depth."""
        if not (self.training and self.drop_path):
            return branch
        kept, dtype = 1 - self.drop_path, torch.promote_types(branch.dtype, torch.float32)
        return branch * torch.empty(len(branch), 1, 1, device=branch.device, dtype=dtype).bernoulli_(kept).div_(kept)

    @staticmethod
    def _obstacle_of(step: nn.Module) -> str | None:
        """What about a step of the right kind a fused layer does not do."""
        if isinstance(step, MSSA):
            reason = step.obstacle() or ("its attention is causal" if step.is_causal else None)
            return reason or ("its attention has dropout" if step.dropout_rate else None)
        if "combined" in step._buffers:
            return "it is frozen"
        return None if is_plain(step.weight) else f"it has a weight of class {type(step.weight).__name__}"


class EncoderBlock(Block):
    """z = x + MSSA(LN x); out = ISTA(LN z)."""

    _kinds = MSSA, ISTA

    def __init__(self, config: ModelConfig | ClassifierConfig, *, nested: bool = True) -> None:
        width, heads = config.embed_dim, config.num_heads
        attention = PreNorm(width, MSSA(width, heads, width // heads))
        super().__init__(attention, PreNorm(width, ISTA(width, config.step_size, config.lambd)), nested=nested)

    @property
    def step_size(self) -> float | Tensor:
        """Of the sparse step, as it stands there now."""
        return self._steps()[1][1].step_size

    def weights(self) -> EncoderWeights:
        (attention_norm, attention), (sparse_norm, sparsify) = self._steps()
        return EncoderWeights(_norm(attention_norm), attention.weights(), _norm(sparse_norm), sparsify.weight)

    def _fused(self, x: Tensor, recompute: bool, prepared: PreparedLayer | None) -> Tensor:
        (_, attention), (_, sparsify) = self._steps()
        heads = dict(num_heads=attention.heads, scale=attention.scale)
        numbers = dict(step_size=sparsify.step_size, lambd=sparsify.lambd, threshold=sparsify.threshold)
        return encoder_layer(x, *self.weights(), **heads, **numbers, recompute=recompute, prepared=prepared)

    def _official(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        for attention, sparsify in self._pairs():
            x = sparsify((self._kept(attention(x)) + x).to(dtype)).to(dtype)
        return x


class AlphaBlock(Block):
    """CRATE-alpha's layer: z = x + MSSA(LN x); out = z + ODL(LN z), with W_out without bias (arXiv 2405.20299, section 3)."""

    _kinds = MSSA, OvercompleteISTA

    def __init__(self, config: ClassifierConfig) -> None:
        width, heads = config.embed_dim, config.num_heads
        attention = MSSA(width, heads, width // heads, out_bias=False)
        sparsify = OvercompleteISTA(width, eta=config.step_size, lmbda=config.lambd)
        super().__init__(PreNorm(width, attention, 1e-6), PreNorm(width, sparsify, 1e-6), nested=False)

    @staticmethod
    def _obstacle_of(step: nn.Module) -> str | None:
        return hooks_of_all_modules()  # beside these, each step is called as a module, which has its own rule

    def _fused(self, x: Tensor, recompute: bool, prepared: None) -> Tensor:
        def run(x: Tensor) -> Tensor:
            dtype = x.dtype
            for norm, step in self._steps():
                x = step(x, norm=norm, skip=x).to(dtype)
            return x

        return checkpoint(run, x, use_reentrant=False) if recompute else run(x)

    def _official(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        for pair in self._pairs():
            for step in pair:
                x = (self._kept(step(x)) + x).to(dtype)
        return x


class DecoderBlock(Block):
    """g = LN(x) W^T; out = g - MSSA(LN g)."""

    _kinds = DecoderStep, MSSA

    def __init__(self, config: ModelConfig) -> None:
        width, heads = config.embed_dim, config.decoder_num_heads
        super().__init__(PreNorm(width, DecoderStep(width)), PreNorm(width, MSSA(width, heads, width // heads)))

    def weights(self) -> DecoderWeights:
        (step_norm, densify), (attention_norm, attention) = self._steps()
        return DecoderWeights(_norm(step_norm), densify.weight, _norm(attention_norm), attention.weights())

    def _fused(self, x: Tensor, recompute: bool, prepared: PreparedLayer | None) -> Tensor:
        _, (_, attention) = self._steps()
        heads = dict(num_heads=attention.heads, scale=attention.scale)
        return decoder_layer(x, *self.weights(), **heads, recompute=recompute, prepared=prepared)

    def _official(self, x: Tensor) -> Tensor:
        for densify, attention in self._pairs():
            x = densify(x)
            x = x - attention(x)
        return x


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear``; on the composed path by its own products, which no CPU has to emulate."""
    dtype = compute_dtype(x)
    if choose("linear", x, dtype) != "composed":
        return F.linear(x, weight, bias)
    with no_autocast(x):
        return library_products.linear(x.to(dtype), weight, bias)


class Linear(nn.Linear):
    """``nn.Linear``, by the products of ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def _norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


@known
class PatchEmbed(nn.Module):
    """Images [batch, channels, height, width] -> tokens [batch, patches, width]: one linear map a patch."""

    def __init__(self, config: ModelConfig | ClassifierConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)

    def of_patches(self, patches: Tensor) -> Tensor:
        """Tokens of patches [batch, any number, patch_size**2 * channels] as ``patchify`` has them."""
        channels, size = self.proj.in_channels, self.proj.kernel_size[0]
        as_weights = rearrange(patches, "b n (p q c) -> b n (c p q)", c=channels, p=size)
        return linear(as_weights, self.proj.weight.flatten(1), self.proj.bias)


def embedding_obstacle(embed: nn.Module) -> str | None:
    """Why ``embed`` must be called as a module, in words; None where its ``of_patches`` stands for it."""
    if reason := hooks_of_all_modules() or obstacle("patch_embed", embed, PatchEmbed):
        return reason
    proj = embed.proj
    if reason := obstacle("patch_embed.proj", proj, nn.Conv2d):
        return reason
    is_one_map_a_patch = proj.stride == proj.kernel_size and proj.padding == (0, 0) and proj.dilation == (1, 1)
    if not is_one_map_a_patch or proj.groups != 1 or not is_plain(proj.weight):
        return "patch_embed.proj is more than one linear map a patch"
    return None
