"""What the commands' parsers have in common."""

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


def add_device(parser: ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", default="auto", help='"auto" (CUDA where there is one), or a torch device.')


def add_masks(parser: ArgumentParser) -> None:
    """Add the options that say which patches are removed from images."""
    parser.add_argument("--mask_ratio", type=float, help="Fraction of the patches removed; by default, the run's own.")
    parser.add_argument("--seed", type=int, default=0, help="Fixes which patches are removed.")
