"""States that are not what a run wrote: passed over in a line, or read as they were; never run, never waited for."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")  # lacking where nothing can be installed, as on some GPU machines

from fuzzing import fuzzed, spoilt
from hypothesis import given
from hypothesis import strategies as st
from limits import no_hang
from tiny_runs import TINY, tiny_config, write_photographs

from crate_mae.model import CrateMAE
from crate_mae.training import OptimizerConfig, build_optimizer, pretrain
from crate_mae.training.states import check_fits, read_state, restore, saved_states


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with two states, and the newer one's content in `sound`."""
    root = tmp_path_factory.mktemp("states")
    config = tiny_config(root / "run", write_photographs(root / "photographs"))
    pretrain(config)
    states = config.out / "states"
    (states / "sound").write_bytes((states / "step_12.pt").read_bytes())
    return states


def read(folder: Path) -> tuple[dict, list[str]]:
    """The state that a run resumes from; of one that can be read, all that is in it is given to a model."""
    model = CrateMAE(TINY)
    optimizer = build_optimizer(model, OptimizerConfig(), 3)
    with no_hang(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of versions of pickle that there are not
        state, passed_over = read_state(folder, True, lambda state: check_fits(state, model, optimizer))
        restore(state, model, optimizer)
    assert all("\n" not in line and "weights_only" not in line and len(line) < 600 for line in passed_over.values())
    return state, passed_over


def as_bytes(state: dict) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@fuzzed
@given(data=st.data())
def test_a_changed_file_is_read_as_it_was_or_passed_over(folder, data):
    content = (folder / "sound").read_bytes()
    changed = data.draw(spoilt(content))
    (folder / "step_12.pt").write_bytes(changed)
    state, passed_over = read(folder)
    assert (state["step"], len(passed_over)) == ((8, 1) if passed_over else (12, 0))
    if not passed_over:
        (folder / "step_12.pt").write_bytes(content)
        assert as_bytes(state) == as_bytes(read(folder)[0])


@fuzzed
@given(data=st.data())
def test_a_changed_pickle_in_a_sound_archive_harms_nobody(folder, data):
    content = (folder / "sound").read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    [name] = [name for name in entries if name.endswith("data.pkl")]
    entries[name] = data.draw(spoilt(entries[name]))
    with zipfile.ZipFile(folder / "step_12.pt", "w") as archive:
        for filename, entry in entries.items():
            archive.writestr(filename, entry)
    read(folder)


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_no_code_in_a_state_is_run(folder, tmp_path):
    content = (folder / "sound").read_bytes()
    state = torch.load(io.BytesIO(content), weights_only=True)
    for bad in ({**state, "images": Runs(tmp_path / "ran")}, Runs(tmp_path / "ran")):
        torch.save(bad, folder / "step_12.pt")
        assert read(folder)[0]["step"] == 8
        (folder / "step_12.pt").write_bytes(pickle.dumps(bad))
        assert read(folder)[0]["step"] == 8
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["folder", "fifo", "link to itself", "device"])
def test_what_is_no_file_is_passed_over(folder, kind):
    content = (folder / "sound").read_bytes()
    path = folder / "step_12.pt"
    path.unlink()
    {
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "link to itself": lambda: path.symlink_to(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }[kind]()
    try:
        assert read(folder)[0]["step"] == 8
        assert [state.step for state in saved_states(folder)] == [8]
    finally:
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(content)
