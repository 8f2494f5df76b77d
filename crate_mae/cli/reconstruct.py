"""`crate-mae reconstruct`: what a run's model makes of one's own images."""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace
from PIL import Image

from crate_mae.cli.parsers import add_device, add_masks, command_parser
from crate_mae.cli.runs import check_run, check_seed, model_of, normalization_of, trained_ratio
from crate_mae.cli.settings import path_of
from crate_mae.config import grid_of
from crate_mae.data.reading import open_file, part, shown_size
from crate_mae.data.source import UnreadableImage
from crate_mae.data.transforms import Size, centred_box
from crate_mae.files import replaced
from crate_mae.pictures import reconstruction_sheet
from crate_mae.training import Validation
from crate_mae.training.config import MAX_SEED
from crate_mae.training.precision import choose_device
from crate_mae.visualizing import check_mask_ratio

HELP = "Show what a run's model makes of images of your own."


def make_parser() -> ArgumentParser:
    """The parser of `reconstruct`."""
    parser = command_parser()
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of a run, such as runs/demo.")
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="+", help="Image files; their centre is taken.")
    parser.add_argument("--out", type=Path, default=Path("reconstructed.png"), help="File for the picture.")
    add_masks(parser)
    add_device(parser)
    return parser


def run(parser: ArgumentParser, chosen: Namespace) -> str:
    """Write the picture; returns what to print.

    Raises:
        OSError: there is no such run, or the picture cannot be written.
        ValueError: an argument cannot be used, or an image not be read; the message names it.
    """
    settings = chosen.reconstruct
    for path in (settings.run, settings.out, *settings.images):
        path_of(str(path))
    check_run(settings.run)
    _refuse_output(settings.out, settings.images)
    check_seed(settings.seed)
    device = choose_device(settings.device, "--device")
    normalization = normalization_of(settings.run)
    model = model_of(settings.run).to(device)
    rows, columns = grid_of(model.config.image_shape, model.config.patch_size)
    mask_ratio = trained_ratio(settings.run) if settings.mask_ratio is None else settings.mask_ratio
    check_mask_ratio(mask_ratio, (rows, columns), "an image", "--mask_ratio")
    pixels = [_centre(path, model.config.image_shape, model.config.in_chans) for path in settings.images]
    # A validation for each image, so that each has its own error, in the unit of pre-training.
    measures = [
        Validation(
            [image],
            normalization,
            patches=rows * columns,
            mask_ratio=mask_ratio,
            batch_size=1,
            seed=(settings.seed + index) % (MAX_SEED + 1),
        )
        for index, image in enumerate(pixels)
    ]
    noise = torch.cat([measure.noise for measure in measures])
    sheet = reconstruction_sheet(model, torch.stack(pixels), normalization, mask_ratio=mask_ratio, noise=noise)
    with replaced(settings.out) as file:
        sheet.save(file, format=Image.registered_extensions()[settings.out.suffix.lower()])
    lines = [
        "Mean squared error on the removed patches, in normalised pixels, beside that of the mean of the visible ones:"
    ]
    for path, measure in zip(settings.images, measures, strict=True):
        errors = measure(model)
        lines.append(f"  {errors.val_loss:.4f}  {errors.mean_fill_loss:.4f}  {path}")
    return "\n".join([*lines, f"The picture is {settings.out}, a row for each image in this order."])


def _refuse_output(out: Path, images: list[Path]) -> None:
    Image.init()
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out: expected a name that ends as an image file's does, such as .png, got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    if out.resolve() in [image.resolve() for image in images]:
        raise ValueError(f"--out: {out} is one of the images, and would be overwritten")


def _centre(path: Path, size: Size, channels: int) -> torch.Tensor:
    try:
        image = open_file(path)
        box = centred_box(shown_size(image, str(path)), size[1] / size[0])
        return part(image, box, size, channels, str(path))
    except UnreadableImage as error:
        raise UnreadableImage(path, error.cause, error.reason, "IMAGE: expected files of photographs") from error
