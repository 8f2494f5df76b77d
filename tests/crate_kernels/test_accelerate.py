"""Swapping the modules of an existing model, and our modules themselves."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from edits import LoRA
from official import Alpha, Attention, FeedForward, Model, Overcomplete
from support import error, small_model
from torch import Tensor, nn

import crate_kernels
from crate_kernels import ISTA, MSSA, DecoderStep, OvercompleteISTA, accelerate, ista
from crate_kernels.mssa.reference import mssa as reference_mssa
from crate_kernels.renamed import CausalMSSA, CausalMSSAOfGPT, ISTAOfD, OvercompleteISTAOfCLIPA
from crate_kernels.shared_attention.mask import NO_MASK


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_same_outputs_and_gradients_and_says_what_it_swapped() -> None:
    model, x = Model(), torch.randn(3, 20, 16)
    out, grads = step(model, x)
    done = accelerate(model)
    assert done.swapped == {
        "encoder.0.0.fn": MSSA,
        "encoder.0.1.fn": ISTA,
        "encoder.1.0.fn": MSSA,
        "encoder.1.1.fn": ISTA,
        "decoder.0.fn": DecoderStep,
        "decoder.1.fn": MSSA,
    }
    assert not done.left_alone
    assert "swapped 6 modules, left 0 alone" in str(done) and "  decoder.0.fn    yes      DecoderStep" in str(done)
    found, found_grads = step(model, x)
    assert error(found, out) < 1e-5
    assert max(map(error, found_grads, grads)) < 1e-5
    assert accelerate(model).swapped == {}, "a second call finds nothing to do"


@pytest.mark.parametrize("decouple", [True, False])
def test_crate_alpha(decouple: bool) -> None:
    model, x = Alpha(decouple), torch.randn(2, 20, 16)
    names = list(model.state_dict())
    out, grads = step(model, x)
    done = accelerate(model)
    assert done.swapped == {"attention.fn": MSSA, "sparsify.fn": OvercompleteISTA} and not done.left_alone
    assert list(model.state_dict()) == names
    found, found_grads = step(model, x)
    assert max(map(error, (found, *found_grads), (out, *grads))) < 1e-5
    done.undo()
    assert type(model.sparsify.fn) is Overcomplete and torch.equal(step(model, x)[0], out)


def test_undo_leaves_no_frozen_matrix_behind() -> None:
    module = FeedForward(16)
    done = accelerate(module)
    module.freeze()
    done.undo()
    assert type(module) is FeedForward and not list(module.buffers())


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


# What looks like an official module and is not quite one. The subclasses below change one thing each.


class LearnedScoreBias(Attention):
    def __init__(self) -> None:
        super().__init__(16, 2, 8)
        self.score_bias = nn.Parameter(torch.zeros(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.qkv(x).unflatten(-1, (2, -1)).transpose(1, 2)
        return self.to_out((self.attend(w @ w.mT * self.scale + self.score_bias) @ w).transpose(1, 2).flatten(2))


def local_window(window: int, zero: bool = False) -> Attention:
    class LocalWindow(Attention):
        def forward(self, x: Tensor) -> Tensor:
            position = torch.arange(x.shape[1])
            far = (position - position[:, None]).abs() > window
            w = self.qkv(x).unflatten(-1, (2, -1)).transpose(1, 2)
            scores = (w @ w.mT * self.scale).masked_fill(far, -torch.inf)
            return self.to_out((self.dropout(self.attend(scores)) @ w).transpose(1, 2).flatten(2))

    module = LocalWindow(16, 2, 8)
    if zero:
        nn.init.zeros_(module.to_out[0].weight)
        nn.init.zeros_(module.to_out[0].bias)
    return module


class FunctionalDropout(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class NeedsMask(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x) * mask


class AllowsMask(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x) if mask is None else super().forward(x) * mask


class ReturnsTuple(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class KeepsItsMap(Attention):
    def forward(self, x: Tensor) -> Tensor:
        self.map = super().forward(x, return_attention=True)
        return super().forward(x)


class SoftCapped(Attention):
    """Scores of up to 50 are hardly changed."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.qkv(x).unflatten(-1, (2, -1)).transpose(1, 2)
        weights = self.attend(50 * torch.tanh(w @ w.mT * self.scale / 50))
        return self.to_out((self.dropout(weights) @ w).transpose(1, 2).flatten(2))


