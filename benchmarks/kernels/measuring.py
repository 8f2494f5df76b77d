"""One operator at one shape: outputs and gradients checked against float64, then all providers timed in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial, reduce
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.harness import Ceilings
from benchmarks.kernels.operators import OPERATORS, Comparison, Products, Random, Shape
from benchmarks.peers import GROUPS, Function, Peer, forced
from benchmarks.records import BASELINE, Record, in_one_line
from crate_kernels import tiles

MODES = ("forward", "backward", "forward+backward")

# Follows the name of a peer that takes query, key and value where its backward adds up the three gradients, as the gradient of
# one tensor takes; without it they are left apart.
SUMMED = " summed"

# Our kernels where PyTorch multiplies and they do only what follows the products.
WITH_LIBRARY = "triton library"

# So many more activations may cross an inner threshold by rounding than in the official order. This matters at tiny shapes
# alone, where few are near a threshold and chance decides which.
MORE_CROSSINGS = 16

# exp(score - lse) is as far off, relatively, as its float32 argument is absolutely: half a unit of a number of up to 16, which
# sqrt(head_dim), the score of a random token with itself, does not pass. The official order subtracts the maximum instead.
LOG_SUM_EXP_ROUNDING = 8 * torch.finfo(torch.float32).eps


def ours(device: torch.device) -> str:
    return "triton" if device.type == "cuda" else "composed"


def launching(provider: str, device: torch.device) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for whatever launches kernels of the provider: with the tiles in force, or with LIBRARY = 1 in all of them."""
    if provider != WITH_LIBRARY:
        return lambda function: function
    in_force = {key: tile for key, (_, tile) in tiles.in_force(device).items()}
    return tiles.trial({key: {**tile, "LIBRARY": 1} if "LIBRARY" in tile else tile for key, tile in in_force.items()})


def autocasting(function: Function, device: torch.device, dtype: torch.dtype) -> Function:
    """``function``, its forward under autocast where the dtype has 16 bits; backwards run outside, as they should."""

    def run(*inputs: Tensor) -> Tensor:
        with harness.autocast(device, dtype):
            return function(*inputs)

    return run


def asking_thrice(function: Function) -> Function:
    return lambda w: function(w, w, w)


def forward_backward(function: Function, inputs: Sequence[Tensor], upstream: Tensor) -> dict[str, Tensor]:
    """The output, and the gradient of every input."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return {"out": out.detach()} | {f"gradient {index}": value for index, value in enumerate(gradients)}


def in_chunks(function: Function, inputs: Sequence[Tensor], upstream: Tensor, samples: int) -> dict[str, Tensor]:
    """``forward_backward`` of a few samples at a time, added up in float64: a whole batch's scores may not fit."""
    tokens, *weights = inputs
    parts = [
        forward_backward(function, [some, *weights], grad)
        for some, grad in zip(tokens.split(samples), upstream.split(samples), strict=True)
    ]
    found = {}
    for name in parts[0]:
        values = [part[name].double() for part in parts]
        found[name] = torch.cat(values) if name in ("out", "gradient 0") else reduce(torch.add, values)
    return found


