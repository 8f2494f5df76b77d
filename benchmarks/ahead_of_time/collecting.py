"""Finds the kernels that a case would compile and launch on an architecture, without a GPU and without compiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from benchmarks.ahead_of_time.addresses import Launch
from benchmarks.ahead_of_time.targets import TARGETS
from crate_kernels import dispatch, tiles


@dataclass(frozen=True)
class Case:
    """One use of an operator: ``call`` calls it, and its backward, on meta tensors.

    slow: why its kernels need not reach the tensor cores' rate, where they need not.
    """

    operator: str
    dtype: str
    shape: str
    call: Callable[[], object]
    slow: str = ""


@dataclass(frozen=True)
class Request:
    """One kernel that a case would have compiled: ``specialization`` is Triton's own record of signature and options."""

    module: str
    kernel: str
    arch: str
    specialization: str


def requests(case: Case, arch: str) -> list[tuple[Request, Launch]]:
    """The kernels that ``case`` would compile on ``arch``, each with its launch, in launch order."""
    found, launches = [], []
    run = triton.JITFunction.run

    def note(function: Any, *args: Any, grid: Any, **options: Any) -> Any:
        values = dict(zip(function.arg_names, args, strict=False)) | options
        integers = {name: int(values[name]) for name in function.arg_names if isinstance(values.get(name), int)}
        launches.append(Launch(tuple(grid(values) if callable(grid) else grid), tuple(integers.items())))
        return run(function, *args, grid=grid, **options)

    def take(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        request = Request(fn.module, fn.jit_function.fn.__name__, arch, compile["specialization_data"])
        found.append((request, launches[-1]))
        return True  # tells Triton to neither compile nor launch

    with as_if_on(arch), _arithmetic_of(case.dtype), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = take
        with _replaced(triton.JITFunction, "run", note):
            case.call()
    return found


@contextmanager
def as_if_on(arch: str) -> Iterator[None]:
    """Operators take the Triton path with the tiles of ``arch``, and Triton believes that it is there."""
    triton.runtime.driver.set_active(_PretendedDriver(arch))
    with tiles.pretend(arch), _replaced(dispatch, "choose", lambda *_: "triton"):
        yield


class _PretendedDriver:
    """The part of a Triton driver that choosing a target takes. Its device index is the architecture's name, because Triton
    keeps a compilation cache for each device index, and a cache serves one target."""

    def __init__(self, arch: str) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._arch].gpu

    def get_current_device(self) -> str:
        return self._arch

    def get_current_stream(self, device: str | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def _arithmetic_of(dtype: str) -> Iterator[None]:
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        with _RealOperators(autocast=dtype == "autocast"):
            yield
    finally:
        torch.set_float32_matmul_precision(previous)


class _RealOperators(TorchDispatchMode):
    """Runs our operators themselves on meta tensors, where PyTorch would run their fakes, which launch nothing.

    There is no autocast of meta tensors. What it changes is the argument ``dtype`` of operators, which is set here.
    """

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self._autocast = autocast

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace != "crate_kernels":
            return func(*args, **(kwargs or {}))
        if self._autocast:
            names = [argument.name for argument in func._schema.arguments]
            args = tuple(torch.bfloat16 if name == "dtype" else value for name, value in zip(names, args, strict=False))
        return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    previous = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, previous)
