"""Runs over images that cannot be read: they go on, count them, and stop when they are too many."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from images_of_all_kinds import write_bad, write_exotic
from tiny_runs import (
    assert_same_weights,
    interrupt_after,
    metric_lines,
    tiny_config,
    visited,
    weights,
    write_photographs,
)

from crate_mae.cli import main
from crate_mae.data import CentreCropped, ImageFolder, UnreadableImage
from crate_mae.data.unreadable import most_unreadable
from crate_mae.training import PretrainConfig, RunStopped, TooManyUnreadable, pretrain
from crate_mae.training.feed import workers_for
from crate_mae.training.unreadable import UnreadableImages, listed


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    return change(tiny_config(tmp_path / "run", write_photographs(tmp_path / "photographs")), cache_mb=0)


def change(config: PretrainConfig, **images) -> PretrainConfig:
    return dataclasses.replace(config, images=dataclasses.replace(config.images, **images))


def spoil(path: Path) -> bytes:
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    return sound


def rows(out: Path) -> list[list[str]]:
    return [line.split("\t") for line in (out / "unreadable.txt").read_text().splitlines()]


class TestRun:
    @pytest.mark.parametrize(
        "settings", [dict(), dict(num_workers=2), dict(cache_mb=64)], ids=["one process", "workers", "cache"]
    )
    def test_goes_on_counts_and_names_each_once(self, config, capsys, settings):
        broken = visited(config, 0)[4]
        spoil(broken)
        result = pretrain(change(config, **settings))
        assert result.steps == 12
        [[cause, name, reason]] = rows(config.out)
        assert (cause, name) == ("truncated", str(broken)) and reason
        said = [line for line in capsys.readouterr().out.splitlines() if broken.name in line]
        assert len(said) == 1 and "truncated" in said[0] and "stands in" in said[0]

    def test_workers_and_interruptions_change_nothing(self, config, tmp_path, monkeypatch):
        for path in visited(config, 0)[:2]:
            spoil(path)
        config = change(config, max_unreadable=0.2)
        monkeypatch.chdir(tmp_path)
        pretrain(whole := dataclasses.replace(config, out=tmp_path / "whole"))
        with monkeypatch.context() as patch:
            interrupt_after(patch, 5)
            with pytest.raises(RunStopped):
                pretrain(dataclasses.replace(change(config, num_workers=2), data="photographs"))
        pretrain(config, resume=True)
        assert_same_weights(weights(whole.out), weights(config.out))
        assert sorted(rows(whole.out)) == sorted(rows(config.out)) and len(rows(config.out)) == 2

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_too_many_stop_it_saved(self, config, tmp_path, num_workers, capsys):
        config = change(config, num_workers=num_workers)
        pretrain(whole := dataclasses.replace(config, out=tmp_path / "whole"))
        sound = {path: spoil(path) for path in visited(config, 0)[-2:]}  # so that three steps come before them
        with pytest.raises(
            TooManyUnreadable,
            match=rf"2 of 24 images .*\(2 truncated\).*max_unreadable 0\.01.*{config.out}/unreadable\.txt.*step 3 of 12 is saved",
        ):
            pretrain(config)
        assert {name for _, name, _ in rows(config.out)} == {str(path) for path in sound}
        arguments = ["pretrain", f"--out={config.out}", "--resume"]
        assert main(arguments) == 1
        assert "2 of 24 images" in capsys.readouterr().err
        for path, content in sound.items():
            path.write_bytes(content)
        assert main(arguments) == 0
        assert_same_weights(weights(whole.out), weights(config.out))

    @pytest.mark.parametrize("num_workers", [0, 1])
    @pytest.mark.parametrize("option", ["data", "val"])
    def test_where_none_can_be_read_they_are_too_many(self, config, tmp_path, option, num_workers):
        folder = write_photographs(tmp_path / "spoilt")
        for path in folder.iterdir():
            spoil(path)
        config = dataclasses.replace(change(config, num_workers=num_workers), **{option: str(folder)})
        with pytest.raises(TooManyUnreadable, match=r"2 of 24 images cannot be read \(2 truncated\)"):
            pretrain(config)
        assert len(rows(config.out)) == 2
        with pytest.raises(UnreadableImage, match=r"step \d of 12 is saved"):
            pretrain(change(config, max_unreadable=1.0), resume=True)
        assert {name for _, name, _ in rows(config.out)} == set(map(str, folder.iterdir()))

    def test_an_image_to_validate_on_is_no_reason_to_stop(self, config, tmp_path):
        other = write_photographs(tmp_path / "val")
        spoil(other / "03.png")
        config = dataclasses.replace(config, val=str(other))
        pretrain(config)
        assert rows(config.out)[0][1] == str(other / "03.png")

    def test_a_removed_one_does_not_keep_the_run_from_going_on(self, config, tmp_path, monkeypatch, capsys):
        broken = visited(config, 0)[4]
        spoil(broken)
        pretrain(whole := dataclasses.replace(config, out=tmp_path / "whole"))
        with monkeypatch.context() as patch:
            interrupt_after(patch, 5)
            with pytest.raises(RunStopped):
                pretrain(config)
        broken.unlink()
        (Path(config.data) / "new.png").write_bytes(visited(config, 0)[0].read_bytes())
        capsys.readouterr()
        pretrain(config, resume=True)
        assert "1 of its 12 images are gone and 1 are new" in capsys.readouterr().out
        assert_same_weights(weights(whole.out), weights(config.out))

    def test_a_damaged_list_of_its_images_does_not_either(self, config, monkeypatch, capsys):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 5)
            with pytest.raises(RunStopped):
                pretrain(config)
        (config.out / "images.safetensors").write_bytes(b"damaged")
        assert pretrain(config, resume=True).steps == 12
        assert "images.safetensors: a damaged list of images" in capsys.readouterr().out

    def test_all_that_it_stopped_at_may_be_removed(self, config, monkeypatch, capsys):
        """However many: they are no other images, and do not count as unreadable once more."""
        broken = visited(config, 0)[-4:]
        for path in broken:
            spoil(path)
        config = change(config, max_unreadable=0.1)  # 3 of 24
        with pytest.raises(TooManyUnreadable, match="4 of 24"):
            pretrain(config)
        for path in broken:
            path.unlink()
        assert pretrain(change(config, max_unreadable=0.0), resume=True).steps == 12
        assert "4 of its 12 images are gone and 0 are new" in capsys.readouterr().out

    def test_other_images_are_refused_still(self, config, tmp_path):
        pretrain(config)
        for path in sorted(Path(config.data).iterdir())[:6]:
            path.rename(path.with_name(f"other_{path.name}"))
        with pytest.raises(ValueError, match="other images"):
            pretrain(config, resume=True)

    def test_a_name_that_is_no_utf8_costs_no_save(self, config):
        first = os.fsencode(visited(config, 0)[0])
        os.rename(first, first.replace(b"photographs/", b"photographs/\xff\n"))
        assert pretrain(config).steps == 12
        assert metric_lines(config.out)

    def test_all_kinds_at_once(self, config):
        expected = write_bad(Path(config.data))
        write_exotic(Path(config.data))
        pretrain(change(config, max_unreadable=1.0, num_workers=1))
        assert {Path(name).name: cause for cause, name, _ in rows(config.out)} == expected


class TestCount:
    def errors(self, count: int) -> list[UnreadableImage]:
        return [UnreadableImage(f"image {index}", "damaged", "on\tpurpose\n") for index in range(count)]

    def test_few_are_named_and_many_counted(self, tmp_path):
        said: list[str] = []
        noted = UnreadableImages(tmp_path / "list", 10_000, 0.01, said.append)
        noted(self.errors(100))
        noted(self.errors(100))
        assert len((tmp_path / "list").read_text().splitlines()) == len(listed(tmp_path / "list")) == 100
        assert len(said) == 22 and "64 images cannot be read by now" in said[-1]
        with pytest.raises(TooManyUnreadable, match="101 of 10000"):
            noted(self.errors(101))

    def test_those_of_an_earlier_start_are_listed_once_and_counted_anew(self, tmp_path):
        UnreadableImages(tmp_path / "list", 100, 0.05, print)(self.errors(3))
        said: list[str] = []
        again = UnreadableImages(tmp_path / "list", 100, 0.05, said.append)
        again(self.errors(5))
        assert len((tmp_path / "list").read_text().splitlines()) == 5 and len(said) == 2
        assert again.counted() == "5 damaged"

    @pytest.mark.parametrize(("most", "allowed"), [(0.0, 0), (0.01, 1), (0.1, 3), (0.125, 3), (1.0, 24)])
    def test_the_fraction_is_rounded_up_to_an_image(self, tmp_path, most, allowed):
        noted = UnreadableImages(tmp_path / "list", 24, most, lambda line: None)
        noted(self.errors(allowed))
        with pytest.raises(TooManyUnreadable):
            noted([UnreadableImage("one more", "empty", "")])


def test_the_fraction_counts_as_it_is_written():
    assert [most_unreadable(0.07, 100), most_unreadable(0.1, 30), most_unreadable(1e-9, 10)] == [7, 3, 1]


class TestWaiting:
    def test_is_what_the_loader_took(self, config, monkeypatch):
        """A loader slowed on purpose: of a run's time, the pauses and no more is waiting."""
        image, paused = ImageFolder.image, 0.02
        shares = {}
        for name in ("plain", "slowed"):
            with monkeypatch.context() as patch:
                if name == "slowed":
                    patch.setattr(ImageFolder, "image", lambda self, index: time.sleep(paused) or image(self, index))
                pretrain(dataclasses.replace(config, out=config.out / name))
            shares[name] = [row for row in metric_lines(config.out / name) if "waiting" in row]
        for row in shares["slowed"]:
            seconds_an_image = 1 / row["images_per_second"]
            assert row["waiting"] * seconds_an_image >= paused * 0.99
            assert row["waiting"] <= 1
        assert np.median([row["waiting"] for row in shares["plain"]]) < np.min(
            [row["waiting"] for row in shares["slowed"]]
        )

    def test_is_said_in_lines(self, config, monkeypatch, capsys):
        monkeypatch.setattr("crate_mae.training.metrics.ProgressLines.__init__.__kwdefaults__", {"seconds": 0.0})
        pretrain(config)
        assert "% of the time waiting for images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "device", "threads", "cores", "shared", "expected"),
    [
        (3, "cpu", 0, 8, 0, 3),
        ("auto", "cpu", 0, 8, 2**40, 0),
        ("auto", "cpu", 2, 8, 2**40, 6),
        ("auto", "cuda", 0, 8, 2**40, 7),
        ("auto", "cuda", 0, 96, 2**40, 16),
        ("auto", "cuda", 0, 96, 64 * 2**20, 5),
    ],
)
def test_processes_by_default_are_the_cores_left_over(monkeypatch, asked, device, threads, cores, shared, expected):
    monkeypatch.setattr("crate_mae.training.feed.usable_cores", lambda: cores)
    monkeypatch.setattr("crate_mae.training.feed._shared_memory", lambda: shared)
    assert workers_for(asked, torch.device(device), threads, 2 * 2**20) == expected


def test_pictures_do_without_those_that_cannot_be_read(config):
    source = ImageFolder(config.data)
    spoil(Path(source.name(0)))
    with pytest.raises(UnreadableImage):
        CentreCropped(source, (8, 8))[0]
