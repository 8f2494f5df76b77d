"""Tar shards as a source: whatever a tar can hold, damaged ones, and shards that change under a run."""

from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from images_of_all_kinds import BAD_BYTES, EXOTIC, EXPECTED, TOLERANCE, saved
from PIL import Image

from crate_mae.data import shard_index
from crate_mae.data.reading import whole
from crate_mae.data.shards import TarShards, shard_paths
from crate_mae.data.source import UnreadableImage

LONG = "d" * 120 + "/" + "n" * 150 + ".png"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(number: int) -> bytes:
    """A PNG that no other number has."""
    return saved(Image.new("RGB", (3 + number % 5, 4), (number % 256, number // 256, 7)), "PNG")


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format, errors="surrogateescape") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def numbered(path: Path, numbers: range) -> Path:
    return write_tar(path, {f"{number:04}.png": picture(number) for number in numbers})


def stored(source: TarShards, index: int) -> bytes:
    """The bytes of an image's file, or the cause that there are none."""
    try:
        return source.image(index).fp.getvalue()
    except UnreadableImage as error:
        assert error.name == source.name(index)
        return error.cause.encode()


def test_every_kind_of_image_is_what_it_is_and_every_bad_one_says_why(tmp_path):
    bad = {name: content for name, (content, _) in BAD_BYTES.items()}
    source = TarShards([write_tar(tmp_path / "kinds.tar", EXOTIC | bad)])
    found = {}
    for index, name in enumerate(EXOTIC | bad):
        assert source.name(index) == f"{tmp_path}/kinds.tar/{name}"
        try:
            found[name] = np.asarray(whole(source.image(index), 3, name))
        except UnreadableImage as error:
            found[name] = error.cause
    assert {name: found[name] for name in bad} == {name: cause for name, (_, cause) in BAD_BYTES.items()}
    for name, expected in EXPECTED.items():
        off = np.abs(found[name].astype(int) - expected).max()
        assert off <= TOLERANCE.get(name, 0), name


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_sought_images_are_those_that_are_read_one_after_the_other(format, tmp_path):
    names = [
        "a.png",
        LONG,
        "./b/c.PNG",
        "\udce9\udcff/\udcfe.png",
        "ümlaut/日本.png",
        "new\nline.png",
        "d/e.f.png",
        "z/",
    ]
    others = {"a.json": b"{}", "._a.png": b"x", ".hidden/b.png": b"x", "notes": b"x", "./c.TXT": b"x"}
    shards = []
    for shard in range(3):
        pictures = {name: picture(100 * shard + i) for i, name in enumerate(names[:-1])}
        shards.append(write_tar(tmp_path / f"s-{shard}.tar", pictures | others, format))
        with tarfile.open(shards[-1], "a", format=format) as tar:
            for kind, name, target in [
                (tarfile.LNKTYPE, "hard.png", "a.png"),
                (tarfile.LNKTYPE, "lost.png", "nowhere.png"),
                (tarfile.SYMTYPE, "soft.png", "a.png"),
                (tarfile.DIRTYPE, "folder.png", ""),
                (tarfile.FIFOTYPE, "pipe.png", ""),
            ]:
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, target
                tar.addfile(member)
    expected = []
    for path in shards:
        with tarfile.open(path, errors="surrogateescape") as tar:
            by_name = {m.name.removeprefix("./"): tar.extractfile(m).read() for m in tar if m.isreg()}
        expected += [by_name[name.removeprefix("./")] for name in names[:-1]] + [by_name["a.png"]]
    source = TarShards(shards)
    order = random.Random(0).sample(range(len(source)), len(source))
    found = {index: stored(source, index) for index in order}
    assert [found[index] for index in range(len(source))] == expected
    assert source.name(1).endswith(LONG) and source.name(3).endswith(r"s-0.tar/\xe9\xff/\xfe.png")
    assert source.name(5).endswith(r"new\nline.png")
    assert source.remarks()[0] == (
        "beside images: 3 .json, 3 .txt, 3 hard links to no image of the shard, 6 hidden, 3 no plain files, 3 symbolic links, "
        "3 without a suffix"
    )
    assert source.classes == ["", r"\xe9\xff", "b", "d", "d" * 120, "ümlaut"]
    assert [source.classes[label] for label in source.labels[:3]] == ["", "d" * 120, "b"]


def test_numbers_in_cls_members_are_the_labels(tmp_path):
    first = {
        "x/1.jpg": picture(1),
        "x/1.cls": b"10\n",
        "x/2.cls": b" 9",
        "x/2.a.png": picture(2),
        "x/2.b.png": picture(3),
    }
    second = {"x/3.png": picture(4), "x/3.cls": b"rose", "x/4.png": picture(5), "x/4.cls": b"007"}
    source = TarShards([write_tar(tmp_path / "1.tar", first), write_tar(tmp_path / "2.tar", second)])
    assert source.classes == ["", "10", "7", "9"]
    assert source.labels.dtype == np.int32
    assert [source.classes[label] for label in source.labels] == ["10", "9", "9", "", "7"]
    assert source.remarks()[0] == "beside images: 4 .cls, 1 .cls that are no whole number"


def test_a_shard_cut_anywhere_gives_its_whole_images_and_tells_of_the_others(tmp_path):
    names = ["a.png", LONG, "b.png", "\udce9.png"]
    pictures = [picture(number) for number in range(4)]
    content = write_tar(
        tmp_path / "whole.tar", dict(zip(names, pictures, strict=True)), tarfile.PAX_FORMAT
    ).read_bytes()
    path, end = tmp_path / "cut.tar", len(content.rstrip(b"\0")) + 512
    for size in random.Random(0).sample(range(512, end), 60):
        path.write_bytes(content[:size])
        source = TarShards([path])
        found = [stored(source, index) for index in range(len(source))]
        whole = sum(a == b for a, b in zip(found, pictures, strict=False))
        assert found == pictures[:whole] + [b"truncated"] * (len(found) - whole)
        assert len(found) - whole <= 1 and whole >= [content.find(p) + len(p) <= size for p in pictures].count(True)
        (remark,) = (line for line in source.remarks() if line.startswith(f"{path}: "))
        assert f"{whole} whole images, {len(found) - whole} cut" in remark


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = numbered(tmp_path / "a.tar", range(5))
    content = bytearray(path.read_bytes())
    place = content.find(b"0003.png")
    content[place + 100 : place + 108] = b"\xffgarbage"
    path.write_bytes(content)
    source = TarShards([path])
    assert [stored(source, index) for index in range(len(source))] == [picture(number) for number in range(3)]
    assert source.remarks()[0].startswith(f"{path}: damaged at byte {place:,}, and what follows is not seen: 3 whole")


@pytest.mark.parametrize("claimed", [2**31, 2**40, 2**62, 2**80])
def test_a_size_that_no_file_has_costs_no_other_image(claimed, tmp_path):
    path = numbered(tmp_path / "a.tar", range(2))
    header = tarfile.TarInfo("b.png")
    header.size = claimed
    path.write_bytes(path.read_bytes()[: 4 * 512] + header.tobuf(tarfile.GNU_FORMAT))
    source = TarShards([path])
    assert [stored(source, index) for index in range(2)] == [picture(number) for number in range(2)]
    assert source.remarks()[0].startswith(f"{path}: cut short, after {path.stat().st_size:,} bytes: 2 whole images")


@pytest.mark.parametrize(
    "content, said",
    [
        (gzip.compress(b"x" * 1000), "compressed by gzip.* decompress it"),
        (b"no tar" * 1000, "not a tar file"),
        (b"", "not a tar file"),
    ],
    ids=["gzip", "text", "empty"],
)
def test_what_is_no_shard_is_refused_by_name(content, said, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: {said}"):
        TarShards([path])


def test_patterns(tmp_path):
    for name in ("b.tar", "a.tar", "._a.tar", "c.tar.gz", "{0..1}.tar"):
        (tmp_path / name).touch()
    assert [path.name for path in shard_paths(str(tmp_path))] == ["a.tar", "b.tar", "{0..1}.tar"]
    assert shard_paths(str(tmp_path / "{0..1}.tar")) == [tmp_path / "{0..1}.tar"]
    assert list(map(str, shard_paths("d-{1..2}/x-{008..011}.tar"))) == [
        f"d-{folder}/x-{number}.tar" for folder in (1, 2) for number in ("008", "009", "010", "011")
    ]
    for wrong in ("x-{a,b}.tar", "x-{3..1}.tar", "x-{0..9}{0..999999}.tar"):
        with pytest.raises(ValueError, match="expected"):
            shard_paths(wrong)
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*x-3\.tar, and 1 more of 2"):
        TarShards(shard_paths(str(tmp_path / "x-{3..4}.tar")))


def test_shards_that_change_while_they_are_read(tmp_path):
    paths = [numbered(tmp_path / f"{shard}.tar", range(10 * shard, 10 * shard + 10)) for shard in range(6)]
    source = TarShards(paths)
    assert stored(source, 0) == picture(0)
    paths[0].unlink()  # and yet it is open
    paths[1].unlink()
    os.utime(paths[2], ns=(1, 1))  # touched alone
    numbered(paths[3], range(70, 80))
    os.truncate(paths[4], 5000)
    paths[5].unlink()
    os.mkfifo(paths[5])
    found = [stored(source, index) for index in range(60)]
    assert found[:10] == [picture(number) for number in range(10)]
    assert found[10:20] == found[30:40] == found[50:] == [b"vanished"] * 10
    assert found[20:30] == [picture(number) for number in range(20, 30)]
    assert found[40:44] == [picture(number) for number in range(40, 44)] and found[45:50] == [b"truncated"] * 5
    numbered(paths[1], range(10, 20))
    assert stored(source, 10) == picture(10), "one that comes back is read again"


@pytest.mark.parametrize("call", ["open", "pread"])
@pytest.mark.parametrize("number, cause", [(errno.EACCES, "no permission"), (errno.EIO, "read error")])
def test_a_shard_that_cannot_be_read_for_a_while(call, number, cause, tmp_path, monkeypatch):
    source = TarShards([numbered(tmp_path / "a.tar", range(2))])

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(f"crate_mae.data.shards.os.{call}", fail)
        assert stored(source, 1) == cause.encode()
    assert stored(source, 1) == picture(1)


def test_threads_forks_and_pickles_read_the_same(tmp_path):
    paths = [numbered(tmp_path / f"{shard:03}.tar", range(3 * shard, 3 * shard + 3)) for shard in range(100)]
    source = TarShards(paths)
    expected = [picture(number) for number in range(300)]
    order = random.Random(0).choices(range(300), k=3000)
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda index: stored(source, index), order)) == [expected[index] for index in order]
    mine = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    assert len(mine & set(map(str, paths))) == 64
    assert [stored(pickle.loads(pickle.dumps(source)), index) for index in range(300)] == expected
    child = os.fork()
    if not child:  # while another thread might have held the lock
        source._opened._lock.acquire()
        os._exit(0 if [stored(source, index) for index in range(300)] == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_an_index_is_kept_until_its_shard_changes(tmp_path, monkeypatch):
    paths = [numbered(tmp_path / f"{shard}.tar", range(shard, shard + 4)) for shard in range(3)]
    first, scanned = TarShards(paths), []
    scan = shard_index.scanned
    monkeypatch.setattr(shard_index, "scanned", lambda path: scanned.append(path) or scan(path))
    again = TarShards(paths)
    assert scanned == [] and again.fingerprint() == first.fingerprint()
    assert [again.name(index) for index in range(12)] == [first.name(index) for index in range(12)]
    numbered(paths[1], range(30, 35))
    damaged = next((tmp_path / "cache" / "crate_mae").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    changed = TarShards(paths)
    assert paths[1] in scanned and 1 <= len(scanned) <= 2
    assert changed.fingerprint() != first.fingerprint() and len(changed) == 13
    assert [stored(changed, index) for index in range(4, 9)] == [picture(number) for number in range(30, 35)]
    assert TarShards(paths[::-1]).fingerprint() != changed.fingerprint()
