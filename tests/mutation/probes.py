"""What a mutant has to survive, and must not: small runs against a formula in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from support import error
from torch import Tensor, nn


@dataclass(frozen=True)
class Probe:
    """``run`` gives what ``expected`` holds, by name; each error, relative in norm, is at most what ``allowed`` says."""

    name: str
    run: Callable[[], dict[str, Tensor]]
    expected: dict[str, Tensor]
    allowed: dict[str, float]

    def check(self) -> None:
        found = self.run()
        for name, truth in self.expected.items():
            value = found[name].double()
            ordinary = truth.isfinite()
            same = (value == truth) | (value.isnan() & truth.isnan())
            assert same[~ordinary].all(), f"{name}: not NaN or infinite where the formula is"
            if ordinary.any():
                wrong = error(value[ordinary], truth[ordinary])
                assert wrong <= self.allowed[name], f"{name}: {wrong:.1e}"


class Memory:
    """What all tensors of some probes hold: a mutant may write where it should read, and would spoil the next one's numbers."""

    def __init__(self, probes: Iterable[Probe]) -> None:
        seen: set[int] = set()
        storages = [tensor.untyped_storage() for probe in probes for tensor in _tensors_of(probe, seen)]
        self._kept = [(storage, storage.clone()) for storage in {s.data_ptr(): s for s in storages}.values()]

    def restore(self) -> None:
        for storage, kept in self._kept:
            storage.copy_(kept)


def _tensors_of(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that a function, a container or an object of ours can reach."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    inner: Iterable[Any] = ()
    if isinstance(thing, Tensor):
        yield thing.detach()
    elif isinstance(thing, dict):
        inner = thing.values()
    elif isinstance(thing, list | tuple | set):
        inner = thing
    elif isinstance(thing, functools.partial):
        inner = thing.func, thing.args, thing.keywords
    elif isinstance(thing, FunctionType):
        inner = [*(cell.cell_contents for cell in thing.__closure__ or ()), thing.__kwdefaults__, thing.__defaults__]
    elif isinstance(thing, nn.Module) or (type(thing).__module__.startswith("mutation.")):
        inner = vars(thing).values()
    for one in inner:
        yield from _tensors_of(one, seen)
