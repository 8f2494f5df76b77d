"""Folders of images, augmentation, batches, and the shipped photographs."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crate_mae.data import (
    FLOWERS,
    BatchSampler,
    ImageFolder,
    ImageLoader,
    Normalization,
    PretrainImages,
    UnreadableImage,
    image_to_tensor,
)


def write_image(path: Path, size: tuple[int, int] = (20, 16), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(10):
        write_image(tmp_path / "images" / f"{index}.png", seed=index)
    return tmp_path / "images"


class TestFlowers:
    def test_fit_in_three_megabytes(self):
        assert sum(path.stat().st_size for path in FLOWERS.rglob("*") if path.is_file()) <= 3_000_000

    @pytest.mark.parametrize(("part", "of_each_class"), [("train", 110), ("val", 30)])
    def test_classes_are_balanced(self, part, of_each_class):
        images = ImageFolder(FLOWERS / part)
        assert images.classes == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
        assert set(Counter(images.labels).values()) == {of_each_class}

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


class TestImageFolder:
    def test_flat_folder_has_one_class(self, folder):
        images = ImageFolder(folder)
        assert len(images) == 10
        assert images.classes == [""]
        assert [path.name for path in images.paths] == [f"{index}.png" for index in range(10)]

    def test_nested_classes_mixed_suffixes_and_strangers(self, tmp_path):
        for name in ("b/x.PNG", "a/deep/er/y.jpeg", "a/z.webp", "a/.hidden.png", ".cache/w.png"):
            write_image(tmp_path / name)
        (tmp_path / "a" / "notes.txt").write_text("no image")
        images = ImageFolder(tmp_path)
        assert [path.relative_to(tmp_path).as_posix() for path in images.paths] == [
            "a/deep/er/y.jpeg",
            "a/z.webp",
            "b/x.PNG",
        ]
        assert images.classes == ["a", "b"]
        assert images.labels == [0, 0, 1]

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="missing"):
            ImageFolder(tmp_path / "missing")

    def test_no_images(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no images under"):
            ImageFolder(tmp_path)

    @pytest.mark.parametrize("keep", [0, 200], ids=["no image at all", "cut short"])
    @pytest.mark.parametrize("cache_bytes", [0, 2**20], ids=["uncached", "cached"])
    def test_a_broken_file_is_named(self, tmp_path, keep, cache_bytes):
        good = write_image(tmp_path / "good.png")
        (tmp_path / "broken.png").write_bytes(good.read_bytes()[:keep] or b"not an image")
        with pytest.raises(ValueError, match=r"broken\.png"):
            ImageFolder(tmp_path, cache_bytes=cache_bytes).image(0)

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_a_broken_file_is_one_error_whoever_loads_it(self, folder, num_workers):
        (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
        crops = PretrainImages(ImageFolder(folder, cache_bytes=0), (8, 8), seed=0)
        sampler = BatchSampler(len(crops), 2, seed=0, start_step=0, end_step=5)
        with pytest.raises(UnreadableImage) as raised:
            list(ImageLoader(crops, sampler, num_workers=num_workers))
        assert raised.value.path == folder / "3.png"
        assert str(folder / "3.png") in str(raised.value) and "\n" not in str(raised.value)

    @pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
    def test_channels(self, folder, channels, mode):
        assert ImageFolder(folder, channels=channels).image(0).mode == mode

    def test_channels_that_image_files_do_not_have(self, folder):
        with pytest.raises(ValueError, match="channels"):
            ImageFolder(folder, channels=2)

    def test_cache_changes_no_pixel(self, folder):
        cached, uncached = ImageFolder(folder), ImageFolder(folder, cache_bytes=0)
        assert cached.image(3) is cached.image(3)
        assert uncached.image(3) is not uncached.image(3)
        assert np.array_equal(cached.image(3), uncached.image(3))

    def test_photographs_stand_upright(self, tmp_path):
        image = Image.new("RGB", (20, 10))
        exif = image.getexif()
        exif[0x0112] = 6  # orientation: turn clockwise by 90 degrees
        image.save(tmp_path / "turned.jpg", exif=exif)
        assert ImageFolder(tmp_path).image(0).size == (10, 20)

    def test_split_is_a_partition_fixed_by_the_seed(self, folder):
        images = ImageFolder(folder)
        train, val = images.split(0.3, seed=1)
        assert len(val) == 3
        assert sorted(train.paths + val.paths) == images.paths
        assert images.split(0.3, seed=1)[1].paths == val.paths
        assert images.split(0.3, seed=2)[1].paths != val.paths
        assert np.array_equal(val.image(0), ImageFolder(folder).image(images.paths.index(val.paths[0])))

    def test_split_must_leave_images_to_train_on(self, tmp_path):
        write_image(tmp_path / "only.png")
        with pytest.raises(ValueError, match="validation"):
            ImageFolder(tmp_path).split(0.5, seed=0)

    def test_fingerprint_follows_the_files(self, folder):
        before = ImageFolder(folder).fingerprint()
        assert ImageFolder(folder).fingerprint() == before
        (folder / "3.png").unlink()
        assert ImageFolder(folder).fingerprint() != before


class TestNormalization:
    def test_is_mean_and_deviation_and_invertible(self):
        normalization = Normalization((0.5, 0.25, 0.0), (0.5, 0.25, 1.0), channels=3)
        pixels = torch.arange(2 * 3 * 4 * 4).remainder(256).to(torch.uint8).view(2, 3, 4, 4)
        images = normalization(pixels)
        assert images.dtype == torch.float32
        torch.testing.assert_close(images[0, 1], (pixels[0, 1] / 255 - 0.25) / 0.25)
        assert torch.equal(normalization.inverse(images), pixels)

    def test_needs_a_value_for_each_channel(self):
        with pytest.raises(ValueError, match="std: expected 3 values"):
            Normalization((0.5,) * 3, (0.5,), channels=3)
        with pytest.raises(ValueError, match="positive"):
            Normalization((0.5,), (0.0,), channels=1)


class TestBatches:
    def test_an_epoch_visits_no_image_twice_and_the_next_in_another_order(self):
        batches = list(BatchSampler(11, 3, seed=0, start_step=0, end_step=6))
        epochs = [[index for batch in batches[first : first + 3] for _, index in batch] for first in (0, 3)]
        assert all(len(set(epoch)) == 9 for epoch in epochs)
        assert epochs[0] != epochs[1]
        assert [batch[0][0] for batch in batches] == [0, 0, 0, 1, 1, 1]

    @pytest.mark.parametrize("start", [1, 3, 4])
    def test_a_later_start_gives_the_same_batches(self, start):
        whole = list(BatchSampler(11, 3, seed=5, start_step=0, end_step=6))
        assert list(BatchSampler(11, 3, seed=5, start_step=start, end_step=6)) == whole[start:]

    @pytest.mark.parametrize("batch_size", [0, 12])
    def test_batch_size_must_fit(self, batch_size):
        with pytest.raises(ValueError, match="batch_size"):
            BatchSampler(11, batch_size, seed=0, start_step=0, end_step=1)

    def test_a_crop_depends_on_seed_epoch_and_image_alone(self, folder):
        images = ImageFolder(folder)
        crops = PretrainImages(images, (8, 12), seed=0)
        first = crops[0, 1]
        assert first.shape == (3, 8, 12) and first.dtype == torch.uint8
        assert not torch.equal(crops[1, 1], first)
        assert not torch.equal(PretrainImages(images, (8, 12), seed=1)[0, 1], first)
        assert torch.equal(crops[0, 1], first)

    def test_half_of_the_images_are_mirrored(self, tmp_path):
        write_image(tmp_path / "image.png", size=(8, 8))
        crops = PretrainImages(ImageFolder(tmp_path), (8, 8), seed=0, scale=(1.0, 1.0), ratio=(1.0, 1.0))
        original = image_to_tensor(crops.folder.image(0))
        mirrored = [torch.equal(crops[epoch, 0], original.flip(-1)) for epoch in range(200)]
        unchanged = [torch.equal(crops[epoch, 0], original) for epoch in range(200)]
        assert sum(mirrored) + sum(unchanged) == 200
        assert 70 < sum(mirrored) < 130

    def test_workers_change_no_batch(self, folder):
        crops = PretrainImages(ImageFolder(folder), (8, 8), seed=0)

        def batches(num_workers: int) -> torch.Tensor:
            sampler = BatchSampler(len(crops), 4, seed=0, start_step=0, end_step=5)
            return torch.stack(list(ImageLoader(crops, sampler, num_workers=num_workers)))

        alone = batches(0)
        assert alone.shape == (5, 4, 3, 8, 8)
        assert torch.equal(batches(2), alone)

    def test_loading_leaves_the_global_generator_alone(self, folder):
        crops = PretrainImages(ImageFolder(folder), (8, 8), seed=0)
        before = torch.get_rng_state()
        list(ImageLoader(crops, BatchSampler(10, 5, seed=0, start_step=0, end_step=2)))
        assert torch.equal(torch.get_rng_state(), before)
