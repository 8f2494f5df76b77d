"""A step as a CUDA graph: what is captured waits for nothing, and replays train as steps do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny_config, write_photographs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import crate_kernels
from crate_mae import create_model
from crate_mae.data.transforms import Normalization
from crate_mae.training import PretrainConfig, pretrain
from crate_mae.training.average import Average
from crate_mae.training.config import OptimizerConfig
from crate_mae.training.graph import MOST_CAPTURES, WARM_UP, CudaCapture, StepGraph, obstacle_to_graph
from crate_mae.training.metrics import NonFiniteLoss, StepMeter
from crate_mae.training.optimizer import build_optimizer
from crate_mae.training.parallel import Alone
from crate_mae.training.ranks import Ranks
from crate_mae.training.step import Step

MODEL = dict(img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=2, decoder_depth=1, decoder_num_heads=2)
IMAGES = 4


class HostInvolved(Exception):
    """Work that is to be captured reads the device, or copies from memory that a replay would not find."""


class CaptureSafe(TorchDispatchMode):
    """Fails where a CUDA graph would, or would repeat what the host did once: for work on the device "meta".

    Our operators are looked into: their own Python runs there, and not their fakes.
    """

    checks = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "crate_kernels":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if func._schema.name == "aten::_fused_adamw_":
            assert all(one.device.type == "meta" for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor))
            return None  # it writes into its arguments, and has no form for tensors without values
        if not self.checks:
            return func(*args, **kwargs)
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        on_host = [one for one in given if one.device.type == "cpu"]
        on_device = len(on_host) < len(given)
        target = kwargs.get("device")
        leaves = torch.device(target).type if target is not None and given else None
        if (
            func._schema.name in ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")
            and on_device
        ):
            raise HostInvolved(f"{func} waits for the device")
        if on_device and (leaves == "cpu" or (func._schema.name == "aten::copy_" and args[0].device.type == "cpu")):
            raise HostInvolved(f"{func} copies from the device")
        if any(one.ndim for one in on_host) and (on_device or leaves == "meta"):
            raise HostInvolved(f"{func} copies to the device")
        if {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags) and on_device:
            raise HostInvolved(f"the result of {func} has a shape that only the device knows")
        return func(*args, **kwargs)


ON_DEVICE = torch.empty(3, device="meta")


@pytest.mark.parametrize(
    "offender",
    [
        lambda: ON_DEVICE.sum().item(),
        lambda: float(ON_DEVICE.max()),
        lambda: bool((ON_DEVICE > 0).all()),
        lambda: ON_DEVICE.cpu(),
        lambda: torch.zeros(3).copy_(ON_DEVICE),
        lambda: torch.ones(3).to("meta"),
        lambda: ON_DEVICE.copy_(torch.ones(3)),
        lambda: ON_DEVICE + torch.ones(3),
        lambda: torch.nonzero(ON_DEVICE),
        lambda: ON_DEVICE[ON_DEVICE > 0],
        lambda: torch.unique(ON_DEVICE),
    ],
    ids=["item", "float", "bool", "cpu", "to the host", "to the device", "copy_", "mixed", "nonzero", "mask", "unique"],
)
def test_the_mode_finds_offenders(offender: Callable[[], object]) -> None:
    with pytest.raises(HostInvolved), CaptureSafe():
        offender()


def test_the_mode_lets_work_on_the_device_pass() -> None:
    with CaptureSafe():
        number = float(torch.tensor(2.0) * 3)
        (ON_DEVICE * number + torch.tensor(1.0)).sum().clamp_min(1).expand(4).sort()


def step_of(
    model: torch.nn.Module, dtype: torch.dtype, *, accumulate: int = 1, average: bool = False, **options: Any
) -> Step:
    device = next(model.parameters()).device
    normalization = Normalization((0.5,) * 3, (0.2,) * 3, 3).to(device)

    def loss_of(forward: Callable[..., Any], pixels: Tensor, beside: Tensor, step: int) -> Tensor:
        return forward(normalization(pixels).to(dtype), mask_ratio=0.75, noise=beside).loss

    return Step(
        Alone(model, Ranks(), compiled=False, accumulate=accumulate),
        build_optimizer(model, OptimizerConfig(), IMAGES),
        loss_of,
        batch_size=IMAGES,
        accumulate=accumulate,
        clip_grad=0.5,
        average=Average(model, 0.9) if average else None,
        scaled=False,
        **options,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_safe_to_capture(dtype: torch.dtype, accumulate: int) -> None:
    """All of a real step, our operators' own Python included, with tensors that have no values; the second of two, as the first
    one makes what stays."""
    pytest.importorskip("triton")
    from crate_kernels.products import launchers, preparation
    from crate_kernels.shared_attention import triton as attention

    launched: list[str] = []
    with torch.device("meta"):
        model = create_model("crate_mae_tiny", **MODEL).train().to(dtype)
    step = step_of(model, dtype, accumulate=accumulate)
    for group in step.optimizer.param_groups:
        group["lr"], group["capturable"] = torch.zeros((), device="meta"), True
        for one in group["params"]:  # on this device the fused optimizer makes no means of its own
            means = {name: torch.zeros_like(one) for name in ("exp_avg", "exp_avg_sq")}
            step.optimizer.state[one] = {"step": torch.zeros((), device="meta"), **means}
    part = 64  # more tokens than features, as always in a training step
    pixels, noise = torch.empty(part, 3, 32, 32, dtype=torch.uint8, device="meta"), torch.empty(part, 4, device="meta")
    first, second = CaptureSafe(), CaptureSafe()
    first.checks = False
    with pytest.MonkeyPatch.context() as patch:
        for owner in ("crate_kernels.dispatch", "crate_mae.layers", "crate_mae.model"):
            patch.setattr(f"{owner}.choose", lambda *_: "triton")
        for module in (launchers, preparation, attention):
            patch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
        preparation._tables.clear()
        for mode in (first, second):
            launched.clear()
            with mode:
                values = step._work(iter([(pixels, noise)] * accumulate), 0, by_part=True)
    assert len(set(launched)) == 9
    assert len(values) == 2 + len(step._parts) and values.device.type == "meta"


class Repeated:
    """Stands for a CUDA graph: a replay does the work again, on the same tensors."""

    def __init__(self) -> None:
        self.captures = self.replays = self.forgotten = 0

    def forget(self) -> None:
        self.forgotten += 1
        self._work = self._result = None

    def aside(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        self.captures += 1
        self._work, self._result = work, torch.empty(0)
        return self._result

    def replay(self) -> None:
        self.replays += 1
        found = self._work()
        self._result.resize_(found.shape).copy_(found)


class Unable(Repeated):
    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        work_before = self.captures
        self.captures += 1
        raise RuntimeError(f"operation not permitted\nwhen stream is capturing ({work_before})")


Taken = tuple[list[list[float]], dict[str, Tensor], list[dict[str, float]]]


def batches(steps: int, accumulate: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps * accumulate):
        part = IMAGES // accumulate
        pixels = torch.randint(0, 256, (part, 3, 32, 32), dtype=torch.uint8, generator=generator)
        yield pixels, torch.rand(part, 4, generator=generator)


def train(
    capture: Any,
    *,
    steps: int = 8,
    accumulate: int = 1,
    by_part: int = -1,
    rates: list[float] | None = None,
    said: list[str] | None = None,
    after: dict[int, Callable[[Step], None]] | None = None,
) -> Taken:
    """Losses and norms, weights, moving averages and gradient norms of parts, after some steps."""
    torch.manual_seed(0)
    model = create_model("crate_mae_tiny", **MODEL).train()
    step = step_of(model, torch.float32, accumulate=accumulate, average=True, by_part=by_part >= 0)
    if capture is not None:
        step.graph = StepGraph(model, step.optimizer, capture, accumulate, (said if said is not None else []).append)
    meter, given, norms = StepMeter(), batches(steps, accumulate), []
    for index in range(steps):
        if after and index in after:
            after[index](step)
        rate = 2.0 ** -(8 + index % 3) if rates is None else rates[index]  # exact in float32, as devices keep it
        step(given, rate, index, meter, by_part=index == by_part)
        norms.append(step.grad_norms)
    tensors = dict(model.named_parameters()) | {f"{name} average": one for name, one in step.average.tensors.items()}
    return meter.check(), {name: one.detach().clone() for name, one in tensors.items()}, norms


def assert_same(found: Taken, expected: Taken) -> None:
    assert found[0] == expected[0] and found[2] == expected[2]
    assert all(torch.equal(one, expected[1][name]) for name, one in found[1].items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_replays_train_as_steps_do(accumulate: int) -> None:
    """To the bit: batches, learning rates that change, clipping, moving average, and norms by part in a step between."""
    capture, said = Repeated(), []
    found = train(capture, accumulate=accumulate, by_part=5, said=said)
    assert_same(found, train(None, accumulate=accumulate, by_part=5))
    assert capture.captures == 1 and capture.replays == 8 - WARM_UP
    assert said == ["graph: a step is one CUDA graph from here on"]
    assert found[2][5] and all(value > 0 for value in found[2][5].values())


def test_a_resumed_run_ends_with_the_same_bits() -> None:
    """It captures later than the run that was not interrupted. Learning rates are as a schedule has them, of no float32."""

    def started() -> tuple[torch.nn.Module, Step]:
        torch.manual_seed(0)
        model = create_model("crate_mae_tiny", **MODEL).train()
        step = step_of(model, torch.float32)
        step.graph = StepGraph(model, step.optimizer, Repeated(), 1, print)
        return model, step

    def go_on(step: Step, begin: int, end: int) -> None:
        given = list(batches(12, 1))
        for index in range(begin, end):
            step(iter(given[index : index + 1]), 1e-3 * (1 + index / 7), index, StepMeter())

    whole, step = started()
    go_on(step, 0, 12)
    first, step = started()
    go_on(step, 0, 6)
    second, resumed = started()
    second.load_state_dict(first.state_dict())
    resumed.optimizer.load_state_dict(step.optimizer.state_dict())
    go_on(resumed, 6, 12)
    assert resumed.graph.captured
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), second.parameters(), strict=True))


def test_settings_that_change_all_the_time_end_the_captures() -> None:
    capture, said = Repeated(), []

    def change(step: Step) -> None:
        step.optimizer.param_groups[0]["weight_decay"] *= 0.9

    changes = dict.fromkeys(range(0, 30, 5), change)
    found = train(capture, steps=30, said=said, after=changes)
    assert_same(found, train(None, steps=30, after=changes))
    assert capture.captures == MOST_CAPTURES and [line.split(",")[0] for line in said[1:]] == ["graph: off"]


def test_a_failed_capture_is_said_and_steps_go_on() -> None:
    capture, said = Unable(), []
    assert_same(train(capture, said=said), train(None))
    assert said == [
        "graph: off, as a step cannot be captured (RuntimeError: operation not permitted when stream is capturing (0))"
    ]
    assert capture.captures == 1 and capture.replays == 0


def test_a_step_that_is_not_finite_changes_nothing_and_is_named() -> None:
    capture, rates = Repeated(), [2.0**-8] * 4 + [float("inf")] + [2.0**-8] * 3
    with pytest.raises(NonFiniteLoss, match="step 6"):  # the first on weights that are not finite
        train(capture, rates=rates)
    assert capture.replays == 8 - WARM_UP


def test_a_batch_of_another_size_is_not_replayed() -> None:
    model = create_model("crate_mae_tiny", **MODEL).train()
    step = step_of(model, torch.float32)
    capture = Repeated()
    step.graph, meter = StepGraph(model, step.optimizer, capture, 1, print), StepMeter()
    for index, (pixels, noise) in enumerate(batches(7, 1)):
        size = 3 if index == 5 else IMAGES
        step(iter([(pixels[:size], noise[:size])]), 2.0**-8, index, meter)
    assert capture.captures == 1 and capture.replays == 7 - WARM_UP - 1
    assert len(meter.check()) == 7


@pytest.mark.parametrize("changed", ["weight", "trained", "mean", "setting", "nothing"])
def test_what_a_graph_has_once_and_for_all_is_captured_anew(changed: str) -> None:
    capture = Repeated()

    def change(step: Step) -> None:
        weight = step.parallel.model.decoder_pred.weight
        if changed == "weight":
            weight.data = weight.detach() * 2
        elif changed == "trained":
            weight.requires_grad_(False)
        elif changed == "mean":
            means = step.optimizer.state[weight]
            means["exp_avg"] = means["exp_avg"] * 2
        elif changed == "setting":
            step.optimizer.param_groups[0]["weight_decay"] = 0.5

    found = train(capture, steps=12, after={6: change})
    assert_same(found, train(None, steps=12, after={6: change}))
    again = changed != "nothing"
    assert (capture.captures, capture.forgotten) == (1 + again, again)
    assert capture.replays == 12 - WARM_UP * (1 + again)


def test_weights_count_as_written_after_a_replay() -> None:
    """What was prepared of them before is refused."""
    model = create_model("crate_mae_tiny", **MODEL).train()
    step = step_of(model, torch.float32)

    class Nothing(Repeated):
        def replay(self) -> None:
            self._result.resize_(2).zero_()

    step.graph, meter = StepGraph(model, step.optimizer, Nothing(), 1, print), StepMeter()
    weight = model.decoder_pred.weight
    for index, batch in enumerate(batches(5, 1)):
        before = weight._version
        step(iter([batch]), 2.0**-8, index, meter)
        assert weight._version > before or index < WARM_UP  # PyTorch counts no writes of fused optimizers


def test_obstacles() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    alone = dict(compiled=False, shared=False)
    assert obstacle_to_graph(cpu, "float32", **alone) == "a CPU has no CUDA graphs"
    assert obstacle_to_graph(cuda, "bfloat16", **alone) is None
    assert obstacle_to_graph(cuda, "float32", **alone) is None
    assert "loss scale" in obstacle_to_graph(cuda, "float16", **alone)
    assert "run.compile" in obstacle_to_graph(cuda, "bfloat16", compiled=True, shared=False)
    assert "torchrun" in obstacle_to_graph(cuda, "bfloat16", compiled=False, shared=True)


def test_a_run_on_a_cpu_says_that_it_is_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And why; asked for, it is refused before anything is written."""
    config = tiny_config(tmp_path / "out", write_photographs(tmp_path / "photographs"))

    def with_graph(graph: str) -> PretrainConfig:
        return dataclasses.replace(config, run=dataclasses.replace(config.run, graph=graph))

    with pytest.raises(ValueError, match=r'run.graph: expected "auto" or "off", as a CPU has no CUDA graphs, got "on"'):
        pretrain(with_graph("on"))
    assert not (tmp_path / "out" / "config.json").exists()
    pretrain(with_graph("auto"))
    assert "graph: off (a CPU has no CUDA graphs)" in capsys.readouterr().out.splitlines()
    pretrain(with_graph("off"), overwrite=True)
    assert "graph:" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_a_device(accumulate: int) -> None:
    """A graph trains as steps do, but for the last bits: the optimizer reads a learning rate in float32."""

    @contextmanager
    def on_cuda() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            made, drawn = create_model, batches
            patch.setitem(globals(), "create_model", lambda *a, **k: made(*a, **k).cuda())
            moved = lambda *a: ((x.cuda(), n.cuda()) for x, n in drawn(*a))  # noqa: E731
            patch.setitem(globals(), "batches", moved)
            yield

    with on_cuda(), crate_kernels.use("auto"):
        expected, said = train(None, accumulate=accumulate, steps=12), []
        found = train(CudaCapture(torch.device("cuda")), accumulate=accumulate, steps=12, said=said)
    assert said == ["graph: a step is one CUDA graph from here on"]
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-4, atol=1e-5)
    for name, one in found[1].items():
        torch.testing.assert_close(one, expected[1][name], rtol=1e-3, atol=1e-4)
