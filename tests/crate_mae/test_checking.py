"""`crate-mae check`: what it finds, says, and ends with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from images_of_all_kinds import EXOTIC, saved, write_bad, write_exotic
from PIL import Image

from crate_mae.cli import main
from crate_mae.data.checking import check
from crate_mae.data.folder import ImageFolder
from crate_mae.data.packing import pack
from crate_mae.data.shards import TarShards, shard_paths
from crate_mae.data.source import Subset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        size = (300 + number, 230) if number % 2 else (250 + number, 100)
        (folder / f"{number:02}.jpg").write_bytes(saved(Image.new("RGB", size, (number, 0, 0)), "JPEG"))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_every_bad_file_is_found_with_its_cause_and_no_other(workers, tmp_path):
    folder = tmp_path / "kinds"
    folder.mkdir()
    write_exotic(folder)
    causes = write_bad(folder)
    source = ImageFolder(folder)
    report = check(source, workers=workers)
    assert {Path(image.name).name: image.cause for image in report.unreadable} == causes
    assert [image.name for image in report.unreadable] == sorted(image.name for image in report.unreadable)
    assert report.images == len(source) and report.kinds.total() == len(EXOTIC)
    assert report.kinds["PNG", "RGBA"] >= 2 and report.kinds["TIFF", "F"] >= 3
    assert (report.smallest, report.largest) == ((14, 10), (256, 256))


def test_all_is_well(tmp_path, capsys):
    folder = write_pictures(tmp_path / "in", 10)
    assert main(["check", str(folder), "--workers=0", f"--out={tmp_path / 'list'}"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and (tmp_path / "list").read_bytes() == b""
    assert said.out.startswith("10 images, read at ") and said.out.endswith("\nall images can be read\n")
    assert "  sizes 250 x 100 to 309 x 230, 5 with a short side below 224 pixels\n" in said.out
    assert "          10  JPEG RGB\n" in said.out


@pytest.mark.parametrize("bad, verdict", [(1, "goes on without them"), (30, "stops")])
def test_what_cannot_be_read_is_shown_in_part_and_listed_in_full(bad, verdict, tmp_path, capsys):
    folder = write_pictures(tmp_path / "in", 40)
    for number in range(bad):
        (folder / f"{number:02}.jpg").write_bytes(b"text")
    assert main(["check", str(folder), "--workers=0"]) == 1
    said = capsys.readouterr()
    assert f"{bad} cannot be read:\n" in said.out and f"{bad:>14}  no image\n" in said.out
    assert said.out.count(".jpg (in no format") == min(bad, 20)
    assert ("and 10 more" in said.out) == (bad == 30)
    assert f"\na run {verdict}: by default it does without 1% of the images, here 1\n" in said.out
    assert said.err == f"crate-mae: {bad} images cannot be read ({bad} no image); --out FILE lists them\n"
    out = tmp_path / "list.txt"
    assert main(["check", str(folder), "--workers=0", f"--out={out}"]) == 1
    rows = [line.split("\t") for line in out.read_text().splitlines()]
    assert [row[:2] for row in rows] == [["no image", f"{folder}/{number:02}.jpg"] for number in range(bad)]
    assert all(len(row) == 3 and row[2] for row in rows)


def test_shards_are_compared_with_their_checksums(tmp_path, capsys):
    out = tmp_path / "out"
    packed = pack(ImageFolder(write_pictures(tmp_path / "in", 6)), out)
    assert main(["check", str(out), "--workers=0"]) == 0
    assert "1 of 1 shards are as their checksums say" in capsys.readouterr().out
    content = bytearray((out / packed.shards[0].file).read_bytes())
    content[-3] ^= 1  # of what no image has
    (out / packed.shards[0].file).write_bytes(content)
    assert main(["check", str(out), "--workers=0"]) == 1
    said = capsys.readouterr()
    assert f"{out}/images-000000.tar: not as its checksum says; get it again" in said.out
    assert "0 of 1 shards are as their checksums say" in said.out and "all images can be read" in said.out
    assert said.err == "crate-mae: 1 shards are not as their checksums say\n"


def test_a_part_of_shards_is_compared_too(tmp_path):
    pack(ImageFolder(write_pictures(tmp_path / "in", 6)), tmp_path / "out")
    source = Subset(TarShards(shard_paths(str(tmp_path / "out"))), np.arange(2))
    report = check(source)
    assert (report.images, report.verified_shards, report.damaged_shards) == (2, 1, [])


def test_there_is_no_list_in_a_folder_that_is_not_there(tmp_path, capsys):
    folder = write_pictures(tmp_path / "in", 1)
    assert main(["check", str(folder), f"--out={tmp_path}/no/list"]) == 2
    assert main(["check", str(folder), f"--out={tmp_path}"]) == 2
    assert main(["check", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 3
