"""The processes of a run, called ranks: a single one, or those that torchrun started; and how they agree with each other."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from crate_mae.data import STOPPING
from crate_mae.training.interrupts import RunStopped

T = TypeVar("T")

_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_OTHER_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",  # not SLURM_NTASKS, which a script of sbatch has even if it runs once
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
"""Environment variables in which launchers other than torchrun say how many processes there are."""

_PATIENCE = timedelta(minutes=30)
"""How long ranks wait for each other: the others wait while the first one draws and looks inside the model."""

_LONGEST_END = 25.0
"""Seconds from a signal to the forced end of a rank; torchrun kills what is left after 30. A rank whose GPU waits for one that is
gone would never end by itself."""

_HARMLESS = (
    "Grad strides do not match bucket view strides",  # for class and mask token, which have dimensions of size one
    r"FSDP2-wrapped module \(FSDP\w+\) returned a view",  # for the prediction, into which nothing writes
)
"""Beginnings of PyTorch's warnings that are of no concern here."""

_FIRST_TELLS = 2.0
"""Seconds for which the other ranks leave it to the first to report an error."""

_ENDING = {*STOPPING} - {getattr(signal, "SIGUSR1", None)}
"""The signals that end a process; SIGUSR1 is only a warning before these."""

_GIVEN_UP = b"crate-mae: a process has not come to an end in time, and is ended; what was saved before is kept\n"

_OF_COLLECTIVES = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out waiting")


class LostRank(Exception):
    """Another process of the run is gone."""

    @classmethod
    def told_by(cls, error: Exception, kept: str = "") -> LostRank:
        """The error to raise for a collective's `error`; `kept` says in words what of the run is on the disk."""
        return cls(f"another process of the run was lost{kept} ({' '.join(str(error).split())[:160]})")


def launched() -> bool:
    """Whether torchrun started this process, alone or with others."""
    return all(name in os.environ for name in _OF_TORCHRUN)


def local_rank() -> int | None:
    """The number of this process among those that torchrun started on this machine; None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if launched() else None


def check_launcher() -> None:
    """Refuse several processes that do not know each other: each would train for itself, into the same folder.

    Raises:
        ValueError: a launcher other than torchrun says that there are several.
    """
    if launched():
        return
    for variable, launcher in {"WORLD_SIZE": "this launcher", **_OTHER_LAUNCHERS}.items():
        count = os.environ.get(variable, "")
        if count.isdigit() and int(count) > 1:
            raise ValueError(
                f"environment variable {variable}: expected 1 process, got {count}; without torchrun they know nothing of each "
                f"other: start torchrun -m crate_mae, once on each machine, instead of {launcher}, or unset {variable}"
            )


class Ranks:
    """A run of one process; `TorchrunRanks` is a run of several. All ranks must make the same calls in the same order.

    Attributes:
        rank, count: the number of this process, and how many the run has.
        local, local_count: likewise, on this machine.
    """

    rank, count, local, local_count = 0, 1, 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank, which alone speaks and writes."""
        return self.rank == 0

    def of_first(self, make: Callable[[], T]) -> T:
        """The first rank calls `make` when all have come here; all return its result, or raise its error."""
        return make()

    def each_after_first(self, make: Callable[[], T]) -> T:
        """Each rank calls `make` for itself, the first one before the others, which find what it left in caches and on disks. If
        the first raises an error, all do."""
        made: list[T] = []
        self.of_first(lambda: made.append(make()))
        return made[0] if made else make()

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, in their order; returned on all."""
        return [value]

    def largest(self, value: int) -> int:
        """The largest value of all ranks; returned on all."""
        return value

    def abandoned(self) -> int:
        """The signal to act on if torchrun has ended without sending one; else 0."""
        return 0

    def sum(self, tensor: torch.Tensor) -> Callable[[], object]:
        """Start summing a tensor over the ranks, in place; call the result before the tensor is used."""
        return lambda: None

    def agreed(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over all ranks; all must call it equally often.

        With several ranks these are the values of the call before, so that no host waits for another for longer than a step.
        """
        return values

    def check_alike(self, values: dict[str, object]) -> None:
        """Refuse ranks whose values differ.

        Args:
            values: by the names that messages have for them.

        Raises:
            ValueError: a value differs; the message names it.
        """
        first, *others = self.gathered(values)
        for rank, other in enumerate(others, start=1):
            for name, value in first.items():
                if other.get(name) != value:
                    raise ValueError(
                        f"{name}: expected the same on all processes, got {value} on rank 0 and {other.get(name)} on rank {rank}"
                    )


