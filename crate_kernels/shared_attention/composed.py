"""Shared-QKV attention in standard PyTorch calls.

Batched products, for a few heads at a time so that their scores stay small, and for a part of a head's rows where one head's
scores are too large. On a CPU the probabilities of short sequences are kept, and the backward takes four products more. Else it
computes them again with one more product, and another one where rows are in parts. Dropout is drawn part by part, and in the
backward again from the same seed.

On a CPU, long sequences in float32 or float64 without dropout take PyTorch's own flash attention, and its three gradients are
added up. In 16 bits and for short sequences its backward is slower than the products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crate_kernels.cpu import arithmetic_dtype
from crate_kernels.private_torch import cpu_flash_attention, cpu_flash_attention_backward, softmax_backward_
from crate_kernels.shared_attention.mask import Mask
from crate_kernels.shared_attention.op import (
    AttentionArguments,
    composed_keeps,
    empty_token_major,
    takes_flash_attention,
)

# Bytes of the scores of one slice. On a CPU the slice stays in cache between the calls; elsewhere it only bounds memory.
_SCORES_ON_CPU = 2**21
_SCORES_ELSEWHERE = 2**29


def forward(w: Tensor, given: AttentionArguments) -> tuple[Tensor, Tensor]:
    """softmax(scale * w w^T) w, and what ``op.composed_keeps`` says is kept. Arguments as in ``op``."""
    scale, keep, _, dropout, seed, *_ = given
    mask = given.mask
    padding, idle = mask.padding(w), mask.idle(w)
    if takes_flash_attention(w, given):
        heads = _without(padding, _features_in_a_row(w))
        out, lse = cpu_flash_attention(heads, is_causal=mask.is_causal, attn_mask=_penalty(padding, heads), scale=scale)
        lse = lse.contiguous() if padding is None else lse.masked_fill(padding, float("-inf")).contiguous()
        return _unflatten(_without(padding, out), w), lse

    part, (tokens, features), keeps = _Part.of(w), w.shape[2:], composed_keeps(w, given)
    key_room, result_room = part.room(w, tokens, features), part.room(w, part.rows, features)
    score_room = part.room(w, part.rows, tokens)
    out, kept, kept_dtype = empty_token_major(w), None, w.dtype
    if keeps == "log-sum-exp":
        kept_dtype = torch.promote_types(w.dtype, torch.float32)
        kept = w.new_empty(w.shape[:3], dtype=kept_dtype)
    elif keeps == "probabilities" and keep:
        kept = w.new_empty(*w.shape[:3], tokens)
    generator = _generator(w, dropout, seed)
    scales = None if given.scales is None else given.scales.expand(w.shape[:2])
    tensors = _without(padding, w), out, kept, *_of_heads(w, mask.hidden_keys(w), idle), scales
    for heads, out_heads, kept_heads, *hides in part.heads_of(*tensors):
        keys = _stacked(heads, key_room)
        for rows in part.rows_of(keys):
            queries = keys[:, rows]
            probabilities = scores = _scores(queries, keys, rows, scale, mask, hides, score_room)
            if keeps == "log-sum-exp":
                kept_heads[..., rows] = scores.to(kept_dtype).logsumexp(-1).view(*heads.shape[:2], queries.shape[1])
            elif kept is not None and kept.dtype == scores.dtype:
                probabilities = kept_heads.flatten(0, 1)[:, rows]
            torch.softmax(scores, -1, out=probabilities)
            if keeps == "probabilities" and kept is not None and kept.dtype != scores.dtype:
                kept_heads.flatten(0, 1)[:, rows].copy_(probabilities)
            if dropout:
                probabilities = probabilities * _factors(probabilities, dropout, generator)
            result = torch.bmm(probabilities, keys, out=_corner(result_room, queries))
            out_heads[..., rows, :] = result.view(*heads.shape[:2], *queries.shape[1:])
    kept = w.new_empty(0) if kept is None else kept
    if idle is not None:
        out.masked_fill_(idle[..., None], 0.0)
        if keeps == "log-sum-exp":
            kept.masked_fill_(idle, float("-inf"))
    return out, kept


def backward(
    grad_out: Tensor,
    w: Tensor,
    out: Tensor,
    kept: Tensor,
    need_scales: bool,
    given: AttentionArguments,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``forward``: in w, as query, as key and as value, added up; and in the scales, if ``need_scales``."""
    scale, _, _, dropout, seed, *_ = given
    mask = given.mask
    padding = mask.padding(w)
    grad_scales = w.new_zeros(w.shape[:2] if need_scales else (0, 0), dtype=torch.promote_types(w.dtype, torch.float32))
    if takes_flash_attention(w, given):
        heads, grads, out = (_without(padding, _features_in_a_row(tensor)) for tensor in (w, grad_out, out))
        # Rows of padding have zero scores and a zero gradient; with a finite log-sum-exp they add zero.
        lse = kept if padding is None else kept.masked_fill(padding, 0.0)
        as_query, as_key, as_value = cpu_flash_attention_backward(
            grads, heads, out, lse, is_causal=mask.is_causal, attn_mask=_penalty(padding, heads), scale=scale
        )
        return _unflatten(as_query.add_(as_key).add_(as_value), w), grad_scales.sum(0)

    part, (tokens, features) = _Part.of(w), w.shape[2:]
    key_room, grad_room, result_room = (part.room(w, tokens, features) for _ in range(3))
    score_room, second_room = (part.room(w, part.rows, tokens) for _ in range(2))
    generator, grad_w = _generator(w, dropout, seed), empty_token_major(w)
    hidden, idle = _of_heads(w, mask.hidden_keys(w), mask.idle(w))
    tensors = _without(padding, w), _without(idle, grad_out), grad_w, kept if kept.ndim == 4 else None, hidden, idle
    scales = None if given.scales is None else given.scales.expand(w.shape[:2])
    per_head = scales, grad_scales if need_scales else None
    for heads, grad_heads, grad_w_heads, kept_heads, *hides, grad_of_scales in part.heads_of(*tensors, *per_head):
        scales = hides[-1]
        keys, grads = _stacked(heads, key_room), _stacked(grad_heads, grad_room)
        grad_keys = _corner(result_room, keys)
        if part.rows < tokens:
            grad_keys.zero_()
        for rows in part.rows_of(keys):
            queries, grad_rows = keys[:, rows], grads[:, rows]
            if kept_heads is not None:
                probabilities = kept_heads.flatten(0, 1)[:, rows]
                if probabilities.dtype != keys.dtype:
                    probabilities = _corner(second_room, queries).copy_(probabilities)
            else:
                scores = _scores(queries, keys, rows, scale, mask, hides, second_room)
                probabilities = torch.softmax(scores, -1, out=scores)
            grad_probabilities = torch.bmm(grad_rows, keys.mT, out=_corner(score_room, queries))
            dropped = probabilities
            if dropout:
                factors = _factors(probabilities, dropout, generator)
                grad_probabilities *= factors
                dropped = factors.mul_(probabilities)
            grad_scores = softmax_backward_(grad_probabilities, probabilities)
            if grad_of_scales is not None:
                shares = (grad_scores * torch.bmm(queries, keys.mT)).sum((1, 2), dtype=grad_scales.dtype)
                grad_of_scales += shares.view(grad_of_scales.shape)
            if scales is not None:
                grad_scores *= scales.reshape(-1, 1, 1)
            if part.rows == tokens:  # as query and as key in one product
                torch.bmm(dropped.mT, grad_rows, out=grad_keys)
                grad_scores = _corner(second_room, queries).copy_(grad_scores.mT).add_(grad_scores)
            else:
                grad_keys.baddbmm_(dropped.mT, grad_rows)
                grad_keys.baddbmm_(grad_scores.mT, queries, alpha=scale)
            grad_keys[:, rows].baddbmm_(grad_scores, keys, alpha=scale)
        grad_w_heads.copy_(grad_keys.view(grad_w_heads.shape))
    return (grad_w if padding is None else grad_w.masked_fill_(padding[..., None], 0.0)), grad_scales.sum(0)


