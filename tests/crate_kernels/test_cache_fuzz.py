"""Caches of tiles, spoilt at random: the tiles that were written, others that kernels take, or an error of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
LEAST = {"GROUP": 1, "PARTS": 1, "LIBRARY": 0, "num_warps": 1, "num_stages": 1}
MOST = {"GROUP": 64, "PARTS": 8, "LIBRARY": 1, "num_warps": 16, "num_stages": 8}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "tiles.json"


@pytest.fixture(scope="module")
def content(file: Path) -> bytes:
    cache.write(file, SHIPPED, CPU)
    return file.read_bytes()


def read(content: bytes, file: Path) -> None:
    """What is read is what kernels can be launched with; what is not, ``clear`` deletes where it begins as a cache."""
    file.write_bytes(content)
    found = read_or_told(lambda: cache.load(file, CPU), file, (cache.CacheError,))
    for key, tile in (found or {}).items():
        assert tile.keys() == SHIPPED[key].keys()
        for name, value in tile.items():
            assert type(value) is int and LEAST.get(name, 16) <= value <= MOST.get(name, 512)
            assert value.bit_count() == 1 or name in ("LIBRARY", "num_stages")
    cleared = read_or_told(lambda: cache.clear(file), file, (cache.CacheError,))
    assert file.exists() != (cleared is True)
    if found or b"".join(content.split()).startswith(b'{"for":{"device":'):
        assert cleared


@fuzzed
@given(data=st.data())
def test_spoilt_caches(data: st.DataObject, file: Path, content: bytes) -> None:
    read(data.draw(spoilt(content)), file)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANYTHING = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=20), SCALARS, max_size=3)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON value, and what it is indexed by."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *places(value[key])]]


@fuzzed
@given(data=st.data())
def test_caches_of_other_values(data: st.DataObject, file: Path, content: bytes) -> None:
    """JSON as whole as before, with one to three of its values, at any depth, replaced by anything or by another number."""
    whole = {"": json.loads(content)}
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(whole)))
        container[key] = data.draw(ANYTHING | st.integers(0, 1024) | st.just(2**40))
    read(json.dumps(whole[""]).encode("utf-8", "surrogatepass"), file)
