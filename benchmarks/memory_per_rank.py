"""How much memory each rank of a run needs: by itself, replicated (DistributedDataParallel), or in shards (FSDP2).

    python -m benchmarks.memory_per_rank --batch 64 --ranks 8 64
    python -m benchmarks.memory_per_rank --model crate_mae_base --providers "triton 16bit" "triton recompute" --accumulate

Counted from the tensors of the model, without computing anything and on any machine, for a GPU: float32 parameters, products in
16 bits under autocast, so many images on each rank. The parts:

    parameters, gradients, means    what AdamW changes, by what, and what it keeps; of a rank's shard under FSDP2, of all else
    whole       FSDP2 alone: whole parameters and gradients of the layers at hand, at the most that there is of them at once
    saved       for the backward, as ``benchmarks.memory`` counts it
    constants, batch    buffers of the model; the images and the noise that masks them

The sum is an upper bound: when the last gradient is complete, nothing saved is left. Not counted: temporary tensors of operators
(gradients of tokens, kernels' scratch, a library's workspace), buffers of NCCL, a running average of the weights, CUDA's context,
and memory that PyTorch's allocator holds unused. Under DDP gradients are views of the buffers that are sent
(``gradient_as_bucket_view``), so that a rank takes what one process does.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.command_line import add_common_arguments, add_model_arguments, check_model, device_named, positive
from benchmarks.memory import as_on_a_gpu, counting_saved
from benchmarks.peers import STEPS, Official, Step
from benchmarks.records import Record, describe_model, table
from benchmarks.training_step import Batch
from crate_mae.model import CrateMAE
from crate_mae.registry import MODELS

MODELS_BY_DEFAULT = ["crate_mae_base", "crate_mae_large"]


@dataclass(frozen=True)
class StepCount:
    """What was counted of one step: bytes saved for the backward, bytes of its batch, and the names of parameters in the order
    in which their gradients are complete."""

    saved: int
    batch: int
    complete: list[str]


def count_step(model: CrateMAE, step: Step, size: int, dtype: torch.dtype) -> StepCount:
    """Take one step of ``size`` images on fake tensors, which the model must consist of."""
    model.stream, model.recompute = step.stream, step.recompute
    batch = Batch.random(model.config, size, torch.device("cpu"), dtype)
    complete: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: complete.append(name))
    with counting_saved([*model.parameters(), *model.buffers()]) as saved, harness.autocast(batch.images.device, dtype):
        loss = step.model(model)(batch.images, batch.target)
    kept = saved.bytes(without=loss)
    loss.backward()
    return StepCount(kept, batch.images.nbytes + batch.target.nbytes, complete)


def shard_of(parameter: Tensor, ranks: int, rank: int) -> Tensor:
    """The part of a parameter that ``fully_shard`` gives a rank: a chunk of its first dimension, perhaps empty, not padded."""
    chunks = parameter.detach().chunk(ranks)
    return chunks[rank] if rank < len(chunks) else parameter.detach()[:0]


def padded_bytes(parameters: Iterable[Tensor], ranks: int) -> int:
    """Bytes of a rank's shards as they are stored and sent: all ranks' are padded to the size of the first rank's."""
    return sum(_nbytes(shard_of(parameter, ranks, 0)) for parameter in parameters)


def means_bytes(shards: Sequence[Tensor]) -> int:
    """Bytes that AdamW keeps for parameters like these: two means of each, and the number of steps."""
    mine = [nn.Parameter(torch.empty_like(shard, device="meta")) for shard in shards]
    for parameter in mine:
        parameter.grad = torch.empty_like(parameter)
    optimizer = torch.optim.AdamW(mine)
    optimizer.step()
    return sum(_nbytes(kept) for state in optimizer.state.values() for kept in state.values())


