"""Proves of a compiled kernel, at given launches, that no integer in its addresses leaves the range of its type.

A tensor may pass 2^31 elements while each of its strides fits 32 bits; ``row * stride`` then needs 64. Whether it gets them
shows in Triton's intermediate code (TTIR). This walks that code with intervals instead of numbers: arguments are those of
the launch, a program id lies within the grid, ``tl.arange`` within its ends, a loop variable within its bounds, anything not
understood anywhere in its type. An operation whose exact result may leave its type is a suspect, and an address that a
suspect reaches, by whatever way and in whatever width it arrives there, is a breach. Intervals contain what can happen, so a
kernel without breaches has none at that launch; what they say too much of is a factor or two, and 32 bits are not that near.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

# A tensor with more elements than this has some that 32 bits do not reach.
REACH_OF_32_BITS = 2**31


class Launch(NamedTuple):
    """One launch of a kernel: programs along each axis, and the integers among its arguments by name."""

    grid: tuple[int, ...]
    integers: tuple[tuple[str, int], ...]


class Report(NamedTuple):
    """``breaches``: a line each. ``reach``: the largest offset, in elements, that an address has from its tensor's first."""

    breaches: list[str]
    reach: int


class Range(NamedTuple):
    """Integers from ``low`` to ``high``; a pointer counts elements from its argument. ``suspect``: what may have wrapped."""

    low: int
    high: int
    suspect: str | None = None


@dataclass
class Operation:
    """One operation of the printed code; ``text`` is what follows its name, ``end`` what its regions end with; no location."""

    results: list[str]
    name: str
    text: str
    location: str
    regions: list[list[Operation]] = field(default_factory=list)
    end: str = ""

    @property
    def operands(self) -> list[str]:
        return re.findall(NAME, self.text)


def check(ttir: str, launch: Launch) -> Report:
    """Walk the kernel in ``ttir`` as launched by ``launch``."""
    walk = _Walk(_source_lines(ttir), launch)
    walk.region(parse(ttir))
    return Report(sorted(set(walk.breaches)), walk.reach)


NAME = r"%[\w$.-]+(?:#\d+)?"
_OPERATION = r'\A(?:(%[^=]*?) = )?"?((?:\w+\.)?\w+)"?(.*)'


def found(pattern: str, text: str) -> re.Match[str]:
    """The first match of a pattern that compilers' output always has.

    Raises:
        ValueError: it has not: a new version prints otherwise, and what reads it here must learn that.
    """
    if match := re.search(pattern, text):
        return match
    raise ValueError(f"expected {pattern!r} in {text[:200]!r}")


def parse(ttir: str) -> list[Operation]:
    """The operations as a tree, from the printed code: one operation a line, regions between braces at the ends of lines."""
    top: list[Operation] = []
    # Innermost last: the operation whose region is open, and that region.
    open_regions: list[tuple[Operation | None, list[Operation]]] = [(None, top)]
    operation: Operation | None = None
    for line in ttir.splitlines():
        line, _, location = line.strip().partition(" loc(")
        if not line or line.startswith(("#", "^", "//")):
            continue
        if line.startswith("}"):
            operation, _ = open_regions.pop()
            if operation:
                operation.end = line
        else:
            results, name, text = found(_OPERATION, line).groups()
            operation = Operation(_result_names(results), name, text + location * (name == "tt.func"), location)
            open_regions[-1][1].append(operation)
        if operation and (line.endswith("{") or (operation.name == "tt.func" and not operation.regions)):
            operation.regions.append([])
            open_regions.append((operation, operation.regions[-1]))
    return top


def _result_names(results: str | None) -> list[str]:
    names = []
    for name, count in re.findall(r"(%[\w$.-]+)(?::(\d+))?", results or ""):
        names += [f"{name}#{i}" for i in range(int(count))] if count else [name]
    return names


def _source_lines(ttir: str) -> dict[str, str]:
    """Where in the Python source each ``#loc`` is; of inlined calls, the innermost."""
    definitions = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))

    def line(location: str) -> str:
        if place := re.search(r'"([^"]*)":(\d+)', location):
            return f"{'/'.join(place[1].split('/')[-2:])}:{place[2]}"
        inner = re.search(r"#loc\d*", location)
        return line(definitions[inner[0]]) if inner and inner[0] in definitions else "unknown line"

    return {name: line(definition) for name, definition in definitions.items()}


def _integer_type(text: str) -> int | None:
    """Bits of the integer type that ``text`` ends with, alone or in a tensor; None of another type."""
    bits = re.search(r"(?:[\sx]|^)(?:i(\d+)|(index))(?:, #[\w.]+)?>?$", text.strip())
    return None if bits is None else int(bits[1] or 64)


def _within(bits: int) -> Range:
    return Range(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _join(*ranges: Range) -> Range:
    suspects = [one.suspect for one in ranges if one.suspect]
    return Range(min(one.low for one in ranges), max(one.high for one in ranges), suspects[0] if suspects else None)


Bounds = tuple[int, int]


def _corners(a: Range, b: Range, operator: Callable[[int, int], int]) -> Bounds:
    values = [operator(x, y) for x in a[:2] for y in b[:2]]
    return min(values), max(values)


def _quotient(a: Range, b: Range) -> Bounds | None:
    """Rounded towards zero. Dividing by zero is undefined, so zero is left out of ``b``."""
    divisors = {bound for bound in (b.low, b.high, -1, 1) if bound and b.low <= bound <= b.high}
    values = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x in a[:2] for y in divisors]
    return (min(values), max(values)) if values else None


