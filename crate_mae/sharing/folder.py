"""A model as a folder that others can use as it is: weights, configuration, model card, curves."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from crate_mae.checkpoints import packed, unwrapped, weights_to_save, write_files
from crate_mae.files import remove
from crate_mae.pictures.comparison import comparison_picture
from crate_mae.sharing.card import CARD, CURVES, card
from crate_mae.sharing.loading import library
from crate_mae.sharing.origin import RECIPE, origin_of
from crate_mae.training.run_folder import METRICS, STATES


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
    folder, plain = Path(folder), unwrapped(model)
    if (folder / METRICS).exists() or (folder / STATES).exists():
        raise FileExistsError(f"{folder} is the folder of a run, which its own model belongs to; name another")
    origin = None if run is None else origin_of(Path(run), weights_to_save(plain))
    other: dict[str, Any] = {}
    if origin is not None:
        other = {RECIPE: origin.recipe} if origin.recipe else {}
        classes = origin.classes if classes is None else classes
        if mean is None and std is None:
            mean, std = origin.mean, origin.std
    files = packed(plain, other, mean=mean, std=std, classes=classes)
    name = name or folder.absolute().name
    text = card(plain, name, origin, has_transform=mean is not None, classes=classes, remark=remark, license=license)
    files[CARD] = text.encode()
    if origin is not None and origin.comparison is not None:
        curves = io.BytesIO()
        comparison_picture(origin.comparison).save(curves, format="PNG")
        files[CURVES] = curves.getvalue()
    write_files(folder, files)
    if CURVES not in files:
        remove(folder / CURVES)  # of another model, which lay here before


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
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_pretrained(model, folder, name=repo_id, **saved)
        options = dict(private=private, token=token, branch=branch, create_pr=create_pr, commit_message=commit_message)
        return str(hub.HubFolder(folder).push_to_hub(repo_id, **options))
