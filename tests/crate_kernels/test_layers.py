"""Whole layers against their formula, what they are given prepared, and the boundary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import a_few_roundings, awkward_gradients, error, gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import crate_kernels
from crate_kernels.layers import api
from crate_kernels.layers.api import (
    DecoderWeights,
    EncoderWeights,
    decoder_layer,
    encoder_layer,
    prepare_layers,
)
from crate_kernels.mssa.api import AttentionWeights
from crate_kernels.norm_linear import triton as norm_linear_kernels
from crate_kernels.products import launchers as products
from crate_kernels.products.norm_folding import Norm

WIDTH, HEADS, HEAD_DIM = 40, 2, 24
NAMES = ("x", "gamma1", "beta1", "qkv", "out", "bias", "gamma2", "beta2", "matrix")


def tensors(device: str, dtype: torch.dtype, tokens: int = 37) -> list[Tensor]:
    inner = HEADS * HEAD_DIM
    values = [
        torch.randn(2, tokens, WIDTH),
        1 + torch.randn(WIDTH) / 4,
        torch.randn(WIDTH) / 4,
        torch.randn(inner, WIDTH) / WIDTH**0.5,
        torch.randn(WIDTH, inner) / inner**0.5,
        torch.randn(WIDTH),
        1 + torch.randn(WIDTH) / 4,
        torch.randn(WIDTH) / 4,
        torch.randn(WIDTH, WIDTH) / WIDTH**0.5,
    ]
    return [value.to(device, dtype) for value in values]


def encoder(x, gamma1, beta1, qkv, out, bias, gamma2, beta2, matrix, **options) -> Tensor:
    attention = AttentionWeights(qkv, out, bias)
    norms = Norm(gamma1, beta1, 1e-5), Norm(gamma2, beta2, 1e-5)
    numbers = dict(num_heads=HEADS, step_size=0.3, lambd=0.2)
    return encoder_layer(x, norms[0], attention, norms[1], matrix, **numbers, **options)


def decoder(x, gamma1, beta1, qkv, out, bias, gamma2, beta2, matrix, **options) -> Tensor:
    attention = AttentionWeights(qkv, out, bias)
    norms = Norm(gamma2, beta2, 1e-5), Norm(gamma1, beta1, 1e-5)
    return decoder_layer(x, norms[0], matrix, norms[1], attention, num_heads=HEADS, **options)


def attention_formula(x, gamma, beta, qkv, out, bias) -> Tensor:
    w = F.layer_norm(x, (WIDTH,), gamma, beta) @ qkv.T
    w = w.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
    attended = (w @ w.mT * HEAD_DIM**-0.5).softmax(-1) @ w
    return attended.transpose(1, 2).flatten(2) @ out.T + bias


def encoder_formula(x, gamma1, beta1, qkv, out, bias, gamma2, beta2, matrix) -> Tensor:
    z = x + attention_formula(x, gamma1, beta1, qkv, out, bias)
    n = F.layer_norm(z, (WIDTH,), gamma2, beta2)
    return F.relu(n + 0.3 * (n @ matrix - n @ matrix.T @ matrix) - 0.3 * 0.2)


def decoder_formula(x, gamma1, beta1, qkv, out, bias, gamma2, beta2, matrix) -> Tensor:
    g = F.layer_norm(x, (WIDTH,), gamma2, beta2) @ matrix.T
    return g - attention_formula(g, gamma1, beta1, qkv, out, bias)


LAYERS = pytest.mark.parametrize(
    ("layer", "formula"), [(encoder, encoder_formula), (decoder, decoder_formula)], ids=["encoder", "decoder"]
)


@LAYERS
@pytest.mark.parametrize("implementation", ["reference", "composed"])
def test_agrees_with_the_formula_in_float64(implementation: str, layer, formula) -> None:
    inputs = tensors("cpu", torch.float64, tokens=7)
    upstream = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    with crate_kernels.use(implementation):
        found = gradients(layer, inputs, upstream)
        again = gradients(lambda *a: layer(*a, recompute=True), inputs, upstream)
    for name, value, repeated, exact in zip(
        ("y", *NAMES), found, again, gradients(formula, inputs, upstream), strict=True
    ):
        assert error(value, exact) < 1e-12, name
        assert error(repeated, exact) < 1e-12, name


@LAYERS
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton(dtype: torch.dtype, recompute: bool, layer, formula, device: str) -> None:
    inputs = tensors(device, dtype)
    upstream = torch.randn(2, 37, WIDTH).to(device, dtype)
    exact = [value.double() for value in inputs]
    if (
        formula is encoder_formula
    ):  # no gradient from where rounding decides on which side of the threshold an element falls
        z = exact[0] + attention_formula(*exact[:6])
        n = F.layer_norm(z, (WIDTH,), *exact[6:8])
        u = n + 0.3 * (n @ exact[8] - n @ exact[8].T @ exact[8]) - 0.3 * 0.2
        upstream *= u.abs() > 0.03
    truth, official = gradients(formula, exact, upstream.double()), gradients(formula, inputs, upstream)
    with crate_kernels.use("triton"):
        found = gradients(lambda *a: layer(*a, recompute=recompute), inputs, upstream)
    for name, ours, plain, wanted in zip(("y", *NAMES), found, official, truth, strict=True):
        assert ours.dtype == dtype, name
        assert error(ours, wanted) <= 1.25 * error(plain, wanted) + a_few_roundings(dtype), name


@LAYERS
@pytest.mark.parametrize("mean", [0.0, 20.0])
@pytest.mark.parametrize("stream", ["16-bit stream", "float32 stream", "16-bit stream, tokens folded"])
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        pytest.param("triton", torch.float16, id="triton-float16"),
        pytest.param("triton", torch.bfloat16, id="triton-bfloat16", marks=pytest.mark.gpu),
        pytest.param("composed", torch.bfloat16, id="composed-bfloat16"),
    ],
)
def test_error_under_autocast(
    implementation: str,
    dtype: torch.dtype,
    stream: str,
    mean: float,
    layer,
    formula,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No further from float64 than the official order with the same stored dtypes, however far from zero tokens lie.

    Errors are pooled over six draws, and still luck decides a little: 5% are allowed for it, 20% in vectors of 40 numbers.
    """
    if "folded" in stream:  # as bfloat16's are, which the interpreter cannot multiply
        if dtype != torch.float16:
            pytest.skip("float16 stands for bfloat16 here")
        monkeypatch.setattr(products, "folds", lambda x, dtype: x.dtype == dtype == torch.float16)
    is_encoder, ours, official = layer is encoder, [0.0] * 10, [0.0] * 10
    for _ in range(6):
        inputs = tensors(device, torch.float32)
        tokens = inputs[0] + mean * torch.randn(2, 37, 1, device=device).sign()
        inputs[0] = tokens.to(dtype if "16-bit" in stream else torch.float32)
        exact = [value.double() for value in inputs]
        upstream = torch.randn(2, 37, WIDTH, device=device)
        if is_encoder:  # no gradient from where rounding decides on which side of the threshold an element falls
            n = F.layer_norm(exact[0] + attention_formula(*exact[:6]), (WIDTH,), *exact[6:8])
            upstream *= (n + 0.3 * (n @ exact[8] - n @ exact[8].T @ exact[8]) - 0.3 * 0.2).abs() > 0.05
        upstream = upstream.to(inputs[0].dtype if is_encoder else dtype)

        def under_autocast(*values: Tensor) -> Tensor:
            with torch.autocast(device, dtype):
                return layer(*values)

        truth, found = gradients(formula, exact, upstream.double()), {}
        for one in ("reference", implementation):
            with crate_kernels.use(one):
                found[one] = gradients(under_autocast, inputs, upstream)
        for index, wanted in enumerate(truth):
            ours[index] += error(found[implementation][index], wanted) ** 2
            official[index] += error(found["reference"][index], wanted) ** 2
    for name, mine, plain in zip(("y", *NAMES), ours, official, strict=True):
        luck = 1.2 if name[:-1] in ("gamma", "beta") or name == "bias" else 1.05
        assert mine**0.5 <= luck * plain**0.5 + 1e-6, f"{name}: {mine**0.5:.2e}, official order {plain**0.5:.2e}"


