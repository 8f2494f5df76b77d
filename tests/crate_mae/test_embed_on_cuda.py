"""Embedding on a GPU, apart from the tests of the command, which need more than such a machine may have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import TINY, write_photographs

import crate_mae
from crate_mae.embedding import embed, read_embeddings


@pytest.mark.gpu
def test_a_batch_is_found(tmp_path: Path) -> None:
    torch.manual_seed(1)
    crate_mae.save_model(crate_mae.CrateMAE(TINY), tmp_path / "run", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
    photographs, said = str(write_photographs(tmp_path / "photographs")), []
    embed(tmp_path / "run", photographs, tmp_path / "cuda.npz", precision="float32", say=said.append)
    embed(tmp_path / "run", photographs, tmp_path / "cpu.npz", precision="float32", device="cpu", say=said.append)
    assert "float32 on cuda, 16 images at once (auto)" in said[0]  # the power of two that 12 images fill
    found, expected = (read_embeddings(tmp_path / f"{name}.npz").features for name in ("cuda", "cpu"))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
