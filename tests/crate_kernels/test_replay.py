"""Operators that replay what they did: the same bits as without, for every layout, and never where something else decides."""

from __future__ import annotations

import contextvars
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import crate_kernels
from crate_kernels import replay, tiles
from crate_kernels.layers.api import DecoderWeights, EncoderWeights, decoder_layer, encoder_layer, prepare_layers
from crate_kernels.mssa.api import AttentionWeights
from crate_kernels.products.norm_folding import Norm

triton = pytest.importorskip("triton")
_allocation = pytest.importorskip("triton.runtime._allocation")

WIDTH, HEADS = 32, 2


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "ON_CPU", True)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The source of each replay that ran, in turn."""
    ran: list[str] = []
    written = replay._Recorder.replay

    def watched(self: Any, *arguments: Any) -> Any:
        made = written(self, *arguments)
        if made is None:
            return None

        def run(*values: Any) -> Any:
            ran.append(made.run.__doc__)
            return made.run(*values)

        return made._replace(run=run)

    monkeypatch.setattr(replay._Recorder, "replay", watched)
    return ran


def weight(*shape: int) -> Tensor:
    return torch.randn(*shape) * shape[-1] ** -0.5


def norm() -> Norm:
    return Norm(1 + weight(WIDTH), weight(WIDTH))


def attention() -> AttentionWeights:
    return AttentionWeights(weight(WIDTH, WIDTH), weight(WIDTH, WIDTH), weight(WIDTH))


def mssa(x: Tensor, scale: float = 0.2) -> list[Tensor]:
    return [crate_kernels.mssa(x, *attention(), num_heads=HEADS, scale=scale, skip=x)]


def two_products(x: Tensor) -> list[Tensor]:
    few = x[:, :2]
    return [crate_kernels.ista(few, weight(WIDTH, WIDTH), step_size=0.3, lambd=0.2)]


def one_product(x: Tensor) -> list[Tensor]:
    return [crate_kernels.ista(x, weight(WIDTH, WIDTH), step_size=torch.tensor(0.3), lambd=0.2, threshold="soft")]


def overcomplete(x: Tensor) -> list[Tensor]:
    return [crate_kernels.overcomplete_ista(x, weight(WIDTH, 64), weight(WIDTH, 64), step_size=0.3, lambd=0.1)]


def heads(x: Tensor) -> list[Tensor]:
    return [crate_kernels.shared_qkv_attention(x.unflatten(-1, (HEADS, -1)).transpose(1, 2), is_causal=True)]


def layers(x: Tensor) -> list[Tensor]:
    """An encoder and a decoder layer, prepared."""
    encoder = EncoderWeights(norm(), attention(), norm(), weight(WIDTH, WIDTH))
    decoder = DecoderWeights(norm(), weight(WIDTH, WIDTH), norm(), attention())
    (first,) = prepare_layers(x, [encoder], num_heads=HEADS, step_size=0.3)
    (second,) = prepare_layers(x, [decoder], num_heads=HEADS)
    z = encoder_layer(x, *encoder, num_heads=HEADS, step_size=0.3, prepared=first)
    return [z, decoder_layer(z, *decoder, num_heads=HEADS, prepared=second)]


def results(call: Callable[[Tensor], list[Tensor]], x: Tensor, seed: int) -> list[Tensor]:
    """What ``call`` returns for x, and the gradients of x and of every weight; ``seed`` draws the weights."""
    torch.manual_seed(seed)
    leaves = [x.detach().requires_grad_()]

    def randn(*shape: int) -> Tensor:
        leaves.append(drawn(*shape, dtype=x.dtype).requires_grad_())
        return leaves[-1]

    drawn = torch.randn
    with pytest.MonkeyPatch.context() as patch, crate_kernels.use("triton"):
        patch.setattr(torch, "randn", randn)
        found = call(leaves[0])
    total = sum((one * one).sum() for one in found)
    total.backward()
    return [*found, *[leaf.grad for leaf in leaves]]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(
        torch.equal(one, other) and one.stride() == other.stride()
        for one, other in zip(found, expected, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("call", [mssa, two_products, one_product, overcomplete, heads, layers])
def test_the_same_bits(call, dtype: torch.dtype, replays: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Values differ from call to call, layouts do not; the first call runs, the second is recorded, all others are replayed."""
    tokens = torch.randn(5, 2, 37, WIDTH).to(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(replay, "ON_CPU", False)
        expected = [results(call, x, seed) for seed, x in enumerate(tokens)]
    for seed, x in enumerate(tokens):
        before = len(replays)
        assert same(results(call, x, seed), expected[seed])
        assert (len(replays) > before) == (seed >= 2)


def test_a_layout_is_shape_strides_dtype_alignment_and_numbers(replays: list[str], monkeypatch) -> None:
    x = torch.randn(2, 9, WIDTH)
    flat = torch.randn(2 * 9 * WIDTH + 1)
    kinds = {
        "shape": (torch.randn(2, 8, WIDTH), 0.2),
        "strides": (torch.randn(9, 2, WIDTH).transpose(0, 1), 0.2),
        "features apart": (torch.randn(2, 9, 2 * WIDTH)[..., ::2], 0.2),
        "alignment": (flat[1:].view(2, 9, WIDTH), 0.2),
        "number": (x, 0.4),
    }
    for _ in range(3):
        results(mssa, x, 0)
    assert replays
    for name, (other, scale) in kinds.items():
        count = len(replays)
        found = results(lambda x, scale=scale: mssa(x, scale), other, 0)
        assert len(replays) == count, name
        monkeypatch.setattr(replay, "ON_CPU", False)
        assert same(found, results(lambda x, scale=scale: mssa(x, scale), other, 0)), name
        monkeypatch.setattr(replay, "ON_CPU", True)


def test_the_step_size_is_a_number_of_the_layout(monkeypatch) -> None:
    """A kernel gets its value when it is launched: another value is another layout, not the recorded one."""
    x, w = torch.randn(2, 37, WIDTH), torch.randn(WIDTH, WIDTH)
    step_size = torch.tensor(0.3)
    with crate_kernels.use("triton"):
        for value in (0.3, 0.3, 0.3, 0.5, 0.3, 0.5, 0.5):
            step_size.fill_(value)
            monkeypatch.setattr(replay, "ON_CPU", False)
            expected = crate_kernels.ista(x, w, step_size=step_size)
            monkeypatch.setattr(replay, "ON_CPU", True)
            assert torch.equal(crate_kernels.ista(x, w, step_size=step_size), expected)


def test_autocast_does_not_reach_into_a_replay(replays: list[str]) -> None:
    def product(x: Tensor) -> Tensor:
        with replay.no_autocast(x):
            return x @ x

    replayed, x = replay.Replayed(product), torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = [replayed(x) for _ in range(4)]
    assert len(replays) == 2 and all(torch.equal(one, x @ x) for one in found)


def recorded(function: Callable[..., Any], *arguments: Any) -> str:
    """The source of the replay of ``function``."""
    replayed = replay.Replayed(function)
    for _ in range(2):
        replayed(*arguments)
    (made,) = replayed.replays.values()
    return made.run.__doc__


def test_what_is_written() -> None:
    """Views that nobody needs are not made, others in one step; what has no reader does not run; tensors go after their last."""

    def function(x: Tensor, others: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        doubled = x * 2
        torch.relu(x)  # for nothing
        last = doubled.t().unsqueeze(0)[:, 1:]
        filled = torch.empty(3, 2, dtype=torch.float64).fill_(1)
        return last.exp() + others[1].sum(), [filled.neg_()]

    lines = recorded(function, torch.randn(4, 3), [None, torch.randn(5)]).replace("    ", "").splitlines()
    assert lines == [
        "def replay(a0, a1):",
        "t2 = c1(a0, 2)",
        "t6 = t2.as_strided((1, 2, 4), (3, 1, 3), t2.storage_offset() + 1)",
        "del t2",
        "t7 = empty((3, 2), (2, 1), dtype=c3, device=c4)",
        "t7 = c5(t7, 1)",
        "t8 = c6(t6)",
        "del t6",
        "t9 = c7(a1[1])",
        "t10 = c8(t8, t9)",
        "del t8, t9",
        "t7 = c9(t7)",
        "return (t10, [t7, ], )",
    ]


def test_memory_is_freed_after_its_last_reader() -> None:
    alive: list[weakref.ref] = []
    counts: list[int] = []

    def note(one: Tensor) -> None:
        counts.append(sum(ref() is not None for ref in alive))

    class Kernel(SimpleNamespace):
        """Writes its second argument, and counts what is alive."""

        def __getitem__(self, grid: object) -> Callable[..., None]:
            def run(x: Tensor, out: Tensor) -> None:
                note(out)
                alive.append(weakref.ref(out))
                out.copy_(x)

            return run

    kernel = Kernel(__name__="kernel")

    def chain(x: Tensor) -> Tensor:
        for _ in range(4):
            out = torch.empty_like(x)
            replay.launch(kernel, (1,), x, out)
            x = out
        return x

    replayed, x = replay.Replayed(chain), torch.randn(3)
    for _ in range(3):
        alive.clear()
        counts.clear()
        assert torch.equal(replayed(x), x)
        assert max(counts) <= 1


class Compiled:
    """Stands for a kernel that Triton compiled: notes how it is launched."""

    arg_names = ("x", "scale", "none", "out", "BLOCK")
    __name__ = "compiled"
    function, packed_metadata = 7, (4, 1)

    def __init__(self, scratch: int = 0) -> None:
        self.metadata = SimpleNamespace(global_scratch_size=scratch)
        self.allocators: list[object] = []
        self.direct: list[tuple] = []
        self.replayed: list[tuple] = []

    def __getitem__(self, grid: tuple) -> Callable[..., Any]:
        def launch(*arguments: Any, **options: Any) -> Compiled:
            self.allocators.append(_allocation._allocator.get())
            values = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
            self.direct.append((*(*grid, 1, 1)[:3], *values, options["BLOCK"]))
            return self

        return launch

    def run(self, x: int, y: int, z: int, stream: int, function: int, metadata: tuple, *rest: Any) -> None:
        self.allocators.append(_allocation._allocator.get())
        *hooks, first, second, third, fourth, block = rest
        assert (stream, function, metadata, hooks) == (5, 7, (4, 1), [None] * 3)
        self.replayed.append((x, y, z, first, second, third, fourth, block))


def test_compiled_kernels_get_the_same_arguments(monkeypatch) -> None:
    """Addresses instead of tensors, those of views included, behind whatever the arguments are this time."""
    driver = SimpleNamespace(get_current_stream=lambda device: 5)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    kernel = Compiled()

    def function(x: Tensor, whole: Tensor) -> Tensor:
        out = torch.empty_like(x)
        replay.launch(kernel, (3, 2), x[1:], 0.5, None, whole.view(-1)[4:], BLOCK=64, num_warps=4)
        replay.launch(kernel, (1,), whole, -2, None, out, BLOCK=16, num_warps=8)
        return out

    replayed = replay.Replayed(function)
    stack = torch.randn(3, 4, 6)
    for index in range(3):
        x, whole = stack[index], torch.randn(2, 8)
        kernel.direct.clear()
        out = replayed(x, whole)
    expected = [
        (3, 2, 1, x.data_ptr() + 24, 0.5, None, whole.data_ptr() + 16, 64),
        (1, 1, 1, whole.data_ptr(), -2, None, out.data_ptr(), 16),
    ]
    assert kernel.replayed == expected and not kernel.direct
    # While a profiler is told of launches, Triton itself launches.
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", print)
    out = replayed(x, whole)
    assert kernel.direct == [*expected[:1], (*expected[1][:-2], out.data_ptr(), 16)] and len(kernel.replayed) == 2


def test_kernels_with_descriptors_find_memory_for_them(monkeypatch) -> None:
    """In any thread, in replays as well; and an allocator of the user's stays the user's."""

    def theirs(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(
        triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 5))
    )
    kernel, plain = Compiled(scratch=128), Compiled()

    def function(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for one in (kernel, plain):
            replay.launch(one, (1,), x, 0.5, None, out, BLOCK=64)
        return out

    replayed = replay.Replayed(function)

    def run() -> None:
        replayed(torch.randn(3))

    def run_with_theirs() -> None:
        triton.set_allocator(theirs)
        run()
        assert _allocation._allocator.get() is theirs

    run()
    contextvars.Context().run(run)  # as a thread of its own has it
    contextvars.copy_context().run(run_with_theirs)
    assert len(kernel.replayed) == 1 and kernel.allocators == [replay._scratch] * 3
    assert len(plain.replayed) == 1 and plain.allocators == [replay._scratch] * 2 + [theirs]


CONSTANT = torch.ones(3)


def by_a_kernel_of_its_own(x: Tensor, n: Tensor) -> Tensor:
    """A kernel that writes, and that PyTorch and ``launch`` do not see."""
    out = torch.empty_like(x)
    out.numpy()[:] = 2 * x.numpy()
    return out


def test_every_kernel_is_started_by_launch() -> None:
    """Or replays of its operator would do without it."""
    sources = {path: path.read_text() for path in Path(crate_kernels.__file__).parent.rglob("*.py")}
    assert any("launch(" in source for source in sources.values())
    assert [path.name for path, source in sources.items() if re.search(r"\bkernel\w*\[|_kernel\[", source)] == [
        "replay.py"
    ]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, n: x * x.sum().item(),
        lambda x, n: x[x > 0],
        lambda x, n: x * n.max().item(),
        lambda x, n: x + CONSTANT,
        lambda x, n: CONSTANT,
        lambda x, n: x * torch.zeros(()).copy_(x.sum()).item(),
        by_a_kernel_of_its_own,
    ],
    ids=[
        "a result",
        "a mask",
        "an argument",
        "another tensor",
        "another tensor's result",
        "what was written to a number",
        "a kernel that was not noted",
    ],
)
def test_what_the_layout_does_not_decide_is_not_replayed(function, replays: list[str]) -> None:
    replayed = replay.Replayed(function)
    for _ in range(4):
        x, n = torch.randn(3), torch.randn(2)
        assert torch.equal(replayed(x, n), function(x, n))
    assert list(replayed.met.values()) == [False] and not replays


