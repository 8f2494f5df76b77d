"""Copies of a module of kernels, each with one mistake in a ``@triton.jit`` function.

``mutants`` makes the mistakes that can be made anywhere, from the syntax tree:

    signs         a + b -> a - b, a - b -> a + b, -a -> a, x += a -> x -= a
    terms         a + b -> a, a - b -> a, x += a -> nothing, x = f(x) -> nothing, a store -> nothing
    accumulation  x += a -> x = a, tl.dot(a, b, x) -> tl.dot(a, b)
    factors       a * b -> a or b, a / b -> a, x *= a -> nothing, f(a) -> a for exp2, log2, sqrt, abs, trans
    masks         mask=... -> nothing, its fill of zero -> one, a & b and a | b -> a or b, where(c, a, b) -> a or b,
                  minimum(a, b) and maximum(a, b) -> a or b, -inf -> 0
    comparisons   < and <=, > and >=, == and != for each other, and / or -> one side
    branches      if c -> never; with an else also always; a if c else b -> a or b
    operands      // and % for each other, [0] and [1], True and False as arguments

``Mistake`` is one written by hand: text that occurs exactly once in its function, and what stands there instead.

Not made, because the interpreter and float32 cannot tell: casts (64-bit addresses and 16-bit operands have their own tests) and
``num_stages``, which changes no result.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

_SIGNS = {ast.Add: "-", ast.Sub: "+"}
_SWAPS = {ast.FloorDiv: "%", ast.Mod: "//"}
_COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
_UNARY = ("exp2", "log2", "sqrt", "abs", "trans")
_EITHER = ("minimum", "maximum")


class Mistake(NamedTuple):
    """Written by hand: in ``function``, ``before``, which occurs there exactly once, becomes ``after``."""

    function: str
    before: str
    after: str


@dataclass(frozen=True)
class Mutant:
    """One mistake: ``name`` says what and where, ``source`` is the function with it, decorators included."""

    name: str
    function: str
    source: str


class Change(NamedTuple):
    """What to write instead of a node of the tree, and how to say it."""

    node: ast.AST
    before: str
    after: str


def kernel_functions(source: str) -> dict[str, ast.FunctionDef]:
    """The ``@triton.jit`` functions of a module by name."""
    return {
        node.name: node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    }


def callers(source: str) -> dict[str, set[str]]:
    """The functions, itself among them, that run each ``@triton.jit`` function, directly or through others."""
    functions = kernel_functions(source)
    calls = {
        name: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & functions.keys()
        for name, node in functions.items()
    }
    reached = {name: {name} for name in functions}
    for _ in functions:
        for name, called in calls.items():
            for other in called:
                reached[name] |= reached[other]
    return {name: {caller for caller in functions if name in reached[caller]} for name in functions}


def mutants(source: str, mistakes: list[Mistake]) -> list[Mutant]:
    """All mutants of a module: the generated ones, function by function, and those written by hand.

    Raises:
        ValueError: a mistake's function does not exist, or its text does not occur there exactly once.
    """
    found = []
    seen: Counter[str] = Counter()
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        def offset(line: int, column: int) -> int:  # the tree counts columns in bytes
            return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

        return offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)

    def add(function: str, first: int, last: int, before: str, after: str, replacement: str) -> None:
        name = f"{function}: {_short(before)} -> {_short(after)}"
        seen[name] += 1
        if seen[name] > 1:
            name += f" (place {seen[name]})"
        begin, end = starts[functions[function].decorator_list[0].lineno - 1], span(functions[function])[1]
        found.append(Mutant(name, function, source[begin:first] + replacement + source[last:end] + "\n"))

    functions = kernel_functions(source)
    for function, tree in functions.items():
        for node, before, after in _changes(tree):
            add(function, *span(node), before, after, f"({after})" if isinstance(node, ast.expr) else after)
    for function, before, after in mistakes:
        if function not in functions:
            raise ValueError(f"mistakes: {function} is no kernel function of the module")
        first, last = span(functions[function])
        count = source.count(before, first, last)
        if count != 1:
            raise ValueError(f"mistakes: expected {before!r} once in {function}, found it {count} times")
        at = source.index(before, first, last)
        add(function, at, at + len(before), before, after, after)
    return found


def copy_of(module: ModuleType, folder: Path) -> ModuleType:
    """The module imported afresh, under another name; from a file, because Triton reads its functions' source again."""
    name = f"copy_of_{module.__name__.replace('.', '_')}"
    path = folder / f"{name}.py"
    path.write_text(Path(module.__file__).read_text())
    spec = importlib.util.spec_from_file_location(name, path)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    try:
        spec.loader.exec_module(copy)
    finally:
        del sys.modules[name]
    return copy


@contextmanager
def grafted(module: ModuleType, mutant: Mutant, path: Path) -> Iterator[Any]:
    """The module with the mutant in its function's place, of which Triton then prepares this one function anew; the mutant."""
    own = vars(module)[mutant.function]
    path.write_text(mutant.source)
    exec(compile(mutant.source, path, "exec"), vars(module))
    try:
        yield vars(module)[mutant.function]
    finally:
        setattr(module, mutant.function, own)


