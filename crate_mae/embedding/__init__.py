"""Features of all images of a source, in a file."""

from __future__ import annotations

from crate_mae.embedding.files import Embeddings, read_embeddings
from crate_mae.embedding.making import Embedded, check_out, embed, embed_with, in_words

__all__ = ["Embedded", "Embeddings", "check_out", "embed", "embed_with", "in_words", "read_embeddings"]
