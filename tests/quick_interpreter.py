"""Triton's interpreter without the work that it repeats: a third of the time, and the same bits.

Of a launch's time, half goes into replacing all of ``triton.language`` by NumPy's counterpart, anew at each call of a device
function; and a good part of the rest into what follows from a dtype and a shape alone, computed anew for each value. Here each is
done once. What is computed, and every check, stays Triton's own.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_as_released: list[tuple[Any, str, Any]] = []  # (object, attribute, Triton's own)


class _KeptScope:
    """What replacing the language returns, to undo it after the launch: it is kept for the next."""

    def restore(self) -> None:
        pass


def quicken() -> None:
    """Replace what repeats its work; more often than once changes nothing, and where there is no interpreter neither."""
    if _as_released or os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import numpy as np
    from triton.language import core
    from triton.runtime import interpreter

    if not {"_patch_lang", "_get_np_dtype"} <= vars(interpreter).keys():  # another Triton's: slower, and as right
        return
    replace_language, numpy_dtype = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)
    make_block_type = core.block_type.__init__
    replaced: set[str] = set()  # modules for whose kernels the language has been replaced
    of_addresses = np.dtype(np.uint64)
    of_blocks: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def replace_language_once(function: Any) -> _KeptScope:
        if function.__module__ not in replaced:
            replace_language(function)
            replaced.add(function.__module__)
        return _KeptScope()

    def known_numpy_dtype(dtype: Any) -> Any:
        element = dtype.scalar
        return of_addresses if isinstance(element, core.pointer_type) else numpy_dtype(element)

    def known_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape))
        if key not in of_blocks:
            make_block_type(self, element_ty, shape)
            of_blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = of_blocks[key]

    @functools.cache
    def shape_and_size(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def known_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_and_size(tuple(type.shape) if type.is_block() else ())

    for owner, name, quick in (
        (interpreter, "_patch_lang", replace_language_once),
        (interpreter, "_get_np_dtype", known_numpy_dtype),
        (core.block_type, "__init__", known_block_type),
        (core.tensor, "__init__", known_tensor),
    ):
        _as_released.append((owner, name, getattr(owner, name)))
        setattr(owner, name, quick)


@contextmanager
def as_released() -> Iterator[None]:
    """Triton's interpreter as it comes, for a comparison."""
    quick = [(owner, name, getattr(owner, name)) for owner, name, _ in _as_released]
    for owner, name, own in _as_released:
        setattr(owner, name, own)
    try:
        yield
    finally:
        for owner, name, one in quick:
            setattr(owner, name, one)
