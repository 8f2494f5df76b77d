"""Shared-QKV attention: composed path, boundary and errors. Its kernels: test_shared_attention_triton.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import awkward_gradients, error, gradients, pairs_hidden
from torch import Tensor

import crate_kernels
from crate_kernels import cpu, shared_qkv_attention
from crate_kernels.shared_attention import composed, op

SHAPES = [
    (2, 3, 1, 16),  # one token attends to itself
    (2, 12, 50, 64),  # a masked encoder's 50 tokens
    (1, 2, 197, 48),  # CRATE-MAE-Small's head width
    (1, 2, 65, 80),  # CRATE-MAE's largest named head width, odd tokens
    (0, 2, 5, 16),  # an empty batch
]


def truth(
    w: Tensor, scale: float, is_causal: bool, lengths: Tensor | None = None, factors: Tensor | None = None
) -> Tensor:
    """softmax(scale * w w^T) w, sample by sample and row by row, in float64; factors [..., tokens, tokens] are dropout's."""
    samples = []
    for b, sample in enumerate(w):
        length = w.shape[2] if lengths is None else int(lengths[b])
        rows = []
        for i in range(length):
            keys = sample[:, : i + 1 if is_causal else length]
            weights = (torch.einsum("hd,hjd->hj", sample[:, i], keys) * scale).softmax(-1)
            if factors is not None:
                weights = weights * factors[b, :, i, : keys.shape[1]]
            rows.append(torch.einsum("hj,hjd->hd", weights, keys))
        rows += [torch.zeros_like(sample[:, 0])] * (w.shape[2] - length)
        samples.append(torch.stack(rows, dim=1))
    return torch.stack(samples) if samples else w * 1


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "composed"])
def test_agrees_with_the_formula_in_float64(implementation: str, shape: tuple[int, ...], is_causal: bool) -> None:
    w = torch.randn(shape, dtype=torch.float64)
    upstream = torch.randn(shape, dtype=torch.float64)
    with crate_kernels.use(implementation):
        found = gradients(lambda w: shared_qkv_attention(w, is_causal=is_causal), [w], upstream)
    for value, expected in zip(
        found, gradients(lambda w: truth(w, shape[3] ** -0.5, is_causal), [w], upstream), strict=True
    ):
        assert error(value, expected) < 1e-12


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kept", ["probabilities", "nothing"])
@pytest.mark.parametrize("budget", [0, 1, 37 * 5, 37 * 37 * 2, 2**22])
def test_slices_of_rows_and_heads_add_up(
    monkeypatch: pytest.MonkeyPatch, budget: int, kept: str, is_causal: bool
) -> None:
    """The batched products, which other devices and CPUs that multiply in 16 bits run, whole and cut into slices."""
    monkeypatch.setattr(composed, "_SCORES_ON_CPU", 8 * budget)
    monkeypatch.setattr(composed, "composed_keeps", lambda *_: kept)
    monkeypatch.setattr(composed, "takes_flash_attention", lambda *_: False)
    w, upstream = torch.randn(2, 3, 37, 16, dtype=torch.float64), torch.randn(2, 3, 37, 16, dtype=torch.float64)
    found = gradients(lambda w: shared_qkv_attention(w, is_causal=is_causal), [w], upstream)
    for a, b in zip(found, gradients(lambda w: truth(w, 0.25, is_causal), [w], upstream), strict=True):
        assert error(a, b) < 1e-13


