"""The `crate-mae` command."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, get_loader, set_parsing_settings

from crate_mae.checkpoints import CONFIG_FILE
from crate_mae.config import ModelConfig
from crate_mae.demo import summarise
from crate_mae.registry import MODELS
from crate_mae.training import NonFiniteLoss, PretrainConfig, PretrainResult, RunStopped, demo_config, pretrain
from crate_mae.training.config import of_section

BROKE_DOWN, USER_ERROR, STOPPED = 1, 2, 130

PUBLISHED = ("embed_dim", "depth", "num_heads", "decoder_depth", "decoder_num_heads")
"""What sets the published sizes apart."""

SECTIONS = {f.name for f in dataclasses.fields(PretrainConfig) if f.default_factory is not dataclasses.MISSING}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 (training broke down), 2 (a user's mistake) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        report = _pretrain(arguments)
    except (ArgumentError, ValueError, OSError) as error:
        return _fail(error, USER_ERROR)
    except NonFiniteLoss as error:
        return _fail(error, BROKE_DOWN)
    except RunStopped as error:
        return _fail(error, STOPPED)
    except KeyboardInterrupt:
        return _fail("interrupted; what was saved before is kept", STOPPED)
    print(report)
    return 0


def _pretrain(arguments: list[str]) -> str:
    early, _ = _early_parser().parse_known_args(arguments)
    if early.resume and early.out is not None and (early.out / CONFIG_FILE).exists():
        # First among the options, so that everything else given goes over what the run was started with.
        config = str(early.out / CONFIG_FILE)
        arguments = [*arguments[:1], f"--config={config}", *arguments[1:]]
        early.config = [config, *early.config]
        try:
            _settings_in(config)
        except ValueError as error:
            raise ValueError(f"{error}; --resume needs it: mend it, or start anew with --overwrite") from None
    explicit = {name for name in PUBLISHED if any(a.split("=")[0] == f"--model.{name}" for a in arguments)}
    configs = {config: _settings_in(config) for config in early.config}
    parser = _parser(_starting_model(early.architecture, configs, explicit))
    chosen = parser.parse_args(arguments)
    with of_section("model", img_size="images"):  # of the sections, the one whose own messages lack its name
        ModelConfig(**chosen[chosen.subcommand].model.as_dict())
    settings = parser.instantiate(chosen)[chosen.subcommand]
    config = PretrainConfig(**{field.name: settings[field.name] for field in dataclasses.fields(PretrainConfig)})
    result = pretrain(config, resume=settings.resume, overwrite=settings.overwrite)
    more = summarise(result, config) if chosen.subcommand == "demo" else []
    return "\n".join([_report(result), *more])


def _early_parser() -> argparse.ArgumentParser:
    """The options that decide the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--architecture")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    return parser


def _settings_in(config: str) -> dict[str, Any]:
    """What --config names: a file, or settings written out in its place.

    Raises:
        ValueError: a section is no section; the parser would let other options hide it, or fail without a message.
    """
    try:
        settings = get_loader("yaml")(Path(config).read_text(encoding="utf-8") if os.path.isfile(config) else config)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} holds neither JSON nor YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{config} is no file of settings, such as the config.json of a run")
    for section in SECTIONS & settings.keys():
        if not isinstance(settings[section], dict):
            raise ValueError(f"{config}: {section}: expected a section of settings, got {settings[section]!r}")
    return settings


def _starting_model(architecture: str | None, configs: dict[str, dict[str, Any]], explicit: set[str]) -> ModelConfig:
    """The published size named on the command line or else in a config; the default where none is.

    Raises:
        ValueError: the size would have no effect, because a config beside it has another and no option overrides that.
    """
    named = {config: settings["architecture"] for config, settings in configs.items() if settings.get("architecture")}
    source = None
    if architecture is None and named:
        source, architecture = list(named.items())[-1]
    if not isinstance(architecture, str) or architecture not in MODELS:
        return ModelConfig()  # and the parser refuses a name that there is not
    model = MODELS[architecture]
    for config, settings in configs.items():
        for name, value in settings.get("model", {}).items():
            # A config may change the size that it names itself, as options do.
            if config != source and name in PUBLISHED and name not in explicit and value != getattr(model, name):
                raise ValueError(
                    f"architecture: {architecture} has model.{name} {getattr(model, name)}, but {config} has {value}, "
                    f"which goes over it; leave out the architecture, or give --model.{name} as well"
                )
    return model


def _parser(model: ModelConfig) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="crate-mae",
        description="CRATE-MAE, a white-box masked auto-encoder.",
        exit_on_error=False,
        allow_abbrev=False,  # the early parser knows whole names only, and so both read the same
    )
    commands = parser.add_subcommands()
    pretrain_parser = _pretrain_parser({"model": dataclasses.asdict(model)})
    pretrain_parser.add_argument(
        "--architecture",
        choices=sorted(MODELS),
        help="Published size to start from; --model.* go over it, and a --config of another size is refused.",
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
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
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
        error, fill, blur, sigma = result.errors
        lines += [
            "Mean squared error on the removed patches of validation images, in normalised pixels:",
            f"  mean of the visible patches       {fill:.4f}",
            f"  best Gaussian blur of the visible {blur:.4f}   (sigma {sigma:g} pixels)",
            f"  reconstruction                    {error:.4f}   ({error / fill - 1:+.0%} and {error / blur - 1:+.0%})",
        ]
    return "\n".join(lines)
