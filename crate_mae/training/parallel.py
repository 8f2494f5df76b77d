"""A model on several processes: replicated (DistributedDataParallel) or sharded (FSDP2), and gathered again."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from crate_mae.classifiers import Classifier
from crate_mae.model import CrateMAE
from crate_mae.training.ranks import Ranks

Model_co = TypeVar("Model_co", bound="CrateMAE | Classifier", covariant=True)


class Alone(Generic[Model_co]):
    """A model on a single process.

    Attributes:
        model: the model, whose parameters the optimizer changes.
        forward: what a step calls: the model, compiled or wrapped.
    """

    def __init__(self, model: Model_co, ranks: Ranks, *, compiled: bool, accumulate: int) -> None:
        self.model, self.ranks = model, ranks
        # Only steps are compiled: validations and pictures are few, and would need graphs of their own.
        self.forward: Callable[..., Any] = torch.compile(model, fullgraph=True) if compiled else model

    def copy(self) -> Model_co:
        """On the first rank, a whole model of the same sizes with arbitrary weights, to load others into."""
        return copy.deepcopy(self.model)

    def changed(self) -> None:
        """To be called when weights were changed by something else than the optimizer."""

    def synced(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """The context of a micro-batch: the gradients of the ranks are summed in the last one of a step only."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def whole(self) -> Iterator[Model_co | None]:
        """The whole model on the first rank, None on the others; all ranks must call it."""
        yield self.model if self.ranks.is_first else None


class _Several(Alone[Model_co]):
    """A model on several processes.

    Attributes:
        twin: on the first rank, a whole model in the host's memory, for what is drawn and written while steps go on.
    """

    def __init__(self, model: Model_co, ranks: Ranks, *, compiled: bool, accumulate: int) -> None:
        self.twin = copy.deepcopy(model) if ranks.is_first else None
        if self.twin is not None:
            self.twin.cpu()
        super().__init__(model, ranks, compiled=compiled, accumulate=accumulate)

    def copy(self) -> Model_co:
        assert self.twin is not None
        return self.twin

    @contextlib.contextmanager
    def whole(self) -> Iterator[Model_co | None]:
        weights = whole_weights(self.model, self.ranks)
        if self.twin is None:
            yield None
            return
        self.twin.load_state_dict(weights)
        device = next(self.model.parameters()).device
        try:
            self.twin.to(device).train(self.model.training)
            yield self.twin
        finally:
            self.twin.cpu()


class Replicated(_Several[Model_co]):
    """Each rank has the whole model and its gradient."""

    def __init__(self, model: Model_co, ranks: Ranks, *, compiled: bool, accumulate: int) -> None:
        super().__init__(model, ranks, compiled=compiled, accumulate=accumulate)
        self._replica = DistributedDataParallel(
            self.forward,
            gradient_as_bucket_view=True,
            static_graph=accumulate == 1,  # not so if only the last of several micro-batches is synced
            **_CONSTANT_BUFFERS,
        )
        self.forward = self._replica

    @contextlib.contextmanager
    def synced(self, is_last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if is_last else self._replica.no_sync():
            yield


class Sharded(_Several[Model_co]):
    """Each rank has a shard of each parameter, of its gradient and of the optimizer's means."""

    def __init__(self, model: Model_co, ranks: Ranks, *, compiled: bool, accumulate: int) -> None:
        if compiled:
            raise ValueError(
                "run.compile: expected false with run.parallel fsdp2, whose layers are no one graph, got true"
            )
        super().__init__(model, ranks, compiled=False, accumulate=accumulate)
        shard(model, dist.init_device_mesh(next(model.parameters()).device.type, (ranks.count,)))

    def changed(self) -> None:
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()  # after a forward without a backward, whole weights would be kept for the next forward

    @contextlib.contextmanager
    def synced(self, is_last: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(is_last)
        yield


_CONSTANT_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False  # the name in PyTorch up to 2.12
}
"""The argument that keeps buffers, which are constants here, from being sent among the ranks at every step."""

MODES: dict[str, type[Alone]] = {"ddp": Replicated, "fsdp2": Sharded}
"""How several processes share a model, by the values of `run.parallel`."""


def shard(model: CrateMAE | Classifier, mesh: dist.DeviceMesh) -> None:
    """Shard a model's parameters among the processes of a mesh, in place.

    A layer's parameters are gathered while it computes; those outside the layers from the forward to the end of the backward."""
    for stack in (model.encoder_layers, getattr(model, "decoder_blocks", ())):
        for block in stack:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded; all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: nn.Module, ranks: Ranks) -> dict[str, torch.Tensor]:
    """A copy of the whole state dict in the host's memory of the first rank; empty on the others. All ranks must call it."""
    weights = {}
    for name, value in model.state_dict().items():
        value = whole(value.detach())
        if ranks.is_first:
            weights[name] = value.to("cpu", copy=True)
    return weights


@torch.no_grad()
def fill(tensors: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
    """Copy whole values into tensors that may be sharded."""
    for tensor, value in zip(tensors, values, strict=True):
        if isinstance(tensor, DTensor):
            # All ranks have the same value, which is what "replicated" means.
            ours = DTensor.from_local(value.to(tensor.device), tensor.device_mesh, run_check=False)
            value = ours.redistribute(tensor.device_mesh, tensor.placements).to_local()
        local(tensor).copy_(value)