PATHS = ["reference", "composed: flash attention", "composed: probabilities kept", "composed: computed again", "triton"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every way through the operator on a CPU, with slices of heads and rows where there are slices."""
    if request.param == "triton":
        pytest.importorskip("triton")
    if "probabilities" in request.param or "again" in request.param:
        keeps = "probabilities" if "probabilities" in request.param else "nothing"
        monkeypatch.setattr(composed, "_SCORES_ON_CPU", 8 * 20 * 11)
        monkeypatch.setattr(composed, "takes_flash_attention", lambda *_: False)
        monkeypatch.setattr(composed, "composed_keeps", lambda w, given: "log-sum-exp" if given.return_lse else keeps)
    if "flash" in request.param:
        monkeypatch.setattr(op, "_LONG", 0)
    with crate_kernels.use(request.param.partition(":")[0]):
        yield request.param


def numbers(path: str, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32 if path == "triton" else torch.float64)


def tolerance(path: str) -> float:
    """Roundings of sums of some tens of terms; the kernels compute in float32 at most."""
    return 2e-6 if path == "triton" else 1e-13


@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_neither_gives_nor_takes(path: str, is_causal: bool) -> None:
    w, upstream, lengths = numbers(path, 3, 2, 20, 16), numbers(path, 3, 2, 20, 16), torch.tensor([1, 20, 13])
    padding = torch.arange(20) >= lengths[:, None]
    expected = gradients(lambda w: truth(w, 0.25, is_causal, lengths), [w.double()], upstream.double())
    # Whatever is stored in the padding, it must not be used: not as a key, not as a query, not as a gradient.
    w, upstream = (tensor.masked_fill(padding[:, None, :, None], float("nan")) for tensor in (w, upstream))
    for dtype in (torch.int64, torch.int32):
        found = gradients(
            lambda w, dtype=dtype: shared_qkv_attention(w, is_causal=is_causal, lengths=lengths.to(dtype)),
            [w],
            upstream,
        )
        for value, exact in zip(found, expected, strict=True):
            assert error(value, exact) < tolerance(path)
            assert not value.transpose(1, 2)[padding].any()


MASKS: dict[str, dict[str, Any]] = {
    "window": dict(window=3),
    "window of one": dict(window=0),
    "window over all": dict(window=2**40),
    "causal window": dict(window=3, is_causal=True),
    "packed": dict(cu_seqlens=[0, 5, 5, 13, 20]),
    "packed, with room": dict(cu_seqlens=[0, 1, 17], is_causal=True),
    "packed, window": dict(cu_seqlens=[0, 9, 20], window=2),
    "keys": dict(key_mask=[2, 3, 11]),
    "keys, causal": dict(key_mask=[2, 3, 11], is_causal=True),
    "keys, window": dict(key_mask=[2, 3, 11], window=4),
    "keys, padded": dict(key_mask=[2, 3, 11], lengths=[20, 3, 2]),
    "no keys": dict(key_mask=[]),
    "everything packed": dict(cu_seqlens=[0, 7, 18], key_mask=[2, 3, 11], is_causal=True, window=5),
}


def masked_truth(w: Tensor, scale: Tensor, hidden: Tensor) -> Tensor:
    scores = w @ w.mT * scale[:, None, None]
    weights = scores.masked_fill(hidden, -1e300).softmax(-1).masked_fill(hidden, 0.0)
    return weights @ w


@pytest.mark.parametrize("scale_of", ["number", "heads"])
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
def test_masks(path: str, options: dict[str, Any], scale_of: str) -> None:
    """Output, log-sum-exp and gradients, that of a scale for each head too; whatever is stored in padding."""
    batch = 1 if "cu_seqlens" in options else 3
    given = dict(options)
    if "key_mask" in given:
        given["key_mask"] = torch.zeros(batch, 20, dtype=torch.bool)
        given["key_mask"][:, options["key_mask"]] = True
    given |= {name: torch.tensor(options[name]) for name in ("lengths", "cu_seqlens") if name in options}
    hide = pairs_hidden(batch, 20, **given)
    w, upstream = numbers(path, batch, 2, 20, 16), numbers(path, batch, 2, 20, 16)
    scale = torch.tensor([0.25, 0.25] if scale_of == "number" else [0.1, 0.5], dtype=w.dtype)
    ends = given["cu_seqlens"][-1:] if "cu_seqlens" in given else given.get("lengths", torch.tensor([20]))
    padding = (torch.arange(20) >= ends[:, None]).expand(batch, 20)
    upstream = upstream.masked_fill(padding[:, None, :, None], 0.0)
    expected = gradients(lambda w, s: masked_truth(w, s, hide), [w.double(), scale.double()], upstream.double())
    w, upstream = (tensor.masked_fill(padding[:, None, :, None], float("nan")) for tensor in (w, upstream))

    def attend(w: Tensor, scale: Tensor | float = 0.25) -> Tensor:
        return shared_qkv_attention(w, scale=scale, **given)

    found = gradients(attend, [w] if scale_of == "number" else [w, scale], upstream)
    assert len(found) == (2 if scale_of == "number" else 3)
    for value, exact in zip(found, expected[: len(found)], strict=True):
        # Where each token has one key or none, the scale has no gradient.
        assert (value.double() - exact).norm() < tolerance(path) * max(1.0, 3 * exact.norm())
    assert not found[1].transpose(1, 2)[padding].any()
    assert path == "reference" or found[0].transpose(1, 2).is_contiguous()

    lse = shared_qkv_attention(w, scale=0.25 if scale_of == "number" else scale, return_lse=True, **given)[1]
    scores = (w.nan_to_num().double() @ w.nan_to_num().double().mT * scale.double()[:, None, None]).masked_fill(
        hide, -torch.inf
    )
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=20 * tolerance(path))


def test_a_window_leaves_flash_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's takes a mask of all pairs only; batched products take intervals."""
    monkeypatch.setattr(composed, "cpu_flash_attention", None)
    w, hide = torch.randn(1, 1, 300, 8, dtype=torch.float64), pairs_hidden(1, 300, window=20)
    assert (
        error(shared_qkv_attention(w, window=20), masked_truth(w, torch.tensor([8**-0.5], dtype=torch.float64), hide))
        < 1e-12
    )


@pytest.mark.parametrize("tokens", [5, 257])
def test_derivatives_of_masked_attention(tokens: int) -> None:
    """Second ones on the composed path, of a scale for each head as well."""
    w, scale = torch.randn(1, 2, tokens, 2, dtype=torch.float64), torch.tensor([0.3, 0.8], dtype=torch.float64)
    key_mask = torch.arange(tokens)[None] % 3 > 0

    def second(implementation: str) -> list[Tensor]:
        leaves = [w.clone().requires_grad_(), scale.clone().requires_grad_()]
        with crate_kernels.use(implementation):
            out = shared_qkv_attention(leaves[0], scale=leaves[1], window=2, key_mask=key_mask)
        grads = torch.autograd.grad(out.pow(2).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), leaves))

    for found, exact in zip(second("composed"), second("reference"), strict=True):
        assert error(found, exact) < 1e-10


