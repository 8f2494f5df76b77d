"""Finds faster tiles for this machine's GPU and saves them in a cache, from which every later process takes them.

    python -m crate_kernels.tune                                    # CRATE-MAE-Base in bfloat16, 64 images
    python -m crate_kernels.tune --models crate_mae_small crate_mae_base --dtypes bfloat16 autocast --batch 128
    python -m crate_kernels.tune --seconds 480 --output tiles.json --archive tiles.tar.gz    # for a GPU that is there for minutes
    python -m crate_kernels.tune --show                             # the tiles in force, and where they come from
    python -m crate_kernels.tune --clear                            # back to the shipped tiles

The cache is a file in the user's cache folder, one for each device name, or the file that the environment variable
CRATE_KERNELS_CACHE names. It is used only with the device, Triton, package and shipped tables that it was made with. Other tiles
add numbers in another order, so results differ in their last bits: copy one file to all machines of a distributed job. The
processes of such a job never tune. The cache is saved after each key: an interrupt loses the key at work.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from crate_kernels import tiles
from crate_kernels.files import replaced
from crate_kernels.tiles import cache
from crate_kernels.tiles.neighbours import neighbours

if TYPE_CHECKING:  # Triton is imported where it is needed: --show and --clear need none
    from crate_kernels.tiles.compiling import Compilers, Request

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
    """The launches of one encoder layer, forward and backward, and the one that differs in a decoder's, on random numbers.

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
    (w, w_moments, _), (y, y_moments, _) = projection(), ista()
    heads_out, lse = attention.attend(of_heads(w), scale)

    def gradient_of_output() -> tuple[Tensor, Tensor]:
        dx = (found := input_gradient(grad, attended, out, operand, scores=(lse, scale))).x
        assert dx is not None
        if found.row_pairs is not None:
            return dx, found.row_pairs
        return dx, attention.row_pairs(of_heads(dx), of_heads(attended), lse, scale)

    def gradient_of_attention() -> Tensor:
        pairs = attention.row_pairs(of_heads(grad_w), heads_out, lse, scale)
        return attention.gradient(of_heads(grad_w), of_heads(w), pairs, scale)

    runs: dict[str, Callable[[], Any]] = {
        "projection": projection,
        "attention": lambda: attention.attend(of_heads(w), scale),
        "output projection": lambda: project(attended, out, stream, skip=x, parts_for=operand).out,
        "output projection of a decoder": lambda: project(attended, out, stream, skip=x, negate=True).out,
        "ISTA": ista,
        "ISTA's gradient": partial(
            input_gradient, grad, x, step, stream, y=y, moments=y_moments, norm=norm, threshold=threshold, skip=True
        ),
        "output projection's gradient": gradient_of_output,
        "attention's gradient": gradient_of_attention,
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


def search(
    key: tuple, shipped: tiles.Tile, launched: Sequence[Launch], seconds: float, compilers: Compilers | None = None
) -> Finding:
    """The tile for ``key`` that makes ``launched``, taken together, fastest: by steps that each gain 3%.

    The fastest of many measurements may be a lucky one. The winner therefore has to gain 3% once more, against the shipped tile.

    Args:
        key: what the launches look their tile up by.
        shipped: the tile to start from, whose results are the right ones.
        launched: the launches that use the key.
        seconds: no tile is begun later than this.
        compilers: they compile all tiles that are next, while the first of them run. Without them each is compiled as it runs.

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
    ahead = _ahead(key, untried, launched, compilers)
    while untried and time.monotonic() < deadline:
        tile = untried.pop(0)
        failures = compilers.failures(ahead.pop(0), deadline - time.monotonic()) if compilers else []
        if failures is None:
            untried.insert(0, tile)
            break
        seen.append(tile)
        if objection := next(iter(failures), None) or _objection(key, tile, launched, expected):
            rejected.append((tile, objection))
        elif _gains(*race(best, tile)):
            best, untried = tile, [other for other in neighbours(tile) if other not in seen]
            ahead = _ahead(key, untried, launched, compilers)
    times = race(shipped, best) if best != shipped else None
    if times and not _gains(*times):
        best, times = shipped, None
    return Finding(key, best, times, len(seen) - 1, rejected, out_of_time=bool(untried))


def _ahead(
    key: tuple, choices: Sequence[tiles.Tile], launched: Sequence[Launch], compilers: Compilers | None
) -> list[list[Request]]:
    """Has the kernels of all these tiles compiled, and returns at once: the kernels of each."""
    found: list[list[Request]] = []
    if compilers is None:
        return found
    for tile in choices:
        found.append(_asked_for({key: tile}, lambda: [launch.run() for launch in launched]))
        compilers.ask(found[-1])
    return found


def _asked_for(trial: Mapping[tuple, tiles.Tile], run: Callable[[], object]) -> list[Request]:
    """The kernels that ``run`` would have to compile with these tiles. They do not run, so its results are of no use."""
    from crate_kernels.tiles.compiling import asked

    # What raises here raises again when the tile is tried, and is told then.
    with tiles.trial(trial), asked() as requests, suppress(Exception):
        run()
    return requests


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


def by_worth(launched: Iterable[Launch]) -> dict[tuple, tuple[tiles.Tile, list[Launch], float]]:
    """For every key that the launches look up, the shipped tile, the launches that use it, and the milliseconds that these take
    with it, taken together. Those that take longest come first: a step has as many of each launch."""
    found: dict[tuple, tuple[tiles.Tile, list[Launch], float]] = {}
    for launch in launched:
        with tiles.trial({}) as selected:
            launch.run()
        for key, tile in selected.items():
            _, before, ms = found.get(key, (tile, [], 0.0))
            found[key] = tile, [*before, launch], ms + milliseconds(launch, key, [tile])[0]
    return dict(sorted(found.items(), key=lambda item: -item[1][2]))


def tune(launched: Iterable[Launch], seconds: float, compilers: Compilers | None = None) -> Iterator[Finding]:
    """Searches a tile for every key that the launches look up, the keys that take longest first, within about ``seconds``, and
    prints what it finds.

    What is left of a key's share of the time goes to those after it. A key is begun only if there is time for a tile of it, which
    may take as long as those before. The others are named at the end.
    """
    end = time.monotonic() + seconds
    keys = by_worth(launched)
    longest = 0.0  # seconds a tile, of the slowest search
    late: list[tuple] = []
    for index, (key, (tile, using, ms)) in enumerate(
        tqdm(keys.items(), unit="key", disable=None)
    ):  # only on a terminal
        begin = time.monotonic()
        if end - begin <= longest:
            late.append(key)
            continue
        yield (found := search(key, tile, using, (end - begin) / (len(keys) - index), compilers))
        longest = max(longest, (time.monotonic() - begin) / (found.tried + 1))
        for other, objection in found.rejected:
            tqdm.write(f"rejected: {_text(key)}: {_text(other)}: {objection}", file=sys.stderr)
        result = f"stays {_text(tile)}, {ms:.4f} ms"
        if found.times:
            before, after = found.times
            gain = f"{before:.4f} ms -> {after:.4f} ms, {before / after - 1:.0%} faster"
            result = f"{_text(tile)} -> {_text(found.tile)}, {gain}"
        counts = f"{found.tried} tried, {len(found.rejected)} rejected" + ", out of time" * found.out_of_time
        tqdm.write(f"{_text(key)}: {result} ({counts})")
    if late:
        print(f"not begun, for want of time: {', '.join(map(_text, late))}")


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
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (cores)")
    parser.add_argument(
        "--archive",
        type=Path,
        help="a .tar.gz that gets the cache in the end, however that comes; else results-tune.tar.gz in the folder that $OUT "
        "names; else none",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="print the tiles in force, and tune nothing")
    instead.add_argument("--clear", action="store_true", help="delete the cache, and tune nothing")
    options = parser.parse_args(arguments)
    for name in ("batch", "seconds", "jobs"):
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
    begin = time.monotonic()

    def all_launches() -> list[Launch]:
        pairs = itertools.product(options.models, options.dtypes)
        return [launch for pair in pairs for launch in launches(*pair, options.batch, device)]

    with _compilers(options.jobs) as compilers, _archived(options.archive, file):
        if compilers:
            compilers.failures(_asked_for({}, lambda: [launch.run() for launch in all_launches()]), options.seconds)
        for found in tune(all_launches(), options.seconds - (time.monotonic() - begin), compilers):
            kept[found.key] = dict(found.tile)
            cache.write(file, kept, device)
    print(f"wrote {file}")
    return 0


def _compilers(jobs: int) -> AbstractContextManager[Compilers | None]:
    """Processes that compile; none where Triton's interpreter stands in for the device."""
    import triton

    from crate_kernels.tiles.compiling import Compilers

    return nullcontext() if triton.knobs.runtime.interpret else Compilers(jobs)


@contextmanager
def _archived(archive: Path | None, file: Path) -> Iterator[None]:
    """Makes the archive when the block ends, whatever ends it."""
    if archive is None and (folder := os.environ.get("OUT")):
        archive = Path(folder, "results-tune.tar.gz")
    try:
        yield
    finally:
        if archive is not None and file.exists():
            with replaced(archive) as written, tarfile.open(fileobj=written, mode="w:gz") as holding:
                holding.add(file, file.name)


def _refusal(device: torch.device) -> str | None:
    """Why this process cannot tune, if so."""
    in_a_job = torch.distributed.is_available() and torch.distributed.is_initialized()
    if in_a_job or int(os.environ.get("WORLD_SIZE") or 1) > 1:
        return "runs in one process alone: the ranks of a distributed job would pick different tiles"
    return None if device.type == "cuda" else "needs a CUDA device, and PyTorch sees none"


def _text(value: tuple | tiles.Tile) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else " ".join(f"{k}={v}" for k, v in value.items())


if __name__ == "__main__":
    # An end asked for from outside unwinds like Ctrl-C: the archive is made, and no process is left.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
