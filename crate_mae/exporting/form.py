"""Models in the form in which they are exported: PyTorch's own operators only, for images of any size.

The weights are the model's. The forms have no operator of ours and no Python branch on a size, as an exporter would keep only the
branch that its example takes. Positions are computed in the graph, for any grid of patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from crate_kernels import MSSA, combine
from crate_kernels.overcomplete.reference import overcomplete_ista
from crate_mae.backbone import Backbone
from crate_mae.classifiers import Classifier, Crate, CrateAlpha
from crate_mae.layers import AlphaBlock, DecoderBlock, EncoderBlock
from crate_mae.model import CrateMAE, MAEEncoder


class _Form(nn.Module):
    """What all exported models share: the encoder.

    Args:
        model: on the CPU, in float32, as ``load_model`` returns it. Its layers become part of the form: do not use it afterwards.
    """

    def __init__(self, model: CrateMAE | Classifier) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.embed = embedding_of(model)
        self.positions = positions_of(model)
        self.layers = nn.ModuleList(layer_of(block) for block in model.encoder_layers)

    def _encoded(self, x: Tensor, images: Tensor) -> Tensor:
        """The last encoder layer's output [batch, 1 + patches, width] for embedded patches."""
        patch = self.model.config.patch_size
        x = torch.cat([self.model.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.positions(images.shape[2] // patch, images.shape[3] // patch)
        for layer in self.layers:
            x = layer(x)
        return x


class ExportForm(_Form):
    """A model's tokens, features or logits of images.

    Args:
        model: as for ``_Form``.
        output: "tokens" as of ``forward_features``; "features", the mean patch token behind the final norm; or "logits".
    """

    def __init__(self, model: CrateMAE | Classifier, output: str) -> None:
        super().__init__(model)
        self.output = output

    def forward(self, images: Tensor) -> Tensor:
        x = self._encoded(self.embed(images), images)
        if self.output == "features":
            return self.model.last_norm(x)[:, 1:].mean(dim=1)
        tokens = self.model._normed(x)
        return tokens if self.output == "tokens" else self.model.forward_head(tokens)


class ReconstructionForm(_Form):
    """A CRATE-MAE's reconstruction of images with removed patches: ``pred`` and ``mask`` of ``MAEOutput``.

    Args:
        model: as for ``_Form``.
        mask_ratio: as for ``CrateMAE.forward``.
    """

    model: CrateMAE

    def __init__(self, model: CrateMAE, mask_ratio: float) -> None:
        super().__init__(model)
        self.mask_ratio = mask_ratio
        self.decoder_layers = nn.ModuleList(layer_of(block) for block in model.decoder_blocks)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.embed(images)
        mask = self._mask(noise)
        x = torch.where(mask.bool().unsqueeze(-1), self.model.mask_token, embedded)
        x = self.model._normed(self._encoded(x, images))
        for layer in self.decoder_layers:
            x = layer(x)
        return self.model.decoder_pred(self.model.decoder_norm(x))[:, 1:], mask

    def _mask(self, noise: Tensor) -> Tensor:
        """1 for the patches that are not among the int(patches * (1 - mask_ratio)) with the least noise."""
        ranks = noise.argsort(dim=1).argsort(dim=1)
        patches = _count(ranks[0], torch.float64)
        return (ranks >= (patches * (1 - self.mask_ratio)).floor()).to(noise.dtype)


def embedding_of(model: Backbone) -> nn.Module:
    """A module from images to their embedded patches [batch, patches, width], without positions."""
    if isinstance(model, MAEEncoder):
        return _Patches(model.patch_embed.proj)
    return _Patches(model.conv1) if isinstance(model, CrateAlpha) else _crate(model).to_patch_embedding


def _crate(model: Backbone) -> Crate:
    if not isinstance(model, Crate):
        raise TypeError(f"model: expected a CRATE, CRATE-alpha or CRATE-MAE, got {type(model).__name__}")
    return model


class _Patches(nn.Module):
    """A convolution with one linear map a patch, as that map. The convolution would silently drop an incomplete patch."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.patch = conv.kernel_size[0]
        self.weight, self.bias = nn.Parameter(conv.weight.flatten(1), requires_grad=False), conv.bias

    def forward(self, images: Tensor) -> Tensor:
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        return F.linear(patches, self.weight, self.bias)


def layer_of(block: nn.Module) -> nn.Module:
    """The export form of a layer of ours.

    Raises:
        TypeError: it is of another class.
    """
    if type(block) is EncoderBlock:
        return _Encoder(block)
    if type(block) is AlphaBlock:
        return _Alpha(block)
    if type(block) is DecoderBlock:
        return _Decoder(block)
    raise TypeError(f"model: expected layers of CRATE, CRATE-alpha or CRATE-MAE, got {type(block).__name__}")


class _Attention(nn.Module):
    """MSSA by PyTorch's attention: query, key and value are one projection."""

    def __init__(self, mssa: MSSA) -> None:
        super().__init__()
        if (reason := mssa.restriction()) or isinstance(mssa.scale, Tensor):
            raise TypeError(f"model: expected attention of all tokens to all, with one number as its scale; {reason}")
        self.heads, self.scale = mssa.heads, mssa.scale
        self.qkv, self.to_out = mssa.qkv, mssa.to_out

    def forward(self, x: Tensor) -> Tensor:
        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(w, w, w, scale=self.scale)
        return self.to_out(out.transpose(1, 2).flatten(2))


class _Encoder(nn.Module):
    """z = x + MSSA(LN x), then ISTA of n = LN z as one product: relu(n + eta n (W - W^T W) - eta lambda)."""

    def __init__(self, block: EncoderBlock) -> None:
        super().__init__()
        (self.first_norm, mssa), (self.second_norm, ista) = block._steps()
        self.first = _Attention(mssa)
        self.second = nn.Linear(len(ista.weight), len(ista.weight))
        with torch.no_grad():
            self.second.weight.copy_(ista.step_size * combine(ista.weight).t())
            self.second.bias.fill_(-ista.step_size * ista.lambd)
        self.second.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.second_norm(x + self.first(self.first_norm(x)))
        return F.relu(normed + self.second(normed))


class _Alpha(nn.Module):
    """z = x + MSSA(LN x); z + ODL(LN z)."""

    def __init__(self, block: AlphaBlock) -> None:
        super().__init__()
        (self.first_norm, mssa), (self.second_norm, self.second) = block._steps()
        self.first = _Attention(mssa)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.first_norm(x))
        step = self.second
        return x + overcomplete_ista(self.second_norm(x), step.D, step.D1, step.eta, step.lmbda)


class _Decoder(nn.Module):
    """g = LN(x) W^T; g - MSSA(LN g)."""

    def __init__(self, block: DecoderBlock) -> None:
        super().__init__()
        (self.first_norm, self.first), (self.second_norm, mssa) = block._steps()
        self.second = _Attention(mssa)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.first_norm(x), self.first.weight)
        return x - self.second(self.second_norm(x))


def positions_of(model: Backbone) -> nn.Module:
    """A module from (rows, columns) to a model's positions [1, 1 + rows * columns, width], for any grid of patches."""
    if model.config.has_fixed_positions:
        return _SineCosine(model.config.embed_dim)
    model = _crate(model)
    return _Resampled(model.pos_embedding.detach(), model._configured_grid)


class _SineCosine(nn.Module):
    """``crate_mae.positions.sine_cosine``."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        exponents = torch.arange(width // 4, dtype=torch.float64) / (width / 4)
        self.register_buffer("frequencies", 10000.0**-exponents)

    def forward(self, rows: int, columns: int) -> Tensor:
        of_rows, of_columns = (self._waves(count) for count in (rows, columns))
        grid = of_columns.expand(rows, -1, -1), of_rows.unsqueeze(1).expand(-1, columns, -1)
        patches = torch.cat(grid, dim=-1).flatten(0, 1)
        return torch.cat([torch.zeros_like(patches[:1]), patches]).unsqueeze(0)

    def _waves(self, count: int) -> Tensor:
        """[count, width / 2]; the angles are in float64, as those of large grids need."""
        angles = torch.arange(count, dtype=torch.float64).unsqueeze(1) * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class _Resampled(nn.Module):
    """``crate_mae.positions.resampled``: bicubic, antialiased, as two matrices, one for the rows and one for the columns."""

    of_class: Tensor
    of_patches: Tensor

    def __init__(self, positions: Tensor, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("of_class", positions[:, 0])
        self.register_buffer("of_patches", positions[0, 1:].unflatten(0, grid))  # [rows, columns, width]

    def forward(self, rows: int, columns: int) -> Tensor:
        by_row, by_column = (_bicubic(old, new) for old, new in zip(self.grid, (rows, columns), strict=True))
        patches = by_column @ (by_row @ self.of_patches.flatten(1)).unflatten(1, self.of_patches.shape[1:])
        return torch.cat([self.of_class, patches.flatten(0, 1)]).unsqueeze(0)


def _bicubic(old: int, new: int) -> Tensor:
    """[new, old], what ``F.interpolate(..., mode="bicubic", antialias=True)`` multiplies a side of ``old`` with.

    Place i of the new side lies at c = (i + 1/2) old / new of the old one, whose place j weighs k((j + 1/2 - c) / s) there, with
    s = max(old / new, 1) and Keys' kernel k of a = -1/2; each row is then given the sum 1. Of equal sides it is the identity.
    """
    places = torch.arange(new, dtype=torch.float32)
    scale = old / _count(places, torch.float32)
    distances = torch.arange(old, dtype=torch.float32) + 0.5 - (places.unsqueeze(1) + 0.5) * scale
    x = (distances / scale.clamp_min(1)).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)


def _count(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of values as a tensor, as not every exporter can compute with sizes as Python numbers."""
    return torch.ones_like(values, dtype=dtype).sum()
