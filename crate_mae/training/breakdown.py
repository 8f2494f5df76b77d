"""Finds where a step first produced NaN or infinity, by taking it again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from crate_mae.files import write_json
from crate_mae.training.metrics import NonFiniteLoss

_SHOWN = 3


def cause(
    error: NonFiniteLoss,
    model: nn.Module,
    losses_of_step: Callable[[], Iterable[torch.Tensor]],
    images: Sequence[str],
    file: Path,
) -> str:
    """What was not finite first, and in which images: words to append to the error's message. The details go into a file.

    Args:
        error: what ended the run.
        model, losses_of_step: see `first_bad`.
        images: the names of the step's images.
        file: the JSON file to write.
    """
    if error.weights:
        return ""
    try:
        first = first_bad(model, losses_of_step) or "nothing, when the step was taken again"
        numbers = {"step": error.step, "loss": str(error.loss), "grad_norm": str(error.grad_norm)}
        write_json(file, numbers | {"first": first, "images": list(images)})
    except Exception as problem:  # must not hide the error itself
        first = f"not found out ({problem})"
    shown = ", ".join(images[:_SHOWN])
    more = f" and {len(images) - _SHOWN} more, all in {file.name}" if len(images) > _SHOWN else ""
    return f"; not finite first: {first}; images: {shown}{more}"


def first_bad(model: nn.Module, losses_of_step: Callable[[], Iterable[torch.Tensor]]) -> str:
    """What of a step was NaN or infinite first, in words: a weight, the output of a layer, the loss, or a gradient.

    Args:
        model: with the weights before the step.
        losses_of_step: does the forward of the step again, micro-batch by micro-batch, and gives the share of each in the loss.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"weights of {name} before the step"
    bad: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            if not bad and not output.isfinite().all():
                bad.append(f"output of {name}")

        return look

    layers = dict(_called(model))
    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that layers with hooks run unfused
            model.zero_grad(set_to_none=True)
            for loss in losses_of_step():
                if bad or not loss.isfinite():
                    return bad[0] if bad else "the loss"
                loss.backward()
    finally:
        for handle in hooks:
            handle.remove()
    for name, parameter in reversed(list(model.named_parameters())):  # in the order of the backward
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"gradient of {name}"
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return "" if norm.isfinite() else "the norm of the gradient, whose entries are finite"


def _called(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers by their names: the model's direct children, and the members of those that are lists."""
    for name, module in model.named_children():
        if type(module).forward is nn.Module.forward:
            yield from _called(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module
