"""What people do to the modules of a model that they have: attach, wrap, replace, freeze, tie, set.

Each edit changes a model in place, or returns the model to go on with, and chooses by the given random numbers, so that two
models of one structure get the same. It finds its targets by structure: official-shaped modules, ours and accelerated ones alike.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from random import Random

import torch
from official import DecoderFeedForward, FeedForward, Overcomplete
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from crate_kernels import ISTA, DecoderStep, OvercompleteISTA

Edit = Callable[[nn.Module, Random], nn.Module | None]


class LoRA(nn.Module):
    """A low-rank adapter around a Linear, as the usual library builds it: it has the attributes of what it wraps."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        like = dict(dtype=base_layer.weight.dtype)
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False, **like)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False, **like)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.base_layer.weight += self.lora_B.weight @ self.lora_A.weight
        return self.base_layer


class Scaled(nn.Module):
    """A module around another, or a parametrization."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = nn.Identity() if inner is None else inner

    def forward(self, x: Tensor) -> Tensor:
        return 0.75 * self.inner(x)


class LayerNormPlusOne(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Halved(Tensor):
    """A weight that knows what a linear layer makes of it, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        if function is not torch.nn.functional.linear:
            return out
        return 0.5 * out.as_subclass(Tensor)


def of_another_kind(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Halved))


def is_attention(module: nn.Module) -> bool:
    return hasattr(module, "qkv") and hasattr(module, "heads")


def dictionary(module: nn.Module) -> str:
    """The name of the parameter of a sparse step, or of the decoder's."""
    return "D" if hasattr(module, "D") else "weight"


def is_step(module: nn.Module) -> bool:
    return isinstance(module, (FeedForward, Overcomplete, ISTA, DecoderStep, OvercompleteISTA))


def is_sparse_step(module: nn.Module) -> bool:
    return is_step(module) and not is_linear_step(module)


def is_linear_step(module: nn.Module) -> bool:
    return isinstance(module, (DecoderStep, DecoderFeedForward))


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def is_norm(module: nn.Module) -> bool:
    return type(module) is nn.LayerNorm


def is_called(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList)


class NothingFits(Exception):
    """The model has no module to edit in this way."""


def one_of(model: nn.Module, fits: Callable[[nn.Module], bool], random: Random) -> nn.Module:
    fitting = [module for module in model.modules() if module is not model and fits(module)]
    if not fitting:
        raise NothingFits
    return random.choice(fitting)


def replace(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is module:
                parent._modules[name] = other.to(next(model.parameters()).dtype)
                return


def doing(fits: Callable[[nn.Module], bool], change: Callable[[nn.Module], object]) -> Edit:
    """``change`` one of the modules that fit."""
    return lambda model, random: change(one_of(model, fits, random)) and None


def replacing(fits: Callable[[nn.Module], bool], other: Callable[[nn.Module], nn.Module]) -> Edit:
    def edit(model: nn.Module, random: Random) -> None:
        module = one_of(model, fits, random)
        replace(model, module, other(module))

    return edit


def setting(fits: Callable[[nn.Module], bool], name: str, value: Callable[[nn.Module], object]) -> Edit:
    return doing(fits, lambda module: setattr(module, name, value(module)))


def weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        nn.utils.weight_norm(module, dictionary(module))


def load_other_values(model: nn.Module, random: Random) -> None:
    model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})


def freeze(model: nn.Module, random: Random) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(random.random() < 0.5)


def tie(fits: Callable[[nn.Module], bool]) -> Edit:
    def edit(model: nn.Module, random: Random) -> None:
        module = one_of(model, fits, random)
        name = dictionary(module)
        shape = getattr(module, name).shape
        others = lambda other: fits(other) and dictionary(other) == name and getattr(other, name).shape == shape  # noqa: E731
        setattr(module, name, getattr(one_of(model, others, random), name))

    return edit


def as_learned(*names: str) -> Edit:
    """The number that has one of these names becomes a parameter."""

    def change(module: nn.Module) -> None:
        (name,) = (name for name in names if hasattr(module, name))
        value = getattr(module, name)
        delattr(module, name)
        setattr(module, name, nn.Parameter(getattr(module, dictionary(module)).new_tensor(value)))

    def has_number(module: nn.Module) -> bool:
        return is_sparse_step(module) and any(isinstance(getattr(module, name, None), float) for name in names)

    return doing(has_number, change)


def set_step_size(value: object) -> Edit:
    return doing(is_sparse_step, lambda m: setattr(m, "eta" if hasattr(m, "D") else "step_size", value))


def evaluate_some(model: nn.Module, random: Random) -> None:
    for module in model.modules():
        module.training = random.random() < 0.5