@pytest.mark.parametrize("in_a_list", [False, True])
def test_a_tensor_given_twice_is_not_recorded(in_a_list: bool, replays: list[str]) -> None:
    """Of the two arguments a recording would read one only, also when they are two tensors later."""

    def function(x: Tensor, others: Any) -> Tensor:
        return x - 2 * (others[0] if in_a_list else others)

    replayed, x, y = replay.Replayed(function), torch.randn(3), torch.randn(3)
    for _ in range(4):
        assert torch.equal(replayed(x, [x] if in_a_list else x), -x)
    assert not replays
    for other in (y, y, x, y):
        assert torch.equal(replayed(x, [other] if in_a_list else other), x - 2 * other)
    assert len(replays) == 3


def test_tied_dictionaries_then_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x, d, other = torch.randn(2, 37, WIDTH), weight(WIDTH, 64), weight(WIDTH, 64)

    def call(second: Tensor) -> Tensor:
        with crate_kernels.use("triton"):
            return crate_kernels.overcomplete_ista(x, d, second, step_size=0.3, lambd=0.1)

    monkeypatch.setattr(replay, "ON_CPU", False)
    expected = call(other)
    monkeypatch.setattr(replay, "ON_CPU", True)
    for second in (d, d, d, d, other, other, other):
        found = call(second)
    assert torch.equal(found, expected)


