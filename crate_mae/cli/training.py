"""What the commands that train have in common: options that decide the defaults of others, and are read first."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace

from crate_mae.checkpoints import CONFIG_FILE
from crate_mae.cli.lists import with_lists_joined
from crate_mae.cli.parsers import command_parser
from crate_mae.cli.settings import Names, names_of, path_of, read_json, read_settings
from crate_mae.config import ClassifierConfig, ModelConfig
from crate_mae.training.config import TrainingConfig, of_section
from crate_mae.training.run_folder import kind_of

Config = TypeVar("Config", bound=TrainingConfig)
Model = TypeVar("Model", ModelConfig, ClassifierConfig)
Early = argparse.Namespace
"""The options that are read first."""
Configs = dict[str, dict[str, Any]]
"""The settings of each --config, by its value."""


def read_early(arguments: list[str], kind: type[TrainingConfig]) -> tuple[str, list[str], Early]:
    """The command, its options with lists joined, and the options that are read first.

    Raises:
        ValueError: an option gives a whole section, with something that is not a setting.
    """
    command, *options = with_lists_joined(arguments)
    names = names_of(kind)
    early, _ = _early_parser(names).parse_known_args(options)
    for section in sorted(names.sections):
        for settings in getattr(early, section):
            read_settings(settings, kind, section, option=f"--{section}")
    return command, options, early


def with_configs(options: list[str], early: Early, kind: type[TrainingConfig]) -> tuple[list[str], Configs]:
    """The options, and the settings of all configs. If a run is resumed, its own config comes first among both.

    Raises:
        ValueError: a config cannot be read, or the run is of another command.
    """
    if early.resume and early.out is not None and (early.out / CONFIG_FILE).exists():
        # First among the options, so that all other options go over the settings of the run.
        config = str(early.out / CONFIG_FILE)
        options = [f"--config={config}", *options]
        early.config = [config, *early.config]
        _refuse_other_kind(early.out, kind)
        try:
            read_settings(config, kind)
        except ValueError as error:
            raise ValueError(f"{error}; --resume needs it: mend it, or start anew with --overwrite") from None
    return options, {config: read_settings(config, kind) for config in early.config}


def explicit_sizes(options: Iterable[str]) -> set[str]:
    """The names of the --model.* options that are given."""
    return {option.split("=")[0].removeprefix("--model.") for option in options if option.startswith("--model.")}


def settings_of(
    parser: ArgumentParser, chosen: Namespace, kind: type[Config], model: type[Model]
) -> tuple[Config, Namespace]:
    """The settings of a run, and all options of its command, `resume` and `dry_run` among them.

    Raises:
        ValueError: a setting cannot be used.
    """
    with of_section("model", img_size="images"):  # its messages do not name the section
        model(**chosen[chosen.subcommand].model.as_dict())
    options = parser.instantiate(chosen)[chosen.subcommand]
    return config_from(options, kind), options


def config_from(settings: Namespace, kind: type[Config]) -> Config:
    """The settings of a run, among all that its parser has read."""
    return kind(**{field.name: settings[field.name] for field in dataclasses.fields(kind)})


def add_architecture(parser: ArgumentParser, models: Iterable[str]) -> None:
    """Add the option that names a published size."""
    parser.add_argument(
        "--architecture",
        choices=sorted(models),
        help="Published size to start from; --model.* go over it, and a --config of another size is refused.",
    )


def _refuse_other_kind(out: Path, kind: type[TrainingConfig]) -> None:
    try:
        settings = read_json(out / CONFIG_FILE)
    except ValueError:  # whoever reads it next tells
        return
    if isinstance(settings, dict) and kind_of(settings) != kind.kind:
        raise ValueError(f"{out} holds a run of crate-mae {kind_of(settings)}, and that resumes it")


def _path(text: str) -> Path:
    try:
        return path_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _ResumeFrom:
    """The type of --resume: True for the last saved state, "best", or the number of a step."""

    def __call__(self, text: str | bool | int) -> str | bool | int:
        if isinstance(text, bool | int) or text == "best":
            return text
        if not re.fullmatch("[0-9]{1,18}", text) or not int(text):
            raise argparse.ArgumentTypeError(f"expected nothing, best or the number of a step, 1 or more, got {text!r}")
        return int(text)

    def __repr__(self) -> str:
        return "best or a number"  # shown in the help


_RESUME: dict[str, Any] = dict(nargs="?", const=True, default=False, type=_ResumeFrom(), metavar="best|STEP")


def _early_parser(names: Names) -> argparse.ArgumentParser:
    """The parser of the options that decide the defaults of others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--architecture")
    parser.add_argument("--recipe")
    parser.add_argument("--config", action="append", default=[])
    for name in names.paths:
        parser.add_argument(f"--{name}", type=_path)
    for section in names.sections:
        parser.add_argument(f"--{section}", action="append", default=[])
    parser.add_argument("--resume", **_RESUME)
    parser.add_argument("--overwrite", action="store_true")
    return parser


