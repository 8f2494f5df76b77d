"""One function of each image of a source, computed by several processes, with the results in the order of the images."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from crate_mae.data.loader import STOPPING, LostWorkers
from crate_mae.data.source import Source

_Result = TypeVar("_Result")

_AT_ONCE = 8
"""Images that a process gets at once."""

_AHEAD = 3
"""How many times `_AT_ONCE` results of each process may wait for their turn, which bounds the memory."""


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each_image(
    work: Callable[[Source, int], _Result],
    source: Source,
    *,
    first: int = 0,
    workers: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generator[_Result]:
    """The results of `work(source, index)` for each index from `first` on, in this order.

    Closing the iterator, or an error, ends the processes.

    Args:
        work: a function of a module, or a `functools.partial` of one; what it raises is raised here.
        workers: processes; with 0 this one does all.
        should_stop: asked before each result.

    Raises:
        Stopped: it should.
        LostWorkers: a process died, as of too little memory.
    """
    if not workers:
        for index in range(first, len(source)):
            stop_if(should_stop)
            yield work(source, index)
        return
    others = set(multiprocessing.active_children())
    # Forked processes share the source's index; without fork each process gets a copy.
    how = "fork" if sys.platform == "linux" else None
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context(how), initializer=_begin, initargs=(work, source)
    )
    finished = False
    pending: deque[Future[list[_Result]]] = deque()
    starts = iter(range(first, len(source), _AT_ONCE))
    try:
        while True:
            while len(pending) < workers * _AHEAD and (start := next(starts, None)) is not None:
                pending.append(pool.submit(_some, start, min(start + _AT_ONCE, len(source))))
            if not pending:
                finished = True
                return
            for result in pending.popleft().result():
                stop_if(should_stop)
                yield result
    except BrokenProcessPool:
        raise LostWorkers(
            "a process that reads images was lost; fewer --workers need less memory, and 0 reads in the command's own"
        ) from None
    finally:
        if not finished:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
        pool.shutdown(wait=True)  # for its own thread, too, which would meet the interpreter's end


class Stopped(Exception):
    """Work ended before its end, as it was asked to."""


_own: tuple[Callable[[Source, int], Any], Source]


def stop_if(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Stopped("stopped")


def _begin(work: Callable[[Source, int], Any], source: Source) -> None:
    global _own
    _own = work, source
    for number in STOPPING:  # which terminals send to all; the main process decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the main process is killed: a fork keeps open the pipe that would otherwise tell."""
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
        os._exit(1)


def _some(start: int, end: int) -> list[Any]:
    work, source = _own
    return [work(source, index) for index in range(start, end)]