def dropout_factors(shape: tuple[int, ...], **arguments: object) -> Tensor:
    """What a path multiplies the weights with: 0 or 1 / (1 - dropout), read off an identity matrix as values.

    The path's slices depend on the shape alone, so the mask is that of any w of this shape.
    """
    tokens, head_dim = shape[2:]
    assert head_dim >= tokens
    w = torch.eye(tokens, head_dim).expand(shape)
    flat = shared_qkv_attention(w, scale=1e-30, **arguments)[..., :tokens].double()  # all weights are 1 / tokens
    return flat * tokens


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_drops_the_same_weights_forward_and_backward(path: str, is_causal: bool) -> None:
    if path == "composed: flash attention":
        pytest.skip("flash attention has no dropout")
    factors = dropout_factors((2, 3, 20, 24), dropout=0.3, seed=5)
    assert factors[factors > 0].sub(1 / 0.7).abs().max() < 1e-5
    assert abs((factors > 0).double().mean() - 0.7) < 4 * (0.3 * 0.7 / factors.numel()) ** 0.5
    assert (factors[0, 0] != factors[0, 1]).any() and (factors[0, 0] != factors[1, 0]).any()
    assert (factors != factors.mT).any()

    exact_factors = (factors > 0).double() / 0.7
    w, upstream = numbers(path, 2, 3, 20, 24), numbers(path, 2, 3, 20, 24)
    found = gradients(lambda w: shared_qkv_attention(w, is_causal=is_causal, dropout=0.3, seed=5), [w], upstream)
    expected = gradients(
        lambda w: truth(w, 24**-0.5, is_causal, factors=exact_factors), [w.double()], upstream.double()
    )
    for value, exact in zip(found, expected, strict=True):
        assert error(value, exact) < tolerance(path)