def test_numbers_that_compare_equal_are_told_apart(replays: list[str]) -> None:
    replayed, x = replay.Replayed(lambda x, n: torch.full_like(x, 1.0) / n if n == 0 else x + n), torch.ones(3).int()
    for number in (1, True, 1.0, 0.0, -0.0):
        for _ in range(3):
            found, expected = replayed(x, number), replayed.function(x, number)
            assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert len(replays) == 5
    for _ in range(5):
        replayed(x, float("nan"))
    assert len(replayed.replays) == 6 and not replayed.met


def test_layouts_met_once_do_not_push_replays_out(monkeypatch: pytest.MonkeyPatch, replays: list[str]) -> None:
    monkeypatch.setattr(replay, "_MOST_LAYOUTS", 4)
    replayed, x = replay.Replayed(lambda x, n: x * n), torch.ones(3)
    for _ in range(3):
        replayed(x, 0.5)
    for step in range(20):
        replayed(x, 1.0 + step)
        replayed(x, 0.5)
    assert len(replays) == 21


def test_numbers_on_the_cpu_may_be_computed_with(replays: list[str]) -> None:
    def function(x: Tensor, n: Tensor) -> Tensor:
        return x * float(n * 2 + 1) + n

    replayed = replay.Replayed(function)
    for value in (1.0, 1.0, 1.0, 2.0, 1.0, 2.0, 2.0):
        x, n = torch.randn(3), torch.tensor(value)
        assert torch.equal(replayed(x, n), function(x, n))
    assert len(replays) == 3 and all(source.count("= c") == 2 for source in replays)


