"""The compare command: what runs' folders tell, the table and the page made of it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

pytest.importorskip("jsonargparse")  # lacking where nothing can be installed, as on some GPU machines

from tiny_runs import metric_lines, tiny_config, write_photographs

from crate_mae.cli import main
from crate_mae.cli.compare import comparison_lines
from crate_mae.comparing import compare
from crate_mae.pictures.charts import Axis, Canvas, Line, Mark
from crate_mae.pictures.comparison import COLOURS, comparison_picture
from crate_mae.training import pretrain

RED = "#d01c1c"


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A folder of two runs of 4 steps an epoch: `resumed` after 2 of its 3 epochs, and `diverged` after 4 of 5."""
    folder = tmp_path_factory.mktemp("compare")
    config = tiny_config(folder / "resumed", write_photographs(folder / "photographs"))
    schedule, optimizer = config.schedule, config.optimizer
    pretrain(dataclasses.replace(config, schedule=dataclasses.replace(schedule, epochs=2)))
    pretrain(config, resume=True)
    diverged = dataclasses.replace(
        config,
        out=folder / "diverged",
        schedule=dataclasses.replace(schedule, epochs=4),
        optimizer=dataclasses.replace(optimizer, clip_grad=0.0),
        run=dataclasses.replace(config.run, log_every=1),
    )
    pretrain(diverged)
    schedule = dataclasses.replace(schedule, epochs=5, warmup_epochs=0)
    optimizer = dataclasses.replace(diverged.optimizer, base_lr=1e4)
    pretrain(dataclasses.replace(diverged, schedule=schedule, optimizer=optimizer), resume=True)
    return folder


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(step: int, changed: str = "") -> dict[str, Any]:
    return {"step": step, "when": "2026-11-27T16:00:00+00:00", "changed": changed}


def of_steps(step: int, loss: float = 1.0, **others: Any) -> dict[str, Any]:
    """A row of a run of 4 steps an epoch and 36 images a second."""
    return {"step": step, "epoch": step / 4, "loss": loss, "grad_norm": 1.0, "images_per_second": 36.0} | others


