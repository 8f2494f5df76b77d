"""What operators make of their weights before a product, and how they know that it is still true of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from crate_kernels import validation
from crate_kernels.products.norm_folding import Operand

# What an operator prepares: its weights, and for ISTA the step size. Each operator has a named tuple for it.
Sources = tuple[Tensor | float | None, ...]
SourcesOfOperator = TypeVar("SourcesOfOperator", bound=Sources)


class Prepared(NamedTuple):
    """What one operator's products take of its weights, by ``prepare_layers``; checked whenever it is used.

    operands: the matrices it multiplies with, in its order.
    combined: ISTA's G = W - W^T W, else None.
    made_of: what they were made of.
    versions: where each lay and how often it had been written to, and the steps of fused optimizers, which are not counted
        there; None where it is compiled, and nothing can come between.
    """

    operands: tuple[Operand, ...]
    combined: Tensor | None
    made_of: Sources
    versions: tuple[tuple[int, int] | int | None, ...] | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.operands[0].matrix.dtype


def as_prepared(operands: tuple[Operand, ...], made_of: Sources, combined: Tensor | None = None) -> Prepared:
    """Of operands that were made just now."""
    return Prepared(operands, combined, made_of, _versions(made_of))


def checked_or_made(
    given: Prepared | None,
    made_of: SourcesOfOperator,
    dtype: torch.dtype,
    prepare: Callable[[Sequence[SourcesOfOperator], torch.dtype], list[Prepared]],
) -> Prepared:
    """What ``prepare`` makes of ``made_of``, for products in ``dtype``: made now, or before, and then still true of them.

    Inside ``torch.compile`` versions are not looked at: what a graph prepares it uses in the same run. PyTorch does not count
    writes through ``Tensor.data``, nor those to tensors made in inference mode: they go unseen.

    Raises:
        TypeError: it was not made by ``prepare_layers``.
        ValueError: it was made for another dtype, of other weights or another step size, or weights have changed since.
    """
    if given is None:
        return prepare([made_of], dtype)[0]
    if not isinstance(given, Prepared):
        raise TypeError(f"prepared: expected what prepare_layers gives, got {validation.describe(given)}")
    if given.dtype != dtype:
        raise ValueError(f"prepared: made for products in {given.dtype}, and these are in {dtype}; prepare again")
    if len(given.made_of) != len(made_of):
        raise ValueError("prepared: made for another operator")
    for then, now in zip(given.made_of, made_of, strict=True):
        if isinstance(then, (int, float)) or isinstance(now, (int, float)):
            if then != now:
                raise ValueError(f"prepared: made with step_size {then}, and this step has {now}; prepare again")
        elif then is not now:
            raise ValueError("prepared: made of other weights than it is used with; prepare again")
    if None not in (given.versions, versions := _versions(made_of)) and given.versions != versions:
        raise ValueError("prepared: weights have changed since; prepare again")
    return given


_fused_steps = 0


def _count_fused(optimizer: torch.optim.Optimizer, *_: object) -> None:
    global _fused_steps
    _fused_steps += any(group.get("fused") for group in optimizer.param_groups)


register_optimizer_step_post_hook(_count_fused)


def _versions(made_of: Sources) -> tuple[tuple[int, int] | int | None, ...] | None:
    if torch.compiler.is_compiling():
        return None
    return (*[_version(source) if isinstance(source, Tensor) else None for source in made_of], _fused_steps)


def _version(tensor: Tensor) -> tuple[int, int]:
    # Tensors of inference mode count no writes, fake ones lie nowhere.
    fake = isinstance(tensor, torch._subclasses.FakeTensor)
    return 0 if fake else tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
