"""Shared-QKV attention in standard PyTorch calls.

Batched products over some heads at a time, of one head's rows in parts where even they are too many. They keep the
probabilities of short sequences for the backward on a CPU, five products in all; else they compute them again, a sixth (and a
seventh where rows are parted), and scores exist for some heads at a time only. Dropout is drawn part by part, and again from the
same seed in the backward.

On a CPU that computes in float32 or float64, long sequences without dropout take PyTorch's own flash attention, its three
gradients added up. In 16 bits, and of short sequences, its backward is slower than the products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from crate_kernels.precision import arithmetic_dtype
from crate_kernels.shared_attention.op import composed_keeps, empty_token_major, takes_flash_attention

# Bytes of the scores of one slice. On a CPU the slice stays in cache between the calls; elsewhere it only bounds memory.
_SCORES_ON_CPU = 2**21
_SCORES_ELSEWHERE = 2**29


def forward(
    w: Tensor,
    scale: float,
    is_causal: bool,
    keep: bool,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * w w^T) w, and what ``composed_keeps`` says. Shapes as in ``op``."""
    padding = _padding(w, lengths)
    if takes_flash_attention(w, dropout):
        heads = _without(padding, _features_in_a_row(w))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            heads, heads, heads, is_causal=is_causal, attn_mask=_penalty(padding, heads), scale=scale
        )
        lse = lse.contiguous() if padding is None else lse.masked_fill(padding, float("-inf")).contiguous()
        return _unflatten(_without(padding, out), w), lse

    out, keeps, stored = empty_token_major(w), composed_keeps(w, dropout, return_lse), _without(padding, w)
    kept = w.new_empty(0, dtype=arithmetic_dtype(w))
    if keeps == "probabilities" and keep:
        kept = kept.new_empty(*w.shape[:3], w.shape[2])
    elif keeps == "log-sum-exp":
        kept = w.new_empty(w.shape[:3], dtype=torch.promote_types(w.dtype, torch.float32))
    generator, slices = _generator(w, dropout, seed), list(_slices(w))
    room = _room(w, slices)
    for some, rows in slices:
        keys = _stacked(stored[some])
        for row in rows:
            scores = _scores(keys, row, scale, is_causal, _of_heads(padding, w, some), room)
            if keeps == "log-sum-exp":
                lse = scores.to(kept.dtype).logsumexp(-1)
                kept[some][..., row] = lse.view_as(kept[some][..., row])
            destination = kept[some].flatten(0, 1)[:, row] if kept.ndim == 4 else scores
            probabilities = torch.softmax(scores, -1, out=destination)
            if dropout:
                probabilities = probabilities * _factors(probabilities, dropout, generator)
            out_rows = out[some][..., row, :]
            out_rows.copy_(torch.bmm(probabilities, keys).view_as(out_rows))
    if padding is not None:
        out.masked_fill_(padding[..., None], 0.0)
        if keeps == "log-sum-exp":
            kept.masked_fill_(padding, float("-inf"))
    return out, kept


