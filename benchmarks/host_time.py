"""Microseconds that the host needs for one layer, forward and backward, where every launch is replaced by nothing.

    python -m benchmarks.host_time
    python -m benchmarks.host_time --against ../at_c61cf8c --json benchmarks/results/cpu/host_time.json   # a second checkout

What is left is what Python, autograd, PyTorch's dispatcher and Triton's launcher in Python take before a GPU has anything to do.
A driver without a device stands for CUDA's, so that Triton's own code runs up to its last call; PyTorch's library products, which
are launches too, are replaced by zeros. Tensors lie on the CPU and are tiny, so that nothing is computed
for long. Each checkout is measured in processes of its own, in turn with the other. A CUDA launch costs a few microseconds more.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

LAYERS, WIDTH, TOKENS = 12, 64, 5
TIMES = ("prepare", "forward", "backward")
CALLS = ("launches forward", "launches backward", "library products", "small operations")


class _Launcher:
    """Takes the place of Triton's launcher, and counts."""

    launched = 0

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *_: Any) -> None:
        _Launcher.launched += 1


class _Driver:
    """What Triton asks a driver for, answered as on an H100."""

    launcher_cls = _Launcher

    class utils:
        @staticmethod
        def load_binary(*_: Any) -> tuple[int, ...]:
            return 1, 1, 64, 0, 1024  # module, function, registers, spills, threads

        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {"max_shared_mem": 232448}

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int = 0) -> int:
        return 0


def measure() -> dict[str, dict[str, float]]:
    """Microseconds (20th percentile of 80 steps) and calls a layer, of the ``crate_kernels`` that this process imports."""
    import torch
    import triton
    from torch.utils._python_dispatch import TorchDispatchMode

    triton.runtime.driver.set_active(_Driver())
    torch.set_num_threads(1)
    # Found by their names, as another checkout may lack some of them.
    crate, dispatch = map(importlib.import_module, ("crate_kernels", "crate_kernels.dispatch"))
    setattr(dispatch, "choose", lambda *_, **__: "triton")  # noqa: B010
    for operator in ("mssa", "ista", "norm_linear"):
        importlib.import_module(f"crate_kernels.{operator}.triton")
    replay: Any = sys.modules.get("crate_kernels.replay")
    counts: Counter[str] = Counter()

    def product(a: Any, b: Any) -> Any:
        counts["library products"] += 1
        counts["small operations"] -= 1  # new_zeros, which writes the result as the product would
        return a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.float32)

    stand_ins = {"float32_product": product, "plus_product": lambda total, a, b, **_: product(a, b)}
    for name, module in list(sys.modules.items()):
        for function in stand_ins.keys() & vars(module).keys() if name.startswith("crate_kernels") else ():
            setattr(module, function, stand_ins[function])

    parameters: list[Any] = []

    def weight(*shape: int) -> Any:
        parameters.append(torch.nn.Parameter(torch.randn(*shape) * WIDTH**-0.5))
        return parameters[-1]

    def norm() -> Any:
        return crate.Norm(weight(WIDTH), weight(WIDTH))

    def attention() -> Any:
        return crate.AttentionWeights(weight(WIDTH, WIDTH), weight(WIDTH, WIDTH), weight(WIDTH))

    class Operations(TorchDispatchMode):
        """Counts operators of PyTorch that start a kernel on a device: no views, no allocations, no numbers on the host."""

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            if func.namespace.startswith("crate_kernels"):
                with self:
                    return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
            found = func(*args, **(kwargs or {}))
            given = [one for one in args if isinstance(one, torch.Tensor)]
            memory = {one.untyped_storage().data_ptr() for one in given}
            is_view = isinstance(found, torch.Tensor) and found.untyped_storage().data_ptr() in memory
            on_device = any(one.ndim for one in given)
            writes = func._schema.is_mutable or not is_view
            if on_device and writes and isinstance(found, torch.Tensor) and "empty" not in func._schema.name:
                counts["small operations"] += 1
            return found

    found: dict[str, dict[str, float]] = {}
    for kind in ("encoder", "decoder"):
        if kind == "encoder":
            layers = [crate.EncoderWeights(norm(), attention(), norm(), weight(WIDTH, WIDTH)) for _ in range(LAYERS)]
        else:
            layers = [crate.DecoderWeights(norm(), weight(WIDTH, WIDTH), norm(), attention()) for _ in range(LAYERS)]
        layer = getattr(crate, f"{kind}_layer")
        x, grad = (torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16) for _ in range(2))

        def step(layers: Any = layers, layer: Any = layer, x: Any = x, grad: Any = grad) -> tuple[list[float], Any]:
            for one in parameters:
                one.grad = None
            times, launched = [time.perf_counter()], [_Launcher.launched]

            def note() -> None:
                times.append(time.perf_counter())
                launched.append(_Launcher.launched)

            with torch.autocast("cpu", torch.bfloat16):
                prepared = crate.prepare_layers(x, layers, num_heads=1)
                note()
                h = x.detach().requires_grad_()
                for weights, ready in zip(layers, prepared, strict=True):
                    h = layer(h, *weights, num_heads=1, prepared=ready)
            note()
            h.backward(grad)
            note()
            differences = [[after - before for before, after in pairwise(of)] for of in (times, launched)]
            return [1e6 * seconds / LAYERS for seconds in differences[0]], [n / LAYERS for n in differences[1]]

        step()  # compiles
        counts.clear()
        with Operations():
            _, (_, *launches) = step()
        calls = *launches, counts["library products"] / LAYERS, counts["small operations"] / LAYERS
        if replay:
            replay.ON_CPU = True
            for _ in range(3):  # met, recorded, replayed
                step()
        columns = zip(*(step()[0] for _ in range(80)), strict=True)
        found[kind] = dict(zip(TIMES, (sorted(times)[16] for times in columns), strict=True))
        found[kind] |= dict(zip(CALLS, calls, strict=True))
        if replay:
            replay.ON_CPU = False
    return found


def in_a_process(checkout: Path) -> dict[str, dict[str, float]]:
    """``measure`` of the ``crate_kernels`` in the folder ``checkout``.

    Raises:
        SystemExit: the process failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).resolve()), "--measure"]
    ended = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{checkout}: {ended.stderr.strip().splitlines()[-1]}")
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m benchmarks.host_time", description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each (5)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure()))
        return

    import torch

    from benchmarks import ROOT
    from benchmarks.records import environment

    checkouts = {"here": ROOT} | ({"against": options.against.resolve()} if options.against else {})
    runs: dict[str, list[Any]] = {name: [] for name in checkouts}
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            runs[name].append(in_a_process(checkout))
    result: dict[str, Any] = {
        name: {
            kind: {key: round(statistics.median(run[kind][key] for run in of), 2) for key in (*TIMES, *CALLS)}
            for kind in ("encoder", "decoder")
        }
        for name, of in runs.items()
    }
    for name, kinds in result.items():
        for kind, values in kinds.items():
            print(f"{name} {kind}: " + ", ".join(f"{key} {value:g}" for key, value in values.items()))
    if options.against:
        result["times as fast"] = {
            kind: [
                round(sum(other[kind][key] for key in TIMES) / sum(own[kind][key] for key in TIMES), 2)
                for own, other in zip(runs["here"], runs["against"], strict=True)
            ]
            for kind in ("encoder", "decoder")
        }
        print("times as fast, round by round, preparation included:", result["times as fast"])
    if options.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=checkouts.get("against"), capture_output=True, text=True
        )
        result |= {
            "against commit": commit.stdout.strip() if options.against else None,
            **environment(torch.device("cpu")),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
