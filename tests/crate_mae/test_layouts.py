"""Published data sets as they are distributed: made up here, a few images each, written by nothing of the package."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crate_mae.data import MissingLibrary, Source, UnreadableImage, labelled_parts, open_source, parts_of
from crate_mae.data.layouts import LAYOUTS
from crate_mae.training import ImagesConfig, PretrainConfig
from crate_mae.training.image_sets import image_sets

CIFAR = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")
PICKLED = CIFAR[::2]
NAMES = ["cat", "apple", "boat"]
Held = dict[str, list[tuple[np.ndarray, str]]]
"""Of each part the images, uint8 [height, width, 3], with the names of their classes."""


def make_cifar(folder: Path) -> Held:
    hundred, pickled = "100" in folder.name, folder.name in PICKLED
    batches = {"train": ["train"], "test": ["test"]}
    if not hundred:
        batches = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
    folder.mkdir(parents=True)
    rng, held = np.random.default_rng(0), {"train": [], "test": []}
    for part, files in batches.items():
        for name in files:
            images, labels = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8), rng.permutation(3)
            held[part] += [(image, NAMES[label]) for image, label in zip(images, labels, strict=True)]
            rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(3, 3072)
            if pickled:
                labelled = {"fine_labels" if hundred else "labels": labels.tolist(), "coarse_labels": [9, 9, 9]}
                write_pickle(folder / name, {"data": rows, **labelled})
            else:
                before = np.stack([np.full(3, 9), labels][0 if hundred else 1 :], 1).astype(np.uint8)
                (folder / f"{name}.bin").write_bytes(np.concatenate([before, rows], 1).tobytes())
    if pickled:
        meta = {"fine_label_names" if hundred else "label_names": NAMES, "coarse_label_names": ["x"]}
        write_pickle(folder / ("meta" if hundred else "batches.meta"), meta)
    else:
        (folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")).write_text("\n".join(NAMES) + "\n\n")
    return held


def write_pickle(path: Path, held: object) -> None:
    path.write_bytes(pickle.dumps(held, protocol=2))


def make_flowers(folder: Path) -> Held:
    lists = {"train": [2, 7, 3], "val": [1, 5], "test": [4, 6]}
    labels = np.array([102, 1, 9, 102, 9, 1, 102])
    images = [picture(folder / "jpg" / f"image_{number:05}.jpg", number) for number in range(1, 8)]
    write_mat(folder / "imagelabels.mat", labels=labels[None])
    names = {"train": "trnid", "val": "valid", "test": "tstid"}
    write_mat(folder / "setid.mat", **{names[part]: np.array([numbers]) for part, numbers in lists.items()})
    return {part: [(images[n - 1], str(labels[n - 1])) for n in numbers] for part, numbers in lists.items()}


def write_mat(path: Path, **arrays: np.ndarray) -> None:
    pytest.importorskip("scipy.io").savemat(path, arrays)


def make_pets(folder: Path) -> Held:
    lists = {"trainval": ["Abyssinian_100 1 1 1", "american_bulldog_27 2 2 1"], "test": ["american_bulldog_3 2 2 1"]}
    (folder / "annotations").mkdir(parents=True)
    for name, lines in lists.items():
        (folder / "annotations" / f"{name}.txt").write_text("#Image CLASS-ID SPECIES BREED ID\n" + "\n".join(lines))
    names = {part: [line.split()[0] for line in lines] for part, lines in lists.items()}
    images = {name: picture(folder / "images" / f"{name}.jpg", len(name)) for part in names.values() for name in part}
    held = {
        part: [(images[name], name.rpartition("_")[0]) for name in part_names] for part, part_names in names.items()
    }
    return {"train": held["trainval"], "test": held["test"]}


def picture(path: Path, seed: int) -> np.ndarray:
    """Written without loss, whatever its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    return pixels


MAKERS: dict[str, Callable[[Path], Held]] = {
    **dict.fromkeys(CIFAR, make_cifar), "flowers-102": make_flowers, "oxford-iiit-pet": make_pets
}  # fmt: skip


