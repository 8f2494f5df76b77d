"""The tokens inside the layers of a model, recorded by hooks: our models, the official CRATE and CRATE-MAE, accelerated or not.

A layer is found by its structure: two steps side by side, each a module ``fn`` behind a ``norm``, one of which projects with
``qkv``. With hooks on them, accelerated modules call their children one by one, so that the hooks see what is computed.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from crate_kernels.fusing import unsaid
from crate_kernels.shared_attention.mask import Mask
from crate_mae.model import CrateMAE

Stack = Literal["encoder", "decoder"]


class LayerTrace(NamedTuple):
    """The tokens [batch, n, d] inside one layer, and their projections [batch, heads, n, head_dim] onto the heads' subspaces.

    An encoder layer is z = x + MSSA(LN x), y = ISTA(LN z); a decoder layer g = LN(x) W^T, y = g - MSSA(LN g).

    Attributes:
        name: the name of the module that holds both steps, such as "blocks.0.layers.0".
        stack: "encoder" where attention is the first step, "decoder" where it is the second.
        index: the layer's number in its stack, from 0.
        norm: the norm before attention.
        module: the attention module, with ``qkv``, ``heads`` and ``scale``.
        lambd: the sparsity weight of an encoder's sparse step, None where it has none.
        tokens: the layer's input x.
        attended: the input of the attention step: x, or g in a decoder.
        compressed: its output: z, or y in a decoder.
        projected: U_k^T LN(attended), the official "key", from which attention is computed.
        unsparsified: the input of the other step behind its norm: LN z, or LN x in a decoder.
        sparsified: its output: ISTA(LN z), or g in a decoder.
        output: the layer's output y.
    """

    name: str
    stack: Stack
    index: int  # type: ignore[assignment]  # in the place of tuple.index, which a layer has no use for
    norm: nn.Module
    module: nn.Module
    lambd: float | None
    tokens: Tensor
    attended: Tensor
    compressed: Tensor
    projected: Tensor
    unsparsified: Tensor
    sparsified: Tensor
    output: Tensor

    def projected_of(self, tokens: Tensor) -> Tensor:
        """U_k^T LN(tokens), with this layer's norm and projection; hooks do not see this computation."""
        weight = next(self.norm.parameters(), tokens)  # under autocast the tokens may have another dtype
        projection = self.module.get_submodule("qkv")
        return _by_head(projection.forward(self.norm.forward(tokens.to(weight.dtype))), self.heads)

    def subspaces(self) -> Tensor:
        """U_[K]^T [heads * head_dim, d], the U_k^T one below the other: ``qkv.weight`` with what an adapter may add to it."""
        x = self.tokens
        basis = torch.eye(x.shape[-1], dtype=next(self.norm.parameters(), x).dtype, device=x.device)
        projection = self.module.get_submodule("qkv")
        return (projection.forward(basis) - projection.forward(torch.zeros_like(basis))).mT

    @property
    def heads(self) -> int:
        """How many heads attention has."""
        return _setting(self.module, "heads")

    @property
    def scale(self) -> float:
        """What attention multiplies its scores with.

        Raises:
            ValueError: each head has its own.
        """
        scale = _setting(self.module, "scale")
        if isinstance(scale, Tensor) and scale.numel() != 1:
            raise ValueError(f"scale: expected one number, got one for each of {scale.numel()} heads")
        return float(scale)

    @property
    def projected_after(self) -> Tensor:
        """``projected_of`` the output of the attention step."""
        return self.projected_of(self.compressed)

    @property
    def attention(self) -> Tensor:
        """softmax(w w^T scale), [batch, heads, n, n]; where the module has another ``attend``, that function of the scores."""
        mask = Mask(getattr(self.module, "is_causal", False), getattr(self.module, "window", None))
        scores = mask.hide(self.projected @ self.projected.mT * _setting(self.module, "scale"), self.projected)
        attend = getattr(self.module, "attend", None)
        return scores.softmax(-1) if attend is None else attend.forward(scores)


@dataclass(frozen=True)
class _Steps:
    """The two steps of a layer, each with ``norm`` and ``fn``."""

    name: str
    stack: Stack
    index: int
    attention: nn.Module
    sparsify: nn.Module


