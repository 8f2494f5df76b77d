"""Which images a batch holds, and what chance decides about them: a function of seed, epoch and image alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crate_mae.data import (
    BatchSampler,
    ImageFolder,
    ImageLoader,
    Mixture,
    PretrainImages,
    Sample,
    Source,
    UnreadableImage,
    augmented,
)
from crate_mae.data.augmentation import blurred
from crate_mae.data.decoded import DecodedImages, decoded_if_small


class Numbered(Source):
    """So many images of one colour each, some of which cannot be read."""

    def __init__(self, count: int, unreadable: frozenset[int] = frozenset()) -> None:
        self.count, self.unreadable = count, unreadable

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Image.Image:
        if index in self.unreadable:
            raise UnreadableImage(self.name(index), "damaged", "on purpose")
        noise = np.random.default_rng(index).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        noise[:, :, 0] = index
        return Image.fromarray(noise)

    def name(self, index: int) -> str:
        return f"number {index}"

    def fingerprint(self) -> str:
        return f"{self.count} numbers"


def crops(source: Source, **settings) -> PretrainImages:
    return PretrainImages(source, (8, 8), 7, patches=4, blur=0.5, solarize=0.5, **settings)


def batches(images: PretrainImages, end_step: int = 6, *, num_workers: int = 0, **part: int) -> list[Sample]:
    sampler = BatchSampler(images.source, 4, 7, start_step=0, end_step=end_step, **part)
    return list(ImageLoader(images, sampler, num_workers=num_workers))


def assert_equal(left: list[Sample], right: list[Sample]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class TestOrder:
    def test_an_epoch_visits_no_image_twice_and_the_next_in_another_order(self):
        found = list(BatchSampler(Numbered(11), 3, 0, start_step=0, end_step=6))
        epochs = [[index for batch in found[first : first + 3] for _, index in batch] for first in (0, 3)]
        assert all(len(set(epoch)) == 9 for epoch in epochs)
        assert epochs[0] != epochs[1]
        assert [batch[0][0] for batch in found] == [0, 0, 0, 1, 1, 1]

    @pytest.mark.parametrize("start", [1, 3, 4])
    def test_a_later_start_gives_the_same_batches(self, start):
        whole = list(BatchSampler(Numbered(11), 3, 5, start_step=0, end_step=6))
        assert list(BatchSampler(Numbered(11), 3, 5, start_step=start, end_step=6)) == whole[start:]

    @pytest.mark.parametrize("batch_size", [0, 12])
    def test_batch_size_must_fit(self, batch_size):
        with pytest.raises(ValueError, match="batch_size: expected 1 to 11"):
            BatchSampler(Numbered(11), batch_size, 0, start_step=0, end_step=1)

    @pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 5)])
    def test_ranks_must_be_some_and_have_images(self, rank, ranks):
        with pytest.raises(ValueError, match="rank: expected"):
            BatchSampler(Numbered(11), 4, 0, start_step=0, end_step=1, rank=rank, ranks=ranks)

    def test_parts_of_ranks_and_of_accumulation_are_the_batch(self):
        def batches(**part):
            return BatchSampler(Numbered(11), 5, 0, start_step=1, end_step=4, **part)

        parts = [batches(rank=rank, ranks=2, accumulate=2) for rank in range(2)]
        of_ranks = [list(part) for part in parts]
        for step, whole in enumerate(batches()):
            micro_batches = [batch for of_rank in of_ranks for batch in of_rank[2 * step : 2 * step + 2]]
            assert sorted(len(batch) for batch in micro_batches) == [1, 1, 1, 2]
            assert sorted(key for batch in micro_batches for key in batch) == sorted(whole)
        for part, of_rank in zip(parts, of_ranks, strict=True):
            assert len(part) == 6
            for done in range(6):  # in the middle of a step, too
                rest = part.after(done)
                assert (len(rest), list(rest)) == (6 - done, of_rank[done:])
            assert list(part.after(1).after(2)) == of_rank[3:]

    @pytest.mark.parametrize("accumulate", [0, 3])
    def test_each_part_has_an_image(self, accumulate):
        with pytest.raises(ValueError, match=r"accumulate: expected 1 to 2, .* got"):
            BatchSampler(Numbered(11), 5, 0, start_step=0, end_step=1, rank=1, ranks=2, accumulate=accumulate)


class TestSamples:
    @pytest.mark.parametrize("num_workers", [2, 4])
    def test_workers_change_nothing(self, num_workers):
        images = crops(Mixture([Numbered(9), Numbered(5)], [1.0, 2.0]))
        alone = batches(images)
        assert alone[0].pixels.shape == (4, 8, 8, 3) and alone[0].noise.shape == (4, 4)
        assert_equal(batches(images, num_workers=num_workers), alone)

    @pytest.mark.parametrize("ranks", [2, 3])
    def test_the_parts_of_ranks_are_the_batch_of_one(self, ranks):
        images = crops(Numbered(11))
        parts = [batches(images, rank=rank, ranks=ranks) for rank in range(ranks)]
        for step, whole in enumerate(batches(images)):
            for rank in range(ranks):
                of_whole = [field[rank::ranks] for field in whole]
                assert all(torch.equal(a, b) for a, b in zip(parts[rank][step], of_whole, strict=True))

    def test_all_that_is_drawn_depends_on_seed_epoch_and_image(self):
        images = crops(Numbered(11))
        first = images[0, 1]
        assert all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(images[0, 1], first, strict=True)
        )
        for other in (images[1, 1], images[0, 2], PretrainImages(Numbered(11), (8, 8), 8, patches=4)[0, 1]):
            assert not torch.equal(other.noise, first.noise)

    def test_masks_do_not_depend_on_how_images_are_cut(self):
        source = Numbered(11)
        plain = PretrainImages(source, (8, 8), 7, patches=4, scale=(1.0, 1.0), flip=False)
        assert torch.equal(plain[3, 4].noise, crops(source)[3, 4].noise)

    def test_chances_are_what_was_asked_for(self):
        images = PretrainImages(Numbered(1), (2, 2), 0, blur=0.2, solarize=0.7)
        drawn = [images[epoch, 0] for epoch in range(400)]
        for name, expected in (("flip", 0.5), ("blur", 0.2), ("solarize", 0.7)):
            share = sum(bool(getattr(sample, name)) for sample in drawn) / len(drawn)
            assert abs(share - expected) < 4 * (expected * (1 - expected) / len(drawn)) ** 0.5
        sigmas = [sample.blur for sample in drawn if sample.blur]
        assert 0.1 <= min(sigmas) < 0.5 and 1.6 < max(sigmas) <= 2.0

    def test_loading_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        batches(crops(Numbered(11)))
        assert torch.equal(torch.get_rng_state(), before)


class TestStandIns:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_seed_epoch_and_image_decide_who_stands_in(self, num_workers):
        bad = frozenset({2, 5, 9})
        images, whole = crops(Numbered(11, bad)), batches(crops(Numbered(11)))
        met: list[str] = []
        sampler = BatchSampler(images.source, 4, 7, start_step=0, end_step=6)
        loader = ImageLoader(images, sampler, num_workers=num_workers, unreadable=lambda errors: met.extend(errors))
        found = list(loader)
        asked = {index for keys in sampler for _, index in keys}
        assert {error.name for error in met} >= {f"number {index}" for index in bad & asked} != set()
        assert_equal(found, list(ImageLoader(images, sampler, unreadable=lambda errors: None)))
        stand_ins = {int(one.pixels[place, 0, 0, 0]) for keys, one in zip(sampler, found, strict=True)
                     for place, (_, index) in enumerate(keys) if index in bad}  # fmt: skip
        assert len(stand_ins) > 1  # not one for all
        for keys, one, other in zip(sampler, found, whole, strict=True):
            for place, (_, index) in enumerate(keys):
                assert torch.equal(one.noise[place], other.noise[place])
                assert torch.equal(one.pixels[place], other.pixels[place]) == (index not in bad)
                assert one.pixels[place, :, :, 0].unique().numel() == 1 and int(one.pixels[place, 0, 0, 0]) not in bad

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_where_nobody_asked_for_them_the_error_is_raised(self, num_workers):
        with pytest.raises(UnreadableImage, match=r"number \d+ \(damaged: on purpose\)") as raised:
            batches(crops(Numbered(11, frozenset(range(11)))), num_workers=num_workers)
        assert raised.value.cause == "damaged"

    def test_a_source_of_nothing_readable_is_given_up(self):
        images = crops(Numbered(3, frozenset(range(3))))
        sampler = BatchSampler(images.source, 3, 7, start_step=0, end_step=1)
        with pytest.raises(UnreadableImage):
            list(ImageLoader(images, sampler, unreadable=lambda errors: None))


@pytest.mark.parametrize(("bad", "most", "is_kept"), [(0, 1620, True), (0, 1619, False), (2, 1620, True)])
def test_no_more_is_kept_decoded_than_may_be(bad, most, is_kept):
    """15 images of 9 x 12 pixels in grey."""
    source = decoded_if_small(Numbered(15, frozenset(range(bad))), 1, most)
    assert isinstance(source, DecodedImages) == is_kept


def test_one_that_looked_small_and_is_not_is_not_kept_decoded():
    class LargeAtLast(Numbered):
        def image(self, index):
            return super().image(index).resize((900, 900) if index == 38 else (9, 12))

    assert not isinstance(decoded_if_small(LargeAtLast(40), 1, 10_000), DecodedImages)


class TestAugmentation:
    def sample(self, *, flip=(), blur=(0.0, 0.0), solarize=()) -> tuple[torch.Tensor, torch.Tensor]:
        """The pixels of two images before and after."""
        pixels = torch.randint(0, 256, (2, 3, 10, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        chosen = [torch.tensor([index in which for index in range(2)]) for which in (flip, solarize)]
        batch = Sample(pixels.permute(0, 2, 3, 1), torch.zeros(2, 1), chosen[0], torch.tensor(blur), chosen[1])
        return pixels, augmented(batch, torch.device("cpu"))

    def test_touches_those_alone_that_were_drawn(self):
        before, after = self.sample()
        assert torch.equal(before, after)
        before, after = self.sample(flip={1})
        assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1].flip(-1))
        before, after = self.sample(solarize={0})
        assert torch.equal(after[1], before[1])
        assert torch.equal(after[0], torch.where(before[0] < 128, before[0], 255 - before[0]))
        before, after = self.sample(blur=(0.0, 1.3))
        assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])

    @pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
    def test_a_blur_is_the_gaussian_mean_of_what_lies_inside(self, sigma):
        pixels = torch.randint(0, 256, (1, 1, 7, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        expected = torch.empty(7, 9, dtype=torch.float64)
        for row in range(7):
            for column in range(9):
                distance = (torch.arange(7.0).double() - row)[:, None] ** 2 + (torch.arange(9.0).double() - column) ** 2
                weights = (-distance / (2 * sigma**2)).exp()
                expected[row, column] = (weights * pixels[0, 0]).sum() / weights.sum()
        found = blurred(pixels, torch.tensor([sigma]))
        assert (found[0, 0].double() - expected).abs().max() <= 0.5 + 1e-3


def test_a_folder_is_cut_as_its_images_are(tmp_path: Path):
    for index in range(3):
        Numbered(3).image(index).save(tmp_path / f"{index}.png")
    assert_equal(batches_of(ImageFolder(tmp_path)), batches_of(Numbered(3)))


def batches_of(source: Source) -> list[Sample]:
    return list(ImageLoader(crops(source), BatchSampler(source, 3, 7, start_step=0, end_step=2)))
