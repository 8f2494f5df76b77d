"""`crate-mae pack`: what shards hold, and that an end at any moment changes no byte of them."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from images_of_all_kinds import BAD_BYTES, EXOTIC, EXPECTED, TOLERANCE, as_stored, odd_exif, saved
from PIL import Image

from crate_mae.cli import main
from crate_mae.cli.pack import bytes_of
from crate_mae.data.folder import ImageFolder
from crate_mae.data.packing import PackSettings, pack
from crate_mae.data.reading import whole
from crate_mae.data.shards import TarShards, shard_paths
from crate_mae.data.source import Subset
from crate_mae.data.unreadable import TooManyUnreadable

ROOT = Path(__file__).resolve().parents[2]

SMALL = PackSettings(short_side=48, shard_size=12_000)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def smooth(number: int, width: int = 90, height: int = 60, mode: str = "RGB") -> Image.Image:
    corners = np.random.default_rng(number).integers(0, 256, (3, 4, len(mode)), dtype=np.uint8)
    return Image.fromarray(corners.squeeze(), mode).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photographs(tmp_path) -> Path:
    """40 JPEGs in two classes; each third is small enough to be kept, and one is cut short."""
    root = tmp_path / "photographs"
    for number in range(40):
        path = root / f"class {number % 2}" / f"{number:02}.v1.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(saved(smooth(number, *((40, 45) if number % 3 == 0 else (90, 60))), "JPEG", quality=95))
    cut = root / "class 1" / "11.v1.jpg"
    cut.write_bytes(cut.read_bytes()[:700])
    return root


def contents(out: Path) -> dict[str, bytes]:
    """What must not depend on when or how it was made: all but the indices, which tell of the times of their shards."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".index"}


def packed(source: Path, out: Path) -> TarShards:
    pack(ImageFolder(source), out, SMALL, max_unreadable=1)
    return TarShards(shard_paths(str(out)))


def test_a_folder_and_its_shards_hold_the_same_images(photographs, tmp_path):
    folder, source = ImageFolder(photographs), packed(photographs, out := tmp_path / "out")
    assert len(source.paths) > 5 and all(path.stat().st_size <= 12_000 for path in source.paths)
    readable = [index for index in range(40) if "/11.v1" not in folder.name(index)]
    assert source.classes == folder.classes == ["class 0", "class 1"]
    assert source.labels.tolist() == folder.labels[readable].tolist()
    for place, index in enumerate(readable):
        stem = Path(folder.name(index)).stem.replace(".", "_")
        assert source.name(place).endswith(f"/{folder.classes[folder.labels[index]]}/{index:09}_{stem}.jpg")
        original, image = folder.image(index), source.image(place)
        if original.size == (40, 45):
            assert image.fp.getvalue() == original.fp.getvalue(), "kept byte for byte"
        else:
            assert (image.size, image.format) == ((72, 48), "JPEG")
            resized = original.resize((72, 48), Image.Resampling.LANCZOS)
            assert np.abs(np.asarray(image, int) - np.asarray(resized, int)).mean() < 2
    for line in (out / "checksums.sha256").read_text().splitlines():  # as `sha256sum -c` reads it
        checksum, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == checksum
    for path in source.paths:
        with tarfile.open(path) as tar:
            assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar} == {(0, 0, 0, 0o644, "")}
    (line,) = (out / "unreadable.txt").read_text().splitlines()
    assert line.split("\t")[:2] == ["truncated", f"{photographs}/class 1/11.v1.jpg"]


def test_indices_lie_beside_the_shards(photographs, tmp_path):
    source = packed(photographs, tmp_path / "out")
    assert all(path.with_name(path.name + ".index").exists() for path in source.paths)
    assert not list((tmp_path / "cache").rglob("shard_*"))