def test_dropout_beside_padding(path: str) -> None:
    if path == "composed: flash attention":
        pytest.skip("flash attention has no dropout")
    lengths, w, upstream = torch.tensor([20, 7]), numbers(path, 2, 3, 20, 24), numbers(path, 2, 3, 20, 24)
    factors = (dropout_factors((2, 3, 20, 24), dropout=0.5, seed=6) > 0).double() * 2
    found = gradients(lambda w: shared_qkv_attention(w, lengths=lengths, dropout=0.5, seed=6), [w], upstream)
    expected = gradients(lambda w: truth(w, 24**-0.5, False, lengths, factors), [w.double()], upstream.double())
    for value, exact in zip(found, expected, strict=True):
        assert error(value, exact) < tolerance(path)


def test_the_default_generator_decides_where_no_seed_is_given(path: str) -> None:
    w = numbers(path, 1, 2, 20, 16)

    def draw(dropout: float) -> Tensor:
        return shared_qkv_attention(w, dropout=dropout)

    torch.manual_seed(3)
    first, second = draw(0.5), draw(0.5)
    torch.manual_seed(3)
    assert torch.equal(draw(0.5), first) and torch.equal(draw(0.5), second) and not torch.equal(first, second)
    state = torch.get_rng_state()
    draw(0.0)
    assert torch.equal(torch.get_rng_state(), state), "numbers were drawn without dropout"


@pytest.mark.parametrize("is_causal", [False, True])
def test_log_sum_exp(path: str, is_causal: bool) -> None:
    w, lengths = numbers(path, 3, 2, 20, 16).requires_grad_(), torch.tensor([1, 20, 13])
    out, lse = shared_qkv_attention(w, is_causal=is_causal, lengths=lengths, return_lse=True)
    assert lse.dtype == w.dtype and not lse.requires_grad and out.requires_grad
    assert error(out, truth(w.double(), 0.25, is_causal, lengths)) < tolerance(path)
    scores = w.detach().double() @ w.detach().double().mT * 0.25
    position = torch.arange(20)
    scores = scores.masked_fill(position >= lengths[:, None, None, None], float("-inf"))
    if is_causal:
        scores = scores.masked_fill(position > position[:, None], float("-inf"))
    expected = scores.logsumexp(-1)
    real = (position < lengths[:, None])[:, None].expand_as(lse)
    assert error(lse[real], expected[real]) < tolerance(path)
    assert (lse[~real] == float("-inf")).all()

    upstream = numbers(path, 3, 2, 20, 16)
    exact = gradients(lambda w: truth(w, 0.25, is_causal, lengths), [w.double()], upstream.double())[1]
    out.backward(upstream)
    assert error(w.grad, exact) < tolerance(path)


def test_log_sum_exp_is_float32_where_w_has_16_bits(path: str) -> None:
    if path == "triton":
        pytest.skip("float16 kernels: test_shared_attention_triton.py")
    w = torch.randn(1, 2, 20, 16).half()
    lse = shared_qkv_attention(w, return_lse=True)[1]
    assert lse.dtype == torch.float32
    assert error(lse, (w.double() @ w.double().mT * 0.25).logsumexp(-1)) < 1e-3


