"""The processes of a run, one or as many as torchrun started, and what they agree on."""

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
    "SLURM_STEP_NUM_TASKS": "srun",  # unlike SLURM_NTASKS, which a script that sbatch runs once has, too
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}
"""Environment variables in which launchers of several processes say how many there are, beside torchrun's."""

_PATIENCE = timedelta(minutes=30)
"""For which ranks wait for each other: the first one draws, and looks inside, while the others wait."""

_LONGEST_END = 25.0
"""Seconds from a signal to the end of a rank: torchrun kills what is left after 30. One whose GPU waits for a rank that is gone
never comes to its next step."""

_HARMLESS = (
    "Grad strides do not match bucket view strides",  # of class and mask token, whose strides are of dimensions with one entry
    r"FSDP2-wrapped module \(FSDP\w+\) returned a view",  # of the prediction, which nothing writes to
)
"""Beginnings of warnings that PyTorch gives."""

_FIRST_TELLS = 2.0
"""Seconds in which the first rank may tell of an error before another does."""

_ENDING = {*STOPPING} - {getattr(signal, "SIGUSR1", None)}
"""Signals by which a process is to end: SIGUSR1 is a warning ahead of these."""

_GIVEN_UP = b"crate-mae: a process has not come to an end in time, and is ended; what was saved before is kept\n"

_OF_COLLECTIVES = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out waiting")


class LostRank(Exception):
    """Another process of the run is gone."""

    @classmethod
    def told_by(cls, error: Exception, kept: str = "") -> LostRank:
        """What to say of a collective's error; ``kept``: what of the run is on the disk, in words."""
        return cls(f"another process of the run was lost{kept} ({' '.join(str(error).split())[:160]})")


def launched() -> bool:
    """Whether torchrun started this process, as one of several, or as the only one."""
    return all(name in os.environ for name in _OF_TORCHRUN)


def local_rank() -> int | None:
    """Which of the processes that torchrun started on this machine this is, if it is one."""
    return int(os.environ["LOCAL_RANK"]) if launched() else None


def check_launcher() -> None:
    """Refuse to be one of several processes that do not know each other: each would train for itself, into the same folder.

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
    """One process, which agrees with itself.

    Attributes:
        rank, count: which of the run's processes this one is, of how many.
        local, local_count: which of those on this machine, of how many.
    """

    rank, count, local, local_count = 0, 1, 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def of_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all; all others have come here before it does. What it raises all raise."""
        return make()

    def each_after_first(self, make: Callable[[], T]) -> T:
        """What each rank makes for itself, the first ahead of the others, which find what it left in caches and on disks. What it
        raises all raise."""
        made: list[T] = []
        self.of_first(lambda: made.append(make()))
        return made[0] if made else make()

    def gathered(self, value: T) -> list[T]:
        """What each rank gives, on all."""
        return [value]

    def largest(self, value: int) -> int:
        """Of what the ranks give, on all."""
        return value

    def abandoned(self) -> int:
        """The signal that stands for the end of torchrun, if it has ended without a word; else 0."""
        return 0

    def sum(self, tensor: torch.Tensor) -> Callable[[], object]:
        """Add up over the ranks, in place; it is done, to whatever follows on the device, when the result has been called."""
        return lambda: None

    def agreed(self, *values: int) -> tuple[int, ...]:
        """The largest values of all ranks, the same on all, which is called equally often on all.

        Of several ranks, those of the call before: no host waits for another by more than one step, and none for a device.
        """
        return values

    def check_alike(self, values: dict[str, object]) -> None:
        """Refuse ranks that differ in what they must have alike, by name.

        Raises:
            ValueError: they do; the message names it.
        """
        first, *others = self.gathered(values)
        for rank, other in enumerate(others, start=1):
            for name, value in first.items():
                if other.get(name) != value:
                    raise ValueError(
                        f"{name}: expected the same on all processes, got {value} on rank 0 and {other.get(name)} on rank {rank}"
                    )


class TorchrunRanks(Ranks):
    """One of several processes that torchrun started; they have met when this is made.

    Args:
        device: that this one computes on.

    Attributes:
        of_states: the group of processes in which states are written in the background.
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
        """End the meeting, of all in the same way: of a rank that breaks off, the end of its process tells the others."""
        if self._asking is not None:
            self._asking.wait()
        dist.destroy_process_group()


@contextlib.contextmanager
def met(device: torch.device) -> Iterator[Ranks]:
    """The ranks of a run on this process' device, for as long as the block lasts. All but the first are silent in it."""
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
            except RunStopped:  # as all are, at the same step
                _hear_no_signal()
                ranks.gathered(None)  # else the end of one would be what torchrun ends the others for
                ranks.part()
                raise
        except RuntimeError as error:
            if is_of_a_collective(error):
                raise LostRank.told_by(error) from error
            raise
        ranks.part()


def _hear_no_signal() -> None:
    """Of torchrun, which sends one to the ranks that are left when the first has stopped; for good, since this one ends now."""
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)


def _as_it_travels(error: Exception) -> Exception:
    """An error as another process can have it: itself, or its words."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def is_of_a_collective(error: BaseException) -> bool:
    """Whether an error is one of a process whose peers are gone, as far as its words tell."""
    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(each in words for each in _OF_COLLECTIVES)


def is_silent() -> bool:
    """Whether this process is one of several, and not the first."""
    return launched() and os.environ["RANK"] != "0"


def end_of_rank(line: str, error: BaseException, status: int) -> NoReturn:
    """End this process at once: the others are ended by torchrun, or by the connections that break.

    Says why, unless another rank has failed before: what followed from that need not be told. Of a stop, which is that of all,
    the first rank tells.
    """
    if not is_silent() if isinstance(error, RunStopped) else _is_first_to_fail():
        rank = os.environ["RANK"]
        with contextlib.suppress(OSError):
            print(line if rank == "0" else f"{line} (rank {rank})", file=sys.stderr, flush=True)
    leave(status)


def leave(status: int) -> NoReturn:
    """End this process without waiting for the threads of its collectives: they may wait for others, or abort it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _is_first_to_fail() -> bool:
    """Whether no other rank of this run failed before this one. torchrun's agent keeps which did; where it cannot be asked, each
    is. What all have met the first rank tells: the others wait for it."""
    environment = os.environ
    for number in _ENDING:  # by which torchrun ends those that are left, and which must not come before the line
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
    """End this process some time after a signal if the block lasts until then, wherever its main thread waits."""
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
