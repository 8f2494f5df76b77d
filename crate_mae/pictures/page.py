"""One page of HTML that shows images inside a model: it needs no network, and opens from the file system."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from crate_mae.analysis import ImageView, LayerView
from crate_mae.pictures.reconstructions import Reconstructions, to_image

_MAPS = ("compression", "sparsification", "zeros", "norms")
_LARGEST = torch.iinfo(torch.int16).max


def page(
    views: Sequence[ImageView],
    names: Sequence[str],
    reconstructions: Sequence[Reconstructions],
    *,
    title: str,
    caption: str,
    norm_pix_loss: bool,
) -> str:
    """The page, as ASCII: pick an image, a layer, a head and a patch, and see what attends to what.

    Of each layer it holds w, rounded to 65,535 levels a head, from which it computes attention, softmax(w w^T scale), when that
    is first looked at. An image of 224 pixels in 12 + 12 layers of width 768 takes 10 MB.

    Args:
        views: of images, all through one model.
        names: of the images; any text.
        reconstructions: of each image, a batch of one.
        title, caption: of the page; any text.
        norm_pix_loss: of the model; the page says what that means for the reconstructions.

    Raises:
        ValueError: there are no images, or not one name and one reconstruction of each.
    """
    if not views:
        raise ValueError("views: expected one or more, got none")
    for argument, values in (("names", names), ("reconstructions", reconstructions)):
        if len(values) != len(views):
            raise ValueError(f"{argument}: expected {len(views)}, one a view, got {len(values)}")
    shown = [_image(*each) for each in zip(views, names, reconstructions, strict=True)]
    scripts = [_script("data", {"images": shown, "norm_pix_loss": norm_pix_loss})]
    # Apart from the rest, so that the browser leaves them as text until they are looked at.
    scripts += [
        _script(f"w-{image}-{number}", _base64(_levels(layer.projected)[0]))
        for image, view in enumerate(views)
        for number, layer in enumerate(view.layers)
    ]
    filled = {"title": _escaped(title), "caption": _escaped(caption), "data": "\n".join(scripts)}
    template = files("crate_mae.pictures").joinpath("page.html").read_text(encoding="ascii")
    return re.sub("<!--(title|caption|data)-->", lambda place: filled[place[1]], template)


def _image(view: ImageView, name: str, reconstruction: Reconstructions) -> dict[str, Any]:
    rows, columns = view.grid
    if len(reconstruction.original) != 1:
        raise ValueError(f"reconstructions: expected of one image each, got of {len(reconstruction.original)}")
    return {
        "name": _readable(name),
        "rows": rows,
        "columns": columns,
        "patch_size": view.patch_size,
        "original": _png(view.pixels),
        "masked": _png(reconstruction.masked[0]),
        "prediction": _png(reconstruction.prediction[0]),
        "pasted": _png(reconstruction.pasted[0]),
        "layers": [_layer(layer) for layer in view.layers],
    }


def _layer(layer: LayerView) -> dict[str, Any]:
    heads, _, width = layer.projected.shape
    return {
        "stack": layer.stack,
        "number": layer.index + 1,
        "heads": heads,
        "width": width,
        "scale": layer.scale,
        "steps": _levels(layer.projected)[1].tolist(),
        "rates": layer.coding_rates,
        "token_colours": _base64(layer.token_colours),
        "key_colours": _base64(layer.key_colours),
        **{name: _base64(getattr(layer, name).float()) for name in _MAPS},
    }


def _levels(projected: Tensor) -> tuple[Tensor, Tensor]:
    """w [heads, n, head_dim] as int16, and float64 [heads]: what to multiply each head's by."""
    exact = projected.double()
    steps = exact.abs().amax((1, 2)) / _LARGEST
    levels = exact / torch.where(steps > 0, steps, 1.0)[:, None, None]
    return levels.round().to(torch.int16), steps


def _base64(values: Tensor) -> str:
    """The tensor's elements, little-endian."""
    array = values.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode("ascii")


def _png(pixels: Tensor) -> str:
    file = io.BytesIO()
    to_image(pixels).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _script(name: str, value: Any) -> str:
    """JSON that no text in it can end: "<" comes only as an escape."""
    text = json.dumps(value, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _escaped(text: str) -> str:
    """The text escaped for HTML, in ASCII."""
    return html.escape(_readable(text)).encode("ascii", "xmlcharrefreplace").decode("ascii")


def _readable(text: str) -> str:
    """The text with U+FFFD in the place of surrogates, by which Python writes bytes of a file name that are not UTF-8."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
