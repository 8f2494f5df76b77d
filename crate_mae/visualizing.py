"""Draws what a model sees in images, as pictures and a page in one folder; for ``crate-mae visualize`` and the demo."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from crate_mae.analysis import ImageView, view
from crate_mae.config import ModelConfig, grid_of
from crate_mae.data.transforms import Normalization
from crate_mae.files import make_folder, remove, replaced
from crate_mae.model import CrateMAE
from crate_mae.pictures import Reconstructions, reconstruct
from crate_mae.pictures.inside import (
    PAGE,
    PATHS,
    SHOWS,
    Query,
    attention_picture,
    components_picture,
    layers_picture,
    path_picture,
    reconstructions_picture,
    segmentation_picture,
)
from crate_mae.pictures.page import page
from crate_mae.training.config import MAX_SEED
from crate_mae.training.validation import mask_noise


def visualize(
    model: CrateMAE,
    images: Sequence[Tensor],
    names: Sequence[str],
    normalization: Normalization,
    folder: Path,
    *,
    layer: int | str = -1,
    query: tuple[int, int] | None = None,
    mass: float = 0.6,
    mask_ratio: float = 0.75,
    seed: int = 0,
    title: str = "Inside CRATE-MAE",
    caption: str = "",
    done: Callable[[int], None] = lambda steps: None,
) -> list[Path]:
    """Draw pictures of what the model makes of images into a folder, and a page to look around in.

    Args:
        model: to look into.
        images: uint8 [channels, height, width] each; sizes may differ.
        names: of the images.
        normalization: of the images.
        folder: made if it is not there; files in it with names in ``SHOWS`` are replaced.
        layer: the layer whose attention is drawn: of the encoder, 1 is the first and -1 the last; "decoder:1" is the decoder's
            first. In a model without encoder layers, -1 is the decoder's last.
        query: the patch whose attention is drawn, (row, column) counted from 1; None for the class token.
        mass: the share of a head's attention that makes a region, see ``most_attended``.
        mask_ratio: fraction of the patches removed for reconstruction. Which ones depends on the seed and the image's place.
        seed: 0 to 2**64 - 1.
        title: of the page.
        caption: a line in each picture, on the model.
        done: called with 1 after each of ``steps``, for a progress bar.

    Returns:
        The files, in the order of ``SHOWS``.

    Raises:
        ValueError: there are no images, or one does not fit the model; or an argument is out of range.
        OSError: a file cannot be written.
    """
    if not images or len(images) != len(names):
        raise ValueError(f"images: expected one or more, and as many names, got {len(images)} and {len(names)} names")
    config = model.config
    place = place_of_layer(config, layer)
    check_mass(mass)
    for name, pixels in zip(names, images, strict=True):
        grid = grid_of(pixels.shape[-2:], config.patch_size)
        check_query(query, grid, name)
        check_mask_ratio(mask_ratio, grid, name)

    views = view(model, images, normalization, done=done)
    shown = []
    for index, pixels in enumerate(images):
        noise = mask_noise(1, math.prod(views[index].grid), (seed + index) % (MAX_SEED + 1))
        shown.append(reconstruct(model, pixels[None], normalization, mask_ratio=mask_ratio, noise=noise))
        done(1)

    make_folder(folder)
    for path in (folder / name for name in PATHS[len(images) :]):  # of a former call with more images
        remove(path)
    token = Query(None if query is None else (query[0] - 1, query[1] - 1))
    for name, picture in _pictures(config, views, names, shown, place, token, mass, caption):
        with replaced(folder / name) as file:
            picture.save(file, format="PNG")
        done(1)
    text = page(views, names, shown, title=title, caption=caption, norm_pix_loss=config.norm_pix_loss)
    with replaced(folder / PAGE) as file:
        file.write(text.encode())
    done(1)
    return [folder / name for name in SHOWS if name not in PATHS[len(images) :]]


def steps(images: int) -> int:
    """The number of steps of ``visualize``: two for each image, which is analysed and reconstructed, and one for each file."""
    return 2 * images + len(SHOWS) - len(PATHS[images:])


def place_of_layer(config: ModelConfig, layer: int | str, option: str = "layer") -> int:
    """The number of a layer, from 0, among the encoder's layers followed by the decoder's.

    Args:
        config: of the model.
        layer: as for ``visualize``.
        option: what the message calls it.

    Raises:
        ValueError: there is no such layer.
    """
    if not config.depth + config.decoder_depth:
        raise ValueError("model: expected one with layers, and it has none")
    if not config.depth and str(layer) == "-1":
        layer = "decoder:-1"
    stack, _, number = str(layer).rpartition(":")
    depth = config.decoder_depth if stack == "decoder" else config.depth
    try:
        index = int(number)
    except ValueError:
        index = 0
    if stack not in ("", "encoder", "decoder") or not 1 <= abs(index) <= depth:
        spans = [
            f"{start}1 to {start}{count} (or {start}-1, the last)"
            for start, count in (("", config.depth), ("decoder:", config.decoder_depth))
            if count
        ]
        raise ValueError(f"{option}: expected {', or '.join(spans)}, got {layer}")
    first = config.depth if stack == "decoder" else 0
    return first + (index - 1 if index > 0 else depth + index)


def check_query(query: tuple[int, int] | None, grid: tuple[int, int], name: str, option: str = "query") -> None:
    """Raise a ValueError if an image with this grid, (rows, columns), has no such patch, counted from 1."""
    if query is not None and not all(1 <= place <= count for place, count in zip(query, grid, strict=True)):
        raise ValueError(
            f"{option}: expected a row from 1 to {grid[0]} and a column from 1 to {grid[1]}, the patches of {name}, "
            f"got {query[0]},{query[1]}"
        )


def check_mask_ratio(mask_ratio: float, grid: tuple[int, int], name: str, option: str = "mask_ratio") -> None:
    """Raise a ValueError if the ratio leaves no patch of an image with this grid visible, or all."""
    patches = math.prod(grid)
    if not (0 < mask_ratio < 1 and 0 < int(patches * (1 - mask_ratio)) < patches):
        raise ValueError(
            f"{option}: expected above 0, and to leave one patch of {patches} of {name} visible, got {mask_ratio}"
        )


def check_mass(mass: float, option: str = "mass") -> None:
    """Raise a ValueError if `mass` is not above 0 and at most 1."""
    if not 0 < mass <= 1:
        raise ValueError(f"{option}: expected above 0 and at most 1, got {mass}")


def _pictures(
    config: ModelConfig,
    views: Sequence[ImageView],
    names: Sequence[str],
    shown: Sequence[Reconstructions],
    layer: int,
    query: Query,
    mass: float,
    caption: str,
) -> Iterator[tuple[str, Image.Image]]:
    """The pictures by file name; each is drawn when the one before has been written, since they are large."""
    reconstructed = reconstructions_picture(
        shown, names, config.patch_size, norm_pix_loss=config.norm_pix_loss, caption=caption
    )
    yield "reconstructions.png", reconstructed
    yield "attention.png", attention_picture(views, names, layer, query, caption)
    yield "attention_layers.png", layers_picture(views, names, query, caption)
    yield "segmentation.png", segmentation_picture(views, names, layer, query, mass, caption)
    yield "components.png", components_picture(views, names, caption)
    for path, image, name in zip(PATHS, views, names, strict=False):
        yield path, path_picture(image, name, caption)
