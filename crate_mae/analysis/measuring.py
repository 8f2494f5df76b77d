"""The white-box view in numbers: what each layer of a model does to the tokens of images, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crate_mae.analysis.attention import attention_distance, attention_entropy
from crate_mae.analysis.rates import (
    OFFICIAL_EPS,
    coding_rate,
    effective_rank,
    mean_coherence,
    relative_update,
    zero_fraction,
)
from crate_mae.analysis.tracing import LayerTrace, Stack, call_on_whole, in_evaluation, traced, unwrapped
from crate_mae.backbone import Backbone
from crate_mae.patches import patch_grid

MEASURES: dict[str, str] = {
    "coding_rate_before": "R^c(Z; U_[K]) of what MSSA acts on: the sum over heads of R(U_k^T LN Z). R(W) = 1/2 logdet(I + d / "
    "(n eps) W W^T) in nats, tokens of unit norm, eps 0.01, d the width and n the number of tokens.",
    "coding_rate_after": "The same of what MSSA makes of it, by the same norm and subspaces: it compresses where this is less.",
    "token_coding_rate": "R(Z) of the layer's output.",
    "rate_reduction": "R(Z) - R^c(Z; U_[K]) of the layer's output.",
    "sparse_rate_reduction": "R(Z) - R^c(Z; U_[K]) - lambda ||Z||_0 of the layer's output, which layers are derived to ascend; "
    "encoder only.",
    "zeros": "Fraction of entries that are zero after the sparse step (ISTA; in the decoder, its linear step).",
    "l0": "Entries of a token that are not zero after the sparse step: ||Z||_0 / n.",
    "l1": "Sum of the sizes of a token's entries after the sparse step: ||Z||_1 / n.",
    "coherence": "Mean over pairs of heads of ||Q_k^T Q_l||_F^2 / head_dim, Q_k an orthonormal basis of U_k's span: 0 of "
    "orthogonal subspaces, 1 of the same ones. Of the weights alone.",
    "effective_rank": "exp of the entropy of the output's singular values over their sum.",
    "attention_entropy": "Mean over heads and queries of -sum A log A, in nats; log n where all are attended to alike.",
    "attention_distance": "Mean over heads and patches of sum A_ij |position_i - position_j| among patches, in pixels.",
    "compression_update": "||MSSA||_F / ||what it is added to||_F.",
    "sparse_update": "||ISTA(Z) - Z||_F / ||Z||_F of the sparse step, Z its normalised input (in the decoder, its linear step).",
    "coding_rate_before_by_head": "The parts of coding_rate_before.",
    "coding_rate_after_by_head": "The parts of coding_rate_after.",
    "attention_entropy_by_head": "attention_entropy of each head.",
    "attention_distance_by_head": "attention_distance of each head.",
}
"""The meaning of each measure, by its name."""


class Measured(NamedTuple):
    """Mean and standard deviation over images, for each layer of a stack, or for each head of each layer.

    The deviation is the unbiased one; for a single image it is 0.
    """

    mean: list[Any]
    std: list[Any]


class Analysis(NamedTuple):
    """The measures of all layers over ``images`` images, named as in ``MEASURES``.

    ``stacks["encoder"]["coding_rate_after"].mean[3]`` is that of the fourth encoder layer. Measures that need an unknown value
    (the grid of patches, lambda) are left out.
    """

    images: int
    stacks: dict[Stack, dict[str, Measured]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        stacks: dict[str, Any] = {
            stack: {name: measured._asdict() for name, measured in measures.items()}
            for stack, measures in self.stacks.items()
        }
        return {"images": self.images, **stacks}


def measures_of(
    layer: LayerTrace,
    *,
    grid: tuple[int, int] | None = None,
    patch_size: int = 1,
    eps: float = OFFICIAL_EPS,
    coherence: float | None = None,
) -> dict[str, Tensor]:
    """Every measure of one layer by its name in ``MEASURES``: float64 [batch], or [batch, heads] for those by head.

    Args:
        grid, patch_size: as for ``attention_distance``, which is left out without a grid.
        coherence: the coherence of the layer's subspaces, if another batch has given it.
    """
    if coherence is None:
        coherence = mean_coherence(layer.subspaces().detach(), layer.heads)
    before, after = coding_rate(layer.projected, eps=eps), coding_rate(layer.projected_after, eps=eps)
    attention = layer.attention
    entropy = attention_entropy(attention)
    rate = coding_rate(layer.output, eps=eps)
    # A decoder layer's output is that of MSSA, whose projection is known already.
    is_projected = layer.output is layer.compressed
    of_output = after if is_projected else coding_rate(layer.projected_of(layer.output), eps=eps)
    reduction = rate - of_output.sum(-1)
    step = layer.sparsified
    nonzeros = (step != 0).to(rate.device, torch.float64).sum((-2, -1))
    values = {
        "coding_rate_before": before.sum(-1),
        "coding_rate_after": after.sum(-1),
        "token_coding_rate": rate,
        "rate_reduction": reduction,
        "zeros": zero_fraction(step),
        "l0": nonzeros / step.shape[-2],
        "l1": step.to(rate.device, torch.float64).abs().sum((-2, -1)) / step.shape[-2],
        "coherence": rate.new_full(rate.shape, coherence),
        "effective_rank": effective_rank(layer.output),
        "attention_entropy": entropy.mean(-1),
        "compression_update": relative_update(layer.attended, layer.compressed),
        "sparse_update": relative_update(layer.unsparsified, step),
        "coding_rate_before_by_head": before,
        "coding_rate_after_by_head": after,
        "attention_entropy_by_head": entropy,
    }
    if layer.lambd is not None:
        values["sparse_rate_reduction"] = reduction - layer.lambd * (layer.output != 0).to(rate).sum((-2, -1))
    if grid is not None:
        distance = attention_distance(attention, grid, patch_size)
        values |= {"attention_distance": distance.mean(-1), "attention_distance_by_head": distance}
    return values


@torch.no_grad()
def analyze(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    grid: tuple[int, int] | None = None,
    patch_size: int = 1,
    done: Callable[[int], None] = lambda images: None,
) -> Analysis:
    """Measure every layer on images, in evaluation; the model is in the mode it was in when this returns.

    Args:
        model: CRATE-MAE, ours or the official one, which sees whole images; or another model of the CRATE family in which
            ``trace`` finds layers.
        batches: the model's inputs [batch, channels, height, width], standardised.
        grid, patch_size: of the patches in an image, for ``attention_distance``; our own models know theirs.
        done: called with the number of images of each batch, for a progress bar.

    Raises:
        ValueError: the model has no layers, or calls one more than once; there are no images; or values are not finite, as
            after a training that broke down.
    """
    gathered: dict[tuple[Stack, int], list[dict[str, Tensor]]] = {}
    of_batch: dict[str, Any] = {"grid": grid, "patch_size": patch_size}

    def receive(layer: LayerTrace) -> None:
        so_far = gathered.setdefault((layer.stack, layer.index), [])
        if len(so_far) > calls:
            raise ValueError(
                f"model: expected each layer once in a call, got {layer.name} again; trace shows each time"
            )
        coherence = float(so_far[0]["coherence"][0]) if so_far else None
        try:
            values = measures_of(layer, **of_batch, coherence=coherence)
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from error
        so_far.append({name: value.cpu() for name, value in values.items()})

    count = calls = 0
    inner = unwrapped(model)
    with in_evaluation(model), traced(model, receive):
        for images in batches:
            if len(images) == 0:
                continue
            if isinstance(inner, Backbone):
                size = inner.config.patch_size
                of_batch = {"grid": patch_grid(images, size), "patch_size": size}
            call_on_whole(model, images)
            count, calls = count + len(images), calls + 1
            done(len(images))
    if count == 0:
        raise ValueError("batches: expected one image or more, got none")
    if not gathered:
        raise ValueError("model: none of its layers was called; of a compiled model, give the one that was compiled")
    return Analysis(count, _by_stack(gathered))


def _by_stack(gathered: dict[tuple[Stack, int], list[dict[str, Tensor]]]) -> dict[Stack, dict[str, Measured]]:
    stacks: dict[Stack, dict[str, Measured]] = {}
    for (stack, _), batches in sorted(gathered.items(), key=lambda item: item[0][1]):
        measures = stacks.setdefault(stack, {})
        for name in MEASURES:
            if name not in batches[0]:
                continue
            values = torch.cat([batch[name] for batch in batches])
            measured = measures.setdefault(name, Measured([], []))
            measured.mean.append(values.mean(0).tolist())
            spread = values.std(0) if len(values) > 1 else torch.zeros_like(values[0])
            measured.std.append(spread.tolist())
    return {stack: stacks[stack] for stack in ("encoder", "decoder") if stack in stacks}
