"""Products by PyTorch's own libraries: oneDNN's in float32 where it is taken, else what PyTorch would do itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import a_few_roundings, awkward_gradients, error, gradients
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from crate_kernels import cpu, library_products
from crate_kernels.cpu import _CPU

LINEAR = torch.ops.crate_kernels.linear


@pytest.fixture(params=[False, True], ids=["torch.mm", "oneDNN"], autouse=True)
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Each library in turn, whatever this machine would choose."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch was built without oneDNN")
    monkeypatch.setattr(library_products, "ONEDNN_IS_FASTER", request.param)
    return request.param


def parameters(width: int = 24, out_width: int = 40) -> list[Tensor]:
    return [torch.randn(out_width, width) / width**0.5, torch.randn(out_width)]


def agree(found: list[Tensor], truth: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    for one, exact in zip(found, truth, strict=True):
        assert one.dtype == dtype
        assert error(one, exact) <= a_few_roundings(dtype)


def against_float64(x: Tensor, parameters: list[Tensor], upstream: Tensor) -> None:
    truth = gradients(F.linear, [value.double() for value in (x, *parameters)], upstream.double())
    agree(gradients(library_products.linear, [x, *parameters], upstream), truth)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (2, 5, 24), (2, 3, 5, 24)], ids=str)
def test_linear_and_its_gradients(shape: tuple[int, ...]) -> None:
    against_float64(torch.randn(shape), parameters(), torch.randn(*shape[:-1], 40))


def test_gradients_as_they_arrive() -> None:
    for _, upstream in awkward_gradients((6, 5, 40), torch.float32, "cpu"):
        against_float64(torch.randn(6, 5, 24), parameters(), upstream)


def test_tokens_and_weights_of_any_strides() -> None:
    for name, x in awkward_gradients((9, 24), torch.float32, "cpu"):
        for other, weight in awkward_gradients((40, 24), torch.float32, "cpu"):
            exact = F.linear(x.double(), weight.double())
            assert error(library_products.linear(x, weight), exact) <= a_few_roundings(torch.float32), (name, other)
            assert error(library_products.product(x, weight.t()), exact) <= a_few_roundings(torch.float32), (
                name,
                other,
            )


@pytest.mark.parametrize("name", ["every second number", "one number for all", "a column"])
def test_bias_of_any_strides(name: str) -> None:
    x, (weight, _) = torch.randn(7, 24), parameters()
    strided = {
        "every second number": torch.randn(80)[::2],
        "one number for all": torch.randn(1).expand(40),
        "a column": torch.randn(40, 3)[:, 1],
    }
    exact = F.linear(x.double(), weight.double(), strided[name].double())
    assert error(library_products.linear(x, weight, strided[name]), exact) <= a_few_roundings(torch.float32)


def test_weights_that_overlap() -> None:
    x, weight = torch.randn(7, 24), torch.randn(63).unfold(0, 24, 1)
    agree([library_products.linear(x, weight)], [F.linear(x.double(), weight.double())])


def test_each_product_takes_the_chosen_library(chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, onednn = [], library_products._onednn
    monkeypatch.setattr(library_products, "_onednn", lambda *given: calls.append(given) or onednn(*given))
    x, (weight, bias) = torch.randn(7, 24).requires_grad_(), parameters()
    library_products.linear(
        x, weight, bias
    ).sum().backward()  # the gradient that arrives is expanded: PyTorch's product
    library_products.linear(x, weight, bias).backward(torch.randn(7, 40))
    assert len(calls) == (3 if chosen else 0)
    x = x.detach()
    library_products.product(x, weight.t())
    library_products.plus_product(x, x, weight.t()[:, :24])
    assert len(calls) == (5 if chosen else 0)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_multiply(rows: int) -> None:
    weight, bias = parameters()
    x = torch.randn(rows, 24)[:, : 24 if rows == 0 else 0]
    out = library_products.linear(x, weight[:, : x.shape[1]], bias)
    assert torch.equal(out, bias.expand(rows, 40))


@pytest.mark.parametrize("wanted", range(3), ids=["x", "weight", "bias"])
def test_only_gradients_asked_for(wanted: int) -> None:
    tensors = [torch.randn(7, 24), *parameters()]
    tensors[wanted].requires_grad_()
    out = library_products.linear(*tensors)
    with FlopCounterMode(display=False) as counter:
        out.backward(torch.randn(7, 40))
    assert [value.grad is not None for value in tensors] == [index == wanted for index in range(3)]
    assert counter.get_total_flops() == (0 if wanted == 2 else 2 * 7 * 24 * 40)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    x, (weight, bias) = torch.randn(7, 24, dtype=dtype), (value.to(dtype) for value in parameters())
    out = library_products.linear(x, weight, bias)
    assert out.dtype == dtype
    assert error(out, F.linear(x.double(), weight.double(), bias.double())) <= a_few_roundings(dtype)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["of float32", "of bfloat16"])
def test_tokens_of_16_bits_multiplied_in_float32(weights: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept as they came; results are rounded once, and gradients of float32 weights not at all."""
    monkeypatch.setattr(cpu, "CPU_PRODUCT_DTYPES", ())
    tensors = [torch.randn(2, 5, 24).bfloat16(), *(value.to(weights) for value in parameters())]
    upstream = torch.randn(2, 5, 40).bfloat16()
    truth = gradients(F.linear, [value.double() for value in tensors], upstream.double())
    found = gradients(library_products.linear, tensors, upstream)
    for one, exact, dtype in zip(found, truth, (torch.bfloat16, *(t.dtype for t in tensors)), strict=True):
        agree([one], [exact], dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        library_products.linear(*(value.requires_grad_() for value in tensors))
    assert kept == [torch.bfloat16, weights]


def test_gradient_of_the_gradient() -> None:
    def twice(function: object, tensors: list[Tensor]) -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in tensors]
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(one.square().sum() for one in first), leaves))

    tensors = [torch.randn(7, 24), *parameters()]
    agree(twice(library_products.linear, tensors), twice(F.linear, [value.double() for value in tensors]))


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (1, -1), (0.1, -0.1), (2.0, 0.5)])
@pytest.mark.parametrize("turned", [False, True], ids=["a row by row", "a column by column"])
def test_plus_product(beta: float, alpha: float, turned: bool) -> None:
    total, a, b = torch.randn(7, 40), torch.randn(7, 24), torch.randn(24, 40)
    a = a.t().contiguous().t() if turned else a
    before = total.clone()
    found = library_products.plus_product(total, a, b, beta=beta, alpha=alpha)
    agree([found], [beta * total.double() + alpha * (a.double() @ b.double())])
    assert torch.equal(total, before)


