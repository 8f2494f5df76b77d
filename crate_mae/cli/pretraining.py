"""`crate-mae pretrain` and `crate-mae demo`.

Some options decide what others start from: they are read ahead of all others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from argparse import ArgumentError
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from crate_mae.checkpoints import CONFIG_FILE, read_mae_config
from crate_mae.cli.errors import DEBUG_HELP, worded
from crate_mae.cli.lists import with_lists_joined
from crate_mae.cli.settings import PATHS, SECTIONS, check_json, path_of, read_settings
from crate_mae.config import ModelConfig
from crate_mae.demo import summarise
from crate_mae.registry import MODELS
from crate_mae.training import PretrainConfig, PretrainResult, demo_config, pretrain
from crate_mae.training.config import of_section
from crate_mae.training.run_folder import has_state, stopped_early

PUBLISHED = ("embed_dim", "depth", "num_heads", "decoder_depth", "decoder_num_heads")
"""What sets the published sizes apart."""

DEMO_FOLDER = Path("runs/demo")


def read_ahead(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments in full, and the defaults of this command's options.

    Raises:
        ValueError: options or configs contradict each other.
    """
    command, *options = with_lists_joined(arguments)
    early, _ = _early_parser().parse_known_args(options)
    for section in sorted(SECTIONS):
        for settings in getattr(early, section):
            read_settings(settings, section, option=f"--{section}")
    is_demo = command == "demo"
    if is_demo and early.out is None:
        early.out = DEMO_FOLDER
        options.append(f"--out={DEMO_FOLDER}")  # over what the config of a run there says, which may have been moved
    if is_demo and not (early.resume or early.overwrite or {"-h", "--help"} & set(options)):
        way = _way_to_go_on(early.out)
        early.resume = "--resume" in way
        options += way
    if early.resume and early.out is not None and (early.out / CONFIG_FILE).exists():
        # First among the options, so that everything else given goes over what the run was started with.
        config = str(early.out / CONFIG_FILE)
        options = [f"--config={config}", *options]
        early.config = [config, *early.config]
        try:
            read_settings(config)
        except ValueError as error:
            raise ValueError(f"{error}; --resume needs it: mend it, or start anew with --overwrite") from None
    configs = {config: read_settings(config) for config in early.config}
    defaults = dataclasses.asdict(demo_config(DEMO_FOLDER)) if is_demo else {}
    init = None if early.resume else _init(early.init, configs)
    explicit = {option.split("=")[0].removeprefix("--model.") for option in options if option.startswith("--model.")}
    published = _published_model(early.architecture, configs, explicit)
    if published:
        defaults["model"] = dataclasses.asdict(published)
    if init is not None and init.is_dir():
        defaults |= _defaults_of(init, published)
    elif init is not None and init.exists():  # the run refuses what there is not
        if not init.is_file():  # a pipe would be waited for
            raise ValueError(f"--init {init}: expected the folder of a run, or a file of weights")
        _refuse_without_meaning(init, configs, explicit)
    return [command, *options], defaults


def add_commands(commands: ArgumentParser, defaults: dict[str, Any]) -> dict[str, ArgumentParser]:
    """Add `pretrain` and `demo` to the commands; returns their parsers."""
    pretrain_parser, demo_parser = _pretrain_parser(defaults), _pretrain_parser(defaults)
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
        demo_parser,
        help="Pre-train a small CRATE-MAE on the photographs shipped with the package; minutes on two CPU cores.",
    )
    return {"pretrain": pretrain_parser, "demo": demo_parser}


def run(parser: ArgumentParser, chosen: Namespace) -> str:
    """Pre-train; returns what to print. Errors as of `crate_mae.training.pretrain`."""
    with of_section("model", img_size="images"):  # of the sections, the one whose own messages lack its name
        ModelConfig(**chosen[chosen.subcommand].model.as_dict())
    settings = parser.instantiate(chosen)[chosen.subcommand]
    config = _config(settings)
    result = pretrain(config, resume=settings.resume, overwrite=settings.overwrite)
    more = summarise(result, config) if chosen.subcommand == "demo" else []
    return "\n".join([_report(result), *more])


def config_of(run: Path) -> PretrainConfig:
    """The settings of the run in a folder, as ``--config`` takes them.

    Raises:
        ValueError: its config.json has something else; the message names it.
    """
    file = run / CONFIG_FILE
    read_settings(str(file))
    parser = _pretrain_parser({})
    try:
        return _config(parser.instantiate(parser.parse_args([f"--config={file}"])))
    except ArgumentError as error:
        raise ValueError(f"{file}: {worded(error, ())}") from error


def _config(settings: Namespace) -> PretrainConfig:
    return PretrainConfig(**{field.name: settings[field.name] for field in dataclasses.fields(PretrainConfig)})


