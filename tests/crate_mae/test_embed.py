"""The embed command: what its files hold, how it goes on after an interruption, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import safe_open

pytest.importorskip("jsonargparse")  # lacking where nothing can be installed, as on some GPU machines

from tiny_runs import TINY, write_classes, write_photographs

import crate_mae
from crate_mae.classifiers import classifier_of
from crate_mae.cli import main
from crate_mae.data import CentreCropped, ImageFolder, Normalization, Subset, UnreadableImage, open_source
from crate_mae.data.packing import pack
from crate_mae.embedding import embed, making, read_embeddings
from crate_mae.embedding.chunks import Chunks
from crate_mae.embedding.files import Rows, Shape, write
from crate_mae.evaluation import FeatureSpec, features_of
from crate_mae.evaluation.features import extract
from crate_mae.model import CrateMAE
from crate_mae.state_dicts import checksum
from crate_mae.training import RunStopped
from crate_mae.training.fitting import Fit

FORMATS = ["npz", "parquet"]

MEAN_TOKEN = FeatureSpec()

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch, tmp_path):
    """24 images make 5 chunks, the last one smaller."""
    monkeypatch.setattr(making, "_CHUNK", 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    return write_classes(tmp_path_factory.mktemp("embed") / "classes") / "train"


@pytest.fixture
def run(tmp_path) -> Path:
    torch.manual_seed(1)
    crate_mae.save_model(CrateMAE(TINY), tmp_path / "run", mean=MEAN, std=STD)
    return tmp_path / "run"


@pytest.fixture(params=FORMATS)
def out(request, tmp_path) -> Path:
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return tmp_path / f"out.{request.param}"


def command(run: Path, data: object, out: Path, *more: str) -> list[str]:
    given = ["embed", str(run), "--data", str(data), "--out", str(out)]
    return [*given, "--precision", "float32", "--num_workers", "0", *more]


def expected(run: Path, data: Path, spec: FeatureSpec = MEAN_TOKEN, batch_size: int = 5) -> torch.Tensor:
    """As `evaluate` makes them."""
    model = crate_mae.load_model(run).eval()
    images = CentreCropped(open_source(data), (32, 32))
    features, _ = extract(
        lambda batch: features_of(model, batch, spec),
        images,
        Normalization(MEAN, STD, 3),
        torch.device("cpu"),
        batch_size=batch_size,
        unreadable=lambda met: None,
    )
    return features


def interrupted_at(monkeypatch: pytest.MonkeyPatch, *batches: int, number: int = signal.SIGINT) -> list[int]:
    """The signal arrives in the middle of the batches of these numbers; returns the list of those that were computed."""
    done: list[int] = []

    def interrupting(*given):
        done.append(len(done))
        if done[-1] in batches:
            signal.raise_signal(number)
        return features_of(*given)

    monkeypatch.setattr(making, "features_of", interrupting)
    return done


def test_the_file_holds_what_evaluate_computes(run, classes, out, capsys):
    options = ["--pool", "both", "--norm", "false", "--layer", "1"]
    assert main(command(run, classes, out, *options)) == 0
    printed = capsys.readouterr().out
    found, source = read_embeddings(out), ImageFolder(classes)
    spec = FeatureSpec("both", 0, norm=False)
    assert found.features.dtype == np.float32 and found.labels.dtype == np.int64
    np.testing.assert_array_equal(found.features, expected(run, classes, spec))  # chunks are batches of 5 here
    assert found.names == [source.name(number) for number in range(24)] == sorted(found.names)
    assert found.classes == ["brick", "grass", "water"] and found.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    about = found.about
    assert about["weights"] == checksum(crate_mae.load_model(run).state_dict())
    assert about["model"]["kind"] == "CrateMAE" and about["model"]["embed_dim"] == 32
    assert about["features"] == spec.in_words() and about["spec"]["pool"] == "both"
    assert about["data"] == str(classes) and about["precision"] == "float32"
    assert about["versions"]["crate_mae"] == crate_mae.__version__
    assert f"embed: 24 images; {spec.in_words()}, float32 on cpu, 5 images at once (auto)" in printed
    assert f"24 images, 64 numbers each, in {out} ({out.stat().st_size / 1e6:,.1f} MB)" in printed.splitlines()[-1]
    assert not Path(f"{out}.partial").exists()


def test_the_formats_are_those_of_their_libraries(run, classes, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for each in FORMATS:
        assert main(command(run, classes, tmp_path / f"out.{each}")) == 0
    found = read_embeddings(tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as held:
        assert held.files == ["features", "names", "labels", "classes", "about"]
        assert held["names"].dtype.kind == "U" and held["names"].tolist() == found.names
        assert json.loads(str(held["about"])) == found.about
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["name", "label", "class", "features"]
    assert table["class"].to_pylist() == [found.classes[label] for label in found.labels]
    np.testing.assert_array_equal(np.array(table["features"].to_pylist(), np.float32), found.features)
    assert json.loads(table.schema.metadata[b"crate_mae"]) == found.about
    other = read_embeddings(tmp_path / "out.parquet")
    assert other.names == found.names and other.classes == found.classes and other.about == found.about


def test_a_flat_folder_has_no_classes(run, tmp_path, out):
    made = embed(run, str(write_photographs(tmp_path / "photos")), out, batch_size=3, say=lambda line: None)
    found = read_embeddings(made.path)
    assert (made.path, made.images, made.unreadable, made.width) == (out, 12, 0, 32)
    assert found.labels is None and found.classes is None and found.features.shape == (12, 32)


def test_shards_give_what_their_images_give(run, classes, tmp_path, out):
    pack(ImageFolder(classes), tmp_path / "shards", workers=0)
    shards = tmp_path / "shards"
    assert main(command(run, shards, out)) == 0
    found = read_embeddings(out)
    np.testing.assert_array_equal(found.features, expected(run, classes))  # PNGs are packed as they are
    assert found.classes == ["brick", "grass", "water"] and np.bincount(found.labels).tolist() == [8, 8, 8]
    assert found.names[0].startswith(str(shards))


def test_batches_and_workers_do_not_matter(run, classes, tmp_path):
    def of(name: str, *options: str) -> np.ndarray:
        assert main(command(run, classes, tmp_path / name, *options)) == 0
        return read_embeddings(tmp_path / name).features

    first = of("auto.npz")
    for size in (1, 3, 5):
        np.testing.assert_allclose(of(f"{size}.npz", f"--batch_size={size}"), first, rtol=1e-4, atol=1e-5)
    of("workers.npz", "--num_workers", "2")
    assert (tmp_path / "workers.npz").read_bytes() == (tmp_path / "auto.npz").read_bytes()


def test_a_classifier_is_embedded_by_its_encoder(run, classes, tmp_path, out):
    other = tmp_path / "classifier"
    crate_mae.save_model(classifier_of(crate_mae.load_model(run), 5), other, mean=MEAN, std=STD)
    assert main(command(other, classes, out, "--norm", "false")) == 0
    np.testing.assert_array_equal(read_embeddings(out).features, expected(run, classes, FeatureSpec(norm=False)))


def test_what_cannot_be_read_is_left_out_and_counted(run, classes, tmp_path, out, capsys):
    data = Path(shutil.copytree(classes, tmp_path / "classes"))
    bad = [*(data / "brick").glob("[0-4].png"), data / "water" / "7.png"]  # all of the first chunk
    for path in bad:
        path.write_bytes(b"" if path.parent.name == "water" else b"no image")
    assert main(command(run, data, out)) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("18 images, 32 numbers each, in ")
    assert printed.endswith("; 6 cannot be read and are left out (5 no image, 1 empty)")
    found = read_embeddings(out)
    names = [ImageFolder(classes).name(number) for number in range(24)]
    kept = [number for number in range(24) if data / Path(names[number]).relative_to(classes) not in bad]
    assert [Path(name).relative_to(data) for name in found.names] == [
        Path(names[number]).relative_to(classes) for number in kept
    ]
    assert found.labels.tolist() == [0] * 3 + [1] * 8 + [2] * 7
    assert found.about["left_out"] == {"no image": 5, "empty": 1}
    # The batches have other images now, which rounds otherwise.
    np.testing.assert_allclose(found.features, expected(run, classes)[kept].numpy(), rtol=1e-4, atol=1e-5)


def test_no_image_can_be_read(run, tmp_path, out, capsys):
    data = write_photographs(tmp_path / "photos", 6)
    for path in data.iterdir():
        path.write_bytes(b"")
    assert main(command(run, data, out)) == 2
    assert "none of the 6 images can be read; crate-mae check says why" in capsys.readouterr().err
    assert not out.exists()


def test_features_that_are_not_finite_end_it(run, classes, tmp_path, monkeypatch, out, capsys):
    monkeypatch.setattr(making, "features_of", lambda *given: features_of(*given) / 0)
    assert main(command(run, classes, out)) == 2
    assert f"not finite, those of {classes}/brick/0.png for one" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_interrupted_at_any_batch_it_goes_on_to_the_same_bytes(
    run, classes, tmp_path, monkeypatch, capsys, out, workers
):
    options = ["--batch_size", "2", "--num_workers", workers]
    whole = tmp_path / f"whole{out.suffix}"
    data = Path(shutil.copytree(classes, tmp_path / "classes"))
    (data / "grass" / "3.png").write_bytes(b"")
    assert main(command(run, data, whole, *options)) == 0
    partial = Path(f"{out}.partial")
    # Batches a chunk: 2 + 2 + 1 images. After the signal the batch at hand is ended, and of the chunk at hand nothing kept.
    for stop_at, signal_number, status in ((0, signal.SIGINT, 130), (7, signal.SIGTERM, 143), (4, signal.SIGHUP, 129)):
        done = interrupted_at(monkeypatch, stop_at, number=signal_number)
        capsys.readouterr()
        assert main(command(run, data, out, *options)) == status
        assert len(done) == stop_at + 1 and not out.exists()
        assert capsys.readouterr().err.rstrip().endswith("; the same command goes on")
    kept = sorted(path.name for path in partial.iterdir())
    assert kept == [f"chunk_{number:08}.safetensors" for number in range(3)]
    done = interrupted_at(monkeypatch)
    assert main(command(run, data, out, *options)) == 0
    said = capsys.readouterr().out
    assert f"going on: 3 of 5 chunks are in {partial} already" in said
    assert "1 cannot be read and are left out (1 empty)" in said
    assert len(done) == 3 + 2
    assert out.read_bytes() == whole.read_bytes() and not partial.exists()


def test_stopped_while_the_file_is_written_nothing_is_lost(run, classes, tmp_path, monkeypatch, out):
    assert main(command(run, classes, tmp_path / f"whole{out.suffix}")) == 0
    done = interrupted_at(monkeypatch, 4)  # the last
    with pytest.raises(RunStopped, match="5 of 5 chunks are kept"):
        embed(run, str(classes), out, precision="float32", say=lambda line: None)
    assert len(done) == 5 and not out.exists()
    done = interrupted_at(monkeypatch)
    embed(run, str(classes), out, precision="float32", say=lambda line: None)
    assert not done and out.read_bytes() == (tmp_path / f"whole{out.suffix}").read_bytes()


def interrupted(run: Path, classes: Path, out: Path, monkeypatch) -> list[Path]:
    """The four chunks of a command that was interrupted in the last batch of the fourth."""
    interrupted_at(monkeypatch, 3)
    assert main(command(run, classes, out)) == 130
    return sorted(Path(f"{out}.partial").iterdir())


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "gone", "other metadata"])
def test_a_damaged_chunk_is_made_again(run, classes, tmp_path, monkeypatch, capsys, damage):
    out, whole = tmp_path / "out.npz", tmp_path / "whole.npz"
    assert main(command(run, classes, whole)) == 0
    chunk = interrupted(run, classes, out, monkeypatch)[1]
    content = bytearray(chunk.read_bytes())
    if damage == "a bit":
        with safe_open(chunk, "pt") as file:
            value = file.get_tensor("features")[2, 3].numpy().tobytes()
        content[content.index(value)] ^= 1  # the least significant one
    chunk.write_bytes(
        {"cut": content[:-9], "empty": b"", "other metadata": content.replace(b"made_of", b"made_by")}.get(
            damage, content
        )
    )
    if damage == "gone":
        chunk.unlink()
    done = interrupted_at(monkeypatch)
    assert main(command(run, classes, out)) == 0
    assert "going on: 3 of 5 chunks" in capsys.readouterr().out
    assert len(done) == 2 and out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("change", ["weights", "data", "names", "spec", "nothing"])
def test_changed_weights_or_images_make_all_anew(run, classes, tmp_path, monkeypatch, capsys, change):
    data, out = Path(shutil.copytree(classes, tmp_path / "classes")), tmp_path / "out.npz"
    one, other = data / "brick" / "0.png", data / "water" / "0.png"
    for path in (one, other):  # as large and as old as each other
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
        os.utime(path.with_suffix(".bmp"), ns=(10**18, 10**18))
    one, other = one.with_suffix(".bmp"), other.with_suffix(".bmp")
    interrupted(run, data, out, monkeypatch)
    if change == "weights":
        crate_mae.save_model(CrateMAE(TINY), run, mean=MEAN, std=STD)
    elif change == "data":
        shutil.copy(data / "brick" / "1.png", data / "brick" / "2.png")
    elif change == "names":
        one.rename(tmp_path / "between")
        other.rename(one)
        (tmp_path / "between").rename(other)
    more = ["--pool", "cls"] if change == "spec" else []
    done = interrupted_at(monkeypatch)
    assert main(command(run, data, out, *more)) == 0
    said = capsys.readouterr().out
    assert len(done) == (1 if change == "nothing" else 5)
    assert ("is made anew" in said) == (change != "nothing")
    np.testing.assert_array_equal(
        read_embeddings(out).features, expected(run, data, FeatureSpec("cls" if more else "mean"))
    )
    assert not Path(f"{out}.partial").exists()


def test_an_image_that_could_not_be_read_for_a_while_is_read_again(run, classes, tmp_path, monkeypatch):
    image, out = ImageFolder.image, tmp_path / "out.npz"

    def out_of_reach(self, index):
        if index == 1:
            raise UnreadableImage(self.name(index), "read error", "the network is gone")
        return image(self, index)

    monkeypatch.setattr(ImageFolder, "image", out_of_reach)
    interrupted(run, classes, out, monkeypatch)
    monkeypatch.setattr(ImageFolder, "image", image)
    done = interrupted_at(monkeypatch)
    made = embed(run, str(classes), out, precision="float32", num_workers=0, say=lambda line: None)
    assert (made.images, made.unreadable, len(done)) == (24, 0, 2)
    np.testing.assert_array_equal(read_embeddings(out).features, expected(run, classes))


def test_a_file_that_another_process_wrote_meanwhile_stays(run, classes, tmp_path, monkeypatch):
    out = tmp_path / "out.npz"

    def slowly(data):
        out.write_bytes(b"precious")
        return open_source(data)

    monkeypatch.setattr(making, "open_source", slowly)
    with pytest.raises(FileExistsError, match="it is there already"):
        embed(run, str(classes), out, say=lambda line: None)
    assert out.read_bytes() == b"precious" and not Path(f"{out}.partial").exists()


def test_a_file_that_is_there_is_replaced_only_when_asked(run, classes, monkeypatch, out, capsys):
    out.write_bytes(b"precious")
    done = interrupted_at(monkeypatch, 2)
    assert main(command(run, classes, out)) == 2
    assert f"--out {out}: it is there already" in capsys.readouterr().err and not done
    assert main(command(run, classes, out, "--overwrite")) == 130
    assert out.read_bytes() == b"precious"
    assert capsys.readouterr().err.endswith("; the same command goes on\n")
    assert main(command(run, classes, out, "--overwrite")) == 0
    assert read_embeddings(out).features.shape == (24, 32)


def test_what_else_is_in_the_folder_of_chunks_stays(run, classes, tmp_path):
    partial = tmp_path / "out.npz.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    assert main(command(run, classes, tmp_path / "out.npz")) == 0
    assert [path.name for path in partial.iterdir()] == ["notes.txt"]


def test_where_memory_runs_out_batches_are_halved(run, classes, tmp_path, monkeypatch, capsys):
    tried = []

    def of_a_small_device(model, batch, spec):
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return features_of(model, batch, spec)

    monkeypatch.setattr(making, "_CHUNK", 8)
    monkeypatch.setattr(making, "features_of", of_a_small_device)
    assert main(command(run, classes, tmp_path / "out.npz")) == 0
    assert tried == [8, 4] + [2] * 12
    said = capsys.readouterr().out
    assert "memory ran out; going on with 4 images at once" in said and "with 2 images at once" in said
    np.testing.assert_array_equal(read_embeddings(tmp_path / "out.npz").features, expected(run, classes, batch_size=2))
    assert main(command(run, classes, tmp_path / "asked.npz", "--batch_size", "8")) == 1
    assert "out of memory: a lower --batch_size needs less" in capsys.readouterr().err


def test_the_largest_power_of_two_that_fits_is_taken(classes, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "_CHUNK", 1024)
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    tried = []
    monkeypatch.setattr(making, "fit", lambda step, device, most: tried.append(most) or Fit(min(most, 300), most, 0, 0))
    nothing = Chunks(tmp_path, "", [])

    def taken(images: int, device: str = "cuda") -> int:
        cropped = CentreCropped(Subset(ImageFolder(classes), np.zeros(images)), (32, 32))
        return making._batch_size(nothing, abs, cropped, Normalization(MEAN, STD, 3), torch.device(device))

    assert [taken(count) for count in (1, 5, 250, 5000)] == [1, 8, 256, 256]
    assert tried == [1, 8, 256, 1024]
    assert [taken(count, "cpu") for count in (5, 5000)] == [8, 32] and len(tried) == 4


def test_what_is_found_once_is_taken_again(run, classes, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole.npz", tmp_path / "out.npz"
    assert main(command(run, classes, whole, "--batch_size", "2")) == 0
    interrupted_at(monkeypatch, 7)
    assert main(command(run, classes, out, "--batch_size", "2")) == 130
    assert main(command(run, classes, out)) == 0
    assert "2 images at once (auto)" in capsys.readouterr().out and out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{classes}", "--out", "{tmp}/a.npz"], "required: RUN, the folder of a run or of a model"),
        (["{run}", "--out", "{tmp}/a.npz"], "--data: expected images"),
        (["{run}", "--data", "{classes}"], "--out: expected a file, .npz or .parquet"),
        (
            ["{run}", "--data", "{classes}", "--out", "{tmp}/a.csv"],
            "--out: expected a name that ends in .npz or .parquet",
        ),
        (["{run}", "--data", "{classes}", "--out", "{tmp}/no/a.npz"], "/no/a.npz: there is no folder {tmp}/no"),
        (["{run}", "--data", "{classes}", "--out", "{tmp}"], "--out {tmp}: expected the name of a file"),
        (
            ["{tmp}/no", "--data", "{classes}", "--out", "{tmp}/a.npz"],
            "RUN: expected the folder of a run, got {tmp}/no",
        ),
        (["{tmp}/early", "--data", "{classes}", "--out", "{tmp}/a.npz"], "early has no model.safetensors"),
        (["{run}", "--data", "{run}", "--out", "{tmp}/a.npz"], "--data: "),
        (["{run}", "--data", "{tmp}/no", "--out", "{tmp}/a.npz"], "--data: no such folder of images: {tmp}/no"),
        (
            ["{run}", "--data", "{classes}", "--out", "{tmp}/a.npz", "--layer", "2"],
            "--layer: expected 1 to 1, or -1 to",
        ),
        (["{run}", "--data", "{classes}", "--out", "{tmp}/a.npz", "--last", "0"], "--last: expected 1 to 1, "),
        (
            ["{run}", "--data", "{classes}", "--out", "{tmp}/a.npz", "--batch_size", "6"],
            "--batch_size: expected 1 to 5",
        ),
        (
            ["{run}", "--data", "{classes}", "--out", "{tmp}/a.npz", "--batch_size", "-1"],
            "--batch_size: expected a whole",
        ),
        (
            ["{run}", "--data", "{classes}", "--out", "{tmp}/a.npz", "--num_workers", "x"],
            "--num_workers: expected a whole",
        ),
        (["{run}", "--data", "{classes}", "--out", "{tmp}/a.npz", "--device", "tpu"], "--device: expected auto"),
        (
            ["{run}", "--data", "{classes}", "--out", "{tmp}/a.npz", "--precision", "int8"],
            "precision: expected one of auto",
        ),
    ],
)
def test_mistakes_are_one_line(run, classes, tmp_path, arguments, message, capsys):
    (tmp_path / "early").mkdir()
    shutil.copy(run / "config.json", tmp_path / "early")
    names = {"run": run, "classes": classes, "tmp": tmp_path}
    assert main(["embed", *(each.format(**names) for each in arguments)]) == 2
    told = capsys.readouterr().err
    assert message.format(**names) in told and len(told.splitlines()) == 1
    assert not list(tmp_path.glob("a.*"))


def test_parquet_without_its_library_is_refused_at_once(run, classes, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    done = interrupted_at(monkeypatch)
    assert main(command(run, classes, tmp_path / "out.parquet")) == 2
    assert "Parquet files need the package pyarrow" in (told := capsys.readouterr().err) and "[data]" in told
    assert not done


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"PAR1 cut"])
def test_what_is_no_file_of_features_is_refused(content, out):
    out.write_bytes(content)
    with pytest.raises(ValueError, match=r"out\.\w+: not a whole file of features"):
        read_embeddings(out)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"features": np.zeros((2, 3))}, r"features: expected float32 \[images, width\], got float64 \[2, 3\]"),
        ({"names": np.array(["a"])}, "names: expected 2 of them, got 1"),
        ({"labels": np.array([0])}, "labels: expected 2 of them, got 1"),
        ({"labels": np.array([0, 7])}, "labels: expected numbers of 1 classes, got 0 to 7"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change, message, tmp_path):
    parts = {"features": np.zeros((2, 3), np.float32), "names": np.array(["a", "b"]), "labels": np.array([0, 0])}
    np.savez(tmp_path / "out.npz", **parts | {"classes": np.array(["one"]), "about": np.array("{}")} | change)
    with pytest.raises(ValueError, match=message):
        read_embeddings(tmp_path / "out.npz")


def test_a_bit_that_changed_is_found(run, classes, out):
    embed(run, str(classes), out, num_workers=0, say=lambda line: None)
    value = read_embeddings(out).features[13, 5].tobytes()
    content = bytearray(out.read_bytes())
    assert content.count(value) == 1
    content[content.index(value)] ^= 1
    out.write_bytes(content)
    with pytest.raises(ValueError, match="not a whole file of features"):
        read_embeddings(out)


def test_files_are_written_without_all_of_them_in_memory(out):
    chunk = Rows(np.random.default_rng(0).normal(size=(1024, 512)).astype(np.float32), ["name"] * 1024, None)
    whole = 32 * chunk.features.nbytes  # 64 MiB
    of_arrow = [0]

    def written(count: int) -> None:
        def chunks() -> Iterator[Rows]:
            for _ in range(count):
                if out.suffix == ".parquet":
                    of_arrow.append(sys.modules["pyarrow"].total_allocated_bytes())
                yield chunk

        with out.open("wb") as file:
            write(file, out, Shape(1024 * count, 512, 4, None, {}), chunks)

    written(1)  # what is imported takes memory, too
    tracemalloc.start()
    written(32)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak + max(of_arrow) < whole / 4
    np.testing.assert_array_equal(read_embeddings(out).features, np.tile(chunk.features, (32, 1)))


def test_pickles_are_not_read(tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, features=np.array([print], dtype=object), names=np.array(["a"]), about=np.array("{}"))
    with pytest.raises(ValueError, match="not a whole file of features"):
        read_embeddings(path)
