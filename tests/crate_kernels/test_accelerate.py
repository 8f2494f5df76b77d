"""Swapping the modules of an existing model, and our modules themselves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import error
from torch import Tensor, nn

from crate_kernels import ISTA, MSSA, accelerate
from crate_kernels.mssa.reference import mssa as reference_mssa

# Stand-ins with the structure of the official modules: the attributes, parameter names and formulas, nothing else.


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float = 0.0, softmax: bool = True) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.attend = nn.Softmax(dim=-1) if softmax else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, heads * dim_head, bias=False)
        projects = heads > 1 or dim_head != dim
        self.to_out = (
            nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout)) if projects else nn.Identity()
        )

    def forward(self, x: Tensor, return_attention: bool = False, return_key: bool = False) -> Tensor:
        if return_key:
            return self.qkv(x)
        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attention = self.attend(w @ w.mT * self.scale)
        if return_attention:
            return attention
        return self.to_out((self.dropout(attention) @ w).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, linear: bool = False, lambd: float = 0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim) / dim**0.5)
        self.step_size, self.lambd, self.linear = 0.1, lambd, linear

    def forward(self, x: Tensor) -> Tensor:
        if self.linear:
            return F.linear(x, self.weight)
        descent = x @ self.weight - x @ self.weight.t() @ self.weight
        return F.relu(x + self.step_size * descent - self.step_size * self.lambd)


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Model(nn.Module):
    """Two encoder layers and a decoder layer: four modules to swap, a linear step to leave."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            nn.ModuleList([PreNorm(dim, Attention(dim, heads, dim // heads)), PreNorm(dim, FeedForward(dim))])
            for _ in range(2)
        )
        self.decoder = nn.ModuleList(
            [PreNorm(dim, FeedForward(dim, linear=True)), PreNorm(dim, Attention(dim, 1, dim))]
        )

    def forward(self, x: Tensor) -> Tensor:
        for attention, sparsify in self.encoder:
            x = sparsify(x + attention(x))
        densify, attention = self.decoder
        x = densify(x)
        return x - attention(x)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    return out.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def test_same_outputs_and_gradients_and_says_what_it_swapped() -> None:
    model, x = Model(), torch.randn(3, 20, 16)
    out, grads = step(model, x)
    done = accelerate(model)
    assert done.swapped == {
        "encoder.0.0.fn": MSSA,
        "encoder.0.1.fn": ISTA,
        "encoder.1.0.fn": MSSA,
        "encoder.1.1.fn": ISTA,
        "decoder.1.fn": MSSA,
    }
    assert "linear" in done.left_alone["decoder.0.fn"]
    assert "swapped 5 modules" in str(done) and "decoder.0.fn" in str(done)
    found, found_grads = step(model, x)
    assert error(found, out) < 1e-5
    assert max(map(error, found_grads, grads)) < 1e-5
    assert accelerate(model).swapped == {}, "a second call finds nothing to do"


def test_parameters_hooks_optimiser_and_references_stay_valid() -> None:
    model, x = Model(), torch.randn(2, 20, 16)
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    sparse = model.encoder[0][1].fn
    calls = []
    sparse.register_forward_hook(lambda module, args, out: calls.append((out == 0).float().mean().item()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerate(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == names
    assert model.encoder[0][1].fn is sparse and isinstance(sparse, ISTA)
    before = sparse.weight.detach().clone()
    step(model, x)
    optimizer.step()
    assert len(calls) == 1 and 0 < calls[0] < 1
    assert not torch.equal(sparse.weight, before)


def test_undo_copy_and_pickle() -> None:
    model, x = Model(), torch.randn(2, 20, 16)
    expected = model(x)
    done = accelerate(model)
    clone = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert type(clone.encoder[0][0].fn) is MSSA and error(clone(x), expected) < 1e-5
    done.undo()
    assert type(model.encoder[0][0].fn) is Attention and type(model.encoder[0][1].fn) is FeedForward
    assert torch.equal(model(x), expected)


def test_official_keywords_still_work() -> None:
    attention, x = Attention(16, 2, 8), torch.randn(2, 5, 16)
    maps, keys = attention(x, return_attention=True), attention(x, return_key=True)
    accelerate(attention)
    assert type(attention) is MSSA
    assert error(attention(x, return_attention=True), maps) < 1e-6
    assert torch.equal(attention(x, return_key=True), keys)


def replaced_on_the_instance() -> nn.Module:
    module = FeedForward(16)
    module.forward = lambda x: x
    return module


def hooked_inside() -> nn.Module:
    module = Attention(16, 2, 8)
    module.qkv.register_forward_hook(lambda *a: None)
    return module


def subclassed_projection() -> nn.Module:
    class LowRank(nn.Linear):
        pass

    module = Attention(16, 2, 8)
    module.qkv = LowRank(16, 16, bias=False)
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Attention(16, 2, 8, dropout=0.1), "dropout"),
        (Attention(16, 2, 8, softmax=False), "does not compute MSSA"),
        (FeedForward(16, linear=True), "does not compute ISTA"),
        (replaced_on_the_instance(), "replaced on the instance"),
        (hooked_inside(), "hooks"),
        (subclassed_projection(), "plain Linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_leaves_alone_what_it_would_change(module: nn.Module, reason: str) -> None:
    kind, x = type(module), torch.randn(1, 4, 16)
    torch.manual_seed(1)
    expected = module(x)
    done = accelerate(module)
    assert not done.swapped and reason in done.left_alone[""]
    assert type(module) is kind
    torch.manual_seed(1)
    assert torch.equal(module(x), expected)


def test_random_state_is_untouched() -> None:
    model = Model()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    accelerate(model)
    assert torch.equal(torch.rand(2), expected)


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        accelerate({})


def test_modules_bear_the_official_names_and_formulas() -> None:
    attention = MSSA(12, heads=3, dim_head=4)
    assert [name for name, _ in attention.named_parameters()] == ["qkv.weight", "to_out.0.weight", "to_out.0.bias"]
    assert [name for name, _ in MSSA(12, heads=1, dim_head=12).named_parameters()] == ["qkv.weight"]
    assert [name for name, _ in ISTA(12).named_parameters()] == ["weight"]
    x = torch.randn(2, 5, 12)
    expected = reference_mssa(x, attention.qkv.weight, *attention.to_out[0].parameters(), 3, 0.5, False)
    assert error(attention(x), expected) < 1e-6
    with pytest.raises(ValueError, match="dropout: expected 0"):
        MSSA(12, dropout=0.1)
