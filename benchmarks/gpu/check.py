"""The check: tests marked ``gpu``, every operator under the memory checker, times; one JSON file that is complete at any moment.

Tests and the memory checker share the device, times have it to themselves.
"""

from __future__ import annotations

import argparse
import glob
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import make_folder
from benchmarks.gpu import parts
from benchmarks.gpu.archiving import Archive
from benchmarks.gpu.parts import RESULTS, Part, Runner
from benchmarks.kernels.operators import OPERATORS
from benchmarks.records import environment, slug, table, table_of, version
from crate_kernels.files import write_json

PLUGIN = f"-p benchmarks.gpu.pytest_outcomes --outcomes {RESULTS}"
PYTEST = (sys.executable, "-m", "pytest", *PLUGIN.split(), "-m", "gpu", "-q")
PASSING = ("passed", "unavailable")

# Seconds kept for the times, which are taken last; and how long a part may be silent before it is ended.
SECONDS_FOR_TIMES = 150
QUIET_SECONDS = {"tests": 120, "memory checker": 180, "times": 90}
# Tests of one function that share a process: a process costs some seconds to start, a long one keeps the others waiting.
TESTS_A_PROCESS = 12


def collected_parts(scratch: Path) -> tuple[list[Part], list[dict[str, Any]]]:
    """A part for every dozen cases of a test marked ``gpu``; and a record of the collection, if it failed."""
    files = sorted(
        str(path.relative_to(parts.ROOT))
        for path in parts.ROOT.glob("tests/**/test_*.py")
        if "mark.gpu" in path.read_text()
    )
    collection = Part("collect tests", "tests", (*PYTEST, "--collect-only", *files), QUIET_SECONDS["tests"])
    runner = Runner(scratch, seconds=QUIET_SECONDS["tests"])
    attempt = runner.attempt(collection)
    collected = [line["test"] for line in attempt.lines if line["event"] == "collected"]
    functions: dict[str, list[str]] = {}
    for test in collected:
        functions.setdefault(test.partition("[")[0], []).append(test)
    found = []
    for function, tests in functions.items():
        chunks = [tests[start : start + TESTS_A_PROCESS] for start in range(0, len(tests), TESTS_A_PROCESS)]
        for number, chunk in enumerate(chunks, 1):
            name = function.removeprefix("tests/") + (f" {number} of {len(chunks)}" if len(chunks) > 1 else "")
            found.append(Part(name, "tests", PYTEST, QUIET_SECONDS["tests"], tuple(chunk)))
    failure = [] if attempt.status == "passed" else [runner.record(collection, attempt.status, [attempt])]
    return found, failure


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on PATH or where the toolkit puts it."""
    return shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/local/cuda*/bin/{name}"), reverse=True)), None)


def find_memory_checker() -> str | None:
    return find_tool("compute-sanitizer")


# Tails both ways; ISTA with more tokens than features and with fewer, because that decides its products.
MEMORY_CHECKS = {
    "attention": ("attention", "--batch", "2", "--tokens", "67", "--width", "96", "--heads", "2"),
    "ista, one product": ("ista", "--batch", "2", "--tokens", "67", "--width", "96"),
    "ista, two products": ("ista", "--batch", "1", "--tokens", "50", "--width", "96"),
    "mssa": ("mssa", "--batch", "2", "--tokens", "67", "--width", "96", "--heads", "2"),
    # With LayerNorm, and so many samples that projection and attention are two launches.
    "layers": ("encoder_layer", "decoder_layer", "--batch", "70", "--tokens", "17", "--width", "96", "--heads", "2"),
}


def memory_parts(checker: str) -> list[Part]:
    """Every operator under memcheck (addresses) and racecheck (shared memory); only kernels count, not refused API calls."""
    options = ("--report-api-errors", "no", "--target-processes", "application-only")
    return [
        Part(
            f"{tool} {name}",
            "memory checker",
            (checker, "--tool", tool, *options, sys.executable, "-m", "benchmarks.kernels", *arguments, "--once"),
            QUIET_SECONDS["memory checker"],
            # Torch's cache hands out pieces of large blocks, inside which no address is out of bounds.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            judge=judge_memory_check,
        )
        for tool in ("memcheck", "racecheck")
        for name, arguments in MEMORY_CHECKS.items()
    ]


TINY = ("--batch", "2", "--tokens", "17", "--width", "32", "--heads", "2", "--dtype", "float32", "--rounds", "3")
TINY_STEP = (
    "--model", "crate_mae_tiny", "--batch", "2", "--dtype", "float32", "--rounds", "2",
    "--set", "img_size=32", "embed_dim=48", "depth=1", "num_heads=3", "decoder_depth=1", "decoder_num_heads=3",
)  # fmt: skip


def time_parts(device: str) -> list[Part]:
    """Times at CRATE-MAE-Base's shapes on CUDA; on a CPU tiny ones, which say nothing but that the code runs."""
    kernels: tuple[str, ...] = ("--batch", "64", "--rounds", "50")
    step: tuple[str, ...] = ("--batch", "8", "64", "--dtype", "bfloat16", "--rounds", "20")
    if device == "cpu":
        kernels, step = TINY, TINY_STEP
    common = ("--device", device, "--json", RESULTS)
    compile_nothing = ("--modes", "forward", "backward", "--peers", "library")
    commands = {f"times of {name}": ("kernels", name, *compile_nothing, *kernels) for name in OPERATORS}
    commands["times of a training step"] = ("training_step", *step)
    return [
        Part(name, "times", (sys.executable, "-m", f"benchmarks.{module}", *arguments, *common), QUIET_SECONDS["times"])
        for name, (module, *arguments) in commands.items()
    ]


