"""`crate-mae visualize`: what a run's model sees in images of one's own, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace

from crate_mae.analyzing import model_in_words
from crate_mae.cli.parsers import add_device, add_masks, command_parser
from crate_mae.cli.runs import check_run, check_seed, model_of, normalization_of, trained_ratio
from crate_mae.cli.settings import path_of
from crate_mae.config import ModelConfig, grid_of
from crate_mae.data import ImageFolder, spread
from crate_mae.data.paths import printable
from crate_mae.data.progress import Progress, say
from crate_mae.data.reading import open_file, part, shown_size
from crate_mae.data.source import UnreadableImage
from crate_mae.data.transforms import centred_box
from crate_mae.pictures.inside import GIVEN_CONTRAST, PAGE, PATHS, SHOWS
from crate_mae.training.precision import choose_device
from crate_mae.training.run_folder import INSIDE, refuse_unwritable
from crate_mae.visualizing import (
    check_mask_ratio,
    check_mass,
    check_query,
    place_of_layer,
    steps,
    visualize,
)

OF_A_FOLDER = 12
"""The most images taken from a folder."""

MOST_IMAGES = 48
MOST_PATCHES = 4096
"""The most patches of an image; the size of attention grows with their square."""

MOST_MEMORY = 8 * 2**30
"""The most bytes that may be kept of all images together."""


HELP = "Show what goes on inside a run's model, on images of your own."


def make_parser() -> ArgumentParser:
    """The parser of `visualize`."""
    parser = command_parser(
        "Draws what goes on inside a model: reconstructions, attention, the regions that heads pick out, tokens in "
        "colour, and an image's path through the layers; and a page to look around in.",
        "Layers, rows and columns are counted from 1, as the pictures number them.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of a run, such as runs/demo.")
    parser.add_argument(
        "images",
        metavar="IMAGE",
        type=Path,
        nargs="+",
        help=f"Image files, of any size; of a folder, up to {OF_A_FOLDER} images, spread evenly.",
    )
    parser.add_argument("--out", type=Path, help="Folder for pictures and page; by default, RUN/inside.")
    parser.add_argument(
        "--size",
        type=int,
        help="Short side of the images in pixels, to the nearest multiple of the patch; by default, that of the model's images.",
    )
    parser.add_argument(
        "--layer",
        type=str,
        default="-1",
        help="Whose attention is drawn: of the encoder 1, 2, ... or back from its end -1, -2; decoder:1 is the decoder's first.",
    )
    parser.add_argument(
        "--patch",
        type=str,
        metavar="ROW,COLUMN",
        help="The patch whose attention is drawn, instead of the class token.",
    )
    parser.add_argument("--mass", type=float, default=0.6, help="Share of a head's attention that makes a region.")
    add_masks(parser)
    add_device(parser)
    return parser


def run(parser: ArgumentParser, chosen: Namespace) -> str:
    """Write pictures and page; returns what to print.

    Raises:
        OSError: there is no such run, or a file cannot be written.
        ValueError: an argument cannot be used, or an image not be read; the message names it.
    """
    asked = chosen.visualize
    out = asked.out or asked.run / INSIDE
    for path in (asked.run, out, *asked.images):
        path_of(str(path))
    check_run(asked.run)
    refuse_unwritable(out)
    check_seed(asked.seed)
    check_mass(asked.mass, "--mass")
    query = _patch(asked.patch)
    device = choose_device(asked.device, "--device")
    normalization = normalization_of(asked.run)
    model = model_of(asked.run).to(device)
    place_of_layer(model.config, asked.layer, "--layer")
    mask_ratio = trained_ratio(asked.run) if asked.mask_ratio is None else asked.mask_ratio

    found, remarks = _files(asked.images)
    if overwritten := {(out / name).resolve() for name in SHOWS} & {path.resolve() for path, _ in found}:
        raise ValueError(f"--out: {min(overwritten)} is one of the images, and would be overwritten")
    short, remark = _short_side(asked.size, model.config)
    paths, images = [], []
    for path, in_folder in found:
        try:
            images.append(_read(path, short, model.config))
            paths.append(path)
        except UnreadableImage as error:
            if not in_folder:
                raise
            remarks.append(f"{path} is left out: {error.cause} ({error.reason}).")
    if not images:
        raise ValueError(f"IMAGE: none of the {len(found)} images tried can be read; crate-mae check lists such images")
    _refuse_too_much(images, model.config)
    names = [printable(path.name.encode(errors="surrogateescape")) for path in paths]
    for name, pixels in zip(names, images, strict=True):
        grid = grid_of(pixels.shape[-2:], model.config.patch_size)
        check_query(query, grid, name, "--patch")
        check_mask_ratio(mask_ratio, grid, name, "--mask_ratio")

    config, named = model.config, model_in_words(asked.run, model)
    with Progress(steps(len(images)), "visualize", say, unit="step") as progress:
        files = visualize(
            model,
            images,
            names,
            normalization,
            out,
            layer=asked.layer,
            query=query,
            mass=asked.mass,
            mask_ratio=mask_ratio,
            seed=asked.seed,
            title=f"Inside CRATE-MAE: {asked.run}",
            caption=f"{asked.run}: {named}, patches of {config.patch_size} x {config.patch_size} pixels.",
            done=progress.update,
        )
    width = max(len(path.name) for path in files)
    of_image = {path: f": {name}" for path, name in zip(PATHS, names, strict=False)}
    of_image[PAGE] = f" ({files[0].stat().st_size / 1e6:.1f} MB)"
    return "\n".join(
        [
            *remarks,
            *([remark] if remark else []),
            f"{asked.run}: {named}.",
            *([GIVEN_CONTRAST] if config.norm_pix_loss else []),
            f"{len(images)} images, {len(files)} files in {out}:",
            *(f"  {path.name:<{width}}  {SHOWS[path.name]}{of_image.get(path.name, '')}" for path in files),
            f"Open {files[0]} first.",
        ]
    )


def _patch(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = text.split(",")
    if len(numbers) != 2 or not all(number.strip().isdecimal() for number in numbers):
        raise ValueError(f"--patch: expected a row and a column, counted from 1, such as 2,5, got {text}")
    return int(numbers[0]), int(numbers[1])


def _files(given: Sequence[Path]) -> tuple[list[tuple[Path, bool]], list[str]]:
    """Images by path, each with whether it comes from a folder; and remarks on folders of which not all images are taken."""
    paths, remarks = [], []
    for path in given:
        if not path.is_dir():
            paths.append((path, False))
            continue
        folder = ImageFolder(path)
        chosen = spread(len(folder), OF_A_FOLDER)
        paths += [(folder.path(index), True) for index in chosen]
        if len(chosen) < len(folder):
            remarks.append(f"{len(chosen)} of the {len(folder):,} images in {path}, spread evenly.")
    if len(paths) > MOST_IMAGES:
        raise ValueError(
            f"IMAGE: expected at most {MOST_IMAGES} images, got {len(paths):,}; a folder gives {OF_A_FOLDER}, spread evenly"
        )
    return paths, remarks


def _short_side(size: int | None, config: ModelConfig) -> tuple[int, str]:
    """The short side in pixels, a multiple of the patch; and a remark if it is not what was asked for."""
    patch = config.patch_size
    if size is None:
        return min(config.image_shape), ""
    longest = math.isqrt(MOST_PATCHES) * patch
    short = (size + patch // 2) // patch * patch
    if size < 1 or not patch <= short <= longest:
        raise ValueError(
            f"--size: expected {patch} to {longest} pixels, 1 to {longest // patch} patches of {patch}, got {size}"
        )
    return short, f"--size {size}: {short}, the nearest multiple of the patch, {patch}." if short != size else ""


def _read(path: Path, short: int, config: ModelConfig) -> torch.Tensor:
    """The upright image, uint8 [channels, height, width], in its proportions up to whole patches."""
    try:
        image = open_file(path)
        shown = shown_size(image, str(path))
        width, height = _fitted(shown, short, config.patch_size)
        _refuse_too_many(path, shown, (width, height), config.patch_size)
        return part(image, centred_box(shown, width / height), (height, width), config.in_chans, str(path))
    except UnreadableImage as error:
        raise UnreadableImage(
            path, error.cause, error.reason, "IMAGE: expected photographs, or folders of them"
        ) from error


def _fitted(shown: tuple[int, int], short: int, patch: int) -> tuple[int, int]:
    """(width, height) with the given short side; the long side is rounded down to whole patches."""
    width, height = (side * short // min(shown) // patch * patch for side in shown)
    return width, height


def _refuse_too_many(path: Path, shown: tuple[int, int], size: tuple[int, int], patch: int) -> None:
    columns, rows = (side // patch for side in size)
    if columns * rows <= MOST_PATCHES:
        return
    fitting = [
        side * patch
        for side in range(1, min(columns, rows))
        if math.prod(_fitted(shown, side * patch, patch)) <= MOST_PATCHES * patch**2
    ]
    remedy = f"--size {fitting[-1]} or less makes it fit" if fitting else "cut it to a part that is less long"
    raise ValueError(
        f"--size: expected at most {MOST_PATCHES:,} patches an image, and {path} would have {rows:,} x {columns:,} at a short "
        f"side of {min(size)} pixels; {remedy}"
    )


def _refuse_too_much(images: Sequence[torch.Tensor], config: ModelConfig) -> None:
    """Refuse images for which too much would be kept: tokens and attention inputs of each layer, in float32."""
    tokens = sum(1 + pixels[0].numel() // config.patch_size**2 for pixels in images)
    needed = 2 * 4 * tokens * config.embed_dim * (config.depth + config.decoder_depth)
    if needed > MOST_MEMORY:
        raise ValueError(
            f"IMAGE: all layers of {len(images)} images have {needed / 2**30:.1f} GiB, expected at most {MOST_MEMORY / 2**30:g}; "
            f"a lower --size needs less, and so do fewer images"
        )
