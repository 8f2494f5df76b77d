"""What an epoch visits: of a plain source, and of several with weights; synthetic pictures."""

from __future__ import annotations

import numpy as np
import pytest

from crate_mae.data.mixture import Mixture, shares
from crate_mae.data.source import Source, Subset
from crate_mae.data.synthetic import SyntheticImages


class Named(Source):
    """A source without pixels: its images are their names."""

    def __init__(self, name: str, count: int, classes: tuple[str, ...] = ("",)) -> None:
        self.title, self.count, self.classes = name, count, classes

    def __len__(self):
        return self.count

    def image(self, index):
        return self.name(index)

    def name(self, index):
        return f"{self.title}{index}"

    def fingerprint(self):
        return f"{self.title}{self.count}"

    @property
    def labels(self):
        return np.arange(self.count, dtype=np.int32) % len(self.classes)


@pytest.fixture
def mixture() -> Mixture:
    return Mixture([Named("a", 5), Named("b", 20), Named("c", 7)], [2, 1, 0.5])


def visits(source: Source, epochs: int, seed: int = 3) -> list[list[tuple[int, int]]]:
    """(pass, index) of each visit, by epoch."""
    return [list(zip(*map(np.ndarray.tolist, source.epoch(seed, epoch)), strict=True)) for epoch in range(epochs)]


def test_an_epoch_of_a_plain_source_is_a_permutation_by_seed_and_epoch():
    for epoch in (0, 7):
        passes, indices = Named("a", 50).epoch(3, epoch)
        assert passes.dtype == indices.dtype == np.uint32
        assert set(passes.tolist()) == {epoch}
        assert indices.tolist() == np.random.default_rng((3, epoch)).permutation(50).tolist()


def test_numbers_run_through_the_sources(mixture):
    assert len(mixture) == 32
    assert [mixture.name(index) for index in (0, 4, 5, 24, 25, 31)] == ["a0", "a4", "b0", "b19", "c0", "c6"]
    assert mixture.image(25) == "c0"
    for outside in (-1, 32):
        with pytest.raises(IndexError):
            mixture.name(outside)


def test_each_source_has_its_share_of_every_epoch_and_the_epochs_differ(mixture):
    epochs = visits(mixture, 4)
    assert len(set(map(tuple, epochs))) == 4
    for epoch in epochs:
        found = [mixture.name(index)[0] for _, index in epoch]
        assert [found.count(name) for name in "abc"] == mixture.shares == [18, 9, 5]  # of 32 by 2 : 1 : 0.5
        assert found != sorted(found)
    assert epochs == visits(mixture, 4), "a function of seed and epoch"
    assert epochs != visits(mixture, 4, seed=4)


def test_all_images_of_a_source_are_visited_equally_often(mixture):
    """After any number of epochs the counts of a source's images differ by one at most, and no image is seen twice in a pass."""
    epochs = visits(mixture, 9)
    for end in range(1, 10):
        seen = [visit for epoch in epochs[:end] for visit in epoch]
        assert len(set(seen)) == len(seen)
        for name, first, count in (("a", 0, 5), ("b", 5, 20), ("c", 25, 7)):
            times = np.bincount([index for _, index in seen], minlength=32)[first : first + count]
            assert times.max() - times.min() <= 1, name


def test_a_mixture_of_mixtures(mixture):
    nested = Mixture([mixture, Named("d", 32)], [1, 1])
    for epoch in visits(nested, 3):
        names = [nested.name(index)[0] for _, index in epoch]
        assert [names.count(name) for name in "abcd"] == [18, 9, 5, 32]
    seen = [visit for epoch in visits(nested, 5) for visit in epoch]
    assert len(set(seen)) == len(seen)


def test_classes_of_one_name_are_one_class():
    mixture = Mixture([Named("a", 3, ("dog", "elk")), Named("b", 2), Named("c", 3, ("cat", "dog"))], [1, 1, 1])
    assert mixture.classes == ["", "cat", "dog", "elk"]
    assert mixture.labels.dtype == np.int32
    assert [mixture.classes[label] for label in mixture.labels] == ["dog", "elk", "dog", "", "", "cat", "dog", "cat"]


