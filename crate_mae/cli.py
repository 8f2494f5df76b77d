"""The `crate-mae` command."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, set_parsing_settings

from crate_mae.checkpoints import CONFIG_FILE
from crate_mae.config import ModelConfig
from crate_mae.registry import MODELS
from crate_mae.training import NonFiniteLoss, PretrainConfig, PretrainResult, RunStopped, demo_config, pretrain

BROKE_DOWN, USER_ERROR, STOPPED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 (training broke down), 2 (a user's mistake) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        result = _pretrain(arguments)
    except (ArgumentError, ValueError, OSError) as error:
        return _fail(error, USER_ERROR)
    except NonFiniteLoss as error:
        return _fail(error, BROKE_DOWN)
    except RunStopped as error:
        return _fail(error, STOPPED)
    except KeyboardInterrupt:
        return _fail("interrupted; what was saved before is kept", STOPPED)
    print(_report(result))
    return 0


def _pretrain(arguments: list[str]) -> PretrainResult:
    early, _ = _early_parser().parse_known_args(arguments)
    if early.resume and early.out is not None and (early.out / CONFIG_FILE).exists():
        # First among the options, so that everything else given goes over what the run was started with.
        arguments = [*arguments[:1], f"--config={early.out / CONFIG_FILE}", *arguments[1:]]
    parser = _parser(MODELS.get(early.architecture, ModelConfig()))
    chosen = parser.parse_args(arguments)
    settings = parser.instantiate(chosen)[chosen.subcommand]
    config = PretrainConfig(**{field.name: settings[field.name] for field in dataclasses.fields(PretrainConfig)})
    return pretrain(config, resume=settings.resume, overwrite=settings.overwrite)


def _early_parser() -> argparse.ArgumentParser:
    """The options that decide the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--architecture")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    return parser


def _parser(model: ModelConfig) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="crate-mae", description="CRATE-MAE, a white-box masked auto-encoder.", exit_on_error=False
    )
    commands = parser.add_subcommands()
    pretrain_parser = _pretrain_parser({"model": dataclasses.asdict(model)})
    pretrain_parser.add_argument(
        "--architecture",
        choices=sorted(MODELS),
        help="Published size to start from; --config and --model.* go over it.",
    )
    commands.add_subcommand(
        "pretrain", pretrain_parser, help="Learn to reconstruct masked images from a folder of them."
    )
    commands.add_subcommand(
        "demo",
        _pretrain_parser(dataclasses.asdict(demo_config(Path("runs/demo")))),
        help="Pre-train a small CRATE-MAE on the photographs shipped with the package; minutes on two CPU cores.",
    )
    return parser


def _pretrain_parser(defaults: dict[str, object]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config", help="File of settings, such as the config.json of another run.")
    parser.add_argument("--resume", action="store_true", help="Go on with the run in --out, from its last saved state.")
    parser.add_argument("--overwrite", action="store_true", help="Delete the run in --out and start anew.")
    parser.add_class_arguments(PretrainConfig)
    parser.set_defaults(defaults)
    return parser


def _fail(error: Exception | str, status: int) -> int:
    print(f"crate-mae: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _report(result: PretrainResult) -> str:
    lines = [f"Results of {result.steps} steps are in {result.out}; look at {result.out / 'reconstructions.png'}."]
    if result.errors is not None:
        error, fill = result.errors
        lines += [
            "Mean squared error on the removed patches of validation images, in normalised pixels:",
            f"  reconstruction                    {error:.4f}",
            f"  mean of the visible patches       {fill:.4f}",
            f"  ratio                             {error / fill:.3f} ({error / fill - 1:+.0%})",
        ]
    return "\n".join(lines)