def assert_holds(source: Source, expected: list[tuple[np.ndarray, str]]) -> None:
    assert len(source) == len(expected) and source.labels.dtype == np.int32
    assert [source.classes[label] for label in source.labels] == [name for _, name in expected]
    for index, (pixels, _) in enumerate(expected):
        np.testing.assert_array_equal(np.asarray(source.image(index)), pixels)
    for outside in (-1, len(source)):
        with pytest.raises(IndexError):
            source.image(outside)


@pytest.mark.parametrize("below", [False, True], ids=["itself", "one level down"])
@pytest.mark.parametrize("name", MAKERS)
def test_each_layout_is_read_to_the_pixel_and_the_label(name, below, tmp_path):
    made = tmp_path / "data" / name
    held = MAKERS[name](made)
    root = made.parent if below else made
    assert parts_of(root) == {part: root / part for part in held}
    prints = {open_source(root).fingerprint()}
    for part, expected in held.items():
        assert_holds(source := open_source(root, part=part), expected)
        assert_holds(pickle.loads(pickle.dumps(open_source(root / part))), expected)
        prints.add(source.fingerprint())
        assert source.name(0).startswith(f"{made}/") and part in source.remarks()[0]
    assert_holds(open_source(root), [each for expected in held.values() for each in expected])
    assert len(prints) == len(held) + 1
    if "val" not in held:
        with pytest.raises(ValueError, match="it holds train, test; name the one to validate on"):
            open_source(root, part="val")


def test_the_layouts_tried_are_all_there_are():
    assert {layout.folder for layout in LAYOUTS} == set(MAKERS)


@pytest.mark.parametrize(("forms", "last"), [(CIFAR[:2], "data_batch_5.bin"), (CIFAR[2:], "train.bin")])
def test_a_fingerprint_is_of_the_pixels_in_either_version(forms, last, tmp_path):
    for name in forms:
        make_cifar(tmp_path / name)
    first, second = (open_source(tmp_path / name / "train").fingerprint() for name in forms)
    assert first == second
    content = (tmp_path / forms[1] / last).read_bytes()
    (tmp_path / forms[1] / last).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert open_source(tmp_path / forms[1] / "train").fingerprint() != first


def test_names_number_the_images_of_a_file(tmp_path):
    make_cifar(tmp_path / CIFAR[0])
    source = open_source(tmp_path / CIFAR[0])
    assert [source.name(index).rpartition("/")[2] for index in (0, 4, 17)] == [
        "data_batch_1#0", "data_batch_2#1", "test_batch#2"
    ]  # fmt: skip


def of_python_2(rows: np.ndarray, labels: list[int]) -> bytes:
    """What cPickle of Python 2 makes of a batch: its texts and the array's content are byte strings."""

    def text(content: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(content)) + content

    small = [b"K" + bytes([number]) for number in labels]
    array = b"".join([
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t", text(b"b"), b"tR",
        b"(K\x01", b"(", *(b"M" + struct.pack("<H", side) for side in rows.shape), b"t",
        b"cnumpy\ndtype\n(", text(b"u1"), b"K\x00K\x01tR(K\x03", text(b"|"), b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
        b"\x89", text(rows.tobytes()), b"tb",
    ])  # fmt: skip
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"](" + b"".join(small) + b"eu."


@pytest.mark.parametrize("protocol", ["python 2", 2, 4, 5])
def test_pickles_of_python_2_and_3_are_read(protocol, tmp_path):
    make_cifar(folder := tmp_path / CIFAR[0])
    images = np.random.default_rng(5).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
    rows, labels = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(300, 3072), [1, 2, 0] * 100
    held = {b"data": rows, b"labels": np.array(labels)}
    content = of_python_2(rows, labels) if protocol == "python 2" else pickle.dumps(held, protocol)
    (folder / "test_batch").write_bytes(content)
    assert (
        pickle.loads(content, encoding="latin1")[b"data" if protocol != "python 2" else "data"].tobytes()
        == rows.tobytes()
    )
    assert_holds(open_source(folder / "test"), [(image, NAMES[n]) for image, n in zip(images, labels, strict=True)])


