"""What is sent to CSV, TensorBoard, Weights & Biases and MLflow, and when each goes on or starts anew."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sink_readers import (
    CONFIG,
    FILES,
    MORE,
    ROWS,
    accumulated,
    just,
    mlflow_client,
    mlflow_runs,
    no_account,  # noqa: F401
    opened,
    png,
    read,
    records_of,
    send,
)

from crate_mae.data import MissingLibrary
from crate_mae.training.sinks import PLACES, clear_sinks, scalars_of
from crate_mae.training.sinks.tensorboard import TensorBoardSink


def test_scalars_are_the_numbers_of_a_row_by_path():
    row = {
        "step": 3,
        "epoch": 1,
        "diverging": True,
        "inside": {"encoder": {"zeros": [0.5, [1, 2]]}},
        "note": "x",
        "none": None,
    }

    scalars = scalars_of(row)

    assert scalars == {
        "epoch": 1.0,
        "diverging": 1.0,
        "inside/encoder/zeros/1": 0.5,
        "inside/encoder/zeros/2/1": 1.0,
        "inside/encoder/zeros/2/2": 2.0,
    }
    assert all(type(value) is float for value in scalars.values())
    assert math.isnan(scalars_of(ROWS[2])["val_loss"])


def test_all_have_every_scalar_to_the_digit_and_the_picture(tmp_path):
    """Some rows from before, in one go, and some as they come."""
    out, said = tmp_path / "a run", []
    out.mkdir()
    hooks = sys.exit, sys.excepthook, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    sinks = opened(out, PLACES, ROWS[:3], said=said)
    assert hooks == (sys.exit, sys.excepthook, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
    send(sinks, ROWS[3:])
    picture = png(tmp_path / "reconstructions.png")
    sinks.picture(6, "reconstructions", picture)
    content = picture.read_bytes()
    picture.unlink()  # as the next one takes its place
    sinks.close("finished")

    for name in PLACES:
        assert read(out, name) == just(ROWS), name
    assert [line.partition(":")[0] for line in said] == ["wandb", *PLACES]  # offline; and all rows so far to each

    events = accumulated(out)
    assert events.Images("reconstructions")[0].encoded_image_string == content
    assert events.Images("reconstructions")[0].step == 6
    (text,) = events.Tensors("config/text_summary")
    assert json.loads(text.tensor_proto.string_val[0].decode().strip("`").removeprefix("json")) == CONFIG
    (stored,) = out.glob("wandb/offline-run-*/files/media/images/*.png")
    assert stored.read_bytes() == content
    (run,) = mlflow_runs(out)
    folder = mlflow_client(out).download_artifacts(run.info.run_id, "step_6", str(tmp_path))
    assert Path(folder, "reconstructions.png").read_bytes() == content
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    assert run.data.params == {
        "out": "runs/base",
        "optimizer.base_lr": "0.00015",
        "optimizer.betas": "[0.9, 0.95]",
        "data": "None",
    }
    (wandb_file,) = out.glob("wandb/offline-run-*/*.wandb")
    records = records_of(wandb_file)
    (begun,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (begun.display_name, begun.run_group, begun.project) == ("a run", str(out), "crate-mae")
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["optimizer"] == CONFIG["optimizer"]
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [0]

    closed = json.loads((out / "sinks.json").read_text())
    assert {name: one["rows"] for name, one in closed.items()} == dict.fromkeys(PLACES, len(ROWS))
    clear_sinks(out)
    assert not list(out.iterdir())


@pytest.mark.parametrize("name", [*FILES, "mlflow"])
def test_what_was_closed_in_order_goes_on(name, tmp_path):
    sinks = opened(tmp_path, [name])
    send(sinks)
    sinks.close("stopped")
    identity = json.loads((tmp_path / "sinks.json").read_text())[name]["identity"]
    said = []

    sinks = opened(tmp_path, [name], ROWS, {**CONFIG, "data": "photos"}, said)
    assert not (tmp_path / "sinks.json").exists()  # were it killed now, it could not go on
    send(sinks, MORE)
    sinks.close("finished")

    assert read(tmp_path, name) == just(ROWS + MORE)
    assert json.loads((tmp_path / "sinks.json").read_text()) == {name: {"identity": identity, "rows": 6}}
    assert not said  # and nothing of all rows
    if name == "mlflow":
        (run,) = mlflow_runs(tmp_path)
        assert (run.info.run_id, run.info.status) == (identity, "FINISHED")
        assert (run.data.params["data"], run.data.tags["data"]) == ("None", "photos")


@pytest.mark.parametrize("name", [*FILES, "mlflow"])
@pytest.mark.parametrize("how", ["killed", "gone back", "lost", "other rows"])
def test_any_other_starts_anew_and_no_stale_row_is_left(name, how, tmp_path):
    sinks = opened(tmp_path, [name])
    send(sinks, [{"step": 1, "epoch": 0.1, "stale": 1.0}, *ROWS])
    if how != "killed":
        sinks.close("stopped")
    if how == "lost":
        (tmp_path / "sinks.json").unlink()
    elif how == "other rows":
        (tmp_path / "sinks.json").write_text('{"csv": 3')

    rows = ROWS[:3] if how == "gone back" else ROWS
    sinks = opened(tmp_path, [name], rows)
    send(sinks, MORE)
    sinks.close("finished")

    assert read(tmp_path, name) == just(rows + MORE)


def test_what_lost_its_files_starts_anew(tmp_path):
    sinks = opened(tmp_path)
    send(sinks)
    sinks.close("stopped")
    kept = (tmp_path / "sinks.json").read_bytes()
    clear_sinks(tmp_path)
    (tmp_path / "sinks.json").write_bytes(kept)

    opened(tmp_path, rows=ROWS).close("finished")

    for name in FILES:
        assert read(tmp_path, name) == just(ROWS)


def test_one_that_is_asked_for_later_gets_all_rows(tmp_path):
    sinks = opened(tmp_path, ["csv"])
    send(sinks)
    sinks.close("stopped")
    sinks = opened(tmp_path, FILES, ROWS)
    send(sinks, MORE)
    sinks.close("finished")
    assert read(tmp_path, "csv") == read(tmp_path, "tensorboard") == just(ROWS + MORE)


def test_no_sink_is_no_work(tmp_path):
    sinks = opened(tmp_path, [])
    send(sinks)
    sinks.close("finished")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_ends_the_run_as_that_of_its_rows_does(name, tmp_path, monkeypatch):
    sinks = opened(tmp_path, [name])
    send(sinks, ROWS[:1])
    if name == "csv":
        monkeypatch.setattr("crate_mae.files.os.write", full)
    else:
        monkeypatch.setattr(sinks._sinks[0]._records, "write", full)

    with pytest.raises(OSError, match=r"^cannot write .*: No space left on device$") as told:
        sinks.row(ROWS[4])
    assert told.value.errno == errno.ENOSPC

    monkeypatch.undo()
    sinks.close("failed")
    assert not (tmp_path / "sinks.json").exists()  # or a torn row would be gone on from


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "name, library, extra",
    [("tensorboard", "tensorboard", "log"), ("wandb", "wandb", "wandb"), ("mlflow", "mlflow", "mlflow")],
)
def test_a_missing_library_is_named_and_others_are_closed(name, library, extra, tmp_path, monkeypatch):
    for module in [module for module in sys.modules if module.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    opened(tmp_path, ["csv"]).close("finished")
    before = (tmp_path / "sinks.json").read_bytes()

    with pytest.raises(MissingLibrary, match=rf"run\.log_to: {name} needs .*pip install 'crate-kernels\[{extra}\]'"):
        opened(tmp_path, ["csv", name])
    assert (tmp_path / "sinks.json").read_bytes() == before  # nothing was sent


def test_what_cannot_be_opened_is_told_before_anything_is_sent(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"run\.log_to: expected some of csv, tensorboard, wandb, mlflow, got 'cvs'"):
        opened(tmp_path, ["cvs"])
    for uri in ("nowhere://x", "http://127.0.0.1:9"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"^run\.log_to: mlflow cannot be opened: .*(nowhere|refused)"):
            opened(tmp_path, ["mlflow"])
        assert time.monotonic() - began < 10


def test_a_disk_that_is_full_at_the_start_leaves_nothing_to_go_on_from(tmp_path, monkeypatch):
    opened(tmp_path, ["tensorboard", "csv"]).close("stopped")
    closed = []
    monkeypatch.setattr(TensorBoardSink, "close", lambda sink, ended: closed.append(ended))
    monkeypatch.setattr("crate_mae.files.os.write", full)
    with pytest.raises(OSError, match=r"^cannot write .*metrics.csv: No space left on device$"):
        opened(tmp_path, ["tensorboard", "csv"], ROWS)
    assert closed == ["failed"]
    assert not (tmp_path / "sinks.json").exists()


def test_libraries_are_imported_only_when_asked_for():
    told = "import sys, crate_mae.training.sinks as s; print([n for n in ('wandb', 'mlflow', 'tensorboard') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
