"""A linear map after a LayerNorm: CRATE-MAE's step back from a sparse code."""
