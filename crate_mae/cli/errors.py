"""What the command says of an error, in one line, and the exit status it ends with."""

from __future__ import annotations

import errno
import re
import signal
from argparse import ArgumentError
from collections.abc import Iterable
from difflib import get_close_matches

import torch

from crate_mae.training import NonFiniteLoss, RunStopped

BROKE_DOWN, USER_ERROR, BUG, BY_SIGNAL = 1, 2, 70, 128

_LONGEST = 400

_OF_THE_DISK = {errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT}

_WORDING = (
    (r"^(argument|Parser key|Unexpected) \"?(?P<name>[\w.-]+)\"?: ", r"\g<name>: "),
    (r"Expected a <class 'int'>\. Got value: ", "expected a whole number, got "),
    (r"Expected a <class 'float'>\. Got value: ", "expected a number, got "),
    (r"Expected a <class 'bool'>\. Got value: ", "expected true or false, got "),
    (r"Expected a typing\.Literal\[(.*)\]\. Got value: ", r"expected one of \1, got "),
    (r"invalid choice: '(.*)' \(choose from (.*)\)", r"expected one of \2, got \1"),
    (r"arguments are required: (pretrain|demo)\.(\w+)", r"arguments are required: --\2"),
    (r"Subcommand '(\w+)' does not accept option '(.*)'", r"\1 has no setting \2"),
)
"""What the parsers say, and how it reads in the words of all other messages."""


def nearest(given: str, known: Iterable[str]) -> str:
    """The end of a message, that asks whether the most similar name was meant; empty where none is similar."""
    found = get_close_matches(given, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def worded(error: ArgumentError | TypeError, options: Iterable[str]) -> ValueError:
    """A parser's error in our words, with the nearest of the names that could have been meant.

    Args:
        options: of the command.
    """
    message = " ".join(str(error).split())
    for pattern, words in _WORDING:
        message = re.sub(pattern, words, message)
    if unknown := re.match(r"unrecognized arguments: (--[^\s=]*)", message):
        message += nearest(unknown[1], options)
    elif choice := re.search(r"expected one of (.*), got (.*)", message):
        choices = re.findall(r"'([^']*)'", choice[1])
        message = message.replace(choice[1], ", ".join(choices)) + nearest(choice[2], choices)
    return ValueError(message)


def outcome(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the exit status."""
    if isinstance(error, RunStopped):
        return str(error), BY_SIGNAL + getattr(error, "signal", signal.SIGINT)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was saved before is kept", BY_SIGNAL + signal.SIGINT
    if isinstance(error, NonFiniteLoss):
        return str(error), BROKE_DOWN
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        return (
            f"out of memory: a lower --schedule.batch_size needs less, and so do --run.recompute true and --run.stream 16bit "
            f"({_first_sentence(error)})",
            BROKE_DOWN,
        )
    if isinstance(error, OSError):
        of_the_disk = error.errno in _OF_THE_DISK or str(error).startswith("cannot write")
        return str(error), BROKE_DOWN if of_the_disk else USER_ERROR
    if isinstance(error, ValueError):
        return str(error), USER_ERROR
    return f"{type(error).__name__}: {error}; this is a bug: --debug shows where", BUG


def one_line(message: str) -> str:
    """The message without line breaks and control characters; of a long one, beginning and end."""
    line = " ".join(message.split())
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
    if len(line) <= _LONGEST:
        return line
    return f"{line[: _LONGEST // 2]} ... {line[5 - _LONGEST // 2 :]}"


def _first_sentence(error: BaseException) -> str:
    return re.split(r"\. |\n", str(error) or type(error).__name__)[0]
