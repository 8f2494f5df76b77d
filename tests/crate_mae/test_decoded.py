"""Small sets are decoded once, and no more is kept than may be."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from crate_mae.data import Source, UnreadableImage, decoded, decoded_if_small


class Counted(Source):
    """Images of these sizes, (width, height); how often each was asked for."""

    def __init__(self, sizes: list[tuple[int, int]], unreadable: int | None = None) -> None:
        self.sizes, self.unreadable = sizes, unreadable
        self.asked = [0] * len(sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def image(self, index: int) -> Image.Image:
        self.asked[index] += 1
        if index == self.unreadable:
            raise UnreadableImage(self.name(index), "damaged", "on purpose")
        return Image.new("RGB", self.sizes[index], (index, 0, 0))

    def name(self, index: int) -> str:
        return f"number {index}"

    def fingerprint(self) -> str:
        return "counted"


@pytest.mark.parametrize(("channels", "bytes_a_pixel"), [(1, 1), (3, 4), (4, 4)])
def test_a_set_that_fits_exactly_is_kept_and_one_byte_less_is_none(channels, bytes_a_pixel):
    source = Counted([(10, 7)] * 40)
    kept = decoded_if_small(source, channels, 40 * 70 * bytes_a_pixel)
    before = list(source.asked)
    assert [kept.image(index).size for index in range(40)] == source.sizes and source.asked == before
    assert kept.image(3) is kept.image(3) and kept.name(3) == "number 3" and kept.fingerprint() == "counted"
    assert decoded_if_small(source, channels, 40 * 70 * bytes_a_pixel - 1) is source


def test_one_that_only_looked_small_is_given_up_before_it_is_too_much():
    sizes = [(10, 10)] * 100
    sizes[50] = (1000, 1000)
    looked_at = np.linspace(0, 99, 16).astype(int).tolist()
    assert 50 not in looked_at, "or the test tests nothing"
    source = Counted(sizes)
    assert decoded_if_small(source, 3, 10**6) is source
    assert sum(source.asked[51:]) == sum(index > 50 for index in looked_at), "nothing after it was decoded"


def test_many_images_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(decoded, "_MOST_IMAGES", 9)
    assert decoded_if_small(Counted([(1, 1)] * 9), 3, 10**6).image(8)
    source = Counted([(1, 1)] * 10)
    assert decoded_if_small(source, 3, 10**6) is source and not any(source.asked)


def test_what_cannot_be_read_is_told_each_time_and_asked_for_once():
    source = Counted([(5, 5)] * 3, unreadable=1)
    kept = decoded_if_small(source, 3, 10**6)
    asked = list(source.asked)
    met = []
    for _ in range(2):
        with pytest.raises(UnreadableImage, match="number 1") as raised:
            kept.image(1)
        met.append(raised.value)
    assert met[0] is not met[1] and source.asked == asked