def drop_everything(model: nn.Module, random: Random) -> None:
    """The one probability above 0 that leaves nothing to chance."""
    one_of(model, lambda module: isinstance(module, nn.Dropout), random).p = 1.0


def twice(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: 2 * forward(x)


def with_bias(module: nn.Linear) -> nn.Linear:
    return nn.Linear(module.in_features, module.out_features)


EDITS: dict[str, Edit] = {
    "forward hook": doing(is_called, lambda m: m.register_forward_hook(lambda m, args, out: scaled(out, 1.5))),
    "forward pre-hook": doing(
        is_called, lambda m: m.register_forward_pre_hook(lambda m, args: (0.5 * args[0], *args[1:]))
    ),
    "backward hook": doing(is_called, lambda m: m.register_full_backward_hook(lambda m, into, out: scaled(into, 2.0))),
    "backward pre-hook": doing(is_called, lambda m: m.register_full_backward_pre_hook(lambda m, out: scaled(out, 3.0))),
    "hook come and gone": doing(is_called, lambda m: m.register_forward_hook(lambda *args: 1 / 0).remove()),
    "adapter": replacing(is_linear, LoRA),
    "wrapper": replacing(lambda m: is_attention(m) or is_step(m) or is_norm(m) or isinstance(m, nn.Softmax), Scaled),
    "wrapped block": replacing(lambda m: hasattr(m, "layers") or hasattr(m, "fn"), Scaled),
    "parametrized linear": doing(is_linear, lambda m: parametrize.register_parametrization(m, "weight", Scaled())),
    "parametrized norm": doing(is_norm, lambda m: parametrize.register_parametrization(m, "weight", Scaled())),
    "parametrized step": doing(is_step, lambda m: parametrize.register_parametrization(m, dictionary(m), Scaled())),
    "weight norm": doing(lambda m: is_linear(m) or is_step(m), weight_norm),
    "pruned": doing(lambda m: is_linear(m) or is_step(m), lambda m: prune.random_unstructured(m, dictionary(m), 0.3)),
    "other values loaded": load_other_values,
    "weight of another kind": doing(lambda m: is_linear(m) or is_linear_step(m), of_another_kind),
    "patch embedding wrapped": replacing(lambda m: type(m).__name__ == "PatchEmbed", Scaled),
    "patches embedded otherwise": setting(lambda m: isinstance(m, nn.Conv2d), "padding", lambda m: (1, 1)),
    "bias on qkv": doing(is_attention, lambda m: setattr(m, "qkv", with_bias(m.qkv).to(m.qkv.weight.dtype))),
    "plain projection": doing(is_attention, lambda m: setattr(m, "to_out", m.to_out[0])),
    "more behind the projection": doing(is_attention, lambda m: m.to_out.append(nn.Tanh())),
    "norm without weights": replacing(is_norm, lambda m: nn.LayerNorm(m.normalized_shape, elementwise_affine=False)),
    "norm of a subclass": replacing(is_norm, lambda m: LayerNormPlusOne(m.normalized_shape)),
    "another norm": replacing(is_norm, lambda m: nn.RMSNorm(m.normalized_shape)),
    "no norm": replacing(is_norm, lambda m: nn.Identity()),
    "norm's epsilon": setting(is_norm, "eps", lambda m: 0.1),
    "forward replaced": doing(is_called, lambda m: setattr(m, "forward", twice(m.forward))),
    "single precision": lambda model, random: model.float(),
    "a norm in single precision": doing(is_norm, nn.Module.float),
    "some frozen": freeze,
    "tied linears": tie(is_linear),
    "tied steps": tie(is_step),
    "copy": lambda model, random: copy.deepcopy(model),
    "modes by chance": evaluate_some,
    "evaluation": lambda model, random: model.eval(),
    "dropout of everything": drop_everything,
    "step size": set_step_size(0.3),
    "step size as a tensor": set_step_size(torch.tensor(0.3)),
    "learned step size": as_learned("step_size", "eta"),
    "learned lambda": as_learned("lambd", "lmbda"),
    "scale": setting(is_attention, "scale", lambda m: 0.7 * m.scale),
    "learned scale": setting(
        is_attention, "scale", lambda m: nn.Parameter(torch.as_tensor(m.scale).detach().to(m.qkv.weight.dtype))
    ),
    "heads": setting(is_attention, "heads", lambda m: 4),
    "softmax over rows": setting(lambda m: isinstance(m, nn.Softmax), "dim", lambda m: 2),
}


def scaled(value: object, factor: float) -> object:
    if isinstance(value, tuple):
        return tuple(scaled(one, factor) for one in value)
    return factor * value if isinstance(value, Tensor) else value
