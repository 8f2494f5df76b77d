"""The sparse step multiplies tokens once or twice: the choice between the two, and the matrix G of the one-product form."""

from __future__ import annotations

import torch
from torch import Tensor

from crate_kernels.library_products import plus_product


def one_product(tokens: int, width: int) -> bool:
    """Whether to form ``W - W^T W`` first and multiply the tokens once, rather than twice by ``W``.

    In floating-point operations, M tokens of width D cost

        forward    one product 2MD^2 + 2D^3    two products 4MD^2
        backward   one product 4MD^2 + 2D^3    two products 10MD^2, recomputing the residual

    so one product does less forward work as soon as M > D, and less backward work a good deal sooner.
    """
    return tokens > width


def combined_of(dictionary: Tensor) -> Tensor:
    """G = W - W^T W [width, width], in the dtype of W."""
    return plus_product(dictionary, dictionary.t(), dictionary, alpha=-1)


def through_combined(grad: Tensor, dictionary: Tensor, factor: float = 1, both: Tensor | None = None) -> Tensor:
    """The gradient of ``combined_of``, dW = factor * (dG - W (dG + dG^T)); all are in one dtype. ``both`` is the inner sum."""
    if both is None:
        # dG^T is copied to row-major memory first: adding rows to columns takes three times as long on a CPU.
        both = grad.t().clone(memory_format=torch.contiguous_format).add_(grad)
    return plus_product(grad, dictionary, both, beta=factor, alpha=-factor)