def test_fingerprints_tell_sources_and_shares_apart():
    a, b = Named("a", 6), Named("b", 6)
    same = {Mixture([a, b], weights).fingerprint() for weights in ([1, 2], [0.5, 1.0])}
    assert len(same) == 1
    others = {Mixture(*arguments).fingerprint() for arguments in (([b, a], [1, 2]), ([a, b], [2, 1]), ([a], [1]))}
    assert len(others | same) == 4


def test_a_split_takes_from_each_source_by_itself(mixture):
    train, val = mixture.split(0.3, seed=1)
    names = [[part.name(index) for index in range(len(part))] for part in (train, val)]
    assert sorted(names[0] + names[1]) == sorted(mixture.name(index) for index in range(32))
    assert [sum(name[0] == source for name in names[1]) for source in "abc"] == [2, 6, 2]
    assert train.weights == mixture.weights
    assert sorted(index for _, index in visits(val, 1)[0]) == list(range(len(val)))
    with pytest.raises(ValueError, match="1 images leave none to train on"):
        Mixture([Named("a", 9), Named("b", 1)], [1, 1]).split(0.3, seed=1)


def test_shares_add_up():
    assert shares(10, [1, 1, 1]) == [4, 3, 3]
    assert shares(7, [0.1, 0.2, 0.4]) == [1, 2, 4]
    assert shares(3, [1e308, 1e308, 1e-300]) == [2, 1, 0]
    rng = np.random.default_rng(0)
    for _ in range(50):
        weights, count = rng.uniform(0.01, 9, rng.integers(1, 9)), int(rng.integers(1, 10**9))
        found = shares(count, weights.tolist())
        assert sum(found) == count
        assert all(abs(part - count * weight / weights.sum()) < 1 for part, weight in zip(found, weights, strict=True))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1], "expected one for each of 2 sources, at least one, got 1"),
        ([1, 0], "expected positive, finite numbers"),
        ([1, -2], "expected positive, finite numbers"),
        ([1, float("nan")], "expected positive, finite numbers"),
        ([1, float("inf")], "expected positive, finite numbers"),
        ([1, 1e-3], "an epoch's 12 visits would hold no image of source 2 of 2"),
    ],
)
def test_weights_that_cannot_be(weights, said):
    with pytest.raises(ValueError, match=f"weights: {said}"):
        Mixture([Named("a", 6), Named("b", 6)], weights)


def test_synthetic_pictures():
    source = SyntheticImages(100, size=(24, 40), seed=1)
    pictures = [np.asarray(source.image(index)) for index in range(100)]
    assert source.image(7).mode == "RGB"
    assert {(picture.shape, picture.dtype.name) for picture in pictures} == {((24, 40, 3), "uint8")}
    assert len({picture.tobytes() for picture in pictures}) == 100
    again = SyntheticImages(200, size=(24, 40), seed=1)
    assert (np.asarray(again.image(99)) == pictures[99]).all(), "a function of the index alone"
    fingerprints = {SyntheticImages(9, size, seed).fingerprint() for size in ((8, 9), (9, 8)) for seed in (0, 1)}
    assert len(fingerprints) == 4
    # Of photographs neighbours differ little and distant pixels much, as those of noise do not.
    values = np.stack(pictures).astype(float)
    near, far = (np.abs(values[:, :, step:] - values[:, :, :-step]).mean() for step in (1, 20))
    assert 2 < near < far / 1.5
    with pytest.raises(ValueError, match="at least 1 image"):
        SyntheticImages(0)
    with pytest.raises(ValueError, match="size: expected"):
        SyntheticImages(1, size=(0, 5))


def test_a_part_of_a_source_is_visited_as_a_source():
    part = Subset(Named("a", 50), [9, 3, 4])
    _, indices = part.epoch(0, 0)
    assert sorted(part.name(index) for index in indices) == ["a3", "a4", "a9"]