@contextmanager
def traced(model: nn.Module, receive: Callable[[LayerTrace], None]) -> Iterator[None]:
    """A block in which calls of the model hand each layer to ``receive``, as soon as it is computed.

    Only calls from this thread count.

    Raises:
        ValueError: the model has no such layers.
    """
    found = _layers_of(model)
    if not found:
        raise ValueError(
            f"model: expected layers of two steps, each a fn behind a norm, one with qkv, as in CRATE and CRATE-MAE; "
            f"{type(model).__name__} has none"
        )
    handles = []
    try:
        for steps in found:
            handles += _watch(steps, receive)
        with unsaid():  # no warning that hooks make modules run one by one: here they are there for that
            yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def trace(model: nn.Module, *inputs: Any, **options: Any) -> list[LayerTrace]:
    """All layers of one call of the model, in evaluation mode and without gradients; the model's mode is restored.

    Args:
        inputs, options: of the call. Without options CRATE-MAE, ours or the official one, sees whole images; with
            ``mask_ratio`` it sees a part.

    Raises:
        ValueError: the model has no such layers, or none was called, as after ``model.compile()``, which sees no hooks.
    """
    layers: list[LayerTrace] = []
    with in_evaluation(model), traced(model, layers.append):
        if len(inputs) == 1 and not options:
            call_on_whole(model, *inputs)
        else:
            model(*inputs, **options)
    if not layers:
        raise ValueError("model: none of its layers was called; of a compiled model, give the one that was compiled")
    return layers


def call_on_whole(model: nn.Module, images: Tensor) -> None:
    """Call a model, or the one inside PyTorch's wrappers, on whole images: with ``mask_ratio=0`` where it takes that.

    For a ``CrateMAE`` no random number is drawn.
    """
    model = unwrapped(model)
    if isinstance(model, CrateMAE):
        patches = model.patch_count(images)
        noise = torch.zeros(len(images), patches, device=images.device)
        model(images, mask_ratio=0.0, noise=noise)
    elif "mask_ratio" in inspect.signature(model.forward).parameters:
        model(images, mask_ratio=0.0)
    else:
        model(images)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, DataParallel, DistributedDataParallel or AveragedModel."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel | AveragedModel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """A block in which the model is in evaluation mode; afterwards each of its modules has its mode back."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


def _layers_of(model: nn.Module) -> list[_Steps]:
    """The layers of a model, in the order of their registration."""
    beside: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "norm", None), nn.Module) and isinstance(getattr(module, "fn", None), nn.Module):
            beside.setdefault(name.rpartition(".")[0], []).append(module)
    found: list[_Steps] = []
    counts: dict[Stack, int] = {"encoder": 0, "decoder": 0}
    for name, steps in beside.items():
        attends = [isinstance(getattr(step.fn, "qkv", None), nn.Module) for step in steps]
        if len(steps) != 2 or sum(attends) != 1:
            continue
        stack: Stack = "encoder" if attends[0] else "decoder"
        attention, sparsify = steps if attends[0] else reversed(steps)
        found.append(_Steps(name, stack, counts[stack], attention, sparsify))
        counts[stack] += 1
    return found


def _watch(steps: _Steps, receive: Callable[[LayerTrace], None]) -> list[Any]:
    seen: dict[str, Tensor] = {}
    thread = threading.get_ident()

    def keep(name: str, name_of_input: str | None = None) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if threading.get_ident() != thread:
                return
            seen[name] = output
            if name_of_input:
                seen[name_of_input] = inputs[0]

        return hook

    def done(*_: Any) -> None:
        if threading.get_ident() != thread:
            return
        receive(_trace_of(steps, seen))
        seen.clear()

    attention, sparsify = steps.attention, steps.sparsify
    hooks = [
        (attention, "norm", keep("normed", "attended")),
        (attention, "fn.qkv", keep("w")),
        (attention, "fn", keep("update")),
        (sparsify, "norm", keep("unsparsified", "given")),
        (sparsify, "fn", keep("sparsified")),
        (sparsify if steps.stack == "encoder" else attention, "fn", done),
    ]
    return [step.get_submodule(name).register_forward_hook(hook) for step, name, hook in hooks]


def _trace_of(steps: _Steps, seen: dict[str, Tensor]) -> LayerTrace:
    module, step = steps.attention.get_submodule("fn"), steps.sparsify.get_submodule("fn")
    is_encoder = steps.stack == "encoder"
    compressed = seen["given"] if is_encoder else seen["attended"] - seen["update"]
    # The output of CRATE-alpha's overcomplete step is added to its input.
    output = seen["sparsified"] if is_encoder else compressed
    if is_encoder and hasattr(step, "D"):
        output = seen["given"] + output
    lambd = getattr(step, "lambd", getattr(step, "lmbda", None)) if is_encoder else None
    return LayerTrace(
        name=steps.name,
        stack=steps.stack,
        index=steps.index,
        norm=steps.attention.get_submodule("norm"),
        module=module,
        lambd=None if lambd is None else float(lambd),
        tokens=seen["attended"] if is_encoder else seen["given"],
        attended=seen["attended"],
        compressed=compressed,
        projected=_by_head(seen["w"], _setting(module, "heads")),
        unsparsified=seen["unsparsified"],
        sparsified=seen["sparsified"],
        output=output,
    )


def _setting(module: nn.Module, name: str) -> Any:
    """An attribute of a module that is a plain value, where ``nn.Module`` is annotated to have tensors and modules alone."""
    return getattr(module, name)


def _by_head(w: Tensor, heads: int) -> Tensor:
    return w.unflatten(-1, (heads, -1)).transpose(1, 2)