class Calls:
    """Pickled, it asks for a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize(
    ("hostile", "says"),
    [
        (lambda mark: Calls(os.system, f"touch {mark}"), r"it asks for \w+\.system, .* nothing was run"),
        (lambda mark: Calls(open, str(mark), "w"), r"it asks for \w+\.open, "),
        (lambda mark: Calls(getattr, "text", "upper"), r"it asks for \w+\.getattr, "),
        (lambda mark: np.array([Calls(os.mkdir, str(mark))]), "got one of 'O8'"),
        (lambda mark: np.float32(1), r"it asks for numpy\.\w+\.multiarray\.scalar, "),
    ],
)
@pytest.mark.parametrize("name", PICKLED)
def test_a_hostile_pickle_is_refused_and_not_run(name, hostile, says, tmp_path):
    make_cifar(tmp_path / name)
    batch = tmp_path / name / ("train" if "100" in name else "data_batch_3")
    mark = tmp_path / "mark"
    write_pickle(batch, {"data": hostile(mark)})
    with pytest.raises(ValueError, match=f"{batch}: .*{says}"):
        open_source(tmp_path / name)
    assert not mark.exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def labelled_9(path: Path) -> None:
    path.write_bytes(b"\x09" + path.read_bytes()[1:])


DAMAGES = [
    ("cifar-10-batches-py", "data_batch_2", Path.unlink, "data_batch_2"),
    ("cifar-10-batches-py", "data_batch_2", cut, "damaged, or cut short: .*; get it again"),
    ("cifar-10-batches-py", "data_batch_2", lambda path: write_pickle(path, [1]), "expected a dictionary, got list"),
    ("cifar-10-batches-py", "data_batch_2", lambda path: write_pickle(path, {"data": np.zeros((2, 9), "u1")}),
     r"data: expected uint8 \[images, 3072\], got uint8 \[2, 9\]"),
    ("cifar-10-batches-py", "test_batch", lambda path: write_pickle(path, {"data": np.zeros((2, 3072), "u1")}),
     "labels: expected a list of whole numbers"),
    ("cifar-10-batches-py", "test_batch",
     lambda path: write_pickle(path, {"data": np.zeros((2, 3072), "u1"), "labels": [1]}), "got 1 for 2 images"),
    ("cifar-100-python", "test",
     lambda path: write_pickle(path, {"data": np.zeros((2, 3072), "u1"), "fine_labels": [2, 3]}),
     "expected labels of 0 to 2, got 3 for image 1"),
    ("cifar-100-python", "meta", lambda path: write_pickle(path, {"fine_label_names": ["a", "a"]}), "told apart"),
    ("cifar-10-batches-bin", "test_batch.bin", cut, "images of 3,073 bytes each, got 8,519 bytes"),
    ("cifar-10-batches-bin", "data_batch_5.bin", labelled_9, "expected labels of 0 to 2, got 9 for image 0"),
    ("cifar-100-binary", "train.bin", lambda path: path.write_bytes(b""), "images of 3,074 bytes each, got 0 bytes"),
    ("flowers-102", "imagelabels.mat", Path.unlink, "no such file"),
    ("flowers-102", "setid.mat", cut, "no MATLAB file that can be read, or cut short"),
    ("flowers-102", "setid.mat", lambda path: write_mat(path, trnid=[1], valid=[2], tstid=[8]), "of 1 to 7, got 8"),
    ("flowers-102", "setid.mat", lambda path: write_mat(path, trnid=[1], valid=[2], tstid=[2]), "listed again"),
    ("flowers-102", "setid.mat", lambda path: write_mat(path, trnid=[1], valid=[2]), "tstid: expected an array"),
    ("flowers-102", "imagelabels.mat", lambda path: write_mat(path, labels=[0, 1]), "labels: .* of 1 to 102, got 0"),
    ("oxford-iiit-pet", "annotations/test.txt", Path.unlink, "no such file"),
    ("oxford-iiit-pet", "annotations/test.txt", lambda path: path.write_text("a_1 38 1 1"), "line 1: .* 37, got 38"),
    ("oxford-iiit-pet", "annotations/test.txt", lambda path: path.write_text("a_1 1"), "line 1: expected an image"),
    ("oxford-iiit-pet", "annotations/test.txt", lambda path: path.write_text("../a_1 1 1 1"), "expected an image, its"),
    ("oxford-iiit-pet", "annotations/test.txt", lambda path: path.write_text("a_1 1 1 1"), "one name for each class"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "damage", "says"), DAMAGES, ids=[f"{d[1]}-{n}" for n, d in enumerate(DAMAGES)]
)
def test_what_is_damaged_is_named(name, file, damage, says, tmp_path):
    MAKERS[name](tmp_path / name)
    damage(tmp_path / name / file)
    with pytest.raises((ValueError, OSError), match=says) as raised:
        open_source(tmp_path / name)
    assert str(tmp_path / name / file) in str(raised.value)


def test_an_image_that_is_missing_is_unreadable(tmp_path):
    make_pets(tmp_path / "pets")
    missing = tmp_path / "pets/images/american_bulldog_3.jpg"
    missing.unlink()
    source = open_source(tmp_path / "pets/test")
    files = list(source.files())
    assert len(files) == len(source) and [path for path in files if not path.exists()] == [missing]
    with pytest.raises(UnreadableImage) as raised:
        source.image(0)
    assert (raised.value.cause, raised.value.name) == ("vanished", source.name(0))
    shutil.rmtree(tmp_path / "pets/images")
    with pytest.raises(FileNotFoundError, match=r"no such folder of images: .*/pets/images"):
        open_source(tmp_path / "pets")


def test_without_scipy_it_is_said_how_it_is_installed(tmp_path, monkeypatch):
    make_flowers(tmp_path / "flowers")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingLibrary, match=r"imagelabels.mat: .* scipy .*: pip install '\.\[data\]'"):
        open_source(tmp_path / "flowers")


@pytest.mark.parametrize("other", ["oxford-iiit-pet", "photos", "train"])
def test_several_in_one_folder_are_to_be_named(other, tmp_path):
    make_cifar(tmp_path / CIFAR[1])
    MAKERS.get(other, lambda folder: picture(folder / "a.png", 0))(tmp_path / other)
    for use in (open_source, parts_of, labelled_parts):
        with pytest.raises(ValueError, match=rf"several data sets: .*/{CIFAR[1]} \(.*, .*/{other}.*; name one of them"):
            use(tmp_path)


def test_runs_validate_on_what_is_for_it_and_leave_the_test_part_out(tmp_path):
    plain = PretrainConfig(out=tmp_path / "run", images=ImagesConfig(val_fraction=0.1))
    make_cifar(cifar := tmp_path / "cifar")
    sets = image_sets(dataclasses.replace(plain, data=str(cifar)))
    assert (len(sets.train), len(sets.val)) == (13, 2)
    assert sets.said[0] == f"of {cifar}, train/ to train on, test/ left out"
    make_flowers(flowers := tmp_path / "flowers")
    sets = image_sets(dataclasses.replace(plain, data=str(flowers)))
    assert (sets.train.name(0), sets.val.name(0)) == (
        f"{flowers}/jpg/image_00002.jpg",
        f"{flowers}/jpg/image_00001.jpg",
    )
    assert sets.said[0] == f"of {flowers}, train/ to train on, val/ to validate on, test/ left out"


def test_commands_take_them(tmp_path, capsys):
    pytest.importorskip("jsonargparse")  # lacking where nothing can be installed, as on some GPU machines
    from crate_mae.cli import main

    held = make_cifar(tmp_path / CIFAR[2])
    assert main(["check", str(tmp_path), "--workers=0"]) == 0
    assert "6 images" in capsys.readouterr().out
    assert main(["pack", str(tmp_path), str(tmp_path / "out")]) == 2
    assert f"it holds train, test; pack each by itself, such as {tmp_path}/train" in capsys.readouterr().err
    assert main(["pack", str(tmp_path / CIFAR[2] / "test"), str(tmp_path / "out"), "--workers=0"]) == 0
    packed = open_source(tmp_path / "out")
    assert_holds(packed, held["test"])


class TestLabelledParts:
    @pytest.mark.parametrize("name", MAKERS)
    def test_of_layouts_all_is_trained_on_that_is_not_tested_on(self, name, tmp_path):
        held = MAKERS[name](tmp_path / name)
        train, test, said, named = labelled_parts(tmp_path)
        assert [len(open_source(each)) for each in named] == [len(train), len(test)]
        assert_holds(train, held["train"] + held.get("val", []))
        assert_holds(test, held["test"])
        assert list(train.classes) == list(test.classes)
        assert set(train.classes) == {name for _, name in held["train"]}
        uses = ", ".join(f"{part}/ to {'test' if part == 'test' else 'train'} on" for part in held)
        assert said[0] == f"of {tmp_path}, {uses}"

    def test_classes_of_folders_are_matched_by_name(self, tmp_path):
        folders(tmp_path, "train/a train/b train/c val/b test/c test/a")
        train, test, said, _ = labelled_parts(tmp_path)
        assert train.classes == test.classes == ["a", "b", "c"]
        assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 1, 1, 2, 2], [0, 0, 2, 2])
        assert test.fingerprint() == open_source(tmp_path / "test").fingerprint()
        assert said == [f"of {tmp_path}, train/ to train on, val/ left out, test/ to test on"]
        shutil.rmtree(tmp_path / "test")
        assert labelled_parts(tmp_path).test.labels.tolist() == [1, 1]

    def test_what_to_test_on_may_be_named(self, tmp_path):
        folders(tmp_path, "flat/a flat/b other/b parts/train/a parts/train/b parts/val/b")
        train, test, said, _ = labelled_parts(tmp_path / "flat", test=tmp_path / "other")
        assert (len(train), test.labels.tolist(), said) == (4, [1, 1], [])
        train, test, said, _ = labelled_parts(tmp_path / "parts", test=tmp_path / "parts")
        assert (len(train), test.labels.tolist()) == (4, [1, 1])
        make_flowers(tmp_path / "flowers")  # of which "val" is not trained on, where it is tested on
        train, test, *_ = labelled_parts(tmp_path / "flowers", test=tmp_path / "flowers/val")
        assert {train.name(i) for i in range(len(train))}.isdisjoint(test.name(i) for i in range(len(test)))

    @pytest.mark.parametrize(
        ("held", "options", "says"),
        [
            ("a b", {}, "it has no part to test on; put a test/ or val/ beside its train/"),
            ("train/a train/b", {}, "it has no part to test on"),
            ("train/a test/a", {}, "expected two classes or more to train on, got 'a' alone"),
            (
                "train/a train/b test/a test/c",
                {},
                "are images of c, of which none is trained on, such as test/c/0.png",
            ),
            ("train test", {}, "its images have no classes; expected a folder for each class"),
            ("train train/a train/b test/a", {}, "2 of its images are of no class, such as train/0.png"),
            ("a b", {"test": "synthetic:4"}, "synthetic:4: its images have no classes"),
            ("a b", {"test": "1 synthetic:4 + 1 synthetic:5"}, "expected one data set .*, got several"),
            ("a b", {"test": "."}, "the images to test on are those that are trained on"),
            ("train/a train/b", {"test": "nowhere"}, "no such folder of images: nowhere"),
        ],
    )
    def test_what_is_missing_is_said(self, held, options, says, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        folders(tmp_path, held)
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            labelled_parts(".", **options)

    def test_what_is_not_there_is_said_first(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such folder of images"):
            labelled_parts(tmp_path / "nowhere")

    def test_of_hugging_face_splits_are_parts(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        datasets.disable_progress_bars()
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "b", "a"])})
        image = Image.new("RGB", (4, 4))

        def table(*labels: int) -> datasets.Dataset:
            return datasets.Dataset.from_dict(
                {"image": [image] * len(labels), "label": list(labels)}, features=features
            )

        splits = datasets.DatasetDict(train=table(2, 1, 1), validation=table(1))
        splits.save_to_disk(tmp_path / "saved")
        what = f"hf:{tmp_path}/saved"
        train, test, said, _ = labelled_parts(what)
        assert train.classes == test.classes == ["a", "b"], "without the one that no image is of"
        assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 1], [1])
        assert said[0] == f"of {what}, split train to train on, validation to test on"
        with pytest.raises(ValueError, match=r"name a split to test on \(test\), .* it has validation"):
            labelled_parts(f"{what},split=train")
        assert len(labelled_parts(f"{what},split=train", test=f"{what},split=validation").test) == 1


def folders(root: Path, names: str) -> None:
    """Two images in each of the folders."""
    for name in names.split():
        for index in range(2):
            picture(root / name / f"{index}.png", index)
