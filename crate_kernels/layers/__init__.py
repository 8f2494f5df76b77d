"""Whole layers of CRATE and CRATE-MAE as one operator a layer and direction, keeping the least for the backward."""
