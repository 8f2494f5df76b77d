"""Files of weights, spoilt at random: the weights that were saved, or an error of one line; nothing in a file is ever run."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")  # lacking where nothing can be installed, as on some GPU machines

from fuzzing import fuzzed, spoilt
from hypothesis import given
from hypothesis import strategies as st
from limits import read_or_told
from support import SMALL, small_model

from crate_mae import CrateMAE, load_model, save_model

MODEL = small_model(lambd=0.5)
TOLD = (ValueError, RuntimeError, FileNotFoundError)


def saved(**options: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"model": MODEL.state_dict(), "epoch": 3}, file, **options)
    return file.getvalue()


def entries(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {entry.filename: opened.read(entry) for entry in opened.infolist()}


ARCHIVE, LEGACY = saved(), saved(_use_new_zipfile_serialization=False)
ENTRIES = entries(ARCHIVE)
PICKLE = next(name for name in ENTRIES if name.endswith("data.pkl"))
PLACES = [place for _, _, place in pickletools.genops(ENTRIES[PICKLE]) if place]  # past the protocol's number


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    save_model(MODEL, directory)
    return directory


@pytest.fixture(scope="module")
def content(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def load(content: bytes, path: Path) -> CrateMAE | None:
    path.write_bytes(content)
    if path.name == "model.safetensors":
        return read_or_told(lambda: load_model(path.parent), path, TOLD)
    return read_or_told(lambda: load_model(path, "crate_mae_tiny", lambd=0.5, step_size=0.1, **SMALL), path, TOLD)


def is_as_saved(model: CrateMAE) -> bool:
    own = MODEL.state_dict()
    return all(
        torch.equal(value.view(torch.int32), own[name].view(torch.int32)) for name, value in model.state_dict().items()
    )


def has_checksum(content: bytes) -> bool:
    """Whether a reader could know: an edit may rename the checksum, and what is left is a file of somebody else's."""
    size = struct.unpack("<Q", content[:8])[0]
    return "crc32" in json.loads(content[8 : 8 + size]).get("__metadata__", {})


@fuzzed
@given(data=st.data())
def test_spoilt_safetensors(data: st.DataObject, directory: Path, content: bytes) -> None:
    spoilt_content = data.draw(spoilt(content))
    loaded = load(spoilt_content, directory / "model.safetensors")
    assert loaded is None or is_as_saved(loaded) or not has_checksum(spoilt_content)


def edit(header: dict[str, Any], size: int, draw: st.DrawFn) -> None:
    """One change to the header of ``size`` bytes of data."""
    names = sorted(name for name, entry in header.items() if isinstance(entry, dict) and "shape" in entry)
    one, other = (draw(st.sampled_from(names)) for _ in range(2))
    begin = draw(st.integers(0, 2**63) | st.integers(0, size))
    numbers = st.lists(st.integers(0, 2**40), max_size=9)
    dtypes = st.sampled_from(["F16", "F64", "I32", "U8", "F8_E4M3", "F4", "C64", "?"])
    edits = {
        "names": lambda: header.update({one: header[other], other: header[one]}),
        "unknown": lambda: header.update({draw(st.text(max_size=300)): header[one]}),
        "missing": lambda: header.pop(one),
        "dtype": lambda: header[one].update(dtype=draw(dtypes)),
        "shape": lambda: header[one].update(shape=draw(numbers)),
        "turned": lambda: header[one].update(shape=header[one]["shape"][::-1]),
        "offsets": lambda: header[one].update(data_offsets=[begin, begin + draw(st.integers(-9, 4096))]),
        "checksum": lambda: header.update(__metadata__={"crc32": draw(st.text(max_size=300))}),
        "no entry": lambda: header.update({one: draw(st.none() | st.integers() | st.text(max_size=5))}),
    }
    edits[draw(st.sampled_from(sorted(edits)))]()


@st.composite
def with_another_header(draw: st.DrawFn, content: bytes) -> bytes:
    """A whole file again, length of the header included, that says something else of the same bytes."""
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    for _ in range(draw(st.integers(1, 3))):
        edit(header, len(data), draw)
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + draw(st.just(data) | spoilt(data))


@fuzzed
@given(data=st.data())
def test_safetensors_with_another_header(data: st.DataObject, directory: Path, content: bytes) -> None:
    loaded = load(data.draw(with_another_header(content)), directory / "model.safetensors")
    assert loaded is None or is_as_saved(loaded)


@fuzzed
@given(content=spoilt(ARCHIVE))
def test_spoilt_archives_of_torch_save(content: bytes, directory: Path) -> None:
    loaded = load(content, directory / "spoilt.pth")
    assert loaded is None or is_as_saved(loaded)


@fuzzed
@given(content=spoilt(LEGACY))
def test_spoilt_pickles_of_torch_save(content: bytes, directory: Path) -> None:
    """The format before PyTorch 1.6, which has no checksums: some other numbers are finite weights, too."""
    load(content, directory / "spoilt.pt")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def running(marker: Path) -> list[bytes]:
    """Each makes the file, when it is run: by all opcodes that call, and by names of classes that do so when they are made."""
    path, code = text(str(marker)), text(f"open({str(marker)!r}, 'w').close()")
    return [
        b"cposix\nsystem\n" + text(f"touch '{marker}'") + b"\x85R0",
        b"cbuiltins\nopen\n(" + path + text("w") + b"tR0",
        b"cbuiltins\nexec\n" + code + b"\x85R0",
        text("builtins") + text("exec") + b"\x93" + code + b"\x85R0",
        b"(" + code + b"ibuiltins\nexec\n0",
        b"(cbuiltins\nexec\n" + code + b"o0",
        b"cpathlib\nPath.touch\n(cpathlib\nPosixPath\n" + path + b"\x85RtR0",
        b"ctorch.serialization\nos.system\n" + text(f"touch '{marker}'") + b"\x85R0",
        b"cargparse\nFileType\n" + text("w") + b"\x85R" + path + b"\x85R0",
        b"cnumpy\nmemmap\n(" + path + text("uint8") + text("w+") + b"K\x00K\x04t\x810",
    ]


def test_pickles_that_run_code_do(tmp_path: Path) -> None:
    """As plain pickle reads them; else the next test would find nothing."""
    marker = tmp_path / "marker"
    for call in running(marker):
        pickle.loads(b"\x80\x04" + call + b"N.")
        assert marker.exists(), call
        marker.unlink()


@fuzzed
@given(data=st.data())
def test_nothing_in_a_pickle_is_run(data: st.DataObject, directory: Path) -> None:
    """Opcodes that call stand at any place of the pickle, behind checksums that are right, and some of the rest is spoilt."""
    marker, path = directory / "marker", directory / "running.pth"
    place, call = data.draw(st.sampled_from(PLACES)), data.draw(st.sampled_from(running(marker)))
    pickled = (
        ENTRIES[PICKLE][:place] + call + data.draw(st.just(ENTRIES[PICKLE][place:]) | spoilt(ENTRIES[PICKLE][place:]))
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, entry in (ENTRIES | {PICKLE: pickled}).items():
            archive.writestr(name, entry)
    assert load(file.getvalue(), path) is None
    assert load(pickled, path) is None
    assert load(LEGACY[:2] + call + LEGACY[2:], path) is None
    assert not marker.exists()
