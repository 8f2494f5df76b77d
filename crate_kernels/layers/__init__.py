"""Whole layers of CRATE and CRATE-MAE: their two operators one after the other, prepared together."""
