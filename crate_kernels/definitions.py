"""Definition of operators for ``torch.library``: schema, shapes of results, FLOP count. Imports no Triton."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from inspect import Parameter
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crate_kernels._ops import add_op_namespace_prefix, ops
from crate_kernels.dtypes import no_autocast
from crate_kernels.replay import Replayed


def register(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] = lambda *_: 0,
    *,
    replayed: bool = False,
) -> None:
    """Make ``function`` the PyTorch operator ``crate_kernels::<name>``, whose schema is made from its annotations.

    If the last parameter of ``function`` is annotated as a named tuple, the schema has the fields of the tuple in its place;
    ``function``, ``fake`` and ``flops`` are all called with the tuple. So it is with the last two, and then the names of the
    fields begin with that of their parameter.

    The operator runs with the device of its first tensor current, and with autocast off: its operands already come in the dtype
    to multiply in. Backwards need that too, since ``loss.backward()`` may be called inside an autocast block.

    Args:
        name: of the operator, without the namespace.
        function: what it does.
        fake: returns uninitialised results, for tensors that have a shape and no memory.
        flops: counts floating-point operations; it is called with the shape of each tensor instead of the tensor.
        replayed: whether the layouts of its arguments determine all that ``function`` does (``replay``).
    """
    kinds = get_type_hints(function)
    parameters = [p.replace(annotation=kinds[p.name]) for p in inspect.signature(function).parameters.values()]
    tuples = [parameter for parameter in parameters if hasattr(parameter.annotation, "_fields")]
    if tuples:
        leading = parameters[: -len(tuples)]
        parameters = leading + [field for one in tuples for field in _fields(one, prefixed=len(tuples) > 1)]
        given = [one.annotation for one in tuples]
        function, fake, flops = (_of_tuples(one, len(leading), given) for one in (function, fake, flops))

    def run(*arguments: Any) -> Any:
        first = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]
        with no_autocast(first), torch.cuda.device_of(first):
            return function(*arguments)

    # Python lets a function say its signature; the type of functions does not know.
    run.__signature__ = inspect.Signature(parameters, return_annotation=kinds["return"])  # type: ignore[attr-defined]
    full_name = add_op_namespace_prefix(name)
    torch.library.define(full_name, torch.library.infer_schema(run, mutates_args=()))
    torch.library.impl(full_name, "CompositeExplicitAutograd", Replayed(run) if replayed else run)
    torch.library.register_fake(full_name, fake)
    register_flop_formula(getattr(ops, name))(lambda *shapes, **_: flops(*shapes))


def _fields(parameter: Parameter, prefixed: bool) -> list[Parameter]:
    """A parameter for each field of the named tuple that ``parameter`` is annotated as."""
    prefix, kind = f"{parameter.name}_" if prefixed else "", parameter.annotation
    defaults, empty = kind._field_defaults, Parameter.empty
    return [
        Parameter(prefix + name, Parameter.POSITIONAL_OR_KEYWORD, default=defaults.get(name, empty), annotation=type_)
        for name, type_ in get_type_hints(kind).items()
    ]


def _of_tuples(function: Callable[..., Any], leading: int, kinds: Sequence[Any]) -> Callable[..., Any]:
    """``function``, to be called with the fields of its last arguments one by one."""
    ends = list(itertools.accumulate((len(kind._fields) for kind in kinds), initial=leading))
    spans = list(zip(kinds, itertools.pairwise(ends), strict=True))
    return lambda *arguments: function(
        *arguments[:leading], *[kind(*arguments[start:end]) for kind, (start, end) in spans]
    )


def number_as_tensor(value: float | Tensor) -> Tensor:
    """A number as operators take it: in a 0-dim tensor, so that one compiled graph serves all its values."""
    if isinstance(value, Tensor):
        return value.reshape(())
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")  # whatever the default device is


def or_empty(grads: Sequence[Tensor | None], likes: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients as operators return them: like their inputs, and empty where None, as a schema has no optional results."""
    pairs = zip(grads, likes, strict=True)
    return [_empty(like) if grad is None or like is None else grad.to(like).contiguous() for grad, like in pairs]


def empty_gradients(likes: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """The fake of ``or_empty``."""
    pairs = zip(likes, needs, strict=True)
    return [like.new_empty(like.shape) if need and like is not None else _empty(like) for like, need in pairs]


def _empty(like: Tensor | None) -> Tensor:
    return torch.empty(0) if like is None else like.new_empty(0)
