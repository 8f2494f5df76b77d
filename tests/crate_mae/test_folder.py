"""Folders of images: what is found in them and in which order, links, changes, kept lists, and the shipped photographs."""

from __future__ import annotations

import csv
import hashlib
import os
import pickle
import random
import shutil
import socket
import stat
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crate_mae.data import FLOWERS, ImageFolder, UnreadableImage, compare, listing
from crate_mae.data.index_files import read_index, write_index
from crate_mae.data.listing import holds_images
from crate_mae.data.paths import PathList
pass
from crate_mae.files import replaced


def touch(root: Path, *names: str | bytes) -> Path:
    """Files, empty unless they are links: "a -> b" is a link named a to b."""
    for name in names:
        name, _, target = os.fsdecode(name).partition(" -> ")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target) if target else path.touch()
    return root


def found(images: ImageFolder) -> list[str]:
    return [os.fsdecode(images._images[index]) for index in range(len(images))]


def state(images: ImageFolder) -> tuple:
    """All that may differ between two listings."""
    return found(images), images.classes, images.labels.tolist(), images.fingerprint(), images.remarks()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """The user's cache of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return Path(os.environ["XDG_CACHE_HOME"])


@pytest.fixture
def kept(monkeypatch) -> None:
    """Indices are kept of small folders too, and trusted as soon as the clock of the file system has moved on."""
    monkeypatch.setattr(listing, "_WORTH_KEEPING", 0)
    monkeypatch.setattr(listing, "_SETTLED_NS", 20_000_000)


@pytest.fixture
def listed(monkeypatch) -> list[bytes]:
    """The folders that were listed, and not taken from an index; one without a permission to read cannot be."""
    asked, scandir = [], os.scandir

    def observed(path):
        if isinstance(path, bytes):  # and not of what empties a folder
            asked.append(path)
            if not os.stat(path).st_mode & stat.S_IRUSR:  # root may read everything
                raise PermissionError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", observed)
    return asked


def settle() -> None:
    time.sleep(0.03)


class TestListing:
    def test_order_classes_and_strangers(self, tmp_path):
        # "-" and "." come before the "/" after a folder's name, "0" after it
        touch(tmp_path, "a/x.jpg", "a-b.jpg", "a.PNG", "a0.jpg", "a-/y.gif", "a/deep/er/y.JPEG", "a/z.webp", "é/1.jfif")
        touch(tmp_path, "a/.hidden.png", ".cache/w.png", "jpg", "b/notes.txt")
        images = ImageFolder(tmp_path)
        expected = sorted(
            ["a-/y.gif", "a-b.jpg", "a.PNG", "a/deep/er/y.JPEG", "a/x.jpg", "a/z.webp", "a0.jpg", "é/1.jfif"]
        )
        assert found(images) == expected
        assert images.classes == ["", "a", "a-", "é"]
        assert images.labels.dtype == np.int32 and images.labels.tolist() == [2, 0, 0, 1, 1, 1, 0, 3]
        assert images.fingerprint() == hashlib.sha256("".join(f"{name}\0" for name in expected).encode()).hexdigest()
        assert images.path(3) == tmp_path / "a/deep/er/y.JPEG"
        with pytest.raises(IndexError, match="0 to 7, got 8"):
            images.name(8)
        assert state(pickle.loads(pickle.dumps(images))) == state(images)

    def test_runs_longer_than_a_piece(self, tmp_path, monkeypatch):
        monkeypatch.setattr("crate_mae.data.paths._PIECE", 3)
        touch(tmp_path, *(f"{folder}/{index}.jpg" for folder in "abc" for index in range(7)), "b.jpg", "b/5/x.jpg")
        images = ImageFolder(tmp_path)
        assert found(images) == sorted(found(images)) and len(images) == 23
        content = "".join(f"{name}\0" for name in found(images)).encode()
        assert images.fingerprint() == hashlib.sha256(content).hexdigest()
        for first, stop in [(0, 23), (4, 5), (6, 9), (22, 23), (23, 23)]:
            assert b"".join(images._images.texts(first, stop)).split(b"\0")[:-1] == [
                os.fsencode(name) for name in found(images)[first:stop]
            ]

    def test_names_of_any_bytes(self, tmp_path):
        touch(tmp_path, b"b\xff/\xc3.png", "a\nb/c\x1b.png", "ü.png")
        for index in range(3):
            Image.new("L", (index + 1, 1)).save(ImageFolder(tmp_path).path(index))
        images = ImageFolder(tmp_path)
        assert [images.image(index).size for index in range(3)] == [(1, 1), (2, 1), (3, 1)]
        assert [images.name(index) for index in range(3)] == [
            f"{tmp_path}/a\\nb/c\\x1b.png",
            f"{tmp_path}/b\\xff/\\xc3.png",
            f"{tmp_path}/ü.png",
        ]
        assert images.classes == ["", "a\\nb", "b\\xff"]
        images.save_list(tmp_path / "list")
        assert ImageFolder(tmp_path, kept=tmp_path / "list").fingerprint() == images.fingerprint()

    def test_what_is_no_image_is_told(self, tmp_path, listed):
        touch(
            tmp_path, "shots.jpg/1.png", "gone.jpg -> nowhere", "b/self.jpg -> self.jpg", "x.png -> b/2.png", "b/2.png"
        )
        touch(
            tmp_path,
            "1.txt",
            "2.TXT",
            "3.txt -> 1.txt",
            "a/4.xcf",
            "a/5.csv",
            "README",
            "six.a b",
            ".hidden.txt",
            "a/7.7",
        )
        os.mkfifo(tmp_path / "fifo.jpg")
        os.mkfifo(tmp_path / "fifo")
        touch(tmp_path, "piped.jpg -> fifo")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(tmp_path / "s.jpg"))
        for name in "cdef":
            touch(tmp_path, f"{name}/1.jpg")
            (tmp_path / name).chmod(0o300)
        images = ImageFolder(tmp_path)
        assert found(images) == ["b/2.png", "shots.jpg/1.png", "x.png"]
        assert images.remarks() == [
            "folders that cannot be listed (4): c, d, e and 1 other",
            "links that lead nowhere (2): b/self.jpg, gone.jpg",
            "pipes, sockets or devices named like images (3): fifo.jpg, piped.jpg, s.jpg",
            "left out 3 .txt, 2 suffixless, 1 .7 files and 2 others",
        ]

    def test_the_memory_of_a_large_index_is_told(self, tmp_path):
        for count, said in [(100_000, []), (100_001, ["index of 100,001 images: 6 MiB"])]:  # of 64 bytes each
            names = b"".join(b"%055d.jpg\0" % index for index in range(count))
            PathList.of_runs([(b"a", names)]).save(tmp_path / "list")
            assert ImageFolder(tmp_path, kept=tmp_path / "list").remarks() == said

    @pytest.mark.parametrize("threads", [1, 32])
    @pytest.mark.parametrize(
        ("links", "expected", "again"),
        [
            (["real/loop -> ..", "loop -> ."], "real/x/1.jpg", "loop, real/loop"),
            (["a -> real/x", "real/b -> x"], "real/x/1.jpg", "a, real/b"),  # real folders before links
            (["b -> {out}", "a -> {out}"], "a/in/2.jpg real/x/1.jpg", "b"),  # then in their order
            (["a -> b", "b -> {out}"], "a/in/2.jpg real/x/1.jpg", "b"),  # one link as far as a route goes
            (["a -> {out}", "b -> {out}/in"], "b/2.jpg real/x/1.jpg", "a/in"),  # fewest folders after the link
            (["b/c/d -> {out}/in", "{out}/e -> {over}", "b/c/z -> {over}"], "b/c/d/2.jpg b/c/z/3.jpg real/x/1.jpg", ""),
            (["b -> {out}", "{out}/a -> {over}", "c -> {over}"], "b/in/2.jpg c/3.jpg real/x/1.jpg", "b/a"),
        ],
    )
    def test_a_folder_is_taken_once_by_a_way_that_is_fixed(
        self, tmp_path, monkeypatch, threads, links, expected, again
    ):
        monkeypatch.setattr(listing, "_THREADS", threads)
        places = {name: str(tmp_path / name) for name in ("out", "over")}
        touch(tmp_path, "root/real/x/1.jpg", "out/in/2.jpg", "over/3.jpg")
        touch(tmp_path / "root", *(link.format(**places) for link in links))
        images = ImageFolder(tmp_path / "root")
        assert found(images) == expected.split()
        count = again.count(",") + 1
        told = f"folders met again by a link or a loop ({count}): {again}"
        assert images.remarks() == ([told] if again else [])

    def test_linked_folders_give_classes(self, tmp_path):
        touch(tmp_path, "store/7/1.jpg", "store/8/2.jpg", "set/cat -> ../store/7", "set/dog -> ../store/8")
        images = ImageFolder(tmp_path / "set")
        assert images.classes == ["cat", "dog"] and found(images) == ["cat/1.jpg", "dog/2.jpg"]

    @pytest.mark.parametrize("names", [[], ["a.txt", ".b.png"]])
    def test_no_images(self, tmp_path, names):
        with pytest.raises(FileNotFoundError, match=r"no images under .*looked for \.apng, \.avif"):
            ImageFolder(touch(tmp_path, *names))
        with pytest.raises(FileNotFoundError, match=r"no such folder of images: .*missing"):
            ImageFolder(tmp_path / "missing")

    def test_an_image_that_cannot_be_had_is_named(self, tmp_path):
        images = ImageFolder(touch(tmp_path, "a/good.png"))
        with pytest.raises(UnreadableImage) as raised:
            images.image(0)
        assert raised.value.name == images.name(0) == str(tmp_path / "a/good.png")

    def test_a_split_is_a_partition_fixed_by_the_seed(self, tmp_path):
        images = ImageFolder(touch(tmp_path, *(f"{index}.png" for index in range(10))))
        train, val = split(images, 0.3, seed=1)
        names = [[part.name(index) for index in range(len(part))] for part in (train, val)]
        assert len(val) == 3 and all(part == sorted(part) for part in names)
        assert sorted(sum(names, [])) == [images.name(index) for index in range(10)]
        assert split(images, 0.3, seed=1)[1].fingerprint() == val.fingerprint()
        assert split(images, 0.3, seed=2)[1].fingerprint() != val.fingerprint()
        with pytest.raises(ValueError, match="validation"):
            split(ImageFolder(touch(tmp_path / "other", "only.png")), 0.5, seed=0)

    @pytest.mark.parametrize(
        ("names", "holds"),
        [(["a/b/1.jpg"], True), (["x.png -> a", "a/1"], False), (["1.jpg/1.txt", "a/l -> .."], False), ([], False)],
    )
    def test_whether_a_folder_holds_images(self, tmp_path, listed, names, holds):
        touch(tmp_path, "closed/1.png", *names)
        (tmp_path / "closed").chmod(0o300)
        assert holds_images(tmp_path) is holds

    def test_whether_a_file_is_an_image(self, tmp_path):
        touch(tmp_path, "1.png", "1.txt")
        assert holds_images(tmp_path / "1.png") and not holds_images(tmp_path / "1.txt")


@pytest.mark.usefixtures("kept")
class TestKeptIndex:
    def test_only_what_changed_is_listed_again(self, tmp_path, listed):
        touch(tmp_path, *(f"{folder}/{index}.jpg" for folder in range(20) for index in range(3)))
        settle()
        first = ImageFolder(tmp_path)
        assert len(listed) == 21
        listed.clear()
        assert state(ImageFolder(tmp_path)) == state(first) and not listed
        touch(tmp_path, "7/new.jpg")
        settle()
        assert "7/new.jpg" in found(ImageFolder(tmp_path))
        assert [os.path.basename(path) for path in listed] == [b"7"]

    def test_a_folder_changed_as_it_was_listed_is_listed_again(self, tmp_path, monkeypatch, listed):
        monkeypatch.setattr(listing, "_SETTLED_NS", 2 * 10**9)
        touch(tmp_path, "a/1.jpg")
        ImageFolder(tmp_path)
        listed.clear()
        ImageFolder(tmp_path)
        assert len(listed) == 2

    def test_small_folders_leave_nothing_in_the_cache(self, tmp_path, monkeypatch, cache):
        monkeypatch.setattr(listing, "_WORTH_KEEPING", 3)
        ImageFolder(touch(tmp_path / "a", "1.jpg"))
        assert not list(cache.rglob("*.*"))
        ImageFolder(touch(tmp_path / "b", "1.jpg", "2.jpg"))
        assert len(list(cache.rglob("*.*"))) == 1

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
            lambda path: write_index(path, {"names": np.zeros(3)}, {}),
            lambda path: write_index(path, read_index(path)[0], {**read_index(path)[1], "format": "folders 0"}),
            lambda path: write_index(path, read_index(path)[0], {**read_index(path)[1], "suffixes": ".png"}),
            lambda path: (path.unlink(), path.mkdir()),
            lambda path: (shutil.rmtree(path.parent), path.parent.touch()),
        ],
        ids=["cut", "empty", "flipped", "foreign", "older", "suffixes", "folder", "unwritable"],
    )
    def test_an_index_that_is_of_no_use_is_made_anew(self, tmp_path, cache, listed, spoil):
        touch(tmp_path, "a/1.jpg", "2.jpg")
        settle()
        first = ImageFolder(tmp_path)
        spoil(next(cache.rglob("*.safetensors")))
        listed.clear()
        assert state(ImageFolder(tmp_path)) == state(first)
        assert len(listed) == 2

    def test_two_writers_at_once_do_no_harm(self, tmp_path):
        path, arrays = tmp_path / "index", {"a": np.arange(10_000)}
        with replaced(path, alone=False) as file:
            file.write(b"of another")
            assert write_index(path, arrays, {"of": "one"})
            assert np.array_equal(read_index(path)[0]["a"], arrays["a"])
            file.write(b" process")
        assert path.read_bytes() == b"of another process"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("seed", range(6))
    def test_after_any_changes_it_is_what_a_fresh_listing_is(self, tmp_path, monkeypatch, listed, seed):
        rng = random.Random(seed)
        root, out = tmp_path / "root", tmp_path / "out"
        touch(tmp_path, "root/always.jpg", "root/a/1.jpg", "root/b/c/2.jpg", "root/b/3.txt", "out/d/4.jpg", "out/5.png")
        touch(root, *(f"c/{index}/1.jpg" for index in range(5)), f"link -> {out}")
        empty = tmp_path / "empty"

        def fresh() -> tuple:
            with monkeypatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(empty))
                outcome = state(ImageFolder(root))
            shutil.rmtree(empty)
            return outcome

        reused = 0
        for _ in range(12):
            for _ in range(rng.randrange(4)):
                change(rng, root, out)
            settle()
            listed.clear()
            again = state(ImageFolder(root))
            asked = len(listed)
            assert again == fresh()
            reused += len(listed) - 2 * asked
            paths = [os.path.join(root, path) for path in again[0]]
            assert paths == sorted(paths, key=os.fsencode)
            images = {(os.path.realpath(os.path.dirname(path)), os.path.basename(path)) for path in paths}
            assert images == reachable(str(root), set()) and len(images) == len(paths)
        assert reused > 20


def change(rng: random.Random, root: Path, out: Path) -> None:
    """Something that may happen to a folder of images between two runs."""
    entries = [path for top in (root, out) for path in sorted(top.rglob("*")) if path.name != "always.jpg"]
    folders = [root, out] + [path for path in entries if path.is_dir() and not path.is_symlink()]
    links = [path for path in entries if path.is_symlink()]
    new = rng.choice(folders) / rng.choice(["n.jpg", "m.png", "k.txt", "a", "b", "x.jpg", ".h.png", "é", "a-"])
    match rng.randrange(9):
        case 0 if not os.path.lexists(new):
            new.touch()
        case 1 if not os.path.lexists(new):
            new.mkdir()
        case 2 if not os.path.lexists(new):
            new.symlink_to(rng.choice([root, out, *entries, root / "nothing"]))
        case 3 if entries:
            remove(rng.choice(entries))
        case 4 if entries and not os.path.lexists(new):
            moved = rng.choice(entries)
            if moved not in new.parents:
                moved.rename(new)
        case 5 if links:  # the folder that the link is in changes, and what it leads to does not
            link = rng.choice(links)
            link.unlink()
            link.symlink_to(rng.choice(folders))
        case 6 if len(folders) > 2:
            folder = rng.choice(folders[2:])
            folder.chmod(folder.stat().st_mode ^ stat.S_IRUSR)
        case 7 if len(folders) > 2:  # another folder of the same times
            folder = rng.choice(folders[2:])
            before = folder.stat()
            remove(folder)
            touch(folder, f"{rng.randrange(9)}.jpg")
            os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
        case 8:  # under times that did not change
            folder = rng.choice(folders)
            before = folder.stat()
            (folder / f"{rng.randrange(9)}.bmp").touch()
            os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))


def remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    path.chmod(0o700)
    for folder, inside, _ in os.walk(path):
        for name in inside:
            if not os.path.islink(os.path.join(folder, name)):
                os.chmod(os.path.join(folder, name), 0o700)
    shutil.rmtree(path)


def reachable(folder: str, seen: set[str]) -> set[tuple[str, str]]:
    """The images under a folder, each as the real path of its folder and its name, found in the plainest way."""
    folder, images = os.path.realpath(folder), set()
    if folder in seen or not os.stat(folder).st_mode & stat.S_IRUSR:
        return images
    seen.add(folder)
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.isdir(path) and not name.startswith("."):
            images |= reachable(path, seen)
        elif os.path.isfile(path) and not name.startswith(".") and name.endswith((".jpg", ".png", ".bmp")):
            images.add((folder, name))
    return images


class TestKeptList:
    def test_is_taken_for_the_folder(self, tmp_path):
        touch(tmp_path, *(f"set/{folder}/{index}.jpg" for folder in "abc" for index in range(4)), "set/0.jpg", "list")
        images = ImageFolder(tmp_path / "set")
        images.save_list(tmp_path / "list")
        assert compare(ImageFolder(tmp_path / "set", kept=tmp_path / "list"), images) == (0, 0)
        shutil.rmtree(tmp_path / "set" / "b")
        touch(tmp_path, "moved/set/a/new.jpg")
        (tmp_path / "set").rename(tmp_path / "moved" / "old")
        kept = ImageFolder(tmp_path / "moved" / "old", kept=tmp_path / "list")
        assert state(kept) == (*state(images)[:4], [])
        assert kept.path(0) == tmp_path / "moved" / "old" / "0.jpg"
        with pytest.raises(UnreadableImage) as raised:
            kept.image(found(kept).index("b/2.jpg"))
        assert raised.value.cause == "vanished"

    @pytest.mark.parametrize("piece", [1, 2, 5, 2**16])
    def test_what_is_gone_and_new_is_counted(self, tmp_path, monkeypatch, piece):
        monkeypatch.setattr("crate_mae.data.paths._PIECE", piece)
        names = [f"{folder}{index}.jpg" for folder in ("", "a/", "a-/", "b/c/") for index in range(6)]
        rng = random.Random(0)
        for number in range(20):
            sets = [set(rng.sample(names, rng.randint(1, len(names)))) for _ in range(2)]
            kept, now = (
                ImageFolder(touch(tmp_path / f"{number}_{side}", *sorted(some))) for side, some in enumerate(sets)
            )
            assert compare(kept, now) == (len(sets[0] - sets[1]), len(sets[1] - sets[0]))

    def test_a_damaged_list_is_named(self, tmp_path):
        path = tmp_path / "images"
        images = ImageFolder(touch(tmp_path / "set", "a/1.jpg"))
        images.save_list(path)
        whole = path.read_bytes()
        for content in (whole[:-1], whole[:-1] + b"?", b"", b"a/1.jpg\n"):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=f"{path}: a damaged list"):
                ImageFolder(tmp_path / "set", kept=path)
        write_index(path, {"names": np.zeros(3, np.uint8)}, {"format": "folders 1"})
        with pytest.raises(ValueError, match="damaged list of images, or something else"):
            ImageFolder(tmp_path / "set", kept=path)
        with pytest.raises(FileNotFoundError, match="missing"):
            ImageFolder(tmp_path / "set", kept=tmp_path / "missing")
        with pytest.raises(OSError, match=r"cannot write .*missing"):
            images.save_list(tmp_path / "missing" / "images")


class TestFlowers:
    def test_fit_in_three_megabytes(self):
        assert sum(path.stat().st_size for path in FLOWERS.rglob("*") if path.is_file()) <= 3_000_000

    @pytest.mark.parametrize(("part", "of_each_class"), [("train", 110), ("val", 30)])
    def test_classes_are_balanced(self, part, of_each_class):
        images = ImageFolder(FLOWERS / part)
        assert images.classes == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
        assert set(Counter(images.labels.tolist()).values()) == {of_each_class}

    def test_every_photograph_is_attributed(self):
        shipped = {path.relative_to(FLOWERS).as_posix() for path in FLOWERS.rglob("*.jpg")}
        with (FLOWERS / "ATTRIBUTION.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["file"] for row in rows} == shipped
        assert all(row["photographer"] and row["flickr_page"] and row["licence"] == "CC BY 2.0" for row in rows)
        licence = (FLOWERS / "LICENSE.txt").read_text(encoding="utf-8").splitlines()
        licensed = {line.split(" CC-BY by ")[0] for line in licence if " CC-BY by " in line}
        assert licensed == {name.split("/", 1)[1] for name in shipped}

    def test_no_photograph_is_in_both_parts(self):
        train, val = ({path.name for path in (FLOWERS / part).rglob("*.jpg")} for part in ("train", "val"))
        assert not train & val