class DetachedKeys(Attention):
    def forward(self, x: Tensor) -> Tensor:
        w = self.qkv(x).unflatten(-1, (2, -1)).transpose(1, 2)
        weights = self.dropout(self.attend(w @ w.detach().mT * self.scale))
        return self.to_out((weights @ w).transpose(1, 2).flatten(2))


class AppendsItsMap(Attention):
    def forward(self, x: Tensor) -> Tensor:
        self.maps.append(super().forward(x, return_attention=True))
        return super().forward(x)


class Relu6(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=6)


class SmallThreshold(FeedForward):
    """A tenth of a per cent off, which 16 bits do not show."""

    def forward(self, x: Tensor) -> Tensor:
        descent = x @ self.weight - x @ self.weight.t() @ self.weight
        return F.relu(x + self.step_size * descent - 0.999 * self.step_size * self.lambd)


class MayBeAnother(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.switch else super().forward(x)


class OfOneImage(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) > 1 else x


class Raises(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no\nsuch luck")


class LinearAndMore(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + 1


class StepSizeOfTheClass(nn.Module):
    step_size, lambd = 0.1, 0.5

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)

    forward = FeedForward.forward


class OneStep(Overcomplete):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.eta * (x @ self.D) - self.eta * self.lmbda) @ self.D1.t()


class CountsZeros(FeedForward):
    def sparsity(self, x: Tensor) -> Tensor:
        return (self(x) == 0).float().mean()


class HasProperty(FeedForward):
    @property
    def width(self) -> int:
        return self.weight.shape[0]


class StaysInEvaluation(FeedForward):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


class CausalWithMask(Attention):
    """Official names, and a causal mask in a buffer."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(16, 2, 8)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        w, tokens = self.qkv(x).unflatten(-1, (2, -1)).transpose(1, 2), x.shape[1]
        scores = (w @ w.mT * self.scale).masked_fill(self.mask[..., :tokens, :tokens] == 0, -torch.inf)
        return self.to_out((self.dropout(self.attend(scores)) @ w).transpose(1, 2).flatten(2))


class FreeBeyondItsMask(CausalWithMask):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[1] <= 8 else Attention.forward(self, x)


def changed(module: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    change(module)
    return module


def attention(change: Callable[[nn.Module], object]) -> nn.Module:
    return changed(Attention(16, 2, 8), change)


def sparse_step(change: Callable[[nn.Module], object]) -> nn.Module:
    return changed(FeedForward(16), change)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def lambda_as(register: str, value: object) -> Callable[[nn.Module], object]:
    def change(module: nn.Module) -> None:
        del module.lambd
        getattr(module, register)("lambd", value)

    return change


CHANGED = {
    "functional dropout": (lambda: FunctionalDropout(16, 2, 8), "in training mode"),
    "functional dropout in eval mode": (lambda: FunctionalDropout(16, 2, 8).eval(), "in training mode"),
    "no softmax": (lambda: Attention(16, 2, 8, softmax=False), "attend is of class Identity"),
    "window of 8": (lambda: local_window(8), "does not compute MSSA"),
    "window of 64": (lambda: local_window(64), "does not compute MSSA"),
    "window of 64, bfloat16": (lambda: local_window(64).bfloat16(), "does not compute MSSA"),
    "window, zero projection": (lambda: local_window(8, zero=True), "does not compute MSSA"),
    "score bias": (LearnedScoreBias, "score_bias"),
    "soft-capped scores": (lambda: SoftCapped(16, 2, 8), "does not compute MSSA"),
    "keys without gradient": (lambda: DetachedKeys(16, 2, 8), "MSSA in training mode, in its gradients"),
    "collects its maps": (
        lambda: changed(AppendsItsMap(16, 2, 8), lambda m: setattr(m, "maps", [])),
        "changes its own maps",
    ),
    "window of 200": (lambda: local_window(200), "does not compute MSSA of 300 tokens"),
    "threshold of 6": (lambda: Relu6(16), "does not compute ISTA of large values"),
    "threshold a little off, bfloat16": (lambda: SmallThreshold(16).bfloat16(), "does not compute ISTA"),
    "batch of one": (lambda: OfOneImage(16), "does not compute ISTA of one token"),
    "reads a switch": (
        lambda: changed(MayBeAnother(16), lambda m: setattr(m, "switch", False)),
        "forward reads switch, which ISTA does not",
    ),
    "a mask of one": (lambda: CausalWithMask(torch.ones(1, 1)), "it has mask"),
    "free beyond its mask": (lambda: FreeBeyondItsMask(torch.ones(8, 8).tril()), "beyond its mask, where it runs"),
    "needs a mask": (lambda: NeedsMask(16, 2, 8), "forward takes x, mask"),
    "allows a mask": (lambda: AllowsMask(16, 2, 8), "forward takes x, mask"),
    "returns a tuple": (lambda: ReturnsTuple(16, 2, 8), "another type"),
    "keeps its map": (lambda: KeepsItsMap(16, 2, 8), "changes its own map"),
    "fused qkv": (lambda: attention(lambda m: setattr(m, "qkv", nn.Linear(16, 48, bias=False))), "calling it failed"),
    "attention on meta": (lambda: Attention(16, 2, 8).to("meta"), "calling it failed"),
    "forward replaced": (lambda: sparse_step(lambda m: setattr(m, "forward", m.forward)), "forward was replaced"),
    "linear with a bias": (
        lambda: LinearAndMore(16),
        "does not compute ISTA in training mode",
    ),
    "overcomplete": (
        lambda: sparse_step(lambda m: setattr(m, "weight", nn.Parameter(torch.randn(16, 32)))),
        "calling it failed",
    ),
    "negative lambda": (lambda: FeedForward(16, lambd=-0.5), "lambd"),
    "step size of the class": (StepSizeOfTheClass, "step_size"),
    "lambda that leaves nothing": (lambda: FeedForward(16, lambd=100.0), "does not compute ISTA"),
    "another threshold": (lambda: sparse_step(lambda m: setattr(m, "threshold", 0.5)), "threshold"),
    "soft threshold": (lambda: sparse_step(lambda m: setattr(m, "threshold", "soft")), "does not compute ISTA"),
    "parametrized": (
        lambda: sparse_step(lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Halved())),
        "parametrizations",
    ),
    "more methods": (lambda: CountsZeros(16), "defines sparsity"),
    "property": (lambda: HasProperty(16), "defines width"),
    "overridden method": (lambda: StaysInEvaluation(16), "defines train"),
    "raises": (lambda: Raises(16), "calling it failed: RuntimeError: no such luck"),
    "sparse step on meta": (lambda: FeedForward(16).to("meta"), "calling it failed"),
    "one step": (lambda: OneStep(16), "does not compute OvercompleteISTA"),
    "codes that are all zero": (lambda: Overcomplete(16, lmbda=100.0), "does not compute OvercompleteISTA"),
    "negative lmbda": (lambda: Overcomplete(16, lmbda=-0.1), "lambd"),
    "D of another width": (
        lambda: changed(Overcomplete(16), lambda m: setattr(m, "D1", nn.Parameter(torch.randn(8, 64)))),
        "calling it failed",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_leaves_alone_what_it_would_change(name: str) -> None:
    build, reason = CHANGED[name]
    module = build()
    kind, attributes = type(module), dict(vars(module))
    state = {key: id(value) for key, value in module.state_dict(keep_vars=True).items()}
    modes = [child.training for child in module.modules()]
    done = accelerate(module)
    assert not done.swapped and reason in done.left_alone[""]
    assert len(done.left_alone[""].splitlines()) == 1
    assert type(module) is kind and dict(vars(module)) == attributes
    assert {key: id(value) for key, value in module.state_dict(keep_vars=True).items()} == state
    assert [child.training for child in module.modules()] == modes


# What other people made of the official classes, by their structure.


class CausalOfGPT(nn.Module):
    """A language model's: GPT's names, no module for the softmax."""

    def __init__(self, flash: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.n_head, self.n_embd, self.dropout, self.flash = 2, 16, dropout, flash
        if not flash:
            self.register_buffer("bias", torch.ones(40, 40).tril().view(1, 1, 40, 40))

    def forward(self, x: Tensor) -> Tensor:
        w, tokens = self.c_attn(x).unflatten(-1, (2, 8)).transpose(1, 2), x.shape[1]
        if self.flash:
            out = F.scaled_dot_product_attention(w, w, w, is_causal=True)
        else:
            scores = (w @ w.mT / 8**0.5).masked_fill(self.bias[..., :tokens, :tokens] == 0, -torch.inf)
            out = self.attn_dropout(scores.softmax(-1)) @ w
        return self.resid_dropout(self.c_proj(out.transpose(1, 2).flatten(2)))


class WithoutDropout(nn.Module):
    """No dropout, and the projection plain."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.scale, self.attend = 2, 8**-0.5, nn.Softmax(dim=-1)
        self.qkv, self.to_out = nn.Linear(16, 16, bias=bias), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        w = self.qkv(x).unflatten(-1, (2, 8)).transpose(1, 2)
        return self.to_out((self.attend(w @ w.mT * self.scale) @ w).transpose(1, 2).flatten(2))


class StepOfD(nn.Module):
    """ISTA in CRATE-alpha's words."""

    def __init__(self) -> None:
        super().__init__()
        self.D, self.eta, self.lmbda = nn.Parameter(torch.randn(16, 16) / 4), 0.1, 0.1

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x - self.eta * (x @ self.D.t() - x) @ self.D - self.eta * self.lmbda)