def backward(
    grad_out: Tensor,
    w: Tensor,
    out: Tensor,
    kept: Tensor,
    scale: float,
    is_causal: bool,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The gradient of ``forward`` in w: as query, as key and as value, added up."""
    padding = _padding(w, lengths)
    if takes_flash_attention(w, dropout):
        heads, grads, out = (_without(padding, _features_in_a_row(tensor)) for tensor in (w, grad_out, out))
        # Rows of padding have zero scores and a zero gradient; with a finite log-sum-exp they add zero.
        lse = kept if padding is None else kept.masked_fill(padding, 0.0)
        as_query, as_key, as_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads, heads, heads, heads, out, lse, 0.0, is_causal, attn_mask=_penalty(padding, heads), scale=scale
        )
        return _unflatten(as_query.add_(as_key).add_(as_value), w)

    grad_w, stored, grads = empty_token_major(w), _without(padding, w), _without(padding, grad_out)
    generator, slices = _generator(w, dropout, seed), list(_slices(w))
    room, second_room = _room(w, slices), _room(w, slices)
    for some, rows in slices:
        keys, all_grads = _stacked(stored[some]), _stacked(grads[some])
        grad_keys = torch.zeros_like(keys) if len(rows) > 1 else torch.empty_like(keys)
        for row in rows:
            queries, grad_rows = keys[:, row], all_grads[:, row]
            if kept.ndim == 4:
                probabilities = kept[some].flatten(0, 1)[:, row]
            else:
                scores = _scores(keys, row, scale, is_causal, _of_heads(padding, w, some), second_room)
                probabilities = torch.softmax(scores, -1, out=scores)
            grad_probabilities = torch.bmm(grad_rows, keys.transpose(1, 2), out=_of_room(room, queries, keys))
            dropped = probabilities
            if dropout:
                factors = _factors(probabilities, dropout, generator)
                grad_probabilities *= factors
                dropped = factors.mul_(probabilities)
            grad_scores = torch._softmax_backward_data(
                grad_probabilities, probabilities, -1, probabilities.dtype, grad_input=grad_probabilities
            )
            if len(rows) == 1:  # as query and as key in one product
                torch.bmm(dropped.transpose(1, 2), grad_rows, out=grad_keys)
                transposed = _of_room(second_room, queries, keys).copy_(grad_scores.transpose(1, 2))
                grad_scores = transposed.add_(grad_scores)
            else:
                grad_keys.baddbmm_(dropped.transpose(1, 2), grad_rows)
                grad_keys.baddbmm_(grad_scores.transpose(1, 2), queries, alpha=scale)
            grad_keys[:, row].baddbmm_(grad_scores, keys, alpha=scale)
        grad_w[some].copy_(grad_keys.view_as(grad_w[some]))
    return grad_w if padding is None else grad_w.masked_fill_(padding[..., None], 0.0)


def _padding(w: Tensor, lengths: Tensor | None) -> Tensor | None:
    """True [batch, 1, tokens] for tokens that are padding; None where no sample has a length of its own."""
    return None if lengths is None else (torch.arange(w.shape[2], device=w.device) >= lengths[:, None])[:, None]


def _without(padding: Tensor | None, rows: Tensor) -> Tensor:
    """Rows [batch, heads, tokens, head_dim] with zeros for padding, so that nothing stored there gets anywhere."""
    return rows if padding is None else rows.masked_fill(padding[..., None], 0.0)


def _penalty(padding: Tensor | None, heads: Tensor) -> Tensor | None:
    """What to add to scores, [batch, 1, 1, tokens]: -inf for keys that are padding."""
    return None if padding is None else heads.new_zeros(padding.shape).masked_fill_(padding, float("-inf"))[:, :, None]


def _features_in_a_row(w: Tensor) -> Tensor:
    """w in the dtype to compute with, in the strides that flash attention takes: rows of features, one after another."""
    w = w.to(arithmetic_dtype(w))
    return w if w.stride(-1) == 1 and w.stride(-2) >= w.shape[-1] else w.contiguous()


def _stacked(heads: Tensor) -> Tensor:
    """Heads [samples, heads, tokens, head_dim] of any strides as [samples * heads, tokens, head_dim], to compute with."""
    return heads.to(arithmetic_dtype(heads)).reshape(-1, *heads.shape[2:]).contiguous()


def _unflatten(result: Tensor, like: Tensor) -> Tensor:
    """The result in the dtype and the layout that the operator promises; itself where it has both."""
    promised = empty_token_major(like)
    return result if (result.dtype, result.stride()) == (promised.dtype, promised.stride()) else promised.copy_(result)


def _slices(w: Tensor) -> Iterator[tuple[tuple[slice, slice], list[slice]]]:
    """(samples, heads) whose scores against all tokens fit the bound, or one head, and its rows in parts that do."""
    batch, heads, tokens, _ = w.shape
    bound = (_SCORES_ON_CPU if w.device.type == "cpu" else _SCORES_ELSEWHERE) // arithmetic_dtype(w).itemsize
    rows = min(tokens, max(1, bound // tokens))
    most = max(1, bound // (rows * tokens))
    for samples in _equal_parts(batch, most // heads):
        for some in _equal_parts(heads, most):
            yield (samples, some), list(_equal_parts(tokens, rows))


def _room(w: Tensor, slices: list[tuple[tuple[slice, slice], list[slice]]]) -> Tensor:
    """Memory for the scores of any slice; the first is the largest.

    All slices share it: fresh memory costs as much as the product that fills it, and memory just used is still in cache.
    """
    elements = 0
    if slices:
        some, rows = slices[0]
        elements = w[some][..., rows[0], :].shape[:3].numel() * w.shape[2]
    return w.new_empty(elements, dtype=arithmetic_dtype(w))


def _of_room(room: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The part of the room that scores of these queries against these keys take, in their shape."""
    shape = (*queries.shape[:2], keys.shape[1])
    return room[: math.prod(shape)].view(shape)


def _equal_parts(size: int, most: int) -> Iterator[slice]:
    """range(size) in as few parts as may be, of at most ``most``, and of at least one."""
    if size:
        parts = -(-size // max(1, most))
        step = -(-size // parts)
        yield from (slice(start, min(size, start + step)) for start in range(0, size, step))


def _of_heads(padding: Tensor | None, w: Tensor, some: tuple[slice, slice]) -> Tensor | None:
    """The padding of some heads, [samples * heads, tokens]."""
    return None if padding is None else padding.expand(w.shape[:3])[some].reshape(-1, w.shape[2])


def _scores(keys: Tensor, row: slice, scale: float, is_causal: bool, padding: Tensor | None, room: Tensor) -> Tensor:
    """scale * w w^T of the rows in question against all tokens, in ``room``; -inf for masked keys."""
    queries = keys[:, row]
    scores = _of_room(room, queries, keys).baddbmm_(queries, keys.transpose(1, 2), beta=0, alpha=scale)
    if is_causal:
        future = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool, device=keys.device).triu(1)[row]
        scores.masked_fill_(future, float("-inf"))
    if padding is not None:
        scores.masked_fill_(padding[:, None], float("-inf"))
    return scores


def _generator(w: Tensor, dropout: float, seed: Tensor | None) -> torch.Generator | None:
    return torch.Generator(w.device).manual_seed(int(seed)) if dropout else None


def _factors(probabilities: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
    """What dropout multiplies the probabilities with, 0 or 1 / (1 - dropout): the generator's next."""
    return torch.empty_like(probabilities).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
