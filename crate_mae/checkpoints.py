"""Models on disk: ``model.safetensors`` beside ``config.json``, and official checkpoints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crate_mae.config import ModelConfig
from crate_mae.data.folder import COLOUR_MODES
from crate_mae.data.transforms import Normalization, centre_crop, image_to_tensor
from crate_mae.model import UNUSED_OFFICIAL_ENTRIES, CrateMAE
from crate_mae.registry import MODELS, create_model

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


def save_model(
    model: CrateMAE,
    directory: str | Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Write the weights and the configuration, lambda and step size included; other keys of ``config.json`` stay.

    Args:
        mean, std: of each channel of pixels in [0, 1], by which the model's images were standardised,
            (pixels / 255 - mean) / std. With them ``load_transform`` does the same.

    Raises:
        ValueError: only one of mean and std is given, or one of them does not have a value for each channel.
    """
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std: expected both or neither, got {mean} and {std}")
    if mean is not None and std is not None:
        Normalization(mean, std, model.config.in_chans)  # which checks them
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config_file = directory / CONFIG_FILE
    config = json.loads(config_file.read_text()) if config_file.exists() else {}
    config["model"] = dataclasses.asdict(model.config)
    if mean is not None and std is not None:
        config["images"] = {**config.get("images", {}), "mean": list(mean), "std": list(std)}
    _replace(config_file, lambda part: part.write_text(json.dumps(config, indent=2) + "\n"))
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}

    def write(part: Path) -> None:
        save_file(weights, part)
        shutil.copymode(config_file, part)  # else it is the owner's alone, unlike all other files

    _replace(directory / WEIGHTS_FILE, write)


def load_model(
    path: str | Path,
    name: str | None = None,
    *,
    lambd: float | None = None,
    step_size: float | None = None,
    **overrides: Any,
) -> CrateMAE:
    """A model from a directory that ``save_model`` or a pre-training run wrote, or from an official checkpoint file.

    It stands on the CPU in training mode, as one just created; no layer behaves otherwise in evaluation.

    Args:
        path: the directory, or a ``.pth``, ``.pt`` or ``.safetensors`` file with weights alone.
        name: the published size of weights alone, as for ``create_model``.
        lambd, step_size: needed with weights alone, which do not hold them and are meaningless without. Official releases
            were trained with lambd 5.0 and later 0.5, step size 0.1.
        **overrides: further fields of ``ModelConfig`` that differ from the published size.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: weights alone came without name, lambd or step_size; or a directory came with any of them; or a file is
            not what its name says.
        RuntimeError: the weights do not fit the model; unknown entries count.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.is_dir():
        if name is not None or lambd is not None or step_size is not None or overrides:
            raise ValueError(
                f"{path}: its {CONFIG_FILE} says what the model is; pass no name, lambd, step_size or overrides"
            )
        model = CrateMAE(read_config(path))
        path = path / WEIGHTS_FILE
    else:
        missing = [key for key, value in dict(name=name, lambd=lambd, step_size=step_size).items() if value is None]
        if missing:
            raise ValueError(
                f"{path}: weights alone do not say {', '.join(missing)}; name them (official: step_size=0.1), "
                f"or pass the directory of a run, whose {CONFIG_FILE} says them"
            )
        model = create_model(name, lambd=lambd, step_size=step_size, **overrides)
    weights = read_weights(path)
    _refuse_what_does_not_fit(weights, model, path)
    model.load_state_dict(weights, strict=True)
    return model


def load_weights(model: CrateMAE, path: str | Path) -> None:
    """Give a model the weights of a directory or a file, as the start of a training of its own.

    Its image size may be another, as the positions are no weights; so may lambda, the step size and the kind of target,
    which a training may change.

    Args:
        path: as for ``load_model``.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the model in the directory has other sizes, heads included; or a file is not what its name says.
        RuntimeError: the weights do not fit the model; unknown entries count.
    """
    path = Path(path)
    if path.is_dir():
        config = read_config(path)
        for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "decoder_depth", "decoder_num_heads"):
            found, wanted = getattr(config, name), getattr(model.config, name)
            if found != wanted:
                raise ValueError(f"{path}: the model there has {name} {found}, and this one {wanted}")
        path = path / WEIGHTS_FILE
    weights = read_weights(path)
    if "decoder_pos_embed" in weights:
        weights["decoder_pos_embed"] = model.decoder_pos_embed
    _refuse_what_does_not_fit(weights, model, path)
    model.load_state_dict(weights, strict=True)


def load_transform(directory: str | Path) -> Callable[[Image.Image], Tensor]:
    """What turns a photograph into a model's input, as validation does in the pre-training run that wrote ``directory``.

    Returns:
        A function of a Pillow image: upright, in the model's colours, its largest centred part resized to the model's image size,
        (pixels / 255 - mean) / std with the run's numbers; a float32 tensor [channels, height, width]. It raises a TypeError
        for anything but a Pillow image.

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
        upright = ImageOps.exif_transpose(image).convert(COLOUR_MODES[model.in_chans])
        return normalization(image_to_tensor(centre_crop(upright, model.image_shape)))

    return transform


