"""The `crate-mae` command before its imports, which take seconds, and in which Ctrl-C and the environment can end it."""

from __future__ import annotations

import sys
import traceback


def main() -> int:
    """Run `crate_mae.cli.main`; what ends the imports before it is one line, too, with the exit status of its table."""
    try:
        from crate_mae.cli import main as command
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            message, status = "interrupted", 130
        elif "CRATE_KERNELS_IMPL" in str(error):  # which crate_kernels reads when it is imported
            message, status = str(error), 2
        else:
            message, status = f"{type(error).__name__}: {error}; --debug shows where", 70
        print(f"crate-mae: {' '.join(message.split())}", file=sys.stderr)
        return status
    return command()


if __name__ == "__main__":
    sys.exit(main())
