"""What one node of a syntax tree may become by mistake, wherever it stands; and small questions about nodes."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

_SIGNS = {ast.Add: "-", ast.Sub: "+"}
_SWAPS = {ast.FloorDiv: "%", ast.Mod: "//"}
_COMPARISONS = {
    ast.Lt: ("<=", ">"), ast.LtE: ("<", ">="), ast.Gt: (">=", "<"), ast.GtE: (">", "<="), ast.Eq: ("!=",),
    ast.NotEq: ("==", ">"), ast.In: ("not in",), ast.NotIn: ("in",),
}  # fmt: skip
_CONTRARY = {ast.Lt: ">=", ast.LtE: ">", ast.Gt: "<=", ast.GtE: "<"}
_SAME_ARGUMENTS = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min", "sin": "cos", "cos": "sin"}
# f(a) and a.f(...) that become a.
_UNARY = ("exp2", "log2", "sqrt", "abs", "trans")
_METHODS = {
    **dict.fromkeys(("masked_fill", "masked_fill_"), "masks"),
    **dict.fromkeys(
        ("abs", "sign", "relu", "relu_", "t", "add_", "sub_", "mul_", "neg_", "zero_", "transpose"), "factors"
    ),
}
_FACTORS = ("alpha", "beta")
UNSEEN_KEYWORDS = ("num_stages", "device", "enabled")
UNTOUCHED = ("super", "say", "isinstance")
SYMMETRIC = ("promote_types", "minimum", "maximum", "min", "max")
STORES = ("store", "store_tile", "store_part")


def mistakes(node: ast.AST, parameters: set[str]) -> Iterator[tuple[str, str]]:
    """What one node may become, wherever it stands."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        if "super()" not in ast.unparse(node):  # a method without it is another kind of function to Python
            yield "terms", "pass"
    elif isinstance(node, ast.Assign):
        yield from _of_assignment(node)
    elif isinstance(node, ast.AugAssign):
        target, value = ast.unparse(node.target), ast.unparse(node.value)
        yield "factors" if isinstance(node.op, ast.Mult | ast.Div) else "terms", "pass"
        if isinstance(node.op, ast.Add):
            yield "signs", f"{target} -= {value}"
            yield "accumulation", f"{target} = {value}"
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        for first in range(len(node.value.elts) - 1):
            yield "order", f"return {', '.join(map(ast.unparse, swapped(node.value.elts, first)))}"
    elif isinstance(node, ast.IfExp):
        yield from (("branches", ast.unparse(one)) for one in (node.body, node.orelse))
    elif isinstance(node, ast.BoolOp):
        yield from (("comparisons", ast.unparse(value)) for value in node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield "signs" if isinstance(node.op, ast.USub) else "comparisons", ast.unparse(node.operand)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
        for operator in _COMPARISONS.get(type(node.ops[0]), ()):
            yield "comparisons", f"{left} {operator} {right}"
    elif isinstance(node, ast.BinOp):
        yield from _of_operation(node, parameters)
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value in (0, 1):
        yield "operands", f"{ast.unparse(node.value)}[{1 - node.slice.value}]"
    elif isinstance(node, ast.Attribute) and node.attr == "mT":
        yield "factors", ast.unparse(node.value)
    elif isinstance(node, ast.keyword) and is_switch(node.value):
        yield "flags", f"{node.arg}={not node.value.value}"
    elif isinstance(node, ast.Constant) and "->" in str(node.value):  # of einops
        left, right = node.value.split("->")
        for axes in re.findall(r"\(\w+ \w+", right):
            first, second = axes[1:].split()
            yield "order", repr(f"{left}->{right.replace(axes, f'({second} {first}')}")
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_assignment(node: ast.Assign) -> Iterator[tuple[str, str]]:
    target, value = node.targets[0], ast.unparse(node.value)
    used = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
    if set(names_in(target)) <= used and isinstance(target, ast.Name) and not is_call(node.value, "to"):
        yield "terms", "pass"
    if isinstance(target, ast.Tuple):
        for first, (one, other) in enumerate(pairwise(map(ast.unparse, target.elts))):
            if not one.startswith(("_", "*")) and not other.startswith(("_", "*")):
                yield "order", f"{', '.join(map(ast.unparse, swapped(target.elts, first)))} = {value}"


def _of_operation(node: ast.BinOp, parameters: set[str]) -> Iterator[tuple[str, str]]:
    left, right = f"({ast.unparse(node.left)})", f"({ast.unparse(node.right)})"
    if type(node.op) in _SIGNS:
        yield "signs", f"{left} {_SIGNS[type(node.op)]} {right}"
        if not is_call(node.right, "arange"):  # a tile's first place alone is no tile: that could not run
            yield "terms", left
        base = node.left
        while isinstance(base, ast.BinOp) and isinstance(base.op, ast.Add):
            base = base.left
        if isinstance(node.op, ast.Add) and not (isinstance(base, ast.Name) and base.id in parameters):
            yield "terms", right  # a parameter would be the pointer that an offset is added to
    elif type(node.op) in _SWAPS:
        yield "operands", f"{left} {_SWAPS[type(node.op)]} {right}"
    elif isinstance(node.op, ast.Div | ast.RShift | ast.Pow):
        yield "factors", right if is_number(node.left) and node.left.value == 1 else left
    elif isinstance(node.op, ast.Mult | ast.BitAnd | ast.BitOr):
        kind = "factors" if isinstance(node.op, ast.Mult) else "masks"
        yield kind, left
        yield kind, right
        if isinstance(node.op, ast.BitOr) and isinstance(node.right, ast.Name):
            yield "masks", f"{left} | True"
    for number in (node.left, node.right):
        if isinstance(number, ast.Constant) and type(number.value) is int and number.value > 2:
            yield "operands", ast.unparse(replaced(node, number, ast.Constant(number.value - 1)))


def _of_call(node: ast.Call) -> Iterator[tuple[str, str]]:
    arguments = [ast.unparse(argument) for argument in node.args]
    receiver = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else None
    name = name_of(node)
    if name == "where":
        _, one, other = arguments
        yield from (
            ("masks", one),
            ("masks", other),
            ("branches", with_arguments(node, [node.args[i] for i in (0, 2, 1)])),
        )
        compare = node.args[0]
        if one == "0.0" and isinstance(compare, ast.Compare) and type(compare.ops[0]) in _CONTRARY:
            contrary = (
                f"{ast.unparse(compare.left)} {_CONTRARY[type(compare.ops[0])]} {ast.unparse(compare.comparators[0])}"
            )
            yield "branches", f"{ast.unparse(node.func)}({contrary}, {other}, {one})"
    elif name in ("minimum", "maximum"):
        yield from (("masks", argument) for argument in arguments)
    elif name in _UNARY and arguments:
        yield "factors", arguments[0]
    elif name in _METHODS and receiver:
        yield _METHODS[name], receiver
    elif name == "dot" and len(arguments) == 3:
        yield "accumulation", with_arguments(node, node.args[:2])
    elif name == "to" and receiver and not arguments[0].startswith("tl."):
        yield "casts", receiver
    elif name in ("range", "static_range"):
        yield from _of_range(node, arguments)
    elif ast.unparse(node) == "float('-inf')":
        yield "masks", "0.0"
    if name in _SAME_ARGUMENTS and receiver:
        yield "functions", with_function(node, f"{receiver}.{_SAME_ARGUMENTS[name]}")
    for keyword in node.keywords:
        others = [other for other in node.keywords if other is not keyword]
        if keyword.arg == "mask":
            yield "masks", ast.unparse(ast.Call(node.func, node.args, [k for k in others if k.arg != "other"]))
        elif keyword.arg == "other":
            yield (
                "masks",
                ast.unparse(ast.Call(node.func, node.args, [*others, ast.keyword("other", ast.Constant(1.0))])),
            )
        elif keyword.arg in _FACTORS:
            yield "factors", ast.unparse(ast.Call(node.func, node.args, others))
    for one, other in pairwise(node.keywords):
        if all(isinstance(k.value, ast.Name) and k.value.id.islower() for k in (one, other)) and name == "rearrange":
            swapped = {one: ast.keyword(one.arg, other.value), other: ast.keyword(other.arg, one.value)}
            yield "order", ast.unparse(ast.Call(node.func, node.args, [swapped.get(k, k) for k in node.keywords]))
    for index, argument in enumerate(node.args):
        if is_switch(argument):
            contrary = [*node.args[:index], ast.Constant(not argument.value), *node.args[index + 1 :]]
            yield "flags", with_arguments(node, contrary)


def _of_range(node: ast.Call, arguments: list[str]) -> Iterator[tuple[str, str]]:
    first, last, step = (["0", *arguments, "1"] if len(arguments) == 1 else [*arguments, "1"])[:3]
    for begin in (f"{first} + {step}", "0"):
        if begin != first:
            yield "walks", with_arguments(node, [parsed(text) for text in (begin, last, step)])


def with_arguments(call: ast.Call, arguments: list[ast.expr]) -> str:
    return ast.unparse(ast.Call(call.func, arguments, call.keywords))


def with_function(call: ast.Call, name: str) -> str:
    return ast.unparse(ast.Call(parsed(name), call.args, call.keywords))


def swapped(items: list[Any], first: int) -> list[Any]:
    """Two neighbours in each other's place."""
    return [*items[:first], *reversed(items[first : first + 2]), *items[first + 2 :]]


def replaced(tree: ast.AST, node: ast.AST, replacement: ast.AST) -> Any:
    """A copy of the tree with another node in the place of one."""
    return copy.deepcopy(tree, {id(node): copy.deepcopy(replacement)})


def parsed(text: str, like: ast.AST | None = None) -> Any:
    if isinstance(like, ast.stmt):
        return ast.parse(text).body[0]
    if isinstance(like, ast.keyword):
        return ast.parse(f"f({text})", mode="eval").body.keywords[0]
    return ast.parse(text, mode="eval").body


def shape(node: ast.AST) -> str:
    """An expression without its names and numbers."""
    return re.sub(r"(id|value|attr)=('\w+'|[\d.]+)", "", ast.dump(node))


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func).split(".")[-1]


