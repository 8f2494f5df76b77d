"""`crate-mae evaluate`: which classes the features of a run's model tell apart."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from crate_mae.analyzing import random_model
from crate_mae.backbone import Backbone
from crate_mae.checkpoints import read_config
from crate_mae.classifiers import classifier_config
from crate_mae.cli.features import add_computing, add_features, number_or_auto, spec_of
from crate_mae.cli.parsers import command_parser
from crate_mae.cli.pretraining import config_of
from crate_mae.cli.runs import backbone_of, check_run, is_run, normalization_of
from crate_mae.cli.settings import path_of
from crate_mae.data import FLOWERS, LabelledParts, absolute, labelled_parts
from crate_mae.data.progress import say
from crate_mae.data.specification import without_folders
from crate_mae.evaluating import How, Results, evaluate_features, evaluate_finetuned, evaluation_lines, write_evaluation
from crate_mae.evaluation import METHODS, FeatureSpec, Scores
from crate_mae.finetuning import FinetuneConfig, FinetuneOptimizerConfig, FinetuneRunConfig, FinetuneScheduleConfig
from crate_mae.state_dicts import checksum
from crate_mae.training.config import ImagesConfig
from crate_mae.training.feed import workers_for
from crate_mae.training.image_sets import of_option
from crate_mae.training.precision import choose_device, choose_precision, cpu_threads
from crate_mae.training.run_folder import FEATURES, FINETUNED, refuse_unwritable

FINETUNE = "finetune"
"""The method that trains the encoder, too."""


HELP = "Measure what a run has learnt by the classes that it tells apart."


def make_parser() -> ArgumentParser:
    """The parser of `evaluate`."""
    parser = command_parser(
        "Measures what a model has learnt by the classes that its features tell apart: by nearest neighbours, a "
        "linear probe, or fine-tuning; writes evaluation.json and evaluation.png.",
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="Folder of a run or of a model; of several, such as of several seeds, means and deviations are told.",
    )
    parser.add_argument(
        "--data",
        type=str,
        help="Images with classes: a folder that holds train/ and test/ or val/ of class folders each, or CIFAR-10, CIFAR-100, "
        "Flowers-102 or Oxford-IIIT Pets as they are distributed; hf:NAME. By default, those that the run learnt from.",
    )
    parser.add_argument("--test", type=str, help="Images to test on, where --data names those to learn from alone.")
    parser.add_argument(
        "--method",
        nargs="+",
        default=["knn", "linear"],
        choices=[*METHODS, FINETUNE],
        help="knn: nearest neighbours; linear: logistic regression; finetune: training end to end, as crate-mae finetune does "
        "it by default, in a folder finetuned/ beside the results.",
    )
    parser.add_argument("--epochs", type=int, default=100, help="Of fine-tuning; a twentieth of them warm up.")
    parser.add_argument(
        "--base_lr", type=float, default=5e-4, help="Of fine-tuning, for a batch of 256, as --optimizer.base_lr there."
    )
    parser.add_argument("--overwrite", action="store_true", help="Fine-tune anew, where it was done or begun before.")
    add_features(parser)
    parser.add_argument(
        "--baseline",
        default="untrained",
        choices=["untrained", "none"],
        help="Show random weights, too, or nothing.",
    )
    parser.add_argument("--seeds", type=int, default=3, help="How many models with random weights.")
    parser.add_argument("--out", type=Path, help="Folder for the files; by default, RUN.")
    parser.add_argument("--cache", type=bool, default=True, help="Keep features in RUN/features, for the next time.")
    parser.add_argument("--batch_size", type=int, default=50, help="Images at once: fewer need less memory.")
    add_computing(parser)
    return parser


def run(parser: ArgumentParser, chosen: Namespace) -> str:
    """Write the evaluation; returns what to print.

    Raises:
        OSError: there is no such run, or there are no such images, or the files cannot be written.
        ValueError: an argument cannot be used, or a model's values are not finite; the message names it.
        MissingLibrary: an ImportError: one that the images need is not installed.
    """
    asked = chosen.evaluate
    runs = [path_of(str(each)) for each in asked.runs]
    if len(runs) > 1 and asked.out is None:
        raise ValueError("--out: expected a folder for what is found of several runs")
    if len({each.resolve() for each in runs}) < len(runs):
        raise ValueError("RUN: the same one is given twice")
    out = path_of(str(asked.out or runs[0]))
    for name, least in (("batch_size", 1), ("seeds", 1), ("last", 1), ("epochs", 1)):
        if asked[name] < least:
            raise ValueError(f"--{name}: expected {least} or more, got {asked[name]}")
    for each in runs:
        check_run(each)
    device = choose_device(asked.device, "--device")
    models = {each: backbone_of(each).to(device).eval() for each in runs}
    spec = spec_of(asked, [len(model.encoder_layers) for model in models.values()])
    refuse_unwritable(out)
    with of_option("--data"):
        parts = labelled_parts(asked.data if asked.data is not None else _learnt_from(runs[0]), test=asked.test)
    for line in parts.said:
        say(line)
    first = models[runs[0]].config
    batch_bytes = asked.batch_size * first.in_chans * first.image_shape[0] * first.image_shape[1]
    workers = workers_for(number_or_auto(asked, "num_workers"), device, asked.threads, batch_bytes)
    how = How(spec, asked.batch_size, workers, choose_precision(asked.precision, device))
    methods = list(dict.fromkeys(asked.method))
    say(
        f"evaluate: {len(parts.train):,} images to learn from and {len(parts.test):,} to test on, "
        f"{len(parts.train.classes)} classes; {spec.in_words()}, {how.precision} on {device}"
    )
    seeds = range(asked.seeds if asked.baseline == "untrained" else 0)
    if seeds and any(model.config != first for model in models.values()):
        say(f"the runs are of different models; those with random weights are as {runs[0]}")
    of_features = [method for method in methods if method in METHODS]
    with cpu_threads(asked.threads):
        of_runs = {
            str(each): _evaluate(
                each, model, parts, of_features, how, asked.cache, "trained" if len(runs) == 1 else each.name
            )
            for each, model in models.items()
        }
        untrained: dict[str, dict[str, Scores]] = {}
        for seed in seeds:
            model = random_model(models[runs[0]], seed).to(device)
            untrained[f"seed {seed}"] = _evaluate(runs[0], model, parts, of_features, how, False, f"untrained {seed}")
    if FINETUNE in methods:
        for each, model in models.items():
            config = _finetuning(asked, each, each, out, parts, f"{each.resolve().name}_{checksum(model.state_dict())}")
            of_runs[str(each)][FINETUNE] = evaluate_finetuned(config, parts, how, overwrite=asked.overwrite)
        for seed in seeds:
            config = _finetuning(asked, runs[0], None, out, parts, f"untrained_{seed}", seed=seed)
            untrained[f"seed {seed}"][FINETUNE] = evaluate_finetuned(config, parts, how, overwrite=asked.overwrite)
    about = _about(asked, parts, how, asked.data or _learnt_from(runs[0]))
    about["weights"] = {str(each): checksum(model.state_dict()) for each, model in models.items()}
    results = Results(of_runs, untrained, list(parts.train.classes), about)
    numbers, picture = write_evaluation(out, results, caption=_caption(runs, parts, spec))
    return "\n".join([*evaluation_lines(results), f"Look at {picture}; all numbers are in {numbers}."])


def _evaluate(
    folder: Path, model: Backbone, parts: LabelledParts, methods: Sequence[str], how: How, keep: bool, name: str
) -> dict[str, Scores]:
    cache = folder / FEATURES if keep else None
    try:
        return evaluate_features(model, parts, normalization_of(folder), methods, how, cache=cache, say=say, name=name)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _finetuning(
    asked: Namespace, run: Path, init: Path | None, out: Path, parts: LabelledParts, name: str, *, seed: int = 0
) -> FinetuneConfig:
    """The configuration of a fine-tuning from the weights in ``init``, or from random ones, of the model of ``run``.

    The name of its folder tells the weights it starts from, by ``name``, and a hash of its settings. So a fine-tuning with other
    weights or settings has another folder, and is not resumed by mistake.
    """
    normalization = normalization_of(run)
    train, test = map(absolute, parts.named)
    config = FinetuneConfig(
        out=out / FINETUNED,
        data=train,
        val=test,
        init=init,
        model=classifier_config(read_config(run)),
        images=ImagesConfig(
            mean=tuple(normalization.mean.flatten().tolist()),
            std=tuple(normalization.std.flatten().tolist()),
            num_workers=number_or_auto(asked, "num_workers"),
        ),
        optimizer=FinetuneOptimizerConfig(base_lr=asked.base_lr),
        schedule=FinetuneScheduleConfig(
            epochs=asked.epochs, warmup_epochs=asked.epochs / 20, min_lr=0.0, batch_size=min(64, len(parts.train))
        ),
        run=FinetuneRunConfig(device=asked.device, precision=asked.precision, threads=asked.threads, seed=seed),
    )
    settings = {each: value for each, value in config.to_dict().items() if each not in ("out", "init")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return dataclasses.replace(config, out=config.out / f"{name}_{digest[:8]}")


def _learnt_from(run: Path) -> str:
    if not is_run(run):
        raise ValueError(f"{run} holds a model alone: name images with classes")
    return config_of(run).data or str(FLOWERS)


def _about(asked: Namespace, parts: LabelledParts, how: How, data: str) -> dict[str, object]:
    return {
        "data": {"data": asked.data, "test": asked.test, "said": parts.said, "name": without_folders(data)},
        "images": {"train": len(parts.train), "test": len(parts.test)},
        "features": how.spec.in_words(),
        "precision": how.precision,
        "device": asked.device,
    }


def _caption(runs: Sequence[Path], parts: LabelledParts, spec: FeatureSpec) -> str:
    names = ", ".join(each.absolute().name for each in runs)
    return (
        f"{names}: learnt from {len(parts.train):,} images and tested on {len(parts.test):,}, "
        f"{len(parts.train.classes)} classes; {spec.in_words()}"
    )
