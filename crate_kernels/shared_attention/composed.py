"""Shared-QKV attention in standard PyTorch calls.

On a CPU that computes in float32 or float64: PyTorch's own flash attention, its three gradients added up. Elsewhere (CUDA, and
CPUs with 16-bit matrix instructions, where flash attention's backward is slow): batched products over a slice of heads and
rows at a time. Those keep the probabilities of short sequences for the backward on a CPU, six products in all; else they
compute them again, a seventh, and scores exist for one slice at a time only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crate_kernels.precision import arithmetic_dtype
from crate_kernels.shared_attention.op import composed_keeps, empty_token_major

# Elements of the scores of one slice. On a CPU the slice stays in the last cache; elsewhere it only bounds memory.
_SCORES_ON_CPU = 2**21
_SCORES_ELSEWHERE = 2**28


def forward(w: Tensor, scale: float, is_causal: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """softmax(scale * w w^T) w, and what ``composed_keeps`` says. Shapes as in ``op``."""
    if composed_keeps(w) == "log-sum-exp":
        heads = _features_in_a_row(w)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            heads, heads, heads, is_causal=is_causal, scale=scale
        )
        return _unflatten(out, w), lse.contiguous()
    heads = _flatten(w)
    out = torch.empty_like(heads)
    keeps_probabilities = keep and composed_keeps(w) == "probabilities"
    kept = heads.new_empty(*heads.shape[:2], heads.shape[1]) if keeps_probabilities else heads.new_empty(0)
    for head, row in _slices(heads):
        probabilities = _probabilities(heads[head], row, scale, is_causal, kept[head, row] if kept.numel() else None)
        torch.bmm(probabilities, heads[head], out=out[head, row])
    return _unflatten(out.view(w.shape), w), kept


def backward(grad_out: Tensor, w: Tensor, out: Tensor, kept: Tensor, scale: float, is_causal: bool) -> Tensor:
    """The gradient of ``forward`` in w: as query, as key and as value, added up."""
    if composed_keeps(w) == "log-sum-exp":
        heads, grads, out = _features_in_a_row(w), _features_in_a_row(grad_out), _features_in_a_row(out)
        as_query, as_key, as_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads, heads, heads, heads, out, kept, 0.0, is_causal, scale=scale
        )
        return _unflatten(as_query.add_(as_key).add_(as_value), w)
    heads, grads = _flatten(w), _flatten(grad_out)
    grad_w = torch.empty_like(heads)
    for head, row in _slices(heads):
        keys, queries, grad_rows = heads[head], heads[head, row], grads[head, row]
        probabilities = kept[head, row] if kept.numel() else _probabilities(keys, row, scale, is_causal)
        grad_probabilities = torch.bmm(grad_rows, keys.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(
            grad_probabilities, probabilities, -1, probabilities.dtype, grad_input=grad_probabilities
        )
        # The first slice of rows writes all rows of the gradient, the others add to it.
        grad_w[head].baddbmm_(probabilities.transpose(1, 2), grad_rows, beta=0 if row.start == 0 else 1)
        grad_w[head].baddbmm_(grad_scores.transpose(1, 2), queries, alpha=scale)
        grad_w[head, row].baddbmm_(grad_scores, keys, alpha=scale)
    return _unflatten(grad_w.view(w.shape), w)


def _features_in_a_row(w: Tensor) -> Tensor:
    """w in the dtype to compute with, in the strides that flash attention takes: rows of features, one after another."""
    w = w.to(arithmetic_dtype(w))
    return w if w.stride(-1) == 1 and w.stride(-2) >= w.shape[-1] else w.contiguous()


def _flatten(w: Tensor) -> Tensor:
    """[batch, heads, tokens, head_dim] of any strides -> contiguous [batch * heads, tokens, head_dim], to compute with."""
    return w.to(arithmetic_dtype(w)).reshape(-1, *w.shape[2:]).contiguous()


def _unflatten(result: Tensor, like: Tensor) -> Tensor:
    """The result in the dtype and the layout that the operator promises; itself where it has both."""
    promised = empty_token_major(like)
    return result if (result.dtype, result.stride()) == (promised.dtype, promised.stride()) else promised.copy_(result)


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
    # Fresh memory costs as much as the product that fills it: scores become probabilities in place.
    queries = keys[:, row]
    scores = queries.new_empty(*queries.shape[:2], keys.shape[1]) if destination is None else destination
    scores.baddbmm_(queries, keys.transpose(1, 2), beta=0, alpha=scale)
    if is_causal:
        future = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool, device=keys.device).triu(1)[row]
        scores.masked_fill_(future, float("-inf"))
    return torch.softmax(scores, -1, out=scores)
