"""The tensors of states that several ranks write together, as a folder of `torch.distributed.checkpoint`.

A state of several ranks is the file `states/step_<n>.pt`, as one process would write it; but in place of tensors it holds the
name of such a folder and the checksums of its files. The state is written when the whole folder is on the disk. A folder that no
state names, because it is unfinished or its state was deleted, is rubbish, which `remove_rubbish` deletes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

TENSORS = ("model", "optimizer", "average")
"""The parts of a state that are dictionaries of tensors."""

FOLDER = re.compile(r"step_[0-9]+-[0-9a-f]{8}")
"""The name of a folder of tensors."""


def remove_rubbish(folder: Path, used: Iterable[str]) -> list[Path]:
    """Delete the folders of tensors that no state names; returns them."""
    folders = [path for path in folder.iterdir() if FOLDER.fullmatch(path.name)] if folder.is_dir() else []
    rubbish = [path for path in folders if path.is_dir() and path.name not in set(used)]
    for path in rubbish:
        shutil.rmtree(path, ignore_errors=True)
    return rubbish
