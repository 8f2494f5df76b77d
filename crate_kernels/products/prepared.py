"""The matrices that operators make of their weights before a product, and the check that weights have not changed since."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from crate_kernels import validation
from crate_kernels.products.norm_folding import Operand

# What an operator prepares: its weights, and for ISTA the step size. Each operator has a named tuple for it.
Sources = tuple[Tensor | float | None, ...]
SourcesOfOperator = TypeVar("SourcesOfOperator", bound=Sources)


class Prepared(NamedTuple):
    """What ``prepare_layers`` makes of one operator's weights; checked whenever it is used.

    operands: the matrices that the operator multiplies with, in its order.
    combined: ISTA's G = W - W^T W; None for other operators.
    made_of: the weights.
    versions: the address of each weight and PyTorch's count of writes to it; then the number of steps of fused optimizers,
        whose writes PyTorch does not count. None inside ``torch.compile``, where a graph prepares and uses in one run.
    """

    operands: tuple[Operand, ...]
    combined: Tensor | None
    made_of: Sources
    versions: tuple[tuple[int, int] | int | None, ...] | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products."""
        return self.operands[0].matrix.dtype


def as_prepared(operands: tuple[Operand, ...], made_of: Sources, combined: Tensor | None = None) -> Prepared:
    """Operands that were made just now, with the versions of what they were made of."""
    return Prepared(operands, combined, made_of, _versions(made_of))


def checked_or_made(
    given: Prepared | None,
    made_of: SourcesOfOperator,
    dtype: torch.dtype,
    prepare: Callable[[Sequence[SourcesOfOperator], torch.dtype], list[Prepared]],
) -> Prepared:
    """``given``, after a check that it was made of ``made_of`` as it is now; ``prepare`` makes it where it is None.

    Inside ``torch.compile`` versions are not compared: a graph uses in the same run what it has prepared. Writes through
    ``Tensor.data`` and to tensors made in inference mode go unseen, as PyTorch does not count them.

    Raises:
        TypeError: ``given`` was not made by ``prepare_layers``.
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
    # Tensors made in inference mode have no count of writes, and fake tensors no address.
    address = 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()
    return address, 0 if tensor.is_inference() else tensor._version
