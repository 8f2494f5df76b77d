"""Masks of attention: what each lets a token attend to, as our operator takes it and as its peers do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.peers import Peer, flex, sdpa, varlen


@dataclass(frozen=True)
class Mask:
    """Which tokens of a sample attend to which, the same in all samples and heads.

    pairs: so many pairs of a token and one that it attends to.
    options: of ``shared_qkv_attention``.
    allows: whether token i attends to token j, as FlexAttention asks: of a sample and a head, which have no part in it, i and j.
    varlen: of ``peers.varlen``; none where it has no such mask.
    """

    pairs: int
    options: dict[str, Any]
    allows: Callable[[Any, Any, Tensor, Tensor], Tensor]
    varlen: dict[str, Any] | None = None

    def dense(self, tokens: int, device: torch.device) -> Tensor:
        """[tokens, tokens], bool: True where token i attends to token j."""
        place = torch.arange(tokens, device=device)
        return self.allows(None, None, place[:, None], place).expand(tokens, tokens).contiguous()

    def for_sdpa(self, tokens: int, device: torch.device) -> dict[str, Any]:
        """PyTorch's attention has a word for the causal mask alone; it takes any other as a dense one."""
        return {"is_causal": True} if self.options.get("is_causal") else {"attn_mask": self.dense(tokens, device)}

    def for_flex(self, tokens: int, device: torch.device) -> dict[str, Any]:
        from torch.nn.attention.flex_attention import create_block_mask

        return {"block_mask": create_block_mask(self.allows, None, None, tokens, tokens, device=device)}

    def peers(self, tokens: int, device: torch.device) -> dict[str, Peer]:
        """The attention peers that serve the mask; they get it made before they are timed."""
        by_sdpa = partial(Peer, separate=True, made=partial(self.for_sdpa, tokens, device))
        found = {
            "sdpa cudnn": by_sdpa(sdpa(SDPBackend.CUDNN_ATTENTION)),
            "sdpa efficient": by_sdpa(sdpa(SDPBackend.EFFICIENT_ATTENTION)),
            "sdpa math": by_sdpa(sdpa(SDPBackend.MATH)),
            "flex": Peer(flex, mode="default", separate=True, made=partial(self.for_flex, tokens, device)),
        }
        if self.options.get("is_causal"):  # flash takes no dense mask
            found["sdpa flash"] = by_sdpa(sdpa(SDPBackend.FLASH_ATTENTION))
        if self.varlen is not None:
            found["varlen"] = Peer(partial(varlen, **self.varlen), separate=True)
        return found


def causal(batch: int, tokens: int, device: torch.device) -> Mask:
    return Mask(tokens * (tokens + 1) // 2, {"is_causal": True}, lambda b, h, i, j: j <= i)


def window(size: int, batch: int, tokens: int, device: torch.device) -> Mask:
    pairs = sum(min(i, size) + 1 + min(tokens - 1 - i, size) for i in range(tokens))
    bounds = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)
    of_varlen = {"cu_seqlens": bounds, "longest": tokens, "window_size": (size, size)}
    return Mask(pairs, {"window": size}, lambda b, h, i, j: (i - j).abs() <= size, of_varlen)


def packed(batch: int, tokens: int, device: torch.device) -> Mask:
    """Five sequences, of one to five fifteenths of the tokens."""
    ends = [tokens * part // 15 for part in (0, 1, 3, 6, 10, 15)]
    lengths = [end - start for start, end in pairwise(ends)]
    bounds = torch.tensor(ends, dtype=torch.int32, device=device)
    sequence = torch.searchsorted(bounds, torch.arange(tokens, device=device), right=True)
    of_varlen = {"cu_seqlens": bounds, "longest": max(lengths)}
    pairs = sum(length**2 for length in lengths)
    return Mask(pairs, {"cu_seqlens": bounds}, lambda b, h, i, j: sequence[i] == sequence[j], of_varlen)


def keys(batch: int, tokens: int, device: torch.device) -> Mask:
    """Every fourth token hidden from all."""
    shown = torch.arange(tokens, device=device) % 4 < 3
    return Mask(tokens * (tokens - tokens // 4), {"key_mask": shown.repeat(batch, 1)}, lambda b, h, i, j: shown[j])


# By the word that follows the operator's name in rows.
MASKS: dict[str, Callable[[int, int, torch.device], Mask]] = {
    "causal": causal,
    "window_64": partial(window, 64),
    "window_128": partial(window, 128),
    "packed": packed,
    "keys": keys,
}
