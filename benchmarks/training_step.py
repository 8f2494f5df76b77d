"""How long one training step of CRATE-MAE takes, against the official order of operations run eagerly.

    python -m benchmarks.training_step --device cpu --batch 1 8 --dtype float32 bfloat16

A step is forward, backward and the release of the gradients; ``--optimizer`` adds AdamW's update. All implementations share one
model, one set of weights, the images and the masking noise; before any is timed, losses and gradients must be as close to
float32 as the official order's own.
16-bit dtypes run under autocast with float32 parameters.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import crate_kernels
import crate_mae
from benchmarks import harness
from crate_mae.config import grid_of

BASELINE = "reference"

DTYPES = ("float32", "bfloat16", "float16")

# What float32 rounding grows to through two dozen layers, relative; 2e-6 is usual.
FLOAT32_ROUNDING = 64 * torch.finfo(torch.float32).eps

# An activation that rounding moves across a threshold has its gradient switched on or off. Of the millions in a step a few
# are that close in float32, and each counts 1e-5 to 1e-4 of the whole gradient's norm; a wrong formula counts 1e-2 and more.
THRESHOLD_CROSSINGS = 5e-4


def training_step(
    model: nn.Module,
    implementation: str,
    images: Tensor,
    noise: Tensor,
    dtype: torch.dtype,
    optimizer: torch.optim.Optimizer | None = None,
) -> harness.Provider:
    """A provider that takes one step and leaves no gradients behind."""

    def step() -> None:
        forward_backward(model, implementation, images, noise, dtype)
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return step


def forward_backward(
    model: nn.Module, implementation: str, images: Tensor, noise: Tensor, dtype: torch.dtype
) -> Tensor:
    """The loss, detached; the gradients stay in the parameters."""
    with crate_kernels.use(implementation):
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss, _, _ = model(images, noise=noise)
        loss.backward()
    return loss.detach()


def outputs(
    model: nn.Module, implementation: str, images: Tensor, noise: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What must agree between implementations: the loss, and all gradients as one vector."""
    loss = forward_backward(model, implementation, images, noise, dtype)
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return {"loss": loss, "gradient": torch.cat(gradients)}


def tolerances(baseline: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Relative errors allowed against the official order in float32: for the gradient, about the official order's own.

    16-bit rounding moves activations across the threshold and is amplified by every layer, so no constant would fit all
    depths. The loss is a single number, whose error may vanish by luck: it gets one unit in the last place instead.
    """
    own_error = harness.relative_error(baseline["gradient"], truth["gradient"])
    return {
        "loss": torch.finfo(dtype).eps + FLOAT32_ROUNDING,
        "gradient": 1.5 * own_error + THRESHOLD_CROSSINGS,
    }


def measure(
    model_name: str,
    overrides: dict[str, Any],
    *,
    implementation: str,
    device: torch.device,
    dtype_name: str,
    batch: int,
    rounds: int,
    with_optimizer: bool,
    seed: int,
) -> list[dict[str, Any]]:
    """One result row a provider: the baseline's, then the implementation's."""
    torch.manual_seed(seed)
    dtype = getattr(torch, dtype_name)
    model = crate_mae.create_model(model_name, **overrides).to(device).train()
    config = model.config
    rows, columns = grid_of(config.image_shape, config.patch_size)
    images = torch.randn(batch, config.in_chans, *config.image_shape, device=device)
    noise = torch.rand(batch, rows * columns, device=device)

    names = (BASELINE, implementation)
    truth = outputs(model, BASELINE, images, noise, torch.float32)
    results = {name: outputs(model, name, images, noise, dtype) for name in names}
    errors = harness.check_agreement(results, truth, tolerances(results[BASELINE], truth, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if with_optimizer else None
    providers = {name: training_step(model, name, images, noise, dtype, optimizer) for name in names}
    times = harness.time_interleaved(providers, device, rounds=rounds)

    return [
        {
            "operator": "training_step",
            "model": model_name,
            "overrides": overrides,
            "shape": list(images.shape),
            "dtype": dtype_name,
            "mode": "forward+backward+adamw" if with_optimizer else "forward+backward",
            "provider": name,
            "baseline": BASELINE,
            "rounds": rounds,
            "loss": results[name]["loss"].item(),
            "error": errors[name],
            "ms": asdict(harness.Spread.of(times[name])),
            "images_per_second": batch * 1e3 / harness.Spread.of(times[name]).p50,
            "ratio": asdict(harness.ratios(times[BASELINE], times[name])),
            "seed": seed,
        }
        for name in names
    ]


COLUMNS = ("model", "batch", "dtype", "provider", "ms p50", "ms p20-p80", "images/s", "ratio p50", "ratio p20-p80")


def line(row: dict[str, Any]) -> list[Any]:
    """A result row as it is printed."""
    ms, ratio = row["ms"], row["ratio"]
    return [
        row["model"],
        row["shape"][0],
        row["dtype"],
        row["provider"],
        round(ms["p50"], 1),
        f"{ms['p20']:.1f}-{ms['p80']:.1f}",
        round(row["images_per_second"], 2),
        round(ratio["p50"], 2),
        f"{ratio['p20']:.2f}-{ratio['p80']:.2f}",
    ]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = _parser().parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"--device {arguments.device}: torch finds no CUDA device; --device cpu measures this machine's CPU"
        )
    implementation = arguments.implementation or ("triton" if device.type == "cuda" else "composed")
    rounds = arguments.rounds or (30 if device.type == "cuda" else 5)
    surroundings = harness.environment(device)
    rows: list[dict[str, Any]] = []
    for dtype in arguments.dtype:
        for batch in arguments.batch:
            rows += measure(
                arguments.model,
                dict(arguments.set),
                implementation=implementation,
                device=device,
                dtype_name=dtype,
                batch=batch,
                rounds=rounds,
                with_optimizer=arguments.optimizer,
                seed=arguments.seed,
            )
    rows = [row | surroundings for row in rows]
    print(", ".join(f"{name} {value}" for name, value in surroundings.items()))
    print(harness.table(COLUMNS, map(line, rows)))
    if arguments.json:
        harness.write_json_lines(arguments.json, rows)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__.partition("\n")[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help=f"torch device (here: {default_device})")
    parser.add_argument("--model", default="crate_mae_base", help="a name crate_mae.create_model knows")
    parser.add_argument(
        "--set", nargs="+", default=[], type=_override, metavar="NAME=VALUE", help="model overrides: depth=1"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="images a step")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument(
        "--implementation", choices=["composed", "triton"], help="default: triton on CUDA, else composed"
    )
    parser.add_argument("--rounds", type=int, help="timed turns (default: 30 on CUDA, 5 on the CPU)")
    parser.add_argument("--optimizer", action="store_true", help="AdamW's update is part of the step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="append the results as JSON lines")
    return parser


def _override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"{value!r} in {text!r} is not a number, true, false or a [list]") from None


if __name__ == "__main__":
    main()
