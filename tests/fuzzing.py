"""How files are spoilt at random."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# CRATE_MAE_FUZZ=2000 for more than `make test` takes the time for. Where there is a folder to write to, one serves all examples.
fuzzed = settings(
    max_examples=int(os.environ.get("CRATE_MAE_FUZZ", "60")),
    deadline=None,
    derandomize="CRATE_MAE_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


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