def test_an_error_leaves_no_recorder_behind() -> None:
    def function(x: Tensor) -> Tensor:
        if fails:
            raise ValueError("no")
        return x * 2

    replayed, x, fails = replay.Replayed(function), torch.randn(3), False
    replayed(x)
    fails = True
    with pytest.raises(ValueError, match="no"):
        replayed(x)
    assert replay._watching.recorder is None
    fails = False
    assert all(torch.equal(replayed(x), x * 2) for _ in range(3))


def test_too_many_layouts_are_forgotten(monkeypatch, replays: list[str]) -> None:
    monkeypatch.setattr(replay, "_MOST_LAYOUTS", 3)
    replayed = replay.Replayed(lambda x: x * 2)
    for size in (1, 2, 3, 4, 1, 1, 1):
        replayed(torch.ones(size))
    assert len(replayed.met) <= 3 and len(replayed.replays) == 1 and len(replays) == 1


def test_tiles_on_trial_are_not_replayed(replays: list[str]) -> None:
    """In such a block another tile may be chosen for the same layout."""
    replayed, x = replay.Replayed(lambda x: x * 2), torch.ones(3)
    for _ in range(3):
        replayed(x)
    with tiles.trial({}):
        replayed(x)
    with tiles.pretend("sm_90"):
        replayed(x)
    assert len(replays) == 1


def test_nothing_is_replayed_for_tensors_without_elements(replays: list[str]) -> None:
    """They have no memory to be told apart by."""
    replayed, x = replay.Replayed(lambda x, y: (x * 2, y * 3)), torch.ones(0)
    for _ in range(4):
        replayed(x, torch.ones(0))
    assert not replays


@pytest.mark.gpu
def test_on_a_device(monkeypatch: pytest.MonkeyPatch, replays: list[str]) -> None:
    """Compiled kernels by their addresses, on another stream too."""
    tokens = torch.randn(6, 2, 37, WIDTH, device="cuda", dtype=torch.float16)
    cpu_randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **kind: cpu_randn(*shape, **kind).cuda())
    for seed, x in enumerate(tokens):
        with monkeypatch.context() as patch:
            patch.setattr(replay.Replayed, "__call__", lambda self, *arguments: self.function(*arguments))
            expected = results(layers, x, seed)
        stream = torch.cuda.Stream() if seed % 2 else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = results(layers, x, seed)
        torch.cuda.synchronize()
        assert same(found, expected)
    assert replays