def _of_heads(w: Tensor, *tokens: Tensor | None) -> list[Tensor | None]:
    """Each [batch, 1, tokens] as [batch, heads, tokens]."""
    return [None if one is None else one.expand(w.shape[:3]) for one in tokens]


def _without(padding: Tensor | None, rows: Tensor) -> Tensor:
    """Rows [batch, heads, tokens, head_dim] with zeros for padding, so that what is stored there has no effect."""
    return rows if padding is None else rows.masked_fill(padding[..., None], 0.0)


def _penalty(padding: Tensor | None, heads: Tensor) -> Tensor | None:
    """What to add to scores, [batch, 1, 1, tokens]: -inf for keys that are padding."""
    return None if padding is None else torch.where(padding[:, :1, None], float("-inf"), heads.new_zeros(()))


def _features_in_a_row(w: Tensor) -> Tensor:
    """w in the dtype to compute in, with strides that flash attention takes: the features of a token are adjacent."""
    w = w.to(arithmetic_dtype(w))
    return w if w.stride(-1) == 1 and w.stride(-2) >= w.shape[-1] else w.contiguous()


def _unflatten(result: Tensor, like: Tensor) -> Tensor:
    """The result in the dtype and the layout that the operator promises, copied only if it differs."""
    promised = empty_token_major(like)
    return result if (result.dtype, result.stride()) == (promised.dtype, promised.stride()) else promised.copy_(result)


