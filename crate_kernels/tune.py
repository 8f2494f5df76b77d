"""Finds tiles for this machine's GPU and writes them to a cache, which every later process takes them from.

    python -m crate_kernels.tune                                    # CRATE-MAE-Base in bfloat16, 64 images
    python -m crate_kernels.tune --models crate_mae_small crate_mae_base --dtypes bfloat16 autocast --batch 128
    python -m crate_kernels.tune --show                             # what is in force, and where it comes from
    python -m crate_kernels.tune --clear                            # back to the shipped tiles

The file lies in the user's cache folder, one a device name, or where the environment variable CRATE_KERNELS_CACHE says. It
counts only with the device, Triton, package and shipped tables that it was made with. Other tiles add in another order, so
results differ in their last bits: copy one file to all machines of a job. Processes of a job (torchrun's) never tune.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from crate_kernels import tiles
from crate_kernels.tiles import cache

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

LEAST_GAIN = 0.03

# How much two tiles' results may differ, a unit: the last place of what they round to, and for float32 that of sums of some
# ten thousand terms in two orders.
_UNIT = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-17}

_SIDES = (16, 256)
_BOUNDS = {"GROUP": (4, 16), "PARTS": (1, 4), "LIBRARY": (0, 1), "num_warps": (2, 8), "num_stages": (1, 5)}
# Float32 accumulators a thread, of 255 registers.
_MOST_ACCUMULATORS = 128


class Problem(NamedTuple):
    """A launch to be made faster: what it is, the dtype of its operands, and a call that does it and returns its results, a
    tensor or a tuple with None for those it has not got."""

    name: str
    dtype: torch.dtype
    run: Callable[[], Any]


# Milliseconds of each call, timed in turns.
Timer = Callable[[Sequence[Callable[[], object]]], list[float]]


class Finding(NamedTuple):
    """What came of one key: the winner, where there is one its time beside the shipped tile's, and why others were rejected."""

    key: tuple
    shipped: tiles.Tile
    tile: tiles.Tile
    shipped_ms: float | None
    ms: float | None
    tried: int
    rejected: list[tuple[tiles.Tile, str]]
    out_of_time: bool


