"""Definition of operators for ``torch.library``: schema, shapes of results, FLOP count. Imports torch only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from inspect import Parameter
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crate_kernels._ops import add_op_namespace_prefix, ops
from crate_kernels.dtypes import no_autocast


def register(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int] = lambda *_: 0
) -> None:
    """Make ``function`` the PyTorch operator ``crate_kernels::<name>``, with its annotations for a schema.

    ``fake`` gives empty results for tensors without memory, ``flops`` takes the tensors' shapes in their place. If the last
    parameter of ``function`` is a named tuple, the schema has its fields instead, and all three get them as that tuple.

    The operator runs with its first tensor's device current, and autocast off: operands come in the dtype to multiply in. That
    is needed in backwards too, since ``loss.backward()`` may be called inside an autocast block.
    """
    kinds = get_type_hints(function)
    parameters = [p.replace(annotation=kinds[p.name]) for p in inspect.signature(function).parameters.values()]
    if hasattr(given := parameters[-1].annotation, "_fields"):
        *leading, _ = parameters
        defaults = given._field_defaults
        parameters = leading + [
            Parameter(
                field, Parameter.POSITIONAL_OR_KEYWORD, default=defaults.get(field, Parameter.empty), annotation=kind
            )
            for field, kind in get_type_hints(given).items()
        ]
        function, fake, flops = (_of_tuple(one, len(leading), given) for one in (function, fake, flops))

    def run(*arguments: Any) -> Any:
        first = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]
        with no_autocast(first), torch.cuda.device_of(first):
            return function(*arguments)

    # Python lets a function say its signature; the type of functions does not know.
    run.__signature__ = inspect.Signature(parameters, return_annotation=kinds["return"])  # type: ignore[attr-defined]
    full_name = add_op_namespace_prefix(name)
    torch.library.define(full_name, torch.library.infer_schema(run, mutates_args=()))
    torch.library.impl(full_name, "CompositeExplicitAutograd", run)
    torch.library.register_fake(full_name, fake)
    register_flop_formula(getattr(ops, name))(lambda *shapes, **_: flops(*shapes))


def _of_tuple(function: Callable[..., Any], leading: int, kind: Any) -> Callable[..., Any]:
    """``function`` as called with the fields of its last argument."""
    return lambda *arguments: function(*arguments[:leading], kind(*arguments[leading:]))


def number_as_tensor(value: float | Tensor) -> Tensor:
    """A number as operators take it. In a tensor it is no constant of a compiled graph, which so serves every value."""
    if isinstance(value, Tensor):
        return value.reshape(())
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")  # whatever the default device is


def or_empty(grads: Sequence[Tensor | None], likes: Sequence[Tensor | None]) -> list[Tensor]:
    """A schema cannot return an optional tensor: a gradient nobody asked for is an empty one. Others are like their inputs."""
    pairs = zip(grads, likes, strict=True)
    return [_empty(like) if grad is None or like is None else grad.to(like).contiguous() for grad, like in pairs]


def empty_gradients(likes: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """The fake of ``or_empty``."""
    pairs = zip(likes, needs, strict=True)
    return [like.new_empty(like.shape) if need and like is not None else _empty(like) for like, need in pairs]


def _empty(like: Tensor | None) -> Tensor:
    return torch.empty(0) if like is None else like.new_empty(0)
