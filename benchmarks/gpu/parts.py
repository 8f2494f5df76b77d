"""Parts of an unattended run: processes that may crash, hang or fail without taking the others along.

A part writes JSON lines to a file of its own while it runs, and what it has written counts however it ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks import ROOT

# Stands in a command for the file that the part writes its JSON lines to.
RESULTS = "{results}"


@dataclass(frozen=True)
class Part:
    """One process to run, and how to judge it.

    command: its words, among them ``RESULTS``.
    quiet_seconds: it is ended after so long without a new line in its file.
    estimate: how many seconds it may take; with fewer left it is not begun.
    tests: pytest node ids added to the command. Those that a crash or a hang leaves undone are run again without the culprit.
    environment: variables it gets besides ours.
    judge: what its status is, given how its process ended and what it printed; how it ended, if None.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    quiet_seconds: float
    tests: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    judge: Callable[[str, str], str] | None = None
    estimate: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """One process that is over: what it wrote, and how it ended."""

    status: str
    exit_status: int | None
    seconds: float
    lines: list[dict[str, Any]]
    output: str


class Runner:
    """Runs parts until the time is up or ``stop`` is set; then what still runs is ended and nothing more is started."""

    def __init__(self, scratch: Path, seconds: float) -> None:
        self.scratch = scratch
        self.deadline = time.time() + seconds
        self.stop = threading.Event()

    def run(self, part: Part) -> dict[str, Any]:
        """The part's record: status, seconds, outcomes of its tests or figures, and the end of its output."""
        attempts: list[Attempt] = []
        left = list(part.tests)
        while not attempts or left:
            if self._over() or time.time() + part.estimate > self.deadline:
                break
            attempt = self.attempt(part, left)
            attempts.append(attempt)
            begun = {line["test"] for line in attempt.lines if line.get("event") == "started"}
            if not begun:
                break
            left = [test for test in left if test not in begun]
        statuses = [attempt.status for attempt in attempts] or ["not run: out of time"]
        status = next((each for each in statuses if each != "passed"), "passed")
        if part.judge and attempts:
            status = part.judge(status, attempts[-1].output)
        return self.record(part, status, attempts)

    def attempt(self, part: Part, tests: Sequence[str] = ()) -> Attempt:
        """Run the part's process once, for these tests."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            results, output = Path(folder, "results.jsonl"), Path(folder, "output.txt")
            results.touch()
            command = [str(results) if word == RESULTS else word for word in (*part.command, *tests)]
            begin = time.time()
            with output.open("wb") as file:
                try:
                    process = self._start(part, command, file)
                except OSError as problem:  # a program that is there and cannot be started
                    return Attempt("failed", None, 0.0, [], str(problem))
                exit_status = wait_for(process, results, quiet_seconds=part.quiet_seconds, over=self._over)
            text = output.read_text(errors="replace")
            return Attempt(ending(exit_status), exit_status, time.time() - begin, read_lines(results), text)

    def _start(self, part: Part, command: list[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        # A session of its own, so that a hung part can be ended with everything it has started.
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment_variables(), **part.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _over(self) -> bool:
        return time.time() >= self.deadline or self.stop.is_set()

    def record(self, part: Part, status: str, attempts: Sequence[Attempt]) -> dict[str, Any]:
        """A part's entry in the results: ``tests`` with their outcomes where it has any, else ``figures``, its JSON lines."""
        record: dict[str, Any] = {
            "part": part.name,
            "kind": part.kind,
            "status": status,
            "exit_status": [attempt.exit_status for attempt in attempts],
            "seconds": round(sum(attempt.seconds for attempt in attempts), 2),
            "command": list(part.command),
        }
        if part.tests:
            record["tests"] = outcomes(part.tests, attempts)
        else:
            record["figures"] = [line for attempt in attempts for line in attempt.lines]
        record["output"] = "\n".join(attempt.output[-4000:] for attempt in attempts)
        return record


def tell(record: dict[str, Any]) -> None:
    """Print how a part ended, and how many rows it gave."""
    rows = f", {len(record['figures'])} rows" if record.get("figures") else ""
    print(f"{record['status']:<12} {record['seconds']:6.1f} s  {record['kind']}: {record['part']}{rows}", flush=True)


def run_while_it_tells(
    command: Sequence[str], *, quiet_seconds: float = 300, **options: Any
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` with its output captured as text, however long it takes as long as it tells something.

    Args:
        command, options: as for ``subprocess.Popen``.
        quiet_seconds: it is ended, and what it has started too, after so long without a word on stdout or stderr.

    Raises:
        TimeoutError: it had to be ended; the message has the end of what it told.
    """
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "stdout"), Path(folder, "stderr")
        with told[0].open("wb") as out, told[1].open("wb") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True, **options)
            exit_status = wait_for(process, *told, quiet_seconds=quiet_seconds)
        texts = [path.read_text(errors="replace") for path in told]
    if exit_status is None:
        ends = "\n".join(text[-2000:] for text in texts)
        raise TimeoutError(
            f"{' '.join(command)[:200]}: ended after {quiet_seconds} s without a word; its last ones:\n{ends}"
        )
    return subprocess.CompletedProcess(command, exit_status, *texts)


def wait_for(
    process: subprocess.Popen[Any], *told: Path, quiet_seconds: float, over: Callable[[], bool] = lambda: False
) -> int | None:
    """The exit status of a process that leads a session of its own; None where it had to be ended with all that it started:
    ``over`` said so, or nothing was written to the files ``told`` for so long. How long it takes in all is no sign of a hang."""
    begin = time.time()
    try:
        while process.poll() is None:
            last_news = max(begin, *(path.stat().st_mtime for path in told))
            if over() or time.time() - last_news > quiet_seconds:
                return None
            time.sleep(0.05)
        return process.returncode
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # one that hangs inside the driver outlives even this
                process.wait(timeout=10)


def environment_variables() -> dict[str, str]:
    """Ours, less what would turn a check into another one; the package need not be installed."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "CRATE_KERNELS_IMPL", "PYTEST_ADDOPTS")
    }
    ours["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), ours.get("PYTHONPATH"))))
    ours["PYTHONUNBUFFERED"] = "1"
    return ours


def ending(exit_status: int | None) -> str:
    """An exit status in words."""
    if exit_status is None:
        return "timed out"
    if exit_status < 0:
        return f"killed by {signal.Signals(-exit_status).name}"
    return "failed" if exit_status else "passed"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file, without a last line that a crash cut off."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def outcomes(tests: Sequence[str], attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """Every test: passed, failed or skipped; how its process ended, if with it; or not run."""
    found: dict[str, dict[str, Any]] = {test: {"outcome": "not run"} for test in tests}
    for attempt in attempts:
        for line in attempt.lines:
            test = line["test"]
            if line["event"] == "started":
                found[test] = {"outcome": attempt.status}
            elif line["event"] == "over" and ("message" not in found[test] or found[test]["outcome"] == "passed"):
                # A second line comes from a teardown that failed.
                found[test] = {key: line[key] for key in ("outcome", "seconds", "message")}
    return [{"test": test, **outcome} for test, outcome in found.items()]
