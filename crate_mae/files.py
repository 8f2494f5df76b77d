"""Files that are either old or new, never half written, and on the disk when they are said to be.

Everything that a run writes goes through here: each file is written beside its place, synced, and put in its place, and so is the
folder's entry for it. A process killed anywhere in between leaves the old file, and at worst the unfinished one beside it, which
`remove_unfinished` finds; so does a machine that loses its power.
"""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_UNFINISHED = ".{}.partial"


class _Output(io.RawIOBase):
    """A new file whose first error is kept, since the libraries that write to it raise errors of their own in its place; so is an
    interruption, which comes where signals find the process: mostly here."""

    def __init__(self, path: Path) -> None:
        self.error: BaseException | None = None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._descriptor, offset, whence)

    def write(self, data: Any) -> int:
        try:
            return _write_all(self._descriptor, data)
        except BaseException as error:
            self.error = self.error or error
            raise

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


@contextmanager
def replaced(*paths: Path, alone: bool = True) -> Iterator[Any]:
    """A binary file to write to for each path (of one path, the file itself), which takes that place when the block ends.

    All are whole and synced before the first takes its place; an error leaves what was there.

    Args:
        paths: of the files.
        alone: nobody else writes them at the same time. Otherwise the unfinished files have names of their own, and a writer that
            is killed leaves one that the next does not take up.

    Raises:
        OSError: one could not be written; it names the path and says why, whatever the block made of that.
    """
    own = "" if alone else f".{secrets.token_hex(4)}"
    unfinished = {path: path.with_name(_UNFINISHED.format(path.name + own)) for path in paths}
    files: dict[Path, _Output] = {}
    try:
        for path, temporary in unfinished.items():
            with _naming(path):
                files[path] = _Output(temporary)
        try:
            yield tuple(files.values()) if len(paths) > 1 else files[paths[0]]
        except Exception as error:
            for path, file in files.items():
                if file.error:
                    raise (_named(file.error, path) if isinstance(file.error, OSError) else file.error) from error
            raise
        for path, file in files.items():
            with _naming(path):
                os.fsync(file.fileno())
                file.close()
        for path, temporary in unfinished.items():
            with _naming(path):
                os.replace(temporary, path)
        for folder in dict.fromkeys(path.parent for path in paths):
            with _naming(folder):
                sync_folder(folder)
    finally:
        for file in files.values():
            with suppress(OSError):
                file.close()
        for temporary in unfinished.values():
            with suppress(OSError):
                os.unlink(temporary)


def write_json(path: Path, value: Any) -> None:
    with replaced(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def append(path: Path, text: str) -> None:
    """Add text to the end of a file. It need not be on the disk before `sync`.

    Raises:
        OSError: it could not be written, or not all of it; it names the path.
    """
    with _naming(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _write_all(descriptor, text.encode())
        finally:
            os.close(descriptor)


def sync(path: Path) -> None:
    """Wait until all of a file is on the disk, and that it is there.

    Raises:
        OSError: that cannot be; it names the path.
    """
    with _naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until what was created, renamed and removed in a folder is on the disk, where the file system can say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> list[Path]:
    """Make the folder and those above it; returns those that were not there."""
    made = []
    for folder in reversed([path, *path.parents]):
        if not folder.is_dir():
            with _naming(folder):
                try:
                    os.mkdir(folder)
                except FileExistsError:
                    if folder.is_dir():  # others made it meanwhile
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
    """Delete a folder with all that is in it, or a file, if there is one; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        remove(path)


def remove_unfinished(folder: Path) -> list[Path]:
    """Delete what a process killed while it wrote left in a folder; returns it. Nobody else may be writing there."""
    found = sorted(folder.glob(_UNFINISHED.format("*")))
    for path in found:
        remove(path)
    return found


def _write_all(descriptor: int, data: Any) -> int:
    left = memoryview(data).cast("B")
    size = len(left)
    while left:
        left = left[os.write(descriptor, left) :]
    return size


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _named(error, path) from error


def _named(error: OSError, path: Path) -> OSError:
    """The error in words that say of which path it is; with its number, and without the number in its words."""
    named = type(error)(f"cannot write {path}: {error.strerror or error}")
    named.errno = error.errno
    return named