def problems(model: str, dtype: str, batch: int, device: torch.device, tokens: int = TOKENS) -> list[Problem]:
    """The launches of one encoder layer, forward and backward, on random numbers.

    Args:
        model, dtype: names in ``MODELS`` and ``DTYPES``.
        batch, tokens: images, and tokens of each.
    """
    from crate_kernels.products.launchers import gradients, project
    from crate_kernels.products.norm_folding import Norm
    from crate_kernels.products.op import operands
    from crate_kernels.shared_attention import triton as attention

    (width, heads), (operand, stream) = MODELS[model], DTYPES[dtype]
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def of_heads(matrix: Tensor) -> Tensor:
        return matrix.view(batch, tokens, heads, width // heads).transpose(1, 2)

    norm, scale = Norm(1 + 0.1 * random(width), 0.1 * random(width)), (width // heads) ** -0.5
    matrices = [random(width, width) * width**-0.5 for _ in range(3)]
    qkv, out, step = operands(matrices, [None, random(width), None], [norm, None, norm], operand)
    x, grad = (random(batch * tokens, width, dtype=stream) for _ in range(2))
    attended, grad_w = (random(batch * tokens, width, dtype=operand) for _ in range(2))
    sparse = dict(norm=norm, threshold=torch.tensor(0.05))
    w, w_stats = project(x, qkv, operand, norm=norm)
    y, y_stats = project(x, step, stream, skip=x, skip_norm=True, **sparse)
    heads_out, lse = attention.forward(of_heads(w), scale, False)
    of_x = dict(need_matrix=False, need_column=False)
    of_qkv = dict(y=w, norm=norm, stats=w_stats, extra=grad)

    def gradient_of_output() -> tuple[Tensor, Tensor]:
        found = gradients(grad, attended, out, operand, heads=(batch, heads), **of_x)
        delta = attention.rows_of_delta(of_heads(found.x), of_heads(attended)) if found.delta is None else found.delta
        return found.x, delta

    launches: dict[str, Callable[[], Any]] = {
        "projection": lambda: project(x, qkv, operand, norm=norm),
        "attention": lambda: attention.forward(of_heads(w), scale, False),
        "output projection": lambda: project(attended, out, stream, skip=x),
        "ISTA": lambda: project(x, step, stream, skip=x, skip_norm=True, **sparse),
        "ISTA's gradient": lambda: gradients(grad, x, step, stream, y=y, stats=y_stats, skip=True, **sparse, **of_x),
        "output projection's gradient": gradient_of_output,
        "attention's gradient": lambda: attention.backward(of_heads(grad_w), of_heads(w), heads_out, lse, scale, False),
        "projection's gradient": lambda: gradients(grad_w, x, qkv, stream, **of_qkv, **of_x),
    }
    return [Problem(f"{name} of {model}, {dtype}", operand, launch) for name, launch in launches.items()]


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


def neighbours(tile: tiles.Tile) -> list[dict[str, int]]:
    """Tiles one step away: a stage more or less, the library's product or the kernel's own, another number halved or doubled,
    a side also together with the warps. All within bounds, and the largest product's accumulators within the registers."""
    moves, warps = [], tile["num_warps"]
    for name, value in tile.items():
        less, more = (value - 1, value + 1) if name in ("num_stages", "LIBRARY") else (value // 2, value * 2)
        moves += [{name: less}, {name: more}]
        if name.startswith("BLOCK_"):
            moves += [{name: less, "num_warps": warps // 2}, {name: more, "num_warps": warps * 2}]
    return [other for move in moves if _possible(other := {**tile, **move})]


def _possible(tile: tiles.Tile) -> bool:
    bounds = [(value, *_BOUNDS.get(name, _SIDES)) for name, value in tile.items()]
    sides = sorted(value for name, value in tile.items() if name.startswith("BLOCK_"))[-2:]
    fits = len(sides) < 2 or sides[0] * sides[1] <= _MOST_ACCUMULATORS * 32 * tile["num_warps"]
    return fits and all(least <= value <= most for value, least, most in bounds)


def search(key: tuple, shipped: tiles.Tile, problems: Sequence[Problem], timer: Timer, seconds: float) -> Finding:
    """The tile for ``key`` that ``problems`` together take least time with, by steps that each gain 3%.

    The winner of many may be a lucky one: it has to win by 3% again, against the shipped tile alone.

    Args:
        seconds: no candidate is begun later than this.

    Raises:
        RuntimeError: a result of the shipped tile is not finite.
    """
    deadline = time.monotonic() + seconds
    expected = [_results(problem, key, shipped) for problem in problems]
    for problem, results in zip(problems, expected, strict=True):
        if not all(result.isfinite().all() for result in results):
            raise RuntimeError(f"{problem.name}: a result of the shipped tile is not finite")

    def race(*pair: tiles.Tile) -> list[float]:
        times = [timer([tiles.trial({key: tile})(problem.run) for tile in pair]) for problem in problems]
        return [sum(each) for each in zip(*times, strict=True)]

    best, seen, rejected, untried = shipped, [shipped], [], neighbours(shipped)
    while untried and time.monotonic() < deadline:
        tile = untried.pop(0)
        seen.append(tile)
        if objection := _objection(key, tile, problems, expected):
            rejected.append((tile, objection))
        elif _gains(*race(best, tile)):
            best, untried = tile, [other for other in neighbours(tile) if other not in seen]
    times = None, None
    if best != shipped and not _gains(*(times := race(shipped, best))):
        best = shipped
    return Finding(key, shipped, best, *times, len(seen) - 1, rejected, out_of_time=bool(untried))


def _gains(before: float, after: float) -> bool:
    return after <= (1 - LEAST_GAIN) * before


def _objection(
    key: tuple, tile: tiles.Tile, problems: Sequence[Problem], expected: Sequence[list[Tensor]]
) -> str | None:
    """Why the tile cannot be taken: it does not compile or launch, or a result is not the shipped tile's."""
    for problem, truth in zip(problems, expected, strict=True):
        try:
            for result, true in zip(_results(problem, key, tile), truth, strict=True):
                # Two roundings of the result, and eight of a typical element within its sum; NaN is never close.
                unit, typical = _UNIT[problem.dtype], true.float().square().mean().sqrt().item()
                torch.testing.assert_close(result.float(), true.float(), rtol=2 * unit, atol=8 * unit * typical)
        except Exception as error:  # compilers, ptxas and drivers each have their own
            return f"{problem.name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None


def _results(problem: Problem, key: tuple, tile: tiles.Tile) -> list[Tensor]:
    """With NaN in every ``torch.empty``: memory that the previous tile filled would make one that writes nothing look right."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        results = tiles.trial({key: tile})(problem.run)()
    finally:
        torch.set_deterministic_debug_mode(mode)
    return [result for result in (results if isinstance(results, tuple) else (results,)) if result is not None]


def tune(posed: Iterable[Problem], timer: Timer, seconds: float) -> list[Finding]:
    """Searches a tile for every key that the problems' launches select by, within about ``seconds``, and prints what it finds."""
    asked: dict[tuple, list[Problem]] = defaultdict(list)
    shipped: dict[tuple, tiles.Tile] = {}
    for problem in posed:
        with tiles.trial({}) as selected:
            problem.run()
        shipped |= selected
        for key in selected:
            asked[key].append(problem)
    findings, end = [], time.monotonic() + seconds
    for key, tile in tqdm(shipped.items(), unit="key", disable=None):  # shown on a terminal only
        share = (end - time.monotonic()) / (len(shipped) - len(findings))
        found = search(key, tile, asked[key], timer, share)
        for other, objection in found.rejected:
            tqdm.write(f"rejected: {_text(key)}: {_text(other)}: {objection}", file=sys.stderr)
        gain = f"stays {_text(tile)}"
        if found.tile != tile:
            times = f"{found.shipped_ms:.4f} ms -> {found.ms:.4f} ms, {found.shipped_ms / found.ms - 1:.0%} faster"
            gain = f"{_text(tile)} -> {_text(found.tile)}, {times}"
        counts = f"{found.tried} tried, {len(found.rejected)} rejected" + ", out of time" * found.out_of_time
        tqdm.write(f"{_text(key)}: {gain} ({counts})")
        findings.append(found)
    return findings


def show(file: Path, device: torch.device, whole: bool) -> None:
    """Prints for which device a cache was made; and the ``whole`` of what it holds, or else the tiles in force on ``device``.

    Raises:
        cache.CacheError: the file is no cache.
    """
    made_for, held = cache.read(file)
    said = f"{len(held)} tiles for {', '.join(f'{name} {value}' for name, value in made_for.items())}"
    print(f"{file}: {said if made_for else 'there is none'}")
    shown = {key: ("cache", tile) for key, tile in held.items()} if whole else tiles.in_force(device)
    for key, (source, tile) in shown.items():
        print(f"{source:8} {_text(key)}: {_text(tile)}")
    if not whole:
        print(f"fingerprint {tiles.fingerprint(device)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 0, or by ``SystemExit`` 2 where it cannot run."""
    parser = argparse.ArgumentParser("python -m crate_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["crate_mae_base"], help="whose shapes count")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="autocast: bfloat16 products, float32 stream"
    )
    parser.add_argument("--batch", type=int, default=64, help="images (64)")
    parser.add_argument("--seconds", type=float, default=1200.0, help="no candidate is begun later (1200)")
    parser.add_argument("--output", type=Path, help=f"the cache; else {cache.VARIABLE} or the user's cache folder")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="print the tiles in force, and tune nothing")
    instead.add_argument("--clear", action="store_true", help="delete the cache, and tune nothing")
    options = parser.parse_args(arguments)
    for name in ("batch", "seconds"):
        if getattr(options, name) <= 0:
            parser.error(f"argument --{name}: expected above 0, got {getattr(options, name)}")

    device = tiles.this_device()
    file = options.output or cache.location(device)
    try:
        if options.clear:
            print(f"{file}: {'deleted' if cache.clear(file) else 'there is none'}")
            return 0
        if options.show:
            show(file, device, whole=options.output is not None)
            return 0
        kept = cache.load(file, device)
    except cache.CacheError as error:
        parser.error(str(error))
    if refusal := _refusal(device):
        parser.error(refusal)
    try:  # before the search, not after it
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        parser.error(f"{file}: cannot be written ({error.strerror})")
    pairs = itertools.product(options.models, options.dtypes)
    posed = [problem for pair in pairs for problem in problems(*pair, options.batch, device)]
    findings = tune(posed, cuda_timer(device), options.seconds)
    cache.write(file, kept | {found.key: found.tile for found in findings}, device)
    print(f"wrote {file}")
    return 0


def _refusal(device: torch.device) -> str | None:
    """Why this process must not tune, if it must not."""
    in_a_job = torch.distributed.is_available() and torch.distributed.is_initialized()
    if in_a_job or int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return "runs in one process alone: the ranks of a distributed job would pick different tiles"
    return None if device.type == "cuda" else "needs a CUDA device, and PyTorch sees none"


def _text(value: tuple | tiles.Tile) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else " ".join(f"{k}={v}" for k, v in value.items())


if __name__ == "__main__":
    sys.exit(main())
