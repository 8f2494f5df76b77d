"""What the unattended runs on a GPU will launch: the work of their parts on fake tensors, which take no memory and no time.

Left out are the tests of the check, which compile side by side as they run, and the step that is measured with empty caches.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from unittest.mock import patch

import torch
import triton

import crate_mae
from benchmarks import harness, memory, records, training_step
from benchmarks.ahead_of_time.collecting import Case, requests
from benchmarks.command_line import make_folder
from benchmarks.gpu import bench, check
from benchmarks.gpu.archiving import Archive
from benchmarks.gpu.parts import Part
from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels import measuring
from benchmarks.kernels.operators import OPERATORS, Shape
from benchmarks.peers import STEPS, Step
from crate_kernels.tiles.compiling import CACHED, COMPILED, Compilers, Request, brief

CPU = torch.device("cpu")
PROGRAMS = {"benchmarks.kernels": kernels, "benchmarks.memory": memory, "benchmarks.training_step": training_step}


def cases(part: Part) -> Iterator[Case]:
    """The uses of our kernels by the program that a part runs."""
    words = part.command[part.command.index("-m") + 1 :]
    if (program := PROGRAMS.get(words[0])) is None:
        return
    with patch.object(torch.cuda, "is_available", lambda: True):  # which decides defaults
        arguments = program._parser().parse_args(words[1:])
    if program is kernels:
        one = Shape(arguments.batch, arguments.tokens, arguments.width, arguments.heads)
        for name in arguments.operators or OPERATORS:
            for each, dtype in kernels.cases(name, one, arguments.dtype, arguments.sweep):
                for provider in ("triton", measuring.WITH_LIBRARY)[: 1 + (name != "attention" and not arguments.once)]:
                    yield Case(name, dtype, f"{each} {provider}", partial(_operator, name, each, dtype, provider))
    elif not getattr(arguments, "first_step", False):
        # A search for the largest batch also tries some whose tokens are no multiple of 16.
        odd = [max(arguments.batch) + 1] if getattr(arguments, "largest", False) else []
        steps = [STEPS[name] for name in arguments.providers or STEPS]
        kinds = {(step.stream, step.recompute): step for step in steps if step.implementation == "triton"}
        for dtype in arguments.dtype:
            for size in (*arguments.batch, *odd):
                for kind, step in kinds.items():
                    call = partial(_step, arguments, step, dtype, size)
                    shape = f"{dict(arguments.set)} batch {size}, stream and recompute {kind}"
                    yield Case(arguments.model, dtype, shape, call)


def _operator(name: str, shape: Shape, dtype_name: str, provider: str) -> None:
    dtype = harness.torch_dtype(dtype_name)
    with memory.as_on_a_gpu(Step(implementation="triton")):
        comparison = OPERATORS[name](shape, measuring.normal(CPU, dtype))
        inputs = comparison.inputs()
        function = measuring.launching(provider, CPU)(measuring.autocasting(comparison.operator, CPU, dtype))
        with torch.no_grad():
            function(*inputs)
        run = measuring.launching(provider, CPU)(measuring.forward_backward)
        run(function, inputs, torch.randn_like(inputs[0]))


def _step(arguments: argparse.Namespace, step: Step, dtype_name: str, size: int) -> None:
    dtype = harness.torch_dtype(dtype_name)
    with memory.as_on_a_gpu(dataclasses.replace(step, mode=None)):
        model = crate_mae.create_model(arguments.model, **dict(arguments.set)).train()
        model.stream, model.recompute = step.stream, step.recompute
        batch = training_step.Batch.random(model.config, size, CPU, dtype)
        with harness.autocast(CPU, dtype):
            loss = step.model(model)(batch.images, batch.target)
        loss.backward()


def wanted(parts: Iterable[Part], arch: str, failures: list[str]) -> Iterator[tuple[Part, list[Request]]]:
    """Each part with the kernels that it launches, each once; to ``failures`` a line for each case that cannot be launched."""
    by_case: dict[tuple[str, str, str], list[Request]] = {}
    for part in parts:
        found: dict[Request, None] = {}
        for case in cases(part):
            name = (case.operator, case.dtype, case.shape)
            if name not in by_case:
                by_case[name] = []
                try:
                    with warnings.catch_warnings():
                        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
                        by_case[name] = [request for request, _ in requests(case, arch)]
                except Exception as error:  # whatever a launcher or Triton raises: the rest is still worth compiling
                    failures.append(f"{part.name}: {' '.join(name)}: not launched, {brief(error)}")
            found.update(dict.fromkeys(by_case[name]))
        yield part, list(found)


def warm(archs: Sequence[str], jobs: int, archive: Archive) -> int:
    """Compile all of it, and tell what became of each kernel. The exit status."""
    begin, failures = time.time(), list[str]()
    counts: Counter[str] = Counter()
    launched_by: dict[Request, str] = {}
    told = archive.path.with_name(f"{archive.path.name.removesuffix('.tar.gz')}.jsonl")
    make_folder("--archive", told.parent)
    told.unlink(missing_ok=True)
    archive.paths.append(told)
    with archive:
        with Compilers(jobs) as compilers:
            for arch in archs:
                for part, found in wanted(gpu_parts(), arch, failures):
                    compilers.ask(found)
                    for request in found:
                        launched_by.setdefault(request, part.name)
                    text = f"{part.kind}: {part.name} launches {len(found)} kernels on {arch}"
                    print(f"{time.time() - begin:5.0f} s  {text}", flush=True)
            for done, (request, outcome) in enumerate(compilers.outcomes(), 1):
                if outcome not in (COMPILED, CACHED):
                    failures.append(f"{launched_by[request]}: {request.module}.{request.kernel}: {outcome}")
                counts[outcome] += 1
                row = {"part": launched_by[request], "kernel": request.kernel, "target": str(request.target)}
                records.write_json_lines(told, [row | {"outcome": outcome}])
                text = f"{done} of {len(compilers)}: {request.kernel} {outcome}"
                print(f"{time.time() - begin:5.0f} s  {text}", flush=True)
        print("", *(f"FAILED {line}" for line in failures), sep="\n")
        print(
            f"{len(compilers)} kernels for {', '.join(archs)}: {counts[COMPILED]} compiled, {counts[CACHED]} already cached, "
            f"{len(failures)} failed; {time.time() - begin:.0f} s with {jobs} processes; {triton.knobs.cache.dir}"
        )
    return 1 if failures else 0


def gpu_parts() -> list[Part]:
    """Those that run kernels of ours, but for the tests of the check."""
    of_the_check = [*check.time_parts("cuda"), *check.memory_parts("compute-sanitizer")]
    return [*bench.bench_parts("cuda", full=False), *of_the_check, bench.COUNTED]
