"""Augmentation and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("hypothesis")  # lacking where nothing can be installed, as on some GPU machines

from hypothesis import given, settings
from hypothesis import strategies as st

from crate_mae.data import (
    BatchSampler,
    ImageFolder,
    ImageLoader,
    Normalization,
    PretrainImages,
    centre_crop,
    image_to_tensor,
    random_resized_crop,
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


class TestCrops:
    @settings(max_examples=60, deadline=None)
    @given(
        width=st.integers(1, 60),
        height=st.integers(1, 60),
        size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
        seed=st.integers(0, 2**32),
    )
    def test_every_image_gives_the_size_asked_for(self, width, height, size, seed):
        image = Image.new("RGB", (width, height))
        assert random_resized_crop(image, size, np.random.default_rng(seed)).size == size[::-1]
        assert centre_crop(image, size).size == size[::-1]

    def test_area_and_ratio_stay_in_their_bounds(self, monkeypatch):
        boxes = []
        image = Image.new("RGB", (200, 150))
        monkeypatch.setattr(image, "crop", lambda box: boxes.append(box) or Image.new("RGB", (1, 1)))
        rng = np.random.default_rng(0)
        for _ in range(500):
            random_resized_crop(image, (8, 8), rng, scale=(0.2, 0.6), ratio=(0.8, 1.25))
        left, top, right, bottom = np.array(boxes, dtype=float).T
        area = (right - left) * (bottom - top) / (200 * 150)
        aspect = (right - left) / (bottom - top)
        assert 0.19 < area.min() < 0.22 and 0.58 < area.max() < 0.61
        assert 0.78 < aspect.min() < 0.83 and 1.2 < aspect.max() < 1.28
        assert left.min() >= 0 and top.min() >= 0 and right.max() <= 200 and bottom.max() <= 150
        assert left.std() > 10 and top.std() > 10

    def test_centre_crop_keeps_the_centre_and_the_aspect(self):
        pixels = np.zeros((20, 40, 3), dtype=np.uint8)
        pixels[:, 10:30] = 255
        assert np.array(centre_crop(Image.fromarray(pixels), (8, 8))).min() == 255
        pixels[:, 10:20] = 0
        whole = np.array(centre_crop(Image.fromarray(pixels), (20, 40)))
        assert np.array_equal(whole, pixels)


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
