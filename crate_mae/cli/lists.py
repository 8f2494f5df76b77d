"""Options with several values, in the ways in which people write them."""

from __future__ import annotations

import dataclasses
import re

from crate_mae.config import ModelConfig
from crate_mae.training import ImagesConfig, OptimizerConfig, RunConfig

_SECTIONS = {"model": ModelConfig, "images": ImagesConfig, "optimizer": OptimizerConfig, "run": RunConfig}

_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"

_FORMS = {
    "int | tuple[int, int]": (r"\d+(,\d+)?", "a whole number of pixels, or two: height,width"),
    "tuple[float, float]": (rf"{_NUMBER},{_NUMBER}", "two numbers"),
    "tuple[str, ...]": (r"([a-z]+(,[a-z]+)*)?", "names"),
    "tuple[float, ...]": (rf"{_NUMBER}(,{_NUMBER})*", "a number for each channel of the images"),
}
"""By type, the pattern of values separated by commas, and what messages call it."""

LISTS = {
    f"--{section}.{field.name}": _FORMS[field.type]
    for section, config in _SECTIONS.items()
    for field in dataclasses.fields(config)
    if field.type in _FORMS
}
"""The options that take several values."""


def with_lists_joined(arguments: list[str]) -> list[str]:
    """The arguments, with the values of each such option joined into one list, as the parser takes it.

    Three values after --images.mean, with commas between them, without, or in brackets, become --images.mean=[0.5,0.5,0.5].

    Raises:
        ValueError: they are no numbers, or not so many as the option has.
    """
    joined: list[str] = []
    open_option = None  # the option whose values follow
    given: list[str] = []
    for argument in [*arguments, "--"]:
        if argument.startswith("--"):
            if open_option:
                joined.append(_joined(open_option, given))
            name, equals, value = argument.partition("=")
            open_option, given = (name, [value] if equals else []) if name in LISTS else (None, [])
        if open_option is None:
            joined.append(argument)
        elif not argument.startswith("--"):
            given.append(argument)
    return joined[:-1]


def _joined(option: str, given: list[str]) -> str:
    form, expected = LISTS[option]
    values = ",".join(re.split(r"[\s,]+", " ".join(given).strip("[]() ,")))
    if not re.fullmatch(form, values, re.IGNORECASE):
        raise ValueError(f"{option}: expected {expected}, got {' '.join(given) or 'nothing'}")
    return f"{option}={values}" if option == "--model.img_size" and values.isdigit() else f"{option}=[{values}]"
