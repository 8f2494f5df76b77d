"""``python -m crate_kernels.bench`` tells where the benchmarks are: in the source repository, beside their results.

In a checkout it lists their commands. The installed package does not contain them, and says so in one line.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

BESIDE = Path(__file__).resolve().parents[1] / "benchmarks"
ELSEWHERE = (
    "crate_kernels.bench: benchmarks live in the source repository, not in the installed package; in a checkout of it run "
    "`make gpu-bench`, or one of them, such as `python -m benchmarks.training_step --help`"
)


def programs(folder: Path) -> Iterator[tuple[str, str]]:
    """For each program in a package folder, the command that starts it and the first line of its docstring."""
    for file in sorted([*folder.glob("*.py"), *folder.glob("*/__main__.py")]):
        if 'if __name__ == "__main__":' in file.read_text(encoding="utf-8"):
            module, told_by = (file.parent, file.with_name("__init__.py")) if file.stem == "__main__" else (file, file)
            docstring = ast.get_docstring(ast.parse(told_by.read_text(encoding="utf-8"))) or ""
            yield f"python -m {folder.name}.{module.stem}", docstring.partition("\n")[0]


if __name__ == "__main__":
    # The folder may belong to another project, which has installed a package ``benchmarks``, too.
    if not (BESIDE / "training_step.py").is_file():
        print(ELSEWHERE, file=sys.stderr)
        sys.exit(2)
    for command, told in programs(BESIDE):
        print(f"{command:36} {told}")