class TorchrunRanks(Ranks):
    """The ranks of a run under torchrun; the process group is made with it.

    Args:
        device: of this process.

    Attributes:
        of_states: the process group in which states are written in the background.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count, self.local, self.local_count = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
        on_gpus = device.type == "cuda"
        if on_gpus:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=_PATIENCE, device_id=device if on_gpus else None
        )
        self.of_states = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._parent = os.getppid()
        self._asked: torch.Tensor | None = None
        self._asking: Any = None

    def of_first(self, make: Callable[[], T]) -> T:
        self.gathered(None)
        made: list[Any] = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except Exception as error:
                dist.broadcast_object_list([None, _as_it_travels(error)], src=0)
                raise
        dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def gathered(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def largest(self, value: int) -> int:
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def abandoned(self) -> int:
        return 0 if os.getppid() == self._parent else getattr(signal, "SIGHUP", signal.SIGTERM)

    def sum(self, tensor: torch.Tensor) -> Callable[[], object]:
        return dist.all_reduce(tensor, async_op=True).wait

    def agreed(self, *values: int) -> tuple[int, ...]:
        before: tuple[int, ...] = (0,) * len(values)
        if self._asked is not None:
            self._asking.wait()
            before = tuple(self._asked.tolist())
        self._asked = torch.tensor(values)
        self._asking = dist.all_reduce(self._asked, dist.ReduceOp.MAX, async_op=True)
        return before

    def part(self) -> None:
        """Leave the process group when all ranks end alike. If one breaks off, the others notice the end of its process."""
        if self._asking is not None:
            self._asking.wait()
        dist.destroy_process_group()


@contextlib.contextmanager
def met(device: torch.device) -> Iterator[Ranks]:
    """The ranks of a run, with a process group as long as the block lasts; all but the first are silent in it."""
    if not launched():
        yield Ranks()
        return
    ranks = TorchrunRanks(device)
    with contextlib.ExitStack() as within:
        within.enter_context(_ended_in_time())
        within.enter_context(warnings.catch_warnings())
        for harmless in _HARMLESS:
            warnings.filterwarnings("ignore", message=harmless)
        if not ranks.is_first:
            nowhere = within.enter_context(open(os.devnull, "w"))
            within.enter_context(contextlib.redirect_stdout(nowhere))
            within.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            try:
                yield ranks
            except RunStopped:  # all ranks stop at the same step
                _hear_no_signal()
                ranks.gathered(None)  # else torchrun would end the others when the first has ended
                ranks.part()
                raise
        except RuntimeError as error:
            if is_of_a_collective(error):
                raise LostRank.told_by(error) from error
            raise
        ranks.part()


def _hear_no_signal() -> None:
    """Ignore signals from now on: torchrun sends one to the ranks that are left when the first has ended."""
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)


def _as_it_travels(error: Exception) -> Exception:
    """An error that can be sent to another process: itself if it can be pickled, else its words."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def is_of_a_collective(error: BaseException) -> bool:
    """Whether an error comes of ranks that are gone, by its type and words."""
    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(each in words for each in _OF_COLLECTIVES)


def is_silent() -> bool:
    """Whether this process is under torchrun and not the first, so that it says nothing."""
    return launched() and os.environ["RANK"] != "0"


def end_of_rank(line: str, error: BaseException, status: int) -> NoReturn:
    """End this process at once after an error; torchrun, or broken connections, end the others.

    It prints the line, unless another rank failed before, whose error is the cause of this one. When all stop together, the first
    rank prints it.
    """
    if not is_silent() if isinstance(error, RunStopped) else _is_first_to_fail():
        rank = os.environ["RANK"]
        with contextlib.suppress(OSError):
            print(line if rank == "0" else f"{line} (rank {rank})", file=sys.stderr, flush=True)
    leave(status)


def leave(status: int) -> NoReturn:
    """End this process without waiting for the threads of its collectives, which may wait for other ranks or abort it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _is_first_to_fail() -> bool:
    """Whether no other rank of this run failed before this one, by the store of torchrun's agent; True if it cannot be asked.

    The other ranks first wait a little, so that the first reports an error that all have met."""
    environment = os.environ
    for number in _ENDING:  # torchrun will send one to this rank, which must print its line before it ends
        signal.signal(number, signal.SIG_IGN)
    try:
        store = dist.TCPStore(
            environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5)
        )
        key = f"crate_mae/failed/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if environment["RANK"] != "0":
            until = time.monotonic() + _FIRST_TELLS
            while time.monotonic() < until and not store.check([key]):
                time.sleep(0.05)
        return store.compare_set(key, "", environment["RANK"]).decode() == environment["RANK"]
    except (RuntimeError, ValueError):
        return True


@contextlib.contextmanager
def _ended_in_time() -> Iterator[None]:
    """After a signal, end this process in `_LONGEST_END` seconds if the block still lasts, whatever its main thread waits for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hears, told = socket.socketpair()
    told.setblocking(False)
    before, over = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False), threading.Event()

    def wait() -> None:
        while heard := hears.recv(1):
            if heard[0] in _ENDING and not over.wait(_LONGEST_END):
                os.write(2, _GIVEN_UP)
                os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        told.close()
