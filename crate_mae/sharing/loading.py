"""Models by the name of a folder, or of a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from crate_mae.backbone import Backbone
from crate_mae.checkpoints import CONFIG_FILE, load_model
from crate_mae.data.source import MissingLibrary

Model = TypeVar("Model", bound=Backbone)


def from_pretrained(name: str | Path, kind: type[Model], **options: Any) -> Model:
    """The model in a folder or a repository, on the CPU and in evaluation mode; see ``Backbone.from_pretrained``.

    Args:
        kind: the class that the model must have.
        **options: as for ``download``.
    """
    folder = download(name, **options)
    model = load_model(folder).eval()
    if not isinstance(model, kind):
        raise TypeError(
            f"{name}: expected a {kind.__name__}, found a {type(model).__name__}; {type(model).__name__}.from_pretrained loads it"
        )
    return model


def download(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder with the files of a model, for ``load_model`` and ``load_transform``: its own, or one in the hub's cache.

    Args:
        name: a folder, which is returned as it is, or else the id of a repository on the Hugging Face Hub, "user/model".
        revision: branch, tag or commit; "main" where none is given.
        token, cache_dir, force_download, local_files_only: as of ``huggingface_hub.snapshot_download``.

    Raises:
        FileNotFoundError: there is no such folder, and no such repository, or it cannot be reached and is not in the cache.
        ValueError: there is a repository of this name, and none of a model.
        MissingLibrary: an ImportError: there is no such folder, and huggingface_hub is not installed.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"name: expected a folder or the id of a model, got {name!r}")
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise FileNotFoundError(
            f"{name}: expected a folder, or the id of a model on the Hugging Face Hub, found a file; load_model reads files"
        )
    hub = library(f"{name}: there is no such folder, and to look on the Hugging Face Hub")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    options = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    try:
        return hub.HubFolder.from_pretrained(str(name), force_download=force_download, **options).folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{name}: there is no such folder, and nothing by this name came from the Hugging Face Hub ({reason:.300})"
        ) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # what the mixin makes of a config.json
        raise ValueError(f"{name}: its {CONFIG_FILE} on the Hugging Face Hub is none ({error})") from error


def library(what: str) -> ModuleType:
    """``crate_mae.sharing.hub``, which needs huggingface_hub.

    Args:
        what: needs it, for the message.

    Raises:
        MissingLibrary: it is not installed.
    """
    try:
        from crate_mae.sharing import hub
    except ModuleNotFoundError as error:
        raise MissingLibrary(f"{what} needs a library ({error}): pip install 'crate-kernels[hub]'") from error
    return hub
