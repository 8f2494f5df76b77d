"""Which part of an image a crop is, and standardised pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("hypothesis")  # lacking where nothing can be installed, as on some GPU machines

from hypothesis import given, settings
from hypothesis import strategies as st

from crate_mae.data.draws import _mixed, uniform
from crate_mae.data.transforms import NUMBERS_OF_A_BOX, centred_box, draw_box


class TestNumbers:
    def test_are_those_of_splitmix64(self):
        """The first three that the published program gives from 1234567."""
        state, step = 1234567, 0x9E3779B97F4A7C15
        states = np.array([(state + n * step) % 2**64 for n in (1, 2, 3)], dtype=np.uint64)
        assert _mixed(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]

    def test_are_uniform_and_unlike_for_keys_that_are_alike(self):
        keys = [(epoch, image) for epoch in range(20) for image in range(100)]
        numbers = np.stack([uniform(seed, keys, 30) for seed in (0, 1, 2**64 - 1)]).reshape(-1, 30)
        assert numbers.min() >= 0 and numbers.max() < 1 and len(np.unique(numbers)) == numbers.size
        error = numbers.size**-0.5
        for share in (0.1, 0.5, 0.9):
            assert abs((numbers < share).mean() - share) < 4 * error * (share * (1 - share)) ** 0.5
        for one, other in (
            (numbers[:-1], numbers[1:]),  # the next image
            (numbers[:-100], numbers[100:]),  # the next epoch
            (numbers[:4000], numbers[2000:]),  # the next seed
            (numbers[:, :-1], numbers[:, 1:]),
        ):
            assert abs(np.corrcoef(one.ravel(), other[: len(one)].ravel())[0, 1]) < 5 * error

    def test_one_by_one_they_are_those_of_many_at_once(self):
        keys = [(0, 3), (7, 2**32 - 1), (2**32 - 1, 0)]
        assert np.array_equal(np.concatenate([uniform(5, [key], 9) for key in keys]), uniform(5, keys, 20)[:, :9])


class TestBoxes:
    @settings(max_examples=100, deadline=None)
    @given(width=st.integers(1, 60), height=st.integers(1, 60), seed=st.integers(0, 2**32))
    def test_every_image_has_some(self, width, height, seed):
        for box in (
            draw_box((width, height), uniform(seed, [(0, 0)], NUMBERS_OF_A_BOX)[0]),
            centred_box((width, height), math.exp(np.random.default_rng(seed).normal(0, 3))),
        ):
            assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height

    @pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
    def test_of_a_line_it_is_the_middle(self, size):
        assert draw_box(size, uniform(0, [(0, 0)], NUMBERS_OF_A_BOX)[0]) == tuple(
            (side - 1) // 2 for side in size
        ) + tuple((side + 1) // 2 for side in size)

    def test_area_and_ratio_stay_in_their_bounds(self):
        numbers = uniform(0, [(0, index) for index in range(500)], NUMBERS_OF_A_BOX)
        boxes = [draw_box((200, 150), each, scale=(0.2, 0.6), ratio=(0.8, 1.25)) for each in numbers]
        left, top, right, bottom = np.array(boxes, dtype=float).T
        area = (right - left) * (bottom - top) / (200 * 150)
        aspect = (right - left) / (bottom - top)
        assert 0.19 < area.min() < 0.22 and 0.58 < area.max() < 0.61
        assert 0.78 < aspect.min() < 0.83 and 1.2 < aspect.max() < 1.28
        assert left.min() >= 0 and top.min() >= 0 and right.max() <= 200 and bottom.max() <= 150
        assert left.std() > 10 and top.std() > 10

    def test_draws_are_what_they_were(self):
        """A run that goes on with another version sees the crops that it would have seen."""
        numbers = uniform(3, [(1, 4), (1, 5), (2, 4)], NUMBERS_OF_A_BOX)
        assert [draw_box((200, 150), each) for each in numbers] == [
            (76, 28, 184, 147),
            (3, 23, 159, 141),
            (48, 18, 168, 123),
        ]

    def test_the_centred_one_has_the_ratio_and_the_centre(self):
        assert centred_box((40, 20), 1) == (10, 0, 30, 20)
        assert centred_box((20, 40), 2) == (0, 15, 20, 25)
        assert centred_box((41, 20), 1) == (10, 0, 30, 20)
