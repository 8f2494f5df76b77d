"""What a run does to its files: nothing half written, and on the disk once it is said to be.

Everything that a run writes goes through here. ``replaced`` and ``write_json`` are those of ``crate_kernels.files``: a process
killed while it writes leaves the old file, and at worst an unfinished one beside it, which ``remove_unfinished`` deletes.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from crate_kernels.files import UNFINISHED, naming, replaced, sync_folder, write_all, write_json

__all__ = [
    "append",
    "make_folder",
    "remove",
    "remove_tree",
    "remove_unfinished",
    "replaced",
    "sync",
    "sync_folder",
    "write_json",
]


def append(path: Path, text: str) -> None:
    """Add text to the end of a file. Only `sync` makes sure that the disk has it.

    Raises:
        OSError: the text could not be written, or not all of it; the message names the path.
    """
    with naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            write_all(descriptor, text.encode())
        finally:
            os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until the disk has all of a file, and its entry in the folder.

    Raises:
        OSError: that failed; the message names the path.
    """
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(path.parent)


def make_folder(path: Path) -> list[Path]:
    """Make a folder and its missing parents, all on the disk; returns those that were made, parents first.

    Raises:
        OSError: one could not be made; the message names it.
    """
    made = []
    for folder in reversed([path, *path.parents]):
        if not folder.is_dir():
            with naming(folder):
                try:
                    os.mkdir(folder)
                except FileExistsError:
                    if folder.is_dir():  # another process made it meanwhile
                        continue
                    raise
                sync_folder(folder.parent)
            made.append(folder)
    return made


def remove(path: Path) -> None:
    """Delete a file, if there is one."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def remove_tree(path: Path) -> None:
    """Delete a folder with all that is in it, or a file, if there is one. Of a symbolic link, only the link is deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        remove(path)


def remove_unfinished(folder: Path) -> list[Path]:
    """Delete the unfinished files that killed processes left in a folder; returns them. Nobody else may be writing there."""
    found = sorted(folder.glob(UNFINISHED.format("*")))
    for path in found:
        remove(path)
    return found
