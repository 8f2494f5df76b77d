"""Which part of an image a crop is, and standardised pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("hypothesis")  # lacking where nothing can be installed, as on some GPU machines

from hypothesis import given, settings
from hypothesis import strategies as st

from crate_mae.data.transforms import centred_box, draw_box


class TestBoxes:
    @settings(max_examples=100, deadline=None)
    @given(width=st.integers(1, 60), height=st.integers(1, 60), seed=st.integers(0, 2**32))
    def test_every_image_has_some(self, width, height, seed):
        for box in (
            draw_box((width, height), np.random.default_rng(seed)),
            centred_box((width, height), math.exp(np.random.default_rng(seed).normal(0, 3))),
        ):
            assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height

    @pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
    def test_of_a_line_it_is_the_middle(self, size):
        assert draw_box(size, np.random.default_rng(0)) == tuple((side - 1) // 2 for side in size) + tuple(
            (side + 1) // 2 for side in size
        )

    def test_area_and_ratio_stay_in_their_bounds(self):
        rng = np.random.default_rng(0)
        boxes = [draw_box((200, 150), rng, scale=(0.2, 0.6), ratio=(0.8, 1.25)) for _ in range(500)]
        left, top, right, bottom = np.array(boxes, dtype=float).T
        area = (right - left) * (bottom - top) / (200 * 150)
        aspect = (right - left) / (bottom - top)
        assert 0.19 < area.min() < 0.22 and 0.58 < area.max() < 0.61
        assert 0.78 < aspect.min() < 0.83 and 1.2 < aspect.max() < 1.28
        assert left.min() >= 0 and top.min() >= 0 and right.max() <= 200 and bottom.max() <= 150
        assert left.std() > 10 and top.std() > 10

    def test_draws_are_what_they_were(self):
        """A run that goes on with another version sees the crops that it would have seen."""
        rng = np.random.default_rng((3, 1, 4))
        assert [draw_box((200, 150), rng) for _ in range(3)] == [
            (10, 1, 182, 136),
            (40, 5, 153, 119),
            (20, 0, 176, 147),
        ]

    def test_the_centred_one_has_the_ratio_and_the_centre(self):
        assert centred_box((40, 20), 1) == (10, 0, 30, 20)
        assert centred_box((20, 40), 2) == (0, 15, 20, 25)
        assert centred_box((41, 20), 1) == (10, 0, 30, 20)
