"""CRATE-MAE (arXiv 2404.02446): a masked autoencoder of compressing (MSSA) and sparsifying (ISTA) layers."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple
from torch.utils.checkpoint import checkpoint

from crate_kernels import (
    ISTA,
    MSSA,
    DecoderStep,
    DecoderWeights,
    EncoderWeights,
    Norm,
    PreparedLayer,
    decoder_layer,
    encoder_layer,
    matmul,
    prepare_layers,
)
from crate_kernels.dispatch import choose, is_plain
from crate_kernels.fusing import attached, hooks_of_all_modules, known, norm_obstacle, obstacle, say
from crate_kernels.nn import takes_norm
from crate_kernels.precision import compute_dtype, is_autocast, no_autocast
from crate_mae.config import ModelConfig, grid_of
from crate_mae.patches import kept_patches, patchify, removed_patches, unpatchify
from crate_mae.positions import sine_cosine

# In official checkpoints, and never used by the official code.
UNUSED_OFFICIAL_ENTRIES = ("pos_embed", "decoder_embed.weight", "decoder_embed.bias")
FINAL_NORM_EPS = 1e-6


class MAEOutput(NamedTuple):
    """loss: scalar. pred: [batch, patches, patch_size**2 * channels]. mask: [batch, patches], 1 where removed."""

    loss: Tensor
    pred: Tensor
    mask: Tensor


# So that an exported model, which returns one, can be saved; who loads it imports this.
_register_namedtuple(MAEOutput, serialized_type_name="crate_mae.model.MAEOutput")


@known
class PreNorm(nn.Module):
    """A LayerNorm and the step it precedes, under their official names; a step of ours does both at once."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        if takes_norm(self.fn):
            return self.fn(x, norm=self.norm, **kwargs)
        return self.fn(self.norm(x), **kwargs)


