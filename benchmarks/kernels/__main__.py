"""How long each operator takes, forward, backward and both, beside every peer, as times and as shares of the roofline.

    python -m benchmarks.kernels attention ista                        # at CRATE-MAE-Base's shape
    python -m benchmarks.kernels attention --sweep tokens head_dim     # and at others
    python -m benchmarks.kernels attention --sweep mask --tokens 785 --batch 16     # and behind every mask of masks.py
    python -m benchmarks.kernels --sweep all --json FILE               # every operator, every sweep
    python -m benchmarks.kernels ista --once                           # our operator alone, for compute-sanitizer

In 16-bit dtypes tokens and matrices have 16 bits and run under autocast, as the official order does; encoder layers get float32
tokens. Outputs and gradients are compared with float64 before anything is timed. Several input sets, together larger than the L2
cache, take turns, and a time is that of one set. On a GPU they are captured in one CUDA graph, so that no host time counts; where
that fails, the row says so and is timed by events.

Providers:

    reference                                   the official order, eager; the baseline
    triton, composed                            ours
    triton library                              triton with LIBRARY = 1 in every tile: PyTorch multiplies
    official compiled, official max-autotune, best composed     under torch.compile
    products, products with epilogue            the fewest library products (with bias and ReLU): a mark, not the result
    NAME summed                                 an attention peer that adds up its three gradients in the backward
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import harness, records
from benchmarks.command_line import add_common_arguments, device_named, positive
from benchmarks.kernels.masks import MASKS
from benchmarks.kernels.measuring import MODES, measure, once, ours
from benchmarks.kernels.operators import OPERATORS, WITH_HEADS, Shape
from benchmarks.peers import GROUPS
from crate_mae.registry import MODELS

SWEEPS = ("batch", "tokens", "head_dim", "width", "dtype", "mask")
BATCHES = (1, 8, 64, 256, 1024)
TOKENS = (50, 197, 577, 785, 1025, 3137, 4097)
HEAD_DIMS = (48, 64, 80, 128)


def cases(operator: str, shape: Shape, dtype: str, sweeps: Sequence[str]) -> list[tuple[Shape, str]]:
    """The shape and dtype asked for, then those of the sweeps, each once."""
    change = dataclasses.replace
    found = [(shape, dtype)]
    if "batch" in sweeps:
        found += [(change(shape, batch=batch), dtype) for batch in BATCHES]
    if "tokens" in sweeps:  # as many in all
        found += [(change(shape, tokens=n, batch=max(1, shape.rows // n)), dtype) for n in TOKENS]
    if "head_dim" in sweeps and operator in WITH_HEADS:
        found += [(change(shape, width=shape.heads * head_dim), dtype) for head_dim in HEAD_DIMS]
    if "width" in sweeps:
        found += [(change(shape, width=size.embed_dim, heads=size.num_heads), dtype) for size in MODELS.values()]
    if "dtype" in sweeps:
        found += [(shape, dtype) for dtype in harness.DTYPES]
    if "mask" in sweeps and operator == "attention":  # packed sequences are one sample
        found += [(change(shape, mask=mask, **{"batch": 1} if mask == "packed" else {}), dtype) for mask in MASKS]
    return list(dict.fromkeys(found))


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows.

    Raises:
        SystemExit: an argument is refused, before anything is measured; or an operator of ours was wrong or failed somewhere,
            its rows say so, and all else was measured.
    """
    arguments = _parser().parse_args(argv)
    device = device_named(arguments.device)
    shape = Shape(arguments.batch, arguments.tokens, arguments.width, arguments.heads)
    operators = arguments.operators or list(OPERATORS)
    if shape.width % shape.heads and set(operators) & set(WITH_HEADS):
        raise SystemExit(f"--width {shape.width}: expected a multiple of --heads {shape.heads}")
    modes = ["forward+backward" if mode == "both" else mode for mode in arguments.modes]
    sweeps = SWEEPS if "all" in arguments.sweep else arguments.sweep
    failures = []
    # Everything on one stream that can be captured.
    with harness.side_stream(device):
        if arguments.once:
            for name in operators:
                once(name, shape, device, arguments.dtype, arguments.seed)
            return []
        record = records.Record(device, arguments.seed, arguments.json)
        ceilings: dict[str, harness.Ceilings] = {}
        for name in operators:
            for each, dtype in cases(name, shape, arguments.dtype, sweeps):
                if dtype not in ceilings:
                    ceilings[dtype] = harness.ceilings(record, device, dtype)
                options = dict(modes=modes, groups=arguments.peers, rounds=arguments.rounds, seed=arguments.seed)
                try:
                    measure(record, ceilings[dtype], name, each, dtype, device=device, **options)
                except Exception as problem:
                    failures.append(f"{name}, {each}, {dtype}: {records.in_one_line(problem)}")
                    for mode in modes:
                        record.add(
                            **each.of(name),
                            dtype=dtype,
                            mode=mode,
                            provider=ours(device),
                            unavailable=records.in_one_line(problem),
                        )
    record.show()
    if failures:
        raise SystemExit("\n".join(failures))
    record.refuse_nothing()
    return record.rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0])
    on_cuda = torch.cuda.is_available()
    parser.add_argument(
        "operators", nargs="*", type=_operator, metavar="OPERATOR", help=f"default: all of {', '.join(OPERATORS)}"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=["forward", "backward", "both", "forward+backward"], default=MODES
    )
    parser.add_argument("--sweep", nargs="+", choices=[*SWEEPS, "all"], default=[], help="shapes and dtypes besides")
    parser.add_argument("--peers", nargs="+", choices=GROUPS, default=GROUPS, help="kinds of peers (default: all)")
    add_common_arguments(parser)
    parser.add_argument("--batch", type=positive, default=64 if on_cuda else 4)
    parser.add_argument("--tokens", type=positive, default=197)
    parser.add_argument("--width", type=positive, default=768)
    parser.add_argument("--heads", type=positive, default=12)
    parser.add_argument("--dtype", choices=harness.DTYPES, default="bfloat16" if on_cuda else "float32")
    parser.add_argument("--rounds", type=positive, default=100 if on_cuda else 5, help="timed turns")
    parser.add_argument("--once", action="store_true", help="run our operator once, forward and backward; time nothing")
    return parser


def _operator(name: str) -> str:
    # Not ``choices``: before Python 3.12 an empty list is none of them.
    if name not in OPERATORS:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(OPERATORS)}")
    return name


if __name__ == "__main__":
    main()