def test_every_kind_of_image_is_packed_as_what_it_shows(tmp_path):
    folder, bad = tmp_path / "kinds", {name: content for name, (content, _) in BAD_BYTES.items()}
    folder.mkdir()
    for name, content in (EXOTIC | bad).items():
        (folder / name).write_bytes(content)
    source = packed(folder, tmp_path / "out")
    rows = [line.split("\t") for line in (tmp_path / "out/unreadable.txt").read_text().splitlines()]
    assert {Path(name).name: cause for cause, name, _ in rows} == {
        name: cause for name, (_, cause) in BAD_BYTES.items()
    }
    names = sorted(EXOTIC)
    assert len(source) == len(names)
    for index, name in enumerate(names):
        stored, expected = source.image(index), EXPECTED[name].astype(int)
        mode, kept = stored.mode, stored.fp.getvalue() == EXOTIC[name]
        pixels = np.asarray(whole(stored, 3, name), int)
        if min(expected.shape[:2]) > 48:
            expected = np.asarray(Image.fromarray(EXPECTED[name]).resize((48, 48), Image.Resampling.LANCZOS), int)
        assert pixels.shape == expected.shape, name
        off = np.abs(pixels - expected)
        assert off.max() <= TOLERANCE.get(name, 0) if kept or mode == "RGBA" else off.mean() < 3, name
        assert kept or stored.format in ("JPEG", "PNG"), name
        assert stored.getexif().get(0x0112, 1) == 1 or name == "turned_9.jpg", name


@pytest.mark.parametrize(
    "image, options, stored",
    [
        (smooth(0), {}, ("JPEG", "RGB", (72, 48))),
        (smooth(0, mode="L"), {}, ("JPEG", "L", (72, 48))),
        (smooth(0, 2000, 1000), {}, ("JPEG", "RGB", (96, 48))),
        (Image.fromarray(as_stored(np.asarray(smooth(0)), 6)), {"exif": odd_exif(6)}, ("JPEG", "RGB", (72, 48))),
        (Image.fromarray(as_stored(np.asarray(smooth(0, 40, 45)), 6)), {"exif": odd_exif(6)}, ("JPEG", "RGB", (40, 45))),
        (smooth(0, mode="RGBA"), {}, ("PNG", "RGBA", (72, 48))),
        (Image.merge("RGBA", [*smooth(0).split(), Image.new("L", (90, 60), 255)]), {}, ("JPEG", "RGB", (72, 48))),
        (smooth(0, 90, 20), {}, None),
        (smooth(0, 70_000, 2), {}, None),
        (smooth(0, 70_000, 49).convert("L"), {}, ("PNG", "L", (68_571, 48))),
        (smooth(0, 40, 40).convert("CMYK"), {}, ("JPEG", "RGB", (40, 40))),
    ],
    ids=["large", "grey", "huge", "turned", "turned small", "transparent", "opaque alpha", "panorama", "line", "long", "cmyk"],
)  # fmt: skip
def test_what_is_stored_of_an_image(image, options, stored, tmp_path):
    as_png = image.mode == "RGBA" or image.width > 60_000
    (tmp_path / "in").mkdir()
    content = saved(image, "PNG" if as_png else "JPEG", **options)
    (tmp_path / "in" / f"a.{'png' if as_png else 'jpg'}").write_bytes(content)
    found = packed(tmp_path / "in", tmp_path / "out").image(0)
    if stored is None:
        assert found.fp.getvalue() == content
        return
    assert (found.format, found.mode, found.size) == stored
    upright = whole(Image.open(tmp_path / "in" / os.listdir(tmp_path / "in")[0]), len(found.mode), "a")
    expected = np.asarray(upright.resize(found.size, Image.Resampling.LANCZOS), int)
    assert np.abs(np.asarray(found, int) - expected).mean() < 2.5


def test_the_bytes_do_not_depend_on_the_workers(photographs, tmp_path):
    for workers in (0, 1, 3):
        pack(ImageFolder(photographs), tmp_path / str(workers), SMALL, workers=workers, max_unreadable=0.05)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "3")


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and kills what it forked")
@pytest.mark.parametrize("workers, seed", [(0, 0), (0, 1), (0, 2), (2, 3)])
def test_killed_at_any_moment_and_started_again_it_gives_the_same_bytes(
    workers, seed, photographs, tmp_path, monkeypatch
):
    """Killed at calls of files' functions or, with workers, at any time."""
    pack(ImageFolder(photographs), tmp_path / "undisturbed", SMALL, max_unreadable=0.05)
    expected, rng, out = contents(tmp_path / "undisturbed"), random.Random(seed), tmp_path / "out"
    statuses = []
    slowly = ImageFolder.image
    if workers:
        monkeypatch.setattr(ImageFolder, "image", lambda self, index: time.sleep(0.01) or slowly(self, index))
    while 0 not in statuses:
        is_killed = len(statuses) < (4 if workers else 12)
        delay, calls = rng.uniform(0.02, 0.1), rng.randint(1, 40) + 10 * len(statuses)
        if not (child := os.fork()):
            status = 1
            os.setsid()
            try:
                if is_killed and not workers:
                    dying = DyingOs(calls)
                    for package in ("crate_mae", "crate_kernels"):
                        monkeypatch.setattr(f"{package}.files.os", dying)
                pack(ImageFolder(photographs), out, SMALL, workers=workers, max_unreadable=0.05)
                status = 0
            finally:
                os._exit(status)
        if is_killed and workers:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        deadline = time.monotonic() + 30
        while living_in(child):  # its workers end with it
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert set(statuses) == {0, -signal.SIGKILL} and len(statuses) > 2
    assert contents(out) == expected


