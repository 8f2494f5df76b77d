"""A watch over every address that a kernel touches in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from quick_interpreter import quicken
from torch import Tensor


class OutOfBounds(Exception):
    """A kernel touched memory that is not between the first and the last element of one of its tensors."""


_behind_addresses: list[Tensor] = []


@contextmanager
def reachable(*tensors: Tensor) -> Iterator[None]:
    """Tensors that a kernel finds through a table of addresses: it may touch them as it may its arguments."""
    _behind_addresses.extend(tensors)
    try:
        yield
    finally:
        _behind_addresses.clear()


class Watch:
    """Checks each load and store against the tensors of the launch, before it happens; its mask is taken into account."""

    def __init__(self) -> None:
        self._bounds = np.empty((0, 2), np.uint64)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import interpreter_builder

        quicken()
        # Whether 32-bit arithmetic overflows is asked at every sum, and for a sixth of the time; other tests see to that.
        options = replace(interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter_builder, "options", options)
        for name, mask_at in (("create_masked_load", 1), ("create_masked_store", 2)):
            monkeypatch.setattr(interpreter_builder, name, self._checked(getattr(interpreter_builder, name), mask_at))

    def over(self, monkeypatch: pytest.MonkeyPatch, *kernels: Any) -> None:
        """Watch all launches of them; what is no kernel is passed over."""
        for kernel in kernels:
            if hasattr(kernel, "pre_run_hooks"):
                monkeypatch.setattr(kernel, "pre_run_hooks", [self._launched])

    def _launched(self, *args: Any, **kwargs: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values(), *_behind_addresses) if isinstance(value, Tensor)]
        self._bounds = np.array(sorted(_extent(tensor) for tensor in tensors), np.uint64)

    def _checked(self, access: Any, mask_at: int) -> Any:
        def checked(pointers: Any, *rest: Any, **more: Any) -> Any:
            # The mask of a descriptor's load is an array itself.
            given = [one if isinstance(one, np.ndarray) else one.data for one in rest[:mask_at] if one is not None]
            if any(np.shape(one) != pointers.data.shape for one in given):  # the interpreter would read past its end
                raise OutOfBounds
            addresses = pointers.data[given[-1].astype(bool)]
            place = np.searchsorted(self._bounds[:, 0], addresses, side="right") - 1
            if (place < 0).any() or (addresses >= self._bounds[place, 1]).any():
                raise OutOfBounds
            return access(pointers, *rest, **more)

        return checked


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor, and the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def amid_nan(values: Tensor) -> Tensor:
    """The same values with NaN between and around them: no two elements are neighbours, and no stride follows from the shape."""
    sizes = [size + 1 for size in values.shape[:-1]]
    storage = torch.full((*sizes, 2 * values.shape[-1] + 3), torch.nan, dtype=values.dtype)
    view = storage[tuple(slice(size) for size in values.shape[:-1])][..., 1 : 1 + 2 * values.shape[-1] : 2]
    view.copy_(values)
    return view


def rows_amid_nan(values: Tensor) -> Tensor:
    """The same matrix with NaN between its rows, which are contiguous and begin at multiples of 16 bytes, as descriptors want."""
    unit = 16 // values.itemsize
    storage = torch.full((len(values) + 1, (values.shape[1] // unit + 3) * unit), torch.nan, dtype=values.dtype)
    view = storage[:-1, unit : unit + values.shape[1]]
    view.copy_(values)
    return view