def test_what_is_kept_for_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(w: Tensor, keep: bool = True) -> Tensor:
        return torch.ops.crate_kernels.shared_attention_forward(w, 0.5, keep, "composed")[1]

    w = torch.randn(2, 3, 9, 16)
    assert error(kept(w), (w @ w.mT * 0.5).softmax(-1)) < 1e-6
    w = torch.randn(1, 2, 257, 16)  # flash attention's
    assert error(kept(w), (w @ w.mT * 0.5).logsumexp(-1)) < 1e-6

    for multiplies in ((torch.bfloat16,), ()):
        monkeypatch.setattr(cpu, "CPU_PRODUCT_DTYPES", multiplies)
        w = torch.randn(2, 3, 9, 16).bfloat16()
        assert kept(w).dtype == torch.bfloat16
        assert error(kept(w), (w.float() @ w.float().mT * 0.5).softmax(-1)) < (1e-2 if multiplies else 2e-3)
        assert kept(w, keep=False).numel() == 0
    monkeypatch.setattr(cpu, "CPU_PRODUCT_DTYPES", (torch.bfloat16,))
    assert kept(torch.randn(1, 1, 513, 4).bfloat16()).numel() == 0


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("layout", ["features apart", "tokens apart", "one row for all", "overlapping rows"])
def test_any_strides(layout: str, flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention takes rows of adjacent features; everything else has to reach it as a copy."""
    monkeypatch.setattr(op, "_LONG", 0 if flash else 257)
    w = {
        "features apart": torch.randn(2, 3, 16, 7).mT,
        "tokens apart": torch.randn(7, 2, 3, 32).permute(1, 2, 0, 3)[..., ::2],
        "one row for all": torch.randn(2, 3, 1, 16).expand(2, 3, 7, 16),
        "overlapping rows": torch.randn(2, 3, 30).unfold(-1, 16, 2)[:, :, :7],
    }[layout]
    upstream = torch.randn(2, 3, 7, 16)
    with torch.no_grad():
        out, kept = torch.ops.crate_kernels.shared_attention_forward(w, 0.25, True, "composed")
        settings = False, 0.25, True, "composed"
        grad, _ = torch.ops.crate_kernels.shared_attention_backward(upstream, w, out, kept, *settings)
    expected = gradients(lambda w: truth(w, 0.25, False), [w.double().contiguous()], upstream.double())
    assert error(out, expected[0]) < 1e-6
    assert error(grad, expected[1]) < 1e-5


def test_heads_viewed_from_tokens_are_not_copied_back() -> None:
    tokens = torch.randn(2, 9, 3 * 16)
    out = shared_qkv_attention(tokens.unflatten(-1, (3, 16)).transpose(1, 2))
    merged = out.transpose(1, 2).flatten(2)
    assert merged.data_ptr() == out.data_ptr()


def test_gradients_as_they_arrive() -> None:
    w = torch.randn(1, 2, 7, 16)
    for name, upstream in awkward_gradients((1, 2, 7, 16), torch.float32, "cpu"):
        kept = upstream.clone()
        found = gradients(shared_qkv_attention, [w], upstream)[1]
        expected = gradients(lambda w: truth(w, 0.25, False), [w.double()], kept.double())[1]
        assert error(found, expected) < 1e-5, name
        assert torch.equal(upstream, kept), f"{name}: the gradient was written to"


@pytest.mark.parametrize("tokens", [5, 257], ids=["short", "flash attention"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_derivatives_of_any_order_on_the_composed_path(tokens: int, is_causal: bool) -> None:
    """Of a function that is linear in the output too, where no gradient that arrives has a derivative."""
    w, lengths = torch.randn(2, 1, tokens, 2, dtype=torch.float64), torch.tensor([tokens, tokens - 2])
    options = dict(is_causal=is_causal, lengths=lengths)

    def third(implementation: str) -> list[Tensor]:
        leaf, total = w.clone().requires_grad_(), []
        with crate_kernels.use(implementation):
            value = shared_qkv_attention(leaf, **options).sum()
        for power in (3, 2, 1):
            (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
            total.append(grad)
            value = grad.pow(power).sum()
        return total

    for found, exact in zip(third("composed"), third("reference"), strict=True):
        assert error(found, exact) < 1e-10


def test_second_derivative_of_dropout_is_refused() -> None:
    w = torch.randn(1, 1, 3, 16, requires_grad=True)
    out = shared_qkv_attention(w, dropout=0.5).sum()
    with pytest.raises(RuntimeError, match=r"shared_qkv_attention: dropout.* no second.*use\(.reference.\)"):
        torch.autograd.grad(out, w, create_graph=True)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            dict(w=torch.randn(2, 3, 4)),
            ValueError,
            r"w: expected \[batch, heads, tokens, head_dim\], got shape \(2, 3, 4\)",
        ),
        (dict(w=torch.ones(1, 1, 2, 4, dtype=torch.long)), TypeError, "w: expected a floating-point dtype"),
        (dict(w=[1.0]), TypeError, "w: expected a tensor"),
        (dict(w=torch.randn(1, 1, 0, 4)), ValueError, "w: expected at least one token"),
        (
            dict(w=torch.randn(1, 1, 2, 4), scale=-1.0),
            ValueError,
            "scale: expected a finite number above zero, got -1.0",
        ),
        (dict(w=torch.randn(1, 1, 2, 4), scale=float("nan")), ValueError, "scale: .* got nan"),
        (dict(w=torch.randn(1, 1, 2, 4), scale="big"), TypeError, "scale: expected a number or .*, got str"),
        (dict(lengths=torch.tensor([3])), ValueError, "lengths: expected 1 to 2 tokens, got 3"),
        (dict(lengths=torch.tensor([0])), ValueError, "lengths: expected 1 to 2 tokens, got 0"),
        (dict(lengths=torch.tensor([1, 2])), ValueError, r"lengths: expected \[batch\] \(1,\), got shape \(2,\)"),
        (dict(lengths=torch.tensor([1.0])), TypeError, "lengths: expected an int32 or int64 tensor .* float32"),
        (dict(lengths=[2]), TypeError, "lengths: expected an int32 or int64 tensor .* got list"),
        (dict(lengths=torch.tensor([1], device="meta")), ValueError, "lengths: expected it on cpu like its tokens"),
        (dict(scale=torch.ones(2)), ValueError, r"scale: expected .* \[heads\] \(1,\) on cpu, got shape \(2,\)"),
        (
            dict(scale=torch.ones(1, dtype=torch.int64)),
            TypeError,
            "scale: expected a number or a floating-point tensor",
        ),
        (
            dict(scale=torch.zeros(1)),
            ValueError,
            r"scale: expected finite torch.float32 numbers above zero, got \[0.0\]",
        ),
        (
            dict(scale=torch.tensor([1e-50]).double()),
            ValueError,
            "scale: expected finite torch.float32 numbers above zero",
        ),
        (dict(window=-1), ValueError, "window: expected at least 0 tokens, got -1"),
        (dict(window=1.0), TypeError, "window: expected an int or None, got float"),
        (dict(window=True), TypeError, "window: expected an int or None, got bool"),
        (
            dict(key_mask=torch.ones(1, 2)),
            TypeError,
            r"key_mask: expected a bool tensor \[batch, tokens\] \(1, 2\), got",
        ),
        (
            dict(key_mask=torch.ones(1, 3, dtype=torch.bool)),
            ValueError,
            r"key_mask: expected .* \(1, 2\), got shape \(1, 3\)",
        ),
        (dict(cu_seqlens=torch.tensor([0, 3])), ValueError, r"cu_seqlens: expected .* at most 2 tokens.* got \[0, 3\]"),
        (dict(cu_seqlens=torch.tensor([1, 2])), ValueError, r"cu_seqlens: expected numbers from 0 .* got \[1, 2\]"),
        (dict(cu_seqlens=torch.tensor([0, 2, 1])), ValueError, r"cu_seqlens: .* none below .* got \[0, 2, 1\]"),
        (dict(cu_seqlens=torch.tensor([0])), ValueError, r"cu_seqlens: expected \[sequences \+ 1\], got shape \(1,\)"),
        (dict(cu_seqlens=[0, 2]), TypeError, "cu_seqlens: expected an int32 or int64 tensor .* got list"),
        (
            dict(w=torch.randn(2, 1, 2, 4), cu_seqlens=torch.tensor([0, 2])),
            ValueError,
            "cu_seqlens: expected packed sequences in a batch of 1, got a batch of 2",
        ),
        (
            dict(cu_seqlens=torch.tensor([0, 2]), lengths=torch.tensor([2])),
            ValueError,
            "cu_seqlens: given with lengths",
        ),
        (dict(dropout=1.0), ValueError, "dropout: expected a probability below 1, got 1.0"),
        (dict(dropout=-0.1), ValueError, "dropout: expected a finite number of at least zero, got -0.1"),
        (dict(dropout=None), TypeError, "dropout: expected a number, got NoneType"),
        (dict(dropout=0.1, seed=1.5), TypeError, "seed: expected an int, got float"),
        (dict(dropout=0.1, seed=-1), ValueError, r"seed: expected at least 0 and less than 2\*\*63, got -1"),
    ],
)
def test_bad_input_names_the_argument(arguments: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        shared_qkv_attention(**{"w": torch.randn(1, 1, 2, 4), **arguments})
