"""All calls into PyTorch that its documentation does not promise, each with what replaces it where it is gone.

For operators that may be missing there is a constant ``HAS_...``, and callers choose another way if it is false. The other
functions fall back on public calls by themselves. Imports torch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
HAS_CPU_FLASH_ATTENTION = all(
    hasattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}") for suffix in ("", "_backward")
)
_HAS_SOFTMAX_BACKWARD = hasattr(torch, "_softmax_backward_data")
_HAS_UNSAFE_VIEW = hasattr(torch.ops.aten, "_unsafe_view")
_HAS_THREAD_STATE = all(
    hasattr(torch._C, name)
    for name in ("_stash_obj_in_tls", "_is_key_in_tls", "_get_obj_in_tls", "_current_graph_task_id")
)
_HAS_TRANSFORMS = hasattr(torch._C, "_are_functorch_transforms_active") and hasattr(forward_ad, "_current_level")
_HAS_BATCHED_GRADIENTS = hasattr(torch._C._functorch, "is_legacy_batchedtensor")


def onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``rows weight^T + bias`` by oneDNN, as the inductor calls it: contiguous rows, weight and bias. Else: ``F.linear``."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def cpu_flash_attention(w: Tensor, *, is_causal: bool, attn_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of w [batch, heads, tokens, head_dim] with itself on a CPU, and its log-sum-exp [batch, heads, tokens].

    Else: the composed path's products.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        w, w, w, is_causal=is_causal, attn_mask=attn_mask, scale=scale
    )


def cpu_flash_attention_backward(
    grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool, attn_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``cpu_flash_attention`` in w as query, as key and as value."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, w, w, w, out, lse, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )


def softmax_backward_(grad: Tensor, probabilities: Tensor) -> Tensor:
    """The gradient of the scores from that of their softmax, over the last dimension; written over ``grad``."""
    if _HAS_SOFTMAX_BACKWARD:
        return torch._softmax_backward_data(grad, probabilities, -1, probabilities.dtype, grad_input=grad)
    return grad.sub_((grad * probabilities).sum(-1, keepdim=True)).mul_(probabilities)


def unsafe_view(result: Tensor, shape: Sequence[int]) -> Tensor:
    """``result`` in another shape, for an operator to return: autograd does not take it for a view. Else: a copy."""
    return torch.ops.aten._unsafe_view(result, shape) if _HAS_UNSAFE_VIEW else result.reshape(shape).clone()


def set_carried(key: str, value: object) -> None:
    """Keep a value that PyTorch passes on to the threads of a backward called from this one. Else: only this thread has it."""
    if _HAS_THREAD_STATE:
        torch._C._stash_obj_in_tls(key, value)


def carried_into_backward(key: str, otherwise: Any) -> Any:
    """Inside a backward, the value that was set in the thread that called it; ``otherwise`` elsewhere, or where none was set."""
    if _HAS_THREAD_STATE and torch._C._current_graph_task_id() != -1 and torch._C._is_key_in_tls(key):
        return torch._C._get_obj_in_tls(key)
    return otherwise


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` (vmap, grad, jvp, ...) or forward-mode differentiation is active.

    False where PyTorch cannot be asked; our operators then raise PyTorch's own error under a transform.
    """
    return _HAS_TRANSFORMS and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def is_batched_gradient(grad: Tensor) -> bool:
    """Whether ``grad`` is a batch of gradients, from ``torch.autograd.grad(..., is_grads_batched=True)``."""
    return _HAS_BATCHED_GRADIENTS and torch._C._functorch.is_legacy_batchedtensor(grad)
