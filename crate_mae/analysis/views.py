"""Maps of images inside a model: for each layer, one value or colour a patch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crate_kernels import MSSA
from crate_mae.analysis.components import PrincipalComponents
from crate_mae.analysis.rates import coding_rate
from crate_mae.analysis.tracing import LayerTrace, Stack, call_on_whole, in_evaluation, traced
from crate_mae.data.transforms import Normalization
from crate_mae.model import CrateMAE
from crate_mae.patches import patch_grid


class LayerView(NamedTuple):
    """One layer on one whole image. Maps are [rows, columns], of patches; all tensors are on the CPU.

    Attributes:
        stack, index: which layer; ``index`` counts from 0 in its stack.
        projected: w, float32 [heads, 1 + patches, head_dim], the official keys, from which attention is computed.
        scale: the factor of the attention scores.
        token_colours, key_colours: uint8 [rows, columns, 3]: principal components of the layer's output tokens, and of w of all
            heads, fitted across the images that were viewed together, the class token left out.
        compression: float32, ||MSSA|| / ||token||: how much attention changed a patch's token.
        sparsification: float32, ||step(z) - z|| / ||z||: how much the sparse step (the decoder's linear step) changed it.
        zeros: float32, the fraction of the token's entries that the sparse step made zero.
        norms: float32, the norms of the output tokens.
        coding_rates: R^c before and after MSSA, by ``coding_rate``.
    """

    stack: Stack
    index: int  # type: ignore[assignment]  # in the place of tuple.index, which a layer has no use for
    projected: Tensor
    scale: float
    token_colours: Tensor
    key_colours: Tensor
    compression: Tensor
    sparsification: Tensor
    zeros: Tensor
    norms: Tensor
    coding_rates: tuple[float, float]

    @property
    def attention(self) -> Tensor:
        """softmax(w w^T scale), float32 [heads, 1 + patches, 1 + patches]; the first token is the class token."""
        return (self.projected @ self.projected.mT * self.scale).softmax(-1)


class ImageView(NamedTuple):
    """An image as the model saw it, uint8 [channels, height, width], and its layers: the encoder's, then the decoder's."""

    pixels: Tensor
    patch_size: int
    layers: list[LayerView]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return patch_grid(self.pixels, self.patch_size)


@torch.no_grad()
def view(
    model: CrateMAE,
    images: Sequence[Tensor],
    normalization: Normalization,
    *,
    done: Callable[[int], None] = lambda images: None,
) -> list[ImageView]:
    """The views of whole images, which may differ in size; colours mean the same in all of them.

    Args:
        images: uint8 [channels, height, width] each, as stored, height and width divisible by the patch; or a batch of them.
        normalization: how the model's images were standardised, ``preprocessing.read_normalization(run)``.
        done: called with 1 after each image, for a progress bar.

    Raises:
        TypeError: the model is no ``CrateMAE``, or an image no tensor of bytes.
        ValueError: there are no images, or one does not fit the model; or the model's values are not finite, or not all its
            tokens attend to all, with one number as the scale.
    """
    if not isinstance(model, CrateMAE):
        raise TypeError(f"model: expected a CrateMAE, got {type(model).__name__}; trace shows the layers of others")
    for name, module in model.named_modules():
        if isinstance(module, MSSA) and (reason := module.restriction()):
            raise ValueError(f"model: {name}: {reason}, which a view has no place for; trace shows its layers")
    if len(images) == 0:
        raise ValueError("images: expected one or more, got none")
    for pixels in images:
        if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8 or pixels.ndim != 3:
            got = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
            raise TypeError(f"images: expected uint8 [channels, height, width], pixels as stored, got {got}")
    device, size = next(model.parameters()).device, model.config.patch_size
    grids = [patch_grid(pixels, size) for pixels in images]
    seen: list[list[tuple[Tensor, LayerView]]] = []
    for pixels, grid in zip(images, grids, strict=True):
        seen.append(_seen(model, normalization(pixels[None].to(device)), grid))
        done(1)
    views = [ImageView(pixels.cpu(), size, []) for pixels in images]
    for of_one_layer in zip(*seen, strict=True):
        tokens, layers = zip(*of_one_layer, strict=True)
        keys = [layer.projected.transpose(0, 1).flatten(1)[1:] for layer in layers]
        colours = [PrincipalComponents.of(torch.cat(each)) for each in (tokens, keys)]
        for image, layer, *each in zip(views, layers, tokens, keys, strict=True):
            of_tokens, of_keys = map(_painted, colours, each, [image.grid] * 2)
            image.layers.append(layer._replace(token_colours=of_tokens, key_colours=of_keys))
    return views


def _seen(model: CrateMAE, image: Tensor, grid: tuple[int, int]) -> list[tuple[Tensor, LayerView]]:
    """For each layer the output tokens of the patches, to which colours are fitted, and its view without colours.

    Nothing else of a layer is kept in memory.
    """
    seen: list[tuple[Tensor, LayerView]] = []

    def receive(layer: LayerTrace) -> None:
        kept = _kept(layer)
        try:
            seen.append((kept.output[0, 1:], _uncoloured(kept, grid)))
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from error

    with in_evaluation(model), traced(model, receive):
        call_on_whole(model, image)
    if not seen:
        raise ValueError("model: none of its layers was called; of a compiled model, give the one that was compiled")
    return seen


def _kept(layer: LayerTrace) -> LayerTrace:
    """The layer with its tensors on the CPU, in float32."""
    values = layer._asdict()
    moved = {name: value.float().cpu() for name, value in values.items() if isinstance(value, Tensor)}
    return LayerTrace(**(values | moved))


def _painted(components: PrincipalComponents, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return (components.colours(tokens) * 255).round().to(torch.uint8).unflatten(0, grid)


def _uncoloured(layer: LayerTrace, grid: tuple[int, int]) -> LayerView:
    """A layer's view without its colours, which are fitted to all images together."""

    def of_patches(values: Tensor) -> Tensor:
        return values[0, -math.prod(grid) :].unflatten(0, grid)

    def change(before: Tensor, after: Tensor) -> Tensor:
        norm = before.norm(dim=-1)
        return of_patches((after - before).norm(dim=-1) / torch.where(norm > 0, norm, 1.0))

    # Through the model's own norm and projection, which are where the model is.
    after = layer.projected_of(layer.compressed.to(next(layer.norm.parameters()))).cpu()
    return LayerView(
        stack=layer.stack,
        index=layer.index,
        projected=layer.projected[0],
        scale=layer.scale,
        token_colours=torch.empty(0),
        key_colours=torch.empty(0),
        compression=change(layer.attended, layer.compressed),
        sparsification=change(layer.unsparsified, layer.sparsified),
        zeros=of_patches((layer.sparsified == 0).float().mean(-1)),
        norms=of_patches(layer.output.norm(dim=-1)),
        coding_rates=(float(coding_rate(layer.projected).sum()), float(coding_rate(after).sum())),
    )
