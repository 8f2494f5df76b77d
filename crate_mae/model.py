"""CRATE-MAE (arXiv 2404.02446): a masked autoencoder of compressing (MSSA) and sparsifying (ISTA) layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from crate_kernels.dispatch import choose
from crate_kernels.dtypes import compute_dtype
from crate_kernels.fusing import say
from crate_mae.backbone import FINAL_NORM_EPS, Backbone
from crate_mae.config import ModelConfig
from crate_mae.layers import DecoderBlock, EncoderBlock, Linear, PatchEmbed, embedding_obstacle
from crate_mae.masks import kept_patches, removed_patches
from crate_mae.patches import patchify, unpatchify
from crate_mae.positions import sine_cosine

# Entries of official checkpoints that the official code never uses.
UNUSED_OFFICIAL_ENTRIES = ("pos_embed", "decoder_embed.weight", "decoder_embed.bias")


class MAEOutput(NamedTuple):
    """loss: scalar. pred: [batch, patches, patch_size**2 * channels]. mask: [batch, patches], 1 where removed."""

    loss: Tensor
    pred: Tensor
    mask: Tensor


# An exported model returns an MAEOutput; torch.export saves it by this name, and whoever loads it imports this module.
_register_namedtuple(MAEOutput, serialized_type_name="crate_mae.model.MAEOutput")


class MAEEncoder(Backbone):
    """The encoder of CRATE-MAE under its official names, without the norm behind it; ``CrateMAE`` and a classifier have one."""

    decoder_pos_embed: Tensor

    def _make_encoder(self) -> None:
        config, width = self.config, self.config.embed_dim
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", sine_cosine(self._configured_grid, width))
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.depth))

    def _initialise(self) -> None:
        for token in self.parameters(recurse=False):
            nn.init.normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def encoder_layers(self) -> nn.ModuleList:
        return self.blocks

    def _embedded_patches(self, images: Tensor) -> Tensor:
        return self.patch_embed(images)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self._configured_grid:
            return self.decoder_pos_embed
        return sine_cosine(grid, self.config.embed_dim).to(self.decoder_pos_embed)


class CrateMAE(MAEEncoder):
    """CRATE-MAE with the official parameter names and initialisation; build one with ``crate_mae.create_model``.

    The encoder sees every token: mask tokens stand in for removed patches before its first layer. Position is the fixed
    sine-cosine table ``decoder_pos_embed`` (its official name), added once, before the encoder. An official state dict
    loads with ``strict=True``: its entries that nothing uses are dropped by name.

    ``Backbone`` has what all models share, and how layers run (``stream``, ``recompute``).
    """

    config: ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self._make_encoder()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.norm = nn.LayerNorm(width, eps=FINAL_NORM_EPS)
        self.decoder_blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=FINAL_NORM_EPS)
        self.decoder_pred = Linear(width, config.patch_size**2 * config.in_chans)
        self._initialise()
        self.register_load_state_dict_pre_hook(_drop_unused_official_entries)

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
        reason = embedding_obstacle(self.patch_embed)
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
        return self.forward_features(images)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token [batch, width] of the tokens of ``forward_features``: a CRATE-MAE has no head."""
        return tokens[:, 0]

    @property
    def last_norm(self) -> nn.Module:
        return self.norm

    def _normed(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def patchify(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, patches, patch_size**2 * channels]."""
        return patchify(images, self.config.patch_size)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The inverse of ``patchify``; ``grid`` is (rows, columns) of patches, the configured image's if None.

        Raises:
            ValueError: patches are not [batch, rows * columns, patch_size**2 * channels].
        """
        return unpatchify(patches, self.config.patch_size, self.config.in_chans, grid or self._configured_grid)

    def _embed_kept(self, pixels: Tensor, kept: Tensor) -> Tensor:
        """Embed only the kept patches, usually a quarter; the others are mask tokens."""
        of_kept, width = kept.unsqueeze(-1), self.config.embed_dim
        chosen = pixels.gather(1, of_kept.expand(-1, -1, pixels.shape[-1]))
        embedded = self.patch_embed.of_patches(chosen).to(self.mask_token.dtype)
        tokens = self.mask_token.expand(*pixels.shape[:2], width)
        return tokens.scatter(1, of_kept.expand(-1, -1, width), embedded)

    def _decode(self, x: Tensor) -> Tensor:
        x = self._through(self.decoder_blocks, x, num_heads=self.config.decoder_num_heads)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def _loss(self, target: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        if self.config.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (pred - target).square().mean(dim=-1)
        removed = mask.sum()
        return torch.where(removed > 0, (error * mask).sum() / removed.clamp_min(1), error.mean())


def _drop_unused_official_entries(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in UNUSED_OFFICIAL_ENTRIES:
        state.pop(prefix + name, None)