def read_normalization(directory: str | Path) -> Normalization:
    """How the images of the model in ``directory`` were standardised; errors as of ``load_transform``."""
    file = Path(directory) / CONFIG_FILE
    channels, images = read_config(directory).in_chans, _read_json(file).get("images")
    if not isinstance(images, dict) or not {"mean", "std"} <= images.keys():
        raise ValueError(
            f"{file}: expected a section images with mean and std, as a pre-training run writes; it has none: "
            f"save_model(model, directory, mean=..., std=...) writes it, too"
        )
    if channels not in COLOUR_MODES:
        raise ValueError(f"{file}: photographs have {', '.join(map(str, COLOUR_MODES))} channels, its model {channels}")
    return Normalization(images["mean"], images["std"], channels)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a weights file; of a training checkpoint, its ``model`` or ``state_dict`` entry.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no named tensors.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    except SafetensorError as problem:
        raise ValueError(f"{path}: not a whole safetensors file ({problem})") from problem
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected tensors by name, or a checkpoint with them under model or state_dict")
    return state


def _read_checkpoint(path: Path) -> Any:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as problem:  # what is no pickle of torch's raises anything, a KeyError for one
        raise ValueError(
            f"{path}: expected a file that torch.save wrote, of tensors and plain values alone (a pickled module is not loaded; "
            f"save its state_dict())"
        ) from problem
    for entry in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(entry), dict):
            return state[entry]
    return state


def _refuse_what_does_not_fit(weights: dict[str, Tensor], model: CrateMAE, path: Path) -> None:
    """In a line, where torch has one for every entry."""
    expected = model.state_dict()
    found = {name: value for name, value in weights.items() if name not in UNUSED_OFFICIAL_ENTRIES}
    problems = []
    for what, names in (("lacks", expected.keys() - found.keys()), ("has unknown", found.keys() - expected.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            problems.append(f"{what} {min(names)}{more}")
    for name in sorted(expected.keys() & found.keys()):
        if expected[name].shape != found[name].shape:
            problems.append(f"{name} is {tuple(found[name].shape)} and not {tuple(expected[name].shape)}")
            break
    if not problems:
        return
    token, hint = found.get("cls_token"), ""
    if token is not None and token.ndim and token.shape[-1] != model.config.embed_dim:
        sizes = [name for name, config in MODELS.items() if config.embed_dim == token.shape[-1]]
        hint = f"; its tokens are {token.shape[-1]} wide{', as those of ' + sizes[0] if sizes else ''}"
    elif found and all(name.startswith("module.") for name in found):
        hint = "; it was saved from a DistributedDataParallel model: save model.module.state_dict()"
    raise RuntimeError(
        f"{path}: the weights are not this model's (width {model.config.embed_dim}): {'; '.join(problems)}{hint}"
    )


def read_config(directory: str | Path) -> ModelConfig:
    """The configuration of the model that ``save_model`` or a pre-training run wrote to ``directory``.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: it has no whole model section.
    """
    path = Path(directory) / CONFIG_FILE
    fields = _read_json(path).get("model", {})
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: model: expected a section of settings, got {fields!r}")
    missing = {"lambd", "step_size"} - fields.keys()
    if missing:
        raise ValueError(
            f"{path}: its model section lacks {', '.join(sorted(missing))}; the weights mean nothing without"
        )
    unknown = fields.keys() - {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown:
        raise ValueError(f"{path}: its model section has {', '.join(sorted(unknown))}, which no ModelConfig has")
    try:
        return ModelConfig(**fields)
    except (TypeError, ValueError) as problem:
        raise ValueError(f"{path}: model.{problem}") from problem


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; a model directory holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as problem:
        raise ValueError(f"{path}: not whole JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object with a model section, got {type(content).__name__}")
    return content


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside ``path`` and rename, so that a failure half-way leaves the old file whole, and it alone."""
    part = path.with_suffix(path.suffix + ".part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
