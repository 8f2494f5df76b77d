"""The `crate-mae` command: what the commands share. Each has a module."""

from __future__ import annotations

import signal
import sys
from argparse import ArgumentError
from collections.abc import Sequence

from jsonargparse import ArgumentParser, set_parsing_settings

from crate_mae import __version__
from crate_mae.cli import pretraining, reconstruct
from crate_mae.data import STOPPING, LostWorkers
from crate_mae.training import NonFiniteLoss, RunStopped

BROKE_DOWN, USER_ERROR = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 (training broke down), 2 (a user's mistake) or 128 + n (stopped by signal n)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        report = _run(arguments)
    except (ArgumentError, ValueError, OSError) as error:
        return _fail(error, USER_ERROR)
    except (LostWorkers, NonFiniteLoss) as error:
        return _fail(error, BROKE_DOWN)
    except RunStopped as error:
        if argv is None:  # the process ends now, and what Slurm sends next must not change its exit status
            for number in STOPPING:
                signal.signal(number, signal.SIG_IGN)
        own_model = any(argument.startswith("--model.") for argument in arguments)
        goes_on = "the same command" if arguments[0] == "demo" and not own_model else "--resume"
        return _fail(f"{error}; {goes_on} goes on", 128 + error.signal)
    except KeyboardInterrupt as error:
        return _fail("interrupted; what was saved before is kept", 128 + getattr(error, "signal", signal.SIGINT))
    print(report)
    return 0


def _run(arguments: list[str]) -> str:
    if not arguments:
        raise ValueError("expected a command: pretrain, demo or reconstruct; --help explains them")
    defaults: dict[str, object] = {}
    if arguments[:1] in (["pretrain"], ["demo"]):
        arguments, defaults = pretraining.read_ahead(arguments)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="crate-mae",
        description="CRATE-MAE, a white-box masked auto-encoder.",
        version=__version__,
        exit_on_error=False,
        allow_abbrev=False,  # what is read ahead has whole names only, and so both read the same
    )
    commands = parser.add_subcommands()
    pretraining.add_commands(commands, defaults)
    reconstruct.add_command(commands)
    chosen = parser.parse_args(arguments)
    command = reconstruct.run if chosen.subcommand == "reconstruct" else pretraining.run
    return command(parser, chosen)


def _fail(error: Exception | str, status: int) -> int:
    print(f"crate-mae: {' '.join(str(error).split())}", file=sys.stderr)
    return status
