"""Settings as files and command lines hold them: YAML, of which JSON is a part, read without following it for ever."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from crate_mae.cli.errors import nearest
from crate_mae.training import PretrainConfig

SECTIONS = {f.name for f in dataclasses.fields(PretrainConfig) if f.default_factory is not dataclasses.MISSING}
PATHS = [f.name for f in dataclasses.fields(PretrainConfig) if f.name not in SECTIONS]

_SECTION_FIELDS = {
    name: [field.name for field in dataclasses.fields(default)]
    for name, default in vars(PretrainConfig(out=Path())).items()
    if name in SECTIONS
}

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_LARGEST_FILE, _MOST_VALUES, _DEEPEST = 2**20, 10_000, 20
"""Far beyond what settings need: bytes, values once all references are followed, and how deep they are nested."""


class EndlessSettings(ValueError):
    """YAML that holds itself, or that is small and stands for very much."""


def check_finite(text: str) -> None:
    """Refuse YAML on which its readers would spend for ever, or all of the stack; what is no YAML is left to them.

    Raises:
        EndlessSettings: it refers to itself, stands for too many values, or is nested too deep.
    """
    sizes: dict[str, int] = {}  # of what each anchor names, in values
    opened: list[tuple[str | None, int]] = []  # collections around the event: anchor, and the values before it
    values = 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, before = opened.pop()
                if anchor:
                    sizes[anchor] = values - before
            elif isinstance(event, yaml.NodeEvent):
                anchor = event.anchor
                if isinstance(event, yaml.CollectionStartEvent):
                    opened.append((anchor, values))
                elif isinstance(event, yaml.AliasEvent) and anchor in [name for name, _ in opened]:
                    raise EndlessSettings(f"*{anchor} refers to itself")
                values += sizes.get(anchor, 1) if isinstance(event, yaml.AliasEvent) else 1
            if len(opened) > _DEEPEST:
                raise EndlessSettings(f"nested more than {_DEEPEST} deep")
            if values > _MOST_VALUES:
                raise EndlessSettings(f"more than {_MOST_VALUES:,} values")
    except (yaml.YAMLError, UnicodeError):
        pass


def read_settings(config: str, section: str | None = None, *, option: str = "") -> dict[str, Any]:
    """What an option such as --config names: a file, or settings written out in its place.

    Args:
        section: whose settings alone these are.
        option: in front of messages.

    Raises:
        ValueError: it cannot be read, or has something that is no setting: the parser would let other options hide a section
            that is none, import what `class_path` names, or fail without a message.
    """
    of_file = os.path.isfile(config)
    where = option + (config if of_file or not option else "")
    text = _text_of(Path(config)) if of_file else config
    try:
        check_finite(text)
        _refuse_repeated(yaml.compose(text, Loader=_LOADER))
        settings = get_loader("yaml")(text) if text.strip() else None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where} holds neither JSON nor YAML that can be read: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{option}{config} is no file of settings, such as the config.json of a run")
    for name in [name for name in settings if isinstance(name, str) and "." in name]:  # run.seed is seed in run, too
        outer, _, inner = name.partition(".")
        within = settings.setdefault(outer, {})
        if isinstance(within, dict):
            within[inner] = settings.pop(name)
    _check_names({section: settings} if section else settings, where)
    return settings


def check_json(file: Path) -> None:
    """Refuse a file of a model's settings, if it is there, that is no JSON, or on which a reader would spend too much.

    Raises:
        ValueError: it is; the message names it.
    """
    if not file.exists():
        return
    try:
        text = _text_of(file)
        check_finite(text)
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not whole JSON ({error})") from None


def path_of(text: str) -> Path:
    """A path as an option gives it.

    Raises:
        ValueError: no file can be called that.
    """
    if not text or "\0" in text:
        raise ValueError(f"expected the name of a file or folder, got {text!r}")
    return Path(text)


def _refuse_repeated(node: yaml.Node | None) -> None:
    """Refuse names given twice in one place, of which readers take the last without a word."""
    if isinstance(node, yaml.MappingNode):
        names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]} is given twice")
    if isinstance(node, yaml.CollectionNode):
        for each in node.value:
            for part in each if isinstance(each, tuple) else (each,):
                _refuse_repeated(part)


def _text_of(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            content = opened.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    if len(content) > _LARGEST_FILE:
        raise ValueError(f"{file} has more than {_LARGEST_FILE:,} bytes, and settings have not")
    return content.decode()


def _check_names(settings: dict[Any, Any], where: str) -> None:
    for name, value in settings.items():
        if name in SECTIONS:
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name}: expected a section of settings, got {value!r}")
            for inner, each in value.items():
                if inner not in _SECTION_FIELDS[name]:
                    raise _unknown(where, f"{name}.{inner}", [f"{name}.{field}" for field in _SECTION_FIELDS[name]])
                if isinstance(each, dict | set | bytes):
                    raise ValueError(f"{where}: {name}.{inner}: expected a value, got {each!r}")
        elif name in PATHS:
            if value is not None and not (isinstance(value, str) and value and "\0" not in value):
                raise ValueError(f"{where}: {name}: expected the name of a file or folder, got {value!r}")
        elif name in ("resume", "overwrite", "config"):
            if value:  # --print_config writes them
                raise ValueError(f"{where}: {name}: expected on the command line alone, as --{name}")
        elif name != "architecture":
            known = [*SECTIONS, *PATHS, "architecture"]
            raise _unknown(where, name, known)


def _unknown(where: str, name: Any, known: list[str]) -> ValueError:
    return ValueError(f"{where}: {name}: no such setting{nearest(str(name), known)}")
