"""Measures what models have learnt by how well their features tell classes apart; for ``crate-mae evaluate``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crate_mae import __version__
from crate_mae.backbone import Backbone
from crate_mae.checkpoints import load_model
from crate_mae.data import CentreCropped, LabelledParts, Normalization, Source, UnreadableImage
from crate_mae.data.progress import Progress
from crate_mae.data.unreadable import Unreadable, by_cause
from crate_mae.evaluation import METHODS, FeatureSpec, Scores, features_of
from crate_mae.evaluation.cache import Features, cached, fingerprint_of
from crate_mae.evaluation.classes import TITLES
from crate_mae.evaluation.features import extract
from crate_mae.evaluation.scores import score
from crate_mae.files import make_folder, replaced
from crate_mae.finetuning import FinetuneConfig, finetune
from crate_mae.pictures.classes import classes_picture
from crate_mae.training.precision import autocast, choose_device
from crate_mae.training.run_folder import EVALUATION, EVALUATION_PICTURE, has_state

_SHOWN = 20
"""The table shows so many classes: all, or the half that is found most often and the half that is found least."""


class How(NamedTuple):
    """How features are made.

    Attributes:
        spec: which features.
        batch_size, num_workers: images that go through a model together, and processes that load them; results do not depend on
            either.
        precision: "float32" or "bfloat16", as in training.
    """

    spec: FeatureSpec
    batch_size: int = 50
    num_workers: int = 0
    precision: str = "float32"


def evaluate_features(
    model: Backbone,
    parts: LabelledParts,
    normalization: Normalization,
    methods: Sequence[str],
    how: How,
    *,
    cache: Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
    name: str = "features",
) -> dict[str, Scores]:
    """Scores of the methods on the test images, with features of the training images to learn from.

    The model sees the largest centred part of each image, resized to its image size. Unreadable images are left out, and a line
    says so.

    Args:
        model: whose features are made.
        parts: images to learn from, and to test on.
        normalization: of the images.
        methods: names among ``METHODS``.
        how: features are made.
        cache: folder in which features are kept, and looked up first; None for neither.
        seed: of the random choice of images that the linear probe holds out.
        say: takes a line for the user.
        name: of the model, for the progress bar.

    Raises:
        OSError: the features cannot be written.
        ValueError: no image can be read, features are not finite, or the model has not got the layers.
    """
    made = {}
    for part, source in (("train", parts.train), ("test", parts.test)):
        features = _features(model, source, normalization, how, cache, f"{part}.safetensors", say, f"{name}, {part}")
        labels = torch.from_numpy(source.labels).long()[features.indices]
        made[part] = features.values.to(next(model.parameters()).device), labels
    device = made["train"][0].device
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        arguments = [each for features, labels in made.values() for each in (features, labels.to(device))]
        found = {method: _of_all_classes(METHODS[method](*arguments), len(parts.train.classes)) for method in methods}
    for each in caught:
        say(f"{name}: {each.message}")
    return found


def _of_all_classes(scores: Scores, classes: int) -> Scores:
    """The scores with rows and columns for the last classes, too, if no image of these could be read."""
    lacking = classes - len(scores.confusion)
    if not lacking:
        return scores
    confusion = torch.nn.functional.pad(scores.confusion, (0, lacking, 0, lacking))
    return Scores(scores.top1, scores.top5, confusion, scores.chosen, scores.tried)


def _features(
    model: Backbone,
    source: Source,
    normalization: Normalization,
    how: How,
    cache: Path | None,
    file: str,
    say: Callable[[str], None],
    what: str,
) -> Features:
    config, device = model.config, next(model.parameters()).device
    images = CentreCropped(source, config.image_shape, config.in_chans)
    unreadable: list[UnreadableImage] = []

    def forward(batch: Tensor) -> Tensor:
        with autocast(how.precision, device):
            return features_of(model, batch, how.spec)

    def make() -> Features:
        with Progress(len(images), what, say) as progress:
            made = extract(
                forward,
                images,
                normalization,
                device,
                batch_size=how.batch_size,
                num_workers=how.num_workers,
                unreadable=unreadable.extend,
                done=progress.update,
            )
        return Features(*made)

    if cache is None:
        features = make()
    else:
        fingerprint = fingerprint_of(model, images, normalization, how.spec, how.precision)
        features, _ = cached(cache / f"{fingerprint[:16]}_{file}", fingerprint, make)
    if left_out := len(images) - len(features.indices):
        causes = f" ({by_cause(map(Unreadable.of, unreadable))})" if unreadable else ""
        say(
            f"{left_out:,} of {len(images):,} images cannot be read{causes} and are left out; crate-mae check lists such images"
        )
    return features


def evaluate_finetuned(config: FinetuneConfig, parts: LabelledParts, how: How, *, overwrite: bool = False) -> Scores:
    """Scores of a classifier that is fine-tuned end to end, on the test images.

    The last model is scored, not the best one, so that test images choose nothing. A fine-tuning in ``config.out`` that was
    interrupted goes on, and one that was finished is not done again.

    Args:
        config: the fine-tuning; its ``data`` and ``val`` name the images of ``parts.train`` and ``parts.test``.
        parts: images to learn from, and to test on.
        how: precision and batch size of the scoring.
        overwrite: fine-tune anew.

    Raises:
        Exception: as of ``finetuning.finetune``.
    """
    done = finetune(config, resume=not overwrite and has_state(config.out), overwrite=overwrite)
    model = load_model(config.out)
    device = choose_device(config.run.device)
    model.to(device).eval()
    images = CentreCropped(parts.test, model.config.image_shape, model.config.in_chans)
    normalization = Normalization(config.images.mean, config.images.std, model.config.in_chans)

    @torch.no_grad()
    def forward(batch: Tensor) -> Tensor:
        with autocast(how.precision, device):
            return model(batch).float()

    logits, indices = extract(
        forward, images, normalization, device, batch_size=how.batch_size, unreadable=lambda errors: None
    )
    # The model may number the classes in another order, and may have more of them.
    columns = [done.classes.index(name) for name in parts.train.classes]
    labels = torch.from_numpy(parts.test.labels).long()[indices]
    return score(logits[:, columns], labels, chosen={"epochs": done.epochs})


class Results(NamedTuple):
    """The results of an evaluation.

    Attributes:
        runs: scores by the name of the run, then by method.
        untrained: likewise, of models with random weights, by "seed N".
        classes: the names of the classes, in the order of their numbers.
        about: what else a reader should know, in plain values.
    """

    runs: Mapping[str, Mapping[str, Scores]]
    untrained: Mapping[str, Mapping[str, Scores]]
    classes: list[str]
    about: dict[str, Any]

    @property
    def methods(self) -> list[str]:
        return list(next(iter(self.runs.values())))


def write_evaluation(folder: Path, results: Results, *, caption: str) -> tuple[Path, Path]:
    """Write ``evaluation.json`` and ``evaluation.png`` into a folder, which is made if it is not there; returns their paths.

    Raises:
        OSError: a file cannot be written; former files are still there.
    """
    content = {
        "versions": {"crate_mae": __version__, "torch": torch.__version__},
        **results.about,
        "summary": {method: _summary(results, method) for method in results.methods},
        **{
            kind: {
                name: {m: scores.to_dict(results.classes) for m, scores in of.items()} for name, of in models.items()
            }
            for kind, models in (("runs", results.runs), ("untrained", results.untrained))
        },
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    picture = classes_picture(results.runs, results.untrained, results.classes, caption=caption)
    paths = folder / EVALUATION, folder / EVALUATION_PICTURE
    make_folder(folder)
    with replaced(*paths, alone=False) as (of_numbers, of_picture):
        of_numbers.write(text.encode())
        picture.save(of_picture, format="PNG")
    return paths


def evaluation_lines(results: Results) -> list[str]:
    """A table of the methods, then one of the classes."""
    has_top5 = len(results.classes) > 5
    headings = ["top-1", *(["top-5"] if has_top5 else []), "class mean"]
    if results.untrained:
        headings.append("top-1 untrained")
    several = {"runs": len(results.runs), "models with random weights": len(results.untrained)}
    over = " and ".join(f"{count} {what}" for what, count in several.items() if count > 1)
    lines = [
        f"Test images whose class is found{f' (+- standard deviation over {over})' if over else ''}:",
        f"  {'':<22}" + "".join(f"{each:>18}" for each in headings),
    ]
    for method in results.methods:
        of_runs = [of[method] for of in results.runs.values()]
        cells = [_told([scores.top1 for scores in of_runs])]
        cells += [_told([scores.top5 for scores in of_runs if scores.top5 is not None])] if has_top5 else []
        cells.append(_told([scores.class_mean for scores in of_runs]))
        if results.untrained:
            cells.append(_told([of[method].top1 for of in results.untrained.values()]))
        chosen = _chosen(of_runs[0]) if len(of_runs) == 1 else ""
        lines.append(f"  {TITLES[method]:<22}" + "".join(f"{cell:>18}" for cell in cells) + chosen)
    return lines + _class_lines(results)


def _class_lines(results: Results) -> list[str]:
    """A table of the share of images of each class that is found; of many classes, the best and the worst."""
    shares = {
        method: [
            _mean([of[method].of_classes[number] for of in results.runs.values()])
            for number in range(len(results.classes))
        ]
        for method in results.methods
    }
    first = {number: share for number, share in enumerate(shares[results.methods[0]]) if share is not None}
    order = sorted(first, key=first.__getitem__, reverse=True)
    lines = [f"  {'class':<22}" + "".join(f"{TITLES[method]:>24}" for method in results.methods)]
    shown: Sequence[int | None] = order
    if len(order) > _SHOWN:
        shown = [*order[: _SHOWN // 2], None, *order[-_SHOWN // 2 :]]
    for number in shown:
        if number is None:
            lines.append(f"  ... and {len(order) - _SHOWN} classes between them, which are in {EVALUATION}")
            continue
        cells = "".join(f"{of[number]:>24.1%}" for of in shares.values())
        lines.append(f"  {results.classes[number][:22]:<22}{cells}")
    return lines


def _summary(results: Results, method: str) -> dict[str, Any]:
    """Means and standard deviations of top-1, over runs and over random weights."""
    summary: dict[str, Any] = {}
    for kind, models in (("runs", results.runs), ("untrained", results.untrained)):
        values = [of[method].top1 for of in models.values()]
        if values:
            deviation = stdev(values) if len(values) > 1 else None
            summary[kind] = {"count": len(values), "top1": fmean(values), "standard_deviation": deviation}
    return summary


def _told(values: Sequence[float]) -> str:
    return f"{fmean(values):.1%}" + (f" +- {stdev(values):.1%}" if len(values) > 1 else "")


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _chosen(scores: Scores) -> str:
    told = ", ".join(f"{name} {value:g}" for name, value in scores.chosen.items())
    return f"   ({told})" if told else ""