class OfAlpha(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eta, self.lmbda, self.overcomplete_ratio, self.d = 0.1, 0.1, 4, 16
        self.D, self.D1 = (nn.Parameter(torch.randn(16, 64) / 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.eta * x @ self.D - self.eta * self.lmbda)
        z = F.relu(z - self.eta * (z @ self.D.t() - x) @ self.D - self.eta * self.lmbda)
        return z @ self.D1.t()


class OfCLIPA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eta, self.lmbda, self.d = 0.1, 0.1, 16
        self.c_fc, self.c_proj = (nn.Parameter(torch.randn(16, 64) / 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.eta * x @ self.c_fc - self.eta * self.lmbda)
        z = F.relu(z - self.eta * (z @ self.c_fc.t() - x) @ self.c_fc - self.eta * self.lmbda)
        return z @ self.c_proj.t()


def of_one_step() -> Attention:
    module = Attention(16, 2, 8)
    module.to_out = nn.Sequential(module.to_out[0])
    return module


MASK = torch.ones(1, 1, 40, 40)
TAKEN = {
    "dropout": (lambda: Attention(16, 2, 8, dropout=0.1).eval(), MSSA),
    "a bias on qkv": (lambda: WithoutDropout(bias=True), MSSA),
    "plain projection": (WithoutDropout, MSSA),
    "projection alone in a Sequential": (of_one_step, MSSA),
    "hooks inside": (lambda: attention(lambda m: m.qkv.register_forward_hook(lambda m, args, out: 2 * out)), MSSA),
    "qkv of a subclass": (lambda: attention(lambda m: setattr(m, "qkv", Low(16, 16, bias=False))), MSSA),
    "an adapter on qkv": (lambda: attention(lambda m: setattr(m, "qkv", LoRA(m.qkv))), MSSA),
    "causal, a mask of ones": (lambda: CausalWithMask(MASK.tril()), CausalMSSA),
    "causal, GPT's names": (CausalOfGPT, CausalMSSAOfGPT),
    "learned lambda": (lambda: sparse_step(lambda_as("register_parameter", nn.Parameter(torch.tensor(0.5)))), ISTA),
    "lambda as a buffer": (lambda: sparse_step(lambda_as("register_buffer", torch.tensor(0.5))), ISTA),
    "ISTA of D": (StepOfD, ISTAOfD),
    "CRATE-alpha's own": (OfAlpha, OvercompleteISTA),
    "CLIPA's names": (OfCLIPA, OvercompleteISTAOfCLIPA),
    "a D1 that is not used": (
        lambda: changed(Overcomplete(16), lambda m: setattr(m, "decouple", False)),
        OvercompleteISTA,
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_takes_what_computes_the_same(name: str) -> None:
    build, kind = TAKEN[name]
    module, x = build(), torch.randn(2, 20, 16)
    out, grads = step(module, x)
    names = list(module.state_dict())
    done = accelerate(module)
    assert done.swapped == {"": kind} and list(module.state_dict()) == names
    found, found_grads = step(module, x)
    assert error(found, out) < 1e-5
    assert len(found_grads) == len(grads) and max(map(error, found_grads, grads)) < 1e-5
    clone = pickle.loads(pickle.dumps(module)) if name != "hooks inside" else copy.deepcopy(module)
    assert error(clone(x), out) < 1e-5
    done.undo()
    assert error(module(x), out) < 1e-6


@pytest.mark.parametrize(
    "write", [lambda m: m.mask.fill_(1), lambda m: m.load_state_dict({**m.state_dict(), "mask": MASK})]
)
def test_a_mask_that_is_written_to_is_looked_at_again(write: Callable[[nn.Module], object]) -> None:
    module, x = CausalWithMask(MASK.tril()), torch.randn(2, 20, 16)
    accelerate(module)
    expected = module(x)
    module.load_state_dict(module.state_dict())
    assert torch.equal(module(x), expected)
    write(module)
    with pytest.raises(RuntimeError, match="mask: expected a causal mask"):
        module(x)


def test_dropout_where_it_was() -> None:
    """In expectation, as each draws its own: on the attention weights and behind the projection."""
    x = torch.randn(1, 5, 16)
    for module in (Attention(16, 2, 8, dropout=0.3), CausalOfGPT(dropout=0.3)):
        with torch.no_grad():
            official = torch.stack([module(x) for _ in range(2000)])
            assert accelerate(module).swapped
            found = torch.stack([module(x) for _ in range(2000)])
        standard_error = (official.var(0) / 1000).sqrt()
        assert ((found.mean(0) - official.mean(0)).abs() < 5 * standard_error).all()
        assert abs(found.var(0).sum() / official.var(0).sum() - 1) < 0.1


class Low(nn.Linear):
    pass


class MultipliesMask(Attention):
    """The mask is multiplied with what the softmax gave."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        w = self.qkv(x).unflatten(-1, (2, -1)).transpose(1, 2)
        weights = self.dropout(self.attend(w @ w.mT * self.scale)) * (1 - mask[:, None, None])
        return self.to_out((weights @ w).transpose(1, 2).flatten(2))


class TSSA(nn.Module):
    """Token statistics: the names of MSSA, and another computation."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.attend, self.temp = 2, nn.Softmax(dim=1), nn.Parameter(torch.ones(2, 1))
        self.qkv, self.to_out = nn.Linear(16, 16, bias=False), nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.0))


class ReturnsTwoMaps(Attention):
    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        out = super().forward(x, return_attention=return_attention)
        return (out, out) if return_attention else out


class AppliesNoDropout(Attention):
    def forward(self, x: Tensor) -> Tensor:
        w = self.qkv(x).unflatten(-1, (2, -1)).transpose(1, 2)
        return self.to_out((self.attend(w @ w.mT * self.scale) @ w).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.MultiheadAttention(16, 2), nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.official, self.masked, self.tssa = Attention(16, 2, 8), MultipliesMask(16, 2, 8), TSSA()
        self.vit, self.maps, self.quiet = (
            TransformerBlock(),
            ReturnsTwoMaps(16, 2, 8),
            AppliesNoDropout(16, 2, 8, dropout=0.1),
        )
        self.odd = FeedForward(16)
        self.odd.relu = nn.ReLU()
        self.window = CausalWithMask(MASK.tril().triu(-8))


def test_every_look_alike_is_named_with_its_reason() -> None:
    model = Mixed()
    model.official.attend.register_forward_hook(lambda *_: None)
    done = accelerate(model)
    assert list(done.swapped) == ["official"]
    reasons = {
        "masked": "its forward takes x, mask, which MSSA does not",
        "tssa": "TSSA has no scale, by which MSSA is known",
        "vit.attn": "MultiheadAttention has no heads, scale, qkv, to_out",
        "maps": "it does not compute MSSA with return_attention",
        "quiet": "it does not compute MSSA with its dropout (dropout)",
        "odd": "it has relu, which ISTA does not use",
        "window": "it has mask, which MSSA does not use",
    }
    assert done.left_alone.keys() == reasons.keys()
    assert all(reason in done.left_alone[name] for name, reason in reasons.items()), done
    lines = str(done).splitlines()
    assert lines[0] == "swapped 1 modules, left 7 alone" and lines[1].split() == [
        "module",
        "swapped",
        "as,",
        "or",
        "why",
        "not",
    ]
    assert lines[2].split(maxsplit=2) == ["official", "yes", "MSSA; not fused as it stands: attend has hooks"]
    assert len(lines) == 10


def test_undo_refuses_what_was_changed_since() -> None:
    model = Model()
    done = accelerate(model)
    nn.utils.parametrize.register_parametrization(model.encoder[0][1].fn, "weight", Halved())
    with pytest.raises(
        RuntimeError, match=r"encoder\.0\.1\.fn: accelerate made it ISTA, and now it is ParametrizedISTA"
    ):
        done.undo()
    assert type(model.encoder[0][0].fn) is MSSA
    nn.utils.parametrize.remove_parametrizations(model.encoder[0][1].fn, "weight")
    done.undo()
    assert type(model.encoder[0][0].fn) is Attention


def test_a_module_that_raises_leaves_the_model_consistent() -> None:
    model, x = Model(), torch.randn(2, 20, 16)
    model.encoder[1][1].fn = Raises(16)
    model.decoder.eval()
    model.encoder[0][0].fn.to_out.eval()
    modes = [module.training for module in model.modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model.encoder[0][1](model.encoder[0][0](x))
    done = accelerate(model)
    assert sorted(done.swapped) == [
        "decoder.0.fn",
        "decoder.1.fn",
        "encoder.0.0.fn",
        "encoder.0.1.fn",
        "encoder.1.0.fn",
    ]
    assert "no such luck" in done.left_alone["encoder.1.1.fn"] and type(model.encoder[1][1].fn) is Raises
    assert error(model.encoder[0][1](model.encoder[0][0](x)), expected) < 1e-5
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    done.undo()
    assert type(model.encoder[0][0].fn) is Attention


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    model = nn.ModuleList([Model(dim=64, heads=4), Alpha(decouple=True)]).to(dtype)
    done = accelerate(model)
    assert len(done.swapped) == 8 and not done.left_alone


def test_values_do_not_matter() -> None:
    model = Model()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    done = accelerate(model)
    assert len(done.swapped) == 6 and not done.left_alone


def test_lambda_may_be_a_tensor() -> None:
    module, x = sparse_step(lambda m: setattr(m, "lambd", torch.tensor(0.5))), torch.randn(2, 20, 16)
    expected = module(x)
    assert accelerate(module).swapped == {"": ISTA} and error(module(x), expected) < 1e-6


def test_hooks_are_not_called() -> None:
    module, calls = FeedForward(16), []
    module.register_forward_hook(lambda *a: calls.append(a))
    module.register_forward_pre_hook(lambda *a: calls.append(a))
    assert accelerate(module).swapped and not calls


def test_random_state_is_untouched() -> None:
    model = nn.Sequential(Model(), FunctionalDropout(16, 2, 8))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    accelerate(model)
    assert torch.equal(torch.rand(2), expected)


def test_models_of_ours_need_nothing() -> None:
    done = accelerate(small_model())
    assert not done.left_alone and "run on the kernels as they are" in str(done)


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        accelerate({})


def test_modules_bear_the_official_names_and_formulas() -> None:
    attention = MSSA(12, heads=3, dim_head=4)
    assert [name for name, _ in attention.named_parameters()] == ["qkv.weight", "to_out.0.weight", "to_out.0.bias"]
    assert [name for name, _ in MSSA(12, heads=1, dim_head=12).named_parameters()] == ["qkv.weight"]
    assert [name for name, _ in MSSA(12, out_bias=False).named_parameters()] == ["qkv.weight", "to_out.0.weight"]
    assert [name for name, _ in ISTA(12).named_parameters()] == ["weight"]
    assert [name for name, _ in DecoderStep(12).named_parameters()] == ["weight"]
    shapes = {name: tuple(value.shape) for name, value in OvercompleteISTA(12).named_parameters()}
    assert shapes == {"D": (12, 48), "D1": (12, 48)}
    assert [name for name, _ in OvercompleteISTA(12, decouple=False).named_parameters()] == ["D"]
    x = torch.randn(2, 5, 12)
    expected = reference_mssa(x, attention.qkv.weight, *attention.to_out[0].parameters(), 3, 0.5, NO_MASK, 0.0)
    assert error(attention(x), expected) < 1e-6
    with pytest.raises(ValueError, match="dropout: expected a probability of at least 0 and below 1, got 1"):
        MSSA(12, dropout=1)


def test_dropout_is_the_official_one_in_expectation_and_none_in_evaluation() -> None:
    """The output is linear in both random masks, so that its mean over many draws is the output without dropout."""
    module, norm, x = MSSA(12, heads=3, dim_head=4, dropout=0.3), nn.LayerNorm(12), torch.randn(1, 5, 12)
    plain = MSSA(12, heads=3, dim_head=4)
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        expected = plain(x, norm=norm, skip=x, subtract=True)
        assert torch.equal(module.eval()(x, norm=norm, skip=x, subtract=True), expected)
        module.train()
        draws = torch.cat([module(x, norm=norm, skip=x, subtract=True) for _ in range(1000)])
        standard_error = draws.std(0) / 1000**0.5
        assert ((draws.mean(0) - expected[0]).abs() < 5 * standard_error).all()
        # Weights and outputs are dropped: more than the outputs alone would vary, by this.
        out = expected - x
        assert draws.var(0).sum() > 1.1 * (0.3 / 0.7) * out.square().sum()
        torch.manual_seed(1)
        first = module(x)
        torch.manual_seed(1)
        assert torch.equal(module(x), first) and not torch.equal(module(x), first)


def test_modules_take_their_norm_and_residual() -> None:
    x, norm = torch.randn(2, 5, 12), nn.LayerNorm(12, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    decode, sparsify = DecoderStep(12), OvercompleteISTA(12, overcomplete_ratio=2, eta=0.2, lmbda=0.3)
    assert error(decode(x, norm=norm), F.linear(norm(x), decode.weight)) < 1e-6
    assert error(decode(x), F.linear(x, decode.weight)) < 1e-6
    official = Overcomplete(12, 2, lmbda=0.3)
    official.eta = 0.2
    official.load_state_dict(sparsify.state_dict())
    assert error(sparsify(x, norm=norm, skip=x), x + official(norm(x))) < 1e-6


def frozen() -> tuple[ISTA, Tensor]:
    module, x = ISTA(12, lambd=0.5), torch.randn(2, 20, 12)
    module.freeze()
    return module, x


def test_frozen_ista_computes_the_same_and_makes_its_matrix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = frozen()
    expected = ista(x, module.weight, lambd=0.5)
    monkeypatch.setattr("crate_kernels.nn.combine", None)
    with torch.no_grad():
        assert error(module(x), expected) < 1e-6
        module.combined.zero_()
        assert error(module(x), F.relu(x - 0.05)) < 1e-6, "the kept matrix is what counts"
    assert list(module.state_dict()) == ["weight"] and "frozen" in repr(module)
    module.unfreeze()
    module.unfreeze()
    assert error(module(x), expected) < 1e-6 and not list(module.buffers()) and "frozen" not in repr(module)


def test_frozen_ista_refuses_to_lose_a_gradient() -> None:
    module, x = frozen()
    with pytest.raises(RuntimeError, match=r"weight: it asks for a gradient.*call unfreeze\(\)"):
        module(x)
    module.requires_grad_(False)
    x.requires_grad_()
    module(x).sum().backward()
    found, x.grad = x.grad, None
    module.unfreeze()
    module(x).sum().backward()
    assert error(found, x.grad) < 1e-6


@pytest.mark.parametrize("assign", [False, True])
def test_frozen_ista_follows_a_loaded_weight(assign: bool) -> None:
    module, x = frozen()
    other = torch.randn(12, 12) / 4
    nn.Sequential(module).load_state_dict({"0.weight": other}, assign=assign)
    with torch.no_grad():
        assert error(module(x), ista(x, other, lambd=0.5)) < 1e-6


def test_frozen_ista_moves_copies_and_compiles(device: str) -> None:
    module, x = frozen()
    with torch.no_grad():
        expected = module(x)
        assert error(copy.deepcopy(module).double()(x.double()), expected) < 1e-6
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected)
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert error(compiled(x), expected) < 1e-6
        with crate_kernels.use("triton"):
            assert error(module.to(device)(x.to(device)), expected) < 1e-6