class Block(nn.Module):
    """What both kinds of layers share: one fused call where their modules are what they were made as, else the modules.

    See ``crate_kernels.fusing`` for the rule. ``recompute`` holds in either case.
    """

    def __init__(self, *steps: PreNorm) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList(steps)])

    def forward(self, x: Tensor, *, recompute: bool = False, prepared: PreparedLayer | None = None) -> Tensor:
        """``prepared``: of ``self.weights()``, by someone who has seen that there is no ``obstacle`` for these tokens."""
        reason = None if prepared is not None else self.obstacle(x)
        if reason is None:
            return self._fused(x, recompute, prepared)
        say(type(self).__name__, reason)
        return checkpoint(self._official, x, use_reentrant=False) if recompute else self._official(x)

    def obstacle(self, x: Tensor) -> str | None:
        """Why the modules must be called one by one on x, in words; None where one fused call stands for all of them."""
        layers = self._modules["layers"]
        if reason := obstacle("layers", layers, nn.ModuleList):
            return reason
        pairs = list(layers._modules.values())
        steps = pairs[0]._modules.values() if len(pairs) == 1 else ()
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
        steps = self._modules["layers"]._modules["0"]._modules.values()
        return [(step._modules["norm"], step._modules["fn"]) for step in steps]

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

    def __init__(self, config: ModelConfig) -> None:
        width, heads = config.embed_dim, config.num_heads
        attention = PreNorm(width, MSSA(width, heads, width // heads))
        super().__init__(attention, PreNorm(width, ISTA(width, config.step_size, config.lambd)))

    @property
    def step_size(self) -> float | Tensor:
        """Of the sparse step, as it stands there now."""
        return self._steps()[1][1].step_size

    def weights(self) -> EncoderWeights:
        (attention_norm, attention), (sparse_norm, sparsify) = self._steps()
        return EncoderWeights(_norm(attention_norm), attention.weights(), _norm(sparse_norm), sparsify.weight)

    def attention(self, x: Tensor) -> Tensor:
        """Attention weights [batch, heads, tokens, tokens] of this layer on its input x."""
        return self.layers[0][0](x, return_attention=True)

    def _fused(self, x: Tensor, recompute: bool, prepared: PreparedLayer | None) -> Tensor:
        (_, attention), (_, sparsify) = self._steps()
        heads = dict(num_heads=attention.heads, scale=attention.scale)
        numbers = dict(step_size=sparsify.step_size, lambd=sparsify.lambd, threshold=sparsify.threshold)
        return encoder_layer(x, *self.weights(), **heads, **numbers, recompute=recompute, prepared=prepared)

    def _official(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        for attention, sparsify in self.layers:
            x = sparsify((attention(x) + x).to(dtype)).to(dtype)
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
        for densify, attention in self.layers:
            x = densify(x)
            x = x - attention(x)
        return x


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear``; on the composed path by its own products, which no CPU has to emulate."""
    dtype = compute_dtype(x)
    if choose("linear", x, dtype) != "composed":
        return F.linear(x, weight, bias)
    with no_autocast(x):
        return matmul.linear(x.to(dtype), weight, bias)


class Linear(nn.Linear):
    """``nn.Linear``, by the products of ``_linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)


def _norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


@known
class PatchEmbed(nn.Module):
    """Images [batch, channels, height, width] -> tokens [batch, patches, width]: one linear map a patch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)

    def of_patches(self, patches: Tensor) -> Tensor:
        """Tokens of patches [batch, any number, patch_size**2 * channels] as ``patchify`` has them."""
        channels, size = self.proj.in_channels, self.proj.kernel_size[0]
        as_weights = rearrange(patches, "b n (p q c) -> b n (c p q)", c=channels, p=size)
        return _linear(as_weights, self.proj.weight.flatten(1), self.proj.bias)


def _embedding_obstacle(embed: nn.Module) -> str | None:
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


class CrateMAE(nn.Module):
    """CRATE-MAE with the official parameter names and initialisation; build one with ``crate_mae.create_model``.

    The encoder sees every token: mask tokens stand in for removed patches before its first layer. Position is the fixed
    sine-cosine table ``decoder_pos_embed`` (its official name), added once, before the encoder. An official state dict
    loads with ``strict=True``: its entries that nothing uses are dropped by name.

    Two attributes say how layers run; both may be changed at any time, and neither is part of a checkpoint:

    stream: "float32", or "16bit": tokens go from layer to layer in the autocast dtype (no effect where autocast is off),
        which halves memory and traffic between the kernels.
    recompute: layers do projection and attention again in the backward, and keep half as much for it.
    """

    stream: Literal["float32", "16bit"] = "float32"
    recompute: bool = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", sine_cosine(grid_of(config.image_shape, config.patch_size), width))
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=FINAL_NORM_EPS)
        self.decoder_blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=FINAL_NORM_EPS)
        self.decoder_pred = Linear(width, config.patch_size**2 * config.in_chans)
        self._initialise()
        self.register_load_state_dict_pre_hook(_drop_unused_official_entries)

    def _initialise(self) -> None:
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.config.embed_dim, -1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> MAEOutput:
        """Remove patches, reconstruct them, and measure how well.

        Args:
            images: [batch, channels, height, width]; height and width divisible by the patch.
            mask_ratio: share of patches removed, at least 0 and below 1.
            noise: [batch, patches]; the patches with the most noise are removed. Uniform random if None.

        Returns:
            loss: mean squared error a patch, averaged over the removed patches; over all patches where none is removed.
            pred: every patch as the model reconstructs it (in units of its standardised pixels with ``norm_pix_loss``).
            mask: 1 where a patch was removed.

        Raises:
            TypeError: images are no tensor of the parameters' dtype (under autocast: of a floating-point dtype).
            ValueError: images, mask_ratio or noise do not fit.
        """
        patches = self.patch_count(images)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio: expected at least 0 and below 1, got {mask_ratio}")
        if noise is None:
            noise = torch.rand(images.shape[0], patches, device=images.device)
        elif tuple(noise.shape) != (images.shape[0], patches):
            raise ValueError(
                f"noise: expected [batch, patches] ({images.shape[0]}, {patches}), got shape {tuple(noise.shape)}"
            )
        implementation = choose("CrateMAE", images, compute_dtype(images))
        kept, pixels = kept_patches(noise, mask_ratio), self.patchify(images)
        mask = removed_patches(kept, patches)
        reason = _embedding_obstacle(self.patch_embed)
        if reason is not None:
            say("CrateMAE", reason)
        if implementation == "reference" or reason is not None:
            x = torch.where(mask.bool().unsqueeze(-1), self.mask_token, self.patch_embed(images))
        else:
            x = self._embed_kept(pixels, kept)
        pred = self._decode(self._encode(self._placed(x, images)))
        return MAEOutput(self._loss(pixels, pred, mask), pred, mask)

    def encode(self, images: Tensor) -> Tensor:
        """Tokens [batch, 1 + patches, width] after the encoder's final norm, no patch removed; the class token is first.

        Images and errors as in ``forward``. ``torch.no_grad()`` around it keeps nothing for a backward.
        """
        self.patch_count(images)
        return self._encode(self._embed(images))

    def attention_map(self, images: Tensor, layer: int = -1) -> Tensor:
        """Attention weights [batch, heads, tokens, tokens] of one encoder layer on whole images; negative layers count back.

        Raises:
            IndexError: there is no such layer.
        """
        self.patch_count(images)
        depth = len(self.blocks)
        if not -depth <= layer < depth:
            raise IndexError(f"layer: expected {-depth} to {depth - 1}, got {layer}")
        x = self._embed(images)
        for block in self.blocks[: layer % depth]:
            x = block(x)
        return self.blocks[layer].attention(x)

    def patchify(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, patches, patch_size**2 * channels]."""
        return patchify(images, self.config.patch_size)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The inverse of ``patchify``; ``grid`` is (rows, columns) of patches, the configured image's if None.

        Raises:
            ValueError: patches are not [batch, rows * columns, patch_size**2 * channels].
        """
        return unpatchify(patches, self.config.patch_size, self.config.in_chans, grid or self._configured_grid)

    @property
    def _configured_grid(self) -> tuple[int, int]:
        return grid_of(self.config.image_shape, self.config.patch_size)

    def patch_count(self, images: Tensor) -> int:
        """How many patches each image has; raises what ``forward`` does of images that do not fit."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images: expected a tensor [batch, channels, height, width], got {type(images).__name__}")
        if images.ndim != 4 or images.shape[1] != self.config.in_chans:
            raise ValueError(
                f"images: expected [batch, {self.config.in_chans} channels, height, width], got shape {tuple(images.shape)}"
            )
        parameters = self.cls_token.dtype
        if not (images.is_floating_point() if is_autocast(images) else images.dtype == parameters):
            raise TypeError(
                f"images: expected {parameters}, standardised as in training ((pixels / 255 - mean) / std), got {images.dtype}"
            )
        rows, columns = grid_of(tuple(images.shape[-2:]), self.config.patch_size)
        return rows * columns

    def _embed(self, images: Tensor) -> Tensor:
        return self._placed(self.patch_embed(images), images)

    def _embed_kept(self, pixels: Tensor, kept: Tensor) -> Tensor:
        """Embed the kept patches alone, a quarter as a rule; mask tokens stand for the others, whose embedding none would see."""
        of_kept, width = kept.unsqueeze(-1), self.config.embed_dim
        chosen = pixels.gather(1, of_kept.expand(-1, -1, pixels.shape[-1]))
        embedded = self.patch_embed.of_patches(chosen).to(self.mask_token.dtype)
        tokens = self.mask_token.expand(*pixels.shape[:2], width)
        return tokens.scatter(1, of_kept.expand(-1, -1, width), embedded)

    def _placed(self, x: Tensor, images: Tensor) -> Tensor:
        """The encoder's input: the class token before those of the patches, each with its position."""
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self._positions(images)

    def _positions(self, images: Tensor) -> Tensor:
        grid = grid_of(tuple(images.shape[-2:]), self.config.patch_size)
        if grid == self._configured_grid:
            return self.decoder_pos_embed
        return sine_cosine(grid, self.config.embed_dim).to(self.decoder_pos_embed)

    def _encode(self, x: Tensor) -> Tensor:
        return self.norm(self._through(self.blocks, x, num_heads=self.config.num_heads))

    def _decode(self, x: Tensor) -> Tensor:
        x = self._through(self.decoder_blocks, x, num_heads=self.config.decoder_num_heads)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def _through(self, blocks: nn.ModuleList, x: Tensor, num_heads: int) -> Tensor:
        if self.stream == "16bit":
            x = x.to(compute_dtype(x))
        prepared = self._prepared(blocks, x, num_heads)
        for block in blocks:
            if _is_ours(block):
                x = block(x, recompute=self.recompute, prepared=prepared.get(block))
            else:  # a wrapper, or what someone put in its place: it is called as the official model does
                x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x

    def _prepared(self, blocks: nn.ModuleList, x: Tensor, num_heads: int) -> dict[nn.Module, PreparedLayer]:
        """What is made of the weights of blocks together; the others prepare themselves, one by one."""
        # What hooks on blocks do to blocks that come later must count: those prepare themselves, when they are called.
        if choose("CrateMAE", x, compute_dtype(x)) != "triton" or any(attached("", block) for block in blocks):
            return {}
        fused = [block for block in blocks if _is_ours(block) and block.obstacle(x) is None]
        options = {}
        if fused and isinstance(fused[0], EncoderBlock):
            # Steps that someone has made different, or learns, are not prepared together.
            sizes = [block.step_size for block in fused]
            if any(size is not sizes[0] and not (isinstance(size, float) and size == sizes[0]) for size in sizes):
                return {}
            options["step_size"] = sizes[0]
        made = prepare_layers(x, [block.weights() for block in fused], num_heads=num_heads, **options)
        return {block: ready for block, ready in zip(fused, made, strict=True) if ready is not None}

    def _loss(self, target: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        if self.config.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (pred - target).square().mean(dim=-1)
        removed = mask.sum()
        return torch.where(removed > 0, (error * mask).sum() / removed.clamp_min(1), error.mean())


def _is_ours(block: nn.Module) -> bool:
    """Whether ``block`` is called with our arguments: FSDP's subclasses are, overridden and replaced forwards are not."""
    return isinstance(block, Block) and type(block).forward is Block.forward and "forward" not in vars(block)


def _drop_unused_official_entries(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in UNUSED_OFFICIAL_ENTRIES:
        state.pop(prefix + name, None)
