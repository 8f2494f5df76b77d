"""One archive of all that a command has written. It is renewed after each part, so that it is there however the command ends."""

from __future__ import annotations

import argparse
import os
import tarfile
from pathlib import Path

from benchmarks import ROOT
from crate_kernels.files import replaced


class Archive:
    """A .tar.gz of the files and folders ``paths``; what lies in the repository unpacks to its place there. As a context manager,
    it is written when the block ends, whatever ends it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths: list[Path] = []

    def write(self) -> None:
        with replaced(self.path) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for path in self.paths:
                if path.exists():
                    inside = path.is_relative_to(ROOT)
                    archive.add(path, path.relative_to(ROOT) if inside else path.name)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *error: object) -> None:
        self.write()
        print(f"archive: {self.path}", flush=True)


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--archive",
        type=Path,
        metavar="PATH",
        help="where the archive of an unattended run goes, which is made however that ends: a .tar.gz file, or a folder, in "
        "which it is called results-DEVICE-COMMIT-COMMAND.tar.gz (default: the folder that $OUT names, else runs)",
    )


def archive_of(asked: Path | None, device: str, commit: str | None, command: str) -> Archive:
    """The archive that ``--archive`` asks for."""
    where = asked or Path(os.environ.get("OUT") or ROOT / "runs")
    if where.suffixes[-2:] != [".tar", ".gz"]:
        where /= f"results-{device}-{(commit or 'unknown')[:12]}-{command}.tar.gz"
    return Archive(where.absolute())
