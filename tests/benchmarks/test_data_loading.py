"""The benchmark of data loading at toy size: every loader has its row, and a loader that gives other images is refused."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from tiny_runs import write_photographs

from benchmarks import data_loading
from benchmarks.records import Row

NEEDS = {"parquet": "datasets", "datasets": "datasets", "webdataset": "webdataset", "torchvision": "torchvision"}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_loader_has_a_row(tmp_path, threads):
    photographs, file = write_photographs(tmp_path / "photographs"), tmp_path / "rows.jsonl"
    arguments = ["--data", str(photographs), "--images", "7", "--batch", "3", "--rounds", "2", "--workers", "1"]
    data_loading.main([*arguments, "--json", str(file)])
    *rows, of_workers = map(json.loads, file.read_text().splitlines())
    assert sorted(row["provider"] for row in rows) == sorted(data_loading.PROVIDERS)
    for row in [*rows, of_workers]:
        assert row.keys() | {"unavailable"} == Row.__annotations__.keys()
        assert (row["operator"], row["shape"], row["threads"]) == ("data_loading", [3, 3, 224, 224], 1)
        assert row["data"].startswith("6 JPEGs, 284x256 pixels and ") and "6 of them enlarged" in row["data"]
    for row in rows:
        name = row["provider"]
        assert ("unavailable" in row) == (find_spec(NEEDS.get(name, "torch")) is None), name
        if "unavailable" in row:
            assert f"it needs the package {NEEDS[name]}" in row["unavailable"] and row["ms"] is None
            continue
        assert row["images_per_second"] == pytest.approx(6e3 / row["ms"]["p50"]), "two whole batches"
        assert row["ratio"]["p20"] > 0 and row["rounds"] == 2
        assert (row["error"] is None) == (name == "pillow")
        assert name == "pillow" or row["error"]["images"] <= data_loading.TOLERANCE
    assert (of_workers["mode"], of_workers["provider"]) == ("1 workers", "packed") and of_workers[
        "images_per_second"
    ] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nothing/at/all"], "--data nothing/at/all: .*nothing/at/all"),
        (["--images", "3"], "--batch 64: expected no more than --images"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, said, threads):
    with pytest.raises(SystemExit, match=said):
        data_loading.main(arguments)


def test_other_images_are_refused(tmp_path):
    source = data_loading.open_source(write_photographs(tmp_path / "photographs"))
    files = data_loading.prepare(source, 6, 2, 1, tmp_path)
    right = next(iter(data_loading.by_pillow(files)()))
    assert {flip for _, flip in files.draws} == {False, True}

    def check(batch):
        return data_loading.check("some", lambda: [batch], data_loading.first_crops(files, None))["images"]

    assert check(right) == 0
    for wrong, said in (
        (right.flip(0), "an image is .* off"),  # of the right files, in another order
        (right.flip(-1), "an image is .* off"),
        (right.roll(12, -1), "an image is .* off"),
        (right[:1], r"expected uint8 \[2, 3, 224, 224\], got torch.uint8 \[1, 3, 224, 224\]"),
        (right.float(), "expected uint8 .* got torch.float32"),
    ):
        with pytest.raises(ValueError, match=f"some: {said}"):
            check(wrong)
