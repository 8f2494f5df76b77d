"""The end of ``crate-mae demo``: what the run has learnt, in a few lines and on one page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch

from crate_mae.analyzing import (
    analysis_lines,
    analyze_models,
    description,
    model_in_words,
    random_model,
    write_analysis,
)
from crate_mae.checkpoints import load_model
from crate_mae.config import grid_of
from crate_mae.data import CentreCropped, Normalization, Source, Subset, spread
from crate_mae.data.checking import Looked, looked_at
from crate_mae.evaluation import class_accuracies, pooled_features
from crate_mae.evaluation.classes import TITLES
from crate_mae.evaluation.features import standardised
from crate_mae.files import replaced
from crate_mae.model import CrateMAE
from crate_mae.pictures import Classes, Curves, Sparsity, summary_picture
from crate_mae.pictures.layers import TRAINED, UNTRAINED
from crate_mae.registry import count_parameters
from crate_mae.training import PretrainConfig, PretrainResult
from crate_mae.training.image_sets import image_sets
from crate_mae.training.precision import choose_device, cpu_threads
from crate_mae.training.run_folder import INSIDE, METRICS, SUMMARY
from crate_mae.training.validation import ValidationErrors, mask_noise
from crate_mae.visualizing import visualize

RANDOM_SEEDS = range(5)
"""Seeds of the encoders with random weights, with which the trained one is compared."""

FOLDS = 5
"""Folds of the cross-validation of classes."""

ROWS = 6
"""Photographs on the page."""

_BATCH = 20
"""Images that go through a model together."""


def summarise(result: PretrainResult, config: PretrainConfig) -> list[str]:
    """Draw summary.png, analysis.png and the page of ``visualize`` into the run's folder; returns lines on what they show.

    Classes are predicted for all images, each by the labels of others (cross-validation). Pre-training saw the training images,
    but no label. Without validation images nothing is drawn; without classes, or with too few images of one, they are left out.
    """
    train, val, *_ = image_sets(config)
    if result.errors is None or val is None:
        return []
    train, val = map(_readable, (train, val))
    with cpu_threads(config.run.threads):
        device = choose_device(config.run.device)
        model = load_model(config.out).to(device).eval()
        assert isinstance(model, CrateMAE)
        random = [random_model(model, seed).to(device) for seed in RANDOM_SEEDS]
        normalization = Normalization(config.images.mean, config.images.std, config.model.in_chans)
        shown = CentreCropped(val, config.model.image_shape, config.model.in_chans)
        analyses = analyze_models(
            {UNTRAINED: random[0], TRAINED: model}, lambda: standardised(model, shown, normalization, _BATCH)
        )
        sparsity = Sparsity(*(analyses[name].stacks["encoder"]["zeros"].mean for name in (TRAINED, UNTRAINED)))
        classes = _classes(model, random, train, val, normalization)
        chosen = spread(len(shown), ROWS)
        pixels = torch.stack([shown[index] for index in chosen])
        patches = math.prod(grid_of(config.model.image_shape, config.model.patch_size))
        page = summary_picture(
            model,
            pixels,
            normalization,
            mask_ratio=config.schedule.mask_ratio,
            noise=mask_noise(len(shown), patches, config.run.seed)[chosen],
            curves=_curves(config, result.errors),
            sparsity=sparsity,
            classes=classes,
            caption=(
                f"{config.model.depth} + {config.model.decoder_depth} layers, {count_parameters(model)[0]:,} parameters, "
                f"{config.schedule.epochs} epochs of {len(train)} photographs; those shown here were held out"
            ),
        )
        with replaced(config.out / SUMMARY) as file:
            page.save(file, format="PNG")
        described = description(config.out, model, val, "photographs that the run validated on", models=len(analyses))
        _, analysis = write_analysis(config.out, analyses, **described)
        inside, *_ = visualize(
            model,
            list(pixels),
            [Path(val.name(index)).name for index in chosen],
            normalization,
            config.out / INSIDE,
            mask_ratio=config.schedule.mask_ratio,
            seed=config.run.seed,
            title=f"Inside CRATE-MAE: {config.out}",
            caption=f"{config.out}: {model_in_words(config.out, model)}; photographs that the run validated on.",
        )
    return [
        f"On one page: {config.out / SUMMARY}",
        *([] if classes is None else _lines(classes)),
        *analysis_lines(analyses),
        f"Layer by layer: {analysis}. To look inside by clicking, open {inside}.",
    ]


def _readable(source: Source) -> Source:
    """The images of a source that can be read; all are tried, since the run may not have met all."""
    found = [index for index in range(len(source)) if isinstance(looked_at(source, index), Looked)]
    return Subset(source, found) if len(found) < len(source) else source


def _classes(
    model: CrateMAE, random: list[CrateMAE], train: Source, val: Source, normalization: Normalization
) -> Classes | None:
    labels = torch.from_numpy(np.concatenate([train.labels, val.labels])).long()
    if train.classes != val.classes or len(train.classes) < 2 or labels.bincount().min() < FOLDS:
        return None
    parts = [CentreCropped(source, model.config.image_shape, model.config.in_chans) for source in (train, val)]
    trained, *others = (
        class_accuracies(torch.cat([pooled_features(each, part, normalization) for part in parts]), labels, folds=FOLDS)
        for each in (model, *random)
    )
    return Classes(train.classes, len(labels), trained, others)


def _curves(config: PretrainConfig, errors: ValidationErrors) -> Curves:
    lines = [json.loads(line) for line in (config.out / METRICS).read_text(encoding="utf-8").splitlines()]
    training = [(line["epoch"], line["loss"]) for line in lines if "loss" in line]
    validation = [(line["epoch"], line["val_loss"]) for line in lines if "val_loss" in line]
    return Curves(training, validation, *errors[1:])


def _lines(classes: Classes) -> list[str]:
    said = [
        f"Of {classes.images} photographs in {len(classes.names)} classes, found by the encoder's mean token, {FOLDS}-fold:",
        f"                                    this model   random weights ({len(classes.random)} seeds)",
    ]
    for method, trained in classes.trained._asdict().items():
        random = [getattr(each, method) for each in classes.random]
        said.append(f"  {TITLES[method]:<34}{trained:>10.1%}   {fmean(random):.1%} +- {stdev(random):.1%}")
    return said
