"""What every reader of a file that may be anything must do."""

from __future__ import annotations

import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def no_hang(seconds: int = 10) -> Iterator[None]:
    """Fails what takes longer. An exception that readers do not catch, as they catch what comes of a file."""

    def fail(*_: object) -> None:
        pytest.fail(f"took longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def read_or_told(read: Callable[[], Any], path: Path, errors: tuple[type[Exception], ...]) -> Any:
    """What ``read`` makes of the file, or None where it raises one of ``errors``: one printable line with the file's name. Within
    ten seconds, and less than a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with no_hang(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read()
    except errors as error:
        message = str(error)
        assert message.isprintable() and str(path) in message and len(message) < 1000, message
        return None
    finally:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
