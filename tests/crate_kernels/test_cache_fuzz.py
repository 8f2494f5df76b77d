"""Caches of tiles, spoilt at random: the tiles that were written, or an error of one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")  # lacking where nothing can be installed, as on some GPU machines

from fuzzing import fuzzed, spoilt
from hypothesis import given
from hypothesis import strategies as st
from limits import read_or_told

from crate_kernels.tiles import cache

CPU = torch.device("cpu")
SHIPPED = {key: tile for table in cache.TABLES for key, tile in table["default"].items()}


@fuzzed
@given(data=st.data())
def test_spoilt_caches(data: st.DataObject, tmp_path: Path) -> None:
    """Bytes are spoilt, or the JSON is whole but for one number. ``--clear`` deletes what begins as a cache, and nothing else."""
    file = tmp_path / "tiles.json"
    cache.write(file, SHIPPED, CPU)
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(spoilt(file.read_bytes())))
    else:
        content = json.loads(file.read_text())
        tile = data.draw(st.sampled_from(content["tiles"]))[1]
        tile[data.draw(st.sampled_from(list(tile)))] = data.draw(
            st.none() | st.booleans() | st.floats() | st.integers(0, 256)
        )
        file.write_text(json.dumps(content))
    begins_as_one = b"".join(file.read_bytes().split()).startswith(b'{"for":{"device":')
    found = read_or_told(lambda: cache.load(file, CPU), file, (cache.CacheError,))
    assert found is None or found == SHIPPED
    cleared = read_or_told(lambda: cache.clear(file), file, (cache.CacheError,))
    assert file.exists() != (cleared is True)
    assert cleared or not (found or begins_as_one)
