"""Which tokens a token attends to: the options of attention that hide keys, and what they mean. Imports no Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_kernels import validation


class Mask(NamedTuple):
    """Token i of sample b attends to token j where all of these allow it; without any, all tokens attend to all.

    The first three and ``spans`` make an interval of tokens j for each token i, which is all that kernels walk.

    Attributes:
        is_causal: j <= i.
        window: i - window <= j <= i + window.
        lengths: [batch], int32 or int64: j < lengths[b]. Tokens from there on are padding: they attend to none, either.
        spans: [2, tokens], int32: spans[0, i] <= j < spans[1, i], the sequence of token i among packed ones.
        key_mask: [batch, tokens], bool: key_mask[b, j].
    """

    is_causal: bool = False
    window: int | None = None
    lengths: Tensor | None = None
    spans: Tensor | None = None
    key_mask: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it hides no keys but later ones and padding."""
        return self.window is None and self.spans is None and self.key_mask is None

    def intervals(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """First and end of the keys of each token, [tokens] each, padding still among them; None where these are all tokens."""
        if not self.is_causal and self.window is None and self.spans is None:
            return None
        place = torch.arange(tokens, device=device)
        first, end = (
            (torch.zeros_like(place), torch.full_like(place, tokens)) if self.spans is None else self.spans.unbind()
        )
        if self.window is not None:
            first, end = torch.maximum(first, place - self.window), torch.minimum(end, place + self.window + 1)
        if self.is_causal:
            end = place + 1
        return first.clamp(0, tokens), end.clamp(0, tokens)

    def padding(self, w: Tensor) -> Tensor | None:
        """True [batch, 1, tokens] for the padding of w [batch, heads, tokens, head_dim]; None without lengths."""
        if self.lengths is None:
            return None
        return (torch.arange(w.shape[2], device=w.device) >= self.lengths[:, None])[:, None]

    def without_padding(self, w: Tensor) -> Tensor:
        """w with zeros for padding, so that what is stored there has no effect."""
        padding = self.padding(w)
        return w if padding is None else w.masked_fill(padding[..., None], 0.0)

    def hidden_keys(self, w: Tensor) -> Tensor | None:
        """True [batch, 1, tokens] for tokens that nobody attends to; None where there are none."""
        padding = self.padding(w)
        if self.key_mask is None:
            return padding
        hidden = ~self.key_mask[:, None]
        return hidden if padding is None else hidden | padding

    def idle(self, w: Tensor) -> Tensor | None:
        """True [batch, 1, tokens] for padding and for tokens that have no key left: their output is zero. None without such."""
        keys, padding, intervals = self.hidden_keys(w), self.padding(w), self.intervals(w.shape[2], w.device)
        if keys is None:
            return None
        if intervals is None:
            none = keys.all(-1, keepdim=True).expand(keys.shape)
        else:
            before = F.pad((~keys).cumsum(-1), (1, 0))  # how many keys there are before each place
            first, end = intervals
            none = before[..., end.long()] == before[..., first.long()]
        return none if padding is None else none | padding

    def hidden_pairs(self, tokens: int, device: torch.device, rows: slice = slice(None)) -> Tensor | None:
        """True [rows, tokens] where the intervals keep a token from attending to another; None where they never do."""
        intervals = self.intervals(tokens, device)
        if intervals is None:
            return None
        first, end = (bound[rows, None] for bound in intervals)
        place = torch.arange(tokens, device=device)
        return (place < first) | (place >= end)

    def hide(self, scores: Tensor, w: Tensor) -> Tensor:
        """The scores [batch, heads, tokens, tokens] of w with -inf where a token does not attend to another.

        Where a token attends to none, its scores stay: a softmax of -inf alone would be NaN. Its output is to be zeroed, and
        then what they are has no effect.
        """
        pairs, keys, idle = self.hidden_pairs(w.shape[2], w.device), self.hidden_keys(w), self.idle(w)
        hidden = pairs if keys is None else keys[:, :, None] if pairs is None else pairs | keys[:, :, None]
        if hidden is None:
            return scores
        return scores.masked_fill(hidden if idle is None else hidden & ~idle[..., None], float("-inf"))


NO_MASK = Mask()


def checked_mask(
    x: Tensor,
    tokens_dim: int,
    is_causal: bool = False,
    window: int | None = None,
    lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Mask:
    """The mask of ``x``, whose dimension ``tokens_dim`` is the tokens, from arguments as users give them, which are checked."""
    tokens = x.shape[tokens_dim]
    if window is not None:
        if not isinstance(window, int) or isinstance(window, bool):
            raise TypeError(f"window: expected an int or None, got {validation.describe(window)}")
        if window < 0:
            raise ValueError(f"window: expected at least 0 tokens, got {window}")
        window = min(window, tokens)  # so that kernels add it to places without an overflow
    if lengths is not None:
        _check_integers("lengths", lengths, "[batch]", x)
        if lengths.shape != x.shape[:1]:
            raise ValueError(f"lengths: expected [batch] {tuple(x.shape[:1])}, got {validation.describe(lengths)}")
        if validation.shows_values(lengths):
            outside = lengths[(lengths < 1) | (lengths > tokens)]
            if len(outside):
                raise ValueError(f"lengths: expected 1 to {tokens} tokens, got {outside[0].item()}")
    if key_mask is not None:
        expected = f"a bool tensor [batch, tokens] {(x.shape[0], tokens)}"
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask: expected {expected}, got {validation.describe(key_mask)}")
        if key_mask.shape != (x.shape[0], tokens):
            raise ValueError(f"key_mask: expected {expected}, got {validation.describe(key_mask)}")
        _check_device("key_mask", key_mask, x)
    spans = None
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError("cu_seqlens: given with lengths; packed sequences end where cu_seqlens says")
        _check_integers("cu_seqlens", cu_seqlens, "[sequences + 1]", x)
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens: expected [sequences + 1], got {validation.describe(cu_seqlens)}")
        if x.shape[0] != 1:
            raise ValueError(f"cu_seqlens: expected packed sequences in a batch of 1, got a batch of {x.shape[0]}")
        if validation.shows_values(cu_seqlens):
            in_order = cu_seqlens[0] == 0 and (cu_seqlens.diff() >= 0).all()
            if not in_order or not 1 <= cu_seqlens[-1] <= tokens:
                raise ValueError(
                    f"cu_seqlens: expected numbers from 0 up to at most {tokens} tokens, none below the one before it, got "
                    f"{cu_seqlens.tolist()}"
                )
        spans, lengths = spans_of(cu_seqlens, tokens), cu_seqlens[-1:]
    return Mask(bool(is_causal), window, lengths, spans, key_mask)


def spans_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[2, tokens], int32: where the sequence of each token begins and ends. Nothing, for tokens behind the last sequence."""
    last = len(cu_seqlens) - 1
    behind = torch.searchsorted(cu_seqlens, torch.arange(tokens, device=cu_seqlens.device), right=True)
    return cu_seqlens[torch.stack([behind - 1, behind.clamp(max=last)])].to(torch.int32)


def _check_integers(name: str, value: Tensor, dims: str, x: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected an int32 or int64 tensor {dims}, got {validation.describe(value)}")
    _check_device(name, value, x)


def _check_device(name: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(f"{name}: expected it on {x.device} like its tokens, got {validation.describe(value)}")
