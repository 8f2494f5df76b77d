"""Which of the two orders of multiplication the sparse step takes."""

from __future__ import annotations


def one_product(tokens: int, width: int) -> bool:
    """Whether to form ``W - W^T W`` first and multiply the tokens once, rather than twice by ``W``.

    In floating-point operations, M tokens of width D cost

        forward    one product 2MD^2 + 2D^3    two products 4MD^2
        backward   one product 4MD^2 + 2D^3    two products 10MD^2, recomputing the residual

    so one product does less forward work as soon as M > D, and less backward work a good deal sooner.
    """
    return tokens > width