@LAYERS
@pytest.mark.parametrize("tokens", [5, 37])
def test_only_the_gradients_asked_for(tokens: int, layer, formula, device: str) -> None:
    inputs = tensors(device, torch.float32, tokens)
    with crate_kernels.use("triton"):
        _, *every = gradients(layer, inputs, torch.ones(2, tokens, WIDTH))
        for index, wanted in enumerate(every):
            leaf = inputs[index].clone().requires_grad_()
            layer(*inputs[:index], leaf, *inputs[index + 1 :]).sum().backward()
            assert torch.equal(leaf.grad, wanted), NAMES[index]


def operators_of(layer, inputs: list[Tensor], **options) -> tuple[list[str], list[Tensor]]:
    """The operators that take tokens, as a layer calls them, and its result and gradients."""
    called: list[str] = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function).removesuffix(".default")
            if name.startswith("crate_kernels.") and not name.endswith((".prepare", ".combine")):
                called.append(name.removeprefix("crate_kernels."))
            return function(*args, **(kwargs or {}))

    with crate_kernels.use("triton"), Note():
        leaves = [value.detach().requires_grad_() for value in inputs]
        y = layer(*leaves, **options)
        y.sum().backward()
    return called, [y, *[leaf.grad for leaf in leaves]]


@LAYERS
def test_one_operator_a_direction(layer, formula, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two where a weight is given to both steps, or two products are less work; the same bits where nothing is folded."""
    kind = "encoder" if layer is encoder else "decoder"
    one = [f"{kind}_layer_forward", f"{kind}_layer_backward"]
    two = ["mssa_forward", "ista_forward", "ista_backward", "mssa_backward"]
    if layer is decoder:
        two = ["norm_linear_forward", "mssa_forward", "mssa_backward", "norm_linear_backward"]
    inputs = tensors(device, torch.float32)
    called, found = operators_of(layer, inputs)
    assert called == one
    assert operators_of(layer, tensors(device, torch.float32, tokens=5))[0] == (two if layer is encoder else one)

    def tied(*values: Tensor, **options) -> Tensor:
        return layer(*values[:6], *values[1:3], values[-1], **options)

    assert operators_of(tied, inputs)[0] == two
    monkeypatch.setattr(api, "_fit_one_function", lambda *_: False)
    called, expected = operators_of(layer, inputs)
    assert called == two and all(map(torch.equal, found, expected))


@LAYERS
def test_only_what_the_backward_needs_is_kept(layer, formula, device: str) -> None:
    """Where only weights of the second step learn, nothing of the first is kept, and its backward does not run."""
    inputs, bytes_kept = tensors(device, torch.float32), {}
    second = (6, 7, 8) if layer is encoder else (1, 2, 3, 4, 5)
    for name, learning in {"all": range(9), "second": second}.items():
        leaves = [value.detach().requires_grad_(index in learning) for index, value in enumerate(inputs)]
        own = {leaf.untyped_storage().data_ptr() for leaf in leaves}
        kept: dict[int, int] = {}

        def note(tensor: Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> Tensor:
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in own:
                kept[memory.data_ptr()] = memory.nbytes()
            return tensor

        with crate_kernels.use("triton"), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = layer(*leaves)
        y.sum().backward()
        bytes_kept[name] = sum(kept.values())
        assert all((leaf.grad is not None) == (index in learning) for index, leaf in enumerate(leaves))
    # z, w, attention's output and the result of the encoder; of the decoder g, w and attention's output, all of which it needs.
    assert bytes_kept["second"] < bytes_kept["all"] * (0.6 if layer is encoder else 1.0)


@LAYERS
@pytest.mark.parametrize("without", ["first", "second"])
def test_a_step_without_a_norm(without: str, layer, formula, device: str) -> None:
    """``Norm(None)`` stands for none: as the composed path has it."""
    inputs = tensors(device, torch.float32)

    def bare(x, gamma1, beta1, qkv, out, bias, gamma2, beta2, matrix) -> Tensor:
        norms = [Norm(gamma1, beta1), Norm(gamma2, beta2)]
        norms[without == "second"] = Norm(None)
        if layer is encoder:
            weights = norms[0], AttentionWeights(qkv, out, bias), norms[1], matrix
            return encoder_layer(x, *weights, num_heads=HEADS, step_size=0.3, lambd=0.2)
        return decoder_layer(x, norms[1], matrix, norms[0], AttentionWeights(qkv, out, bias), num_heads=HEADS)

    found = {}
    for implementation in ("triton", "composed"):
        with crate_kernels.use(implementation):
            leaves = [value.detach().requires_grad_() for value in inputs]
            y = bare(*leaves)
            y.sum().backward()
            found[implementation] = [y, *[leaf.grad for leaf in leaves if leaf.grad is not None]]
    assert len(found["triton"]) == len(found["composed"]) == 8
    assert all(error(one, other) < 1e-4 for one, other in zip(found["triton"], found["composed"], strict=True))


def test_a_step_size_that_learns(device: str) -> None:
    """The encoder's two operators: that of the whole layer has no gradient for it."""
    *inputs, matrix = tensors(device, torch.float32)

    def learning(step_size: Tensor, *values: Tensor, **options) -> Tensor:
        x, gamma1, beta1, qkv, out, bias, gamma2, beta2, matrix = values
        norms, attention = (Norm(gamma1, beta1), Norm(gamma2, beta2)), AttentionWeights(qkv, out, bias)
        return encoder_layer(x, norms[0], attention, norms[1], matrix, num_heads=HEADS, step_size=step_size, lambd=0.2)

    called, (_, grad, *_) = operators_of(learning, [torch.tensor(0.3), *inputs, matrix])
    assert called[:2] == ["mssa_forward", "ista_forward"] and grad.abs() > 0


@LAYERS
def test_recomputed_from_the_same_moments(layer, formula, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, where raw tokens are multiplied, and the first step has found the moments for the second."""
    monkeypatch.setattr(products, "folds", lambda x, dtype: x.dtype == dtype == torch.float16)
    inputs = tensors(device, torch.float16)
    parts = []
    project = products.project
    monkeypatch.setattr(products, "project", lambda *a, **o: parts.append((made := project(*a, **o)).parts) or made)
    monkeypatch.setattr(norm_linear_kernels, "project", products.project)
    kept, again = (operators_of(layer, inputs, recompute=recompute)[1] for recompute in (False, True))
    assert any(one is not None for one in parts) and all(map(torch.equal, kept, again))


def weights_of(layer, inputs: list[Tensor]) -> EncoderWeights | DecoderWeights:
    _, gamma1, beta1, qkv, out, bias, gamma2, beta2, matrix = inputs
    norms, attention = (Norm(gamma1, beta1, 1e-5), Norm(gamma2, beta2, 1e-5)), AttentionWeights(qkv, out, bias)
    if layer is encoder:
        return EncoderWeights(norms[0], attention, norms[1], matrix)
    return DecoderWeights(norms[1], matrix, norms[0], attention)


@LAYERS
def test_prepared_for_all_layers_at_once(layer, formula, device: str) -> None:
    """As prepared alone, for a first and a second layer with weights of their own."""
    x = torch.randn(2, 37, WIDTH, device=device)
    both = [tensors(device, torch.float32) for _ in range(2)]
    kinds = [weights_of(layer, inputs) for inputs in both]
    upstream = torch.randn_like(x)
    with crate_kernels.use("triton"):
        prepared = prepare_layers(x, kinds, num_heads=HEADS, step_size=0.3)
        for inputs, ready in zip(both, prepared, strict=True):
            leaves = [x.clone(), *inputs[1:]]
            alone = gradients(layer, leaves, upstream)
            with_grad = [value.requires_grad_() for value in leaves]  # in place: checks go by identity
            y = layer(*with_grad, prepared=ready)
            y.backward(upstream)
            for name, a, b in zip(("y", *NAMES), (y, *(leaf.grad for leaf in leaves)), alone, strict=True):
                assert error(a, b) < 1e-6, name
    with crate_kernels.use("composed"):
        assert prepare_layers(x, kinds, num_heads=HEADS) == [None, None]
    bare = [kinds[0], kinds[1]._replace(attention_norm=Norm(kinds[1].attention_norm.weight))]
    with crate_kernels.use("triton"):
        assert prepare_layers(x, bare, num_heads=HEADS) == [None, None], "layers of different make prepare themselves"


@LAYERS
def test_what_was_prepared_is_checked(layer, formula, device: str) -> None:
    """Refused: another dtype, another layer's, a weight changed since, another step size; and what no one prepared."""
    inputs, others = tensors(device, torch.float32), tensors(device, torch.float32)
    x = inputs[0]

    def prepare(step_size: float = 0.3) -> object:
        return prepare_layers(x, [weights_of(layer, inputs)], num_heads=HEADS, step_size=step_size)[0]

    def refused(message: str, kind: type[Exception] = ValueError, given=None, **options) -> None:
        with pytest.raises(kind, match=message):
            layer(*(given or inputs), **options)

    with crate_kernels.use("triton"):
        ready = prepare()
        layer(*inputs, prepared=ready)
        refused("prepared: made of other weights", given=[x, *others[1:]], prepared=ready)
        for index in range(1, len(inputs)):
            swapped = [*inputs[:index], inputs[index].clone(), *inputs[index + 1 :]]
            refused("prepared: made of other weights", given=swapped, prepared=ready)
            inputs[index].mul_(1.5)
            refused("prepared: weights have changed since", prepared=ready)
            ready = prepare()
        with torch.autocast(device, torch.float16):
            refused(r"prepared: made for products in torch\.float32, and these are in torch\.float16", prepared=ready)
        refused("prepared: expected what prepare_layers gives a layer, got list", TypeError, prepared=[x])
        refused("prepared: made for another operator", prepared=ready._replace(attention=ready.step))
        leaf = inputs[-1] = torch.nn.Parameter(inputs[-1])
        ready = prepare()
        leaf.grad = torch.ones_like(leaf)
        torch.optim.AdamW([leaf], fused=True).step()  # which PyTorch's count of writes does not see
        refused("prepared: weights have changed since", prepared=ready)
        if layer is encoder:
            refused(r"prepared: made with step_size 0\.2, and this step has 0\.3", prepared=prepare(0.2))
    with crate_kernels.use("composed"):
        layer(*inputs, prepared=ready)


@LAYERS
@pytest.mark.parametrize("index", range(1, 9))
def test_weights_that_do_not_fit_are_not_prepared(index: int, layer, formula, device: str) -> None:
    """Kernels find them by address: what is too small would be read beyond its end."""
    inputs = tensors(device, torch.float32, tokens=3)
    inputs[index] = inputs[index][..., :-1]
    with crate_kernels.use("triton"), pytest.raises(ValueError, match="expected"):
        prepare_layers(inputs[0], [weights_of(layer, inputs)], num_heads=HEADS)


@LAYERS
def test_gradients_as_they_arrive(layer, formula, device: str) -> None:
    inputs = tensors(device, torch.float32, tokens=21)
    for name, upstream in awkward_gradients((2, 21, WIDTH), torch.float32, device):
        arrived = upstream.clone()
        with crate_kernels.use("triton"):
            found = gradients(layer, inputs, upstream)
            expected = gradients(layer, inputs, arrived.contiguous())
        assert torch.equal(upstream, arrived), f"{name}: the gradient was written to"
        for value, wanted in zip(found, expected, strict=True):
            assert error(value, wanted) < 1e-5, name


@LAYERS
def test_an_empty_batch_and_one_token(layer, formula, device: str) -> None:
    inputs = tensors(device, torch.float32, tokens=1)
    with crate_kernels.use("triton"):
        found = gradients(layer, inputs, torch.ones(2, 1, WIDTH))
        for value, exact in zip(found, gradients(formula, inputs, torch.ones(2, 1, WIDTH)), strict=True):
            assert error(value, exact) < 1e-5
        nothing = gradients(layer, [inputs[0][:0], *inputs[1:]], torch.ones(0, 1, WIDTH))
    assert nothing[0].shape == (0, 1, WIDTH) and not any(value.any() for value in nothing)


@LAYERS
def test_second_derivative_is_refused(layer, formula, device: str) -> None:
    inputs = tensors(device, torch.float32, tokens=21)
    x = inputs[0].requires_grad_()
    with crate_kernels.use("triton"):
        (grad,) = torch.autograd.grad(layer(x, *inputs[1:]).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"(en|de)coder_layer: the Triton kernels have no second derivative"):
        grad.sum().backward()


@LAYERS
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_compiles_as_one_graph(layer, formula, recompute: bool, device: str) -> None:
    inputs = tensors(device, torch.float32, tokens=21)
    with crate_kernels.use("triton"):
        compiled = torch.compile(lambda *a: layer(*a, recompute=recompute), fullgraph=True, backend="aot_eager")
        found, expected = (
            gradients(compiled, inputs, torch.ones(2, 21, WIDTH)),
            gradients(layer, inputs, torch.ones(2, 21, WIDTH)),
        )
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted)


@LAYERS
def test_flops_are_counted(layer, formula, device: str) -> None:
    """Two projections, attention's two products and the sparse step forward; two gradients of each product and five backward."""
    inputs = [value.requires_grad_() for value in tensors(device, torch.float32, tokens=37)]
    large, scores = 2 * 2 * 37 * WIDTH, 2 * 2 * 37 * 37 * HEADS * HEAD_DIM
    products = 2 * large * HEADS * HEAD_DIM + large * WIDTH
    small = 2 * WIDTH**3 if layer is encoder else 0
    with crate_kernels.use("triton"), FlopCounterMode(display=False) as counter:
        layer(*inputs).sum().backward()
    assert counter.get_total_flops() == 3 * products + 7 * scores + 2 * small


@LAYERS
def test_the_result_may_be_changed_in_place_and_vectors_may_have_strides(layer, formula, device: str) -> None:
    inputs = tensors(device, torch.float32, tokens=21)
    apart = [torch.stack([value, torch.full_like(value, torch.nan)], -1)[..., 0] for value in inputs]
    with crate_kernels.use("triton"):
        expected = gradients(layer, inputs, torch.ones(2, 21, WIDTH))
        leaves = [value.detach().requires_grad_() for value in apart]
        y = layer(*leaves)
        if layer is decoder:  # the encoder's output is the mask of its own backward
            y += 0
        y.sum().backward()
    for value, wanted in zip([y, *(leaf.grad for leaf in leaves)], expected, strict=True):
        assert error(value, wanted) < 1e-6


@LAYERS
def test_recomputed_in_the_implementation_that_ran(layer, formula) -> None:
    """The backward may happen outside ``use``."""
    inputs = [value.requires_grad_() for value in tensors("cpu", torch.float64, tokens=5)]
    with crate_kernels.use("reference"):
        y = layer(*inputs, recompute=True)
    y.sum().backward()
    for leaf, wanted in zip(inputs, gradients(formula, inputs, torch.ones(2, 5, WIDTH))[1:], strict=True):
        assert error(leaf.grad, wanted) < 1e-12


@LAYERS
@pytest.mark.parametrize("implementation", ["composed", "triton"])
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (dict(scale=-1.0), ValueError, "scale: expected a finite number above zero"),
        (dict(num_heads="2"), TypeError, "num_heads: expected an int, got str"),
        (dict(attention_norm=(1, 2)), TypeError, r"attention_norm: expected crate_kernels.Norm, got tuple"),
        (dict(attention=None), TypeError, r"attention: expected crate_kernels.AttentionWeights, got NoneType"),
        (dict(x=torch.randn(5, WIDTH)), ValueError, r"x: expected \[batch, tokens, width\]"),
    ],
)
def test_bad_input_names_the_argument(layer, formula, implementation: str, change: dict, kind, message: str) -> None:
    x, gamma1, beta1, qkv, out, bias, gamma2, beta2, matrix = tensors("cpu", torch.float32, tokens=3)
    arguments = dict(
        x=x, attention_norm=Norm(gamma1, beta1), attention=AttentionWeights(qkv, out, bias), num_heads=HEADS
    )
    if layer is encoder:
        arguments |= dict(sparse_norm=Norm(gamma2, beta2), dictionary=matrix)
    else:
        arguments |= dict(step_norm=Norm(gamma2, beta2), weight=matrix)
    call = encoder_layer if layer is encoder else decoder_layer
    with crate_kernels.use(implementation), pytest.raises(kind, match=message):
        call(**{**arguments, **change})