def init_of(early: Early, configs: Configs) -> Path | None:
    """The path of --init, on the command line or else in a config; None if a run is resumed."""
    if early.resume:
        return None
    named = [Path(settings["init"]) for settings in configs.values() if settings.get("init")]
    return early.init or (named[-1] if named else None)


def defaults_of(
    init: Path, read: Callable[[Path], Model], published: Model | None, sizes: Sequence[str]
) -> dict[str, Any]:
    """Defaults by the model in a folder: its configuration, and how its images were standardised if the folder tells.

    Args:
        init: the folder.
        read: reads the model's configuration from it.
        published: the published size that is named as well, if one is.
        sizes: as of `published_model`.

    Raises:
        ValueError: the folder cannot be read, or its model has another size than the published one.
    """
    try:
        saved = read_json(init / CONFIG_FILE)
        model = read(init)
    except (OSError, ValueError) as error:
        raise ValueError(f"--init: {error}") from error
    for name in sizes if published else ():
        asked, has = getattr(published, name), getattr(model, name)
        if asked != has:
            raise ValueError(
                f"architecture: its {name} is {asked}, but the model in --init {init} has {has}; leave one of them out"
            )
    images = saved.get("images", {})
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


def refuse_no_file(init: Path) -> None:
    """Refuse what is not a file, such as a pipe, which would be waited for."""
    if not init.is_file():
        raise ValueError(f"--init {init}: expected the folder of a run, or a file of weights")


def refuse_without_meaning(weights: Path, configs: Configs, explicit: set[str]) -> None:
    """Refuse weights of a CRATE-MAE if neither options nor configs give the constants that weights do not hold."""
    said = explicit.union(*(settings.get("model", {}) for settings in configs.values()))
    if lacking := [f"--model.{name}" for name in ("lambd", "step_size") if name not in said]:
        raise ValueError(
            f"--init {weights}: weights alone mean nothing without {' and '.join(lacking)}; give them (official: step_size 0.1, "
            f"lambd 5.0 or, later, 0.5), or the folder of a run, whose {CONFIG_FILE} says them"
        )


def published_model(
    architecture: str | None,
    configs: Configs,
    explicit: set[str],
    models: Mapping[str, Model],
    sizes: Sequence[str],
) -> Model | None:
    """The published size named on the command line, or else in a config; None if none is named.

    Args:
        architecture: the name on the command line, if one is given.
        configs: the settings of each --config.
        explicit: as of `explicit_sizes`.
        models: the published models, by name.
        sizes: the settings in which these differ.

    Raises:
        ValueError: the size would have no effect, because a config beside it has another and no option overrides that.
    """
    named = {config: settings["architecture"] for config, settings in configs.items() if settings.get("architecture")}
    source = None
    if architecture is None and named:
        source, architecture = list(named.items())[-1]
    if not isinstance(architecture, str) or architecture not in models:
        return None  # the parser refuses an unknown name
    model = models[architecture]
    for config, settings in configs.items():
        for name, value in settings.get("model", {}).items():
            # A config may change the size that it names itself, as options may.
            if config != source and name in sizes and name not in explicit and value != getattr(model, name):
                raise ValueError(
                    f"architecture: {architecture} has model.{name} {getattr(model, name)}, but {config} has {value}, "
                    f"which goes over it; leave out the architecture, or give --model.{name} as well"
                )
    return model


def training_parser(kind: type[TrainingConfig], defaults: dict[str, Any], epilog: str = "") -> ArgumentParser:
    """The parser of a command that trains.

    Args:
        kind: the class whose settings are its options.
        defaults: of options, in place of those of `kind`.
        epilog: as of `command_parser`.
    """
    parser = command_parser(epilog=epilog)
    parser.add_argument("--config", action="config", help="File of settings, such as the config.json of another run.")
    parser.add_argument(
        "--resume",
        **_RESUME,
        help="Go on with the run in --out, from its last saved state, from that of the best validation, or of a step.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Delete the run in --out and start anew.")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Say what the run would be, its memory, its time and its files, after some steps that are forgotten; write nothing.",
    )
    parser.add_class_arguments(kind)
    parser.set_defaults(defaults)
    return parser