def _nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; its storage may be larger."""
    return tensor.numel() * tensor.element_size()


def states(model: CrateMAE, ranks: int = 1, rank: int = 0) -> dict[str, int]:
    """Bytes that a rank holds from step to step, gradients included, of a model divided among ``ranks``."""
    parameters = list(model.parameters())
    stored = padded_bytes(parameters, ranks)
    means = means_bytes([shard_of(parameter, ranks, rank) for parameter in parameters])
    constants = sum(map(_nbytes, model.buffers()))
    return {"parameters": stored, "gradients": stored, "means": means, "constants": constants}


def whole(model: CrateMAE, complete: Sequence[str], ranks: int, *, accumulated: bool = False) -> int:
    """The most bytes of whole parameters and gradients, beside shards, that FSDP2 holds at once on each of two or more ranks.

    FSDP2 gathers each layer by itself. Parameters that belong to no layer are gathered with the model and stay until its
    backward is over. Gathered parameters include the padding of all shards.

    In the forward, a layer is there twice while it is copied from the receive buffer to its parameters, and the buffer of the
    layer before is still there. In the backward, the next layer is received ahead. Beside it are the parameters and gradients of
    the current layer; the gradients of the layer before while they are sent, as large as its parameters; and the complete ones
    of the gradients that belong to no layer.

    Args:
        complete: the names of all parameters, in the order in which their gradients become complete.
        accumulated: all gradients are there from earlier micro-batches: each layer's are sent in the last.
    """
    layers = [list(block.parameters()) for block in (*model.encoder_layers, *model.decoder_blocks)]
    in_layers = set(chain.from_iterable(layers))
    rest = [parameter for parameter in model.parameters() if parameter not in in_layers]
    gathered = [ranks * padded_bytes(layer, ranks) for layer in layers]
    gradients = [sum(map(_nbytes, layer)) for layer in layers]
    named = dict(model.named_parameters())
    when = {named[name]: moment for moment, name in enumerate(complete)}
    rest_gathered, rest_gradients = ranks * padded_bytes(rest, ranks), sum(map(_nbytes, rest))

    earlier = rest_gradients + sum(gradients) if accumulated else 0
    peaks = [  # of the forward
        earlier + before + 2 * layer for before, layer in zip([rest_gathered, *gathered], gathered, strict=False)
    ]
    sent = 0
    for index in reversed(range(len(layers))):  # of the backward
        layer, following = gathered[index], gathered[index - 1] if index else 0
        if accumulated:
            there = rest_gradients + sum(gradients[: index + 1])
        else:
            last = max(when[parameter] for parameter in layers[index])
            there = gradients[index] + sum(_nbytes(parameter) for parameter in rest if when[parameter] < last)
        peaks += [layer + following + there + sent, following + there + layer]
        sent = layer
    return rest_gathered + max(*peaks, rest_gradients + sent)


class Mode(NamedTuple):
    """A way of running: in words, with how many ranks and shards, and whether a step has several micro-batches under FSDP2."""

    name: str
    ranks: int
    shards: int = 1
    accumulated: bool = False


def modes(ranks: Sequence[int], accumulate: bool) -> list[Mode]:
    """The ways of running that are compared: one process, DDP with whole models, FSDP2 with shards."""
    several = [count for count in ranks if count > 1]
    found = [Mode("one process", 1)]
    found += [Mode(f"DDP, {count} ranks", count) for count in several]
    found += [Mode(f"FSDP2, {count} ranks", count, count) for count in several]
    found += [Mode(f"FSDP2, {count} ranks, accumulated", count, count, True) for count in several if accumulate]
    return found


def measure(record: Record, model_name: str, arguments: argparse.Namespace) -> None:
    """One row a way of running, of each batch and provider."""
    overrides, dtype = dict(arguments.set), harness.torch_dtype(arguments.dtype)
    config = replace(MODELS[model_name], **overrides)
    with torch.device("meta"):
        model = CrateMAE(config)
    found = modes(arguments.ranks, arguments.accumulate)
    of_shards = {shards: states(model, shards) for shards in {each.shards for each in found}}
    for size, provider in product(arguments.batch, arguments.providers):
        with as_on_a_gpu(STEPS[provider]):
            counted = count_step(CrateMAE(config), STEPS[provider], size, dtype)
        for mode in found:
            parts = of_shards[mode.shards] | {"saved": counted.saved, "batch": counted.batch}
            if mode.shards > 1:
                parts["whole"] = whole(model, counted.complete, mode.shards, accumulated=mode.accumulated)
            record.add(
                operator="memory_per_rank",
                model=model_name,
                overrides=overrides,
                shape=[size, config.in_chans, *config.image_shape],
                dtype=arguments.dtype,
                mode=mode.name,
                provider=provider,
                ranks=mode.ranks,
                parts=parts,
                peak_bytes=sum(parts.values()),
            )


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """A line a row, in MiB."""
    parts = list(dict.fromkeys(chain.from_iterable(row["parts"] for row in rows)))
    columns = ["model", "batch", "provider", "on each of", *(f"{part}, MiB" for part in parts), "sum, MiB"]
    lines = []
    for row in rows:
        counts = [*(row["parts"].get(part, 0) for part in parts), row["peak_bytes"]]
        named = [describe_model(row), row["shape"][0], row["provider"], row["mode"]]
        lines.append([*named, *(round(count / 2**20, 1) for count in counts)])
    return table(columns, lines)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = _parser().parse_args(argv)
    device = device_named(arguments.device)
    models = [arguments.model] if arguments.model else MODELS_BY_DEFAULT
    for model in models:
        check_model(model, dict(arguments.set))
    record = Record(device, arguments.seed, arguments.json)
    for model in models:
        measure(record, model, arguments)
    print(table_of(record.rows))
    return record.rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_per_rank", description=__doc__.partition("\n")[0]
    )
    add_common_arguments(parser)
    add_model_arguments(parser)
    parser.set_defaults(model=None)  # all of MODELS_BY_DEFAULT
    parser.add_argument("--batch", nargs="+", type=positive, default=[64], help="images a step on each rank (64)")
    parser.add_argument("--dtype", choices=[name for name in harness.DTYPES if name != "tf32"], default="bfloat16")
    parser.add_argument("--ranks", nargs="+", type=positive, default=[8, 64], help="how many, beside one (8 64)")
    parser.add_argument("--accumulate", action="store_true", help="FSDP2 with several micro-batches a step, too")
    names = [name for name, step in STEPS.items() if _is_counted(step)]
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=names,
        default=["triton", "triton recompute"],
        metavar="NAME",
        help=f"{', '.join(map(repr, names))} (triton, triton recompute)",
    )
    return parser


def _is_counted(step: Step) -> bool:
    return step.model is Official and step.mode is None and not step.graph and step.implementation != "composed"


if __name__ == "__main__":
    main()
