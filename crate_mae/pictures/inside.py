"""Pictures of a model's inside: attention, the regions it picks out, tokens in colour, an image's path through layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from crate_mae.analysis import ImageView, LayerView, most_attended
from crate_mae.pictures.colours import distinct, hexadecimal, scaled
from crate_mae.pictures.reconstructions import COLUMNS, Reconstructions, to_image
from crate_mae.pictures.sheet import Column, Row, cell_size, sheet

PAGE = "index.html"
PATHS = ("path.png", "path_2.png", "path_3.png", "path_4.png")
"""One picture for each of the first images."""

SHOWS = {
    PAGE: "the page: image, layer, head and patch are picked by clicking",
    "reconstructions.png": "images, what is visible of them, and what the model makes of that",
    "attention.png": "what one layer attends to, head by head",
    "attention_layers.png": "the same through all layers of the encoder, mean over heads",
    "segmentation.png": "the regions that heads pick out, without labels",
    "components.png": "tokens and keys in colour: what is alike to the model",
    **dict.fromkeys(PATHS, "what each step of each layer changed in an image"),
}
"""Every file that ``crate_mae.visualizing.visualize`` may write, in words; the one to open first is the first."""

GIVEN_CONTRAST = "norm_pix_loss: brightness and contrast of every predicted patch are the true ones."
"""The remark beside predictions of a model that was trained on standardised patches."""

_PATH_CELL = 120
_OPACITY = 0.85
_OUTLINE = 5
_FRAME = 12
"""The least side of a frame in pixels, so that some of the patch is seen inside it."""


class Query(NamedTuple):
    """The token whose attention is drawn: the patch at (row, column), counted from 0, or the class token if None."""

    patch: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return (
            "the class token"
            if self.patch is None
            else f"the patch in row {self.patch[0] + 1}, column {self.patch[1] + 1}"
        )

    def attention(self, layer: LayerView) -> Tensor:
        """The attention of each head to the patches, float32 [heads, rows, columns]. The class token gets the rest."""
        grid = tuple(layer.norms.shape)
        token = 0 if self.patch is None else 1 + self.patch[0] * grid[1] + self.patch[1]
        scores = (layer.projected[:, token : token + 1] @ layer.projected.mT)[:, 0] * layer.scale
        return scores.softmax(-1)[:, 1:].unflatten(-1, grid)

    def marked(self, panel: Image.Image, grid: tuple[int, int]) -> Image.Image:
        """A panel with a frame around the patch or, of one that is smaller than a frame, around its middle."""
        if self.patch is not None:
            (left, right), (top, bottom) = map(_framed, self.patch[::-1], panel.size, grid[::-1])
            draw = ImageDraw.Draw(panel)
            for inset, colour in ((0, "black"), (2, "white")):
                draw.rectangle(
                    (left + inset, top + inset, right - 1 - inset, bottom - 1 - inset), outline=colour, width=2
                )
        return panel


def _framed(place: int, side: int, count: int) -> tuple[int, int]:
    """The first and the last pixel of a frame along one side of a panel."""
    length = max(side / count, _FRAME)
    first = min(max((place + 0.5) * side / count - length / 2, 0), side - length)
    return round(first), round(first + length)


def overlay(pixels: Tensor, values: Tensor, size: tuple[int, int]) -> Image.Image:
    """A map over its image, the more opaque the larger its values, as shares of the largest.

    Args:
        pixels: uint8 [channels, height, width].
        values: [rows, columns] of patches, 0 or more; between the middles of patches they are bicubic.
        size: (height, width) of the result.
    """
    shares = values.double() / values.max().clamp_min(torch.finfo(torch.float32).tiny)
    smooth = F.interpolate(shares[None, None], size, mode="bicubic", align_corners=False)[0, 0].clamp(0, 1).numpy()
    return _blended(_photograph(pixels, size), scaled(smooth), _OPACITY * np.sqrt(smooth)[..., None])


def region(pixels: Tensor, mask: Tensor, colour: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The patches of a mask, bool [rows, columns], tinted and with an outline; the rest of the image grey and dim."""
    photograph = _photograph(pixels, size)
    inside = _enlarged(mask, size)
    margin = F.pad(inside[None].float(), [_OUTLINE // 2] * 4)
    outline = inside & (F.max_pool2d(1 - margin, _OUTLINE, stride=1)[0] > 0)
    dim = np.array(photograph).mean(-1, keepdims=True) * 0.5
    tinted = np.array(_blended(photograph, colour, 0.4))
    picture = np.where(inside[..., None], np.where(outline[..., None], colour, tinted), dim)
    return Image.fromarray(picture.round().astype(np.uint8))


def attention_picture(
    views: Sequence[ImageView], names: Sequence[str], layer: int, query: Query, caption: str
) -> Image.Image:
    """Each image, and what the query attends to in it: the mean over heads, and each head. ``layer`` is a place in ``layers``."""
    which = views[0].layers[layer]
    heads = which.projected.shape[0]
    columns = ["image", "mean over heads", *(f"head {head + 1}" for head in range(heads))]

    def row(name: str, view: ImageView) -> Row:
        attention = query.attention(view.layers[layer])
        return _attention_row(name, view, query, [attention.mean(0), *attention])

    return sheet(
        f"Attention of {query.name}, {_full_name(views[0], layer)}",
        [*_about_attention(query), caption],
        list(map(Column, columns)),
        list(map(row, names, views)),
        scale=_ATTENTION_SCALE,
    )


def layers_picture(views: Sequence[ImageView], names: Sequence[str], query: Query, caption: str) -> Image.Image:
    """The query's attention, mean over heads, in each layer of the encoder; of the decoder where there is no encoder."""
    stack = views[0].layers[0].stack

    def row(name: str, view: ImageView) -> Row:
        layers = [layer for layer in view.layers if layer.stack == stack]
        return _attention_row(name, view, query, [query.attention(layer).mean(0) for layer in layers])

    rows = list(map(row, names, views))
    columns = [f"{stack} {number}" for number in range(1, len(rows[0].cells))]
    return sheet(
        f"Attention of {query.name} through the {stack}, mean over heads",
        [*_about_attention(query), caption],
        [Column("image"), *map(Column, columns)],
        rows,
        scale=_ATTENTION_SCALE,
    )


def segmentation_picture(
    views: Sequence[ImageView], names: Sequence[str], layer: int, query: Query, mass: float, caption: str
) -> Image.Image:
    """The patches that each head attends to most (``most_attended``), and which head attends most to each patch."""
    which = views[0].layers[layer]
    colours = distinct(which.projected.shape[0])

    def row(name: str, view: ImageView) -> Row:
        size = cell_size(view.pixels.shape[-2:])
        attention = query.attention(view.layers[layer])
        masks = most_attended(attention.flatten(1), mass).view_as(attention)
        owner = _enlarged(attention.argmax(0), size).numpy()
        photograph = _photograph(view.pixels, size)
        panels = [region(view.pixels, mask, colour, size) for mask, colour in zip(masks, colours, strict=True)]
        cells = [photograph.copy(), *panels, _blended(photograph, colours[owner], 0.6)]
        shares = masks.float().mean((1, 2)).tolist()
        notes = ["", *(f"{share:.0%} of the patches" for share in shares), ""]
        return Row(name, _details(view), [query.marked(cell, view.grid) for cell in cells], notes)

    heads = [Column(f"head {head}", hexadecimal(colour)) for head, colour in enumerate(colours, 1)]
    return sheet(
        f"What each head picks out, by the attention of {query.name}, {_full_name(views[0], layer)}",
        [
            f"Coloured: the fewest patches that together have {mass:.0%} of a head's attention to patches. Last: each patch in "
            "the colour of the head whose attention to it is the largest, colours as in the heads' names. No labels were used.",
            caption,
        ],
        [Column("image"), *heads, Column("head that attends most")],
        list(map(row, names, views)),
    )


def components_picture(views: Sequence[ImageView], names: Sequence[str], caption: str) -> Image.Image:
    """Principal components of tokens and keys as colours: first, middle and last layer of the encoder, last of the decoder."""
    layers = views[0].layers
    encoder = [place for place, layer in enumerate(layers) if layer.stack == "encoder"]
    chosen = {*encoder[:1], *encoder[len(encoder) // 2 :][:1], *encoder[-1:], len(layers) - 1}
    shown = [(layers[place], place, what) for place in sorted(chosen) for what in ("tokens", "keys")]

    def row(name: str, view: ImageView) -> Row:
        size = cell_size(view.pixels.shape[-2:])
        maps = [
            view.layers[place].token_colours if what == "tokens" else view.layers[place].key_colours
            for _, place, what in shown
        ]
        return Row(name, _details(view), [_photograph(view.pixels, size), *(_patches(map_, size) for map_ in maps)])

    images = "the image" if len(views) == 1 else f"all {len(views)} images together"
    return sheet(
        "Tokens and keys in colour: patches of one colour are alike to the model",
        [
            f"Red, green and blue: the first, second and third principal component over {images}, each from its 1 % to its "
            "99 % quantile; fitted to each column by itself, so that colours compare down a column and not across. Tokens: the "
            "layer's output. Keys: what attention is of, the projections of all heads.",
            caption,
        ],
        [Column("image"), *(Column(f"{name_of(layer)}\n{what}") for layer, _, what in shown)],
        list(map(row, names, views)),
    )


_PATH: dict[str, Callable[[LayerView], Tensor]] = {
    "compression\n|MSSA| / |token|": lambda layer: layer.compression,
    "sparse step\n|change| / |token|": lambda layer: layer.sparsification,
    "zeros after it\nfraction": lambda layer: layer.zeros,
    "norm of tokens\n|output|": lambda layer: layer.norms,
}


def path_picture(view: ImageView, name: str, caption: str) -> Image.Image:
    """One image through all layers: what each step changed, patch by patch, in one scale of colours a column and stack."""
    size = cell_size(view.pixels.shape[-2:], _PATH_CELL, tallest=1.0)
    photograph: Image.Image | None = _photograph(view.pixels, size)
    rows = []
    for stack in dict.fromkeys(layer.stack for layer in view.layers):
        layers = [layer for layer in view.layers if layer.stack == stack]
        maps = [torch.stack(list(map(of_layer, layers))).double() for of_layer in _PATH.values()]
        ranges = [(float(of_layers.min()), float(of_layers.max())) for of_layers in maps]
        for place, layer in enumerate(layers):
            cells = [
                _patches(torch.from_numpy(scaled(((of_layers[place] - least) / _span(least, most)).numpy())), size)
                for of_layers, (least, most) in zip(maps, ranges, strict=True)
            ]
            before, after = layer.coding_rates
            scales = [None, *map(_ends, ranges), None]
            rows.append(
                Row(
                    name_of(layer),
                    [f"R^c {before:.1f} to {after:.1f}"],
                    [photograph, *cells, _patches(layer.token_colours, size)],
                    scales=() if place else scales,
                )
            )
            photograph = None
    return sheet(
        f"The path of {name} through the layers",
        [
            "Compression: how much MSSA took off or added. Sparse step: how much it changed its normalised input (ISTA; in the "
            "decoder, a linear step). R^c: coding rate of the heads' projections in nats, before and after MSSA. Colours of "
            "tokens: principal components, fitted to each layer by itself.",
            f"{', '.join(_details(view))}. {caption}",
        ],
        [Column("image"), *map(Column, _PATH), Column("tokens\nin colour")],
        rows,
        width=_PATH_CELL,
    )


def reconstructions_picture(
    shown: Sequence[Reconstructions], names: Sequence[str], side: int, *, norm_pix_loss: bool, caption: str
) -> Image.Image:
    """A row for each image and the columns of ``COLUMNS``. Args: ``shown``, each of one image; ``side`` of a patch."""

    def row(name: str, of_image: Reconstructions) -> Row:
        height, width = of_image.original.shape[-2:]
        size = cell_size((height, width))
        columns = (of_image.original, of_image.masked, of_image.prediction, of_image.pasted)
        cells = [_sharp(to_image(pixels[0]), size) for pixels in columns]
        removed = int(of_image.removed[0, 0].sum()) // side**2
        patches = f"{removed} of {height * width // side**2} removed"
        return Row(name, [f"{width} x {height} pixels", patches], cells)

    return sheet(
        "Reconstructions",
        [*([GIVEN_CONTRAST] if norm_pix_loss else []), caption],
        list(map(Column, COLUMNS)),
        list(map(row, names, shown)),
    )


def name_of(layer: LayerView) -> str:
    """The name of a layer, such as "encoder 1": layers of a stack are counted from 1."""
    return f"{layer.stack} {layer.index + 1}"


def _ends(span: tuple[float, float]) -> tuple[str, str]:
    least, most = (f"{end:.3g}" for end in span)
    return (least, most) if least != most else (f"all {least}", "")


def _span(least: float, most: float) -> float:
    """The range of the colours; infinite where both ends print alike, so that rounding is not drawn as differences."""
    return most - least if _ends((least, most))[1] else math.inf


def _full_name(view: ImageView, layer: int) -> str:
    which = view.layers[layer]
    return f"{which.stack} layer {which.index + 1} of {sum(each.stack == which.stack for each in view.layers)}"


_ATTENTION_SCALE = ("0", "largest weight in the panel, which is written under it")


def _about_attention(query: Query) -> list[str]:
    framed = "" if query.patch is None else " The patch is framed."
    return [
        "Weights of softmax to patches; what is missing to 1 is to the class token. Under the names: the weight if all tokens "
        f"were attended to alike. The larger the more opaque, bicubic between patches; each panel has a scale of its own.{framed}"
    ]


def _attention_row(name: str, view: ImageView, query: Query, maps: Sequence[Tensor]) -> Row:
    size = cell_size(view.pixels.shape[-2:])
    cells = [_photograph(view.pixels, size), *(overlay(view.pixels, values, size) for values in maps)]
    alike = 1 / (1 + maps[0].numel())
    largest = [float(values.max()) for values in maps]
    notes = ["", *(f"largest {value:.3g}{', below all alike' * (value < alike)}" for value in largest)]
    details = [*_details(view), f"all alike: {alike:.2g}"]
    return Row(name, details, [query.marked(cell, view.grid) for cell in cells], notes)


def _details(view: ImageView) -> list[str]:
    height, width = view.pixels.shape[-2:]
    return [f"{width} x {height} pixels", "{} rows, {} columns".format(*view.grid)]


def _photograph(pixels: Tensor, size: tuple[int, int]) -> Image.Image:
    return to_image(pixels).resize(size[::-1], Image.Resampling.BICUBIC)


def _patches(colours: Tensor, size: tuple[int, int]) -> Image.Image:
    """Patches of one colour each, uint8 [rows, columns, 3]."""
    return _sharp(Image.fromarray(colours.numpy()), size)


def _sharp(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size[::-1], Image.Resampling.NEAREST)


def _enlarged(values: Tensor, size: tuple[int, int]) -> Tensor:
    """[rows, columns] of patches to [height, width], each patch of one value."""
    places = [torch.arange(side) * count // side for side, count in zip(size, values.shape, strict=True)]
    return values[places[0]][:, places[1]]


def _blended(image: Image.Image, colours: np.ndarray, opacity: np.ndarray | float) -> Image.Image:
    blended = np.asarray(image) * (1 - opacity) + colours * opacity
    return Image.fromarray(blended.round().astype(np.uint8))
