"""Rows to send to sinks of metrics, and each sink read back as its own tools do."""

from __future__ import annotations

import csv
import json
import math
import os
import struct
from pathlib import Path

import pytest
from PIL import Image

from crate_mae.training.sinks import open_sinks, scalars_of

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