def of_validation(step: int, error: float, fill: float = 1.5, **others: Any) -> dict[str, Any]:
    return {"step": step, "epoch": step // 4, "val_loss": error, "mean_fill_loss": fill} | others


@pytest.fixture
def written(tmp_path) -> Callable[..., Path]:
    """Writes the folder of a run of 3 epochs and 3 images a step, by hand."""

    def write(name: str, rows: list[dict[str, Any]], **settings: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {
            "out": str(folder),
            "data": "flowers",
            "schedule": {"epochs": 3, "batch_size": 3},
            "run": {"log_every": 2},
        }
        (folder / "config.json").write_text(json.dumps(config | settings))
        write_lines(folder / "metrics.jsonl", rows)
        return folder

    return write


@pytest.fixture
def plain(written) -> Path:
    return written("plain", [of_steps(6, 2.0), of_steps(12, 1.0), of_validation(12, 0.9)])


class TestReading:
    def test_real_runs(self, real):
        comparison = compare([real / "resumed", real / "diverged"])
        resumed, diverged = comparison.runs
        assert (resumed.name, resumed.kind, resumed.step, resumed.epochs, resumed.images) == (
            "resumed",
            "pretrain",
            12,
            3,
            36,
        )
        assert resumed.state == "finished; resumed at step 8" and resumed.progress == "3 of 3"
        rows = metric_lines(real / "resumed")
        assert [reading.step for reading in resumed.steps] == [2, 4, 6, 8, 10, 12]
        assert [reading.values["loss"] for reading in resumed.steps] == [row["loss"] for row in rows if "loss" in row]
        best = min((row for row in rows if "val_loss" in row), key=lambda row: row["val_loss"])
        assert resumed.best.step == best["step"] and resumed.best.values["val_loss"] == best["val_loss"]

        first = next(row["step"] for row in metric_lines(real / "diverged") if row.get("diverging"))
        last = [row["val_loss"] for row in metric_lines(real / "diverged") if "val_loss" in row][-1]
        assert diverged.diverged_at == first > 16
        assert diverged.state == f"diverged at step {first}: validation error {last:.4g}; finished; resumed at step 16"
        assert diverged.best.step <= 16 and not diverged.best.diverging
        assert comparison.differing == {
            "optimizer.base_lr": (0.2, 1e4),
            "optimizer.clip_grad": (1.0, 0.0),
            "schedule.epochs": (3, 5),
            "schedule.warmup_epochs": (1, 0),
            "run.log_every": (2, 1),
        }

    def test_hours_are_those_of_the_rows(self, written):
        rows = [of_steps(4, hours=1.0), of_validation(6, 1.0), of_steps(8, hours=2.0), of_validation(9, 1.0)]
        (run,) = compare([written("run", rows)]).runs
        assert [reading.hours for reading in run.steps] == [1.0, 2.0] and not run.hours_estimated
        assert [reading.hours for reading in run.validations] == [1.5, 2.0]  # between rows in proportion, then the last

    def test_hours_of_older_rows_are_estimated_and_said_to_be(self, written):
        rows = [of_steps(4), of_steps(8, images_per_second=3.0), of_steps(12, hours=0.1)]
        comparison = compare([written("run", rows)])
        taken = [reading.hours * 3600 for reading in comparison.runs[0].steps]
        assert taken == pytest.approx([4 * 3 / 36, 4 * 3 / 36 + 4, 8 * 3 / 36 + 4])
        assert comparison.remarks == ("Times of run are estimated, from images per second: the rows have no hours.",)

    def test_rows_that_were_cut_short_are_skipped(self, plain):
        before = compare([plain]).runs
        with (plain / "metrics.jsonl").open("a") as file:
            file.write('{"step": 14, "lo\n[1]\n{"loss": 3}\n\x00\x00\n{"step":')
        assert compare([plain]).runs == before

    @pytest.mark.parametrize("locked", [False, True])
    def test_a_run_before_its_end_says_how_far_it_is(self, written, locked):
        folder = written("run", [of_steps(2), of_steps(6)])
        (folder / "states").mkdir()
        (folder / "states" / "step_7.pt").touch()
        if locked:
            (folder / ".lock").touch()
        (run,) = compare([folder]).runs
        assert run.state == f"{'running, or killed' if locked else 'stopped'}, at step 7, 1.75 of 3 epochs"
        assert run.best is None and run.guess is None

    def test_a_run_that_broke_down(self, plain):
        (plain / "breakdown.json").write_text(json.dumps({"step": 11, "loss": math.nan}))
        (run,) = compare([plain]).runs
        assert run.broke_down_at == 11 and run.state.startswith(
            "broke down at step 11: loss or weights not finite, 3 of 3"
        )

    def test_a_run_that_came_back_is_said_to_have_diverged(self, written):
        rows = [of_steps(2), of_steps(4, 50.0, diverging=True), of_validation(4, 9.0, diverging=True), of_steps(6)]
        (run,) = compare([written("run", [*rows, of_validation(8, 1.0)])]).runs
        assert run.diverged_at is None and [reading.diverging for reading in run.steps] == [False, True, False]
        assert "; it diverged at step 4, and no longer after step 4" in run.state
        (run,) = compare([written("still", rows)]).runs  # by its last validation
        assert run.diverged_at == 4 and "diverged at step 4: validation error 9" in run.state

    def test_the_best_is_of_the_last_measure(self, written):
        rows = [of_steps(4), of_validation(4, 0.5), of_validation(8, 0.9, fill=2.0), of_validation(12, 1.0, fill=2.0)]
        (run,) = compare([written("run", rows)]).runs
        assert run.best.step == 8

    def test_the_best_fine_tuning_has_the_highest_top1(self, written):
        scores = [(4, 0.9, 0.5), (8, 1.2, 0.75), (12, 1.1, 0.75)]
        rows = [of_steps(4)] + [
            of_validation(step, error, val_top1=top1, guess_loss=0.7) for step, error, top1 in scores
        ]
        (run,) = compare([written("run", rows, augment={"mixup": 0.8})]).runs
        assert run.kind == "finetune" and run.best.step == 12

    def test_starts_before_a_way_back_are_forgotten(self, written):
        folder = written("run", [of_steps(4), of_steps(12)])
        write_lines(folder / "starts.jsonl", [start(0), start(4), start(10, "run.threads 1 -> 2"), start(8), start(8)])
        comparison = compare([folder])
        assert comparison.runs[0].resumed_at == [4, 8]
        told = "run, step 10:  run.threads 1 -> 2 (the run later went back to a step before)"
        assert told in comparison_lines(comparison)

    def test_names_are_the_shortest_ends_that_differ(self, written):
        folders = [written(name, [of_steps(4)]) for name in ("a/run", "b/run", "b/other")]
        assert [run.name for run in compare(folders).runs] == ["a/run", "b/run", "other"]

    def test_errors_of_other_measures_are_told(self, plain, written):
        other = written("other", [of_steps(4), of_validation(4, 0.9, fill=1.8)], model={"norm_pix_loss": True})
        same = written("same", [of_steps(4), of_validation(4, 0.9, fill=1.5001)])
        remarks = compare([plain, other]).remarks
        assert remarks[0].endswith("not of the same images, masks or scales: mean fill has 1.5 (plain), 1.8 (other).")
        assert remarks[1].startswith("Validation errors are not of one measure: with model.norm_pix_loss")
        assert remarks[2] == "Training losses are not of one measure: model.norm_pix_loss differs."
        assert len(compare([plain, same]).remarks) == 1  # that hours are estimated

    def test_what_is_no_run_to_compare_is_refused(self, plain, written, tmp_path):
        def refused(error: type[Exception], match: str, *runs: Path) -> None:
            with pytest.raises(error, match=match):
                compare(runs)

        refused(ValueError, "expected one or more folders, got none")
        refused(FileNotFoundError, "nowhere: expected the folder of a run, got none there", tmp_path / "nowhere")
        refused(NotADirectoryError, "got a file", plain / "config.json")
        refused(FileNotFoundError, "got one without config.json", tmp_path)
        refused(ValueError, "each run once, got .*plain and .*plain, which are the same", plain, plain / ".." / "plain")
        tuned = written("tuned", [of_steps(4)], augment={})
        refused(
            ValueError,
            "runs of one kind, got .*plain, of crate-mae pretrain and .*tuned, of crate-mae fine",
            plain,
            tuned,
        )
        refused(ValueError, r"early.metrics\.jsonl: expected rows of steps, .* every 2 steps", written("early", []))
        model = written("model", [], schedule=None)
        refused(ValueError, "model.config.json: expected the settings of a run, with a whole number as sched", model)
        rateless = written("rateless", [of_steps(4, images_per_second=0)])
        refused(ValueError, "rateless.*images_per_second, in the row of step 4", rateless)
        for name in ("config.json", "breakdown.json"):
            broken = shutil.copytree(plain, tmp_path / f"broken {name}")
            (broken / name).write_text('{"step"')
            refused(ValueError, rf"broken {name}.{name}: not whole JSON", broken)


class TestPicture:
    def extent(self, picture: Image.Image, colour: str) -> tuple[int, int]:
        """The first and the last line of the first chart that have this colour, below the legend."""
        is_it = np.abs(np.asarray(picture).astype(int) - ImageColor.getrgb(colour)).max(-1) < 8
        (lines,) = np.nonzero(is_it[170:660, 90:630].any(1))
        return lines.min(), lines.max()

    def count(self, picture: Image.Image, colour: str) -> int:
        return int((np.asarray(picture) == ImageColor.getrgb(colour)).all(-1).sum())

    def test_a_run_that_diverges_flattens_no_other(self, written):
        steps = range(2, 14, 2)
        learns = [row for n in steps for row in (of_steps(n, 3 / n, hours=n), of_validation(n, 3 / n))]
        bad = [
            row
            for n in steps
            for row in (
                of_steps(n, 2.7 / n if n < 8 else 10.0**n, hours=n, diverging=n >= 8),
                of_validation(n, 2.7 / n if n < 8 else 10.0**n, diverging=n >= 8),
            )
        ]
        good, diverged = written("good", learns), written("diverged", bad)
        alone, together = (comparison_picture(compare(runs)) for runs in ([good], [good, diverged]))
        of_one, of_two = self.extent(alone, COLOURS[0]), self.extent(together, COLOURS[0])
        assert of_two[1] - of_two[0] > 0.95 * (of_one[1] - of_one[0])
        assert self.count(alone, RED) == 0 < self.count(together, RED)
        assert together.height > alone.height  # by the lines that say what is cut off

    def test_where_a_run_was_resumed_and_broke_down_is_marked(self, plain):
        before = np.asarray(comparison_picture(compare([plain]))).astype(int)
        write_lines(plain / "starts.jsonl", [start(0), start(9)])
        resumed = np.asarray(comparison_picture(compare([plain]))).astype(int)
        below_legend = (before != resumed).any(-1)[170:]
        (columns,) = np.nonzero(below_legend.any(0))
        # At step 9 of 12 in each of the three charts of errors, that begin 556 pixels after one another.
        centres = [group.mean() for group in np.split(columns, np.nonzero(np.diff(columns) > 1)[0] + 1)]
        assert centres == pytest.approx([98 + 0.75 * 510 + 556 * chart for chart in range(3)], abs=1)
        (plain / "breakdown.json").write_text('{"step": 13}')
        assert self.count(comparison_picture(compare([plain])), RED) > 100

    def test_odd_runs_have_one(self, written):
        """One row, no validation, losses of zero, no end of digits, more colours than there are."""
        one, dark = written("one", [of_steps(2)]), written("dark", [of_steps(2, 0.0, grad_norm=0.0), of_steps(4, 0.0)])
        huge = written("sehr grosz \udce4 " + 40 * "long ", [of_steps(2, 1e300, diverging=True), of_steps(4, 1e-300)])
        assert self.count(comparison_picture(compare([one])), COLOURS[0]) > 100
        comparison_picture(compare([one, dark, huge]))
        comparison_picture(compare([dark]))
        many = [written(f"run {number}", [of_steps(2)]) for number in range(9)]
        comparison_picture(compare(many[:8]))
        with pytest.raises(ValueError, match="at most 8 runs, which have colours that differ, got 9"):
            comparison_picture(compare(many))

    def test_fine_tunings_have_a_row_of_top1(self, written):
        rows = [of_steps(2), of_validation(4, 0.7, val_top1=0.5), of_steps(4), of_validation(8, 0.6, val_top1=0.9)]
        tuned, trained = written("tuned", rows, augment={}), written("trained", rows[:1])
        heights = [comparison_picture(compare([run])).height for run in (tuned, trained)]
        assert heights[0] - heights[1] > 200

    @pytest.mark.parametrize(
        ("axis", "ticks"),
        [
            (Axis(0, 272), [0, 50, 100, 150, 200, 250]),
            (Axis(0.4, 2.4, logarithmic=True), [0.5, 1, 2]),
            (Axis(0.9, 1.3, logarithmic=True), [0.9, 1.0, 1.1, 1.2, 1.3]),
            (Axis(0.0004, 0.41, logarithmic=True), [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]),
        ],
        ids=["linear", "a decade", "less", "three"],
    )
    def test_ticks_are_round(self, axis, ticks):
        assert axis.ticks(6) == pytest.approx(ticks)
        assert all(-1e-9 <= axis.share(tick) <= 1 + 1e-9 for tick in ticks)

    def test_lines_end_at_the_edges_and_marks_stand_on_them(self):
        canvas = Canvas(200, 200)
        line = Line([(0, 0), (1, 5)], "#0000ff")
        canvas.plot((50, 50, 150, 150), [line], [Mark((1, 9), "#ff0000")], Axis(0, 1), Axis(0, 1), numbered=True)
        pixels = np.asarray(canvas.finished()).astype(int)
        rows, columns = np.nonzero((pixels[..., 2] > 200) & (pixels[..., 0] < 50))
        assert rows.min() >= 50 and rows.max() <= 151 and 60 < columns.max() < 80
        rows, columns = np.nonzero((pixels[..., 0] > 200) & (pixels[..., 1] < 50))
        assert abs(rows.mean() - 50) < 2 and abs(columns.mean() - 150) < 2


class TestCommand:
    def test_prints_the_table_and_draws(self, real, tmp_path, capsys):
        out = tmp_path / "new" / "page.png"
        assert main(["compare", str(real / "resumed"), str(real / "diverged"), "--out", str(out)]) == 0
        lines = capsys.readouterr().out.splitlines()
        cells = {line[:18].strip(): line[18:].split() for line in lines[:10]}
        assert (
            cells[""] == ["resumed", "diverged"] and cells["steps"] == ["12", "20"] and cells["images"] == ["36", "60"]
        )
        assert cells["epochs"] == ["3", "of", "3", "5", "of", "5"]
        rows = [metric_lines(real / name) for name in ("resumed", "diverged")]
        for name, field in {"training loss": "loss", "validation error": "val_loss"}.items():
            assert cells[name] == [f"{[row[field] for row in each if field in row][-1]:.4g}" for each in rows]
        assert any(line.split() == ["optimizer.base_lr", "0.2", "10000.0"] for line in lines)
        assert "resumed, step 8:    schedule.epochs 2 -> 3" in lines and lines[-1] == f"Look at {out}."
        assert not any(line.startswith("out ") for line in lines)
        with Image.open(out) as picture:
            assert picture.format == "PNG" and picture.width == 1760

    def test_errors_are_one_line_and_draw_nothing(self, plain, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for arguments, said in (
            (["nowhere"], "nowhere: expected the folder of a run, got none there"),
            ([str(plain), "--out", "page.jpg"], "--out: expected the name of a file that ends in .png, got page.jpg"),
            ([], "required"),
        ):
            assert main(["compare", *arguments]) == 2
            error = capsys.readouterr().err
            assert said in error and error.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["plain"]
        assert main(["compare", str(plain)]) == 0
        assert "no settings differ" not in capsys.readouterr().out and (tmp_path / "comparison.png").exists()
