"""The operators' benchmark checks what it times, names who is absent, and writes complete rows. Speed is not asserted here."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness, peers, records
from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels import measuring
from benchmarks.kernels.masks import MASKS
from benchmarks.kernels.operators import OPERATORS, Shape
from benchmarks.peers import Peer
from crate_kernels import tiles
from crate_kernels.products import launchers as triton_products

TINY = ["--device", "cpu", "--batch", "2", "--tokens", "9", "--width", "16", "--heads", "2", "--rounds", "2"]
SHAPE = Shape(batch=2, tokens=9, width=16, heads=2)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


def rows_of(rows: list[dict], **wanted: object) -> list[dict]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_operator_has_complete_rows(tmp_path, no_compiler, dtype):
    file = tmp_path / "rows.jsonl"
    kernels.main([*TINY, "--dtype", dtype, "--json", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["operator"] for row in rows} == {*OPERATORS, "ceilings"}
    keys = records.Row.__annotations__.keys()
    for row in rows:
        assert row.keys() | {"unavailable"} == keys
        assert ("unavailable" in row) == (row["ms"] is None)
    timed = [row for row in rows if row["operator"] in OPERATORS and row["ms"]]
    for row in timed:
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        assert row["tflops"] > 0 and row["roofline_percent"] > 0
        assert (row["gigabytes_per_second"] is None) == row["provider"].startswith("products")
        assert (
            row["baseline"] == "reference" and row["ratio"] and row["input_sets"] == 2 and row["shape"]["tokens"] == 9
        )
        assert row["provider"].startswith("products") or row["error"].keys() >= {"out", "gradient 0"}
    for operator in OPERATORS:
        for mode in measuring.MODES:
            assert {"composed", "reference"} <= {
                row["provider"] for row in rows_of(timed, operator=operator, mode=mode)
            }
            for absent in ("official compiled", "official max-autotune"):
                (row,) = rows_of(rows, operator=operator, mode=mode, provider=absent)
                assert "compiler" in row["unavailable"]


@pytest.mark.parametrize("provider", ["products", "products with epilogue"])
def test_library_products_are_rated_by_their_own_work(provider):
    shape = Shape(batch=2, tokens=9, width=16, heads=2)
    comparison = OPERATORS["ista"](shape, measuring.normal(CPU, torch.float32))
    inputs = comparison.inputs()
    products = comparison.products[provider]["forward+backward"](inputs, comparison.upstream(inputs))
    assert measuring.flops_of(products) == 3 * 2 * 18 * 16 * 16 < comparison.least_flops("forward+backward")


def test_attention_has_every_peer_in_every_mode(no_compiler):
    rows = kernels.main([*TINY, "attention"])
    for mode in measuring.MODES:
        found = {row["provider"] for row in rows_of(rows, operator="attention", mode=mode)}
        apart = set(peers.ATTENTION)
        summed = {name + measuring.SUMMED for name in apart} if mode != "forward" else set()
        own = {"composed", "reference", "products", "official compiled", "official max-autotune", "best composed"}
        assert found == apart | summed | own


def test_attention_has_the_peers_that_serve_a_mask(no_compiler):
    rows = kernels.main([*TINY, "attention", "--sweep", "mask", "--modes", "backward"])
    assert {row["operator"] for row in rows} == {"ceilings", "attention", *(f"attention_{mask}" for mask in MASKS)}
    own = {"composed", "reference", "official compiled", "official max-autotune", "best composed"}
    for mask in MASKS:
        found = {row["provider"]: row for row in rows_of(rows, operator=f"attention_{mask}")}
        apart = {"sdpa cudnn", "sdpa efficient", "sdpa math", "flex"}
        apart |= {"causal": {"sdpa flash"}, "keys": set()}.get(mask, {"varlen"})
        assert found.keys() == apart | {name + measuring.SUMMED for name in apart} | own
        assert all(found[name]["ms"] for name in ("composed", "reference", "sdpa math", "sdpa math summed"))
        batch = 1 if mask == "packed" else 2
        assert found["reference"]["shape"] == {"batch": batch, "tokens": 9, "width": 16, "heads": 2}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_the_same_for_all(name):
    shape = Shape(1 if name == "packed" else 2, 150, 16, 2, name)  # flex has blocks of 128
    comparison = OPERATORS["attention"](shape, measuring.normal(CPU, torch.float64))
    official = peers.forced("reference", comparison.operator)
    mask = MASKS[name](shape.batch, shape.tokens, CPU)
    # Of tokens that are the unit vectors, the output is the probabilities.
    attended = official(torch.eye(150, dtype=torch.float64).expand(shape.batch, 2, 150, 150)) > 0
    torch.testing.assert_close(attended, mask.dense(150, CPU).expand_as(attended))
    assert comparison.flops == tuple(products * 2 * 8 * attended.sum() for products in (2, 5))

    (w,), upstream = comparison.inputs(), comparison.upstream([])
    expected = measuring.forward_backward(official, [w], upstream)
    (few,) = official(w[:1]).detach().unbind()
    torch.testing.assert_close(few, expected["out"][0])
    math = measuring.asking_thrice(comparison.peers["sdpa math"].ready(CPU))
    for function in (math, comparison.best):
        torch.testing.assert_close(measuring.forward_backward(function, [w], upstream), expected)
    flex = comparison.peers["flex"]
    torch.testing.assert_close(flex.function(w, w, w, **flex.made()), expected["out"])


@pytest.mark.parametrize("name", ["window_64", "packed"])
def test_varlen_gets_its_sequences(name, monkeypatch):
    shape = Shape(1 if name == "packed" else 2, 150, 16, 2, name)
    comparison = OPERATORS["attention"](shape, measuring.normal(CPU, torch.float64))
    (w,), varlen = comparison.inputs(), comparison.peers["varlen"].ready(CPU)
    # On a device without values PyTorch's own runs, forward and backward.
    leaf = w.to("meta").requires_grad_()
    out = peers.varlen(leaf, leaf, leaf, **varlen.keywords | {"cu_seqlens": varlen.keywords["cu_seqlens"].to("meta")})
    assert out.shape == torch.autograd.grad(out, leaf, torch.empty_like(out))[0].shape == w.shape

    def stand_in(query, key, value, ends, _, longest, __, window_size=(150, 150)):
        assert longest == ends.diff().max()
        place = torch.arange(len(query))
        sequence = torch.searchsorted(ends, place, right=True)
        dense = (sequence[:, None] == sequence) & ((place[:, None] - place).abs() <= window_size[0])
        tokens = (one.transpose(0, 1) for one in (query, key, value))
        return F.scaled_dot_product_attention(*tokens, attn_mask=dense).transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    torch.testing.assert_close(varlen(w, w, w), peers.forced("reference", comparison.operator)(w))


def test_peers_are_chosen_by_group(no_compiler):
    rows = kernels.main([*TINY, "attention", "--peers", "library", "--modes", "forward"])
    assert not {"flex", "official compiled"} & {row["provider"] for row in rows}


def test_gradients_apart_add_up_to_the_summed_one():
    w, upstream = (torch.randn(2, 2, 9, 8, dtype=torch.float64) for _ in range(2))
    function = peers.ATTENTION["sdpa flash"].function
    apart = measuring.work_of("backward", function, [w] * 3, upstream)()
    (summed,) = measuring.work_of("backward", measuring.asking_thrice(function), [w], upstream)()
    torch.testing.assert_close(sum(apart), summed)


def test_forward_and_backward_are_both_done():
    x, upstream = (torch.randn(3, dtype=torch.float64) for _ in range(2))
    out, gradient = measuring.work_of("forward+backward", torch.square, [x], upstream)()
    torch.testing.assert_close(out, x.square())
    torch.testing.assert_close(gradient, 2 * x * upstream)


def test_truth_in_chunks_is_the_truth():
    comparison = OPERATORS["encoder_layer"](SHAPE, measuring.normal(CPU, torch.float64))
    inputs = comparison.inputs()
    inputs = [value.double() for value in inputs]
    upstream = torch.randn_like(inputs[0])
    official = peers.forced("reference", comparison.operator)
    whole = measuring.forward_backward(official, inputs, upstream)
    for name, value in measuring.in_chunks(official, inputs, upstream, 1).items():
        torch.testing.assert_close(value, whole[name])


@pytest.mark.parametrize("name", ["mssa", "ista", "norm_linear", "encoder_layer", "decoder_layer"])
def test_best_composed_computes_the_operator(name):
    comparison = OPERATORS[name](SHAPE, measuring.normal(CPU, torch.float64))
    inputs = [value.double() for value in comparison.inputs()]
    expected = peers.forced("reference", comparison.operator)(*inputs)
    torch.testing.assert_close(comparison.best(*inputs), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter stands in for the device")
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "attention"])
def test_the_library_multiplies_for_the_kernels(name, monkeypatch):
    selected = set()

    def select(table, device, kernel, *key):
        tile = tiles.select(table, device, kernel, *key)
        selected.add((kernel, tile["LIBRARY"]))
        return tile

    monkeypatch.setattr(triton_products, "select", select)
    comparison = OPERATORS[name](SHAPE, measuring.normal(CPU, torch.float32))
    inputs = comparison.inputs()
    upstream = comparison.upstream(inputs)
    providers = (measuring.WITH_LIBRARY,)
    functions, errors, _ = measuring.checked(comparison, providers, (), inputs, upstream, torch.float32)
    assert errors.keys() == set(providers)  # no further from float64 than it may be
    assert selected == {("project", 1), ("input_gradient", 1)}
    for mode in measuring.MODES:
        (work,) = measuring.works_of(mode, comparison, functions, [inputs], [upstream])[measuring.WITH_LIBRARY]()
        selected.clear()
        work()
        assert {library for _, library in selected} == {1}


def of_attention(dtype: torch.dtype, added: dict[str, Peer]) -> tuple[dict, dict, dict]:
    comparison = OPERATORS["attention"](SHAPE, measuring.normal(CPU, dtype))
    comparison.peers.clear()
    comparison.peers.update(added)
    inputs = comparison.inputs()
    upstream = torch.randn_like(inputs[0])
    return measuring.checked(comparison, ("composed", "reference"), ("library",), inputs, upstream, dtype)


def test_a_peer_that_disagrees_or_breaks_takes_no_part():
    wrong = {
        "half": Peer(lambda w: w / 2),
        "broken": Peer(lambda w: w.missing),
        "apart": Peer(lambda *w: w[0], separate=True),
    }
    functions, errors, absent = of_attention(torch.float32, wrong)
    assert functions.keys() == errors.keys() == {"composed", "reference"}
    assert absent.keys() == {"half", "broken", "apart", "apart summed"}
    assert "off, relative" in absent["half"] and "missing" in absent["broken"]


def test_ours_that_disagrees_is_not_timed(monkeypatch):
    right = Peer.ready

    def ready(self, device):
        function = right(self, device)
        return (lambda w: function(w) * 1.1) if self.implementation == "composed" else function

    monkeypatch.setattr(Peer, "ready", ready)
    with pytest.raises(ValueError, match=r"composed: out is .* off"):
        of_attention(torch.float32, {})
    with pytest.raises(SystemExit, match=r"attention, .* composed: out is .* off"):
        kernels.main([*TINY, "attention", "--peers", "library"])


def test_sweeps_change_one_thing_and_repeat_nothing():
    found = kernels.cases("attention", SHAPE, "float32", kernels.SWEEPS)
    assert found[0] == (SHAPE, "float32") and len(set(found)) == len(found)
    assert {shape.batch for shape, _ in found} >= set(kernels.BATCHES)
    assert {shape.width // shape.heads for shape, _ in found} >= set(kernels.HEAD_DIMS)
    assert {shape.tokens for shape, _ in found} >= {50, 4097}
    assert {dtype for _, dtype in found} == set(harness.DTYPES)
    assert all(shape.heads == 2 for shape, _ in kernels.cases("attention", SHAPE, "float32", ["head_dim"]))
    assert kernels.cases("ista", SHAPE, "float32", ["head_dim"]) == [(SHAPE, "float32")]


def test_an_unknown_operator_is_named(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["atention"])
    assert "'atention' is not one of attention, ista" in capsys.readouterr().err


def test_ceilings_bound_the_rates():
    ceilings = harness.Ceilings(tflops=100, gigabytes_per_second=1000)
    compute_bound = ceilings.rates(1.0, 50e9, 1e6)  # 50 TFLOP/s at 50,000 FLOPs a byte
    assert compute_bound == {"tflops": 50, "gigabytes_per_second": 1, "roofline_percent": 50}
    memory_bound = ceilings.rates(1.0, 1e9, 0.5e9)  # 500 GB/s at 2 FLOPs a byte
    assert memory_bound["roofline_percent"] == pytest.approx(50)
    assert ceilings.rates(1.0, 25e9)["roofline_percent"] == 25


def test_an_unknown_key_is_refused():
    with pytest.raises(TypeError, match="speed: no such key"):
        records.Record(CPU, 0, None).add(operator="ista", provider="ours", speed=1)
