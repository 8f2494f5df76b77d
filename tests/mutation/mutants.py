"""Functions with one mistake each, made from the syntax tree, of ``@triton.jit`` functions and of plain Python alike.

    signs         a + b -> a - b, a - b -> a + b, -a -> a, x += a -> x -= a
    terms         a + b -> a or b, a - b -> a, x += a -> nothing, x = f(x) -> nothing, a call for its effect -> nothing
    accumulation  x += a -> x = a, dot(a, b, x) -> dot(a, b)
    factors       a * b -> a or b, a / b -> a, 1 / a -> a, a ** b -> a, x *= a -> nothing, f(a, ...) -> a for our own functions
                  and those of ``_UNARY``
    masks         mask=... -> nothing, its fill of zero -> one, a & b and a | b -> a or b, a | b -> a | True,
                  where(c, a, b) -> a or b, -inf -> 0
    comparisons   < and <=, > and >=, == and != for each other; a < b -> a > b; a != b -> a > b; a and b, a or b -> one side
    branches      if c -> never, and always where there is an else; a if c else b -> a or b; where(c, a, b) -> where(c, b, a);
                  where(a <= b, 0, c) -> where(a > b, c, 0), which only NaN tells apart
    flags         True, False and flags as arguments -> their contrary; a flag that is left to its default, too
    operands      // and % for each other, [0] and [1], 0.0 and 1.0 as arguments, 3 -> 2 in arithmetic
    order         neighbours of one kind among arguments, targets and results change places
    names         a name -> another that is used or made in the same way: an argument in the same place of the same function,
                  what the same call made, what the same statement binds
    functions     a function -> another of the same arguments: rectify and soft_threshold, minimum and maximum, sin and cos
    casts         a.to(dtype) -> a
    walks         range(a, b, c) -> from a + c, or from 0

Not made are those that cannot show: 64-bit addresses and float32 sums of ``tl`` casts, what a store casts anyway, how often a
loop is pipelined (``num_stages``), a branch that is decided while compiling other than as a branch, what an exception says.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import CodeType, FunctionType, ModuleType
from typing import Any

from mutation.syntax import (
    STORES,
    SYMMETRIC,
    UNSEEN_KEYWORDS,
    UNTOUCHED,
    arguments,
    asked,
    decorator,
    defaults,
    is_call,
    is_decided_while_compiling,
    is_number,
    is_switch,
    mistakes,
    name_of,
    names_in,
    parsed,
    replaced,
    shape,
    swapped,
    with_arguments,
    with_function,
)

# What differs little between tensors that may be mistaken for one another.
_OF_ALIKE = ("shape", "device", "new_empty", "new_zeros", "ndim")

Mistake = tuple[str, ast.AST, str]
"""Its kind, the node, and what is written instead."""


@dataclass(frozen=True)
class Mutant:
    """One mistake: ``name`` says what and where; in ``function`` (of a class with its name before) one node is another."""

    kind: str
    function: str
    name: str
    node: ast.AST
    replacement: ast.AST


class Source:
    """A module's functions and methods, and their mutants. Of a module with ``@triton.jit`` functions, just those."""

    def __init__(self, module: ModuleType, *used: Source) -> None:
        """``used`` are those whose functions it calls."""
        self.module = module
        body = ast.parse(inspect.getsource(module)).body
        methods = [(f"{c.name}.", m) for c in body if isinstance(c, ast.ClassDef) for m in c.body]
        functions = {
            prefix + node.name: node
            for prefix, node in [("", node) for node in body] + methods
            if isinstance(node, ast.FunctionDef)
            and not node.name.endswith(("__repr__", "extra_repr"))
            and "abstractmethod" not in map(decorator, node.decorator_list)
        }
        kernels = {
            name: node for name, node in functions.items() if "triton.jit" in map(decorator, node.decorator_list)
        }
        self.functions, self.of_kernels = kernels or functions, bool(kernels)
        self._callables = {name: tree for source in used for name, tree in source._callables.items()}
        self._callables |= {name.split(".")[-1]: tree for name, tree in self.functions.items()}
        self._flags, self._roles = self._find_flags(used), self._find_roles()

    def function(self, name: str) -> FunctionType:
        """The plain function that runs when the one of this name is called: its code is what a mistake changes."""
        found: Any = self.module
        for part in name.split("."):
            found = inspect.getattr_static(found, part)
        if hasattr(found, "rewrite"):  # of Triton's interpreter
            return found.rewrite()
        found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        return inspect.unwrap(found)

    @contextmanager
    def grafted(self, mutant: Mutant) -> Iterator[None]:
        """The function with the mistake, for whoever has it, under whatever name."""
        function = self.function(mutant.function)
        own = function.__code__
        function.__code__ = self._code(mutant)
        try:
            yield
        finally:
            function.__code__ = own

    def _code(self, mutant: Mutant) -> CodeType:
        tree = self.functions[mutant.function]
        tree = copy.deepcopy(tree, {id(mutant.node): copy.deepcopy(mutant.replacement)})
        tree.decorator_list, tree.args.defaults, tree.args.kw_defaults = [], [], [None] * len(tree.args.kwonlyargs)
        found = vars(self.module)[mutant.function.split(".")[0]]
        if hasattr(found, "rewriter"):
            tree = found.rewriter.ast_transformer.visit(tree)
        tree.name = "mutant"  # not its own name: what calls itself would not find it among the module's
        # A method that says ``super()`` has its class from a scope around it.
        scope = ast.parse("def scope():\n    __class__ = None").body[0]
        scope.body.append(tree)
        code = compile(ast.fix_missing_locations(ast.Module([scope], [])), inspect.getfile(self.module), "exec")
        for name in ("scope", "mutant"):
            code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
        return code

    @cached_property
    def mutants(self) -> list[Mutant]:
        """All of them, function by function."""
        found, seen = [], Counter()
        for function, tree in self.functions.items():
            for kind, node, after in self._mistakes(tree):
                before, replacement = ast.unparse(node), parsed(after, node)
                if before == (after := ast.unparse(replacement)):
                    continue
                name = f"{function}: {before} -> {after}"
                seen[name] += 1
                place = f" (place {seen[name]})" if seen[name] > 1 else ""
                found.append(Mutant(kind, function, name + place, node, replacement))
        return found

    def _mistakes(self, function: ast.FunctionDef) -> Iterator[Mistake]:
        parameters = {argument.arg for argument in function.args.args}
        sibling = self._siblings(function)

        def walk(node: ast.AST, stored: bool = False, is_argument: bool = False) -> Iterator[Mistake]:
            if isinstance(node, ast.Raise) or is_call(node, *UNTOUCHED):
                return
            if isinstance(node, ast.Attribute) and node.attr in _OF_ALIKE:
                return
            found = [*mistakes(node, parameters), *self._of_module(node)]
            names = node.args if isinstance(node, ast.Call) else [node] if not is_argument else []
            for name in names:
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load) and (other := sibling(name)):
                    found.append(("names", ast.unparse(replaced(node, name, ast.Name(other)))))
            for kind, after in dict.fromkeys(found):
                if not (stored and kind == "casts"):
                    yield kind, node, after
            if isinstance(node, ast.If):
                yield from (("branches", node.test, after) for after in ("False", "True")[: 1 + bool(node.orelse)])
            for child in ast.iter_child_nodes(node):
                unseen = isinstance(child, ast.keyword) and child.arg in UNSEEN_KEYWORDS
                if not (unseen or is_decided_while_compiling(child) or child is getattr(node, "annotation", None)):
                    yield from walk(child, is_call(node, *STORES), isinstance(node, ast.Call) and child in node.args)

        for statement in function.body:
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                yield from walk(statement)

    def _calls(self) -> Iterator[tuple[ast.Call, ast.FunctionDef | None]]:
        """All calls, and the functions of this module that they call."""
        for tree in self.functions.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    yield node, self._called(node)

    def _called(self, call: ast.Call) -> ast.FunctionDef | None:
        is_ours = isinstance(call.func, ast.Name) or ast.unparse(call.func).startswith("self.")
        return self._callables.get(name_of(call)) if is_ours else None

    def _find_flags(self, used: tuple[Source, ...]) -> set[str]:
        """The parameters that are True or False: those that are said or asked to be, and what is passed on for them."""
        flags = {flag for source in used for flag in source._flags}
        for tree in self.functions.values():
            for argument in (*tree.args.args, *tree.args.kwonlyargs):
                if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "bool":
                    flags.add(argument.arg)
            for node in ast.walk(tree):
                if isinstance(node, ast.If | ast.IfExp | ast.BinOp):
                    tests = node.right if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) else node
                    flags |= {name for name in asked(getattr(tests, "test", tests)) if name.isupper()}
        for _ in range(3):  # through so many functions
            for call, called in self._calls():
                for parameter, value in arguments(call, called):
                    if parameter in flags and isinstance(value, ast.Name) and value.id.isupper():
                        flags.add(value.id)
        return flags

    def _find_roles(self) -> dict[str, set[Any]]:
        """What names are used and made as: arguments of a function in a place, results of a function, one of a tuple."""
        roles = defaultdict(set)
        for call, _ in self._calls():
            for place, value in enumerate(call.args):
                if isinstance(value, ast.Name):
                    roles[value.id].add((name_of(call), place))
        for tree in self.functions.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.Assign):
                    targets = names_in(node.targets[0])
                    made_by = node.value
                    while isinstance(made_by, ast.BinOp) or is_call(made_by, "to"):
                        made_by = made_by.left if isinstance(made_by, ast.BinOp) else made_by.func.value
                    for target in targets:
                        if len(targets) > 1:
                            roles[target].add(tuple(targets))
                        elif isinstance(made_by, ast.Call):
                            roles[target].add(name_of(made_by))
        return roles

    def _siblings(self, function: ast.FunctionDef) -> Callable[[ast.Name], str | None]:
        bound = {argument.arg: 0 for argument in (*function.args.args, *function.args.kwonlyargs)}
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.setdefault(node.id, node.end_lineno)
        names = [name for name in bound if not name.isupper() and name not in self._flags | {"self", "_"}]

        def sibling(node: ast.Name) -> str | None:
            if node.id not in names:
                return None
            place = names.index(node.id)
            for name in (*names[place + 1 :], *names[:place]):
                if self._roles[name] & self._roles[node.id] and bound[name] < node.lineno:
                    return name
            return None

        return sibling

    def _of_module(self, node: ast.AST) -> Iterator[tuple[str, str]]:
        """What one node may become, as the functions of this module are."""
        if not isinstance(node, ast.Call):
            return
        called = self._called(node)
        if name_of(node) in SYMMETRIC:
            return
        for first, second in pairwise(range(len(node.args))):
            if self._are_alike(node, node.args[first], node.args[second]):
                yield "order", with_arguments(node, swapped(node.args, first))
        if called is None:
            return
        for other, tree in self._callables.items():
            if tree is not called and isinstance(node.func, ast.Name) and ast.dump(tree.args) == ast.dump(called.args):
                yield "functions", with_function(node, other)
        if node.args and not any(is_call(n, "load", "load_part", *STORES) for n in ast.walk(called)):
            yield "factors", ast.unparse(node.args[0])
        given = dict(arguments(node, called))
        for parameter, value in given.items():
            if parameter in self._flags and isinstance(value, ast.Name):
                yield "flags", ast.unparse(replaced(node, value, ast.UnaryOp(ast.Not(), value)))
        for parameter, default in defaults(called):
            if parameter not in given and is_switch(default):
                yield "flags", f"{ast.unparse(node)[:-1]}, {parameter}={not default.value})"
        for value in node.args:
            if isinstance(value, ast.Constant) and type(value.value) is float and value.value in (0, 1):
                yield "operands", ast.unparse(replaced(node, value, ast.Constant(1 - value.value)))

    def _are_alike(self, call: ast.Call, first: ast.expr, second: ast.expr) -> bool:
        """Whether two arguments may be mistaken for one another."""
        if isinstance(first, ast.Name) and isinstance(second, ast.Name):
            words = [set(name.id.split("_")) for name in (first, second)]
            return not self.of_kernels or (bool(words[0] & words[1]) and first.id.isupper() == second.id.isupper())
        if len(call.args) > 3 and isinstance(first, ast.Name) and is_number(second):
            return not first.id.isupper()
        return not isinstance(first, ast.Name | ast.Constant) and shape(first) == shape(second)
