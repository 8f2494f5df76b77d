"""The line that the command prints for an error, and its exit status."""

from __future__ import annotations

import errno
import re
import signal
from argparse import ArgumentError
from collections.abc import Callable, Iterable
from difflib import get_close_matches

import torch

from crate_mae import state_dicts
from crate_mae.data import LostWorkers, MissingLibrary
from crate_mae.training import LostRank, NonFiniteLoss, RunStopped, TooManyUnreadable

BROKE_DOWN, USER_ERROR, BUG, BY_SIGNAL = 1, 2, 70, 128

DEBUG = "--debug"
DEBUG_HELP = f"{DEBUG}, anywhere among the arguments, shows where an error came from."

_LONGEST = 600

_OF_THE_DISK = {errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT}

_POSITIONAL = {
    "run": "RUN, the folder of a run or of a model",
    "runs": "RUN, the folder of a run, or several",
    "images": "IMAGE, one or more images",
}
"""What messages call positional arguments; others are called by their names in capitals."""


def _required(name: str) -> str:
    """What a message calls a missing argument, whose name for the parser is such as "share.run"."""
    command, _, argument = name.partition(".")
    return (
        f"--{argument}" if command in ("pretrain", "demo", "finetune") else _POSITIONAL.get(argument, argument.upper())
    )


_WORDING: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r'^(argument|Parser key) "?(?P<name>[\w.-]+)"?: ', r"\g<name>: "),
    (r"Does not validate against any of .*tuple\[int, int\].*Given value: ?", "expected a whole number, or two, got "),
    (r"Does not validate against any of .*Literal\['auto'\].*Given value: ?", "expected a whole number, or auto, got "),
    (r"Expected a <class 'int'>", "expected a whole number"),
    (r"Expected a <class 'float'>", "expected a number"),
    (r"Expected a <class 'bool'>", "expected true or false"),
    (r"Expected a <class 'str'>", "expected text"),
    (r"Expected a (<class ')?tuple('>)?", "expected a list"),
    (r"Expected a typing\.Literal\[(.*)\](?=\. Got)", r"expected one of \1"),
    (r"\. Got value: ?", ", got "),
    (r"invalid choice: (.*) \(choose from (.*)\)$", r"expected one of \2, got \1"),
    (r"(?<=: )(.*) not among choices \[(.*)\]$", r"expected one of \2, got \1"),
    (r"(?<=required: ).*", lambda names: ", ".join(map(_required, names[0].split(", ")))),
    (r", got $", ", got nothing"),
)
"""Patterns of the parsers' messages, and the words in which our messages say the same."""


def nearest(given: str, known: Iterable[str], *, prefix: str = "") -> str:
    """The end of a message, which asks whether the most similar name was meant; empty if none is similar.

    An option without its section, such as --batch_size, is most similar to the one that ends with it.

    Args:
        given: the name that is not known.
        known: the names that are.
        prefix: put before the name in the message.
    """
    names = list(known)
    inner = [name for name in names if "." in name and name.endswith("." + given.lstrip("-"))]
    found = inner or get_close_matches(given, names, n=1, cutoff=0.8 if given.startswith("--") else 0.6)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def worded(error: ArgumentError, options: Iterable[str]) -> ValueError:
    """A parser's error in the words of our messages, with the name that was probably meant.

    Args:
        error: of the parser.
        options: of the command.
    """
    message = " ".join(str(error).split())
    for pattern, words in _WORDING:
        message = re.sub(pattern, words, message)
    if unknown := re.match(r"unrecognized arguments: (--[^\s=]*)", message):
        message += nearest(unknown[1], options)
    elif re.match(r"unrecognized arguments: .*( \+ |\.tar\b)", message):
        message += '; names with blanks or braces in them need quotes, such as "2 photos + 1 shards"'
    elif choice := re.search(r"expected one of (.*), got (.*)", message):
        choices = re.findall(r"'([^']*)'", choice[1])
        message = message.replace(choice[1], ", ".join(choices)) + nearest(choice[2].strip("'"), choices)
    return ValueError(message)


_OF_TRAINING = (
    "a lower --schedule.batch_size needs less, or --schedule.accumulate auto, --run.recompute true, --run.stream 16bit"
)
_LESS_MEMORY = {
    "analyze": "a lower --batch_size needs less",
    "evaluate": "a lower --batch_size needs less",
    "embed": "a lower --batch_size needs less",
    "visualize": "a lower --size needs less, and so do fewer images",
    "reconstruct": "fewer images need less",
}
"""By command, how to use less memory; the other commands train."""


def outcome(error: BaseException, command: str = "") -> tuple[str, int]:
    """The message for an error of a command, and the exit status."""
    if isinstance(error, RunStopped):
        return str(error), BY_SIGNAL + error.signal
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was saved before is kept", BY_SIGNAL + getattr(error, "signal", signal.SIGINT)
    if isinstance(error, NonFiniteLoss | LostWorkers | LostRank | TooManyUnreadable):
        return str(error), BROKE_DOWN
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        remedy = _LESS_MEMORY.get(command, _OF_TRAINING)
        asked = re.search(r"allocate [\d.]+ \w+", str(error))
        return f"out of memory: {remedy}{f' (tried to {asked[0]})' if asked else ''}", BROKE_DOWN
    if isinstance(error, OSError):
        of_the_disk = error.errno in _OF_THE_DISK or str(error).startswith("cannot write")
        return str(error), BROKE_DOWN if of_the_disk else USER_ERROR
    if isinstance(error, ValueError | MissingLibrary):
        return str(error), USER_ERROR
    return f"{type(error).__name__}: {error}; this is a bug: --debug shows where", BUG


def one_line(message: str) -> str:
    """The message without line breaks and control characters; a long one is cut in its middle."""
    line = state_dicts.one_line(" ".join(message.split()))
    if len(line) <= _LONGEST:
        return line
    return f"{line[: _LONGEST // 2]} ... {line[5 - _LONGEST // 2 :]}"