def _changes(function: ast.FunctionDef) -> Iterator[Change]:
    parameters = {argument.arg for argument in function.args.args}
    for statement in function.body:
        yield from _walk(statement, parameters)


def _walk(node: ast.AST, parameters: set[str]) -> Iterator[Change]:
    for after in dict.fromkeys(_here(node, parameters)):
        yield Change(node, ast.unparse(node), after)
    if isinstance(node, ast.If):
        yield Change(node.test, f"if {ast.unparse(node.test)}", "False")
        if node.orelse:
            yield Change(node.test, f"if {ast.unparse(node.test)}", "True")
    if isinstance(node, ast.Call):
        for index, argument in enumerate(node.args):
            if _is_switch(argument):
                yield Change(
                    argument, f"{ast.unparse(node.func)}, argument {index}: {argument.value}", str(not argument.value)
                )
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.keyword) and child.arg == "num_stages":
            continue
        if isinstance(child, ast.expr) and _is_decided_while_compiling(child):
            continue
        yield from _walk(child, parameters)


def _is_switch(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def _is_decided_while_compiling(node: ast.expr) -> bool:
    """A comparison of a constexpr, or with None: the branch that it decides is mutated instead."""
    if not isinstance(node, ast.Compare):
        return False
    constants = [c.value for c in node.comparators if isinstance(c, ast.Constant)]
    constexpr = isinstance(node.left, ast.Name) and node.left.id.isupper()
    return constexpr or any(value is None or isinstance(value, str) for value in constants)


def _here(node: ast.AST, parameters: set[str]) -> Iterator[str]:
    """What one node may become."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "pass"
    elif isinstance(node, ast.Assign):
        names = {n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)}
        used = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        if names <= used and not _is_call(node.value, "to"):
            yield "pass"
    elif isinstance(node, ast.AugAssign):
        target, value = ast.unparse(node.target), ast.unparse(node.value)
        yield "pass"
        if isinstance(node.op, ast.Add):
            yield f"{target} -= {value}"
            yield f"{target} = {value}"
    elif isinstance(node, ast.IfExp):
        yield ast.unparse(node.body)
        yield ast.unparse(node.orelse)
    elif isinstance(node, ast.BoolOp):
        yield from (ast.unparse(value) for value in node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield ast.unparse(node.operand)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
        yield f"{left} {_COMPARISONS[type(node.ops[0])]} {right}"
    elif isinstance(node, ast.BinOp):
        yield from _of_operation(node, parameters)
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value in (0, 1):
        yield f"{ast.unparse(node.value)}[{1 - node.slice.value}]"
    elif isinstance(node, ast.keyword) and _is_switch(node.value):
        yield f"{node.arg}={not node.value.value}"
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_operation(node: ast.BinOp, parameters: set[str]) -> Iterator[str]:
    left, right = f"({ast.unparse(node.left)})", f"({ast.unparse(node.right)})"
    if type(node.op) in _SIGNS:
        yield f"{left} {_SIGNS[type(node.op)]} {right}"
        if not _is_call(node.right, "arange"):  # a tile's first place alone is no tile: that could not run
            yield left
        base = node.left
        while isinstance(base, ast.BinOp):
            base = base.left
        if isinstance(node.op, ast.Add) and not (isinstance(base, ast.Name) and base.id in parameters):
            yield right  # a parameter would be the pointer that an offset is added to
    elif type(node.op) in _SWAPS:
        yield f"{left} {_SWAPS[type(node.op)]} {right}"
    elif isinstance(node.op, ast.Div | ast.RShift):
        yield left
    elif isinstance(node.op, ast.Mult | ast.BitAnd | ast.BitOr):
        yield left
        yield right


def _of_call(node: ast.Call) -> Iterator[str]:
    arguments = [ast.unparse(argument) for argument in node.args]
    if _is_call(node, "where"):
        yield from arguments[1:]
    elif _is_call(node, *_EITHER):
        yield from arguments
    elif _is_call(node, *_UNARY):
        yield arguments[0]
    elif _is_call(node, "dot") and len(node.args) == 3:
        yield ast.unparse(ast.Call(node.func, node.args[:2], node.keywords))
    elif ast.unparse(node) == "float('-inf')":
        yield "0.0"
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if "mask" in keywords:
        others = [keyword for keyword in node.keywords if keyword.arg not in ("mask", "other")]
        yield ast.unparse(ast.Call(node.func, node.args, others))
    if "other" in keywords:
        ones = [ast.keyword(k.arg, ast.Constant(1.0)) if k.arg == "other" else k for k in node.keywords]
        yield ast.unparse(ast.Call(node.func, node.args, ones))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-35:]}"


def _is_call(node: ast.AST, *names: str) -> bool:
    """A call of ``something.name``."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names
