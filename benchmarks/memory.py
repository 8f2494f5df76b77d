"""How much memory a training step takes, and the largest batch that fits.

    python -m benchmarks.memory --model crate_mae_base --batch 256 --dtype bfloat16 --largest
    python -m benchmarks.memory --layers

On a GPU the peak of what is allocated during a step, model and gradients included. On a CPU nobody counts that: there it is the
bytes of all tensors saved for the backward, parameters aside, counted without computing anything; ``--layers`` counts them for
one encoder and one decoder layer as a GPU would save them, on any machine. A ratio is how many times less than the baseline.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import crate_kernels
import crate_mae
from benchmarks import harness
from benchmarks.command_line import device_named, positive
from benchmarks.models import add_model_arguments, bytes_of, check_model
from benchmarks.peers import STEPS, Absent, Step
from benchmarks.records import Record, in_one_line
from benchmarks.training_step import BASELINE, Batch, Stepper
from crate_kernels import dispatch
from crate_kernels.dtypes import is_autocast
from crate_kernels.layer_norm import layer_norm
from crate_mae.config import ModelConfig, grid_of

# Whole layers, by their name in the rows, and where CrateMAE has them.
LAYERS = {"encoder_layer": "blocks", "decoder_layer": "decoder_blocks"}
SAVED_BY = {layer: f"saved by one {layer.replace('_', ' ')}" for layer in LAYERS}

# No image batch is larger; where even this fits, it is what is reported.
LARGEST = 2**16


class Saved:
    """Tensors saved for the backward, by storage, each counted once."""

    def __init__(self, apart: Collection[Tensor]) -> None:
        self._apart = {tensor.untyped_storage()._cdata for tensor in apart}
        self._bytes: dict[int, int] = {}

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._apart:
            self._bytes[storage._cdata] = storage.nbytes()
        return tensor

    def bytes(self, without: Tensor) -> int:
        """All of them, without the storage of one tensor."""
        return sum(count for data, count in self._bytes.items() if data != without.untyped_storage()._cdata)


@contextmanager
def counting_saved(apart: Collection[Tensor]) -> Iterator[Saved]:
    """Count what is saved for a backward inside the block, apart from these tensors (parameters, say)."""
    saved = Saved(apart)
    with torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor):
        yield saved


def clear(model: nn.Module) -> None:
    """The allocator as it was before the first step."""
    model.zero_grad(set_to_none=True)
    harness.clean(next(model.parameters()).device)


def peak(name: str, model: nn.Module, batch: Batch) -> int:
    """Bytes at the peak of the second step, the first having compiled and chosen; with the model, its gradients and the batch."""
    stepper = Stepper(STEPS[name], model, batch)
    stepper.provider()()
    added = harness.added_bytes(stepper.provider(), batch.images.device)
    return added + bytes_of(model) + batch.images.nbytes + batch.target.nbytes


def saved_for_backward(name: str, model_name: str, overrides: dict[str, Any], size: int, dtype: torch.dtype) -> int:
    """Bytes of what the forward of a step saves, counted on fake tensors.

    Raises:
        Absent: the step is compiled, and compiled code does not run on fake tensors.
    """
    if STEPS[name].mode is not None:
        raise Absent("what compiled code saves is measured on a CUDA device only")
    with FakeTensorMode():
        model = crate_mae.create_model(model_name, **overrides)
        batch = Batch.random(model.config, size, torch.device("cpu"), dtype)
        stepper = Stepper(STEPS[name], model, batch)
        with counting_saved([*model.parameters(), *model.buffers()]) as saved:
            loss = stepper.forward()
        return saved.bytes(without=loss)


@contextmanager
def official_as_on_cuda() -> Iterator[None]:
    """CUDA's autocast takes the official softmax and LayerNorm in float32, which a CPU's leaves in 16 bits."""

    def attention(w: Tensor, scale: float, *_: object) -> Tensor:
        probabilities = (torch.matmul(w, w.transpose(-1, -2)) * scale).float().softmax(dim=-1)
        return torch.matmul(probabilities, w)

    def normalise(*arguments: object, **_: object) -> Tensor:
        return layer_norm(*arguments)

    with (
        patch.object(dispatch.load("mssa", "reference"), "shared_qkv_attention", attention),
        patch.object(dispatch.load("mssa", "api"), "layer_norm", normalise),
        patch.object(dispatch.load("norm_linear", "api"), "layer_norm", normalise),
    ):
        yield


def layer_norm_as_on_cuda(x: Tensor, *arguments: Any, of_torch: Callable[..., Tensor] = F.layer_norm) -> Tensor:
    """Of modules of their own, which CUDA's autocast takes in float32, too."""
    return of_torch(x.float() if is_autocast(x) else x, *arguments)


@contextmanager
def as_on_a_gpu(step: Step) -> Iterator[None]:
    """Fake tensors, and operators that do with those of a CPU what they would do with a GPU's.

    Raises:
        Absent: the step is compiled or composed.
    """
    if step.mode is not None:
        raise Absent("what compiled code saves is measured on a CUDA device only")
    if step.implementation == "composed":
        raise Absent("it keeps probabilities on a CPU, where this is counted, and none on a GPU")
    with FakeTensorMode(), crate_kernels.use(step.implementation), ExitStack() as stack:
        stack.enter_context(patch.object(F, "layer_norm", layer_norm_as_on_cuda))
        if step.implementation == "reference":
            stack.enter_context(official_as_on_cuda())
        if step.implementation == "triton":  # no kernel runs: this lets fake tensors in that are on no GPU
            stack.enter_context(patch.object(dispatch, "_INTERPRETING", True))
        yield


