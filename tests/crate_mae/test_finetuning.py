"""Fine-tuning: its recipe's parts, its run, and its command."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_runs import assert_same_weights, metric_lines, weights

import crate_mae
from crate_mae import Classifier, ClassifierConfig, CrateMAE, ModelConfig, classifier_of
from crate_mae.cli import main
from crate_mae.data import (
    ImageFolder,
    LabelledCentreCropped,
    Mixture,
    Normalization,
    PretrainImages,
    Source,
    UnreadableImage,
    readable,
)
from crate_mae.finetuning import (
    AugmentConfig,
    FinetuneConfig,
    FinetuneOptimizerConfig,
    FinetuneRunConfig,
    FinetuneScheduleConfig,
    Mix,
    Scores,
    Scoring,
    build_layerwise_optimizer,
    draw_mix,
    finetune,
    layer_of,
    lr_scale,
    mixed,
    mixed_targets,
    starting_classifier,
)
from crate_mae.finetuning.classes import classes_of, labels_among
from crate_mae.finetuning.scoring import ScoreWatch
from crate_mae.training import ImagesConfig, RunStopped
from crate_mae.training.breakdown import first_bad
from crate_mae.training.pace import OF_THE_MACHINE

TINY = ClassifierConfig("crate_mae", 2, "mean", img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2)
FAMILIES = [dataclasses.replace(TINY, family=family) for family in ("crate", "crate_alpha", "crate_mae")]
COLOURS = {"blue": (40, 40, 200), "red": (200, 40, 40)}


def write_colours(root: Path, classes: str = "blue red", images: int = 6) -> Path:
    """Noise around a colour for each class."""
    rng = np.random.default_rng(0)
    for name in classes.split():
        (root / name).mkdir(parents=True)
        for index in range(images):
            pixels = np.array(COLOURS.get(name, (90, 90, 90))) + rng.normal(0, 20, (8, 8, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    return write_colours(tmp_path / "colours")


@pytest.fixture
def config(tmp_path: Path, colours: Path) -> FinetuneConfig:
    """3 steps an epoch."""
    return FinetuneConfig(
        out=tmp_path / "run",
        data=str(colours),
        val=str(colours),
        model=TINY,
        images=ImagesConfig(num_workers=0),
        optimizer=FinetuneOptimizerConfig(base_lr=0.3),
        schedule=FinetuneScheduleConfig(epochs=4, warmup_epochs=1, batch_size=4),
        augment=AugmentConfig(drop_path=0.4),
        run=FinetuneRunConfig(device="cpu", precision="float32", threads=1, log_every=2, save_every=2),
    )


def rows(out: Path) -> list[dict]:
    return [{name: row[name] for name in row.keys() - {*OF_THE_MACHINE}} for row in metric_lines(out)]


class TestMixing:
    @pytest.mark.parametrize(
        "augment", [AugmentConfig(), AugmentConfig(mixup=0), AugmentConfig(cutmix=0)], ids=["both", "cut", "blended"]
    )
    def test_targets_are_the_shares_of_the_pixels(self, augment):
        """Of images whose pixels are the numbers of their classes, the mean pixel is the mean of the targets."""
        labels = torch.tensor([4, 0, 2, 1, 3])
        images = labels.float().view(-1, 1, 1, 1).expand(-1, 3, 6, 10)
        kinds = set()
        for step in range(40):
            mix = draw_mix(augment, 3, step, (6, 10))
            targets = mixed_targets(labels, 5, mix, smoothing=0.0)
            assert torch.allclose(targets.sum(-1), torch.ones(5))
            assert torch.allclose(targets @ torch.arange(5.0), mixed(images, mix).mean((1, 2, 3)), atol=1e-6)
            assert 0 <= mix.share <= 1 and mix == draw_mix(augment, 3, step, (6, 10))
            kinds.add(mix.box is None)
        assert kinds == {True, False} - ({True} if not augment.mixup else {False} if not augment.cutmix else set())
        assert len({draw_mix(augment, seed, step, (6, 10)) for seed in range(3) for step in range(3)}) > 3

    def test_smoothing_is_spread_over_all_classes(self):
        targets = mixed_targets(torch.tensor([2, 0]), 4, Mix(0.7), smoothing=0.2)
        expected = [[0.05 + 0.8 * 0.3, 0.05, 0.05 + 0.8 * 0.7, 0.05], [0.05 + 0.8 * 0.7, 0.05, 0.05 + 0.8 * 0.3, 0.05]]
        assert torch.allclose(targets, torch.tensor(expected))

    def test_nothing_is_mixed_without_either(self):
        mix, images = draw_mix(AugmentConfig(mixup=0, cutmix=0), 0, 0, (4, 4)), torch.rand(3, 1, 4, 4)
        assert mixed(images, mix) is images
        assert torch.equal(mixed_targets(torch.tensor([1, 0, 1]), 2, mix, 0.0).argmax(-1), torch.tensor([1, 0, 1]))


@pytest.mark.parametrize("model", FAMILIES, ids=lambda model: model.family)
class TestLayerwiseRates:
    def test_a_rate_for_each_layer_and_no_decay_but_of_matrices(self, model):
        classifier = crate_mae.classifiers.model_of(model)
        optimizer = build_layerwise_optimizer(classifier, FinetuneOptimizerConfig(base_lr=0.2, layer_decay=0.5), 128)
        group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        assert len(group_of) == len(list(classifier.parameters()))
        blocks = [{id(parameter) for parameter in layer.parameters()} for layer in classifier.encoder_layers]
        heads = ("mlp_head.", "fc_norm.", "head.", "norm.")
        for name, parameter in classifier.named_parameters():
            layer = next((n for n, block in enumerate(blocks, 1) if id(parameter) in block), 3 * name.startswith(heads))
            group = group_of[id(parameter)]
            assert layer_of(name, 2) == layer, name
            assert group["lr"] == pytest.approx(0.1 * 0.5 ** (3 - layer)) and group["lr_scale"] == lr_scale(
                name, 2, 0.5
            )
            is_matrix = parameter.ndim > 1 and name not in ("cls_token", "pos_embedding")
            assert group["weight_decay"] == 0.05 * is_matrix, name

    def test_a_breakdown_names_the_layer(self, model):
        classifier = crate_mae.classifiers.model_of(model)
        bad = classifier.encoder_layers[1]
        bad.forward = lambda x: x * np.nan
        layer = next(name for name, module in classifier.named_modules() if module is bad)
        assert first_bad(classifier, lambda: [classifier(torch.rand(2, 3, 8, 8)).sum()]) == f"output of {layer}"


class TestClasses:
    def test_are_matched_by_name(self, tmp_path):
        train = ImageFolder(write_colours(tmp_path / "train", "blue green red", 2))
        val = ImageFolder(write_colours(tmp_path / "val", "red green", 1))
        classes = classes_of(train, val)
        assert classes == ("blue", "green", "red")
        assert labels_among(train, classes).tolist() == [0, 0, 1, 1, 2, 2]
        assert labels_among(val, classes).tolist() == [1, 2]
        assert labels_among(Mixture([val, train], [1, 1]), ("red", "green", "blue")).tolist() == [
            1,
            0,
            2,
            2,
            1,
            1,
            0,
            0,
        ]

    @pytest.mark.parametrize(
        ("folders", "val", "option", "said"),
        [
            ("blue", "blue", "--data", "two classes or more, got those of 'blue' alone"),
            (
                "blue red",
                "blue grey",
                "--val",
                "images of 'grey', such as .*grey/0.png, and the classes are 'blue', 'red'",
            ),
            (".", ".", "--data", "no classes; expected a folder for each class"),
            (". blue", "blue", "--data", "of no class, such as .*0.png"),
        ],
    )
    def test_that_make_no_sense_are_refused(self, config, tmp_path, folders, val, option, said):
        data = [str(write_colours(tmp_path / name, classes, 2)) for name, classes in (("one", folders), ("two", val))]
        with pytest.raises(ValueError, match=f"^{option}: .*{said}"):
            finetune(dataclasses.replace(config, data=data[0], val=data[1]))
        assert not config.out.exists()

    def test_an_image_that_stands_in_brings_its_own(self):
        class Broken(Source):
            def __len__(self):
                return 4

            def image(self, index):
                if index != 2:
                    raise UnreadableImage(index, "damaged", "on purpose")
                return Image.new("RGB", (8, 8))

            def name(self, index):
                return str(index)

            def fingerprint(self):
                return ""

        labels, met = np.array([5, 6, 7, 8]), []
        batch = PretrainImages(Broken(), (8, 8), 0, labels=labels).batch([(0, index) for index in range(4)], met)
        assert batch.label.tolist() == [7] * 4 and batch.label.dtype == torch.int64 and met
        assert readable(LabelledCentreCropped(Broken(), labels, (8, 8)), 0, [])[1] == 7


class TestScoring:
    def test_is_that_of_all_images_at_once(self, tmp_path):
        folder = ImageFolder(write_colours(tmp_path / "a", "a b c d e f blue red", 2))
        labels = labels_among(folder, folder.classes)
        model = crate_mae.classifiers.model_of(dataclasses.replace(TINY, family="crate", num_classes=8))
        images, normalization = LabelledCentreCropped(folder, labels, (8, 8)), Normalization([0.5] * 3, [0.5] * 3, 3)
        model.set_drop_path(0.9)
        found = Scoring(images, normalization, batch_size=5)(model)
        assert model.training
        logits = model.eval()(normalization(torch.stack([image for image, _ in images]))).detach()
        truth, places = torch.from_numpy(labels), (-logits).argsort(-1)
        assert found.val_loss == pytest.approx(float(F.cross_entropy(logits, truth)), rel=1e-5)
        assert found.val_top1 == float((places[:, 0] == truth).double().mean())
        assert found.val_top5 == float((places[:, :5] == truth[:, None]).any(-1).double().mean()) < 1
        assert found.guess_loss == pytest.approx(np.log(8))

    def test_the_best_has_the_highest_top1_and_then_the_least_loss(self):
        watch = ScoreWatch(fill=2.3)
        told = [(2.0, 0.5), (1.0, 0.4), (1.9, 0.5), (1.9, 0.5), (3.0, 0.6), (20.0, 0.9)]
        best = [watch.validated(step, Scores(loss, top1, 1.0, 2.3)) for step, (loss, top1) in enumerate(told)]
        assert best == [True, False, True, False, True, False] and watch.diverging
        assert watch.best == Scores(3.0, 0.6, 1.0, 2.3) and ScoreWatch(**watch.state()) == watch


class TestStart:
    trained = ModelConfig(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, decoder_depth=1, decoder_num_heads=2
    )

    @pytest.fixture(params=["folder", "file"])
    def saved(self, request, tmp_path):
        def saved(model: torch.nn.Module) -> Path:
            crate_mae.save_model(model, tmp_path / "saved")
            return tmp_path / "saved" / ("" if request.param == "folder" else "model.safetensors")

        return saved

    def test_on_a_pre_trained_encoder(self, saved):
        model = CrateMAE(self.trained)
        found = starting_classifier(TINY, saved(model))
        assert found.config == TINY
        made = classifier_of(model, 2, img_size=8).state_dict()
        same = [name for name in made if not name.startswith("head.")]
        assert_same_weights({name: found.state_dict()[name] for name in same}, {name: made[name] for name in same})

    @pytest.mark.parametrize("model", FAMILIES, ids=lambda model: model.family)
    def test_on_a_classifier_of_other_classes_and_images(self, saved, model):
        trained = crate_mae.classifiers.model_of(dataclasses.replace(model, num_classes=5, img_size=12))
        found, images = (
            starting_classifier(dataclasses.replace(model, lambd=0.3), saved(trained)),
            torch.rand(2, 3, 8, 8),
        )
        assert found.num_classes == 2
        plain = classifier_of(found, 0)
        for layer in plain.modules():
            if hasattr(layer, "lambd"):
                assert layer.lambd == 0.3
        expected, made = (
            trained.forward_head(trained.embed(images), True),
            found.forward_head(found.embed(images), True),
        )
        assert torch.allclose(expected, made, atol=1e-6)

    def test_another_encoder_is_refused(self, saved):
        with pytest.raises((ValueError, RuntimeError), match=r"depth 2, and this one 3|blocks\.2"):
            starting_classifier(dataclasses.replace(TINY, depth=3), saved(CrateMAE(self.trained)))


class TestRun:
    def test_learns_and_leaves_a_model_to_load(self, config, colours):
        config = dataclasses.replace(config, schedule=FinetuneScheduleConfig(epochs=6, warmup_epochs=1, batch_size=4))
        result = finetune(config)
        assert result.scores.val_top1 == 1.0 and result.best.val_loss < 0.6 < result.best.guess_loss
        assert (result.classes, result.steps, result.epochs) == (("blue", "red"), 18, 6)
        assert (result.train_images, result.val_images) == (12, 12)
        validated = [row for row in metric_lines(config.out) if "val_loss" in row]
        assert [row["epoch"] for row in validated] == [2, 4, 6] and validated[-1]["val_top1"] == 1.0
        assert result.best.val_loss == min(row["val_loss"] for row in validated if row["val_top1"] == 1.0)
        model, transform = crate_mae.load_model(config.out / "best"), crate_mae.load_transform(config.out / "best")
        assert isinstance(model, Classifier)
        for number, name in enumerate(json.loads((config.out / "best" / "config.json").read_text())["classes"]):
            with Image.open(colours / name / "0.png") as image:
                assert int(model(transform(image)[None]).argmax()) == number

    def test_goes_on_bit_for_bit(self, config, tmp_path, monkeypatch):
        finetune(config)
        forward, calls = Classifier.forward, iter(range(100))

        def interrupted(self, *args):
            if self.training and next(calls) in (4, 7):
                signal.raise_signal(signal.SIGINT)
            return forward(self, *args)

        again = dataclasses.replace(config, out=tmp_path / "again")
        with monkeypatch.context() as patch:
            patch.setattr(Classifier, "forward", interrupted)
            for resume in (False, True):
                with pytest.raises(RunStopped):
                    finetune(again, resume=resume)
        result = finetune(again, resume=True)
        assert result.steps == 12 and rows(again.out) == rows(config.out)
        assert_same_weights(weights(again.out), weights(config.out))
        assert_same_weights(weights(again.out / "best"), weights(config.out / "best"))
        with pytest.raises(ValueError, match="classes: a resumed run keeps those it has, blue, red"):
            finetune(dataclasses.replace(again, classes=("red", "blue")), resume=True)
        with pytest.raises(ValueError, match=r"model\.lambd: the run in .* has 0\.1, got 0\.2"):
            finetune(dataclasses.replace(again, model=dataclasses.replace(TINY, lambd=0.2)), resume=True)

    @pytest.mark.parametrize(
        ("section", "bad"),
        [
            (AugmentConfig(mixup=-1), "augment.mixup"),
            (AugmentConfig(switch=2), "augment.switch"),
            (AugmentConfig(label_smoothing=1), "augment.label_smoothing"),
            (AugmentConfig(drop_path=1), "augment.drop_path"),
            (FinetuneOptimizerConfig(layer_decay=0), "optimizer.layer_decay"),
            (FinetuneOptimizerConfig(base_lr=0), "optimizer.base_lr"),
            (("a", "a"), "classes"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_settings_out_of_range_are_named(self, section, bad):
        with pytest.raises(ValueError, match=f"{bad}: expected"):
            FinetuneConfig(out=Path("run"), **{bad.split(".")[0]: section})


SHORT = "--schedule.epochs=2 --schedule.warmup_epochs=1 --schedule.batch_size=4 --images.num_workers=0 "
SHORT += "--run.device=cpu --run.precision=float32 --run.threads=1"
SIZES = ["--model.img_size=8", "--model.patch_size=4", "--model.embed_dim=16", "--model.depth=1", "--model.num_heads=2"]


class TestCommand:
    @pytest.fixture
    def run(self, colours, tmp_path):
        def run(command: str, out: str, *options: str) -> int:
            folders = ["--data", str(colours), "--val", str(colours), "--out", str(tmp_path / out)]
            return main([command, *folders, *SHORT.split(), *options])

        return run

    def test_from_a_pre_training_run_and_on(self, run, tmp_path, capsys):
        decoder = ["--model.decoder_depth=1", "--model.decoder_num_heads=2", "--model.lambd=0.3"]
        assert run("pretrain", "trained", *SIZES, *decoder, "--images.mean", "0.5", "0.5", "0.5") == 0
        trained, out = tmp_path / "trained", tmp_path / "tuned"
        assert run("finetune", "tuned", "--init", str(trained), "--model.pool=cls") == 0
        printed = capsys.readouterr().out
        assert f"from the weights of {trained}" in printed and "top-1" in printed and "best/" in printed
        saved = json.loads((out / "config.json").read_text())
        assert saved["model"] | {"family": "crate_mae", "pool": "cls", "num_classes": 2, "lambd": 0.3} == saved["model"]
        assert saved["images"]["mean"] == [0.5] * 3 and saved["classes"] == ["blue", "red"]
        assert main(["finetune", "--out", str(out), "--resume", "--schedule.epochs=3"]) == 0
        assert metric_lines(out)[-1]["epoch"] == 3
        assert run("pretrain", "tuned", "--resume") == 2
        assert "holds a run of crate-mae finetune, and that resumes it" in capsys.readouterr().err

    def test_from_weights_of_a_published_architecture(self, run, tmp_path):
        model = crate_mae.create_model("crate_tiny", img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2)
        torch.save({"model": model.state_dict()}, tmp_path / "official.pth")
        start = ["--init", str(tmp_path / "official.pth"), "--architecture=crate_tiny", *SIZES]
        assert run("finetune", "tuned", *start, "--optimizer.base_lr=1e-9", "--schedule.min_lr=0") == 0
        tuned = weights(tmp_path / "tuned")
        name = "transformer.layers.0.0.fn.qkv.weight"
        assert torch.allclose(tuned[name], model.state_dict()[name])
        assert len(tuned["mlp_head.1.weight"]) == 2

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ([], "expected --init, to start from a trained model, or --architecture"),
            (["--init=nowhere", "--architecture=crate_tiny"], "--init: nowhere"),
            (["--init=pyproject.toml"], "weights alone do not say what model they are; give --architecture"),
            (["--init=pyproject.toml", "--architecture=crate_mae_tiny"], "without --model.lambd and --model.step_size"),
            (["--architecture=crate_tiny", "--model.num_classes=3"], "number of classes of the training images"),
            (["--architecture=crate_huge"], "did you mean crate"),
            (["--architecture=crate_tiny", "--run.analyze_every=1"], "unrecognized arguments: --run.analyze_every"),
            (["--architecture=crate_tiny", '--config={"augment": {"mixer": 1}}'], "augment.mixer: no such setting"),
            (["--architecture=crate_tiny", "--augment.drop_path=2"], "augment.drop_path: expected"),
        ],
    )
    def test_mistakes_are_one_line(self, run, tmp_path, capsys, options, said):
        assert run("finetune", "tuned", *options) == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1
        assert not (tmp_path / "tuned").exists()