def checked(
    comparison: Comparison,
    implementations: Sequence[str],
    groups: Collection[str],
    inputs: list[Tensor],
    upstream: Tensor,
    dtype: torch.dtype,
) -> tuple[dict[str, Function], dict[str, dict[str, float]], dict[str, str]]:
    """Everything that computes the operator, its errors against float64, and why a provider cannot take part.

    Errors may be one and a half times the official order's own in the same dtype, and two roundings of a number and those of a
    log-sum-exp more; gradients behind an inner threshold a few crossings more.

    Raises:
        ValueError: an implementation of ours is further off; a peer that is takes no part.
    """
    tokens, device = inputs[0], inputs[0].device
    # So many that a few of [samples, heads, tokens, tokens] fit easily; tokens of two dimensions need none.
    samples = max(1, 2**30 // (tokens.shape[-2] ** 2 * tokens.shape[-1])) if tokens.ndim > 2 else len(tokens)
    official = forced(BASELINE, comparison.operator)
    truth = in_chunks(official, [value.double() for value in inputs], upstream.double(), samples)
    own = in_chunks(autocasting(official, device, dtype), inputs, upstream, samples)
    margin = torch.finfo(dtype).eps + LOG_SUM_EXP_ROUNDING
    tolerances = {name: 1.5 * harness.relative_error(value, truth[name]) + margin for name, value in own.items()}
    if comparison.inner_threshold:
        # Each element counts 1 / sqrt(elements) of a gradient's norm.
        crossings = (MORE_CROSSINGS / upstream.numel()) ** 0.5
        tolerances = {name: value + crossings * (name != "out") for name, value in tolerances.items()}

    everyone = {name: Peer(comparison.operator, implementation=name.split()[0]) for name in implementations}
    everyone |= {name: peer for name, peer in comparison.everyone().items() if peer.group in groups}
    functions: dict[str, Function] = {}
    errors: dict[str, dict[str, float]] = {}
    absent: dict[str, str] = {}
    for name, peer in everyone.items():
        try:
            function = autocasting(peer.ready(device), device, dtype)
            run = launching(name, device)(forward_backward)
            outputs = run(asking_thrice(function) if peer.separate else function, inputs, upstream)
            found = harness.check_agreement({name: outputs}, truth, tolerances)[name]
        except Exception as problem:  # not built, not for this device or shape, out of memory, or wrong there
            if name in implementations and not isinstance(problem, torch.OutOfMemoryError):
                raise
            absent[name] = in_one_line(problem)
            if peer.separate:
                absent[name + SUMMED] = absent[name]
            continue
        functions[name], errors[name] = function, found
        if peer.separate:
            functions[name + SUMMED], errors[name + SUMMED] = asking_thrice(function), found
    return functions, errors, absent


def work_of(mode: str, function: Function, inputs: Sequence[Tensor], upstream: Tensor) -> harness.Provider:
    """One mode of a function on one input set; what it returns is its result."""
    if mode == "forward":
        return torch.no_grad()(lambda: function(*inputs))
    leaves = [value.detach().requires_grad_() for value in inputs]
    if mode == "forward+backward":

        def both() -> list[object]:
            out = function(*leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

        return both
    out = function(*leaves)
    upstream = upstream.to(out.dtype)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def in_turn(works: Sequence[harness.Provider]) -> harness.Provider:
    """All works one after another, their results kept together, so that none reuses the memory of the one before."""
    return lambda: [work() for work in works]


def input_sets(nbytes: int, device: torch.device) -> int:
    """How many input sets of so many bytes it takes for none to be left in the L2 cache when its turn comes again."""
    if device.type != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
    return min(128, 1 + math.ceil(2 * cache / nbytes))


def least_bytes(mode: str, inputs: Sequence[Tensor], upstream: Tensor) -> int:
    """Every input, output and gradient once a direction; the output is as large as its gradient."""
    given = sum(value.nbytes for value in inputs)
    forward, backward = given + upstream.nbytes, 2 * given + upstream.nbytes
    return {"forward": forward, "backward": backward}.get(mode, forward + backward)


def measure(
    record: Record,
    ceilings: Ceilings,
    name: str,
    shape: Shape,
    dtype_name: str,
    *,
    modes: Sequence[str] = MODES,
    groups: Collection[str] = GROUPS,
    rounds: int,
    device: torch.device,
    seed: int,
) -> None:
    """One row a mode and provider; one that takes no part gets rows that say why.

    Raises:
        ValueError: outputs or gradients of ours are too far from float64.
    """
    torch.manual_seed(seed)
    harness.clean(device)
    dtype = harness.torch_dtype(dtype_name)
    comparison = OPERATORS[name](shape, normal(device, dtype))
    inputs = [comparison.inputs()]
    count = input_sets(sum(value.nbytes for value in inputs[0]), device)
    inputs += [comparison.inputs() for _ in range(count - 1)]
    upstreams = [comparison.upstream(one) for one in inputs]
    # A backward is timed again and again on one graph, whose buffers compiled code must then not take for its own.
    with torch._functorch.config.patch(donated_buffer=False):
        implementations = tuple(dict.fromkeys((ours(device), "composed", BASELINE)))
        if ours(device) == "triton" and name != "attention":  # which has no products of tokens with a matrix
            implementations = (*implementations, WITH_LIBRARY)
        functions, errors, absent = checked(comparison, implementations, groups, inputs[0], upstreams[0], dtype)
        for mode in modes:
            common: dict[str, Any] = {**shape.of(name), "dtype": dtype_name, "mode": mode}
            common |= {"baseline": BASELINE, "input_sets": count, "rounds": rounds}
            lacking = {key: why for key, why in absent.items() if mode != "forward" or not key.endswith(SUMMED)}
            providers: dict[str, tuple[harness.Provider, str]] = {}
            peaks: dict[str, int | None] = {}
            product_flops: dict[str, int] = {}
            for provider, build in works_of(mode, comparison, functions, inputs, upstreams).items():
                try:
                    works = build()
                    if provider in comparison.products:
                        product_flops[provider] = flops_of(works[0])
                    works[0]()
                    peaks[provider] = harness.added_bytes(works[0], device)
                    providers[provider] = harness.captured(in_turn(works), device)
                except Exception as problem:
                    if provider in implementations and not isinstance(problem, torch.OutOfMemoryError):
                        raise
                    lacking[provider] = in_one_line(problem)
            for provider, reason in lacking.items():
                record.add(**common, provider=provider, unavailable=reason)
            times = harness.time_interleaved({key: run for key, (run, _) in providers.items()}, device, rounds=rounds)
            for provider, sample in times.items():
                sample = [each / count for each in sample]
                ms = harness.Spread.of(sample)
                work: tuple[int, int | None] = comparison.least_flops(mode), least_bytes(mode, inputs[0], upstreams[0])
                if provider in product_flops:  # less work than the operator's
                    work = product_flops[provider], None
                record.add(
                    **common,
                    provider=provider,
                    timed_by=providers[provider][1],
                    error=errors.get(provider),
                    ms=asdict(ms),
                    peak_bytes=peaks[provider],
                    ratio=harness.ratios_to(times.get(BASELINE), times[provider]),
                    **ceilings.rates(ms.p50, *work),
                )


def works_of(
    mode: str,
    comparison: Comparison,
    functions: Mapping[str, Function],
    inputs: Sequence[list[Tensor]],
    upstreams: Sequence[Tensor],
) -> dict[str, Callable[[], list[harness.Provider]]]:
    """For each provider that has this mode, what makes its works, one an input set."""
    sets = list(zip(inputs, upstreams, strict=True))

    def of_function(provider: str, function: Function, times: int) -> list[harness.Provider]:
        launches = launching(provider, upstreams[0].device)
        return [launches(launches(work_of)(mode, function, one * times, upstream)) for one, upstream in sets]

    def of_products(products: Products) -> list[harness.Provider]:
        return [products(*one) for one in sets]

    found: dict[str, Callable[[], list[harness.Provider]]] = {}
    for provider, function in functions.items():
        separate = provider in comparison.peers and comparison.peers[provider].separate
        if mode != "forward" or not provider.endswith(SUMMED):
            found[provider] = partial(of_function, provider, function, 3 if separate else 1)
    for provider, products in comparison.products.items():
        if mode in products:
            found[provider] = partial(of_products, products[mode])
    return found


def flops_of(products: harness.Provider) -> int:
    """FLOPs of library products, counted while they run."""

    def with_epilogue(bias: torch.Size, left: torch.Size, right: torch.Size, **_: Any) -> int:
        return 2 * left.numel() * right[-1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._addmm_activation: with_epilogue})
    with counter:
        products()
    return counter.get_total_flops()


def normal(device: torch.device, dtype: torch.dtype) -> Random:
    def random(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    return random


def once(name: str, shape: Shape, device: torch.device, dtype_name: str, seed: int) -> None:
    """Our operator, forward and backward, one time."""
    torch.manual_seed(seed)
    dtype = harness.torch_dtype(dtype_name)
    comparison = OPERATORS[name](shape, normal(device, dtype))
    inputs = comparison.inputs()
    function = autocasting(forced(ours(device), comparison.operator), device, dtype)
    outputs = forward_backward(function, inputs, torch.randn_like(inputs[0]))
    if not all(torch.isfinite(value).all() for value in outputs.values()):
        raise ValueError(f"{name}: outputs or gradients are not finite")
