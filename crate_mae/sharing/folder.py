"""A model as a folder that others can use as it is: weights, configuration, model card, curves."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from crate_mae.checkpoints import packed, unwrapped, weights_to_save, write_files
from crate_mae.data.reading import COLOUR_MODES
from crate_mae.files import remove
from crate_mae.pictures.comparison import comparison_picture
from crate_mae.sharing.card import CARD, CURVES, WRITTEN_BY, card
from crate_mae.sharing.loading import library
from crate_mae.sharing.origin import RECIPE, origin_of
from crate_mae.training.run_folder import BEST, METRICS, STATES


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    run: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    license: str = "",
    name: str | None = None,
    remark: str = "",
) -> None:
    """Write a folder that ``from_pretrained`` and ``load_model`` read; see ``Backbone.save_pretrained``.

    Args:
        model: as for ``save_model``: one in PyTorch's wrappers will do.
        remark: a paragraph for the card.
    """
    folder, plain = Path(os.path.abspath(folder)), unwrapped(model)
    if (folder.name in (BEST, STATES) and is_run_folder(folder.parent)) or is_run_folder(folder):
        raise FileExistsError(f"{folder} is the folder of a run, which its own model belongs to; name another")
    weights = weights_to_save(plain)
    origin = None if run is None else origin_of(Path(run), weights)
    other: dict[str, Any] = {}
    if origin is not None:
        other = {RECIPE: origin.recipe} if origin.recipe else {}
        classes = origin.classes if classes is None else classes
        if mean is None and std is None:
            mean, std = origin.mean, origin.std
    files = packed(plain, weights, other, mean=mean, std=std, classes=classes)
    name = name or folder.name
    has_transform = mean is not None and plain.config.in_chans in COLOUR_MODES
    text = card(plain, name, origin, has_transform=has_transform, classes=classes, remark=remark, license=license)
    files[CARD] = text.encode()
    if origin is not None and origin.comparison is not None:
        curves = io.BytesIO()
        named = tuple(dataclasses.replace(run, name=name) for run in origin.comparison.runs)
        comparison_picture(dataclasses.replace(origin.comparison, runs=named)).save(curves, format="PNG")
        files[CURVES] = curves.getvalue()
    of_another = CURVES not in files and WRITTEN_BY in _read(folder / CARD)
    write_files(folder, files)
    if of_another:
        remove(folder / CURVES)


def is_run_folder(folder: Path) -> bool:
    """Whether a run was trained in a folder."""
    return (folder / METRICS).exists() or (folder / STATES).exists()


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    commit_message: str = "Upload of a model by crate_mae",
    **saved: Any,
) -> str:
    """Put a model on the Hugging Face Hub; see ``Backbone.push_to_hub``.

    Args:
        **saved: as for ``save_pretrained``.
    """
    hub = library("to put a model on the Hugging Face Hub")
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_pretrained(model, folder, name=repo_id, **saved)
        options = dict(private=private, token=token, branch=branch, create_pr=create_pr, commit_message=commit_message)
        try:
            return str(hub.HubFolder(folder).push_to_hub(repo_id, **options))
        except Exception as error:  # those of huggingface_hub and of the library below it have no class in common
            reason = " ".join(str(error).split())
            raise OSError(
                f"{repo_id}: not put on the Hugging Face Hub ({type(error).__name__}: {reason:.300})"
            ) from error


def check_repo_id(repo_id: str) -> None:
    """Raise a ValueError for what no repository on the Hugging Face Hub can be called."""
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo_id):
        raise ValueError(f"expected the id of a repository, user/model, got {repo_id!r}")
