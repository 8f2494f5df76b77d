"""The resumable state of a run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from crate_mae.files import replaced


def save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, epoch: int, images: str
) -> None:
    """Write everything that the steps after `step` depend on.

    The order and the crops of the images are functions of the seed and the step, so `images`, the fingerprint of the
    set, is all that has to be kept of them.
    """
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "epoch": epoch,
        "images": images,
        "random": _random_state(),
    }
    with replaced(path) as file:
        torch.save(state, file)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, images: str) -> int:
    """Restore what `save_state` wrote, random number generators included; returns the number of steps taken.

    Raises:
        ValueError: the file is unreadable, or belongs to another set of training images.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if state["images"] != images:
        raise ValueError(
            f"{path} was trained on other images: files were added, removed or renamed since; put them back"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    _restore_random_state(state["random"])
    return state["step"]


def _random_state() -> dict[str, Any]:
    algorithm, keys, position, has_gauss, cached_gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        # As plain numbers, so that the file loads with weights_only=True.
        "numpy": (algorithm, keys.tolist(), position, has_gauss, cached_gauss),
        "python": random.getstate(),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])
