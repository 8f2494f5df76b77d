"""Writes what stored results say, or checks it; see the package.

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
from benchmarks.report import __doc__ as description
from benchmarks.report.pages import begin, end, headline, results_part
from benchmarks.report.plots import plan, save
from benchmarks.report.rows import Results, Row, by_device, device_folders, read
from benchmarks.report.tables import report

# Options that name a page, what they name by default, what is generated there, and how.
PAGES = {
    "readme": (ROOT / "README.md", "headline", headline),
    "page": (ROOT / "docs" / "results.md", "results", results_part),
}


def with_part(page: Path, name: str, part: str) -> str:
    """The page's text with ``part``, markers included, in place of what stands between its markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    text = page.read_text(encoding="utf-8")
    first, last = begin(name), end(name)
    if text.count(first) != 1 or text.count(last) != 1 or text.index(first) > text.index(last):
        raise ValueError(f"{page}: expected one line {first} and after it one line {last}")
    return text[: text.index(first)] + part + text[text.index(last) + len(last) :]


def refuse_dirty(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows that a commit can reproduce; says how many are not for the pages, and where they stand."""
    dirty = [row for row in rows if row.get("dirty")]
    if dirty:
        counts = Counter(row["file"] for row in dirty)
        first = {row["file"]: row["line"] for row in reversed(dirty)}
        places = ", ".join(f"{count} in {file}, first in line {first[file]}" for file, count in counts.items())
        print(
            f"{folder.name}: rows measured on a dirty tree, refused for README.md and docs/results.md: {len(dirty)} ({places})"
        )
    return [row for row in rows if not row.get("dirty")]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    folders = device_folders(arguments.results) if arguments.results.is_dir() else []
    if not folders:
        raise SystemExit(f"--results {arguments.results}: expected a folder that holds one a device, with .jsonl files")
    for option, (_, name, _) in PAGES.items():
        page = getattr(arguments, option)
        if not page.is_file():
            raise SystemExit(
                f"--{option} {page}: expected a file, with one line {begin(name)} and after it one line {end(name)}"
            )
    chosen = [folder for folder in folders if arguments.device in (None, folder.name)]
    if not chosen:
        names = ", ".join(folder.name for folder in folders)
        raise SystemExit(f"--device {arguments.device}: {arguments.results} has results of: {names}")
    texts: dict[Path, str] = {}
    of_commits: list[Results] = []
    measured: list[Results] = []
    for folder in folders:
        rows = read(folder)
        of_commits += by_device(folder, refuse_dirty(folder, rows))
        if folder in chosen:
            results = by_device(folder, rows)
            measured += results
            texts[folder / "report.md"] = report(results, folder / "report.md", plan)
    for option, (_, name, write) in PAGES.items():
        page = getattr(arguments, option)
        texts[page] = with_part(page, name, write(of_commits, page))
    if arguments.check:
        return check(texts)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        print(path)
    if find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed; the extra `plot` brings it")
        return 0
    for folder in chosen:
        for old in folder.glob("plots/*.png"):
            old.unlink()
    for each in measured:
        for path in save(plan(each), each, each.folder / "plots"):
            print(path)
    return 0


def check(texts: dict[Path, str]) -> int:
    """1, and a line for each file that does not have its text; 0 where all have."""
    wrong = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in wrong:
        print(f"{path} is not what the results say; `python -m benchmarks.report` writes it")
    if not wrong:
        print(f"{', '.join(map(str, texts))}: what the results say")
    return int(bool(wrong))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=(description or "").partition("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="holds a folder a device")
    parser.add_argument("--device", metavar="SLUG", help="write the report and plots of this folder alone")
    for option, (default, name, _) in PAGES.items():
        parser.add_argument(f"--{option}", type=Path, default=default, help=f"has the {name} between its markers")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file differs")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