def saved_by_layer(
    layer: str, name: str, model_name: str, overrides: dict[str, Any], size: int, dtype: torch.dtype
) -> int:
    """Bytes of what one layer saves on a GPU, counted on fake tensors; apart: parameters, and its result, the next one's input.

    Raises:
        Absent: the step is compiled or composed.
    """
    step = STEPS[name]
    with as_on_a_gpu(step):
        model = crate_mae.create_model(model_name, **overrides | {"depth": 1, "decoder_depth": 1})
        stream = dtype if step.stream == "16bit" else torch.float32
        x = torch.randn(size, tokens_of(model.config), model.config.embed_dim, dtype=stream, requires_grad=True)
        with counting_saved([*model.parameters()]) as saved, harness.autocast(x.device, dtype):
            y = getattr(model, LAYERS[layer])[0](x, recompute=step.recompute)
        return saved.bytes(without=y)


def tokens_of(config: ModelConfig) -> int:
    rows, columns = grid_of(config.image_shape, config.patch_size)
    return rows * columns + 1


def fits(name: str, model: nn.Module, size: int, dtype: torch.dtype) -> int | None:
    """Bytes at the peak with a batch of this size; None where memory runs out. The allocator is clean before."""
    clear(model)
    device = next(model.parameters()).device
    try:
        return peak(name, model, Batch.random(model.config, size, device, dtype))
    except RuntimeError as problem:
        # Libraries, drivers and compilers say it in words of their own.
        if not any(words in str(problem) for words in ("out of memory", "ALLOC_FAILED")):
            raise
    return None


def largest(measure: Callable[[int], int | None], first: int, most: int = LARGEST) -> tuple[int, int | None]:
    """The largest size up to ``most`` for which ``measure`` does not give None, found to one in 64, and what it gives there.

    By doubling from ``first``, or halving where that is too large, then bisection. (0, None) if not even 1 fits.
    """
    low, at_low, high = 0, None, most + 1  # low fits, high does not
    size = first
    while low < size < high and high - low > max(1, low // 64):
        found = measure(size)
        if found is None:
            high = size
        else:
            low, at_low = size, found
        if low == 0:
            size = high // 2
        elif high > most and 2 * low < high:
            size = 2 * low
        else:
            size = (low + high) // 2
    return low, at_low


def measure(
    record: Record, arguments: argparse.Namespace, device: torch.device, dtype_name: str, size: int, mode: str
) -> None:
    """One row a provider, the baseline's first."""
    overrides, dtype = dict(arguments.set), harness.torch_dtype(dtype_name)
    of_baseline: float | None = None
    layer = next((layer for layer, saved in SAVED_BY.items() if saved == mode), None)
    for name in arguments.providers:
        config = crate_mae.create_model(arguments.model, **overrides).config
        row = {"operator": "memory", "model": arguments.model, "overrides": overrides, "dtype": dtype_name}
        row |= {"mode": mode, "provider": name, "baseline": BASELINE}
        found, count = None, size
        try:
            if layer is not None:
                found = saved_by_layer(layer, name, arguments.model, overrides, size, dtype)
            elif mode == "saved for backward":
                found = saved_for_backward(name, arguments.model, overrides, size, dtype)
            else:
                model = crate_mae.create_model(arguments.model, **overrides).to(device).train()
                if mode == "largest batch":
                    count, found = largest(lambda size, model=model, name=name: fits(name, model, size, dtype), size)
                else:
                    found = fits(name, model, size, dtype)
            reason = "out of memory"
        except Exception as problem:  # a provider that cannot run here
            reason = in_one_line(problem)
        row["shape"] = (
            {"batch": count, "tokens": tokens_of(config), "width": config.embed_dim}
            if layer is not None
            else [count, config.in_chans, *config.image_shape]
        )
        if found is None:
            record.add(**row, unavailable=reason)
            continue
        value = count if mode == "largest batch" else 1 / found
        of_baseline = value if name == BASELINE else of_baseline
        ratio = None if of_baseline is None else harness.Spread.single(value / of_baseline)
        record.add(**row, peak_bytes=found, ratio=ratio)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = _parser().parse_args(argv)
    device = device_named(arguments.device)
    check_model(arguments)
    on_cuda = device.type == "cuda"
    if arguments.largest and arguments.layers:
        raise SystemExit("--largest: not with --layers, which runs no step")
    if arguments.largest and not on_cuda:
        raise SystemExit("--largest: searches the memory of a CUDA device; a CPU has none of its own")
    ours = "triton" if on_cuda or arguments.layers else "composed"
    plain = [BASELINE] if arguments.layers else [BASELINE, "composed"]
    variants = (ours, f"{ours} 16bit", f"{ours} recompute", f"{ours} float32 recompute")
    arguments.providers = list(dict.fromkeys(arguments.providers or (*plain, *variants)))
    record = Record(device, arguments.seed, arguments.json)
    torch.manual_seed(arguments.seed)
    for dtype in arguments.dtype:
        for size in arguments.batch:
            for mode in SAVED_BY.values() if arguments.layers else ["peak" if on_cuda else "saved for backward"]:
                measure(record, arguments, device, dtype, size, mode)
        if arguments.largest:
            measure(record, arguments, device, dtype, max(arguments.batch), "largest batch")
    record.show()
    record.refuse_nothing()
    return record.rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--batch", nargs="+", type=positive, default=[256], help="images a step")
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=["bfloat16"])
    parser.add_argument(
        "--layers", action="store_true", help="what single layers save for the backward, and nothing else"
    )
    parser.add_argument("--largest", action="store_true", help="search for the largest batch that fits, too")
    names = [name for name, step in STEPS.items() if not step.graph and "vit" not in name]
    parser.add_argument("--providers", nargs="+", choices=names, metavar="NAME", help=", ".join(map(repr, names)))
    return parser


if __name__ == "__main__":
    main()
