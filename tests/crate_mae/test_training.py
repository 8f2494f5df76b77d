"""The pre-training run and its parts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import (
    TINY,
    assert_same_weights,
    die_after,
    interrupt_after,
    metric_lines,
    saved_steps,
    visited,
    weights,
)
from torch._dynamo.testing import CompileCounterWithBackend

import crate_mae
from crate_kernels import use
from crate_mae.analysis import analyze
from crate_mae.checkpoints import load_model
from crate_mae.data import (
    FLOWERS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    CentreCropped,
    ImageFolder,
    Normalization,
)
from crate_mae.evaluation import BLUR_SIGMAS, blurred_visible, mean_visible_colour, mean_visible_patch
from crate_mae.files import replaced
from crate_mae.model import CrateMAE
from crate_mae.preprocessing import read_normalization
from crate_mae.training import (
    ImagesConfig,
    NonFiniteLoss,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    RunStopped,
    ScheduleConfig,
    Validation,
    build_optimizer,
    demo_config,
    pretrain,
    warmup_cosine,
)
from crate_mae.training.metrics import ProgressLines, StepMeter
from crate_mae.training.pace import OF_THE_MACHINE, Pace
from crate_mae.training.precision import choose_device, choose_precision
from crate_mae.training.run_folder import RUN_FILES


class TestSchedule:
    def test_climbs_then_falls_along_half_a_cosine(self):
        rates = [warmup_cosine(step, peak=2.0, final=0.5, warmup_steps=4, total_steps=15) for step in range(15)]
        assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
        assert rates[4] == 2.0
        assert rates[9] == pytest.approx(1.25)
        assert rates[-1] == pytest.approx(0.5)
        assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))

    def test_without_warmup_starts_at_the_peak(self):
        assert warmup_cosine(0, peak=1.0, final=0.0, warmup_steps=0, total_steps=10) == 1.0


class TestOptimizer:
    def test_decays_matrices_only(self):
        model = CrateMAE(TINY)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        optimizer = build_optimizer(model, OptimizerConfig(base_lr=1e-3, weight_decay=0.1), batch_size=512)
        decayed, others = optimizer.param_groups
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
        assert decayed["lr"] == pytest.approx(2e-3)
        assert decayed["betas"] == (0.9, 0.95)
        decayed, others = ({names[id(parameter)] for parameter in group["params"]} for group in (decayed, others))
        assert decayed | others == {name for name, p in model.named_parameters() if p.requires_grad}
        assert {"cls_token", "mask_token", "norm.weight", "decoder_pred.bias", "patch_embed.proj.bias"} <= others
        assert {"patch_embed.proj.weight", "decoder_pred.weight", "blocks.0.layers.0.1.fn.weight"} <= decayed
        assert not any("norm" in name or name.endswith("bias") for name in decayed)


class TestPrecision:
    def test_auto_takes_bfloat16_only_where_the_cpu_multiplies_it(self, monkeypatch):
        cpu = torch.device("cpu")
        for multiplies, chosen in (((torch.bfloat16,), "bfloat16"), ((torch.float16,), "float32"), ((), "float32")):
            monkeypatch.setattr("crate_mae.training.precision.CPU_PRODUCT_DTYPES", multiplies)
            assert choose_precision("auto", cpu) == chosen
        assert choose_precision("bfloat16", cpu) == "bfloat16"

    def test_devices_that_are_not_there(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert choose_device("auto").type == "cpu"
        with pytest.raises(ValueError, match="CUDA"):
            choose_device("cuda")
        with pytest.raises(ValueError, match=r"run\.device"):
            choose_device("abacus")
        with pytest.raises(ValueError, match=r"run\.device.*cpu"):
            choose_device("meta")


class TestConfig:
    @pytest.mark.parametrize(
        ("group", "bad"),
        [
            (ImagesConfig(crop_scale=(0.0, 1.0)), "images.crop_scale"),
            (ImagesConfig(val_fraction=1.0), "images.val_fraction"),
            (OptimizerConfig(base_lr=0.0), "optimizer.base_lr"),
            (OptimizerConfig(betas=(0.9, 1.0)), "optimizer.betas"),
            (ScheduleConfig(min_lr=1.0), "schedule.min_lr"),
            (ScheduleConfig(mask_ratio=1.0), "schedule.mask_ratio"),
            (ScheduleConfig(epochs=0), "schedule.epochs"),
            (RunConfig(seed=-1), "run.seed"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_settings_out_of_range_are_named(self, group, bad):
        with pytest.raises(ValueError, match=bad):
            PretrainConfig(out=Path("run"), **{bad.split(".")[0]: group})

    def test_demo_learns_from_the_shipped_photographs(self):
        demo = demo_config(Path("run"))
        assert demo.data is None and demo.val is None
        assert demo.model.image_shape == (64, 64)


class TestValidation:
    def make(self, folder: ImageFolder, **settings) -> Validation:
        normalization = Normalization(IMAGENET_MEAN, IMAGENET_STD, 3)
        images = CentreCropped(folder, (32, 32))
        return Validation(
            images, normalization, **{"patches": 16, "mask_ratio": 0.75, "batch_size": 5, "seed": 0, **settings}
        )

    def test_repeats_exactly_whatever_the_global_seed(self, photographs):
        model, validation = CrateMAE(TINY), self.make(ImageFolder(photographs))
        first = validation(model)
        torch.manual_seed(123)
        assert validation(model) == first
        assert model.training

    def test_batch_size_does_not_matter(self, photographs):
        model, folder = CrateMAE(TINY), ImageFolder(photographs)
        assert self.make(folder, batch_size=12)(model) == pytest.approx(self.make(folder, batch_size=5)(model))

    def test_loss_is_the_models_own_over_the_whole_set(self, photographs):
        model, validation = CrateMAE(TINY), self.make(ImageFolder(photographs))
        images = validation.normalization(torch.stack([validation.images[index] for index in range(12)]))
        loss = model(images, mask_ratio=0.75, noise=validation.noise).loss
        assert validation(model).val_loss == pytest.approx(loss.item(), rel=1e-5)

    def test_mean_fill_is_the_better_of_mean_patch_and_mean_colour(self, photographs):
        model, validation = CrateMAE(TINY), self.make(ImageFolder(photographs))
        patch_errors, colour_errors = [], []
        for index, noise in enumerate(validation.noise):
            target = model.patchify(validation.normalization(validation.images[index][None]))[0].view(16, 64, 3)
            order = noise.argsort()
            visible, removed = target[order[:4]], target[order[4:]]
            patch_errors.append(((removed - visible.mean(0)) ** 2).mean())
            colour_errors.append(((removed - visible.mean((0, 1))) ** 2).mean())
        expected = min(torch.stack(patch_errors).mean().item(), torch.stack(colour_errors).mean().item())
        assert validation(model).mean_fill_loss == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("shape", [(32, 32), (16, 40)], ids=["square", "wide"])
    def test_the_blur_is_the_best_of_those_tried_on_the_removed_pixels(self, photographs, shape):
        model, rows, columns = CrateMAE(TINY), shape[0] // 8, shape[1] // 8
        validation = Validation(
            CentreCropped(ImageFolder(photographs), shape),
            Normalization(IMAGENET_MEAN, IMAGENET_STD, 3),
            **{"patches": rows * columns, "mask_ratio": 0.75, "batch_size": 5, "seed": 0},
        )
        images = validation.normalization(torch.stack([validation.images[index] for index in range(12)]))
        removed = model(images, noise=validation.noise).mask.view(12, 1, rows, columns)
        removed = removed.repeat_interleave(8, 2).repeat_interleave(8, 3)
        errors = {}
        for sigma in (8 * width for width in BLUR_SIGMAS):
            wrong = (blurred_visible(images, 1 - removed, sigma) - images).square() * removed
            errors[sigma] = (wrong.sum() / (3 * removed.sum())).item()
        found = validation(model)
        assert found.blur_loss == pytest.approx(min(errors.values()), rel=1e-5)
        assert found.blur_sigma == min(errors, key=errors.__getitem__)
        assert found[1:] == validation(CrateMAE(TINY))[1:]  # whatever the model

    def test_means_of_visible_patches(self):
        target = torch.tensor([[[1.0, 10, 3, 30], [5, 50, 7, 70], [9, 90, 9, 90]]])
        mask = torch.tensor([[0.0, 0.0, 1.0]])
        assert mean_visible_patch(target, mask).tolist() == [[[3.0, 30, 5, 50]]]
        assert mean_visible_colour(target, mask, channels=2).tolist() == [[[4.0, 40, 4, 40]]]

    def test_standardised_predictions_are_compared_in_pixels(self, photographs):
        """A model that predicts zeros up to mean and deviation errs by just the variance of the removed patches."""
        model = CrateMAE(dataclasses.replace(TINY, norm_pix_loss=True))
        torch.nn.init.zeros_(model.decoder_pred.weight)
        validation = self.make(ImageFolder(photographs))
        images = validation.normalization(torch.stack([validation.images[index] for index in range(12)]))
        mask = model(images, noise=validation.noise).mask
        spread = model.patchify(images).var(-1, unbiased=False)
        assert validation(model).val_loss == pytest.approx(((spread * mask).sum() / mask.sum()).item(), rel=1e-5)


class TestRun:
    def test_learns_and_leaves_its_files(self, config):
        config = dataclasses.replace(config, schedule=ScheduleConfig(epochs=12, warmup_epochs=1, batch_size=3))
        result = pretrain(config)

        assert {path.name for path in config.out.iterdir()} == {*RUN_FILES, "states", "best"} - {
            "breakdown.json",
            "unreadable.txt",
        }
        lines = metric_lines(config.out)
        steps = [line for line in lines if "loss" in line]
        epochs = [line for line in lines if "val_loss" in line]
        assert [line["step"] for line in steps] == list(range(2, 49, 2))
        assert steps[0].keys() == {"step", "epoch", "loss", "lr", "grad_norm", *OF_THE_MACHINE}
        assert [line["epoch"] for line in epochs] == list(range(1, 13))
        assert len({line["mean_fill_loss"] for line in epochs}) == 1
        assert epochs[-1]["val_loss"] < 0.85 * epochs[0]["val_loss"]
        assert result.steps == 48
        assert result.errors.val_loss == epochs[-1]["val_loss"]
        assert Image.open(config.out / "reconstructions.png").height > 2 * 128

    def test_the_saved_model_is_the_one_validated(self, config):
        result = pretrain(config)
        model = crate_mae.load_model(config.out)
        validation = Validation(
            CentreCropped(ImageFolder(config.data), (32, 32)),
            Normalization(IMAGENET_MEAN, IMAGENET_STD, 3),
            patches=16,
            mask_ratio=0.75,
            batch_size=3,
            seed=0,
        )
        assert validation(model) == result.errors

    def test_looks_inside_are_of_the_model_at_that_step(self, config):
        looking = dataclasses.replace(config, run=dataclasses.replace(config.run, analyze_every=2, save_every=3))
        pretrain(looking)
        seen = [line for line in metric_lines(config.out) if "inside" in line]
        assert [line["epoch"] for line in seen] == [2, 3]
        images = CentreCropped(ImageFolder(config.val), TINY.image_shape)
        normalization = read_normalization(config.out)
        batch = normalization(torch.stack([images[index] for index in range(len(images))]))
        expected = analyze(load_model(config.out), [batch]).stacks
        assert seen[-1]["inside"].keys() == expected.keys() == {"encoder", "decoder"}
        for stack, measures in expected.items():
            values = {name: measured.mean for name, measured in measures.items() if not name.endswith("_by_head")}
            assert seen[-1]["inside"][stack].keys() == values.keys() and "coding_rate_after" in values
            for name, value in values.items():
                assert seen[-1]["inside"][stack][name] == pytest.approx(value, rel=1e-5)
        assert seen[0]["inside"] != seen[1]["inside"]

    def test_without_images_held_out_there_is_nothing_to_look_at(self, config):
        config = dataclasses.replace(
            config,
            val=None,
            images=dataclasses.replace(config.images, val_fraction=0.0),
            run=dataclasses.replace(config.run, analyze_every=1),
        )
        with pytest.raises(ValueError, match=r"run.analyze_every: expected 0, or images to validate on"):
            pretrain(config)

    def test_same_seed_same_weights_other_seed_others(self, config, tmp_path):
        runs = {}
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            torch.manual_seed(ord(name))
            pretrain(dataclasses.replace(config, out=tmp_path / name, run=dataclasses.replace(config.run, seed=seed)))
            runs[name] = weights(tmp_path / name)
        assert_same_weights(runs["a"], runs["b"])
        assert not torch.equal(runs["a"]["decoder_pred.weight"], runs["c"]["decoder_pred.weight"])

    @pytest.mark.parametrize(
        ("step", "num_workers"),
        [(0, 0), (3, 0), (6, 1)],
        ids=["first step", "end of an epoch", "inside an epoch, worker"],
    )
    def test_interrupted_and_resumed_ends_with_the_same_weights(self, config, tmp_path, monkeypatch, step, num_workers):
        config = dataclasses.replace(config, images=ImagesConfig(num_workers=num_workers))
        whole = dataclasses.replace(config, out=tmp_path / "whole")
        pretrain(whole)
        with monkeypatch.context() as patch:
            interrupt_after(patch, step)
            with pytest.raises(RunStopped, match=f"step {step + 1} of 12"):
                pretrain(config)
        torch.manual_seed(99)
        pretrain(config, resume=True)

        assert_same_weights(weights(whole.out), weights(config.out))
        assert [(line["step"], line.get("val_loss")) for line in metric_lines(config.out) if "val_loss" in line] == [
            (line["step"], line.get("val_loss")) for line in metric_lines(whole.out) if "val_loss" in line
        ]

    def test_a_run_killed_between_saves_resumes_from_the_last_one(self, config, tmp_path, monkeypatch):
        whole = dataclasses.replace(config, out=tmp_path / "whole")
        pretrain(whole)
        with monkeypatch.context() as patch:
            die_after(patch, 7)
            with pytest.raises(MemoryError):
                pretrain(config)
        with (config.out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 7, "lo')
        pretrain(config, resume=True)

        assert_same_weights(weights(whole.out), weights(config.out))
        assert [line["step"] for line in metric_lines(config.out) if "loss" in line] == [2, 4, 6, 8, 10, 12]

    def test_a_long_epoch_is_saved_on_the_way(self, config, tmp_path, monkeypatch):
        whole = dataclasses.replace(config, out=tmp_path / "whole")
        pretrain(whole)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, save_every=3, save_minutes=1e-9))
        with monkeypatch.context() as patch:
            die_after(patch, 7)
            with pytest.raises(MemoryError):
                pretrain(config)
        assert saved_steps(config.out) == [7, 6]  # of 4 an epoch
        pretrain(config, resume=True)
        assert_same_weights(weights(whole.out), weights(config.out))

    def test_too_many_unreadable_images_do_not_save_what_diverged(self, config, monkeypatch):
        forward = CrateMAE.forward

        def diverging_forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            return output._replace(loss=output.loss * math.nan)

        monkeypatch.setattr(CrateMAE, "forward", diverging_forward)
        config = dataclasses.replace(
            config,
            images=ImagesConfig(cache_mb=0, max_unreadable=0),
            run=dataclasses.replace(config.run, log_every=100),
        )
        broken = visited(config, 0)[-1]
        broken.write_bytes(broken.read_bytes()[:200])
        with pytest.raises(NonFiniteLoss, match="step 1: loss nan"):
            pretrain(config)
        assert not saved_steps(config.out)

    def test_termination_saves_too_and_handlers_come_back(self, config, monkeypatch):
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        interrupt_after(monkeypatch, 1, signal.SIGTERM)
        with pytest.raises(RunStopped):
            pretrain(config)
        assert saved_steps(config.out) == [2]
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def test_a_finished_run_can_be_resumed_for_longer(self, config):
        pretrain(config)
        longer = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, epochs=4))
        assert pretrain(longer, resume=True).steps == 16

    def test_resuming_a_finished_run_reports_it_again(self, config):
        first = pretrain(config)
        assert pretrain(config, resume=True) == first

    def test_another_runs_folder_is_refused_kept_or_overwritten(self, config):
        pretrain(config)
        before = (config.out / "metrics.jsonl").read_text()
        with pytest.raises(FileExistsError, match=r"--resume .* --overwrite"):
            pretrain(config)
        assert (config.out / "metrics.jsonl").read_text() == before
        (config.out / "notes.txt").write_text("mine")
        pretrain(config, overwrite=True)
        assert len(metric_lines(config.out)) == len(before.splitlines())
        assert (config.out / "notes.txt").read_text() == "mine"

    @pytest.mark.parametrize("name", [*RUN_FILES, "states"])
    def test_no_file_that_a_run_writes_is_overwritten(self, config, name):
        config.out.mkdir()
        (config.out / name).write_text("mine")
        with pytest.raises(FileExistsError, match="--overwrite"):
            pretrain(config)
        assert (config.out / name).read_text() == "mine"

    @pytest.mark.parametrize("resume", [False, True])
    def test_a_run_killed_before_its_first_save_says_so(self, config, monkeypatch, resume):
        with monkeypatch.context() as patch:
            die_after(patch, 0)
            with pytest.raises(MemoryError):
                pretrain(config)
        with pytest.raises(OSError, match="stopped before its first save; --overwrite starts it anew"):
            pretrain(config, resume=resume)
        assert pretrain(config, overwrite=True).steps == 12

    @pytest.mark.parametrize("below", ["", "below"])
    def test_a_file_is_no_folder_to_write_to(self, config, below):
        config.out.write_text("mine")
        config = dataclasses.replace(config, out=config.out / below, data=config.out / "nowhere")
        with pytest.raises(
            NotADirectoryError, match=r"--out .* is a file"
        ):  # said before folders of images are looked at
            pretrain(config)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_that_may_not_be_written_to(self, config, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(PermissionError, match="--out"):
            pretrain(dataclasses.replace(config, out=tmp_path / "locked" / "run"))

    def test_overwriting_waits_until_the_new_run_can_start(self, config):
        pretrain(config)
        with pytest.raises(FileNotFoundError):
            pretrain(dataclasses.replace(config, data=config.out / "nowhere"), overwrite=True)
        assert saved_steps(config.out) == [12, 8]

    def test_threads_are_given_back(self, config):
        before = torch.get_num_threads()
        pretrain(config)
        assert torch.get_num_threads() == before

    def test_nothing_to_resume(self, config):
        with pytest.raises(FileNotFoundError, match="nothing to resume"):
            pretrain(config, resume=True)

    @pytest.mark.parametrize(
        ("group", "change"),
        [("run", {"seed": 1}), ("schedule", {"batch_size": 4}), ("model", {"lambd": 0.2})],
        ids=["seed", "batch size", "model"],
    )
    def test_a_resumed_run_keeps_what_its_steps_rest_on(self, config, group, change):
        pretrain(config)
        other = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **change)})
        with pytest.raises(ValueError, match=rf"{group}\.{next(iter(change))}"):
            pretrain(other, resume=True)

    def test_resuming_on_other_images_is_refused(self, config):
        config = dataclasses.replace(config, images=dataclasses.replace(config.images, max_unreadable=0.0))
        pretrain(config)
        (Path(config.data) / "00.png").rename(Path(config.data) / "99.png")
        with pytest.raises(ValueError, match="other images"):
            pretrain(config, resume=True)

    def test_a_diverging_run_names_the_step_and_keeps_the_last_good_state(self, config, monkeypatch):
        forward, calls = CrateMAE.forward, iter(range(1, 10**9))

        def diverging_forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            return output._replace(loss=output.loss * math.nan) if self.training and next(calls) == 7 else output

        monkeypatch.setattr(CrateMAE, "forward", diverging_forward)
        with pytest.raises(NonFiniteLoss, match=r"step 7: loss nan.*base_lr.*last state saved.*step_4\.pt") as raised:
            pretrain(config)
        assert raised.value.step == 7
        assert saved_steps(config.out) == [4]
        assert all(torch.isfinite(value).all() for value in weights(config.out).values())

    def test_progress_lines_come_when_their_time_has(self, monkeypatch):
        now = iter([0.0, 0.0, 10.0, 40.0, 40.0, 60.0])
        monkeypatch.setattr("crate_mae.training.metrics.time.perf_counter", lambda: next(now))
        pace = Pace(2e12, torch.device("cpu"), 104)
        pace.begin(4, product_rate=32e12)
        lines = ProgressLines(4, 104, pace)
        assert lines.after(8, torch.tensor(math.nan), 1e-3, batch=8, waited=4.0) is None
        line = lines.after(24, torch.tensor(0.5), 1e-3, batch=8, waited=10.0)  # 20 steps in 40 s, 80 to go
        assert (
            line == "step 24/104: loss 0.5000, lr 1.00e-03, 4.0 images/s, 25% of the time waiting for images, "
            "8 TFLOP/s (25% of large products), 0:02:40 left"
        )
        assert lines.after(25, torch.tensor(0.5), 1e-3, batch=8, waited=10.0) is None  # 20 s later

    def test_a_gradient_that_overflows_counts_as_diverging(self):
        meter = StepMeter()
        meter.add(3, torch.tensor([1.0, 0.5]), images=2)
        meter.add(4, torch.tensor([1.0, math.inf]), images=2)
        with pytest.raises(NonFiniteLoss, match="step 4"):
            meter.read()

    def test_validation_images_are_held_out_of_the_only_folder(self, config):
        config = dataclasses.replace(config, val=None, images=ImagesConfig(val_fraction=0.25))
        result = pretrain(config)
        assert result.steps == 9  # 3 of the 12 images are held out
        assert result.errors is not None

    def test_without_validation_there_is_still_a_picture(self, config):
        config = dataclasses.replace(config, val=None, images=ImagesConfig(val_fraction=0.0))
        assert pretrain(config).errors is None
        assert (config.out / "reconstructions.png").exists()

    def test_a_prediction_that_is_not_finite_costs_the_picture_alone(self, config, monkeypatch, capsys):
        def reconstruction_sheet(*_, **__):
            raise ValueError("model: expected a finite prediction")

        monkeypatch.setattr("crate_mae.training.picture.reconstruction_sheet", reconstruction_sheet)
        assert pretrain(config).steps == 12 and saved_steps(config.out)[0] == 12
        assert "no new reconstructions.png: model: expected a finite prediction" in capsys.readouterr().out
        assert not (config.out / "reconstructions.png").exists()

    def test_one_image_cannot_be_split(self, config, tmp_path):
        (tmp_path / "one").mkdir()
        (Path(config.data) / "00.png").rename(tmp_path / "one" / "00.png")
        config = dataclasses.replace(config, data=tmp_path / "one", val=None)
        with pytest.raises(ValueError, match=r"--data: .*give --val or --images\.val_fraction 0"):
            pretrain(config)

    def test_kernels_forced_where_they_cannot_run(self, config, monkeypatch):
        monkeypatch.setattr("crate_kernels.dispatch._INTERPRETING", False)
        with use("triton"), pytest.raises(ValueError, match=r"CRATE_KERNELS_IMPL.*forced.*CUDA"):
            pretrain(config)
        assert not config.out.exists()

    def test_bfloat16_autocast_trains(self, config):
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, precision="bfloat16"))
        losses = [line["loss"] for line in metric_lines(pretrain(config).out) if "loss" in line]
        assert all(map(math.isfinite, losses))

    def test_16_bit_stream_and_recompute_train_alike(self, config, tmp_path):
        def losses(name, **settings):
            run = dataclasses.replace(config.run, precision="bfloat16", log_every=1, **settings)
            done = pretrain(dataclasses.replace(config, out=tmp_path / name, run=run))
            return [line["loss"] for line in metric_lines(done.out) if "loss" in line]

        plain, again = losses("plain"), losses("again", recompute=True)
        assert again == pytest.approx(plain, rel=1e-6)
        assert losses("stream", stream="16bit") == pytest.approx(plain, rel=3e-2)

    def test_compiled_steps_train_alike(self, config, tmp_path, monkeypatch):
        """Traced and run as one graph, without the code generator: its speed and its compiler are no matter of this test."""
        torch.compiler.reset()  # sizes that other tests compiled for would count
        counter = CompileCounterWithBackend("aot_eager")
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
        monkeypatch.setattr("crate_mae.training.precision.obstacle_to_compiling", lambda device: None)
        run = dataclasses.replace(config.run, compile=True, analyze_every=1)  # whose hooks come and go
        done = pretrain(dataclasses.replace(config, out=tmp_path / "compiled", run=run))
        plain = pretrain(config)
        assert counter.frame_count == 1, "all steps ran the one graph"
        losses, expected = (
            [line["loss"] for line in metric_lines(out) if "loss" in line] for out in (done.out, plain.out)
        )
        assert losses == pytest.approx(expected, rel=1e-5)
        assert done.errors.val_loss == pytest.approx(plain.errors.val_loss, rel=1e-4)
        assert weights(done.out).keys() == weights(plain.out).keys()

    def test_compiling_needs_a_compiler(self, config, monkeypatch):
        monkeypatch.setattr("crate_mae.compilation.shutil.which", lambda name: None)
        run = dataclasses.replace(config.run, compile=True)
        with pytest.raises(ValueError, match=r"--run\.compile: .*C\+\+ compiler"):
            pretrain(dataclasses.replace(config, run=run))
        assert not config.out.exists()

    def test_a_16_bit_stream_needs_autocast(self, config):
        run = dataclasses.replace(config.run, precision="float32", stream="16bit")
        with pytest.raises(ValueError, match=r"run\.stream"):
            pretrain(dataclasses.replace(config, run=run))

    def test_wide_grey_images(self, config):
        model = dataclasses.replace(TINY, img_size=(16, 40), in_chans=1)
        config = dataclasses.replace(config, model=model, images=ImagesConfig(mean=(0.5,), std=(0.25,)))
        assert pretrain(config).steps == 12

    def test_masks_must_leave_something_visible(self, config):
        config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, mask_ratio=0.95))
        with pytest.raises(ValueError, match=r"mask_ratio.*visible"):
            pretrain(config)

    def test_without_folders_the_shipped_photographs_are_used(self, config):
        config = dataclasses.replace(
            config, data=None, val=None, schedule=ScheduleConfig(epochs=1, warmup_epochs=0, batch_size=275)
        )
        result = pretrain(config)
        assert result.steps == 2
        assert FLOWERS.is_dir()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_demo_model_trains_on_a_gpu(tmp_path):
    demo = demo_config(tmp_path / "run")
    demo = dataclasses.replace(demo, schedule=dataclasses.replace(demo.schedule, epochs=3, warmup_epochs=1))
    result = pretrain(demo)
    losses = [line["loss"] for line in metric_lines(result.out) if "loss" in line]
    assert losses[-1] < losses[0]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replaced(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
