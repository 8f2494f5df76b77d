"""The layers of the models, one fused call each, and what embeds their patches, by the official parameter names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

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
"""The one obstacle without a warning: stochastic depth was asked for, and its branch is still one fused call."""

First = TypeVar("First", bound=nn.Module)
Second = TypeVar("Second", bound=nn.Module)


@known
class PreNorm(nn.Module):
    """A LayerNorm and the step behind it, under their official names. Our own steps compute the norm, too, in one call."""

    norm: nn.LayerNorm
    fn: nn.Module

    def __init__(self, dim: int, fn: nn.Module, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        if takes_norm(self.fn):
            return self.fn(x, norm=self.norm, **kwargs)
        return self.fn(self.norm(x), **kwargs)


class Block(nn.Module, ABC, Generic[First, Second]):
    """A layer of two steps: one fused call while its modules are as they were made, else one call a module.

    ``crate_kernels.fusing`` has the rule. ``recompute`` works in both cases.

    The two steps are named as in the official CRATE-MAE, ``layers.0.0`` and ``layers.0.1``, or with ``nested=False`` as in the
    official CRATE and CRATE-alpha, ``0`` and ``1``.

    drop_path: probability of stochastic depth (arXiv 1603.09382), in training only: each sample loses each residual branch with
        this probability, and the branches that stay are divided by 1 - drop_path. At 0, the default, no random number is drawn.
    """

    drop_path: float = 0.0
    _kinds: tuple[type[First], type[Second]]

    def __init__(self, *steps: PreNorm, nested: bool = True) -> None:
        super().__init__()
        if nested:
            self.layers = nn.ModuleList([nn.ModuleList(steps)])
            return
        for index, step in enumerate(steps):
            self.add_module(str(index), step)

    @abstractmethod
    def _fused(self, x: Tensor, recompute: bool, prepared: PreparedLayer | None) -> Tensor:
        """The layer in one call."""

    @abstractmethod
    def _official(self, x: Tensor) -> Tensor:
        """The layer by its modules, one after the other, as the official code has it."""

    def forward(self, x: Tensor, *, recompute: bool = False, prepared: PreparedLayer | None = None) -> Tensor:
        """The layer's output on tokens x [batch, tokens, width].

        Args:
            recompute: keep less for the backward, which computes projection and attention again.
            prepared: what ``prepare_layers`` made of ``self.weights()``; only for x without an ``obstacle``, which is not
                looked for again.
        """
        reason = None if prepared is not None else self.obstacle(x)
        if reason is None:
            return self._fused(x, recompute, prepared)
        if reason != DROPS_PATHS:
            say(type(self).__name__, reason)
        return checkpoint(self._official, x, use_reentrant=False) if recompute else self._official(x)

    def obstacle(self, x: Tensor) -> str | None:
        """Why the modules must be called one by one on x, in words; None where one fused call computes the same."""
        if self.training and self.drop_path:
            return DROPS_PATHS
        if (layers := self._modules.get("layers")) is not None and (
            reason := obstacle("layers", layers, nn.ModuleList)
        ):
            return reason
        pairs = self._pairs()
        if len(pairs) != 1 or len(pairs[0]) != 2:
            return "it has other steps than it was made with"
        for step, kind in zip(pairs[0], self._kinds, strict=True):
            if reason := obstacle("a step", step, PreNorm):
                return reason
            norm, fn = step._modules["norm"], step._modules["fn"]
            if norm is None or fn is None:
                return "a step has no norm or no fn"
            if reason := obstacle("fn", fn, kind) or norm_obstacle(norm, x) or self._obstacle_of(fn):
                return reason
        return None

    def _steps(self) -> tuple[tuple[nn.LayerNorm, First], tuple[nn.LayerNorm, Second]]:
        """The norm and the step of each PreNorm.

        Raises:
            TypeError: one is of another class.
        """
        (first, second), (first_kind, second_kind) = self._pairs()[0], self._kinds
        return _norm_and_step(first, first_kind), _norm_and_step(second, second_kind)

    def _pairs(self) -> list[list[nn.Module]]:
        """The layer's steps, two by two; one pair, unless someone added others."""
        layers = self._modules.get("layers")
        return [_children(self)] if layers is None else [_children(pair) for pair in _children(layers)]

    def attention(self, x: Tensor) -> Tensor:
        """Attention weights [batch, heads, tokens, tokens] of an encoder layer on its input x."""
        attention, _ = self._pairs()[0]
        return attention(x, return_attention=True)

    def _kept(self, branch: Tensor) -> Tensor:
        """A residual branch [batch, tokens, width] with stochastic depth applied."""
        if not (self.training and self.drop_path):
            return branch
        kept, dtype = 1 - self.drop_path, torch.promote_types(branch.dtype, torch.float32)
        return branch * torch.empty(len(branch), 1, 1, device=branch.device, dtype=dtype).bernoulli_(kept).div_(kept)

    @staticmethod
    def _obstacle_of(step: nn.Module) -> str | None:
        """Why a fused layer cannot compute this step, which is of the right class; None where it can."""
        if isinstance(step, MSSA):
            reason = step.obstacle() or step.restriction()
            return reason or ("its attention has dropout" if step.dropout_rate else None)
        if "combined" in step._buffers:
            return "it is frozen"
        if isinstance(step, (ISTA, DecoderStep)) and not is_plain(step.weight):
            return f"it has a weight of class {type(step.weight).__name__}"
        return None


def _children(module: nn.Module) -> list[nn.Module]:
    """The children, from the module's dictionary: to get one as an attribute takes a microsecond."""
    return [child for child in module._modules.values() if child is not None]


