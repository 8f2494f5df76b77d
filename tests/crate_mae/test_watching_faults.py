"""What a run tells of itself where something is amiss: gradients too large, folders that moved, errors of others."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import urllib.error
from pathlib import Path

import pytest
import torch
from sink_readers import just, no_account, read  # noqa: F401
from tiny_runs import metric_lines, with_run
from torch import nn

from crate_mae.model import CrateMAE
from crate_mae.training import RunStopped, plan, pretrain
from crate_mae.training.pace import Pace


def longer(config, epochs=4):
    return dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, epochs=epochs))


def test_the_peak_is_of_the_steps():
    """And not of what came before them, such as a batch that was tried and did not fit."""
    pace = Pace(1.0, torch.device("cpu"), total_steps=10)
    torch.ones(2**28)  # 1 GiB, given back at once
    tried = pace_memory(pace)
    pace.begin(0, product_rate=1.0)
    assert pace_memory(pace) < tried - 2**29
    torch.ones(2**27)
    assert tried - 2**30 < pace_memory(pace) < tried - 2**28


def pace_memory(pace: Pace) -> int:
    return pace.row(1, 1.0)["memory_bytes"]


def test_a_skipped_step_has_no_norms_by_part(config, monkeypatch):
    """NaN would be no JSON."""
    steps = itertools.count(1)

    def too_large(self, *arguments, of_model=CrateMAE.forward, **settings):
        output = of_model(self, *arguments, **settings)
        large = self.training and next(steps) == 3
        return output._replace(loss=output.loss * 1e30) if large else output

    monkeypatch.setattr(CrateMAE, "forward", too_large)
    pretrain(with_run(config, precision="float16", log_every=1, norms_every=1))
    rows = metric_lines(config.out)
    assert [row["step"] for row in rows if row.get("skipped")] == [3]
    assert [row["step"] for row in rows if "grad_norms" in row] == [1, 2, *range(4, 13)]
    json.dumps(rows, allow_nan=False)


class TestCallbacks:
    def test_an_error_of_a_library_arrives_as_it_is(self, config):
        """An OSError as those of the disk are, but not made of one text."""

        def send(step: int, metrics: dict, model: nn.Module) -> None:
            raise urllib.error.HTTPError("http://localhost", 500, "no", {}, None)

        with pytest.raises(urllib.error.HTTPError, match="500: no"):
            pretrain(config, callbacks=[send])

    def test_a_stop_travels_to_other_ranks(self):
        stop = pickle.loads(pickle.dumps(RunStopped("enough", 15)))
        assert (str(stop), stop.signal) == ("enough", 15)


class TestSinks:
    def test_none_stale_is_left_where_a_run_went_back_without_them(self, config):
        """To as many rows as they had when they were closed, but others."""
        names = ("csv", "tensorboard")
        pretrain(with_run(config, keep_every=1, log_to=names))
        lower = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, base_lr=0.05))
        pretrain(with_run(lower, keep_every=1), resume=4)
        pretrain(with_run(longer(lower), log_to=names), resume=True)
        for name in names:
            assert read(config.out, name) == just(metric_lines(config.out)), name

    def test_pictures_follow_a_folder_that_was_moved(self, config):
        config = with_run(config, log_to=("mlflow",))
        pretrain(config)
        moved = dataclasses.replace(longer(config), out=config.out.with_name("moved"))
        config.out.rename(moved.out)
        pretrain(moved, resume=True)
        assert not config.out.exists()
        assert [path.name for path in (moved.out / "mlflow").rglob("step_16/*")] == ["reconstructions.png"]
        assert read(moved.out, "mlflow") == just(metric_lines(moved.out))

    def test_overwriting_leaves_what_a_link_leads_to(self, config, tmp_path):
        pretrain(with_run(config, log_to=("tensorboard",)))
        (config.out / "tensorboard").rename(tmp_path / "moved")
        kept = tmp_path / "kept"
        kept.mkdir()
        (kept / "mine").touch()
        (config.out / "tensorboard").symlink_to(kept)
        pretrain(with_run(config, log_to=("tensorboard",)), overwrite=True)
        assert [path.name for path in kept.iterdir()] == ["mine"]
        assert list((config.out / "tensorboard").glob("*.tfevents.*"))


class TestPlanning:
    def test_it_is_refused_as_the_run_would_be(self, config):
        with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
            plan(config, resume=True, overwrite=True)

    def test_files_are_those_of_a_run_without_validation(self, config):
        """Of 3 epochs with a state every other one, and one at the end."""
        config = dataclasses.replace(config, val=None, images=dataclasses.replace(config.images, val_fraction=0.0))
        config = with_run(config, save_every=2, keep_states=3)
        files = {path.name: what for path, what, _ in plan(config).files}
        assert "best" not in files and "up to 2 of" in files["states"]

    def test_images_that_cannot_be_read_are_told(self, config, capsys):
        broken = Path(config.data) / "00.png"
        broken.write_bytes(b"none")
        plan(config)
        assert f"1 of the images met cannot be read, such as {broken}" in capsys.readouterr().out
        assert not config.out.exists()
