"""What is sent to CSV, TensorBoard, Weights & Biases and MLflow, each read back as its own tools do."""

from __future__ import annotations

import csv
import errno
import http.server
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from crate_mae.data import MissingLibrary
from crate_mae.files import append
from crate_mae.training.sinks import NAMES, clear_sinks, open_sinks, scalars_of

CONFIG = {"out": "runs/base", "optimizer": {"base_lr": 1.5e-4, "betas": [0.9, 0.95]}, "data": None}

ROWS = [
    {
        "step": 2,
        "epoch": 0.4,
        "loss": 1 / 3,
        "lr": 1e-4 / 3,
        "grad_norm": math.inf,
        "images_per_second": 3217.123456789,
    },
    {"step": 4, "epoch": 0.8, "loss": 0.1 + 0.2, "lr": 2e-4 / 3, "grad_norm": 5e-324, "images_per_second": 1e300},
    {"step": 4, "epoch": 1, "val_loss": math.nan, "mean_fill_loss": 2 / 7, "diverging": True},
    {"step": 4, "epoch": 1, "inside": {"encoder": {"zeros": [0.1, 0.7]}, "decoder": {"norm": [1.25]}}},
    {"step": 6, "epoch": 1.2, "loss": 0.1, "lr": 1e-5, "grad_norm": 0.25, "images_per_second": 1.0},
]
MORE = [
    {"step": 8, "epoch": 1.6, "loss": 0.7, "lr": 1e-6, "grad_norm": 1 / 9, "images_per_second": 2.0, "waiting": 0.5}
]

FILES = ["csv", "tensorboard"]
"""Those that any run can have: no process and no store of their own."""


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path_factory):
    """Whoever runs the tests may have one."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        if name != "WANDB_SERVICE":  # which runs already
            monkeypatch.delenv(name)
    nothing = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("NETRC", str(nothing / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(nothing))


def opened(out, names=FILES, rows=(), config=CONFIG, said=None):
    return open_sinks(names, out, config, rows, say=(said if said is not None else []).append)


def send(sinks, rows=ROWS):
    for row in rows:
        sinks.row(row)


def expected(rows) -> dict[str, list[tuple[int, str]]]:
    """Step and number of each row by name; in the words of `repr`, which are those of one float only, and NaN's."""
    series = {}
    for row in rows:
        for name, value in scalars_of(row).items():
            series.setdefault(name, []).append((row["step"], repr(value)))
    return series


