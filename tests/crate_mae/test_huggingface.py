"""Images of Hugging Face datasets: each form of one that can lie on a disk, and what stands in for the hub."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from crate_mae.data.source import UnreadableImage

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")

import pyarrow.parquet as pq  # noqa: E402

from crate_mae.data.huggingface import HuggingFaceImages  # noqa: E402

COLOURS = {"red.png": (255, 0, 0), "green.png": (0, 255, 0), "blue.png": (0, 0, 255), "grey.png": (99, 99, 99)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The library's cache, away from the user's; and nothing is fetched, whatever a test does."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return tmp_path / "cache"


def encoded(colour: tuple[int, int, int], size: tuple[int, int] = (5, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def rows() -> list[dict]:
    return [{"bytes": encoded(colour), "path": name} for name, colour in COLOURS.items()]


def table(**more) -> datasets.Dataset:
    classes = datasets.ClassLabel(names=["rose", "daisy", "tulip"])
    features = datasets.Features({"image": datasets.Image(), "label": classes})
    columns = {"image": rows(), "label": [0, 2, 1, 0]}
    return datasets.Dataset.from_dict(columns | more, features=features)


def colours(source: HuggingFaceImages) -> list[tuple[int, int, int]]:
    return [source.image(index).getpixel((0, 0)) for index in range(len(source))]


def saved(folder, _):
    table().save_to_disk(folder / "saved")
    return folder / "saved", {}


def saved_splits(folder, _):
    datasets.DatasetDict(train=table(), val=table().select([1])).save_to_disk(folder / "splits")
    return folder / "splits", {}


def parquet_file(folder, _):
    table().to_parquet(folder / "one.parquet")
    return folder / "one.parquet", {}


def parquet_folder(folder, _):
    (folder / "data").mkdir(parents=True)
    for part in range(2):
        table().select([2 * part, 2 * part + 1]).to_parquet(folder / f"data/train-{part:05}-of-00002.parquet")
    table().select([3]).to_parquet(folder / "data/test-00000-of-00001.parquet")
    return folder, {}


def structs(file, images):
    kind = pa.struct({"path": pa.string(), "bytes": pa.binary()})
    pq.write_table(pa.table({"id": list(range(len(images))), "img": pa.array(images, kind)}), file)
    return file


def plain_structs(folder, _):
    return structs(folder / "plain.parquet", rows()), {}


def plain_bytes(folder, _):
    columns = {"thumbnail": [b"x"] * 4, "content": [row["bytes"] for row in rows()]}
    pq.write_table(pa.table(columns), folder / "bytes.parquet")
    return folder / "bytes.parquet", {"column": "content"}


def arrow_file(folder, monkeypatch):
    source, options = saved(folder, monkeypatch)
    return next(source.glob("*.arrow")), options


def paths_alone(folder, _):
    for name, colour in COLOURS.items():
        (folder / name).write_bytes(encoded(colour))
    return structs(folder / "paths.parquet", [{"bytes": None, "path": str(folder / name)} for name in COLOURS]), {}


def hub(folder, monkeypatch):
    def load_dataset(*arguments, **options):
        assert (arguments, options) == (("someone/flowers", "small"), {"split": "train"})
        return table()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return "someone/flowers", {"name": "small"}


FORMS = (
    saved, saved_splits, parquet_file, parquet_folder, plain_structs, plain_bytes, arrow_file, paths_alone, hub
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_images_as_they_are_stored(form, tmp_path, monkeypatch):
    what, options = form(tmp_path, monkeypatch)
    source = HuggingFaceImages(str(what), **options)
    assert colours(source) == list(COLOURS.values())
    assert source.image(1).format == "PNG", "not decoded by the library"
    path = {plain_bytes: "", paths_alone: f" ({tmp_path}/green.png)"}.get(form, " (green.png)")
    assert source.name(1) == f"{what}[train] row 1{path}"
    if form in (plain_structs, plain_bytes, paths_alone):
        assert (source.classes, source.labels.tolist()) == ([""], [0] * 4)
    else:
        assert source.classes == ["daisy", "rose", "tulip"]
        assert [source.classes[label] for label in source.labels] == ["rose", "tulip", "daisy", "rose"]
    assert source.labels.dtype == np.int32
    for outside in (-1, 4):
        with pytest.raises(IndexError):
            source.image(outside)


def test_splits_are_found_and_told_apart(tmp_path):
    for form, other in ((saved_splits, "val"), (parquet_folder, "test")):
        what = str(form(tmp_path / form.__name__, None)[0])
        assert len(HuggingFaceImages(what, split=other)) == 1
        assert HuggingFaceImages(what).remarks() == [
            f"of {what}, split train; left out: {other}; ,split=NAME names one"
        ]
        with pytest.raises(ValueError, match=rf"(?i)split.*nothing|nothing.*train.*{other}") as raised:
            HuggingFaceImages(what, split="nothing")
        assert what in str(raised.value)
    test = table()
    test.info.splits = None
    test._split = datasets.NamedSplit("test")
    test.save_to_disk(tmp_path / "single")
    with pytest.raises(ValueError, match="split: expected test, which was saved, got 'train'"):
        HuggingFaceImages(str(tmp_path / "single"))
    assert len(HuggingFaceImages(str(tmp_path / "single"), split="test")) == 4


def test_images_that_cannot_be_had(tmp_path):
    bad = [None, {"bytes": b"", "path": "empty.png"}, {"bytes": b"no image", "path": None}]
    bad += [{"bytes": None, "path": str(tmp_path / "gone.png")}]
    source = HuggingFaceImages(str(structs(tmp_path / "bad.parquet", bad)))
    causes = []
    for index in range(4):
        with pytest.raises(UnreadableImage, match=rf"bad.parquet\[train\] row {index}") as raised:
            source.image(index)
        assert raised.value.name == source.name(index)
        causes.append(raised.value.cause)
    assert causes == ["empty", "empty", "no image", "vanished"]
    assert len(source.fingerprint()) == 64


def test_lacking_labels_are_a_class_without_a_name(tmp_path):
    table(label=[None, 2, -1, 0]).save_to_disk(tmp_path / "some")
    source = HuggingFaceImages(str(tmp_path / "some"))
    assert source.classes == ["", "daisy", "rose", "tulip"]
    assert [source.classes[label] for label in source.labels] == ["", "tulip", "", "rose"]


@pytest.mark.parametrize(
    ("columns", "column", "said"),
    [
        ({"a": "image", "b": "image"}, None, r"several may hold images, name one; .* a \(.*\), b \(.*\)"),
        ({"a": "text", "b": "text"}, None, r"none may hold images.* a \(string\), b \(string\)"),
        ({"a": "image", "b": "text"}, "b", r"expected one that holds images, got 'b'; .* a \(.*\), b \(string\)"),
        ({"a": "image", "b": "text"}, "c", "expected one that holds images, got 'c'"),
        ({"a": "image", "img": "image"}, None, None),
        ({"a": "image", "img": "bytes"}, None, None),  # the library's type decides
        ({"a": "bytes", "image": "bytes"}, None, None),
        ({"a": "image", "img": "image"}, "a", None),
    ],
)
def test_the_column_of_images(columns, column, said, tmp_path):
    kinds = {"image": (datasets.Image(), rows()), "text": (datasets.Value("string"), ["x"] * 4)}
    kinds["bytes"] = (datasets.Value("binary"), [row["bytes"] for row in rows()])
    features = datasets.Features({name: kinds[kind][0] for name, kind in columns.items()})
    made = datasets.Dataset.from_dict({name: kinds[kind][1] for name, kind in columns.items()}, features=features)
    made.save_to_disk(tmp_path / "made")
    if said is None:
        assert colours(HuggingFaceImages(str(tmp_path / "made"), column=column)) == list(COLOURS.values())
    else:
        with pytest.raises(ValueError, match=f"column: {said}"):
            HuggingFaceImages(str(tmp_path / "made"), column=column)


def test_a_fingerprint_tells_content_and_order_and_nothing_else(tmp_path, cache, monkeypatch):
    def fingerprint(name, rows, **options):
        table().select(rows).to_parquet(tmp_path / name, **options)
        return HuggingFaceImages(str(tmp_path / name)).fingerprint()

    first = fingerprint("a.parquet", range(4))
    os.utime(tmp_path / "a.parquet", (1, 1))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other_cache")
    assert HuggingFaceImages(str(tmp_path / "a.parquet")).fingerprint() == first
    assert fingerprint("b.parquet", range(4), batch_size=1) == first
    assert len({first, fingerprint("c.parquet", [1, 0, 2, 3]), fingerprint("d.parquet", [0, 1, 2])}) == 3
    parts = {
        HuggingFaceImages(str(tmp_path / "a.parquet"), split=f"train[{part}]").fingerprint() for part in (":2", "2:")
    }
    assert len(parts) == 2
    script = (
        "import sys; from crate_mae.data.huggingface import HuggingFaceImages as S; print(S(sys.argv[1]).fingerprint())"
    )
    surroundings = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "third_cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "a.parquet")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=surroundings).stdout
    assert printed.split()[-1] == first


def _colours_into(queue, source):
    queue.put(colours(source))


@pytest.mark.parametrize("start", [s for s in ("fork", "spawn") if s in multiprocessing.get_all_start_methods()])
def test_worker_processes_read_it(start, tmp_path, monkeypatch):
    source = HuggingFaceImages(str(parquet_file(tmp_path, monkeypatch)[0]))
    assert colours(pickle.loads(pickle.dumps(source))) == colours(source)
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    process = context.Process(target=_colours_into, args=(queue, source))
    process.start()
    assert queue.get(timeout=60) == list(COLOURS.values())
    process.join()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError("Couldn't reach\n  the hub"), OSError),
        (datasets.exceptions.DatasetNotFoundError("it does not\n  exist"), FileNotFoundError),
        (ValueError("Unknown\n  split"), ValueError),
        (RuntimeError("something\n  else"), ValueError),
    ],
)
def test_errors_of_the_hub_are_one_line(error, kind, monkeypatch):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(kind) as raised:
        HuggingFaceImages("someone/flowers")
    said = " ".join(str(error).split())
    assert str(raised.value) == f"cannot open the Hugging Face dataset someone/flowers: {said}"


@pytest.mark.parametrize("what", ["nothing.parquet", "./nothing", "/nothing/at/all", "a/b/c", ""])
def test_what_is_no_name_is_not_asked_of_the_hub(what, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(FileNotFoundError, match="no such file or folder, and no name on the hub"):
        HuggingFaceImages(what)


def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"broken.parquet: .*Parquet"):
        HuggingFaceImages(str(tmp_path / "broken.parquet"))
    (tmp_path / "table.csv").write_text("image")
    with pytest.raises(ValueError, match=r"table.csv: expected a file that ends in .parquet or .arrow, or a folder"):
        HuggingFaceImages(str(tmp_path / "table.csv"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match=f"dataset {tmp_path}/nothing: "):
        HuggingFaceImages(str(tmp_path / "nothing"))
    for form in (saved, parquet_file):
        with pytest.raises(ValueError, match="name: there are no configurations to choose from, got 'small'"):
            HuggingFaceImages(str(form(tmp_path, None)[0]), name="small")


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'crate-kernels\[data\]'"):
        HuggingFaceImages("someone/flowers")
