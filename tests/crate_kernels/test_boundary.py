"""The boundary to PyTorch: torch.library's own checks, gradcheck, torch.compile, functional_call, FLOP counts."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from calls import CALLS, VARIANTS, Call
from support import error, small_model
from torch import Tensor
from torch.library import opcheck
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import crate_kernels
from crate_kernels import ISTA, MSSA, DecoderStep, Norm, OvercompleteISTA, cpu, ista, mssa, shared_qkv_attention
from crate_kernels.products.op import combined_operands, operands

OPS = torch.ops.crate_kernels
IMPLEMENTATIONS = ["composed", "triton"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", ["plain", "causal", "lse of float16", "lengths", "everything"])
def test_opcheck_shared_attention(implementation: str, options: str, device: str) -> None:
    dtype = torch.float16 if "float16" in options else torch.float32
    w = torch.randn(2, 9, 2 * 16, dtype=dtype, device=device).unflatten(-1, (2, 16)).transpose(1, 2)
    is_causal = options in ("causal", "everything")
    lengths = torch.tensor([4, 9], device=device) if options in ("lengths", "everything") else None
    dropout, seed = (0.2, torch.tensor([7])) if options == "everything" else (0.0, None)
    return_lse = options in ("lse of float16", "everything")
    window, key_mask, scales = None, None, None
    if options == "everything":
        window, key_mask = 5, torch.arange(9, device=device)[None].expand(2, 9) % 3 > 0
        scales = torch.tensor([0.2, 0.4], device=device) if implementation == "triton" else None
    settings = 0.25, True, implementation, dropout, seed, return_lse, scales, is_causal, window, lengths, None, key_mask
    arguments = (w, *settings)
    opcheck(OPS.shared_attention_forward.default, arguments)
    out, kept = OPS.shared_attention_forward(*arguments)
    grad = torch.randn_like(out)
    opcheck(OPS.shared_attention_backward.default, (grad, w, out, kept, scales is not None, *settings))


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_compile_takes_attention_with_every_option(implementation: str, device: str) -> None:
    torch.compiler.reset()

    def attend(w: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return shared_qkv_attention(w, lengths=lengths, dropout=0.3, return_lse=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with crate_kernels.use(implementation):
        for batch in (2, 3):
            w = torch.randn(batch, 3, 9, 16, device=device)
            lengths = torch.arange(1, batch + 1, device=device)
            results = []
            for call in (attend, compiled, compiled):
                torch.manual_seed(batch)
                leaf = w.clone().requires_grad_()
                out, lse = call(leaf, lengths)
                out.sum().backward()
                results.append((out, leaf.grad, lse.isfinite(), lse.nan_to_num(neginf=0.0)))
            for found in results[1:]:  # the seed is drawn anew in each call, not once for the graph
                assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))
            torch.manual_seed(99)
            assert not torch.equal(compiled(w, lengths)[0], results[0][0])


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [20, 7], ids=["one product", "two products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16 operands"])
def test_opcheck_ista(implementation: str, tokens: int, dtype: torch.dtype, norm: bool, device: str) -> None:
    if norm and implementation == "triton" and tokens == 7:
        pytest.skip("the kernels fold a LayerNorm into the one product only")
    x, weight = torch.randn(1, tokens, 16, device=device), torch.randn(16, 16, device=device) / 4
    gamma, beta = (torch.randn(16, device=device), torch.randn(16, device=device)) if norm else (None, None)
    numbers, layer_norm = (torch.tensor(0.1), torch.tensor(0.5)), Norm(gamma, beta) if norm else None
    for w, combined in ((weight, None), (weight.t(), None), (weight, weight - weight.T @ weight)):
        operand, constant = (None, None, None), combined is not None
        if implementation == "triton" and (constant or tokens == 20):
            ((combined, operand),) = combined_operands([w], [layer_norm], numbers[0], dtype)
        arguments = w, combined, gamma, beta, *operand, 1e-5, *numbers, False, dtype, implementation
        opcheck(OPS.ista_forward.default, (x, x.dtype, *arguments))
        y, kept = OPS.ista_forward(x, x.dtype, *arguments)
        source = kept.pop() if implementation == "composed" and dtype != x.dtype and not norm else x
        for needs in ((True, False),) if constant else ((True, True), (False, True)):
            opcheck(OPS.ista_backward.default, (torch.randn_like(y), source, y, kept, *needs, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("flipped", [False, True], ids=["rows", "columns"])
def test_opcheck_preparation(flipped: bool, dtype: torch.dtype, device: str) -> None:
    matrices = [torch.randn(16, 16, device=device) for _ in range(2)]
    matrices = [matrix.mT if flipped else matrix for matrix in matrices]
    gamma, beta, bias = torch.randn(3, 16, device=device)
    for given in (matrices[:1], matrices, [matrices[0][:, ::2], matrices[1][:, 1::2]]):
        biases, weights = [bias[: given[0].shape[1]], None][: len(given)], [None, gamma][: len(given)]
        opcheck(OPS.prepare.default, (given, biases, weights, [None, beta][: len(given)], torch.tensor(0.3), dtype))
    opcheck(OPS.combine.default, (matrices, [gamma, None], [beta, None], torch.tensor(0.3), dtype))


# Each choice with each value of every other one.
@pytest.mark.parametrize(
    ("skip", "recompute", "norm"),
    [("none", False, True), ("none", True, False), ("x", False, False), ("x", True, True), ("another", False, False),
     ("another", True, True)],
)  # fmt: skip
def test_opcheck_mssa(skip: str, recompute: bool, norm: bool, device: str) -> None:
    x, other = torch.randn(2, 7, 32, device=device), torch.randn(2, 7, 32, device=device)
    weights = [torch.randn(*shape, device=device) / 5 for shape in ((32, 32), (32, 32), (32,))]
    weights += [torch.randn(32, device=device), torch.randn(32, device=device)] if norm else [None, None]
    layer_norm = Norm(*weights[3:]) if norm else None
    qkv, out = operands([w.mT for w in weights[:2]], [None, weights[2]], [layer_norm, None], torch.float16)
    masks = False, 4, torch.tensor([9, 5], device=device), None, None
    arguments = *weights, *qkv, out.matrix, out.offset, 1e-5, skip == "x", skip == "x", 2, 0.25, recompute, *masks
    forward = x, other if skip == "another" else None, x.dtype, *arguments
    opcheck(OPS.mssa_forward.default, forward)
    out, kept = OPS.mssa_forward(*forward)
    for needs in ([True, True, True], [False, True, False]):
        opcheck(OPS.mssa_backward.default, (torch.randn_like(out), x, kept, needs, *arguments))


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gradcheck() -> None:
    for is_causal in (False, True):
        assert torch.autograd.gradcheck(
            lambda w, c=is_causal: shared_qkv_attention(w, is_causal=c), (double(2, 2, 5, 3),)
        )
        options = dict(is_causal=is_causal, lengths=torch.tensor([3, 5]), dropout=0.3, seed=1)
        assert torch.autograd.gradcheck(lambda w, o=options: shared_qkv_attention(w, **o), (double(2, 2, 5, 3),))
    for tokens in (3, 9):
        for threshold in ("relu", "soft"):

            def sparse(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, threshold: str = threshold) -> Tensor:
                return ista(x, weight, lambd=0.4, threshold=threshold, norm_weight=gamma, norm_bias=beta)

            assert torch.autograd.gradcheck(sparse, (double(tokens, 6), double(6, 6), double(6), double(6)))

    def compress(x: Tensor, qkv: Tensor, out: Tensor, bias: Tensor, gamma: Tensor) -> Tensor:
        return mssa(x, qkv, out, bias, num_heads=2, norm_weight=gamma, skip=x, subtract=True)

    assert torch.autograd.gradcheck(compress, (double(2, 4, 6), double(6, 6), double(6, 6), double(6), double(6)))


EVERY = pytest.mark.parametrize("call", {**CALLS, **VARIANTS}.values(), ids={**CALLS, **VARIANTS})


@EVERY
def test_gradgradcheck_of_the_composed_path(call: Call) -> None:
    """First and second derivatives, one by one, in batches and forward."""
    leaves = call.inputs(torch.float64)
    torch.autograd.gradcheck(call.function, leaves, check_batched_grad=True, check_forward_ad=True)
    torch.autograd.gradgradcheck(call.function, leaves, check_batched_grad=True)


def test_a_weight_made_of_the_tokens_counts_once() -> None:
    x = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ista(x, 0.3 * x.sin()), x)


@EVERY
def test_derivatives_of_the_kernels_derivatives_are_refused(call: Call) -> None:
    """Wherever there is one, whichever input alone asks for it, and nothing that arrives has a derivative of its own.

    The first derivative with ``create_graph=True`` comes as ever.
    """
    inputs = call.inputs(torch.float32)
    refused = pytest.raises(RuntimeError, match=r'^\w+: the Triton kernels have no .* crate_kernels.use\("composed"\)')
    for index, asks in enumerate(inputs):
        leaf = asks.detach().requires_grad_()
        leaves = [leaf if value is asks else value.detach() for value in inputs]
        with crate_kernels.use("reference"):
            (grad,) = torch.autograd.grad(call.function(*leaves).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad.pow(2).sum(), leaf, allow_unused=True) if grad.requires_grad else [None]
        with crate_kernels.use("triton"):
            out = call.function(*leaves)
        (plain,) = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
        (grad,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
        assert torch.equal(plain, grad)
        if second is not None and second.any():
            with refused:
                torch.autograd.grad(grad.sum(), leaf)
        if index == 0:
            with refused:
                torch.autograd.grad(out, leaf, torch.ones(2, *out.shape), is_grads_batched=True)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_compile_around_a_transform(transform: str) -> None:
    torch.compiler.reset()
    x, weight = torch.randn(9, 6), torch.randn(6, 6)

    def run(x: Tensor) -> Tensor:
        def step(x: Tensor) -> Tensor:
            return ista(x, weight).square()

        if transform == "vmap":
            return torch.vmap(step)(x[None])
        if transform == "jvp":
            return torch.func.jvp(step, (x,), (x,))[1]
        return torch.func.grad(lambda x: step(x).sum())(x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert error(compiled(x), run(x)) < 1e-6
    with (
        crate_kernels.use("triton"),
        pytest.raises(RuntimeError, match="ista: the triton implementation was forced, but"),
    ):
        compiled(x)


def test_vmap_over_what_is_else_looked_at() -> None:
    """A step size for each sample, and a length."""
    x, weight, sizes, lengths = torch.randn(2, 9, 6), torch.randn(6, 6), torch.tensor([0.1, 0.3]), torch.tensor([4, 9])
    found = torch.vmap(lambda x, size: ista(x, weight, step_size=size))(x, sizes)
    each = [ista(one, weight, step_size=size) for one, size in zip(x, sizes, strict=True)]
    assert error(found, torch.stack(each)) < 1e-6
    w = x.unflatten(-1, (2, 3)).transpose(1, 2)
    found = torch.vmap(lambda w, n: shared_qkv_attention(w[None], lengths=n[None])[0])(w, lengths)
    assert error(found, shared_qkv_attention(w, lengths=lengths)) < 1e-6


class Encoding(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = small_model()

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode(images)


class Reconstruction(Encoding):
    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(images, noise=noise))


RUN_EXPORTED = """
import sys, torch
for path in sys.argv[1:]:
    run = torch.export.load(path).module()
    for inputs, expected, gradients in torch.load(path + ".expected"):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                found = run(*inputs)
            found = [found] if isinstance(found, torch.Tensor) else found
            for one, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(one.detach(), wanted, rtol=1e-5, atol=1e-5)
            if grad:
                leaves = [dict(run.named_parameters())[name] for name in gradients]
                for one, wanted in zip(torch.autograd.grad(found[0].sin().sum(), leaves), gradients.values(), strict=True):
                    assert (one - wanted).norm() <= 1e-5 * wanted.norm() + 1e-6, path
