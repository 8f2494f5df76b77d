"""Reads settings from files and command lines: YAML or JSON, within limits, so that no input takes for ever."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import get_loader

from crate_mae.cli.errors import nearest
from crate_mae.training.config import TrainingConfig


class Names(NamedTuple):
    """The settings of a kind of run by their names.

    Attributes:
        sections: by section, the types of its settings.
        paths: settings outside sections that are paths or other texts.
        lists: settings outside sections that are lists of texts.
    """

    sections: dict[str, dict[str, str]]
    paths: list[str]
    lists: list[str]


def names_of(kind: type[TrainingConfig]) -> Names:
    """The settings of a kind of run."""
    fields = dataclasses.fields(kind)
    sections = {
        each.name: {inner.name: str(inner.type) for inner in dataclasses.fields(each.default_factory())}
        for each in fields
        if each.default_factory is not dataclasses.MISSING
    }
    others = [each for each in fields if each.name not in sections]
    lists = [each.name for each in others if str(each.type).startswith("tuple")]
    return Names(sections, [each.name for each in others if each.name not in lists], lists)


_load_yaml = get_loader("yaml")

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_LARGEST_FILE, _MOST_VALUES, _DEEPEST = 2**20, 10_000, 20
"""Limits far beyond what settings need: bytes, values when all references are followed, and levels of nesting."""


class EndlessSettings(ValueError):
    """YAML that contains itself, or expands to far too many values."""


def check_argument(option: str, value: str) -> None:
    """Refuse a value on which the parser, which reads it as YAML, would take for ever, or fail without naming the option.

    Raises:
        ValueError: it is endless, or not text, or a number too large for a float.
    """
    try:
        numbers = load(value)
    except yaml.YAMLError:  # the parser says so if it must be YAML
        return
    except Exception as error:  # endless, or not text, or a value that does not fit its tag
        raise ValueError(f"{option or value}: cannot be read: {error}") from None
    _check_magnitude(option, numbers)


def load(text: str) -> Any:
    """The content of a text in JSON or YAML.

    Raises:
        EndlessSettings: a ValueError, as of `check_finite`.
        yaml.YAMLError, ValueError: it is neither, or has a name twice in one section.
    """
    check_finite(text)
    if text.lstrip().startswith(
        "{"
    ):  # YAML cannot read JSON's escapes of characters beyond 16 bits, such as emojis in a path
        with suppress(json.JSONDecodeError, RecursionError):
            return json.loads(text, object_pairs_hook=_without_repetition)
    _refuse_repeated(yaml.compose(text, Loader=_LOADER))
    return _load_yaml(text)


def check_finite(text: str) -> None:
    """Refuse YAML on which readers would take for ever, or overflow the stack; what is not YAML is left to them.

    Raises:
        EndlessSettings: it refers to itself, stands for too many values, or is nested too deep.
    """
    sizes: dict[str, int] = {}  # how many values each anchor stands for
    opened: list[
        tuple[str | None, int]
    ] = []  # the collections around the event: anchor, and how many values came before
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
                values += sizes.get(str(anchor), 1) if isinstance(event, yaml.AliasEvent) else 1
            if len(opened) > _DEEPEST:
                raise EndlessSettings(f"nested more than {_DEEPEST} deep")
            if values > _MOST_VALUES:
                raise EndlessSettings(f"more than {_MOST_VALUES:,} values")
    except (yaml.YAMLError, UnicodeError):
        pass


def read_settings(
    config: str, kind: type[TrainingConfig], section: str | None = None, *, option: str = "--config"
) -> dict[str, Any]:
    """Read the settings that an option such as --config gives: a file, or the settings themselves.

    Args:
        config: the value of the option.
        kind: of run.
        section: if the settings are those of one section.
        option: its name.

    Raises:
        ValueError: it cannot be read, or holds something that is not a setting. The parser would not refuse all of that, or
            without a good message, and would import what a `class_path` names.
    """
    of_file = os.path.isfile(config)
    where = config if of_file else option
    text = _text_of(Path(config)) if of_file else config
    try:
        settings = load(text) if text.strip() else None
    except Exception as error:  # tags such as !!timestamp may raise anything
        raise ValueError(f"{where}: cannot be read as JSON or YAML: {error}") from None
    if not isinstance(settings, dict):
        named = config if of_file else f"{option}: {config!r}"
        raise ValueError(f"{named} is no file of settings, such as the config.json of a run")
    for name in [
        name for name in settings if isinstance(name, str) and "." in name
    ]:  # run.seed means seed in the section run
        outer, _, inner = name.partition(".")
        within = settings.setdefault(outer, {})
        if isinstance(within, dict):
            within[inner] = settings.pop(name)
    _check_names({section: settings} if section else settings, names_of(kind), where)
    return settings


def read_json(file: Path) -> Any:
    """The content of a file of settings; None if it is not there.

    Raises:
        ValueError: it is not JSON, or so large or nested that reading it would take too long; the message names it.
    """
    if not file.exists():
        return None
    if not file.is_file():  # reading a pipe would wait for ever
        raise ValueError(f"{file}: expected a file")
    try:
        text = _text_of(file)
        check_finite(text)
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not whole JSON ({error})") from None


def path_of(text: str) -> Path:
    """The path that an option gives.

    Raises:
        ValueError: no file can have that name.
    """
    if not _is_path(text):
        raise ValueError(f"expected the name of a file or folder, in UTF-8, got {text!r}")
    return Path(text)


def _is_path(text: Any) -> bool:
    return isinstance(text, str) and text == text.encode(errors="ignore").decode() and "\0" not in text and bool(text)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    times = Counter(name for name, _ in pairs)
    if len(times) < len(pairs):
        raise ValueError(f"{times.most_common(1)[0][0]} is given twice")
    return dict(pairs)


def _refuse_repeated(node: yaml.Node | None) -> None:
    """Refuse names given twice in one section: readers would silently take the last."""
    if isinstance(node, yaml.MappingNode):
        _without_repetition([(name.value, None) for name, _ in node.value if isinstance(name, yaml.ScalarNode)])
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
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from None


def _check_names(settings: dict[Any, Any], known: Names, where: str) -> None:
    for name, value in settings.items():
        if name in known.sections:
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {name}: expected a section of settings, got {value!r}")
            for inner, each in value.items():
                if inner not in known.sections[name]:
                    hint = nearest(str(inner), known.sections[name], prefix=f"{name}.")
                    raise ValueError(f"{where}: {name}.{inner}: no such setting{hint}")
                if isinstance(each, dict | set | bytes) or (each is None and "None" not in known.sections[name][inner]):
                    raise ValueError(f"{where}: {name}.{inner}: expected a value, got {each!r}")
                _check_magnitude(f"{where}: {name}.{inner}", each)
        elif name in known.lists:
            if value is not None and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
                raise ValueError(f"{where}: {name}: expected a list of texts, got {value!r}")
        elif name in known.paths:
            if value is not None and not _is_path(value):
                raise ValueError(f"{where}: {name}: expected the name of a file or folder, got {value!r}")
        elif name in ("resume", "overwrite", "dry_run", "recipe", "config"):
            if value:  # --print_config writes them, with empty values
                raise ValueError(f"{where}: {name}: expected on the command line alone, as --{name.replace('_', '-')}")
        elif name != "architecture":
            hint = nearest(str(name), [*known.sections, *known.paths, *known.lists, "architecture"])
            raise ValueError(f"{where}: {name}: no such setting{hint}")


def _check_magnitude(where: str, value: Any) -> None:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and abs(number) > 10**300:
            raise ValueError(f"{where}: expected a smaller number, got one of {len(str(number))} digits")
