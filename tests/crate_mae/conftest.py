"""Fixtures of pre-training runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden import Golden
from tiny_runs import tiny_config, write_photographs

from crate_mae.training import PretrainConfig


@pytest.fixture(scope="session")
def golden(shared: Path) -> Golden:
    return Golden(shared / "golden" / "crate_mae_small_official.npz")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    return write_photographs(tmp_path / "photographs")


@pytest.fixture
def config(tmp_path: Path, photographs: Path) -> PretrainConfig:
    return tiny_config(tmp_path / "run", photographs)
