"""Ending a run between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from crate_mae.data import STOPPING

SAID = (
    b"\nstopping after this step and saving; a second Ctrl-C, or signal, ends it now and keeps what was saved before\n"
)

ONE_REQUEST, ONE_REQUEST_OF_RANKS = 0.3, 10.0
"""Signals within so many seconds count as one: `timeout` and closing terminals send theirs twice, and torchrun passes signals on
to processes that may have received them already."""


class RunStopped(Exception):
    """The run was interrupted by signal number `signal`, and its state has been saved."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal

    def __reduce__(self) -> tuple[type[RunStopped], tuple[str, int]]:  # so that it can be sent to the other ranks
        return type(self), (str(self), self.signal)


class EndedAtOnce(KeyboardInterrupt):
    """A second signal came, number `signal`."""

    def __init__(self, signal: int) -> None:
        super().__init__()
        self.signal = signal


class StopRequest:
    """Whether the run was asked to end.

    Attributes:
        signal: the number of the signal that asked first; None as long as none has.
    """

    def __init__(self, said: bytes = SAID, one_request: float | None = None) -> None:
        self.signal: int | None = None
        self._said, self._one_request = said, ONE_REQUEST if one_request is None else one_request
        self._warned = False
        self._at = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    def stopped(self, message: str) -> RunStopped:
        """What to raise when the run has ended because it was asked to."""
        assert self.signal is not None
        return RunStopped(message, self.signal)

    def take(self, number: int, frame: object = None) -> None:
        """The signal handler. Slurm sends SIGUSR1 as a warning before SIGTERM: after it, the next signal counts as the first.

        Raises:
            EndedAtOnce: it is the second signal.
        """
        now, is_warning = time.monotonic(), number == getattr(signal, "SIGUSR1", None)
        first = not self
        if not first and not self._warned and not is_warning and now - self._at > self._one_request:
            raise EndedAtOnce(number)
        if first or (self._warned and not is_warning):
            self.signal = self.signal or number
            self._at, self._warned = now, is_warning
        if first:
            with suppress(OSError):  # after SIGHUP the terminal may be gone
                os.write(2, self._said)  # print could be interrupted by this very signal


@contextmanager
def stop_requests(said: bytes = SAID, one_request: float | None = None) -> Iterator[StopRequest]:
    """While the block lasts, SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 set a request to stop; a second one ends the process.

    Signals that are ignored stay ignored, as SIGHUP under nohup and SIGINT in processes that shells start in the background.

    Args:
        said: written to stderr when the first one comes.
        one_request: signals within so many seconds count as one.
    """
    stop = StopRequest(said, one_request)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop.take) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