def living_in(session: int) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, own = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            found += [process.name] * (int(own) == session and state != "Z")
    return found


class DyingOs:
    """Stands in for `os` in the `files` modules, and kills the process at the call of this number."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __getattr__(self, name: str):
        function = getattr(os, name)
        if name not in ("open", "write", "fsync", "replace", "unlink"):
            return function

        def counted(*arguments):
            self.calls -= 1
            if not self.calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return counted


def test_what_is_finished_is_kept_and_what_is_damaged_is_made_anew(photographs, tmp_path, monkeypatch):
    source, out = ImageFolder(photographs), tmp_path / "out"
    pack(source, out, SMALL, max_unreadable=0.05)
    expected = contents(out)
    paths = shard_paths(str(out))
    asked = []
    monkeypatch.setattr(ImageFolder, "image", lambda self, i, own=ImageFolder.image: asked.append(i) or own(self, i))
    pack(source, out, SMALL, max_unreadable=0.05)
    assert contents(out) == expected and asked == []
    damaged = bytearray(paths[2].read_bytes())
    damaged[1000] ^= 1
    paths[2].write_bytes(damaged)
    paths[-1].unlink()
    pack(source, out, SMALL, max_unreadable=0.05)
    assert contents(out) == expected and 0 < len(asked) < 20


@pytest.mark.parametrize(
    "change, said",
    [
        ({"short_side": 40}, "short_side 48 there, 40 now"),
        ({"quality": 90}, "quality 92 there, 90 now"),
        ({"name": "others"}, "name images there, others now"),
        ({"source": 30}, "images 40 there, 30 now; other images"),
        ({"journal": "{"}, "damaged"),
        ({"journal": None}, "holds images-000000.tar, of which no pack.json tells"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_folder_of_something_else_is_refused_and_overwritten_only_if_asked(change, said, photographs, tmp_path):
    source, out = ImageFolder(photographs), tmp_path / "out"
    pack(source, out, SMALL, max_unreadable=0.05)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    settings = SMALL
    if "journal" in change:
        (out / "pack.json").unlink()
        if change["journal"]:
            (out / "pack.json").write_text(change["journal"])
        before = contents(out)
    elif "source" in change:
        source = Subset(source, np.arange(change["source"]))
    else:
        settings = dataclasses.replace(SMALL, **change)
    with pytest.raises(ValueError, match=f"(?s){said}.*--overwrite"):
        pack(source, out, settings, max_unreadable=0.05)
    assert contents(out) == before
    pack(source, out, settings, max_unreadable=0.05, overwrite=True)
    pack(source, tmp_path / "anew", settings, max_unreadable=0.05)
    assert contents(out) == {**contents(tmp_path / "anew"), "notes.txt": b"mine"}


def test_shards_beside_other_shards_are_not_deleted(photographs, tmp_path):
    packed(photographs, tmp_path / "out")
    (tmp_path / "out" / "mine.tar").write_bytes(b"mine")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds mine\.tar, which is none of its shards"):
        pack(ImageFolder(photographs), tmp_path / "out", SMALL, overwrite=True)
    assert contents(tmp_path / "out") == before


def test_shards_are_not_packed_over_themselves(photographs, tmp_path):
    source = packed(photographs, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="expected another folder"):
        pack(Subset(source, np.arange(3)), tmp_path / "out", SMALL, overwrite=True)
    assert contents(tmp_path / "out") == before


def test_too_many_unreadable_images_end_it_and_what_is_done_is_kept(photographs, tmp_path, capsys):
    for number in (5, 25):
        (photographs / "class 1" / f"{number:02}.v1.jpg").write_bytes(b"text")
    out = tmp_path / "out"
    with pytest.raises(TooManyUnreadable, match=r"more than 2 of 40 images .*\(2 no image, 1 truncated\)"):
        pack(ImageFolder(photographs), out, SMALL, max_unreadable=0.03)
    finished = shard_paths(str(out))
    assert finished and len((out / "unreadable.txt").read_text().splitlines()) == 3
    times = [path.stat().st_mtime_ns for path in finished]
    options = ["--short-side", "48", "--shard_size", "12000", "--workers", "0"]
    assert main(["pack", str(photographs), str(out), *options]) == 1
    assert "more than 1 of 40" in capsys.readouterr().err
    assert main(["pack", str(photographs), str(out), *options, "--max_unreadable", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "37 images" in said and "3 cannot be read and are left out (2 no image, 1 truncated)" in said
    assert [path.stat().st_mtime_ns for path in finished] == times


@pytest.mark.skipif(sys.platform != "linux", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_the_same_command_goes_on(number, photographs, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "crate_mae", "pack", str(photographs), str(out), "--short_side=48"]
    command += ["--shard_size=6kB", "--max_unreadable=0.1", "--workers=2"]
    slowed = "import time, PIL.Image as I; l = I.Image.resize; I.Image.resize = lambda *a, **k: time.sleep(0.1) or l(*a, **k)"
    (tmp_path / "sitecustomize.py").write_text(slowed)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("*.tar")):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(run.pid, number)
    _, complained = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    assert complained.splitlines()[-1].endswith(f"kept in {out}; the same command goes on")
    assert main(command[3:]) == 0
    pack(ImageFolder(photographs), tmp_path / "anew", PackSettings(48, 6000), max_unreadable=0.1)
    assert contents(out) == contents(tmp_path / "anew")


def test_a_full_disk_is_one_line(photographs, tmp_path, monkeypatch, capsys):
    out, write = tmp_path / "out", os.write
    left = [30_000]

    def full(descriptor, data):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    arguments = ["pack", str(photographs), str(out), "--shard_size=12kB", "--workers=0", "--max_unreadable=0.1"]
    with monkeypatch.context() as patch:
        patch.setattr("crate_mae.files.os.write", full)
        assert main(arguments) == 1
    complained = capsys.readouterr().err
    assert complained.count("\n") == 1 and "No space left on device" in complained
    assert main(arguments) == 0


def test_labels_and_odd_names_survive(tmp_path):
    root = tmp_path / "in"
    for name in (b"caf\xe9/\xff.png", "ümlaut/日 本.png".encode(), b"a/" + b"n" * 200 + b".png", b"top.png"):
        path = Path(os.fsdecode(os.path.join(os.fsencode(root), name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(saved(smooth(0, 8, 8), "PNG"))
    folder, source = ImageFolder(root), packed(root, tmp_path / "out")
    assert source.classes == folder.classes and source.labels.tolist() == folder.labels.tolist()
    assert source.name(3).endswith("/ümlaut/000000003_日_本.png")


@pytest.mark.parametrize(
    "text, size", [("1GB", 10**9), ("64MiB", 2**26), ("500 mb", 5 * 10**8), ("1.5k", 1500), ("12345", 12345)]
)
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize(
    "options",
    [
        *("--shard_size=1lb", "--shard_size=0", "--short_side=0", "--quality=101", "--name=a/b"),
        *("--workers=-1", "--max_unreadable=2"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused_by_name(options, photographs, tmp_path, capsys):
    assert main(["pack", str(photographs), str(tmp_path / "out"), options]) == 2
    assert options.split("=")[0].strip("-") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_progress_is_told_in_lines_where_there_is_no_terminal(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("crate_mae.data.progress._SECONDS", 0.0)
    lines: list[str] = []
    pack(ImageFolder(photographs), tmp_path / "out", SMALL, max_unreadable=1, say=lines.append)
    pattern = r"pack: (\d+)/40 images, [\d,.]+ images/s, 0:00:0\d left"
    assert [re.fullmatch(pattern, line)[1] for line in lines] == [str(done) for done in range(1, 41)]


def test_the_journal_says_what_was_done(photographs, tmp_path):
    packed(photographs, tmp_path / "out")
    journal = json.loads((tmp_path / "out/pack.json").read_text())
    shards = journal["shards"]
    assert [shard["first"] for shard in shards] == [0, *(shard["last"] + 1 for shard in shards[:-1])]
    assert shards[-1]["last"] == 39 and sum(shard["images"] for shard in shards) == 39
    assert journal["source"]["images"] == 40
