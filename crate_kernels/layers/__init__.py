"""Whole layers of CRATE and CRATE-MAE as one operator a layer and direction, keeping the least for the backward.

Their reference and their composed path are those of the steps they are made of, one after the other.
"""