def _remainder(a: Range, b: Range) -> Bounds:
    """The sign is the dividend's."""
    largest = max(abs(b.low), abs(b.high), 1) - 1
    return max(min(a.low, 0), -largest), min(max(a.high, 0), largest)


def _bits_and(a: Range, b: Range) -> Bounds | None:
    tops = [one.high for one in (a, b) if one.low >= 0]
    return (0, min(tops)) if tops else None


def _unsigned(operator: Callable[[Range, Range], Bounds | None]) -> Callable[[Range, Range], Bounds | None]:
    """The signed operator, where both operands are known not to be negative."""
    return lambda a, b: operator(a, b) if a.low >= 0 and b.low >= 0 else None


# Exact results, before they are put into a type; None where nothing is known.
_ARITHMETIC = {
    "arith.addi": lambda a, b: (a.low + b.low, a.high + b.high),
    "arith.subi": lambda a, b: (a.low - b.high, a.high - b.low),
    "arith.muli": lambda a, b: _corners(a, b, lambda x, y: x * y),
    "arith.divsi": _quotient,
    "arith.divui": _unsigned(_quotient),
    "arith.remsi": _remainder,
    "arith.remui": _unsigned(_remainder),
    "arith.minsi": lambda a, b: (min(a.low, b.low), min(a.high, b.high)),
    "arith.maxsi": lambda a, b: (max(a.low, b.low), max(a.high, b.high)),
    "arith.minui": _unsigned(lambda a, b: (min(a.low, b.low), min(a.high, b.high))),
    "arith.maxui": _unsigned(lambda a, b: (max(a.low, b.low), max(a.high, b.high))),
    "arith.andi": _bits_and,
    "arith.shli": lambda a, b: _corners(a, b, lambda x, y: x << y) if 0 <= b.low <= b.high < 64 else None,
    "arith.shrsi": lambda a, b: _corners(a, b, lambda x, y: x >> y) if b.low >= 0 else None,
}

# Operations whose result holds their first operand's numbers.
_SAME = {
    "tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans", "tt.bitcast", "ttg.convert_layout",
    "arith.extsi", "arith.index_cast",
}  # fmt: skip


