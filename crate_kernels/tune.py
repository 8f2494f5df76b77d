"""Finds tiles for this machine's GPU and writes them to a cache, which every later process takes them from.

    python -m crate_kernels.tune                                    # CRATE-MAE-Base in bfloat16, 64 images
    python -m crate_kernels.tune --models crate_mae_small crate_mae_base --dtypes bfloat16 autocast --batch 128
    python -m crate_kernels.tune --show                             # what is in force, and where it comes from
    python -m crate_kernels.tune --clear                            # back to the shipped tiles

The file lies in the user's cache folder, one a device name, or where the environment variable CRATE_KERNELS_CACHE says; on a
machine without a GPU, --show and --clear take all that lie in that folder. It counts only with the device, Triton, package and
shipped tables that it was made with. Other tiles add in another order, so results differ in their last bits: copy one file to
all machines of a job. Processes of a job (torchrun's) never tune.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from crate_kernels import tiles
from crate_kernels.tiles import cache
from crate_kernels.tiles.search import Finding, Problem, Timer, keys_of, search

# Width and heads; this package knows no models, only their shapes.
MODELS = {
    "crate_mae_tiny": (384, 6),
    "crate_mae_small": (576, 12),
    "crate_mae_base": (768, 12),
    "crate_mae_large": (1024, 16),
}
TOKENS = 197  # of a 224 x 224 image in patches of 16, and the class token

# The dtypes of the products' operands and of the stream between layers.
DTYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "autocast": (torch.bfloat16, torch.float32),
    "float32": (torch.float32, torch.float32),
}


def problems(model: str, dtype: str, batch: int, device: torch.device, tokens: int = TOKENS) -> Iterator[Problem]:
    """The launches of one encoder layer, forward and backward, on random numbers.

    Args:
        model, dtype: names in ``MODELS`` and ``DTYPES``.
        batch, tokens: images, and tokens of each.
    """
    from crate_kernels.products.op import operands
    from crate_kernels.products.operand import Norm
    from crate_kernels.products.triton import gradients, project
    from crate_kernels.shared_attention import triton as attention

    (width, heads), (operand, stream), rows = MODELS[model], DTYPES[dtype], batch * tokens
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def problem(name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Problem:
        def run() -> tuple[Tensor, ...]:
            results = call(*args, **kwargs)
            return tuple(t for t in (results if isinstance(results, tuple) else (results,)) if t is not None)

        return Problem(f"{name} of {model}, {dtype}", operand, run)

    def of_heads(matrix: Tensor) -> Tensor:
        return matrix.view(batch, tokens, heads, width // heads).transpose(1, 2)

    norm = Norm(1 + 0.1 * random(width), 0.1 * random(width), 1e-5)
    matrices = [random(width, width) * width**-0.5 for _ in range(3)]
    qkv, out, step = operands(matrices, [None, random(width), None], [norm, None, norm], operand)
    x, grad, (attended, grad_w) = (
        random(rows, width, dtype=stream),
        random(rows, width, dtype=stream),
        (random(rows, width, dtype=operand) for _ in range(2)),
    )
    sparse = dict(norm=norm, threshold=torch.tensor(0.05))
    forward = dict(skip=x, skip_norm=True, **sparse)
    w, w_stats = project(x, qkv, operand, norm=norm)
    y, y_stats = project(x, step, stream, **forward)
    yield problem("projection with LayerNorm", project, x, qkv, operand, norm=norm)
    yield problem("output projection", project, attended, out, stream, skip=x)
    yield problem("ISTA", project, x, step, stream, **forward)
    of_input = dict(need_matrix=False, need_column=False)
    of_sparse = dict(y=y, stats=y_stats, skip=True, **sparse, **of_input)
    of_qkv = dict(y=w, norm=norm, stats=w_stats, extra=grad, **of_input)
    of_heads_delta = dict(heads=(batch, heads), **of_input)
    yield problem("projection's gradient", gradients, grad_w, x, qkv, stream, **of_qkv)
    yield problem("output projection's gradient", gradients, grad, attended, out, operand, **of_heads_delta)
    yield problem("ISTA's gradient", gradients, grad, x, step, stream, **of_sparse)
    scale = (width // heads) ** -0.5
    heads_out, lse = attention.forward(of_heads(w), scale, False)
    yield problem("attention", attention.forward, of_heads(w), scale, False)
    yield problem(
        "attention's gradient", attention.backward, of_heads(grad_w), of_heads(w), heads_out, lse, scale, False
    )


def cuda_timer(device: torch.device, rounds: int = 25) -> Timer:
    """Medians of ``rounds`` times by CUDA events, each call's begun with a cold L2 cache and a busy device."""
    # Clearing it evicts L2, and takes longer than the host needs to start the call.
    scratch = torch.empty(2**28, dtype=torch.int32, device=device)

    def once(call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scratch.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def timer(calls: Sequence[Callable[[], object]]) -> list[float]:
        turns = [[once(call) for call in calls] for _ in range(rounds + 2)][2:]  # two to warm up
        return [statistics.median(times) for times in zip(*turns, strict=True)]

    return timer


def tune(posed: Sequence[Problem], timer: Timer, seconds: float) -> list[Finding]:
    """Searches a tile for every key that the problems' launches select by, within about ``seconds``, saying how it goes.

    Raises:
        RuntimeError: in a process of a distributed job: ranks that tune for themselves pick different tiles.
    """
    if _is_rank():
        raise RuntimeError(f"tuning {_ALONE}")
    asked = [(problem, keys_of(problem)) for problem in posed]
    shipped = {key: tile for _, selected in asked for key, tile in selected.items()}
    findings, end = [], time.monotonic() + seconds
    with tqdm(shipped.items(), unit="key") as bar:
        for key, tile in bar:

            def tell(candidate: tiles.Tile, objection: str | None, key: tuple = key) -> None:
                bar.set_postfix_str(f"{_text(key)}: {_text(candidate)}")
                if objection:
                    bar.write(f"rejected: {_text(key)}: {_text(candidate)}: {objection}", file=sys.stderr)

            share = (end - time.monotonic()) / (len(shipped) - len(findings))
            using = [problem for problem, selected in asked if key in selected]
            findings.append(search(key, tile, using, timer, share, tell))
    return findings


def report(findings: Sequence[Finding]) -> str:
    """A line a key: what won, and what it gained."""
    lines = []
    for found in findings:
        counts = f"{found.tried} tried, {len(found.rejected)} rejected" + ", out of time" * found.out_of_time
        if found.ms is None or found.tile == found.shipped:
            lines.append(f"{_text(found.key)}: stays {_text(found.shipped)} ({counts})")
        else:
            gain = f"{found.shipped_ms:.4f} ms -> {found.ms:.4f} ms, {found.shipped_ms / found.ms - 1:.0%} faster"
            lines.append(f"{_text(found.key)}: {_text(found.shipped)} -> {_text(found.tile)}, {gain} ({counts})")
    return "\n".join(lines)


def save(
    file: Path, findings: Sequence[Finding], kept: Sequence[dict[str, Any]], device: torch.device, **about: Any
) -> None:
    """Writes what changed, what it was measured with, and of the entries ``kept`` those whose keys were not tuned this time."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    tuned = [list(found.key) for found in findings]
    measured = {"date": now, "driver": _driver(), "torch": torch.__version__, **about}
    entries = [entry for entry in kept if entry["key"] not in tuned]
    for found in findings:
        if found.tile != found.shipped:
            times = {"ms": found.ms, "shipped_ms": found.shipped_ms}
            entries.append(
                {"key": found.key, "tile": found.tile, "shipped": found.shipped, **times, "measured": measured}
            )
    cache.write(file, {"for": cache.identity(device), "tiles": entries})


def show(file: Path | None, device: torch.device | None) -> None:
    """Prints for which device a cache was made and what it holds, or, of the device's own cache, the tiles then in force.

    Args:
        file: the cache; None for that of ``device``, or without a device for every one in the user's cache folder.

    Raises:
        cache.CacheError: a file is no cache.
    """
    for one in _files(file, device):
        if not one.exists():
            print(f"{one}: there is none")
            continue
        content = cache.read(one)
        made_for = ", ".join(f"{name} {value}" for name, value in content["for"].items())
        print(f"{one}: {len(content['tiles'])} tiles for {made_for}")
        if file or device is None:
            for entry in content["tiles"]:
                print(f"{'cache':8} {_text(tuple(entry['key']))}: {_text(entry['tile'])}")
    if file is None and device is not None:
        for key, (source, tile) in tiles.in_force(device).items():
            print(f"{source:8} {_text(key)}: {_text(tile)}")
        print(f"fingerprint {tiles.fingerprint(device)}")


def clear(file: Path | None, device: torch.device | None) -> None:
    """Deletes what ``show`` shows, readable or not, and says so."""
    for one in _files(file, device):
        print(f"{one}: {'deleted' if one.exists() else 'there is none'}")
        one.unlink(missing_ok=True)


def _files(file: Path | None, device: torch.device | None) -> list[Path]:
    if file or device:
        return [file or cache.location(device)]
    files = cache.locations()
    if not files:
        print("no CUDA device, and no cache of any in the user's cache folder")
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 0, or by ``SystemExit`` 2 where it cannot run."""
    parser = argparse.ArgumentParser("python -m crate_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["crate_mae_base"], help="whose shapes count")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="autocast: bfloat16 products, float32 stream"
    )
    parser.add_argument("--batch", type=int, default=64, help="images (64)")
    parser.add_argument("--seconds", type=float, default=1200.0, help="no candidate is begun later (1200)")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"the cache to write, show or clear; else {cache.VARIABLE} or the user's cache folder",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="print the tiles in force, and tune nothing")
    instead.add_argument("--clear", action="store_true", help="delete the cache, and tune nothing")
    options = parser.parse_args(arguments)
    for name in ("batch", "seconds"):
        if getattr(options, name) <= 0:
            parser.error(f"argument --{name}: expected above 0, got {getattr(options, name)}")

    device = _device()
    try:
        if options.clear:
            clear(options.output, device)
            return 0
        if options.show:
            show(options.output, device)
            return 0
        if device is None:
            parser.error("needs a CUDA device, and PyTorch sees none")
        if _is_rank():
            parser.error(_ALONE)
        file = options.output or cache.location(device)
        kept = cache.entries(file, device)
    except cache.CacheError as error:
        parser.error(str(error))
    with tiles.trial({}):  # what an earlier tuning found does not count
        posed = [
            p
            for model in options.models
            for dtype in options.dtypes
            for p in problems(model, dtype, options.batch, device)
        ]
    findings = tune(posed, cuda_timer(device), options.seconds)
    print(report(findings))
    save(file, findings, kept, device, models=options.models, dtypes=options.dtypes, batch=options.batch)
    print(f"wrote {file}")
    return 0


_ALONE = "runs in one process alone: the ranks of a distributed job would pick different tiles"


def _is_rank() -> bool:
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return initialized or int(os.environ.get("WORLD_SIZE") or 1) > 1


def _device() -> torch.device | None:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _driver() -> str | None:
    """As nvidia-smi says; None where it is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _text(value: tuple | tiles.Tile) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else " ".join(f"{k}={v}" for k, v in value.items())


if __name__ == "__main__":
    sys.exit(main())