def _way_to_go_on(out: Path) -> list[str]:
    """The option with which a demo run in `out` before goes on; none for what is no demo, which no demo shall touch."""
    try:
        check_json(out / CONFIG_FILE)
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


def _path(text: str) -> Path:
    try:
        return path_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _ResumeFrom:
    """True for the last saved state, "best", or the number of a step."""

    def __call__(self, text: str | bool | int) -> str | bool | int:
        if isinstance(text, bool | int) or text == "best":
            return text
        if not re.fullmatch("[0-9]{1,18}", text) or not int(text):
            raise argparse.ArgumentTypeError(f"expected nothing, best or the number of a step, 1 or more, got {text!r}")
        return int(text)

    def __repr__(self) -> str:
        return "best or a number"  # in the help


_RESUME: dict[str, Any] = dict(nargs="?", const=True, default=False, type=_ResumeFrom(), metavar="best|STEP")


def _early_parser() -> argparse.ArgumentParser:
    """The options that decide the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--architecture")
    parser.add_argument("--config", action="append", default=[])
    for name in PATHS:
        parser.add_argument(f"--{name}", type=_path)
    for section in SECTIONS:
        parser.add_argument(f"--{section}", action="append", default=[])
    parser.add_argument("--resume", **_RESUME)
    parser.add_argument("--overwrite", action="store_true")
    return parser


def _init(init: Path | None, configs: dict[str, dict[str, Any]]) -> Path | None:
    """What --init names, on the command line or else in a config."""
    named = [Path(settings["init"]) for settings in configs.values() if settings.get("init")]
    return init or (named[-1] if named else None)


def _defaults_of(init: Path, published: ModelConfig | None) -> dict[str, Any]:
    """What the model in a folder is, and how its images were standardised, if the folder says that."""
    try:
        check_json(init / CONFIG_FILE)
        model = read_mae_config(init)
    except (OSError, ValueError) as error:
        raise ValueError(f"--init: {error}") from error
    for name in PUBLISHED if published else ():
        asked, has = getattr(published, name), getattr(model, name)
        if asked != has:
            raise ValueError(
                f"architecture: its {name} is {asked}, but the model in --init {init} has {has}; leave one of them out"
            )
    images = json.loads((init / CONFIG_FILE).read_text(encoding="utf-8")).get("images", {})
    if not isinstance(images, dict):
        raise ValueError(f"--init: {init / CONFIG_FILE}: images: expected a section of settings, got {images!r}")
    for name in {"mean", "std"} & images.keys():
        values = images[name]
        if not (isinstance(values, list) and all(isinstance(value, int | float) for value in values)):
            raise ValueError(
                f"--init: {init / CONFIG_FILE}: images.{name}: expected a number for each channel, got {values!r}"
            )
    return {"model": dataclasses.asdict(model)} | {
        f"images.{name}": images[name] for name in {"mean", "std"} & images.keys()
    }


def _refuse_without_meaning(weights: Path, configs: dict[str, dict[str, Any]], explicit: set[str]) -> None:
    said = explicit.union(*(settings.get("model", {}) for settings in configs.values()))
    if lacking := [f"--model.{name}" for name in ("lambd", "step_size") if name not in said]:
        raise ValueError(
            f"--init {weights}: weights alone mean nothing without {' and '.join(lacking)}; give them (official: step_size 0.1, "
            f"lambd 5.0 or, later, 0.5), or the folder of a run, whose {CONFIG_FILE} says them"
        )


def _published_model(
    architecture: str | None, configs: dict[str, dict[str, Any]], explicit: set[str]
) -> ModelConfig | None:
    """The published size named on the command line or else in a config; None where none is.

    Raises:
        ValueError: the size would have no effect, because a config beside it has another and no option overrides that.
    """
    named = {config: settings["architecture"] for config, settings in configs.items() if settings.get("architecture")}
    source = None
    if architecture is None and named:
        source, architecture = list(named.items())[-1]
    if not isinstance(architecture, str) or architecture not in MODELS:
        return None  # and the parser refuses a name that there is not
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


def _pretrain_parser(defaults: dict[str, object]) -> ArgumentParser:
    parser = ArgumentParser(epilog=DEBUG_HELP, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="File of settings, such as the config.json of another run.")
    parser.add_argument(
        "--resume",
        **_RESUME,
        help="Go on with the run in --out, from its last saved state, from that of the best validation, or of a step.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Delete the run in --out and start anew.")
    parser.add_class_arguments(PretrainConfig)
    parser.set_defaults(defaults)
    return parser


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
    return f"{error / other - 1:+.0%}" if other else "n/a"  # nothing is lost in images of one colour
