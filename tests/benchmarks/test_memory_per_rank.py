"""What each rank is said to need is what two real ranks have, to the byte."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks import memory_per_rank
from benchmarks.peers import STEPS
from crate_mae.config import ModelConfig
from crate_mae.model import CrateMAE
from crate_mae.training.config import OptimizerConfig
from crate_mae.training.fsdp import shard
from crate_mae.training.optimizer import build_optimizer
from crate_mae.training.parallel import local

RANKS, IMAGES = 2, 3

# Two ranks do not divide the tokens' first dimension, 1, nor that of decoder_pred, 75.
CONFIG = ModelConfig(
    img_size=20, patch_size=5, embed_dim=24, depth=2, num_heads=2, decoder_depth=2, decoder_num_heads=2, lambd=0.1
)


class Whole(TorchDispatchMode):
    """The most bytes that are alive at once of FSDP2's whole parameters, of their gradients, and of what is on its way.

    They are the tensors that its own operators are called with, shards aside, and gradients of parameters that are whole.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.most = 0
        # At each operation ``parameters()`` would take most of the time.
        modules = [module._parameters for module in model.modules()]
        self._places = [(own, name) for own in modules for name, parameter in own.items() if parameter is not None]
        self._shards = {local(parameter).untyped_storage()._cdata for parameter in model.parameters()}
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        parameters = [place[name] for place, name in self._places]
        found = [each.grad for each in parameters if not isinstance(each, DTensor) and each.grad is not None]
        if function.namespace == "fsdp":
            found += [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        for storage in (tensor.untyped_storage() for tensor in found):
            if storage._cdata not in self._shards:
                self._seen[storage] = True
        self.most = max(self.most, sum(storage.nbytes() for storage in self._seen))
        return result


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages that tensors are parts of, each counted once."""
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


def held(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Bytes after a step, by the parts of ``memory_per_rank.states``."""
    means = [local(each) for state in optimizer.state.values() for each in state.values()]
    parameters = list(model.parameters())
    return {
        "parameters": stored(map(local, parameters)),
        "gradients": stored(local(parameter.grad) for parameter in parameters),
        "means": stored(means),
        "constants": stored(model.buffers()),
    }


def saved_by(model: nn.Module, call: nn.Module, images: Tensor) -> tuple[Tensor, int]:
    """The loss, and the bytes kept for its backward once the forward is over."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = call(images).loss
    apart = [loss, *map(local, model.parameters()), *model.buffers()]
    return loss, stored([*kept, *apart]) - stored(apart)


@contextmanager
def one_of_two(rank: int, folder: Path) -> Iterator[None]:
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS, timeout=timedelta(minutes=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


def steps() -> dict[str, Any]:
    """What this rank has: sharded, sharded with two micro-batches a step, and replicated."""
    images, found = torch.randn(IMAGES, 3, 20, 20), {}
    model = CrateMAE(CONFIG)
    shard(model, dist.init_device_mesh("cpu", (RANKS,)))
    optimizer = build_optimizer(model, OptimizerConfig(), IMAGES)
    for name, micro_batches in (("first", 1), ("sharded", 1), ("accumulated", 2)):
        optimizer.zero_grad()
        with Whole(model) as whole:
            for micro_batch in range(micro_batches):
                model.set_requires_gradient_sync(micro_batch == micro_batches - 1)
                loss, saved = saved_by(model, model, images)
                loss.backward()
        optimizer.step()
        found[name] = held(model, optimizer) | {"saved": saved, "whole": whole.most}
    model = CrateMAE(CONFIG)
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = build_optimizer(model, OptimizerConfig(), IMAGES)
    for _ in range(2):  # DDP makes its buckets again after the first
        loss, saved = saved_by(model, replica, images)
        loss.backward()
        optimizer.step()
    found["replicated"] = held(model, optimizer) | {"saved": saved}
    return found


def second_rank(_: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with one_of_two(1, folder):
        (folder / "second.json").write_text(json.dumps(steps()))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each rank. The first one is this process, which need not import everything again."""
    folder = tmp_path_factory.mktemp("ranks")
    other = torch.multiprocessing.spawn(second_rank, (folder,), join=False)
    with one_of_two(0, folder):
        first = steps()
    other.join()
    return [first, json.loads((folder / "second.json").read_text())]


def test_two_ranks_have_what_was_predicted(found: list[dict[str, Any]]) -> None:
    with torch.device("meta"):
        model = CrateMAE(CONFIG)
    with FakeTensorMode():
        counted = memory_per_rank.count_step(CrateMAE(CONFIG), STEPS["composed"], IMAGES, torch.float32)
    for rank in range(RANKS):  # the second one has no part of what has one row
        for name in ("first", "sharded", "accumulated"):
            whole = memory_per_rank.whole(model, counted.complete, RANKS, accumulated=name == "accumulated")
            expected = memory_per_rank.states(model, RANKS, rank) | {"saved": counted.saved, "whole": whole}
            assert found[rank][name] == expected, (rank, name)
        assert found[rank]["replicated"] == memory_per_rank.states(model) | {"saved": counted.saved}


def test_two_ranks_share_what_one_process_has(found: list[dict[str, Any]]) -> None:
    alone = found[0]["replicated"]
    padding = 4 * (
        24 + 24 + (24 + 1)
    )  # the second rank's cls_token and mask_token; a row of decoder_pred, and its bias
    for part in ("parameters", "gradients"):
        assert sum(rank["sharded"][part] for rank in found) == alone[part] + padding
    count = len(list(CrateMAE(CONFIG).parameters()))  # the optimizer knows of each how many steps it has taken, on both
    assert sum(rank["sharded"]["means"] for rank in found) == alone["means"] + 4 * count


def test_a_table_of_what_ranks_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    model = ["--device", "cpu", "--model", "crate_mae_tiny", "--set", "depth=2", "decoder_depth=1"]
    memory_per_rank.main([*model, "--batch", "4", "--ranks", "1", "8", "64", "--accumulate", "--json", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    parts = {(row["provider"], row["mode"]): row["parts"] for row in rows}
    assert all(row["peak_bytes"] == sum(row["parts"].values()) and row["shape"] == [4, 3, 224, 224] for row in rows)
    for provider in ("triton", "triton recompute"):
        alone, *others = (parts[provider, mode] for mode in ("one process", "DDP, 8 ranks", "DDP, 64 ranks"))
        assert others == [alone, alone] and alone["means"] > 2 * alone["parameters"]
        eight, more, accumulated = (
            parts[provider, f"FSDP2, {mode}"] for mode in ("8 ranks", "64 ranks", "8 ranks, accumulated")
        )
        assert 8 * eight["parameters"] < 64 * more["parameters"] < 1.05 * alone["parameters"]
        assert eight["saved"] == alone["saved"] and accumulated["whole"] > max(alone["gradients"], eight["whole"])
    assert parts["triton recompute", "one process"]["saved"] < parts["triton", "one process"]["saved"]
    assert "FSDP2, 64 ranks, accumulated" in capsys.readouterr().out
