"""A linear map with the LayerNorm before it: CRATE-MAE's step back from a sparse code."""
