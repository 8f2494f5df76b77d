"""ISTA, the sparsifying step of a white-box layer: one proximal gradient step of sparse coding on a square dictionary."""
