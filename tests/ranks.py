"""Several ranks of a run, started as torchrun starts them, but from a process that has imported PyTorch already."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

from crate_mae import cli
from crate_mae.__main__ import main as command
from crate_mae.data import ImageFolder, UnreadableImage
from crate_mae.training import PretrainConfig, pretrain
from crate_mae.training.pace import OF_THE_MACHINE
from crate_mae.training.ranks import TorchrunRanks
from crate_mae.training.states import saved_states

ENDS_WITHIN = 30.0
"""Seconds from the end of one rank that fails to the end of the last; then the others are killed, and that counts as hung."""

DEADLINE = 60.0
"""Seconds after which ranks, of about two, count as hung."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.checkpoint", "pytest", "crate_mae.cli", "crate_mae.training"]
)


class Ended(NamedTuple):
    """How ranks ended: exit statuses, -9 for one that was killed; what all printed; and whether they hung, and were killed."""

    statuses: list[int]
    printed: str
    hung: bool


class ForkedRanks:
    """Processes that do the same work, each as one rank; they run when this is made.

    This process does to them what torchrun's agent does: it keeps the store in which they meet, and when one fails it sends
    SIGTERM to the others, and SIGKILL to what is left after half a minute.

    Args:
        work: done by each; with "spawn" semantics, what it is made of must be found by import.
        printed: file for what they print.
    """

    def __init__(self, count: int, work: Callable[[], object], printed: Path) -> None:
        self.printed = printed
        printed.write_bytes(b"")
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        common = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": self._store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_ERROR_FILE": os.devnull,
            "CUDA_VISIBLE_DEVICES": "",
        }
        ranks = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
        self.processes = [_processes.Process(target=_be_rank, args=(work, each, printed)) for each in ranks]
        for process in self.processes:
            process.start()

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to ranks, or to all; those that have ended do not hear it."""
        for process in [self.processes[rank] for rank in ranks] or self.processes:
            with contextlib.suppress(ProcessLookupError):
                if process.exitcode is None:
                    os.kill(process.pid, number)

    def end(self) -> Ended:
        """Returns when all have ended."""
        until, hung, told = time.monotonic() + DEADLINE, False, False
        while left := [process for process in self.processes if process.exitcode is None]:
            wait([process.sentinel for process in left], timeout=max(0.0, until - time.monotonic()))
            if not told and any(process.exitcode for process in self.processes):
                self.signal(signal.SIGTERM)
                until, told = time.monotonic() + ENDS_WITHIN, True
            elif time.monotonic() >= until:
                self.signal(signal.SIGKILL)
                until, hung = time.monotonic() + DEADLINE, True
        statuses = [process.exitcode for process in self.processes]
        return Ended(statuses, self.printed.read_text(), hung)


def _be_rank(work: Callable[[], object], environment: dict[str, Any], printed: Path) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    for descriptor in (1, 2):
        os.dup2(os.open(printed, os.O_WRONLY | os.O_APPEND), descriptor)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own, between processes, would outlive those that are killed
    work()


def attempt(config: PretrainConfig, before: Callable[[], object] | None = None, **how: Any) -> None:
    """Be `crate-mae pretrain` with these settings, after what `before` does to this process; its arguments alone are not read,
    which takes longer than the run."""
    if before:
        before()

    def run(arguments: list[str]) -> str:
        pretrain(config, **how)
        return "done"

    sys.argv, cli._run = ["crate-mae", "pretrain"], run
    sys.exit(command())


def under_torchrun(config: PretrainConfig) -> None:
    """Be torchrun, whose two ranks are forks of this process."""
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    once = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
    elastic_launch(once, attempt)(config)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows of a run, without what the clock decides."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    return [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in rows]


def unnamed_tensors(out: Path) -> list[str]:
    """Folders of tensors that no state names."""
    states = [torch.load(state.path, weights_only=True) for state in saved_states(out / "states")]
    named = {state["shards"]["folder"] for state in states if "shards" in state}
    return sorted({path.name for path in (out / "states").glob("step_*-*")} - named)


def leave_one_by_one() -> None:
    """Ranks that have stopped end one after the other, the first one last."""
    part = TorchrunRanks.part

    def slowly(self: TorchrunRanks) -> None:
        part(self)
        time.sleep(0.6 - 0.3 * self.rank)

    TorchrunRanks.part = slowly


def cannot_read(rank: int) -> None:
    """Of this process, if it is that rank, no image can be read."""

    def image(self: ImageFolder, index: int) -> NoReturn:
        raise UnreadableImage(self.name(index), "damaged", "on purpose")

    if os.environ["RANK"] == str(rank):
        ImageFolder.image = image
