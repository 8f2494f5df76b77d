"""What the parsers of the commands have in common."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from crate_mae.cli.errors import DEBUG_HELP


def command_parser(description: str | None = None, epilog: str = "") -> ArgumentParser:
    """The parser of a command; options are given by their whole names, and errors are raised.

    Args:
        description: at the head of the help.
        epilog: at its end, before the line on --debug.
    """
    return ArgumentParser(
        description=description,
        epilog=f"{epilog} {DEBUG_HELP}".lstrip(),
        exit_on_error=False,
        allow_abbrev=False,
    )
