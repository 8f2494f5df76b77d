"""Published recipes, and the commands of facebookresearch/mae."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import TINY, metric_lines, write_photographs

import crate_mae
from crate_mae.cli import main
from crate_mae.cli.mae_flags import in_our_options
from crate_mae.training import PretrainConfig, recipe
from crate_mae.training.recipes import RECIPES

README_OF_MAE = """
    --batch_size 64 \
    --model mae_vit_large_patch16 \
    --norm_pix_loss \
    --mask_ratio 0.75 \
    --epochs 800 \
    --warmup_epochs 40 \
    --blr 1.5e-4 --weight_decay 0.05 \
    --data_path {photographs}
"""
"""The options of its command for pre-training (PRETRAIN.md), but for those of submitit."""


@pytest.fixture
def settings(monkeypatch, capsys):
    """What `pretrain` is called with by a command."""

    def of(*options: object) -> PretrainConfig:
        called = []

        def instead(config, **arguments):
            called.append((config, arguments))
            raise ValueError("called")

        monkeypatch.setattr("crate_mae.cli.pretraining.pretrain", instead)
        assert main(["pretrain", *map(str, options)]) == 2
        said = capsys.readouterr()
        assert called, said.err
        of.said, of.arguments = said.out, called[0][1]
        return called[0][0]

    return of


def refusal(capsys, *options: object) -> str:
    assert main(["pretrain", *map(str, options)]) == 2
    return capsys.readouterr().err


class TestRecipes:
    @pytest.mark.parametrize("name", RECIPES)
    def test_the_command_takes_its_settings(self, name, settings):
        config = settings("--recipe", name, "--out", "run")
        assert config == PretrainConfig(out=Path("run"), **recipe(name))

    def test_their_numbers(self):
        """As the papers have them."""
        mae, crate = (PretrainConfig(out="run", **recipe(name)) for name in ("mae", "crate-mae-paper"))
        assert mae.peak_lr == pytest.approx(2.4e-3) and crate.peak_lr == pytest.approx(4.8e-4)
        assert (mae.optimizer.weight_decay, crate.optimizer.weight_decay) == (0.05, 0.1)
        assert mae.model.norm_pix_loss and not crate.model.norm_pix_loss
        for config in (mae, crate):
            schedule = config.schedule
            assert (schedule.batch_size, schedule.epochs, schedule.warmup_epochs) == (4096, 800, 40)
            assert config.optimizer.betas == (0.9, 0.95) and config.optimizer.clip_grad == 0
        assert crate.images.blur > 0 and crate.images.solarize > 0 and mae.images.blur == mae.images.solarize == 0

    def test_options_configs_and_sizes_go_over_it(self, settings, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"optimizer": {"base_lr": 0.5}}))
        options = ["--architecture", "crate_mae_tiny", "--config", tmp_path / "config.json", "--schedule.epochs", 90]
        config = settings("--recipe=mae", "--out=run", *options)
        assert (config.model.embed_dim, config.model.norm_pix_loss) == (384, True)
        assert (config.optimizer.base_lr, config.optimizer.weight_decay, config.schedule.epochs) == (0.5, 0.05, 90)
        assert not settings("--recipe=mae", "--model.norm_pix_loss=false", "--out=run").model.norm_pix_loss

    def test_what_is_refused(self, capsys, tmp_path):
        assert "did you mean mae?" in refusal(capsys, "--recipe", "mea", "--out", tmp_path)
        resumed = refusal(capsys, "--recipe", "mae", "--out", tmp_path, "--resume")
        assert "--recipe: expected nothing with --resume" in resumed
        with pytest.raises(ValueError, match="recipe: expected one of mae, crate-mae-paper, got 'mea'"):
            recipe("mea")


class TestFlagsOfMae:
    def test_its_own_command_means_what_it_means_there(self, settings, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "64")  # of torchrun, which the run itself would look for
        config = settings(*shlex.split(README_OF_MAE.format(photographs="photos")))
        assert config.model == dataclasses.replace(crate_mae.MODELS["crate_mae_large"], norm_pix_loss=True)
        assert (config.data, config.out) == ("photos", Path("output_dir"))
        assert config.schedule.batch_size == 4096 and config.peak_lr == pytest.approx(2.4e-3)
        expected = PretrainConfig(out="output_dir", **recipe("mae"))
        assert (config.optimizer, config.schedule, config.images) == (
            expected.optimizer,
            expected.schedule,
            expected.images,
        )
        assert (
            "read as flags of facebookresearch/mae: " in settings.said and "--schedule.batch_size=4096" in settings.said
        )

    def test_what_is_left_out_is_as_its_code_has_it(self, settings):
        config = settings("--data_path=photos")
        assert (config.schedule.epochs, config.schedule.batch_size, config.optimizer.base_lr) == (400, 64, 1e-3)
        assert (
            config.model.embed_dim == crate_mae.MODELS["crate_mae_large"].embed_dim and not config.model.norm_pix_loss
        )
        assert config.optimizer.clip_grad == 0 and config.out == Path("output_dir")

    def test_a_recipe_lies_under_them(self, settings):
        config = settings("--data_path=photos", "--recipe=crate-mae-paper", "--epochs=90")
        assert (config.optimizer.base_lr, config.schedule.batch_size, config.schedule.epochs) == (3e-5, 4096, 90)
        assert config.model == crate_mae.MODELS["crate_mae_large"]  # of which the recipe says nothing

    def test_init_says_the_model(self, settings, tmp_path):
        crate_mae.save_model(crate_mae.CrateMAE(TINY), tmp_path, mean=[0.5] * 3, std=[0.5] * 3)
        assert settings("--data_path=photos", f"--init={tmp_path}").model == TINY

    @pytest.mark.parametrize(
        ("flags", "setting", "value"),
        [
            ("--accum_iter 4 --batch_size 8", "schedule.batch_size", 32),
            ("--accum_iter=4 --batch_size=8", "schedule.accumulate", 4),
            ("--blr 2e-4 --lr 1e-3 --batch_size 512", "optimizer.base_lr", 5e-4),
            ("--blr 2e-4 --lr 1e-3", "optimizer.base_lr", 4e-3),  # of a batch of 64, its default
            ("--accum_iter 2 --lr 1e-3", "optimizer.base_lr", 2e-3),
            ("--input_size 160", "model.img_size", 160),
            ("--model=crate_mae_tiny", "model.embed_dim", 384),
            ("--model mae_vit_base_patch16", "model.depth", 12),
            ("--output_dir there", "out", Path("there")),
            ("--job_dir there --nodes 8 --use_volta32", "out", Path("there")),
            ("--log_dir there", "run.log_to", ("tensorboard",)),
            ("--blr 1e-3 --min_lr 1e-5", "schedule.min_lr", 1e-5),
            ("--blr 1e-3 --warmup_epochs 5.5", "schedule.warmup_epochs", 5.5),
            ("--blr 1e-3 --seed 3", "run.seed", 3),
            ("--blr 1e-3 --device cpu", "run.device", "cpu"),
            ("--blr 1e-3 --num_workers 2 --pin_mem", "images.num_workers", 2),
            ("--blr 1e-3 --resume ''", "schedule.epochs", 400),
            ("--blr 1e-3 --optimizer.average 0.99", "optimizer.average", 0.99),
            ("--blr 1e-3 --out here", "out", Path("here")),
        ],
    )
    def test_each_flag(self, settings, flags, setting, value):
        config = settings("--data_path=photos", *shlex.split(flags))
        for name in setting.split("."):
            config = getattr(config, name)
        assert config == pytest.approx(value) if isinstance(value, float) else config == value

    def test_what_has_no_effect_is_said(self, settings):
        settings("--data_path=d", "--blr=1e-3", "--pin_mem", "--dist_url", "env://", "--log_dir=there")
        assert "without effect here: --dist_url, --pin_mem" in settings.said
        assert "events for TensorBoard go to the folder tensorboard" in settings.said

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--blr x", "--blr: expected a number, got 'x'"),
            ("--blr -1", "--blr: expected above 0, got -1.0"),
            ("--accum_iter 0", "--accum_iter: expected 1 or more, got 0"),
            ("--lr 1e-3 --accum_iter 1 --batch_size 0", "--batch_size: expected 1 or more, got 0"),
            ("--blr 1e-3 --mask_ratio 2", "--mask_ratio: expected above 0 and below 1, got 2.0"),
            ("--data_path=", "--data_path: expected a folder of images, or what else --data takes, got ''"),
            ("--model crate_mae_bse", "got 'crate_mae_bse'; did you mean crate_mae_base?"),
            ("--blr 1e-3 --resume gone.pth", "--resume: expected a state of ours"),
            ("--input_size 32 --lr 1e-3 --schedule.batch_size 512", "--lr: expected --batch_size beside it"),
            ("--data_path d --epochs 1.5", "--epochs: expected a whole number, got '1.5'"),
            ("--data_path d --data e", "--data_path: expected it or --data, which are the same setting, not both"),
            (
                "--model mae_vit_huge_patch14",
                "--model: expected one of mae_vit_base_patch16, mae_vit_large_patch16, crate_mae_",
            ),
            ("--blr 1e-3 --start_epoch 3", "--start_epoch: expected 0, got 3"),
            ("--blr 1e-3 --lr 1e-3 --recipe mae", "--lr: expected --batch_size beside it"),
            ("--output_dir ''", "--output_dir: expected a folder, got nothing"),
            ("--blr 1e-4 --out run", "--data_path: expected the folder of the images, got nothing"),
            ("--output_dir a --resume b/states/step_3.pt", "--resume: expected a state of the run in --output_dir a"),
            ("--epochs 3 --out run", "did you mean --schedule.epochs?"),  # of no command of mae's
        ],
    )
    def test_what_is_refused(self, capsys, flags, message):
        assert message in refusal(capsys, *shlex.split(flags))

    def test_a_section_is_no_model(self):
        options = ["--model", '{"depth": 3}', "--model.depth=2", "--out=run"]
        assert in_our_options(options) == (options, [])

    def test_resume_names_a_state(self, settings, tmp_path):
        photographs = write_photographs(tmp_path / "photographs")
        out, tiny = tmp_path / "run", "--model.img_size 32 --model.patch_size 8 --model.embed_dim 32 --model.depth 1"
        tiny += " --model.num_heads 2 --model.decoder_depth 1 --model.decoder_num_heads 2 --num_workers 0 --run.save_every 1"
        command = f"--batch_size 4 --epochs 2 --warmup_epochs 1 --data_path {photographs} --output_dir {out} --device cpu {tiny}"
        assert main(["pretrain", *shlex.split(command)]) == 0
        state = next((out / "states").glob("step_*.pt"))
        for resumed in (state, out):
            config = settings(f"--resume={resumed}", "--blr=1e-4")
            assert config.out == out and config.schedule.epochs == 2 and config.optimizer.base_lr == 1e-4
            assert settings.arguments["resume"] == (int(state.stem[5:]) if resumed == state else True)
        (tmp_path / "checkpoint-10.pth").write_bytes(b"")
        with pytest.raises(ValueError, match=r"--resume: expected a state of ours.*got .*checkpoint-10\.pth"):
            in_our_options([f"--resume={tmp_path / 'checkpoint-10.pth'}", "--blr=1e-4"])

    def test_its_readme_command_runs_under_torchrun(self, tmp_path):
        """Of the smallest size, in two processes; its flags all stay."""
        photographs, out = write_photographs(tmp_path / "photographs"), tmp_path / "run"
        command = shlex.split(README_OF_MAE.format(photographs=photographs))
        for flag, value in (
            ("--batch_size", 2),
            ("--model", "crate_mae_tiny"),
            ("--epochs", 2),
            ("--warmup_epochs", 1),
        ):
            command[command.index(flag) + 1] = str(value)
        command += ["--output_dir", str(out), "--input_size", "32", "--device", "cpu", "--num_workers", "0"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
        ended = subprocess.run(
            [*torchrun, "-m", "crate_mae", "pretrain", *command], capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("read as flags of facebookresearch/mae") == 1
        config = json.loads((out / "config.json").read_text())
        assert config["schedule"]["batch_size"] == 4 and config["optimizer"]["base_lr"] == 1.5e-4
        assert config["model"]["norm_pix_loss"] and config["optimizer"]["clip_grad"] == 0
        assert metric_lines(out)[-1]["step"] == 4  # of 11 images, as one is held out