class _Part(NamedTuple):
    """How many samples, heads and rows have their scores in memory at the same time: as many as fit the bound."""

    samples: int
    heads: int
    rows: int

    @classmethod
    def of(cls, w: Tensor) -> _Part:
        batch, heads, tokens, _ = w.shape
        bound = (_SCORES_ON_CPU if w.device.type == "cpu" else _SCORES_ELSEWHERE) // arithmetic_dtype(w).itemsize
        rows = min(tokens, max(1, bound // tokens))
        most = max(1, bound // (rows * tokens))
        return cls(_even(batch, most // heads), _even(heads, most), _even(tokens, rows))

    def room(self, w: Tensor, rows: int, width: int) -> Tensor:
        """Memory [heads, rows, width] for one array of each part in turn.

        It is used again for each part: new memory would cost as much as the product that fills it, and this is still in cache.
        """
        return w.new_empty(self.samples * self.heads, rows, width, dtype=arithmetic_dtype(w))

    def heads_of(self, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """The parts of tensors [batch, heads, ...], one after another: some samples and heads of each. None stays None."""

        def split(tensor: Tensor) -> list[Tensor]:
            return [part for some in tensor.split(self.samples) for part in some.split(self.heads, 1)]

        return zip(*(repeat(None) if tensor is None else split(tensor) for tensor in tensors), strict=False)

    def rows_of(self, keys: Tensor) -> Iterator[slice]:
        return (slice(first, first + self.rows) for first in range(0, keys.shape[1], self.rows))


def _even(size: int, most: int) -> int:
    """The size of the parts, at most ``most`` and at least 1, if there are as few as possible and all are about equal."""
    parts = -(-size // max(1, most))
    return -(-size // parts) if size else 1


def _corner(room: Tensor, like: Tensor) -> Tensor:
    """As many heads and rows of a room as ``like`` has: the last part may be smaller than the others."""
    return room[: like.shape[0], : like.shape[1]]


def _stacked(heads: Tensor, room: Tensor) -> Tensor:
    """Heads [samples, heads, tokens, head_dim] of any strides, copied into ``room`` as [samples * heads, tokens, head_dim]."""
    stacked = room[: heads.shape[0] * heads.shape[1]]
    stacked.view(heads.shape).copy_(heads)
    return stacked


def _scores(
    queries: Tensor,
    keys: Tensor,
    rows: slice,
    scale: float,
    mask: Mask,
    of_heads: Sequence[Tensor | None],
    room: Tensor,
) -> Tensor:
    """scale * w w^T of these rows with all tokens, written into ``room``; -inf for masked keys, 0 in rows that have none left: a
    softmax of -inf alone would be NaN. ``of_heads``: the mask's hidden keys and idle tokens, [samples, heads, tokens], and
    factors beside ``scale``, [samples, heads]."""
    no_keys, no_queries, scales = of_heads
    scores = _corner(room, queries).baddbmm_(queries, keys.mT, beta=0, alpha=scale)
    if scales is not None:
        scores *= scales.reshape(-1, 1, 1)
    pairs = mask.hidden_pairs(keys.shape[1], keys.device, rows)
    if pairs is not None:
        scores.masked_fill_(pairs, float("-inf"))
    if no_keys is not None:
        scores.masked_fill_(no_keys.reshape(-1, 1, keys.shape[1]), float("-inf"))
    if no_queries is not None:
        scores.masked_fill_(no_queries.reshape(-1, keys.shape[1])[:, rows, None], 0.0)
    return scores


def _generator(w: Tensor, dropout: float, seed: Tensor | None) -> torch.Generator | None:
    """The generator of dropout, at the start of its random numbers; None without dropout."""
    if not dropout:
        return None
    if seed is None:
        raise ValueError("seed: expected one, since dropout is not 0")
    return torch.Generator(w.device).manual_seed(int(seed))


def _factors(probabilities: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
    """What dropout multiplies the probabilities by, 0 or 1 / (1 - dropout), from the generator's next random numbers."""
    return torch.empty_like(probabilities).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