def names_in(target: ast.AST) -> list[str]:
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]


def arguments(call: ast.Call, called: ast.FunctionDef | None) -> Iterator[tuple[str, ast.expr]]:
    """The parameters that a call gives values to, and the values, as far as they are written one by one."""
    if called is not None and not any(isinstance(argument, ast.Starred) for argument in call.args):
        parameters = [argument.arg for argument in called.args.args if argument.arg != "self"]
        yield from zip(parameters, call.args, strict=False)
        yield from ((keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg)


def defaults(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    arguments = function.args.args
    yield from zip((argument.arg for argument in arguments[::-1]), function.args.defaults[::-1], strict=False)


def decorator(node: ast.expr) -> str:
    return ast.unparse(node).split("(")[0]


def is_call(node: ast.AST, *names: str) -> bool:
    """A call of a function, or of ``something.name``."""
    return isinstance(node, ast.Call) and name_of(node) in names


def is_switch(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def asked(test: ast.AST) -> Iterator[str]:
    """The names that are the test itself, or a side of it."""
    for side in test.values if isinstance(test, ast.BoolOp) else [test]:
        side = side.operand if isinstance(side, ast.UnaryOp) else side
        if isinstance(side, ast.Name):
            yield side.id


def is_decided_while_compiling(node: ast.AST) -> bool:
    """A comparison of a constexpr, or with None: the branch that it decides is mutated instead."""
    if not isinstance(node, ast.Compare):
        return False
    constants = [c.value for c in node.comparators if isinstance(c, ast.Constant)]
    constexpr = isinstance(node.left, ast.Name) and node.left.id.isupper()
    return constexpr or any(value is None or isinstance(value, str) for value in constants)