def of_csv(out) -> dict[str, list[tuple[int, str]]]:
    series = {}
    with open(out / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if name != "step" and text:
                    series.setdefault(name, []).append((int(row["step"]), repr(float(text))))
    return series


def of_tensorboard(out) -> dict[str, list[tuple[int, str]]]:
    """By what its dashboard of scalars reads."""
    from tensorboard import context
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugins.scalar.metadata import PLUGIN_NAME

    everything = EventMultiplexer(size_guidance={"scalars": 0, "tensors": 0})
    everything.AddRunsFromDirectory(str(out / "tensorboard")).Reload()
    provider, of = MultiplexerDataProvider(everything, "tensorboard"), context.RequestContext()
    read = provider.read_scalars(of, experiment_id="", plugin_name=PLUGIN_NAME, downsample=10**9)
    (series,) = read.values() if read else [{}]
    return {name: [(datum.step, repr(datum.value)) for datum in data] for name, data in series.items()}


def accumulated(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def records_of(path: Path) -> list:
    """Of a .wandb file: LevelDB's log, in blocks of 32 KiB, whose chunks have a checksum, a length and a place in the record."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, records, parts = path.read_bytes(), 7, [], b""  # after its own seven bytes
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, place = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if place in (1, 4):  # the whole of one, or its last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def of_wandb(out) -> dict[str, list[tuple[int, str]]]:
    (path,) = out.glob("wandb/*run-*/*.wandb")
    series = {}
    for record in records_of(path):
        if record.WhichOneof("record_type") == "history":
            items = [item for item in record.history.item if len(item.nested_key) == 1]  # and not what a picture is
            row = {item.nested_key[0]: json.loads(item.value_json) for item in items}
            for name, value in row.items():
                if not name.startswith("_") and name != "step":
                    series.setdefault(name, []).append((row["step"], repr(float(value))))
    return series


def mlflow_client(out):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=(out / "mlflow").absolute().as_uri())  # MLflow keeps what it opened for the sink


def mlflow_runs(out):
    client = mlflow_client(out)
    return client.search_runs([client.get_experiment_by_name("crate-mae").experiment_id])


def of_mlflow(out) -> dict[str, list[tuple[int, str]]]:
    client, (run,) = mlflow_client(out), mlflow_runs(out)
    return {
        name: [(metric.step, repr(metric.value)) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


READERS = {"csv": of_csv, "tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": of_mlflow}


def read(out, name):
    return {series: sorted(values) for series, values in READERS[name](out).items()}


def just(rows):
    return {series: sorted(values) for series, values in expected(rows).items()}


def png(path, colour=(200, 30, 60)):
    Image.new("RGB", (24, 16), colour).save(path)
    return path


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
    sinks = opened(out, NAMES, ROWS[:3], said=said)
    assert hooks == (sys.exit, sys.excepthook, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
    send(sinks, ROWS[3:])
    picture = png(tmp_path / "reconstructions.png")
    sinks.picture(6, "reconstructions", picture)
    content = picture.read_bytes()
    picture.unlink()  # as the next one takes its place
    sinks.close("finished")

    for name in NAMES:
        assert read(out, name) == just(ROWS), name
    assert [line.partition(":")[0] for line in said] == ["wandb", *NAMES]  # offline; and all rows so far to each

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
    assert {name: one["rows"] for name, one in closed.items()} == dict.fromkeys(NAMES, len(ROWS))
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


class Tracker:
    """In place of the library: keeps what `wandb.init` was given."""

    run = None
    Settings, Image = staticmethod(dict), staticmethod(str)

    def __init__(self, fails_at: int | None = None, has_key: bool = True) -> None:
        self.begun, self.rows, self.ended, self.fails_at, self.has_key = [], [], [], fails_at, has_key

    def login(self, *, prompt, verify):
        assert not prompt
        return self.has_key

    def init(self, **kwargs):
        self.begun.append(kwargs)
        return SimpleNamespace(
            id=kwargs["id"] or f"new{len(self.begun)}",
            resumed=kwargs["resume"] == "allow",
            dir="wandb/run/files",
            define_metric=lambda *args, **kwargs: None,
            log=self.log,
            finish=lambda exit_code: self.ended.append(exit_code),
        )

    def teardown(self):
        self.torn_down = True
        raise ConnectionError("still gone")

    def log(self, row):
        if len(self.rows) == self.fails_at:
            raise ConnectionError("the server\nis gone")
        self.rows.append(row)


def test_wandb_goes_on_by_its_identity_or_begins_another_run_of_the_same_name(tmp_path, monkeypatch):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    sinks = opened(tmp_path, ["wandb"])
    send(sinks)
    sinks.close("failed")
    opened(tmp_path, ["wandb"], ROWS).close("stopped")
    assert len(tracker.rows) == len(ROWS)
    opened(tmp_path, ["wandb"], ROWS[:2]).close("finished")
    assert len(tracker.rows) == len(ROWS) + 2

    assert [(begun["id"], begun["resume"]) for begun in tracker.begun] == [
        (None, None),
        ("new1", "allow"),
        (None, None),
    ]
    assert {(begun["name"], begun["group"], begun["mode"]) for begun in tracker.begun} == {
        (tmp_path.name, str(tmp_path)[-128:], "online")
    }
    assert tracker.ended == [1, 0, 0]


def test_wandb_without_a_key_is_offline_and_says_so_and_starts_anew(tmp_path, monkeypatch):
    tracker, said = Tracker(has_key=False), []
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    sinks = opened(tmp_path, ["wandb"], said=said)
    send(sinks)
    sinks.close("stopped")
    opened(tmp_path, ["wandb"], ROWS).close("finished")

    assert said[0] == "wandb: offline; to send it, wandb sync wandb/run"
    assert [begun["mode"] for begun in tracker.begun] == ["offline", "offline"]
    assert len(tracker.rows) == 2 * len(ROWS)


def test_a_tracker_that_fails_is_said_once_and_left_alone(tmp_path, monkeypatch):
    tracker, said = Tracker(fails_at=2), []
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    sinks = opened(tmp_path, ["wandb", "csv"], said=said)
    send(sinks)
    sinks.picture(6, "reconstructions", png(tmp_path / "picture.png"))
    sinks.close("finished")

    assert said == ["wandb: the server is gone; nothing more is sent to it, and metrics.jsonl has all rows"]
    assert len(tracker.rows) == 2
    assert tracker.torn_down
    assert read(tmp_path, "csv") == just(ROWS)
    assert json.loads((tmp_path / "sinks.json").read_text()) == {"csv": {"identity": "", "rows": 5}}


def test_mlflow_that_fails_in_the_background_is_said_once(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    said, sent = [], []
    sinks = opened(tmp_path, ["mlflow"], said=said)

    def fails(*args, **kwargs):
        sent.append(args)
        raise OSError("no route to host")

    monkeypatch.setattr(MlflowClient, "log_batch", fails)
    deadline = time.monotonic() + 10
    while not said and time.monotonic() < deadline:
        send(sinks, ROWS[:1])
        time.sleep(0.01)
    send(sinks)
    sinks.close("finished")

    assert said == ["mlflow: no route to host; nothing more is sent to it, and metrics.jsonl has all rows"]
    assert len(sent) == 1
    assert not (tmp_path / "sinks.json").exists()


def test_mlflow_that_does_not_get_all_in_time_is_not_waited_for(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    from crate_mae.training.sinks import mlflow

    said = []
    sinks = opened(tmp_path, ["mlflow"], said=said)
    monkeypatch.setitem(mlflow._SECONDS_TO_CLOSE, "stopped", 0.1)
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *args, **kwargs: time.sleep(2))
    send(sinks)
    sinks.close("stopped")

    assert said == ["mlflow: not everything was sent in 0.1 seconds; it may lack rows, and metrics.jsonl has all"]
    assert not (tmp_path / "sinks.json").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_ends_the_run_as_that_of_its_rows_does(name, tmp_path, monkeypatch):
    sinks = opened(tmp_path, [name])
    send(sinks, ROWS[:1])
    if name == "csv":
        append(tmp_path / "metrics.csv", "")  # opens
        monkeypatch.setattr("crate_mae.files._write_all", full)
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


def test_a_disk_that_is_full_at_the_start_ends_the_others(tmp_path, monkeypatch):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    monkeypatch.setattr("crate_mae.files._write_all", full)
    with pytest.raises(OSError, match=r"^cannot write .*metrics.csv: No space left on device$"):
        opened(tmp_path, ["wandb", "csv"], ROWS)
    assert tracker.ended == [1]
    assert not (tmp_path / "sinks.json").exists()


@pytest.fixture
def server():
    """MLflow's server as its clients know it: what it was asked, and answers that will do."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            what = urllib.parse.urlparse(self.path).path.rpartition("/mlflow/")[2]
            asked.append((what, json.loads(body) if body else {}))
            info = {"run_id": "a" * 32, "lifecycle_stage": "active", "experiment_id": "1", "status": "RUNNING"}
            run = {"info": info, "data": {"params": [{"key": "data", "value": "photos"}]}}
            answers = {"experiments/get-by-name": {"experiment": {"experiment_id": "1", "name": "crate-mae"}}}
            answers |= {"runs/create": {"run": run}, "runs/get": {"run": run}, "runs/update": {"run_info": info}}
            content = json.dumps(answers.get(what, {})).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = answer

        def log_message(self, *args):
            pass

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}", asked
    serving.shutdown()
    serving.server_close()


def test_mlflow_sends_to_a_server_and_goes_on_there_quietly(tmp_path, monkeypatch, server, capfd):
    uri, asked = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    sinks = opened(tmp_path, ["mlflow"])
    send(sinks)
    sinks.close("stopped")
    first = list(asked)
    asked.clear()
    sinks = opened(tmp_path, ["mlflow"], ROWS)
    send(sinks, MORE)
    sinks.close("finished")

    def sent(asked):
        metrics = [metric for what, body in asked if what == "runs/log-batch" for metric in body.get("metrics", ())]
        series = {}
        for metric in metrics:
            series.setdefault(metric["key"], []).append((int(metric["step"]), repr(float(metric["value"]))))
        return series

    assert sent(first) == expected(ROWS)
    assert sent(asked) == expected(MORE)
    assert "runs/create" in [what for what, _ in first]
    assert "runs/create" not in [what for what, _ in asked]
    statuses = [body["status"] for what, body in first + asked if what == "runs/update"]
    assert statuses == ["KILLED", "RUNNING", "FINISHED"]
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "mlflow").exists()


def test_mlflow_says_which_parameter_it_cuts(tmp_path):
    said = []
    opened(tmp_path, ["mlflow"], config={"data": "x" * 7000}, said=said).close("finished")
    assert said == ["mlflow: the parameter data has 7000 characters; the first 6000 are kept"]
    assert mlflow_runs(tmp_path)[0].data.params == {"data": "x" * 6000}


def test_libraries_are_imported_only_when_asked_for():
    told = "import sys, crate_mae.training.sinks as s; print([n for n in ('wandb', 'mlflow', 'tensorboard') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