def summaries(output: str) -> list[str]:
    return re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)


def judge_memory_check(status: str, output: str) -> str:
    """compute-sanitizer passes where it says that it found no errors; some virtual machines do not let it run."""
    if "Device not supported" in output:
        return "unavailable"
    found = summaries(output)
    if status == "passed" and not (found and re.search(r"\b0 errors", found[-1])):
        return "failed"
    return status


class Report:
    """The JSON document, on disk after every part; a reader never sees half of it."""

    def __init__(self, path: Path, head: dict[str, Any], archive: Archive) -> None:
        self.path, self.archive = path, archive
        archive.paths.append(path)
        self.parts: list[dict[str, Any]] = []
        self.document = {**head, "complete": False, "passed": False, "parts": self.parts}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.document)

    def add(self, record: dict[str, Any]) -> None:
        self.parts.append(record)
        write_json(self.path, self.document)
        self.archive.write()
        parts.tell(record)

    def finish(self) -> bool:
        """Whether everything passed, and not every test was skipped."""
        tests = [test["outcome"] for record in self.parts for test in record.get("tests", [])]
        passed = bool(self.parts) and all(record["status"] in PASSING for record in self.parts)
        passed = passed and (not tests or "passed" in tests)
        self.document |= {"complete": True, "passed": passed}
        write_json(self.path, self.document)
        return passed


def surroundings(device: torch.device) -> dict[str, Any]:
    """``environment``, and more that may explain a difference between two runs."""
    found = environment(device)
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "pytest": version("pytest")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["memory_bytes"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
    return found


def print_summary(records: Sequence[dict[str, Any]]) -> None:
    """Figures, then what did not pass."""
    figures = [row for record in records if record["kind"] == "times" for row in record["figures"]]
    if figures:
        print(table_of(figures))
    for record in records:
        tests = record.get("tests", [])
        for test in tests:
            if test["outcome"] not in ("passed", "skipped"):
                print(f"{test['outcome'].upper()} {test['test']}\n{test.get('message', '')}")
        if record["status"] not in PASSING and not tests:
            print(f"{record['status'].upper()} {record['part']}\n{record['output']}")
    counts = Counter(test["outcome"] for record in records for test in record.get("tests", []))
    print("tests: " + (", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "none"))


def main(arguments: argparse.Namespace, scratch: Path, archive: Archive) -> int:
    """Run all parts; ``scratch`` is an empty folder for what they leave. The exit status."""
    begin = time.time()
    on_cuda = arguments.device == "cuda"
    if arguments.json and not arguments.dry_run:
        make_folder("--json", arguments.json.parent)
    checker = find_memory_checker()
    shared, failures = collected_parts(scratch) if on_cuda else ([], [])
    shared += memory_parts(checker) if checker and on_cuda else []
    alone = time_parts(arguments.device)
    if arguments.dry_run:
        print(table(("kind", "part", "tests"), ([p.kind, p.name, len(p.tests) or ""] for p in (*shared, *alone))))
        print(f"compute-sanitizer: {checker or 'absent'}")
        return 0

    found = surroundings(torch.device(arguments.device))
    head = {"rehearsal": not on_cuda, **found, "compute_sanitizer": checker or "absent"}
    results = f"benchmarks/results/{slug(head['device'])}" if on_cuda else "runs/rehearsal"
    report = Report(arguments.json or parts.ROOT / results / "gpu_check.json", head, archive)
    print(", ".join(f"{key} {value}" for key, value in head.items()), flush=True)
    for record in failures:
        report.add(record)
    end = begin + arguments.seconds
    run_shared(Runner(scratch, end - SECONDS_FOR_TIMES - time.time()), shared, arguments.jobs, report)
    runner = Runner(scratch, end - time.time())
    for part in alone:
        report.add(runner.run(part))
    passed = report.finish()
    print_summary(report.parts)
    print(f"{'passed' if passed else 'FAILED'} in {time.time() - begin:.0f} s; {report.path}")
    return 0 if passed else 1


def run_shared(runner: Runner, shared: Iterable[Part], jobs: int, report: Report) -> None:
    """Run parts side by side; their records arrive in the order in which they end."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for task in as_completed([pool.submit(runner.run, part) for part in shared]):
                report.add(task.result())
        finally:
            runner.stop.set()  # interrupted: leave nothing running
