"""Shared-QKV attention in standard PyTorch calls.

On a CPU that computes in float32 or float64, without dropout: PyTorch's own flash attention, its three gradients added up.
Elsewhere (CUDA, and CPUs with 16-bit matrix instructions, where flash attention's backward is slow): batched products over a
slice of heads and rows at a time. Those keep the probabilities of short sequences for the backward on a CPU, six products in
all; else they compute them again, a seventh, and scores exist for one slice at a time only. Dropout is drawn slice by slice,
and drawn again from the same seed in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crate_kernels.precision import arithmetic_dtype
from crate_kernels.shared_attention.op import composed_keeps, empty_token_major, takes_flash_attention

# Elements of the scores of one slice. On a CPU the slice stays in cache between the calls; elsewhere it only bounds memory.
_SCORES_ON_CPU = 2**20
_SCORES_ELSEWHERE = 2**28


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

    heads = _flatten(_without(padding, w))
    out, keeps = torch.empty_like(heads), composed_keeps(w, dropout, return_lse)
    kept = heads.new_empty(0)
    if keeps == "probabilities" and keep:
        kept = heads.new_empty(*w.shape[:3], w.shape[2])
    elif keeps == "log-sum-exp":
        kept = w.new_empty(w.shape[:3], dtype=torch.promote_types(w.dtype, torch.float32))
    generator = _generator(w, dropout, seed)
    for head, row in _slices(heads):
        probabilities = _scores(
            heads[head], row, scale, is_causal, _of_heads(padding, w, head), _rows(kept, keeps, head, row)
        )
        if keeps == "log-sum-exp":
            kept.flatten(0, 1)[head, row] = probabilities.to(kept.dtype).logsumexp(-1)
        probabilities = torch.softmax(probabilities, -1, out=probabilities)
        if dropout:
            probabilities = probabilities * _factors(probabilities, dropout, generator)
        torch.bmm(probabilities, heads[head], out=out[head, row])
    if padding is not None and keeps == "log-sum-exp":
        kept.masked_fill_(padding, float("-inf"))
    return _unflatten(_without(padding, out.view(w.shape)), w), kept


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

    heads, grads = _flatten(_without(padding, w)), _flatten(_without(padding, grad_out))
    grad_w = torch.empty_like(heads)
    keeps = "probabilities" if kept.ndim == 4 else "nothing"
    generator = _generator(w, dropout, seed)
    for head, row in _slices(heads):
        keys, queries, grad_rows = heads[head], heads[head, row], grads[head, row]
        probabilities = _rows(kept, keeps, head, row)
        if probabilities is None:
            scores = _scores(keys, row, scale, is_causal, _of_heads(padding, w, head))
            probabilities = torch.softmax(scores, -1, out=scores)
        grad_probabilities = torch.bmm(grad_rows, keys.transpose(1, 2))
        dropped = probabilities
        if dropout:
            factors = _factors(probabilities, dropout, generator)
            grad_probabilities *= factors
            dropped = factors.mul_(probabilities)
        grad_scores = torch._softmax_backward_data(
            grad_probabilities, probabilities, -1, probabilities.dtype, grad_input=grad_probabilities
        )
        # The first slice of rows writes all rows of the gradient, the others add to it.
        grad_w[head].baddbmm_(dropped.transpose(1, 2), grad_rows, beta=0 if row.start == 0 else 1)
        grad_w[head].baddbmm_(grad_scores.transpose(1, 2), queries, alpha=scale)
        grad_w[head, row].baddbmm_(grad_scores, keys, alpha=scale)
    return _unflatten(_without(padding, grad_w.view(w.shape)), w)


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
    most = max(1, bound // (rows * tokens))
    slices = max(1, -(-count // most))
    step = -(-count // slices) or 1  # slices of equal size, as few as the bound allows
    for head in range(0, count, step):
        for row in range(0, tokens, rows):
            yield slice(head, head + step), slice(row, row + rows)


def _rows(kept: Tensor, keeps: str, head: slice, row: slice) -> Tensor | None:
    """The slice of the probabilities that are kept, or None where they are not."""
    return kept.flatten(0, 1)[head, row] if keeps == "probabilities" and kept.numel() else None


def _of_heads(padding: Tensor | None, w: Tensor, head: slice) -> Tensor | None:
    """The padding of a slice of heads, [heads in the slice, tokens]."""
    return None if padding is None else padding.expand(w.shape[:3]).flatten(0, 1)[head]


def _scores(
    keys: Tensor,
    row: slice,
    scale: float,
    is_causal: bool,
    padding: Tensor | None,
    destination: Tensor | None = None,
) -> Tensor:
    """scale * w w^T of the rows in question against all tokens, in ``destination`` where there is one; -inf for masked keys."""
    # Fresh memory costs as much as the product that fills it: scores are made where they will become probabilities.
    queries = keys[:, row]
    scores = queries.new_empty(*queries.shape[:2], keys.shape[1]) if destination is None else destination
    scores.baddbmm_(queries, keys.transpose(1, 2), beta=0, alpha=scale)
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
