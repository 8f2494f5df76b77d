"""A model on several processes: replicated (DistributedDataParallel) or sharded (FSDP2), and gathered again."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeGuard, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from crate_mae.classifiers import Classifier
from crate_mae.model import CrateMAE
from crate_mae.training.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

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


class Several(Alone[Model_co]):
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


class Replicated(Several[Model_co]):
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


_CONSTANT_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False  # the name in PyTorch up to 2.12
}
"""The argument that keeps buffers, which are constants here, from being sent among the ranks at every step."""


def mode_of(parallel: str) -> type[Alone]:
    """How several processes share a model, by the value of `run.parallel`."""
    if parallel == "fsdp2":
        from crate_mae.training.fsdp import Sharded

        return Sharded
    return Replicated


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether it is one of FSDP2's. There are none where nobody has imported their module, and that takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded; all ranks must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


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
        if is_sharded(tensor):
            # All ranks have the same value, which is what "replicated" means.
            ours = type(tensor).from_local(value.to(tensor.device), tensor.device_mesh, run_check=False)
            value = ours.redistribute(tensor.device_mesh, tensor.placements).to_local()
        local(tensor).copy_(value)
