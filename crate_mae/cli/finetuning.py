"""`crate-mae finetune`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from crate_mae.checkpoints import read_config
from crate_mae.classifiers import classifier_config
from crate_mae.cli.training import (
    add_architecture,
    defaults_of,
    explicit_sizes,
    init_of,
    published_model,
    read_early,
    refuse_no_file,
    refuse_without_meaning,
    settings_of,
    training_parser,
    with_configs,
)
from crate_mae.config import ClassifierConfig, ModelConfig
from crate_mae.finetuning import FinetuneConfig, FinetuneResult, Scores, finetune, plan
from crate_mae.registry import CLASSIFIERS, MODELS

HELP = {"finetune": "Train a classifier end to end, from a run, from a checkpoint or from random weights."}

_ALL: dict[str, ModelConfig | ClassifierConfig] = {**CLASSIFIERS, **MODELS}
ARCHITECTURES = {name: classifier_config(config) for name, config in _ALL.items()}
"""The published sizes; a CRATE-MAE stands for a classifier on its encoder."""

PUBLISHED = ("family", "embed_dim", "depth", "num_heads")
"""The settings in which the published sizes differ."""


def read_ahead(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments in full, and the defaults of this command's options.

    Raises:
        ValueError: options or configs contradict each other, or do not say what the model is.
    """
    command, options, early = read_early(arguments, FinetuneConfig)
    options, configs = with_configs(options, early, FinetuneConfig)
    init, explicit = init_of(early, configs), explicit_sizes(options)
    if "num_classes" in explicit:
        raise ValueError("--model.num_classes: it is the number of classes of the training images; leave it out")
    published = published_model(early.architecture, configs, explicit, ARCHITECTURES, PUBLISHED)
    of_configs = any("model" in settings for settings in configs.values())
    said = bool(explicit or early.architecture or published or early.model or of_configs)
    defaults: dict[str, Any] = {"model": dataclasses.asdict(published)} if published else {}
    if init is not None and init.is_dir():
        defaults |= defaults_of(init, _classifier_on, published, PUBLISHED)
    elif init is not None and init.exists():  # if it does not exist, the run refuses it
        refuse_no_file(init)
        if not said:
            raise ValueError(
                f"--init {init}: weights alone do not say what model they are; give --architecture, or the folder of a run"
            )
        if _family(published, configs, options) == "crate_mae":
            refuse_without_meaning(init, configs, explicit)
    elif init is None and not (said or early.resume or {"-h", "--help"} & set(options)):
        raise ValueError(
            "expected --init, to start from a trained model, or --architecture, to start from random weights"
        )
    return [command, *options], defaults


def make_parser(command: str, defaults: dict[str, Any]) -> ArgumentParser:
    """The parser of `finetune`."""
    parser = training_parser(FinetuneConfig, defaults)
    add_architecture(parser, ARCHITECTURES)
    return parser


def run(parser: ArgumentParser, chosen: Namespace) -> str:
    """Fine-tune; returns what to print. Errors as of `crate_mae.finetuning.finetune`."""
    config, options = settings_of(parser, chosen, FinetuneConfig, ClassifierConfig)
    if options.dry_run:
        return str(plan(config, resume=options.resume, overwrite=options.overwrite))
    return report(finetune(config, resume=options.resume, overwrite=options.overwrite))


def report(result: FinetuneResult) -> str:
    """The end of a fine-tuning, as a table."""
    lines = [
        f"Results of {result.steps} steps on {result.train_images} images of {len(result.classes)} classes are in {result.out}."
    ]
    if result.scores is not None:
        lines.append(f"Of {result.val_images} validation images, whole:")
        lines.append(f"  {'':28} epochs     top-1     top-5      loss")
        lines.append(_row(f"the last model, {result.out.name}/", result.epochs, result.scores))
    if result.best is not None:
        lines.append(_row("the best model, best/", result.best_epoch, result.best))
        lines.append(_row("each class by its frequency", None, result.best))
    return "\n".join(lines)


def _row(name: str, epochs: float | None, scores: Scores) -> str:
    if epochs is None:
        return f"  {name:28} {'-':>6} {'':>9} {'':>9} {scores.guess_loss:>9.4f}"
    return f"  {name:28} {epochs:>6g} {scores.val_top1:>9.2%} {scores.val_top5:>9.2%} {scores.val_loss:>9.4f}"


def _classifier_on(init: Path) -> ClassifierConfig:
    return classifier_config(read_config(init))


def _family(published: ClassifierConfig | None, configs: dict[str, dict[str, Any]], options: list[str]) -> str:
    """The family that options or configs say the weights are of."""
    named = [option.partition("=")[2] for option in options if option.startswith("--model.family=")]
    named = [
        settings["model"]["family"] for settings in configs.values() if "family" in settings.get("model", {})
    ] + named
    if named:
        return named[-1]
    return published.family if published else ClassifierConfig().family
