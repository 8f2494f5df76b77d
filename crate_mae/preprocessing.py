"""From a photograph to a model's input: the size, the colours and the standardisation that a model directory records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

from crate_mae.checkpoints import CONFIG_FILE, read_config, read_json
from crate_mae.data.reading import COLOUR_MODES, part, shown_size
from crate_mae.data.transforms import Normalization, centred_box


def load_transform(directory: str | Path) -> Callable[[Image.Image], Tensor]:
    """The function from a photograph to the model's input, as validation computes it in the run that wrote ``directory``.

    Returns:
        A function of a Pillow image of any mode: upright, in the model's colours, its largest centred part resized to the
        model's image size (``crate_mae.data.reading``), then (pixels / 255 - mean) / std with the run's numbers; a float32
        tensor [channels, height, width]. It raises a TypeError for anything but a Pillow image, and an UnreadableImage, which
        is a ValueError, for an image whose file is broken.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: it does not say how images were standardised; or the model's images are no photographs.
    """
    model, normalization = read_config(directory), read_normalization(directory)

    def transform(image: Image.Image) -> Tensor:
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"image: expected a Pillow image, as PIL.Image.open gives of a file, got {type(image).__name__}"
            )
        height, width = model.image_shape
        name = str(getattr(image, "filename", "") or "given")
        box = centred_box(shown_size(image, name), width / height)
        return normalization(part(image, box, model.image_shape, model.in_chans, name))

    return transform


def read_normalization(directory: str | Path) -> Normalization:
    """How the images of the model in ``directory`` were standardised; errors as of ``load_transform``."""
    file, channels = Path(directory) / CONFIG_FILE, read_config(directory).in_chans
    statistics = read_statistics(directory)
    if statistics is None:
        raise ValueError(
            f"{file}: expected a section images with mean and std, as a pre-training run writes; it has none: "
            f"save_model(model, directory, mean=..., std=...) writes it, too, and crate-mae import with --mean and --std"
        )
    if channels not in COLOUR_MODES:
        raise ValueError(f"{file}: photographs have {', '.join(map(str, COLOUR_MODES))} channels, its model {channels}")
    return Normalization(*statistics, channels)


def read_statistics(directory: str | Path) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of each channel, by which images were standardised; None where ``config.json`` has none.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: it does not have a number for each channel.
    """
    file = Path(directory) / CONFIG_FILE
    images, channels = read_json(file).get("images"), read_config(directory).in_chans
    if not isinstance(images, dict) or not {"mean", "std"} <= images.keys():
        return None
    try:
        Normalization(images["mean"], images["std"], channels)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: images: expected mean and std, a number for each channel: {error}") from None
    return images["mean"], images["std"]
