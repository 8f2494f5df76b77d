"""What stored results say: ``report.md`` and plots for each device, and the README's tables.

    python -m benchmarks.report                  # write them
    python -m benchmarks.report --check          # fail where what is written is not what the results say

Plots need matplotlib (the extra ``plot``) and are not compared by ``--check``: their bytes depend on its version.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks import ROOT
from benchmarks.report.plots import plan, save
from benchmarks.report.readme import readme_part
from benchmarks.report.rows import Results, Row, by_device, device_folders, read
from benchmarks.report.tables import BEGIN, END, report


def with_part(readme: Path, part: str) -> str:
    """The README's text with ``part``, markers included, in place of what stands between its markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme}: expected one line {BEGIN} and after it one line {END}")
    before, rest = text.split(BEGIN)
    return before + part + rest.split(END)[1]


def refuse_dirty(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows that a commit can reproduce; says how many are not for the README, and where they stand."""
    dirty = [row for row in rows if row.get("dirty")]
    if dirty:
        counts = Counter(row["file"] for row in dirty)
        first = {row["file"]: row["line"] for row in reversed(dirty)}
        places = ", ".join(f"{count} in {file}, first in line {first[file]}" for file, count in counts.items())
        print(f"{folder.name}: rows measured on a dirty tree, refused for the README: {len(dirty)} ({places})")
    return [row for row in rows if not row.get("dirty")]


def documents(folders: Sequence[Path], chosen: Sequence[Path], readme: Path) -> tuple[dict[Path, str], list[Results]]:
    """The text that each file should have, the README last; and what was measured in the chosen folders."""
    texts: dict[Path, str] = {}
    for_readme: list[Results] = []
    for_plots: list[Results] = []
    for folder in folders:
        rows = read(folder)
        for_readme += by_device(folder, refuse_dirty(folder, rows))
        if folder in chosen:
            results = by_device(folder, rows)
            texts[folder / "report.md"] = report(results, folder / "report.md", plan)
            for_plots += results
    texts[readme] = with_part(readme, readme_part(for_readme, readme))
    return texts, for_plots


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    folders = device_folders(arguments.results) if arguments.results.is_dir() else []
    if not folders:
        raise SystemExit(f"--results {arguments.results}: expected a folder that holds one a device, with .jsonl files")
    if not arguments.readme.is_file():
        raise SystemExit(
            f"--readme {arguments.readme}: expected a file, with one line {BEGIN} and after it one line {END}"
        )
    chosen = [folder for folder in folders if arguments.device in (None, folder.name)]
    if not chosen:
        names = ", ".join(folder.name for folder in folders)
        raise SystemExit(f"--device {arguments.device}: {arguments.results} has results of: {names}")
    texts, measured = documents(folders, chosen, arguments.readme)
    if arguments.check:
        wrong = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        for path in wrong:
            print(f"{path} is not what the results say; `python -m benchmarks.report` writes it")
        if not wrong:
            print(f"{', '.join(map(str, texts))}: what the results say")
        return int(bool(wrong))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        print(path)
    if find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed; the extra `plot` brings it")
        return 0
    for folder in chosen:
        for old in [*folder.glob("plots/*.png"), *folder.glob("plots/*.svg")]:
            old.unlink()
    for results in measured:
        for path in save(plan(results), results, results.folder / "plots"):
            print(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="holds a folder a device")
    parser.add_argument("--device", metavar="SLUG", help="write the report and plots of this folder alone")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file differs")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