class _Walk:
    """One walk through a kernel; ``ranges`` holds integers and pointers, nothing else has a range."""

    def __init__(self, source_lines: Mapping[str, str], launch: Launch) -> None:
        self.source_lines, self.grid, self.integers = source_lines, launch.grid, dict(launch.integers)
        self.ranges: dict[str, Range] = {}
        self.breaches: list[str] = []
        self.reach = 0

    def region(self, operations: list[Operation]) -> list[str]:
        """Walk the operations of a region; the names that its last one yields."""
        for operation in operations:
            self.step(operation)
        return operations[-1].operands if operations and operations[-1].name == "scf.yield" else []

    def of(self, name: str, bits: int = 64) -> Range:
        """The range of a value; of one not understood, its whole type."""
        return self.ranges.get(name, _within(bits))

    def step(self, operation: Operation) -> None:
        name, operands = operation.name, operation.operands
        if name == "tt.func":
            self.arguments(operation)
        elif name == "scf.for":
            return self.loop(operation)
        elif name == "scf.if":
            return self.branch(operation)
        elif name == "tt.addptr":
            self.address(operation)
        elif name.startswith("tt.descriptor_"):
            for operand in operands:
                self.use(operation, self.of(operand))
        elif name in _SAME:
            if operands[0] in self.ranges:
                self.ranges[operation.results[0]] = self.ranges[operands[0]]
        elif (bits := _integer_type(operation.text)) is not None and len(operation.results) == 1:
            self.ranges[operation.results[0]] = self.integer(operation, operands, bits)
        for region in operation.regions:
            self.region(region)

    def arguments(self, operation: Operation) -> None:
        for name, kind in re.findall(r"%(\w+): (!tt\.ptr|i\d+)", operation.text):
            if kind == "!tt.ptr":
                self.ranges[f"%{name}"] = Range(0, 0)
            elif name in self.integers:
                self.ranges[f"%{name}"] = Range(self.integers[name], self.integers[name])
            else:
                raise ValueError(f"the launch has no integer for argument {name} ({kind}); it has {self.integers}")

    def integer(self, operation: Operation, operands: list[str], bits: int) -> Range:
        """The range of an integer result, and whether it may have left its type."""
        text, whole = operation.text, _within(bits)
        if operation.name == "arith.constant":
            constant = re.match(r" (?:dense<)?(-?\d+|true|false)>? ", text)
            if constant is None:
                return whole
            value = int(constant[1] == "true") if constant[1].isalpha() else int(constant[1])
            return Range(value, value)
        if operation.name in ("tt.get_program_id", "tt.get_num_programs"):
            axis = "xyz".index(text.split()[0])
            programs = self.grid[axis] if axis < len(self.grid) else 1
            return Range(0, programs - 1) if operation.name == "tt.get_program_id" else Range(programs, programs)
        if operation.name == "tt.make_range":
            end, start = (int(found(rf"{key} = (\d+)", text)[1]) for key in ("end", "start"))
            return Range(start, end - 1)
        values = [self.of(operand, bits) for operand in operands]
        if operation.name == "arith.select":
            return _join(*values[1:])
        if operation.name in ("arith.trunci", "arith.extui"):
            # From another type: zero extension keeps what is not negative, truncation what fits.
            source = self.of(operands[0], _integer_type(text.partition(" to ")[0]) or 64)
            exact = source[:2] if operation.name == "arith.trunci" or source.low >= 0 else None
        elif operation.name in _ARITHMETIC and len(values) == 2:
            exact = _ARITHMETIC[operation.name](*values)
        else:
            return whole
        suspect = next((value.suspect for value in (values or [whole]) if value.suspect), None)
        if exact is None:
            return whole._replace(suspect=suspect)
        if whole.low <= exact[0] and exact[1] <= whole.high:
            return Range(*exact, suspect)
        if bits >= 64:  # the most there is; what is too large for it is what was not understood
            return whole._replace(suspect=suspect)
        extreme = exact[1] if exact[1] > whole.high else exact[0]
        own = f"{self.where(operation)}: {operation.name} in {bits} bits may come to {extreme:,}"
        return whole._replace(suspect=suspect or own)

    def address(self, operation: Operation) -> None:
        pointer, offset = operation.operands[:2]
        # A pointer not understood, as one read from memory, starts a count of its own.
        base = self.ranges.get(pointer, Range(0, 0))
        step = self.of(offset, _integer_type(operation.text) or 64)
        self.use(operation, step)
        self.ranges[operation.results[0]] = Range(base.low + step.low, base.high + step.high)
        self.reach = max(self.reach, base.high + step.high)

    def use(self, operation: Operation, value: Range) -> None:
        if value.suspect:
            self.breaches.append(f"address at {self.where(operation)}: {value.suspect}")

    def where(self, operation: Operation) -> str:
        reference = re.match(r"#loc\d*", operation.location)
        return self.source_lines.get(reference[0], "unknown line") if reference else "unknown line"

    def loop(self, operation: Operation) -> None:
        """A counted loop. What it carries stays, or moves by a step each trip, or may be anything of its type."""
        variable, low, high, step = operation.operands[:4]
        first, end, stride = self.of(low, 32), self.of(high, 32), self.of(step, 32)
        self.ranges[variable] = Range(first.low, max(first.low, end.high - 1), _join(first, end, stride).suspect)
        trips = max(0, -(-(end.high - first.low) // max(1, stride.low)))

        head = operation.text.partition("iter_args(")[2]
        carried, types = head.partition(") -> (")[::2]
        pairs = re.findall(rf"({NAME}) = ({NAME})", carried)
        widths = [_integer_type(kind) for kind in re.findall(r"!?[\w.]+(?:<[^<>]*(?:<[^<>]*>)?[^<>]*>)?", types)]
        body = operation.regions[0]
        definitions = {name: inner for inner in body for name in inner.results}

        # Once with nothing assumed, to learn the steps; what it finds on the way does not count.
        breaches, reach = list(self.breaches), self.reach
        for (inside, init), bits in zip(pairs, widths, strict=False):
            if bits is not None:
                self.ranges[inside] = _within(bits)
            elif init in self.ranges:
                self.ranges[inside] = self.ranges[init]
        yielded = self.region(body)
        self.breaches, self.reach = breaches, reach

        for (inside, init), bits, name in zip(pairs, widths, yielded, strict=False):
            start, definition = self.ranges.get(init), definitions.get(name)
            if name == inside and start:
                self.ranges[inside] = start
            elif start and definition and _moves(definition, inside):
                by = self.of(definition.operands[1], _integer_type(definition.text) or 64)
                self.ranges[inside] = Range(
                    start.low + trips * min(0, by.low),
                    start.high + trips * max(0, by.high),
                    by.suspect or start.suspect,
                )
            elif bits is not None:
                self.ranges[inside] = _within(bits)._replace(suspect=self.of(name).suspect)
            else:
                self.ranges.pop(inside, None)
        self.region(body)
        for name, (inside, _) in zip(operation.results, pairs, strict=True):
            if inside in self.ranges:
                self.ranges[name] = self.ranges[inside]

    def branch(self, operation: Operation) -> None:
        """Either region; a result is what one of them yields."""
        branches = [self.region(region) for region in operation.regions]
        for name, *yielded in zip(operation.results, *branches, strict=True):
            if all(value in self.ranges for value in yielded):
                self.ranges[name] = _join(*(self.ranges[value] for value in yielded))


def _moves(definition: Operation, inside: str) -> bool:
    """The operation adds something to what the loop carries as ``inside``."""
    return definition.name in ("arith.addi", "tt.addptr") and definition.operands[0] == inside
