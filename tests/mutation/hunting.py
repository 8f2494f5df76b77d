"""Which mutants of a module die, and of what."""

from __future__ import annotations

import functools
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple

from mutation.memory import OutOfBounds
from mutation.mutants import Mutant, Source
from mutation.probes import Memory, Probe


class Found(NamedTuple):
    """What became of a mutant: by which probe it was ``killed``, and how; or the reason why it computes the same."""

    mutant: Mutant
    killed: str | None
    reason: str | None

    @property
    def is_right(self) -> bool:
        return (self.killed is None) == (self.reason is not None)

    def __str__(self) -> str:
        return f"{self.mutant.name}\n    {self.killed or self.reason or 'no probe sees the difference'}"


Reasons = dict[str, tuple[str, ...]]


@dataclass
class Case:
    """A module and its probes; by the reason why, patterns of mutants that compute the same, as "function: before -> after", and
    of those that no probe has to kill, as "kind: function: before -> after" ("..." is any text): they change no value, but
    memory, work or rounding, or another test asks for what they change."""

    source: Source
    make_probes: Callable[[], list[Probe]]
    equivalents: Reasons = field(default_factory=dict)
    elsewhere: Reasons = field(default_factory=dict)

    @functools.cached_property
    def mutants(self) -> list[Mutant]:
        patterns = _compiled(self.elsewhere)
        return [m for m in self.source.mutants if not any(p.fullmatch(f"{m.kind}: {m.name}") for p, _ in patterns)]

    @functools.cached_property
    def probes(self) -> list[Probe]:
        return self.make_probes()

    @functools.cached_property
    def memory(self) -> Memory:
        return Memory(self.probes)

    @functools.cached_property
    def runs(self) -> dict[str, list[Probe]]:
        """The probes that run each function, those that take the least time first."""
        codes = {self.source.function(name).__code__: name for name in self.source.functions}
        runs: dict[str, list[Probe]] = {name: [] for name in self.source.functions}
        taken = {}
        for probe in self.probes:
            begin = time.process_time()
            with _run_codes() as seen:
                probe.check()
            taken[probe.name] = time.process_time() - begin
            for name in {codes[code] for code in codes.keys() & seen}:
                runs[name].append(probe)
        return {name: sorted(probes, key=lambda probe: taken[probe.name]) for name, probes in runs.items()}

    @functools.cached_property
    def patterns(self) -> list[tuple[re.Pattern[str], str]]:
        return _compiled(self.equivalents)

    def why_equivalent(self, mutant: Mutant) -> str | None:
        return next((reason for pattern, reason in self.patterns if pattern.fullmatch(mutant.name)), None)

    def stale(self) -> list[str]:
        """The patterns that fit no mutant."""
        texts = [m.name for m in self.source.mutants], [f"{m.kind}: {m.name}" for m in self.source.mutants]
        return [
            pattern.pattern
            for reasons, names in zip((self.equivalents, self.elsewhere), texts, strict=True)
            for pattern, _ in _compiled(reasons)
            if not any(map(pattern.fullmatch, names))
        ]

    def sample(self, step: int) -> list[Mutant]:
        """Of each kind each ``step``-th mutant, the first included; all of them for 1."""
        seen: Counter[str] = Counter()
        chosen = []
        for mutant in self.mutants:
            if step == 1 or (self.why_equivalent(mutant) is None and seen[mutant.kind] % step == 0):
                chosen.append(mutant)
            seen[mutant.kind] += self.why_equivalent(mutant) is None
        return chosen

    def hunt(self, mutants: list[Mutant]) -> Iterator[Found]:
        """What becomes of them. The probe that killed the last mutant of a function is asked first about the next."""
        for mutant in mutants:
            asked, memory, killed = self.runs[mutant.function], self.memory, None
            with self.source.grafted(mutant):
                for probe in asked:
                    if killed := how_it_fails(probe):
                        break
            if killed:
                memory.restore()
                asked.insert(0, asked.pop(asked.index(probe)))
            yield Found(mutant, killed and f"{probe.name}: {killed}", self.why_equivalent(mutant))


def _compiled(reasons: Reasons) -> list[tuple[re.Pattern[str], str]]:
    return [
        (re.compile(".*".join(map(re.escape, pattern.split("...")))), reason)
        for reason, patterns in reasons.items()
        for pattern in patterns
    ]


def how_it_fails(probe: Probe) -> str | None:
    """In words; None where it passes."""
    try:
        probe.check()
    except Exception as failure:
        while failure.__cause__ is not None:
            failure = failure.__cause__
        if isinstance(failure, OutOfBounds):
            return "touches memory outside its tensors"
        what = str(failure).splitlines()[0] if str(failure) else ""
        return what if isinstance(failure, AssertionError) else f"raises {type(failure).__name__}: {what}"
    return None


@contextmanager
def _run_codes() -> Iterator[set[CodeType]]:
    """The code of all Python functions that run inside, those of autograd's other threads left out."""
    seen: set[CodeType] = set()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            seen.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(before)
