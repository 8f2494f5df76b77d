"""Finds faster tiles for this machine's GPU and saves them in a cache, from which every later process takes them.

    python -m crate_kernels.tune                                    # CRATE-MAE-Base in bfloat16, 64 images
    python -m crate_kernels.tune --models crate_mae_small crate_mae_base --dtypes bfloat16 autocast --batch 128
    python -m crate_kernels.tune --show                             # the tiles in force, and where they come from
    python -m crate_kernels.tune --clear                            # back to the shipped tiles

The cache is a file in the user's cache folder, one for each device name, or the file that the environment variable
CRATE_KERNELS_CACHE names. It is used only with the device, Triton, package and shipped tables that it was made with. Other tiles
add numbers in another order, so results differ in their last bits: copy one file to all machines of a distributed job. The
processes of such a job never tune.
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from crate_kernels import tiles
from crate_kernels.tiles import cache

# Width and number of heads. This package does not import the models, it only knows their shapes.
MODELS = {
    "crate_mae_tiny": (384, 6),
    "crate_mae_small": (576, 12),
    "crate_mae_base": (768, 12),
    "crate_mae_large": (1024, 16),
}
TOKENS = 197  # 14 x 14 patches of 16 x 16 pixels, and the class token

# The dtypes of the products' operands and of the stream between layers.
DTYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "autocast": (torch.bfloat16, torch.float32),
    "float32": (torch.float32, torch.float32),
}

LEAST_GAIN = 0.03

# The relative rounding error in which the results of two tiles may differ: that of 16-bit results and, for float32, that of sums
# of some ten thousand terms in two orders.
_ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-17}

# The values that the search tries, for each option of a tile.
_SIDES = (16, 32, 64, 128, 256)
_OPTIONS = {
    "GROUP": (4, 8, 16),
    "PARTS": (1, 2, 4),
    "LIBRARY": (0, 1),
    "num_warps": (2, 4, 8),
    "num_stages": range(1, 6),
}
_MOST_ACCUMULATORS = 128  # float32 numbers in the registers of a thread, which has 255


class Launch(NamedTuple):
    """Something to be made faster: its name, the dtype of its operands, and a call that runs it. The call returns a tensor, or a
    tuple of tensors and Nones. Once run, it can be captured in a CUDA graph."""

    name: str
    dtype: torch.dtype
    run: Callable[[], Any]


class Finding(NamedTuple):
    """The result of the search for one key.

    ``tile`` is the winner. Where it is not the shipped one, ``times`` are the milliseconds of both, the shipped one's first.
    ``rejected`` has the tiles that failed, each with the reason.
    """

    key: tuple
    tile: tiles.Tile
    times: tuple[float, float] | None
    tried: int
    rejected: list[tuple[tiles.Tile, str]]
    out_of_time: bool


def launches(model: str, dtype: str, batch: int, device: torch.device, tokens: int = TOKENS) -> list[Launch]:
    """The launches of one encoder layer, forward and backward, on random numbers.

    Args:
        model, dtype: names in ``MODELS`` and ``DTYPES``.
        batch, tokens: the number of images, and of tokens of each.
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
    threshold = torch.tensor(0.05)

    # The calls of several launches; of a gradient only what a tile of ``input_gradient`` computes.
    projection = partial(project, x, qkv, operand, norm=norm)
    ista = partial(project, x, step, stream, norm=norm, skip=x, skip_norm=True, threshold=threshold)
    input_gradient = partial(gradients, need_matrix=False, need_column=False)
    (w, w_moments), (y, y_moments) = projection(), ista()
    heads_out, lse = attention.forward(of_heads(w), scale, False)

    def gradient_of_output() -> tuple[Tensor, Tensor]:
        dx = (found := input_gradient(grad, attended, out, operand, heads=(batch, heads))).x
        assert dx is not None
        return dx, attention.rows_of_delta(of_heads(dx), of_heads(attended)) if found.delta is None else found.delta

    runs: dict[str, Callable[[], Any]] = {
        "projection": projection,
        "attention": lambda: attention.forward(of_heads(w), scale, False),
        "output projection": lambda: project(attended, out, stream, skip=x),
        "ISTA": ista,
        "ISTA's gradient": partial(
            input_gradient, grad, x, step, stream, y=y, moments=y_moments, norm=norm, threshold=threshold, skip=True
        ),
        "output projection's gradient": gradient_of_output,
        "attention's gradient": lambda: attention.backward(of_heads(grad_w), of_heads(w), heads_out, lse, scale, False),
        "projection's gradient": partial(
            input_gradient, grad_w, x, qkv, stream, y=w, moments=w_moments, norm=norm, extra=grad
        ),
    }
    return [Launch(f"{name} of {model}, {dtype}", operand, run) for name, run in runs.items()]


