"""A model whose parameters several processes share (FSDP2). Apart from `parallel`, as importing it takes half a second."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard

from crate_mae.classifiers import Classifier
from crate_mae.model import CrateMAE
from crate_mae.training.parallel import Model_co, Several
from crate_mae.training.ranks import Ranks


class Sharded(Several[Model_co]):
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


def shard(model: CrateMAE | Classifier, mesh: dist.DeviceMesh) -> None:
    """Shard a model's parameters among the processes of a mesh, in place.

    A layer's parameters are gathered while it computes; those outside the layers from the forward to the end of the backward."""
    for stack in (model.encoder_layers, getattr(model, "decoder_blocks", ())):
        for block in stack:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