def _norm_and_step(module: nn.Module, kind: type[First]) -> tuple[nn.LayerNorm, First]:
    norm, step = module._modules["norm"], module._modules["fn"]
    if not isinstance(norm, nn.LayerNorm) or not isinstance(step, kind):
        expected, got = f"a LayerNorm and {kind.__name__}", f"{type(norm).__name__} and {type(step).__name__}"
        raise TypeError(f"step: expected {expected}, got {got}")
    return norm, step


class EncoderBlock(Block[MSSA, ISTA]):
    """z = x + MSSA(LN x); out = ISTA(LN z)."""

    _kinds = MSSA, ISTA

    def __init__(self, config: ModelConfig | ClassifierConfig, *, nested: bool = True) -> None:
        width, heads = config.embed_dim, config.num_heads
        attention = PreNorm(width, MSSA(width, heads, width // heads))
        super().__init__(attention, PreNorm(width, ISTA(width, config.step_size, config.lambd)), nested=nested)

    @property
    def step_size(self) -> float | Tensor:
        """The step size that the sparse step has now."""
        return self._steps()[1][1].step_size

    def weights(self) -> EncoderWeights:
        """The weights as ``encoder_layer`` takes them."""
        (attention_norm, attention), (sparse_norm, sparsify) = self._steps()
        return EncoderWeights(_norm(attention_norm), attention.weights(), _norm(sparse_norm), sparsify.weight)

    def _fused(self, x: Tensor, recompute: bool, prepared: PreparedLayer | None) -> Tensor:
        (_, attention), (_, sparsify) = self._steps()
        return encoder_layer(
            x,
            *self.weights(),
            num_heads=attention.heads,
            scale=float(attention.scale),
            step_size=sparsify.step_size,
            lambd=sparsify.lambd,
            threshold=sparsify.threshold,
            recompute=recompute,
            prepared=prepared,
        )

    def _official(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        for attention, sparsify in self._pairs():
            x = sparsify((self._kept(attention(x)) + x).to(dtype)).to(dtype)
        return x


class AlphaBlock(Block[MSSA, OvercompleteISTA]):
    """CRATE-alpha's layer: z = x + MSSA(LN x); out = z + ODL(LN z), with W_out without bias (arXiv 2405.20299, section 3)."""

    _kinds = MSSA, OvercompleteISTA

    def __init__(self, config: ClassifierConfig) -> None:
        width, heads = config.embed_dim, config.num_heads
        attention = MSSA(width, heads, width // heads, out_bias=False)
        sparsify = OvercompleteISTA(width, eta=config.step_size, lmbda=config.lambd)
        super().__init__(PreNorm(width, attention, 1e-6), PreNorm(width, sparsify, 1e-6), nested=False)

    @staticmethod
    def _obstacle_of(step: nn.Module) -> str | None:
        return (
            hooks_of_all_modules()
        )  # nothing else: each step is called as a module, which looks for its own obstacles

    def _fused(self, x: Tensor, recompute: bool, prepared: PreparedLayer | None) -> Tensor:
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


class DecoderBlock(Block[DecoderStep, MSSA]):
    """g = LN(x) W^T; out = g - MSSA(LN g)."""

    _kinds = DecoderStep, MSSA

    def __init__(self, config: ModelConfig) -> None:
        width, heads = config.embed_dim, config.decoder_num_heads
        super().__init__(PreNorm(width, DecoderStep(width)), PreNorm(width, MSSA(width, heads, width // heads)))

    def weights(self) -> DecoderWeights:
        """The weights as ``decoder_layer`` takes them."""
        (step_norm, densify), (attention_norm, attention) = self._steps()
        return DecoderWeights(_norm(step_norm), densify.weight, _norm(attention_norm), attention.weights())

    def _fused(self, x: Tensor, recompute: bool, prepared: PreparedLayer | None) -> Tensor:
        _, (_, attention) = self._steps()
        return decoder_layer(
            x,
            *self.weights(),
            num_heads=attention.heads,
            scale=float(attention.scale),
            recompute=recompute,
            prepared=prepared,
        )

    def _official(self, x: Tensor) -> Tensor:
        for densify, attention in self._pairs():
            x = densify(x)
            x = x - attention(x)
        return x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``; on the composed path by its products, whose dtype every CPU computes in natively."""
    dtype = compute_dtype(x)
    if choose("linear", x, dtype) != "composed":
        return F.linear(x, weight, bias)
    with no_autocast(x):
        return library_products.linear(x.to(dtype), weight, bias)


class Linear(nn.Linear):
    """``nn.Linear``, computed by ``linear``."""

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
        """Tokens of patches [batch, any number, patch_size**2 * channels] as ``patchify`` gives them."""
        channels, size = self.proj.in_channels, self.proj.kernel_size[0]
        as_weights = rearrange(patches, "b n (p q c) -> b n (c p q)", c=channels, p=size)
        return linear(as_weights, self.proj.weight.flatten(1), self.proj.bias)


def embedding_obstacle(embed: nn.Module) -> str | None:
    """Why ``embed`` must be called as a module, in words; None where its ``of_patches`` computes the same."""
    if reason := hooks_of_all_modules() or obstacle("patch_embed", embed, PatchEmbed):
        return reason
    assert isinstance(embed, PatchEmbed)  # else it is an obstacle
    proj = embed.proj
    if reason := obstacle("patch_embed.proj", proj, nn.Conv2d):
        return reason
    is_one_map_a_patch = proj.stride == proj.kernel_size and proj.padding == (0, 0) and proj.dilation == (1, 1)
    if not is_one_map_a_patch or proj.groups != 1 or not is_plain(proj.weight):
        return "patch_embed.proj is more than one linear map a patch"
    return None