assert not any(name.startswith("crate") for name in sys.modules)
"""


def test_exported_models_need_nothing_of_ours(tmp_path: Path) -> None:
    """In a process of its own, with gradients and without, for batches and numbers of tokens unlike the one that was traced."""
    paths = []
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=2, max=1024)
    images, noise = torch.randn(5, 3, 16, 16), torch.rand(5, 16)
    for module in (MSSA(32, 2, 16), ISTA(32), DecoderStep(32), OvercompleteISTA(32), Encoding(), Reconstruction()):
        if isinstance(module, Encoding):
            of_five = (images, noise) if isinstance(module, Reconstruction) else (images,)
            trials, sizes = [of_five, tuple(value[:2] for value in of_five)], {0: batch}
        else:
            trials, sizes = [(torch.randn(2, count, 32),) for count in (9, 300, 1000)], {0: batch, 1: tokens}
        program = torch.export.export(module, trials[0], dynamic_shapes=tuple(sizes for _ in trials[0]))
        paths.append(str(tmp_path / f"{type(module).__name__}.pt2"))
        torch.export.save(program, paths[-1])
        expected = []
        for inputs in trials:
            module.zero_grad()
            outputs = module(*inputs)
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            outputs[0].sin().sum().backward()
            gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
            expected.append((inputs, [out.detach() for out in outputs], gradients))
        torch.save(expected, paths[-1] + ".expected")
    subprocess.run([sys.executable, "-c", RUN_EXPORTED, *paths], cwd=tmp_path, check=True)


@pytest.mark.parametrize("multiplies", [True, False], ids=["16-bit products", "float32 products"])
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("reference", torch.bfloat16), ("composed", torch.bfloat16), ("triton", torch.float16)],  # see the interpreter
    ids=["reference", "composed", "triton"],
)
@EVERY
def test_backward_inside_autocast(
    call: Call, implementation: str, dtype: torch.dtype, multiplies: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "CPU_PRODUCT_DTYPES", (torch.bfloat16, torch.float16) if multiplies else ())
    leaves = call.inputs(torch.float32)
    with crate_kernels.use(implementation):
        with torch.autocast("cpu", dtype):
            out = call.function(*leaves)
        upstream = torch.randn_like(out)
        outside = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        with torch.autocast("cpu", dtype):
            inside = torch.autograd.grad(out, leaves, upstream)
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one, other)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(32), torch.nn.LayerNorm(32)])
        self.attention, self.sparsify = MSSA(32, heads=2, dim_head=16), ISTA(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.sparsify(self.attention(x, norm=self.norms[0], skip=x), norm=self.norms[1])


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_compile_takes_a_layer_whole_at_any_batch(implementation: str, autocast: bool, device: str) -> None:
    # The interpreter's bfloat16 products are not right.
    dtype = torch.float16 if implementation == "triton" and device == "cpu" else torch.bfloat16
    torch.compiler.reset()
    layer = Layer().to(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with crate_kernels.use(implementation), torch.autocast(device, dtype, enabled=autocast):
        for batch in (2, 3, 5):  # crosses from two products to one
            x = torch.randn(batch, 9, 32, device=device)
            grads = []
            for call in (layer, compiled):
                layer.zero_grad()
                out = call(x)
                out.sum().backward()
                grads.append([out, *(parameter.grad.clone() for parameter in layer.parameters())])
            assert max(map(error, *grads)) < 1e-5


def test_inductor_takes_a_transposed_dictionary() -> None:
    torch.compiler.reset()
    x, weight = torch.randn(7, 16), torch.randn(16, 16) / 4
    compiled = torch.compile(lambda x, w: ista(x, w.t()), fullgraph=True)
    assert error(compiled(x, weight), ista(x, weight.t().contiguous())) < 1e-6


def test_meta_tensors_give_shapes() -> None:
    x, weight = torch.empty(2, 9, 32, device="meta"), torch.empty(32, 32, device="meta")
    assert ista(x, weight).shape == mssa(x, weight, weight, num_heads=2).shape == (2, 9, 32)


def test_compile_follows_a_change_of_implementation() -> None:
    torch.compiler.reset()
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.append(any("shared_attention_forward" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(shared_qkv_attention, fullgraph=True, backend=backend)
    w = torch.randn(1, 1, 4, 16)
    compiled(w)
    with crate_kernels.use("reference"), ThreadPoolExecutor(1) as pool:
        compiled(w)
        pool.submit(compiled, w).result()
    compiled(w)
    assert seen == [True, False], "one compilation each; the other thread, and the last call, find the first again"


def test_functional_call() -> None:
    layer, x = Layer(), torch.randn(2, 9, 32)
    doubled = {name: 2 * parameter for name, parameter in layer.named_parameters()}
    assert not torch.equal(torch.func.functional_call(layer, doubled, (x,)), layer(x))


def test_the_default_device_does_not_matter() -> None:
    x, weight = torch.randn(9, 16), torch.randn(16, 16)
    expected = ista(x, weight)
    with torch.device("meta"):
        assert torch.equal(ista(x, weight), expected)


class Quantised(Tensor):
    """Half of what lies in it, to every function; it knows PyTorch's own functions only."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function in (Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__):
                return function(*args)
            args, kwargs = tree_map_only(cls, lambda one: 0.5 * one.as_subclass(Tensor), (args, kwargs or {}))
            return function(*args, **kwargs)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("path", ["composed", "triton"])
def test_tensors_of_other_classes_are_right_or_refused(path: str, name: str) -> None:
    function, (x, *weights) = CALLS[name].function, [one.detach() for one in CALLS[name].inputs(torch.float32)]
    for index, weight in enumerate(weights):
        if weight.ndim == 2:
            quantised = [*weights[:index], weight.as_subclass(Quantised), *weights[index + 1 :]]
            with crate_kernels.use("reference"):
                expected = function(x, *weights[:index], 0.5 * weight, *weights[index + 1 :])
            with crate_kernels.use(path):
                if path == "triton":
                    with pytest.raises(RuntimeError, match=r"its kernels take no Quantised; crate_kernels\.use"):
                        function(x, *quantised)
                else:
                    assert error(function(x, *quantised), expected) < 1e-6


def test_flops_are_counted() -> None:
    x, weight = torch.randn(40, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ista(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 40 * 16**2 + 2 * 2 * 16**3
    w = torch.randn(2, 3, 7, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        shared_qkv_attention(w).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * (2 * 3) * 7 * 7 * 16
