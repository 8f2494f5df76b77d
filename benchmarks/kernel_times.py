"""How long each operator takes at CRATE-MAE-Base's shapes, beside PyTorch's attention and cuBLAS's products.

    python -m benchmarks.kernel_times attention ista mssa ceilings
    python -m benchmarks.kernel_times ista --once      # our operator alone and nothing timed, for compute-sanitizer

A time is that of one input set, of several that are together larger than the L2 cache and take turns. On a GPU they are
captured in one CUDA graph, so that no host time counts; where capturing fails, the row says so and has events instead.
Outputs and gradients are compared with float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import crate_kernels
from benchmarks import harness

BASELINE = "reference"
STEP_SIZE, LAMBD = 0.1, 0.5
MODES = ("forward", "backward")

Function = Callable[..., Tensor]
# From inputs and the gradient that arrives, a provider of a library's products alone; copies are made before it runs.
Products = Callable[[list[Tensor], Tensor], harness.Provider]


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    width: int
    heads: int

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    def heads_of(self, tokens: Tensor) -> Tensor:
        """[batch, tokens, width] -> the view [batch, heads, tokens, head_dim]."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


@dataclass(frozen=True)
class Comparison:
    """An operator, and what it is compared with.

    inputs: draws the operator's random inputs, all of which get a gradient.
    operator: our public function.
    upstream: draws a gradient for the output of ``operator(*inputs)``, in the dtype of the inputs.
    libraries: other code that computes the same.
    products: the library products of the same shape, a mode; a mark to measure by, not the same result.
    flops: the least that a mode takes.
    """

    inputs: Callable[[], list[Tensor]]
    operator: Function
    upstream: Callable[[list[Tensor]], Tensor]
    libraries: dict[str, Function]
    products: dict[str, Products]
    flops: dict[str, int]