@pytest.mark.parametrize("with_bias", [False, True])
def test_boundary(with_bias: bool) -> None:
    weight, bias = parameters()
    x, bias = torch.randn(7, 24), bias if with_bias else None
    opcheck(LINEAR, (x, weight, bias))
    with FlopCounterMode(display=False) as counter:
        LINEAR(x, weight, bias)
    assert counter.get_total_flops() == 2 * 7 * 24 * 40


def test_compiles_whole() -> None:
    tensors = [torch.randn(2, 5, 24), *parameters()]
    compiled = torch.compile(library_products.linear, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(2, 5, 40)
    for one, plain in zip(
        gradients(compiled, tensors, upstream), gradients(library_products.linear, tensors, upstream), strict=True
    ):
        assert torch.equal(one, plain)


def test_compiles_for_a_number_of_rows_that_data_decide() -> None:
    x, (weight, bias) = torch.randn(7, 24), parameters()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(
            lambda x, mask: library_products.linear(x[mask], weight, bias), fullgraph=True, backend="aot_eager"
        )
        for mask in (x[:, 0] > 0, x[:, 0] > 100):
            assert torch.equal(compiled(x, mask), library_products.linear(x[mask], weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_come_as_transforms_have_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches, of either kind that PyTorch has, and with a tangent."""
    monkeypatch.setattr(cpu, "CPU_PRODUCT_DTYPES", ())
    leaves = [value.to(dtype).requires_grad_() for value in (torch.randn(3, 5, 24), *parameters())]
    upstream, out = torch.randn(2, 3, 5, 40, dtype=dtype), library_products.linear(*leaves)

    def backward(grad: Tensor, **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True, **options)

    one_by_one = [torch.stack(grads) for grads in zip(*map(backward, upstream), strict=True)]
    agree(list(backward(upstream, is_grads_batched=True)), one_by_one, dtype)
    agree(list(torch.func.vmap(backward)(upstream)), one_by_one, dtype)
    tangents = torch.func.jvp(backward, (upstream[0],), (upstream[1],))[1]
    agree(list(tangents), [grads[1] for grads in one_by_one], dtype)


def test_a_subclass_takes_pytorchs_product_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CPU_PRODUCT_DTYPES", ())
    x, (weight, bias) = torch.randn(7, 24).bfloat16().as_subclass(torch.Tensor), parameters()

    class Named(Tensor):
        pass

    found = library_products.linear(x.as_subclass(Named), weight, bias)
    assert type(found) is Named
    assert torch.equal(found.as_subclass(Tensor), F.linear(x, weight.bfloat16(), bias.bfloat16()))


def test_a_weight_of_a_subclass_is_multiplied_as_it_says(chosen: bool) -> None:
    class Doubled(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is F.linear:
                return F.linear(args[0], 2 * args[1].as_subclass(Tensor), *args[2:])
            return super().__torch_function__(function, types, args, kwargs)

    x, (weight, bias) = torch.randn(7, 24), parameters()
    found = library_products.linear(x, weight.detach().as_subclass(Doubled), bias)
    assert torch.equal(found, F.linear(x, 2 * weight, bias))


def test_only_what_gradients_need_is_kept(chosen: bool) -> None:
    weight = parameters()[0]
    for rows_need, weight_needs in ((True, False), (False, True)):
        tensors = torch.randn(7, 24, requires_grad=rows_need), weight.clone().requires_grad_(weight_needs)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            library_products.linear(*tensors)
        assert [tuple(t.shape) for t in kept if t.numel() == 7 * 24] == ([(7, 24)] if weight_needs else [])


def test_autocast_does_not_reach_the_product() -> None:
    x, (weight, bias) = torch.randn(7, 24), parameters()
    plain = LINEAR(x, weight, bias)
    with torch.autocast("cpu", torch.bfloat16):  # as where a backward is called inside it
        assert torch.equal(LINEAR(x, weight, bias), plain)


@pytest.mark.parametrize(
    ("most", "left"),
    [
        ("avx2", "fpu"),
        ("AVX512_CORE", "fpu avx512f"),
        ("AVX512_CORE_BF16", "fpu avx512f avx512_bf16"),
        ("AVX512_CORE_AMX", "fpu avx512f avx512_bf16 avx512_fp16 amx_bf16"),
        ("ALL", "fpu avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_fp16"),
    ],
)
def test_what_onednn_may_not_use(most: str, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    said = tmp_path / "cpuinfo"
    said.write_text("flags\t\t: fpu avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_fp16\n")
    assert _CPU.this(str(said)).flags == set(left.split())


def test_what_the_cpu_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    said = tmp_path / "cpuinfo"
    said.write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16\n\nprocessor\t: 1\nflags\t: fpu\n"
    )
    assert _CPU.this(str(said)) == ("AuthenticAMD", frozenset({"fpu", "avx512f", "avx512_bf16"}))
    said.write_bytes(b"model name\t: \xff\nFeatures\t: fp asimd\n")
    assert _CPU.this(str(said)) == _CPU.this(str(tmp_path / "none")) == ("", frozenset())
