"""Finds the kernels that a case would compile and launch on an architecture, without a GPU and without compiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.ahead_of_time.addresses import Launch
from benchmarks.ahead_of_time.targets import TARGETS
from crate_kernels import dispatch, tiles
from crate_kernels.tiles.compiling import Request, StandIn, asked


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


def requests(case: Case, arch: str) -> list[tuple[Request, Launch]]:
    """The kernels that ``case`` would compile on ``arch``, each with its launch, in launch order."""
    launches: list[Launch] = []
    run = triton.JITFunction.run

    def note(function: Any, *args: Any, grid: Any, **options: Any) -> Any:
        values = dict(zip(function.arg_names, args, strict=False)) | options
        integers = {name: int(values[name]) for name in function.arg_names if isinstance(values.get(name), int)}
        launch = Launch(tuple(grid(values) if callable(grid) else grid), tuple(integers.items()))
        before, result = len(found), run(function, *args, grid=grid, **options)
        launches.extend([launch] * (len(found) - before))
        return result

    with as_if_on(arch, case.dtype), asked() as found:
        with patch.object(triton.JITFunction, "run", note):
            case.call()
    return list(zip(found, launches, strict=True))


@contextmanager
def as_if_on(arch: str, dtype: str) -> Iterator[None]:
    """Operators take the Triton path with the tiles of ``arch`` and the arithmetic of ``dtype``, and Triton believes that it is
    there."""
    triton.runtime.driver.set_active(StandIn(TARGETS[arch].gpu))
    operators, precision = _RealOperators(autocast=dtype == "autocast"), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        with tiles.pretend(arch), patch.object(dispatch, "choose", lambda *_: "triton"), operators:
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class _RealOperators(TorchDispatchMode):
    """Runs our operators themselves on meta tensors, where PyTorch would run their fakes, which launch nothing. Of fake tensors,
    as whole models have them, the operators get meta tensors that lie in memory alike, and the model gets what the fakes say.

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
        run = partial(func._op_dk, torch._C.DispatchKey.CompositeExplicitAutograd)
        if not any(isinstance(value, FakeTensor) for value in tree_leaves(args)):
            return run(*args, **(kwargs or {}))
        with unset_fake_temporarily():
            run(*tree_map_only(FakeTensor, _on_meta, args), **tree_map_only(FakeTensor, _on_meta, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _on_meta(fake: FakeTensor) -> Tensor:
    if fake.ndim == 0 and fake.device.type == "cpu":  # a number from the host, which kernels take by its value
        return torch.ones((), dtype=fake.dtype)
    # As far from the start of its memory, too: Triton asks whether addresses are multiples of 16.
    memory = torch.empty(fake.untyped_storage().nbytes() // fake.itemsize, dtype=fake.dtype, device="meta")
    return memory.as_strided(fake.shape, fake.stride(), fake.storage_offset())