SDPA_BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa(backend: SDPBackend) -> Function:
    """PyTorch's attention with query, key and value one tensor, by one backend."""

    def attend(w: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(w, w, w)

    return attend


def attention(shape: Shape, random: Callable[..., Tensor]) -> Comparison:
    def forward_products(inputs: list[Tensor], _: Tensor) -> harness.Provider:
        w = inputs[0].flatten(0, 1)

        def products() -> list[Tensor]:
            scores = torch.bmm(w, w.mT)
            return [scores, torch.bmm(scores, w)]

        return products

    def backward_products(inputs: list[Tensor], upstream: Tensor) -> harness.Provider:
        w, grad = inputs[0].flatten(0, 1), upstream.flatten(0, 1)

        def products() -> list[Tensor]:
            scores, grad_scores = torch.bmm(w, w.mT), torch.bmm(grad, w.mT)
            as_rows = [torch.bmm(scores.mT, grad), torch.bmm(grad_scores, w), torch.bmm(grad_scores.mT, w)]
            return [scores, grad_scores, *as_rows]

        return products

    product = 2 * shape.rows * shape.tokens * shape.width
    return Comparison(
        inputs=lambda: [shape.heads_of(random(shape.batch, shape.tokens, shape.width))],
        operator=crate_kernels.shared_qkv_attention,
        upstream=lambda inputs: shape.heads_of(random(shape.batch, shape.tokens, shape.width)),
        libraries={name: sdpa(backend) for name, backend in SDPA_BACKENDS.items()},
        products={"forward": forward_products, "backward": backward_products},
        flops={"forward": 2 * product, "backward": 5 * product},
    )


def ista(shape: Shape, random: Callable[..., Tensor]) -> Comparison:
    def upstream(inputs: list[Tensor]) -> Tensor:
        """Zero where rounding decides on which side of the threshold an element falls."""
        x, weight = (value.double() for value in inputs)
        code = x + STEP_SIZE * (x @ weight - x @ weight.T @ weight)
        return random(shape.rows, shape.width) * ((code - STEP_SIZE * LAMBD).abs() > 0.05)

    product, small = 2 * shape.rows * shape.width**2, 2 * shape.width**3
    return Comparison(
        inputs=lambda: [random(shape.rows, shape.width), random(shape.width, shape.width) * (2 / shape.width) ** 0.5],
        operator=lambda x, weight: crate_kernels.ista(x, weight, step_size=STEP_SIZE, lambd=LAMBD),
        upstream=upstream,
        libraries={},
        products={
            "forward": lambda inputs, _: lambda: torch.mm(*inputs),
            "backward": lambda inputs, g: lambda: [torch.mm(g, inputs[1].T), torch.mm(inputs[0].T, g)],
        },
        flops={"forward": product + small, "backward": 2 * product + small},
    )


def mssa(shape: Shape, random: Callable[..., Tensor]) -> Comparison:
    """Without LayerNorm and residual; its library products are the projections, without the attention between them."""

    def inputs() -> list[Tensor]:
        projections = [random(shape.width, shape.width) * shape.width**-0.5 for _ in range(2)]
        return [random(shape.batch, shape.tokens, shape.width), *projections, random(shape.width)]

    def library(x: Tensor, qkv: Tensor, out: Tensor, bias: Tensor) -> Tensor:
        w = shape.heads_of(F.linear(x, qkv))
        return F.linear(F.scaled_dot_product_attention(w, w, w).transpose(1, 2).flatten(2), out, bias)

    def forward_products(inputs: list[Tensor], _: Tensor) -> harness.Provider:
        x = inputs[0].flatten(0, 1)
        return lambda: [torch.mm(x, weight.T) for weight in inputs[1:3]]

    def backward_products(inputs: list[Tensor], upstream: Tensor) -> harness.Provider:
        x, grad = inputs[0].flatten(0, 1), upstream.flatten(0, 1)
        return lambda: [product for weight in inputs[1:3] for product in (torch.mm(grad, weight), torch.mm(grad.T, x))]

    projection, product = 2 * shape.rows * shape.width**2, 2 * shape.rows * shape.tokens * shape.width
    return Comparison(
        inputs=inputs,
        operator=lambda *arguments: crate_kernels.mssa(*arguments, num_heads=shape.heads),
        upstream=lambda inputs: random(shape.batch, shape.tokens, shape.width),
        libraries={"linear and sdpa": library},
        products={"forward": forward_products, "backward": backward_products},
        flops={"forward": 2 * (projection + product), "backward": 4 * projection + 5 * product},
    )


OPERATORS = {"attention": attention, "ista": ista, "mssa": mssa}


def forced(implementation: str, operator: Function) -> Function:
    def run(*inputs: Tensor) -> Tensor:
        with crate_kernels.use(implementation):
            return operator(*inputs)

    return run


def forward_backward(function: Function, inputs: list[Tensor], upstream: Tensor) -> dict[str, Tensor]:
    """The output, and the gradient of every input."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return {"out": out.detach()} | {f"gradient {index}": value for index, value in enumerate(gradients)}


def checked(
    comparison: Comparison, implementations: Sequence[str], inputs: list[Tensor], upstream: Tensor
) -> tuple[dict[str, Function], dict[str, dict[str, float]], dict[str, str]]:
    """Everything that computes the operator, its errors against float64, and why a library cannot take part.

    Errors may be one and a half times the official order's own in the same dtype, and two roundings of a number more.

    Raises:
        ValueError: an implementation of ours is further off; a library that is takes no part.
    """
    functions = {name: forced(name, comparison.operator) for name in implementations}
    truth = forward_backward(functions[BASELINE], [value.double() for value in inputs], upstream.double())
    found = {name: forward_backward(function, inputs, upstream) for name, function in functions.items()}
    eps = torch.finfo(upstream.dtype).eps
    own_errors = {name: harness.relative_error(value, truth[name]) for name, value in found[BASELINE].items()}
    tolerances = {name: 1.5 * error + eps for name, error in own_errors.items()}
    errors = harness.check_agreement(found, truth, tolerances)

    absent = {}
    for name, function in comparison.libraries.items():
        try:
            outputs = {name: forward_backward(function, inputs, upstream)}
            errors |= harness.check_agreement(outputs, truth, tolerances)
            functions[name] = function
        except (RuntimeError, ValueError) as problem:  # not built, not for this device or shape, or wrong there
            absent[name] = str(problem).partition("\n")[0]
    return functions, errors, absent


def work_of(mode: str, function: Function, inputs: list[Tensor], upstream: Tensor) -> harness.Provider:
    """One mode of a function on one input set; what it returns is its result."""
    if mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        return forward
    leaves = [value.detach().requires_grad_() for value in inputs]
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def all_of(works: Sequence[harness.Provider], device: torch.device) -> tuple[harness.Provider, str]:
    """A provider that does all works one after another, and how it does: "CUDA graph", "events" or "host clock"."""

    def run() -> list[object]:
        return [work() for work in works]  # kept together, so that no result reuses the memory of the one before

    if device.type != "cuda":
        return run, "host clock"
    for _ in range(2):  # compiles, chooses algorithms, allocates workspaces
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            kept = run()
    except RuntimeError as problem:
        return run, f"events (no CUDA graph: {str(problem).partition(chr(10))[0]})"

    def replay(kept: list[object] = kept) -> None:  # the default keeps the graph's memory alive
        graph.replay()

    return replay, "CUDA graph"


def input_sets(nbytes: int, device: torch.device) -> int:
    """How many input sets of so many bytes it takes for none to be left in the L2 cache when its turn comes again."""
    if device.type != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
    return min(16, 1 + math.ceil(2 * cache / nbytes))


def measure(
    name: str, shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int, seed: int
) -> Iterator[dict[str, Any]]:
    """One row a mode and provider; a library that takes no part gets one that says why.

    Raises:
        ValueError: outputs or gradients of ours are too far from float64.
    """
    torch.manual_seed(seed)
    comparison = OPERATORS[name](shape, lambda *size: torch.randn(size, device=device, dtype=dtype))
    implementations = tuple(dict.fromkeys((ours(device), "composed", BASELINE)))
    inputs = [comparison.inputs()]
    count = input_sets(sum(value.numel() * value.element_size() for value in inputs[0]), device)
    inputs += [comparison.inputs() for _ in range(count - 1)]
    upstreams = [comparison.upstream(one) for one in inputs]
    functions, errors, absent = checked(comparison, implementations, inputs[0], upstreams[0])

    common = {"operator": name, "shape": asdict(shape), "dtype": str(dtype).removeprefix("torch.")}
    for library, reason in absent.items():
        yield {**common, "provider": library, "unavailable": reason}
    for mode in MODES:
        works: dict[str, list[harness.Provider]] = {
            provider: [work_of(mode, function, *one) for one in zip(inputs, upstreams, strict=True)]
            for provider, function in functions.items()
        }
        works["products"] = [comparison.products[mode](*one) for one in zip(inputs, upstreams, strict=True)]
        providers = {provider: all_of(each, device) for provider, each in works.items()}
        times = harness.time_interleaved({key: run for key, (run, _) in providers.items()}, device, rounds=rounds)
        times = {key: [each / count for each in sample] for key, sample in times.items()}
        for provider, sample in times.items():
            ms = harness.Spread.of(sample)
            yield {
                **common,
                "mode": mode,
                "provider": provider,
                "baseline": BASELINE,
                "rounds": rounds,
                "input_sets": count,
                "timed_by": providers[provider][1],
                "error": errors.get(provider),
                "ms": asdict(ms),
                "tflops": comparison.flops[mode] / ms.p50 / 1e9,
                "ratio": asdict(harness.ratios(times[BASELINE], sample)),
                "seed": seed,
            }


def ceilings(device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """What the device reaches on one large 16-bit product and on one large copy, counting bytes read and written."""
    side, elements = (8192, 2**29) if device.type == "cuda" else (256, 2**20)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    providers = {"product": lambda: torch.mm(left, right), "copy": lambda: target.copy_(source)}
    times = harness.time_interleaved(providers, device, rounds=rounds, warmup=3)
    for mode, sample in times.items():
        ms = harness.Spread.of(sample)
        rate = {"tflops": 2 * side**3 / ms.p50 / 1e9} if mode == "product" else {}
        rate |= {"terabytes_per_second": 4 * elements / ms.p50 / 1e9} if mode == "copy" else {}
        yield {"operator": "ceilings", "mode": mode, "provider": "library", "rounds": rounds, "ms": asdict(ms), **rate}


def ours(device: torch.device) -> str:
    return "triton" if device.type == "cuda" else "composed"


def once(name: str, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Our operator, forward and backward, one time."""
    torch.manual_seed(seed)
    comparison = OPERATORS[name](shape, lambda *size: torch.randn(size, device=device, dtype=dtype))
    inputs = comparison.inputs()
    upstream = torch.randn_like(inputs[0])
    outputs = forward_backward(forced(ours(device), comparison.operator), inputs, upstream)
    if not all(torch.isfinite(value).all() for value in outputs.values()):
        raise ValueError(f"{name}: outputs or gradients are not finite")


COLUMNS = ("operator", "mode", "provider", "ms p50", "ms p20-p80", "TFLOP/s", "ratio p50", "timed by")


def line(row: dict[str, Any]) -> list[Any]:
    """A row as it is printed."""
    if "unavailable" in row:
        return [row["operator"], "", row["provider"], "", "", "", "", f"unavailable: {row['unavailable']}"]
    ms, ratio = row["ms"], row.get("ratio")
    rate = f"{row['tflops']:.1f}" if "tflops" in row else f"{row['terabytes_per_second']:.2f} TB/s"
    return [
        row["operator"],
        row["mode"],
        row["provider"],
        f"{ms['p50']:.4f}",
        f"{ms['p20']:.4f}-{ms['p80']:.4f}",
        rate,
        f"{ratio['p50']:.2f}" if ratio else "",
        row.get("timed_by", "events"),
    ]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = _parser().parse_args(argv)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    shape = Shape(arguments.batch, arguments.tokens, arguments.width, arguments.heads)
    surroundings = harness.environment(device)
    rows: list[dict[str, Any]] = []
    # All on one side stream: autograd runs a backward where its forward ran, and the default stream cannot be captured.
    with side_stream(device):
        for name in arguments.operators:
            if arguments.once:
                once(name, shape, device, dtype, arguments.seed)
                continue
            found = (
                ceilings(device, arguments.rounds)
                if name == "ceilings"
                else measure(name, shape, device, dtype, arguments.rounds, arguments.seed)
            )
            for row in found:
                rows.append(row | surroundings)
                if arguments.json:
                    harness.write_json_lines(arguments.json, rows[-1:])
    if rows:
        print(", ".join(f"{name} {value}" for name, value in surroundings.items()))
        print(harness.table(COLUMNS, map(line, rows)))
    return rows


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_times", description=__doc__.partition("\n")[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("operators", nargs="+", choices=[*OPERATORS, "ceilings"])
    parser.add_argument("--device", default=default_device, help=f"torch device (here: {default_device})")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=100, help="timed turns")
    parser.add_argument("--once", action="store_true", help="run our operator once, forward and backward; time nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="append the results as JSON lines")
    return parser


if __name__ == "__main__":
    main()
