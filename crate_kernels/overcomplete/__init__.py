"""CRATE-alpha's sparsifying step: two proximal gradient steps of sparse coding on an overcomplete dictionary, and back."""
