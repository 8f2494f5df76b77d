"""`crate-mae pretrain` and `crate-mae demo`.

Some options decide the defaults of others, and are read first.
"""

from __future__ import annotations

import dataclasses
from argparse import ArgumentError
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from crate_mae.checkpoints import CONFIG_FILE, read_mae_config
from crate_mae.cli.errors import worded
from crate_mae.cli.mae_flags import in_our_options
from crate_mae.cli.settings import read_json, read_settings
from crate_mae.cli.training import (
    add_architecture,
    config_from,
    defaults_of,
    explicit_sizes,
    init_of,
    published_model,
    read_early,
    refuse_no_file,
    refuse_without_meaning,
    settings_of,
    training_parser,
    with_configs,
)
from crate_mae.config import ModelConfig
from crate_mae.data.progress import say
from crate_mae.demo import summarise
from crate_mae.pictures.inside import GIVEN_CONTRAST
from crate_mae.registry import MODELS
from crate_mae.training import PretrainConfig, PretrainResult, demo_config, plan, pretrain
from crate_mae.training.ranks import is_silent
from crate_mae.training.recipes import RECIPES
from crate_mae.training.run_folder import has_state, stopped_early

PUBLISHED = ("embed_dim", "depth", "num_heads", "decoder_depth", "decoder_num_heads")
"""The settings in which the published sizes differ."""

DEMO_FOLDER = Path("runs/demo")

HELP = {
    "pretrain": "Learn to reconstruct masked images from a folder of them.",
    "demo": "Pre-train a small CRATE-MAE on the photographs shipped with the package; minutes on two CPU cores.",
}


def read_ahead(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments in full, and the defaults of this command's options.

    Raises:
        ValueError: options or configs contradict each other.
    """
    if arguments[0] == "pretrain":
        options, said = in_our_options(arguments[1:])
        arguments = ["pretrain", *options]
        for line in said if not is_silent() else ():
            say(line)
    command, options, early = read_early(arguments, PretrainConfig)
    is_demo = command == "demo"
    if is_demo and early.out is None:
        early.out = DEMO_FOLDER
        options.append(f"--out={DEMO_FOLDER}")  # goes over the config of the run there, which may have been moved
    if is_demo and not (early.resume or early.overwrite or {"-h", "--help"} & set(options)):
        way = _way_to_go_on(early.out)
        early.resume = "--resume" in way
        options += way
    options, configs = with_configs(options, early, PretrainConfig)
    defaults = dataclasses.asdict(demo_config(DEMO_FOLDER)) if is_demo else {}
    init, explicit = init_of(early, configs), explicit_sizes(options)
    published = published_model(early.architecture, configs, explicit, MODELS, PUBLISHED)
    if published:
        defaults["model"] = dataclasses.asdict(published)
    if init is not None and init.is_dir():
        defaults |= defaults_of(init, read_mae_config, published, PUBLISHED)
    elif init is not None and init.exists():  # if it does not exist, the run refuses it
        refuse_no_file(init)
        refuse_without_meaning(init, configs, explicit)
    if early.recipe in RECIPES and command == "pretrain":  # the parser refuses it for the demo, and other names
        if early.resume:
            raise ValueError("--recipe: expected nothing with --resume: a run that is resumed has its settings")
        for section, settings in RECIPES[early.recipe].items():
            whole = defaults.get(section)
            if whole is None:
                defaults |= {f"{section}.{name}": value for name, value in settings.items()}
            else:
                defaults[section] = whole | settings
    return [command, *options], defaults


def make_parser(command: str, defaults: dict[str, Any]) -> ArgumentParser:
    """The parser of `pretrain` or `demo`."""
    if command == "demo":
        return training_parser(PretrainConfig, defaults)
    parser = training_parser(
        PretrainConfig,
        defaults,
        "The flags of facebookresearch/mae's main_pretrain.py (--blr, --data_path, --accum_iter...) are understood, too.",
    )
    add_architecture(parser, MODELS)
    parser.add_argument(
        "--recipe",
        choices=list(RECIPES),
        help="Published settings to start from, which options and configs go over: those of MAE, or of the CRATE-MAE paper.",
    )
    return parser


def run(parser: ArgumentParser, chosen: Namespace) -> str:
    """Pre-train; returns what to print. Errors as of `crate_mae.training.pretrain`."""
    config, options = settings_of(parser, chosen, PretrainConfig, ModelConfig)
    if options.dry_run:
        return str(plan(config, resume=options.resume, overwrite=options.overwrite))
    result = pretrain(config, resume=options.resume, overwrite=options.overwrite)
    more = summarise(result, config) if chosen.subcommand == "demo" else []
    given = [GIVEN_CONTRAST] if config.model.norm_pix_loss and result.errors else []
    return "\n".join([_report(result), *given, *more])


def config_of(run: Path) -> PretrainConfig:
    """The settings of the run in a folder, as ``--config`` takes them.

    Raises:
        ValueError: its config.json has something else; the message names it.
    """
    file = run / CONFIG_FILE
    read_settings(str(file), PretrainConfig)
    parser = training_parser(PretrainConfig, {})
    try:
        return config_from(parser.instantiate(parser.parse_args([f"--config={file}"])), PretrainConfig)
    except ArgumentError as error:
        raise ValueError(f"{file}: {worded(error, ())}") from error


def _way_to_go_on(out: Path) -> list[str]:
    """The option with which a demo in `out` goes on; none if the run there is not a demo, which is then left alone."""
    try:
        read_json(out / CONFIG_FILE)
        if not (out / CONFIG_FILE).exists() or read_mae_config(out) != demo_config(out).model:
            return []
    except ValueError:
        return []
    if has_state(out):
        print(
            f"{out} holds the demo: going on from where it ended; --overwrite starts anew (make demo ARGS=--overwrite)"
        )
        return ["--resume"]
    return ["--overwrite"] if stopped_early(out) else []


def _report(result: PretrainResult) -> str:
    lines = [f"Results of {result.steps} steps are in {result.out}; look at {result.out / 'reconstructions.png'}."]
    if result.errors is not None:
        error, fill, blur, sigma = result.errors
        lines += [
            "Mean squared error on the removed patches of validation images, in normalised pixels:",
            f"  mean of the visible patches       {fill:.4f}",
            f"  best Gaussian blur of the visible {blur:.4f}   (sigma {sigma:g} pixels)",
            f"  reconstruction                    {error:.4f}   ({_compared(error, fill)} and {_compared(error, blur)})",
        ]
    return "\n".join(lines)


def _compared(error: float, other: float) -> str:
    return f"{error / other - 1:+.0%}" if other else "n/a"  # the errors of images of one colour are zero
