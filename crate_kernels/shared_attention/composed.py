"""Shared-QKV attention in standard PyTorch calls: batched products over a slice of heads and rows at a time.

For short sequences the probabilities are kept for the backward, six products in all; for long ones they are computed again,
a seventh, and scores exist for one slice at a time only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crate_kernels.precision import arithmetic_dtype
from crate_kernels.shared_attention.op import empty_token_major, keeps_probabilities

# Elements of the scores of one slice. On a CPU the slice stays in the last cache; elsewhere it only bounds memory.
_SCORES_ON_CPU = 2**22
_SCORES_ELSEWHERE = 2**28


def forward(w: Tensor, scale: float, is_causal: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """softmax(scale * w w^T) w, and the probabilities where they are kept. Shapes as in ``op``."""
    heads = _flatten(w)
    out = torch.empty_like(heads)
    kept = heads.new_empty(*heads.shape[:2], heads.shape[1]) if keep and keeps_probabilities(w) else heads.new_empty(0)
    for head, row in _slices(heads):
        probabilities = _probabilities(heads[head], row, scale, is_causal, kept[head, row] if kept.numel() else None)
        torch.bmm(probabilities, heads[head], out=out[head, row])
    return _unflatten(out, w), kept


def backward(grad_out: Tensor, w: Tensor, out: Tensor, kept: Tensor, scale: float, is_causal: bool) -> Tensor:
    """The gradient of ``forward`` in w: as query, as key and as value, added up."""
    heads, grads = _flatten(w), _flatten(grad_out)
    grad_w = torch.zeros_like(heads)
    for head, row in _slices(heads):
        keys, queries, grad_rows = heads[head], heads[head, row], grads[head, row]
        probabilities = kept[head, row] if kept.numel() else _probabilities(keys, row, scale, is_causal)
        grad_probabilities = torch.bmm(grad_rows, keys.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
        grad_w[head].baddbmm_(probabilities.transpose(1, 2), grad_rows)
        grad_w[head].baddbmm_(grad_scores.transpose(1, 2), queries, alpha=scale)
        grad_w[head, row].baddbmm_(grad_scores, keys, alpha=scale)
    return _unflatten(grad_w, w)


def _flatten(w: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim] of any strides -> contiguous [batch * heads, tokens, head_dim], to compute with."""
    return w.to(arithmetic_dtype(w)).reshape(-1, *w.shape[2:]).contiguous()


def _unflatten(heads: Tensor, like: Tensor) -> Tensor:
    return empty_token_major(like).copy_(heads.view(like.shape))


def _slices(heads: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of heads and of rows whose scores against all tokens fit the bound."""
    count, tokens, _ = heads.shape
    bound = _SCORES_ON_CPU if heads.device.type == "cpu" else _SCORES_ELSEWHERE
    rows = min(tokens, max(1, bound // tokens))
    step = max(1, bound // (rows * tokens))
    for head in range(0, count, step):
        for row in range(0, tokens, rows):
            yield slice(head, head + step), slice(row, row + rows)


def _probabilities(
    keys: Tensor, row: slice, scale: float, is_causal: bool, destination: Tensor | None = None
) -> Tensor:
    """softmax(scale * w w^T) of the rows in question against all tokens, written to ``destination`` where there is one."""
    scores = torch.bmm(keys[:, row] * scale, keys.transpose(1, 2))
    if is_causal:
        future = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool, device=keys.device).triu(1)[row]
        scores.masked_fill_(future, float("-inf"))
    return scores.softmax(dim=-1) if destination is None else torch.softmax(scores, -1, out=destination)
