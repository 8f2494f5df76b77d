"""The entry of the `crate-mae` command: handles errors and Ctrl-C during its imports, which take seconds."""

from __future__ import annotations

import os
import sys
import traceback


def main() -> int:
    """Run `crate_mae.cli.main`. An error during the imports is one line, too, with an exit status of its table."""
    _open_what_is_closed()
    try:
        from crate_mae.cli import main as command
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            message, status = "interrupted", 130
        elif "CRATE_KERNELS_IMPL" in str(error):  # crate_kernels reads it when it is imported
            message, status = str(error), 2
        else:
            message, status = f"{type(error).__name__}: {error}; --debug shows where", 70
        print(f"crate-mae: {' '.join(message.split())}", file=sys.stderr)
        return status
    status = command()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads the stream any more; flushing it at exit would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def _open_what_is_closed() -> None:
    """Open standard streams that a shell closed (2>&-): else the next file opened, such as a state, would get their lines."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


if __name__ == "__main__":
    sys.exit(main())