def milliseconds(launch: Launch, key: tuple, choices: Sequence[tiles.Tile]) -> list[float]:
    """The median time of a launch with each of the tiles for ``key``. All of them must have run before, and so be compiled.

    ``do_bench`` empties the L2 cache before each run. What it times is a CUDA graph, because the host may take longer to start
    the kernels than they run. The tiles take turns, so that a clock that changes meanwhile changes all their times.
    """
    from triton.testing import do_bench

    graphs = []
    for tile in choices:
        graphs.append(torch.cuda.CUDAGraph())
        with tiles.trial({key: tile}), torch.cuda.graph(graphs[-1]):
            launch.run()
    turns = [[do_bench(graph.replay, warmup=5, rep=20, return_mode="median") for graph in graphs] for _ in range(3)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def neighbours(tile: tiles.Tile) -> list[dict[str, int]]:
    """The tiles one step away that a thread's registers can hold.

    A step takes the next smaller or larger value of one option, or of a side of the tile and the number of warps together.
    """
    moves = [(name,) for name in tile] + [(name, "num_warps") for name in tile if name.startswith("BLOCK_")]
    found = []
    for names, step in itertools.product(moves, (-1, 1)):
        values = {name: _OPTIONS.get(name, _SIDES) for name in names}
        places = {name: values[name].index(tile[name]) + step for name in names}
        if all(0 <= place < len(values[name]) for name, place in places.items()):
            found.append({**tile, **{name: values[name][place] for name, place in places.items()}})
    return [other for other in found if _fits(other)]


def _fits(tile: tiles.Tile) -> bool:
    """Whether the accumulators of the largest product fit, that of the two longest sides."""
    sides = sorted(value for name, value in tile.items() if name.startswith("BLOCK_"))[-2:]
    return len(sides) < 2 or sides[0] * sides[1] <= _MOST_ACCUMULATORS * 32 * tile["num_warps"]


def search(key: tuple, shipped: tiles.Tile, launched: Sequence[Launch], seconds: float) -> Finding:
    """The tile for ``key`` that makes ``launched``, taken together, fastest: by steps that each gain 3%.

    The fastest of many measurements may be a lucky one. The winner therefore has to gain 3% once more, against the shipped tile.

    Args:
        key: what the launches look their tile up by.
        shipped: the tile to start from, whose results are the right ones.
        launched: the launches that use the key.
        seconds: no tile is begun later than this.

    Raises:
        RuntimeError: a result of the shipped tile is not finite.
    """
    deadline = time.monotonic() + seconds
    expected = [_results(launch, key, shipped) for launch in launched]
    for launch, results in zip(launched, expected, strict=True):
        if not all(result.isfinite().all() for result in results):
            raise RuntimeError(f"{launch.name}: a result of the shipped tile is not finite")

    def race(before: tiles.Tile, after: tiles.Tile) -> tuple[float, float]:
        times = [milliseconds(launch, key, (before, after)) for launch in launched]
        return sum(one for one, _ in times), sum(other for _, other in times)

    best, seen, untried = shipped, [shipped], neighbours(shipped)
    rejected: list[tuple[tiles.Tile, str]] = []
    while untried and time.monotonic() < deadline:
        tile = untried.pop(0)
        seen.append(tile)
        if objection := _objection(key, tile, launched, expected):
            rejected.append((tile, objection))
        elif _gains(*race(best, tile)):
            best, untried = tile, [other for other in neighbours(tile) if other not in seen]
    times = race(shipped, best) if best != shipped else None
    if times and not _gains(*times):
        best, times = shipped, None
    return Finding(key, best, times, len(seen) - 1, rejected, out_of_time=bool(untried))


def _gains(before: float, after: float) -> bool:
    return after <= (1 - LEAST_GAIN) * before


def _objection(
    key: tuple, tile: tiles.Tile, launched: Sequence[Launch], expected: Sequence[list[Tensor]]
) -> str | None:
    """Why the tile must not be used, if so: it does not compile or launch, or its results are not those of the shipped tile."""
    for launch, truth in zip(launched, expected, strict=True):
        try:
            for result, true in zip(_results(launch, key, tile), truth, strict=True):
                # Allowed are two roundings of the result, and eight of a typical number in its sum. NaN is never close.
                unit, typical = _ROUNDING[launch.dtype], true.float().square().mean().sqrt().item()
                torch.testing.assert_close(result.float(), true.float(), rtol=2 * unit, atol=8 * unit * typical)
        except Exception as error:  # compilers, assemblers and drivers raise errors of their own
            return f"{launch.name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None


def _results(launch: Launch, key: tuple, tile: tiles.Tile) -> list[Tensor]:
    """The results of a launch, with every ``torch.empty`` filled with NaN. Otherwise a tile that writes nothing would look right,
    in memory where the previous tile wrote its results."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        with tiles.trial({key: tile}):
            results = launch.run()
    finally:
        torch.set_deterministic_debug_mode(mode)
    return [result for result in (results if isinstance(results, tuple) else (results,)) if result is not None]


def tune(launched: Iterable[Launch], seconds: float) -> list[Finding]:
    """Searches a tile for every key that the launches look up, within about ``seconds``, and prints what it finds."""
    by_key: dict[tuple, list[Launch]] = defaultdict(list)
    shipped: dict[tuple, tiles.Tile] = {}
    for launch in launched:
        with tiles.trial({}) as selected:
            launch.run()
        shipped |= selected
        for key in selected:
            by_key[key].append(launch)
    findings: list[Finding] = []
    end = time.monotonic() + seconds
    for key, tile in tqdm(shipped.items(), unit="key", disable=None):  # only on a terminal
        share = (end - time.monotonic()) / (len(shipped) - len(findings))
        findings.append(found := search(key, tile, by_key[key], share))
        for other, objection in found.rejected:
            tqdm.write(f"rejected: {_text(key)}: {_text(other)}: {objection}", file=sys.stderr)
        result = f"stays {_text(tile)}"
        if found.times:
            before, after = found.times
            gain = f"{before:.4f} ms -> {after:.4f} ms, {before / after - 1:.0%} faster"
            result = f"{_text(tile)} -> {_text(found.tile)}, {gain}"
        counts = f"{found.tried} tried, {len(found.rejected)} rejected" + ", out of time" * found.out_of_time
        tqdm.write(f"{_text(key)}: {result} ({counts})")
    return findings


def show(file: Path, device: torch.device, whole: bool) -> None:
    """Prints what a cache was made with; then all that it holds (``whole``), or else the tiles in force on ``device``.

    Raises:
        cache.CacheError: the file is no cache.
    """
    made_with, held = cache.read(file)
    header = f"{len(held)} tiles for {', '.join(f'{name} {value}' for name, value in made_with.items())}"
    print(f"{file}: {header if made_with else 'there is none'}")
    shown = {key: ("cache", tile) for key, tile in held.items()} if whole else tiles.in_force(device)
    for key, (source, tile) in shown.items():
        print(f"{source:8} {_text(key)}: {_text(tile)}")
    if not whole:
        print(f"fingerprint {tiles.fingerprint(device)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0; raises ``SystemExit`` with status 2 where it cannot run."""
    parser = argparse.ArgumentParser("python -m crate_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["crate_mae_base"], help="whose shapes count")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="autocast: bfloat16 products, float32 stream"
    )
    parser.add_argument("--batch", type=int, default=64, help="images (64)")
    parser.add_argument("--seconds", type=float, default=1200.0, help="no tile is begun later (1200)")
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
    try:  # now, and not only after the search
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        parser.error(f"{file}: cannot be written ({error.strerror})")
    pairs = itertools.product(options.models, options.dtypes)
    launched = [launch for pair in pairs for launch in launches(*pair, options.batch, device)]
    findings = tune(launched, options.seconds)
    cache.write(file, kept | {found.key: found.tile for found in findings}, device)
    print(f"wrote {file}")
    return 0


def _refusal(device: torch.device) -> str | None:
    """Why this process cannot tune, if so."""
    in_a_job = torch.distributed.is_available() and torch.distributed.is_initialized()
    if in_a_job or int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return "runs in one process alone: the ranks of a distributed job would pick different tiles"
    return None if device.type == "cuda" else "needs a CUDA device, and PyTorch sees none"


def _text(value: tuple | tiles.Tile) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else " ".join(f"{k}={v}" for k, v in value.items())


if __name__ == "__main__":
    sys.exit(main())
