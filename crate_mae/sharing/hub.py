"""The Hugging Face Hub: uploads and downloads by huggingface_hub's model mixin."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download

from crate_mae.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from crate_mae.sharing.card import CARD, CURVES

FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD, CURVES)


class HubFolder(ModelHubMixin):
    """The folder of a model, which the mixin uploads and downloads.

    The models themselves do not inherit from the mixin: they are the same whether huggingface_hub is installed or not. The
    folder is complete before its upload begins.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _save_pretrained(self, save_directory: Path) -> None:
        for name in FILES:
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, save_directory / name)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubFolder:
        known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        chosen = {name: options[name] for name in known}  # the mixin adds the entries of config.json
        return cls(Path(snapshot_download(model_id, allow_patterns=list(FILES), **chosen)))
