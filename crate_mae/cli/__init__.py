"""The `crate-mae` command: parses the arguments, runs one of its commands, each of which has a module, and reports errors."""

from __future__ import annotations

import signal
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

from crate_mae import __version__
from crate_mae.cli import (
    analyze,
    check,
    compare,
    embed,
    evaluate,
    export,
    finetuning,
    importing,
    pack,
    pretraining,
    reconstruct,
    share,
    visualize,
)
from crate_mae.cli.errors import DEBUG, DEBUG_HELP, nearest, one_line, outcome, worded
from crate_mae.cli.settings import check_argument, load
from crate_mae.data import STOPPING
from crate_mae.training import RunStopped
from crate_mae.training.ranks import end_of_rank, is_silent, launched, leave

OTHERS = {
    "reconstruct": reconstruct,
    "analyze": analyze,
    "visualize": visualize,
    "evaluate": evaluate,
    "embed": embed,
    "compare": compare,
    "pack": pack,
    "check": check,
    "import": importing,
    "share": share,
    "export": export,
}
"""The commands that do not train, by their modules."""

TRAINING = {"pretrain": pretraining, "demo": pretraining, "finetune": finetuning}
"""The commands that train; some of their options decide the defaults of others, and are read first."""

COMMANDS = (*TRAINING, *OTHERS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. An error is one line on stderr; with --debug anywhere among the arguments, the traceback comes before it.

    Returns:
        The exit status.

        ======= ========================================================================================================
        0       Done.
        1       Training broke down: values that are not finite, the disk, lost processes, no memory. Images that cannot be
                read: too many of them for `pack`, any for `check`.
        2       A user's mistake: an option, a setting, a file or folder.
        70      A bug of ours: an error that nobody foresaw.
        128 + n Ended by signal n, such as 130 by Ctrl-C; a run was saved, or the line says otherwise.
        ======= ========================================================================================================
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [argument for argument in given if argument != DEBUG]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may not be UTF-8
    try:
        report = _run(arguments)
        if not is_silent():
            with suppress(OSError):  # nobody reads the pipe any more, and all is done
                print(report, flush=True)
        if launched() and argv is None:
            leave(0)
    except (Exception, KeyboardInterrupt) as error:
        if DEBUG in given:
            traceback.print_exc()
        message, status = outcome(error, *arguments[:1])
        if (
            status > 128 and argv is None
        ):  # the process ends now, and Slurm's next signal must not change its exit status
            for number in STOPPING:
                signal.signal(number, signal.SIG_IGN)
        if isinstance(error, RunStopped):
            message += _how_to_go_on(arguments)
        line = f"crate-mae: {one_line(message)}"
        if launched() and argv is None:
            end_of_rank(line, error, status)
        with suppress(OSError):  # the terminal is gone; the exit status tells
            print(line, file=sys.stderr, flush=True)
        return status
    return 0


def _how_to_go_on(arguments: list[str]) -> str:
    if arguments[0] == "check":
        return ""
    if arguments[0] == "embed":
        return "; the same command goes on"
    own_model = any(argument.startswith("--model.") for argument in arguments)
    if not (arguments[0] == "pack" or (arguments[0] == "demo" and not own_model)):
        return "; --resume goes on"
    return f"; the same command{' without --overwrite' if '--overwrite' in arguments else ''} goes on"


def _run(arguments: list[str]) -> str:
    if not arguments:
        raise ValueError(f"expected a command: {', '.join(COMMANDS)}; --help explains them")
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        given = arguments[0]
        raise ValueError(f"expected a command, one of {', '.join(COMMANDS)}, got {given!r}{nearest(given, COMMANDS)}")
    if launched() and arguments[0] in (*OTHERS, "demo"):
        raise ValueError(
            f"crate-mae {arguments[0]} is one process: start it without torchrun, which is for pretrain and finetune"
        )
    option = ""
    for argument in arguments:
        if argument.startswith("--"):
            option, _, argument = argument.partition("=")
        check_argument(option, argument)
    defaults: dict[str, Any] = {}
    options = ["--help", "--version", DEBUG]
    try:
        module = TRAINING.get(arguments[0])
        if module:
            arguments, defaults = module.read_ahead(arguments)
        set_loader("yaml", load, (yaml.YAMLError, ValueError))
        # What options mean is read from source code, which takes half of a parser's time, and is for the help alone.
        set_parsing_settings(docstring_parse_attribute_docstrings=not {"-h", "--help"}.isdisjoint(arguments))
        parser = ArgumentParser(
            prog="crate-mae",
            description="CRATE-MAE, a white-box masked auto-encoder.",
            epilog=DEBUG_HELP,
            version=__version__,
            exit_on_error=False,
            allow_abbrev=False,  # options that are read first need whole names, too
        )
        commands = parser.add_subcommands()
        for name in COMMANDS:
            own = ArgumentParser()  # of the other commands only the name and a line are shown
            if name == arguments[0]:
                own = TRAINING[name].make_parser(name, defaults) if name in TRAINING else OTHERS[name].make_parser()
                options = [*own._option_string_actions, DEBUG]
            text = TRAINING[name].HELP[name] if name in TRAINING else OTHERS[name].HELP
            commands.add_subcommand(name, own, help=text)
        chosen = parser.parse_args(arguments)
    except ArgumentError as error:
        raise worded(error, options) from error
    return {**TRAINING, **OTHERS}[chosen.subcommand].run(parser, chosen)
