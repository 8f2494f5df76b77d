"""What Weights & Biases and MLflow are told beside the rows: which run goes on, and what becomes of theirs that fail."""

from __future__ import annotations

import http.server
import json
import sys
import threading
import time
import urllib.parse
from types import SimpleNamespace

import pytest
from sink_readers import MORE, ROWS, expected, just, mlflow_runs, no_account, opened, png, read, send  # noqa: F401


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


def test_wandb_that_was_online_and_is_offline_now_starts_anew(tmp_path, monkeypatch):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    sinks = opened(tmp_path, ["wandb"])
    send(sinks)
    sinks.close("stopped")
    monkeypatch.setenv("WANDB_MODE", "offline")
    opened(tmp_path, ["wandb"], ROWS).close("finished")

    assert [(begun["id"], begun["mode"]) for begun in tracker.begun] == [(None, "online"), (None, "offline")]
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
