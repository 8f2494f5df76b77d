"""How files are spoilt at random, and what every reader of files must do with them."""

from __future__ import annotations

import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# CRATE_MAE_FUZZ=2000 for more than `make test` takes the time for. Where there is a folder to write to, one serves all examples.
fuzzed = settings(
    max_examples=int(os.environ.get("CRATE_MAE_FUZZ", "60")),
    deadline=None,
    derandomize="CRATE_MAE_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


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


@st.composite
def spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """The content after one to four edits, as often within its first and last 3,000 bytes, where formats have their tables."""
    for _ in range(draw(st.integers(1, 4))):
        size = len(content)
        if not size:
            break
        near = min(size, 3000)
        places = st.integers(0, size - 1) | st.integers(0, near - 1) | st.integers(size - near, size - 1)
        place = draw(places)
        end = min(size, place + draw(st.integers(1, 8) | st.integers(1, 1000)))
        edit = draw(st.sampled_from(["flip", "cut", "insert", "delete", "zero", "splice", "swap"]))
        head, middle, tail = content[:place], content[place:end], content[end:]
        if edit == "flip":
            tail, middle = middle[1:] + tail, bytes([middle[0] ^ 1 << draw(st.integers(0, 7))])
        elif edit == "cut":
            middle = tail = b""
        elif edit == "insert":
            middle = draw(st.binary(min_size=1, max_size=64)) + middle
        elif edit == "delete":
            middle = b""
        elif edit == "zero":
            middle = bytes(len(middle))
        elif edit == "splice":
            other = draw(places)
            middle = content[other : other + len(middle)]
        elif edit == "swap":
            middle, tail = tail[: len(middle)], middle + tail[len(middle) :]
        content = head + middle + tail
    return content
