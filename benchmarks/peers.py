"""Peers that ours is compared with: plain PyTorch, other attention code, torch.compile, and ViT-MAE.

"Best composed" is CRATE in as few products as PyTorch's own calls allow (one for ISTA, one attention call); torch.compile fuses
the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import crate_kernels
from benchmarks.records import in_one_line
from crate_kernels import AttentionWeights, Norm
from crate_kernels.ista.form import one_product
from crate_mae.classifiers import Classifier
from crate_mae.compilation import obstacle_to_compiling
from crate_mae.layers import DecoderBlock, EncoderBlock
from crate_mae.masks import kept_patches, removed_patches
from crate_mae.model import CrateMAE

Function = Callable[..., Tensor]
Model = CrateMAE | Classifier
Stream = Literal["float32", "16bit"]

# Without CUDA graphs of its own: where graphs are compared, every provider gets the same.
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"

LIBRARY, COMPILED, MAX_AUTOTUNED = GROUPS = ("library", "compiled", "max-autotune")
GROUP_OF_MODE = {None: LIBRARY, "default": COMPILED, MAX_AUTOTUNE: MAX_AUTOTUNED}


class Absent(RuntimeError):
    """A peer cannot take part on this machine; the message says why."""


def needed(package: str) -> Any:
    """A package that only some peers need, imported.

    Raises:
        Absent: it is not installed, or does not work with this PyTorch.
    """
    try:
        return import_module(package)
    except (ImportError, RuntimeError) as problem:
        name = package.partition(".")[0]
        raise Absent(f"it needs the package {name}: {in_one_line(problem)}") from problem


def compiled(function: Callable[..., Any], mode: str, device: torch.device, *, fullgraph: bool = True) -> Function:
    """``function`` under torch.compile, for one set of shapes.

    Raises:
        Absent: this machine has not got what torch.compile needs.
    """
    if obstacle := obstacle_to_compiling(device):
        raise Absent(obstacle)
    return torch.compile(function, mode=mode, fullgraph=fullgraph, dynamic=False)


def forced(implementation: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with every operator of ours in one implementation."""

    def run(*arguments: Any, **options: Any) -> Any:
        with crate_kernels.use(implementation):
            return function(*arguments, **options)

    return run


@dataclass(frozen=True)
class Peer:
    """Other code that computes an operator.

    function: takes the operator's inputs.
    mode: of torch.compile, if it is compiled.
    implementation: that the operators of ours in it are forced to.
    separate: it takes query, key and value. It gets one tensor three times, and is timed with and without adding up its three
        gradients.
    made: makes what else the function takes, by name, before anything is timed.
    """

    function: Function
    mode: str | None = None
    implementation: str | None = None
    separate: bool = False
    made: Callable[[], dict[str, Any]] = dict

    @property
    def group(self) -> str:
        return GROUP_OF_MODE[self.mode]

    def ready(self, device: torch.device) -> Function:
        """The function to call.

        Raises:
            Absent: it cannot run on this machine.
        """
        made = self.made()
        function = partial(self.function, **made) if made else self.function
        function = function if self.mode is None else compiled(function, self.mode, device)
        return forced(self.implementation, function) if self.implementation else function


def sdpa(backend: SDPBackend) -> Function:
    """PyTorch's attention by one backend, and no other."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, **mask)

    return attend


def flex(query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value, **mask)


def varlen(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, longest: int, **window: Any) -> Tensor:
    """PyTorch's attention within sequences that lie one after another; samples are such sequences, too."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))  # [batch * tokens, heads, head_dim]
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **window)
    assert isinstance(out, Tensor)  # nothing besides was asked for
    return out.unflatten(0, (query.shape[0], -1)).transpose(1, 2)


ATTENTION = {
    "sdpa flash": Peer(sdpa(SDPBackend.FLASH_ATTENTION), separate=True),
    "sdpa cudnn": Peer(sdpa(SDPBackend.CUDNN_ATTENTION), separate=True),
    "sdpa efficient": Peer(sdpa(SDPBackend.EFFICIENT_ATTENTION), separate=True),
    "flex": Peer(flex, mode="default", separate=True),
}


# Best composed: the arguments of the operators of the same name.


def attention(w: Tensor, **mask: Any) -> Tensor:
    return F.scaled_dot_product_attention(w, w, w, **mask)


