"""The `crate-mae` command before its imports, which take seconds, and in which Ctrl-C and the environment can end it."""

from __future__ import annotations

import sys


def main() -> int:
    """Run `crate_mae.cli.main`; what ends the imports before it is one line, too."""
    try:
        from crate_mae.cli import main as command
    except KeyboardInterrupt:
        print("crate-mae: interrupted", file=sys.stderr)
        return 130
    except ValueError as error:
        if "CRATE_KERNELS_IMPL" not in str(error):  # which crate_kernels reads when it is imported
            raise
        print(f"crate-mae: {error}", file=sys.stderr)
        return 2
    return command()


if __name__ == "__main__":
    sys.exit(main())
