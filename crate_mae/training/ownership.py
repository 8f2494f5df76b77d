"""A lock on the folder of a run, so that no two runs write to it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from crate_mae.files import make_folder, sync_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # the file is overwritten, so no link is followed to another one

_held: set[int] = set()


@contextlib.contextmanager
def owned(folder: Path, option: str = "--out") -> Iterator[None]:
    """Lock a folder while the block lasts. It is made if need be, and removed afterwards if it is empty.

    The lock is an advisory one of the system (flock) on a file that names its owner; the system releases it when the process
    ends, in whatever way. On file systems without such locks the file itself is the lock; it is stale if its owner was a process
    of this host that is gone.

    Args:
        folder: to lock.
        option: what messages call the folder.

    Raises:
        BlockingIOError: another process, or another run in this one, has the lock; the message says which.
        OSError: the folder cannot be made.
    """
    try:
        made = make_folder(folder)
        if not made:  # a run that was killed may have made it, without its entry reaching the disk
            with contextlib.suppress(PermissionError):
                sync_folder(folder.parent)
    except OSError as error:
        raise type(error)(f"{option} {folder}: {error}") from error
    path = folder / LOCK
    descriptor = _take(path, f"{option} {folder}")
    _held.add(descriptor)
    try:
        with contextlib.suppress(OSError):  # on a full disk the file names nobody, and the lock holds all the same
            os.ftruncate(descriptor, 0)
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            os.pwrite(descriptor, json.dumps({"host": _host(), "pid": os.getpid(), "since": since}).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # while we still hold the lock, so that the file is ours
        _held.discard(descriptor)
        os.close(descriptor)
        for empty in reversed(made):
            with contextlib.suppress(OSError):
                os.rmdir(empty)


def _take(path: Path, named: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        try:
            if remedy := _is_held(descriptor):
                holder = _named(_holder(descriptor))
                raise BlockingIOError(f"{named}: {holder} writes to it; {remedy}, or name another folder")
            with contextlib.suppress(FileNotFoundError):  # its owner removed it between our open and lock
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_held(descriptor: int) -> str:
    """What to do about another owner of the lock, in words; empty if this process has it now."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
    except BlockingIOError:
        return "wait for its end"
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
    holder = _holder(descriptor)
    if not holder or (holder.get("host") == _host() and not _is_alive(holder.get("pid"))):
        return ""
    return f"wait for its end (if it was killed, delete {LOCK} there: this file system has no locks that end by themselves)"


def _holder(descriptor: int) -> dict[str, Any]:
    """The owner that the file names; empty if it names none."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "another run"
    return f"a run since {holder.get('since')}, process {holder.get('pid')} on {holder.get('host')},"


def _is_alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    if pid == os.getpid():  # in a container, this process may have the number of a former owner
        return bool(_held)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, TypeError, OverflowError):
        return False
    except PermissionError:  # it is alive, and another user's
        return True
    return True


def _host() -> str:
    return socket.gethostname()


def _give_up_in_child() -> None:
    # A forked process, such as a loader, would otherwise keep the lock when the run is killed.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_give_up_in_child)
