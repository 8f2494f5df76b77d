"""What the autograd functions around operators share: saving arguments, second derivatives. Imports no Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from crate_kernels.dtypes import no_autocast
from crate_kernels.private_torch import is_batched_gradient, is_transformed

# Computes an operator's result in PyTorch's own calls, from its first tensor and the named tuple of its other arguments.
Formula = Callable[[Tensor, Any], Tensor]


def save(ctx: Any, given: Any, *tensors: Tensor) -> None:
    """Keep an operator's arguments ``given``, a tuple, and ``tensors`` for the backward, which calls ``saved``."""
    in_given = [value if isinstance(value, Tensor) else None for value in given]
    ctx.given = _like(given, [None if one is not None else value for one, value in zip(in_given, given, strict=True)])
    ctx.save_for_backward(*in_given, *tensors)


def saved(ctx: Any) -> tuple[Any, Sequence[Tensor]]:
    """The tuple and the tensors that were given to ``save``."""
    count, tensors = len(ctx.given), ctx.saved_tensors
    pairs = zip(ctx.given, tensors[:count], strict=True)
    return _like(ctx.given, [value if tensor is None else tensor for value, tensor in pairs]), tensors[count:]


def _like(given: Any, values: list[Any]) -> Any:
    """``values`` as a tuple of the kind of ``given``."""
    return type(given)(*values) if hasattr(given, "_fields") else tuple(values)


def asked(grads: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """A gradient or None for every input: those ``grads`` that are wanted. Inputs beyond the last of ``grads`` get None."""
    found = [grad if want else None for grad, want in zip(grads, wanted, strict=False)]
    return (*found, *[None] * (len(wanted) - len(found)))


def derivative(
    operator: str, formula_of: Callable[[Any], Formula | None] = lambda ctx: None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the ``backward`` of an autograd function whose inputs are (first tensor, ..., *given), as saved by ``save``.

    The operators that a backward calls have no derivatives. So where its result may be differentiated again
    (``create_graph=True``), or where gradients come in a batch (``is_grads_batched``), autograd differentiates a formula instead.

    Args:
        operator: its name, for error messages.
        formula_of: returns the formula for a ``ctx``, raises if there is a reason to have none, or returns None for Triton
            kernels: their first derivatives are returned as usual, and raise if they are differentiated.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def guarded(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
            # torch.compile differentiates once, and refuses to do it twice.
            if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or _is_transformed(grad)):
                return backward(ctx, grad, *others)
            formula = formula_of(ctx)
            return _by_kernels(operator, backward, ctx, grad) if formula is None else _by_formula(formula, ctx, grad)

        return guarded

    return decorate


def _is_transformed(grad: Tensor) -> bool:
    return is_transformed() or is_batched_gradient(grad)


def _by_formula(formula: Formula, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    given, (x, *_) = saved(ctx)
    needs, between = ctx.needs_input_grad, len(ctx.needs_input_grad) - 1 - len(given)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), no_autocast(x):
        # Views: were one argument computed from another, gradients would otherwise flow back along that path as well.
        views = [value.view_as(value) if isinstance(value, Tensor) else value for value in (x, *given)]
        out = formula(views[0], type(given)(*views[1:])).to(grad.dtype)
        wanted = [view for view, need in zip(views, (needs[0], *needs[1 + between :]), strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph, allow_unused=True))
    grads = [next(found) if need else None for need in (needs[0], *needs[1 + between :])]
    return grads[0], *[None] * between, *grads[1:]


def _by_kernels(operator: str, backward: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if _is_transformed(grad):
        raise RuntimeError(_refused(operator, "no backward of batched gradients or under torch.func"))
    with torch.no_grad():
        grads = backward(ctx, grad)
    given, tensors = saved(ctx)
    sources = [one for one in (grad, *tensors, *given) if isinstance(one, Tensor) and one.requires_grad]
    present = [one for one in grads if one is not None]
    tied = iter(_OnceDifferentiable.apply(operator, len(present), *present, *sources))
    return tuple(None if one is None else next(tied) for one in grads)


class _OnceDifferentiable(torch.autograd.Function):
    """Returns the first ``count`` tensors. To autograd they depend on all tensors, and their backward raises."""

    @staticmethod
    def forward(ctx: Any, operator: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.operator = operator
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(_refused(ctx.operator, "no second derivative"))


def _refused(operator: str, what: str) -> str:
    return f'{operator}: the Triton kernels have {what}; run the forward under crate_kernels.use("composed")'