def normalised(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def mssa(x: Tensor, weights: AttentionWeights, num_heads: int) -> Tensor:
    assert weights.out is not None  # the models compared here all have one
    w = F.linear(x, weights.qkv).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return F.linear(attention(w).transpose(1, 2).flatten(2), weights.out, weights.out_bias)


def ista(x: Tensor, weight: Tensor, *, step_size: float, lambd: float) -> Tensor:
    if one_product(x.numel() // x.shape[-1], x.shape[-1]):
        product = x @ (weight - weight.T @ weight)
    else:
        product = (x - x @ weight.T) @ weight
    return F.relu(x + step_size * product - step_size * lambd)


def norm_linear(x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    return F.linear(normalised(x, norm), weight)


def encoder_layer(
    x: Tensor,
    attention_norm: Norm,
    weights: AttentionWeights,
    sparse_norm: Norm,
    dictionary: Tensor,
    *,
    num_heads: int,
    step_size: float,
    lambd: float,
) -> Tensor:
    z = x + mssa(normalised(x, attention_norm), weights, num_heads)
    return ista(normalised(z, sparse_norm), dictionary, step_size=step_size, lambd=lambd)


def decoder_layer(
    x: Tensor, step_norm: Norm, weight: Tensor, attention_norm: Norm, weights: AttentionWeights, *, num_heads: int
) -> Tensor:
    g = norm_linear(x, weight, step_norm)
    return g - mssa(normalised(g, attention_norm), weights, num_heads)


class BestComposed(nn.Module):
    """A CrateMAE or a CRATE, its parameters shared, with best composed layers; its forward gives the loss alone.

    Raises:
        Absent: the model is a CRATE-alpha, whose layers nobody has written so.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        if isinstance(model, Classifier) and model.config.family == "crate_alpha":
            raise Absent("best composed has no CRATE-alpha")
        self.model = model

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        model = self.model
        if isinstance(model, Classifier):
            return F.cross_entropy(model.forward_head(self._encoded(model.embed(images))), target)
        kept, pixels = kept_patches(target, 0.75), model.patchify(images)
        x = self._encoded(model._placed(model._embed_kept(pixels, kept), images))
        for block in model.decoder_blocks:
            assert isinstance(block, DecoderBlock)
            x = decoder_layer(x, *block.weights(), num_heads=model.config.decoder_num_heads)
        return model._loss(
            pixels, model.decoder_pred(model.decoder_norm(x))[:, 1:], removed_patches(kept, target.shape[1])
        )

    def _encoded(self, x: Tensor) -> Tensor:
        config = self.model.config
        for block in self.model.encoder_layers:
            assert isinstance(block, EncoderBlock)
            x = encoder_layer(
                x, *block.weights(), num_heads=config.num_heads, step_size=config.step_size, lambd=config.lambd
            )
        return self.model._normed(x)


class Official(nn.Module):
    """A model of ours whose forward gives the loss alone.

    ``target``: the masking noise of a CrateMAE, or the labels of a Classifier.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        if isinstance(self.model, Classifier):
            return F.cross_entropy(self.model(images), target)
        return self.model(images, noise=target).loss


class ViTMAE(nn.Module):
    """ViT-MAE-Base of transformers with SDPA, randomly initialised; it takes the same images and masking noise.

    Raises:
        Absent: transformers is not installed.
    """

    def __init__(self, image_size: int, patch_size: int, **sizes: int) -> None:
        super().__init__()
        transformers = needed("transformers")
        config = transformers.ViTMAEConfig(image_size=image_size, patch_size=patch_size, mask_ratio=0.75, **sizes)
        self.model = transformers.ViTMAEForPreTraining._from_config(config, attn_implementation="sdpa")
        if self.model.config._attn_implementation != "sdpa":
            raise Absent(f"ViT-MAE took {self.model.config._attn_implementation} attention rather than SDPA")

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return self.model(images, noise=noise).loss


@dataclass(frozen=True)
class Step:
    """One way to take a whole training step.

    model: wraps a model of ours; or ``ViTMAE``, which is another model.
    implementation: of the operators of ours in it.
    stream, recompute: ``Backbone``'s attributes.
    mode: of torch.compile, if it is compiled.
    graph: replayed from a CUDA graph.
    """

    model: type[nn.Module] = Official
    implementation: str = "reference"
    stream: Stream = "float32"
    recompute: bool = False
    mode: str | None = None
    graph: bool = False

    @property
    def ours(self) -> bool:
        return self.model is Official and self.implementation != "reference"


def _variants(implementation: str) -> dict[str, Step]:
    step = partial(Step, implementation=implementation)
    return {
        implementation: step(),
        f"{implementation} compiled": step(mode="default"),
        f"{implementation} 16bit": step(stream="16bit"),
        f"{implementation} 16bit compiled": step(stream="16bit", mode="default"),
        f"{implementation} recompute": step(stream="16bit", recompute=True),
        f"{implementation} float32 recompute": step(recompute=True),
        f"{implementation} graph": step(stream="16bit", graph=True),
    }


STEPS: dict[str, Step] = {
    "reference": Step(),
    "reference graph": Step(graph=True),
    "official compiled": Step(mode="default"),
    "official compiled graph": Step(mode="default", graph=True),
    "official max-autotune": Step(mode=MAX_AUTOTUNE),
    "best composed": Step(BestComposed, mode="default"),
    **_variants("composed"),
    **_variants("triton"),
    "vit-mae sdpa": Step(ViTMAE),
    "vit-mae compiled": Step(ViTMAE, mode="default"),
}
