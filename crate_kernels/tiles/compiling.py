"""Kernels compiled before they are launched, in other processes, into Triton's cache on disk: the launch then only loads them.

``asked`` notes what launches would compile, in Triton's own record of signature, alignment, constants and options, of which the
cache's key is made. ``Compilers`` compile it. Neither takes a GPU.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed, wait
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

COMPILED, CACHED = "compiled", "cached"


class Request(NamedTuple):
    """A kernel to be compiled: the module that defines it, its name there, the target, and Triton's record of the rest."""

    module: str
    kernel: str
    target: GPUTarget
    specialization: str


@contextmanager
def asked() -> Iterator[list[Request]]:
    """A list of the kernels that launches in the block would compile. They are neither compiled nor launched."""
    found: list[Request] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        target = triton.runtime.driver.active.get_current_target()
        found.append(Request(fn.module, fn.jit_function.fn.__name__, target, compile["specialization_data"]))
        return True  # tells Triton to do nothing

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = note
        yield found


class StandIn:
    """What Triton asks of a driver in order to compile for ``target``. It is also its own device index, because Triton keeps the
    kernels of each index apart, and they serve one target."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> GPUTarget:
        return self._target

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def jit_function(kernel: Any) -> Any:
    """The ``triton.JITFunction`` under autotuners and heuristics."""
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    return kernel


def compile(request: Request) -> tuple[Any, bool]:
    """The ``triton.compiler.CompiledKernel``, and whether it was in the cache. From now on this process cannot launch kernels."""
    triton.runtime.driver.set_active(StandIn(request.target))
    hits: list[bool] = []
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        kernel = jit_function(getattr(importlib.import_module(request.module), request.kernel))
        compiled = kernel.preload(request.specialization)
    if request.target.backend == "cuda":
        _build_launcher(compiled)
    return compiled, hits[-1]


def _build_launcher(compiled: Any) -> None:
    """Up to Triton 3.6 a launch also compiles a function in C for its signature, which the cache keeps as well."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return
    try:
        driver.libcuda_dirs()
    except (AssertionError, OSError):  # without NVIDIA's driver, as where nothing will be launched
        return
    driver.CudaLauncher(compiled.src, compiled.metadata)


def _outcome(request: Request) -> str:
    try:
        return CACHED if compile(request)[1] else COMPILED
    except Exception as error:  # in words: it would lose its cause on the way between processes
        return brief(error)


def brief(error: BaseException) -> str:
    """The first cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {getattr(error, 'error_message', None) or error}".split())[:300]


class Compilers:
    """Processes that compile, and give way to this one. Each kernel is compiled once, however often it is asked for."""

    def __init__(self, jobs: int) -> None:
        # Spawned, not forked: torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=os.nice, initargs=(5,))
        self._tasks: dict[Request, Future[str]] = {}

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        return len(self._tasks)

    def ask(self, requests: Iterable[Request]) -> None:
        """Have them compiled; returns at once."""
        for request in requests:
            if request not in self._tasks:
                try:
                    self._tasks[request] = self._pool.submit(_outcome, request)
                except BrokenExecutor as error:
                    self._tasks[request] = Future()
                    self._tasks[request].set_exception(error)

    def outcomes(self) -> Iterator[tuple[Request, str]]:
        """All that were asked for, as they are done, and how: ``COMPILED``, ``CACHED``, or why they were not."""
        requests = {task: request for request, task in self._tasks.items()}
        for task in as_completed(requests):
            yield requests[task], self._result(task)

    def failures(self, requests: Iterable[Request], seconds: float) -> list[str] | None:
        """Waits for these, at most so long. Why some were not compiled, a line each; None where the time was too short."""
        self.ask(requests := list(dict.fromkeys(requests)))
        done, late = wait([self._tasks[one] for one in requests], max(0.0, seconds))
        return None if late else [found for task in done if (found := self._result(task)) not in (COMPILED, CACHED)]

    def _result(self, task: Future[str]) -> str:
        try:
            return task.result()
        except BrokenExecutor:
            return "a compiler's process died: of this kernel, or of another one beside it"
