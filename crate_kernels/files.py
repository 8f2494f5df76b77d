"""Writing files so that a reader finds the old content or the new one, never half of it.

``replaced`` writes a new file beside the old one, waits until the disk has it, renames it over the old one, and waits until the
disk has the folder's new entry, too. A process that is killed on the way leaves the old file, and at worst the unfinished new
one beside it; so does a machine that loses its power.
"""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

UNFINISHED = ".{}.partial"
"""The name of a file while it is written, by the name it is to have."""


class _Output(io.RawIOBase):
    """A new file that remembers the first error of its writes.

    A library that writes to the file may raise an error of its own instead. ``error`` is the true one: of the disk, or an
    interruption by a signal, which mostly arrives during a write.
    """

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
            return write_all(self._descriptor, data)
        except BaseException as error:
            self.error = self.error or error
            raise

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


@contextmanager
def replaced(*paths: Path, alone: bool = True) -> Iterator[Any]:
    """Yields a binary file to write to for each path (of one path, the file itself), which takes its place when the block ends.

    All new files are complete and on the disk before the first takes its place. An error leaves what was there.

    Args:
        paths: the files to write.
        alone: whether no other process writes them at the same time. If False, the unfinished files get unique names; then the
            next writer does not overwrite what a killed one left.

    Raises:
        OSError: a file could not be written. The message names the path and the reason, whatever error the block raised.
    """
    unique = "" if alone else f".{secrets.token_hex(4)}"
    unfinished = {path: path.with_name(UNFINISHED.format(path.name + unique)) for path in paths}
    files: dict[Path, _Output] = {}
    try:
        for path, temporary in unfinished.items():
            with naming(path):
                files[path] = _Output(temporary)
        try:
            yield tuple(files.values()) if len(paths) > 1 else files[paths[0]]
        except Exception as error:
            for path, file in files.items():
                if file.error:
                    raise (_named(file.error, path) if isinstance(file.error, OSError) else file.error) from error
            raise
        for path, file in files.items():
            with naming(path):
                os.fsync(file.fileno())
                file.close()
        for path, temporary in unfinished.items():
            with naming(path):
                os.replace(temporary, path)
        for folder in dict.fromkeys(path.parent for path in paths):
            with naming(folder):
                sync_folder(folder)
    finally:
        for file in files.values():
            with suppress(OSError):
                file.close()
        for temporary in unfinished.values():
            with suppress(OSError):
                os.unlink(temporary)


def write_json(path: Path, value: Any, alone: bool = True) -> None:
    """Write a value as indented JSON, by ``replaced``.

    Raises:
        OSError: the file could not be written; the message names it.
        TypeError, ValueError: the value is not of JSON.
    """
    content = (json.dumps(value, indent=2) + "\n").encode()
    with replaced(path, alone=alone) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has what was created, renamed and removed in a folder, where the file system supports that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: Any) -> int:
    """Write all of the bytes, where ``os.write`` may take only some of them. Returns how many there were."""
    left = memoryview(data).cast("B")
    size = len(left)
    while left:
        left = left[os.write(descriptor, left) :]
    return size


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an ``OSError`` of the block say that ``path`` could not be written, and why."""
    try:
        yield
    except OSError as error:
        raise _named(error, path) from error


def _named(error: OSError, path: Path) -> OSError:
    """An error of the same type and ``errno`` whose message names the path. Without the number that Python puts in front."""
    named = type(error)(f"cannot write {path}: {error.strerror or error}")
    named.errno = error.errno
    return named
