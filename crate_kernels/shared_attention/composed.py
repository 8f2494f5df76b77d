"""Shared-QKV attention in standard PyTorch calls: batched products over a slice of heads and rows at a time.

Scores live in a buffer that fits the cache and never exist for the whole batch; the backward computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crate_kernels.precision import arithmetic_dtype
from crate_kernels.shared_attention.op import empty_token_major

# Elements of one buffer of scores. On a CPU a few heads of 197 x 197 stay within the caches of two cores; elsewhere the buffer
# only bounds memory (1 GiB in float32).
_SCORES_ON_CPU = 2**19
_SCORES_ELSEWHERE = 2**28


def forward(w: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(scale * w w^T) w and the log-sum-exp of each row of scores. Shapes as in ``op``."""
    heads = _flatten(w)
    out, lse = torch.empty_like(heads), heads.new_empty(heads.shape[:2])
    for head, row in _slices(heads):
        keys = heads[head]
        scores = _scores(keys, row, scale, is_causal)
        probabilities = scores.softmax(dim=-1)
        torch.bmm(probabilities, keys, out=out[head, row])
        # The largest probability of a row is exp(largest score - lse) and, at 1/tokens or more, never underflows.
        lse[head, row] = scores.amax(dim=-1) - probabilities.amax(dim=-1).log()
    return _unflatten(out, w), lse.view(w.shape[:-1])


def backward(grad_out: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float, is_causal: bool) -> Tensor:
    """The gradient of ``forward`` in w: as query, as key and as value, added up."""
    heads, grads = _flatten(w), _flatten(grad_out)
    grad_w = torch.zeros_like(heads)
    for head, row in _slices(heads):
        keys, queries, grad_rows = heads[head], heads[head, row], grads[head, row]
        probabilities = _scores(keys, row, scale, is_causal).softmax(dim=-1)
        grad_probabilities = torch.bmm(grad_rows, keys.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
        grad_w[head].baddbmm_(probabilities.transpose(1, 2), grad_rows)
        grad_w[head].baddbmm_(grad_scores.transpose(1, 2), queries, alpha=scale)
        grad_w[head, row].baddbmm_(grad_scores, keys, alpha=scale)
    return _unflatten(grad_w, w)


def _flatten(w: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim] of any strides -> contiguous [batch * heads, tokens, head_dim] to compute with."""
    return w.to(arithmetic_dtype(w)).reshape(-1, *w.shape[2:]).contiguous()


def _unflatten(heads: Tensor, like: Tensor) -> Tensor:
    return empty_token_major(like).copy_(heads.view(like.shape))


def _slices(heads: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of heads and of rows whose scores against all tokens fit the buffer."""
    count, tokens, _ = heads.shape
    budget = _SCORES_ON_CPU if heads.device.type == "cpu" else _SCORES_ELSEWHERE
    rows = min(tokens, max(1, budget // max(tokens, 1)))
    step = max(1, budget // max(rows * tokens, 1))
    for head in range(0, count, step):
        for row in range(0, tokens, rows):
            yield slice(head, head + step), slice(row, row + rows)


def _scores(keys: Tensor, row: slice, scale: float, is_causal: bool) -> Tensor:
    scores = torch.bmm(keys[:, row] * scale, keys.transpose(1, 2))
    if is_causal:
        future = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool, device=keys.device).triu(1)[row]
        scores.masked_fill_(future, float("-inf"))
    return scores
