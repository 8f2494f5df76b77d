"""What weights become before products: both kernels against float64, and the table of addresses they read."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from support import error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import crate_kernels
from crate_kernels.layers.api import prepare_layers
from crate_kernels.products import preparation, preparation_kernels
from crate_kernels.products.norm_folding import Norm, Operand
from crate_kernels.products.op import operands
from crate_kernels.products.preparation import combine_all, prepare_all
from crate_mae import create_model

STEP_SIZE = torch.tensor(0.3)
SHAPES = [(40, 72), (128, 32), (1, 5), (129, 33)]
MEMORIES = {
    "rows": lambda *shape: torch.randn(shape),
    "columns": lambda *shape: torch.randn(shape[::-1]).T,
    "every second": lambda *shape: torch.randn(shape[0], 2 * shape[1])[:, ::2],
    "off by one": lambda *shape: torch.randn(shape[0] * shape[1] + 1)[1:].view(shape),
}


def norms_and_biases(inner: int, width: int) -> tuple[list[Norm | None], list[Tensor | None]]:
    """Everything, no beta, neither, and a bias alone."""
    gamma, beta, bias = torch.randn(3, inner), torch.randn(inner), torch.randn(2, width)
    return [Norm(gamma[0], beta), Norm(gamma[1]), None, None], [bias[0], None, None, bias[1]]


def check(
    found: Operand, index: int, matrix: Tensor, norm: Norm | None, bias: Tensor | None, dtype: torch.dtype
) -> None:
    """``found``, stacked, against the formula for one matrix B [inner, width], scaled already, in float64."""
    gamma, beta = (norm.weight, norm.bias) if norm else (None, None)
    scaled = matrix if gamma is None else gamma.double()[:, None] * matrix
    offset = torch.zeros(matrix.shape[1]) if beta is None else beta.double() @ matrix
    offset = offset + (0 if bias is None else bias.double())
    operand = found.matrix[index]
    assert operand.dtype == dtype and error(operand, scaled) <= torch.finfo(dtype).eps
    # Sums of what was rounded, not of what was meant.
    assert error(found.column_sum[index], operand.double().sum(0)) <= 2e-6
    assert (found.offset[index] - offset).abs().max() <= 1e-6 * (1 + offset.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prepare_all(shape: tuple[int, int], memory: str, dtype: torch.dtype, device: str) -> None:
    matrices = [MEMORIES[memory](*shape).to(device) for _ in range(4)]
    norms, biases = norms_and_biases(*shape)
    for scale in (None, STEP_SIZE):
        found = prepare_all(matrices, biases, norms, dtype, scale)
        for index, (matrix, norm, bias) in enumerate(zip(matrices, norms, biases, strict=True)):
            check(found, index, matrix.double() * (1 if scale is None else scale.double()), norm, bias, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("width", [1, 40, 129])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=lambda dtype: f"from {dtype}")
def test_combine_all(stored: torch.dtype, width: int, memory: str, dtype: torch.dtype, device: str) -> None:
    """Weights of every dtype: products of 16-bit numbers are exact in float32."""
    norms, _ = norms_and_biases(width, width)
    weights = [MEMORIES[memory](width, width).to(device) / width**0.5 for _ in norms]
    if stored == torch.float16:
        weights = [weight.half() for weight in weights]
    combined, found = combine_all(weights, norms, STEP_SIZE, dtype)
    for index, (weight, norm) in enumerate(zip(weights, norms, strict=True)):
        exact = weight.double() - weight.double().T @ weight.double()
        assert combined.dtype == torch.float32
        assert error(combined[index], exact) <= 1e-6
        check(found, index, combined[index].double() * STEP_SIZE.double(), norm, None, dtype)


def test_takes_weights_that_do_not_fit_one_launch_as_they_are(device: str) -> None:
    """Different dtypes and strides among matrices, and among vectors; vectors with gaps."""
    matrices = [torch.randn(24, 40), torch.randn(40, 24).T, torch.randn(24, 40).half()]
    norms = [Norm(torch.randn(24).half(), torch.randn(48)[::2]), None, Norm(torch.randn(24))]
    found = prepare_all(matrices, [None] * 3, norms, torch.float32)
    for index, (matrix, norm) in enumerate(zip(matrices, norms, strict=True)):
        check(found, index, matrix.double(), norm, None, torch.float32)


def test_prepare_copies_where_there_is_nothing_to_do(device: str) -> None:
    matrix, bias = torch.randn(8, 6, device=device), torch.randn(6, device=device)
    (found,) = operands([matrix], [bias], [None], torch.float32)
    assert torch.equal(found.matrix, matrix) and found.matrix.data_ptr() != matrix.data_ptr()
    assert torch.equal(found.offset, bias) and found.offset.data_ptr() != bias.data_ptr() and found.column_sum is None


def test_same_weights_have_one_table_and_see_new_values(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_MOST_TABLES", 8)
    matrices, norm = [torch.randn(16, 16, device=device) for _ in range(2)], Norm(torch.ones(16, device=device))
    preparation._tables.clear()
    for _ in range(3):
        for matrix in matrices:
            matrix.normal_()
        found = prepare_all(matrices, [None] * 2, [norm] * 2, torch.float32)
        assert torch.equal(found.matrix, torch.stack(matrices))
    assert len(preparation._tables) == 1
    for _ in range(2 * preparation._MOST_TABLES):
        prepare_all([torch.randn(4, 4, device=device)], [None], [Norm(torch.ones(4, device=device))], torch.float32)
    assert len(preparation._tables) <= preparation._MOST_TABLES


def test_a_graph_cannot_begin_with_unknown_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_stream", lambda device: (1, True))
    on_cuda = SimpleNamespace(device=torch.device("cuda"), data_ptr=lambda: 64)
    with pytest.raises(RuntimeError, match="weights: met for the first time while a CUDA graph is captured"):
        preparation._table([on_cuda], [(None, None, None)])
    assert not any(key[0] == on_cuda.device for key in preparation._tables)


def test_a_table_serves_the_stream_that_filled_it_and_every_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, state = torch.randn(4, 4), SimpleNamespace(stream=1, capturing=False)
    monkeypatch.setattr(preparation, "_stream", lambda device: (state.stream, state.capturing))
    monkeypatch.setattr(preparation, "_tables_of_graphs", {})

    def table(stream: int, capturing: bool = False) -> torch.Tensor:
        state.stream, state.capturing = stream, capturing
        return preparation._table([matrix], [(None, None, None)])

    first, second = table(1), table(2)
    assert first is not second and torch.equal(first, second)
    assert table(1) is first and table(2) is second
    captured = table(3, capturing=True)  # on a stream of its own, as torch.cuda.graph does it
    assert captured is first
    # What a graph reads stays, and serves the next graph, also when the steps between have another table.
    preparation._tables.clear()
    assert table(1) is not first
    assert table(3, capturing=True) is first
    assert list(preparation._tables_of_graphs.values()) == [first]


VIEWS = {"detach", "t", "transpose", "split", "unbind", "view", "alias", "select"}
MEMORY = {"empty", "new_empty", "empty_strided"}
NUMBERS_ON_THE_HOST = {"lift_fresh", "_local_scalar_dense"}


class Launches(TorchDispatchMode):
    """Counts what would each be a launch or more on a GPU: our kernels, and every operator that computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        for name in ("prepare_kernel", "combine_kernel"):
            kernel = getattr(preparation_kernels, name)
            monkeypatch.setattr(preparation_kernels, name, self._counting(name, kernel))

    def _counting(self, name: str, kernel: object) -> object:
        note = self.found.append

        class Kernel:
            def __getitem__(self, grid: object) -> object:
                note(name)
                return kernel[grid]

        return Kernel()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "crate_kernels":
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in VIEWS | MEMORY | NUMBERS_ON_THE_HOST:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "float16"])
def test_a_whole_model_takes_four_launches(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    size = dict(embed_dim=32, num_heads=2, decoder_num_heads=2, depth=3, decoder_depth=3, img_size=32, patch_size=16)
    model = create_model("crate_mae_tiny", **size)
    x = torch.randn(2, 5, 32)
    launches = Launches(monkeypatch)
    with crate_kernels.use("triton"), torch.autocast("cpu", torch.float16, enabled=autocast):
        for blocks in (model.blocks, model.decoder_blocks):
            prepare_layers(x, [block.weights() for block in blocks], num_heads=2)  # makes the tables
        launches.found.clear()
        with launches:
            for blocks in (model.blocks, model.decoder_blocks):
                prepared = prepare_layers(x, [block.weights() for block in blocks], num_heads=2)
                assert len(prepared) == 3 and all(prepared)
    assert launches.found == ["prepare_kernel", "combine_kernel", "prepare_kernel", "prepare_kernel"]


def test_every_layer_gets_its_own(device: str) -> None:
    """Square and not square attention, with and without bias: what each layer gets is what it would prepare alone."""
    for width, inner, bias, is_encoder in product((16,), (16, 24), (False, True), (False, True)):
        layers = []
        for _ in range(3):
            norms = [Norm(torch.randn(width, device=device), torch.randn(width, device=device)) for _ in range(2)]
            out_bias = torch.randn(width, device=device) if bias else None
            weights = torch.randn(inner, width, device=device), torch.randn(width, inner, device=device), out_bias
            matrix = torch.randn(width, width, device=device)
            attention = crate_kernels.AttentionWeights(*weights)
            layers.append(
                crate_kernels.EncoderWeights(norms[0], attention, norms[1], matrix)
                if is_encoder
                else crate_kernels.DecoderWeights(norms[1], matrix, norms[0], attention)
            )
        options, x = dict(num_heads=2, step_size=0.3), torch.randn(1, 3, width, device=device)
        with crate_kernels.use("triton"):
            found = prepare_layers(x, layers, **options)
            alone = [prepare_layers(x, [layer], **options)[0] for layer in layers]
        for ready, expected in zip(found, alone, strict=True):
            for part, wanted in zip(ready, expected, strict=True):
                assert all(one is other for one, other in zip(part.made_of[:3], wanted.made_of[:3], strict=True))
                pairs = [(part.combined, wanted.combined)] + [
                    pair
                    for pairs in zip(part.operands, wanted.operands, strict=True)
                    for pair in zip(*pairs, strict=True)
                ]
                for one, other in pairs:
                    assert (one is None) == (other is None) and (one is None or error(one, other) <= 1e-6)
