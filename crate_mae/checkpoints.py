"""Models on disk: ``model.safetensors`` beside ``config.json``, and official checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crate_mae.config import ModelConfig
from crate_mae.model import CrateMAE
from crate_mae.registry import create_model

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


def save_model(model: CrateMAE, directory: str | Path) -> None:
    """Write the weights and the configuration, lambda and step size included; other keys of ``config.json`` stay."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config_file = directory / CONFIG_FILE
    config = json.loads(config_file.read_text()) if config_file.exists() else {}
    config["model"] = dataclasses.asdict(model.config)
    _replace(config_file, lambda part: part.write_text(json.dumps(config, indent=2) + "\n"))
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    _replace(directory / WEIGHTS_FILE, lambda part: save_file(weights, part))


def load_model(
    path: str | Path,
    name: str | None = None,
    *,
    lambd: float | None = None,
    step_size: float | None = None,
    **overrides: Any,
) -> CrateMAE:
    """A model from a directory that ``save_model`` or a pre-training run wrote, or from an official checkpoint file.

    Args:
        path: the directory, or a ``.pth``, ``.pt`` or ``.safetensors`` file with weights alone.
        name: the published size of weights alone, as for ``create_model``.
        lambd, step_size: needed with weights alone, which do not hold them and are meaningless without. Official releases
            were trained with lambd 5.0 and later 0.5, step size 0.1.
        **overrides: further fields of ``ModelConfig`` that differ from the published size.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: weights alone came without name, lambd or step_size; or a directory came with any of them.
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
        model = CrateMAE(_read_config(path / CONFIG_FILE))
        path = path / WEIGHTS_FILE
    else:
        missing = [key for key, value in dict(name=name, lambd=lambd, step_size=step_size).items() if value is None]
        if missing:
            raise ValueError(
                f"{path}: weights alone do not say {', '.join(missing)}; name them (official: step_size=0.1), "
                f"or pass the directory of a run, whose {CONFIG_FILE} says them"
            )
        model = create_model(name, lambd=lambd, step_size=step_size, **overrides)
    model.load_state_dict(read_weights(path), strict=True)
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a weights file; of an official training checkpoint, its ``model`` entry."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("model", state)


def _read_config(path: Path) -> ModelConfig:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; a model directory holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    fields = json.loads(path.read_text()).get("model", {})
    missing = {"lambd", "step_size"} - fields.keys()
    if missing:
        raise ValueError(
            f"{path}: its model section lacks {', '.join(sorted(missing))}; the weights mean nothing without"
        )
    return ModelConfig(**fields)


def _replace(path: Path, write: Any) -> None:
    """Write beside ``path`` and rename, so that a failure half-way leaves the old file whole."""
    part = path.with_suffix(path.suffix + ".part")
    write(part)
    part.replace(path)
