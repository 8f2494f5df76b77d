"""The model card: README.md of a shared folder, in Markdown behind the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from crate_mae import __version__
from crate_mae.classifiers import Classifier
from crate_mae.comparing import ComparedRun
from crate_mae.config import ClassifierConfig, ModelConfig
from crate_mae.model import CrateMAE
from crate_mae.registry import count_parameters
from crate_mae.sharing.origin import Origin, Score
from crate_mae.state_dicts import one_line

LIBRARY = "crate-kernels"
CARD, CURVES = "README.md", "curves.png"
WRITTEN_BY = "Written by crate_mae"

_GUESSES = {
    "pretrain": {"mean_fill_loss": "the mean of the visible pixels", "blur_loss": "the best blur of them"},
    "finetune": {"guess_loss": "guessing"},
}
"""For each kind of run, the columns of its validations with the error of a guess without a model, and that guess in words."""

_A_PATH = re.compile(r"[^\s,]*/[^,]*?(?= ->|,|$)")
"""A path in a run's report of changed settings, such as "data /home/me/one -> /home/me/two, run.seed 0 -> 1"."""

_PAPERS = {"crate": "2306.01129", "crate_alpha": "2405.20299", "crate_mae": "2404.02446"}
_NAMES = {"crate": "A CRATE", "crate_alpha": "A CRATE-alpha", "crate_mae": "The encoder of a CRATE-MAE"}


def card(
    model: CrateMAE | Classifier,
    name: str,
    origin: Origin | None,
    *,
    has_transform: bool,
    classes: Sequence[str] | None = None,
    remark: str = "",
    license: str = "",
) -> str:
    """The text of a model card.

    Args:
        model: the model, without PyTorch's wrappers.
        name: the name under which others load it: a repository on the hub, or a folder.
        origin: what is known of its training; None for a model alone.
        has_transform: whether ``load_transform`` works with the folder.
        classes: the names of a classifier's classes.
        remark: a paragraph on where the model comes from.
        license: an identifier of the hub, such as "mit"; the card names no licence without it.
    """
    config = model.config
    parts = [
        f"---\n{yaml.safe_dump(_metadata(model, name, origin, license), sort_keys=False)}---",
        f"# {name.rpartition('/')[2]}",
        *([one_line(remark)] if remark else []),
        _in_words(model),
        *([f"Its classes, in the order of the logits: {one_line(', '.join(classes))}."] if classes else []),
        f"## Use\n\nWith {LIBRARY}[hub] installed, which has `crate_mae`:\n\n```python\n{_use(config, name, has_transform)}\n```",
        *_training(origin),
        *(_evaluation(origin.scores) if origin and origin.scores else ()),
        f"{WRITTEN_BY} {__version__}.",
    ]
    return "\n\n".join(parts) + "\n"


def _family(config: ModelConfig | ClassifierConfig) -> str:
    return config.family if isinstance(config, ClassifierConfig) else "crate_mae"


def _metadata(model: CrateMAE | Classifier, name: str, origin: Origin | None, license: str) -> dict[str, Any]:
    config = model.config
    classifies = isinstance(config, ClassifierConfig) and config.num_classes > 0
    tags = ["crate", _family(config).replace("_", "-"), "white-box", f"arxiv:{_PAPERS[_family(config)]}"]
    metadata: dict[str, Any] = {
        **({"license": license} if license else {}),
        "library_name": LIBRARY,
        "pipeline_tag": "image-classification" if classifies else "image-feature-extraction",
        "tags": list(dict.fromkeys(tags)),
    }
    if origin and origin.scores:
        results = [
            {
                "task": {"type": "image-classification", "name": score.method},
                "dataset": {"type": re.sub(r"[^\w.-]+", "-", score.data), "name": score.data},
                "metrics": [{"type": "accuracy", "value": round(score.top1, 4), "name": f"top-1, {score.method}"}],
            }
            for score in origin.scores
        ]
        metadata["model-index"] = [{"name": name.rpartition("/")[2], "results": results}]
    return metadata


def _in_words(model: CrateMAE | Classifier) -> str:
    config, (trained, _) = model.config, count_parameters(model)
    height, width = config.image_shape
    paper = f"[arXiv {_PAPERS[_family(config)]}](https://arxiv.org/abs/{_PAPERS[_family(config)]})"
    if isinstance(config, ModelConfig):
        kind = f"A CRATE-MAE ({paper}), a masked autoencoder"
        layers = f"{config.depth} encoder and {config.decoder_depth} decoder layers of {config.num_heads} heads"
        if config.decoder_num_heads != config.num_heads:
            layers += f" (the decoder's of {config.decoder_num_heads})"
        last = f"reconstructs {'standardised patches (norm_pix_loss)' if config.norm_pix_loss else 'pixels'}"
    else:
        head = f"with a head for {config.num_classes} classes" if config.num_classes else "without a head"
        kind = f"{_NAMES[config.family]} ({paper}) {head}"
        layers = f"{config.depth} layers of {config.num_heads} heads"
        last = f'pools tokens as "{config.pool}" says'
    return (
        f"{kind}: width {config.embed_dim}, {layers}, {trained:,} parameters. It sees images of {height} x {width} pixels "
        f"and {config.in_chans} channels, or others, in patches of {config.patch_size} x {config.patch_size}, and {last}. It was "
        f"trained with **lambda {config.lambd:g} and step size {config.step_size:g}**, without which its weights mean nothing; "
        f"`config.json` has them."
    )


def _use(config: ModelConfig | ClassifierConfig, name: str, has_transform: bool) -> str:
    if isinstance(config, ModelConfig):
        kind, made, shape = "CrateMAE", "tokens = model.encode", "1 + patches, width"
    else:
        kind, made, shape = "Classifier", "logits = model", "classes" if config.num_classes else "width"
    given, (height, width) = json.dumps(name), config.image_shape
    where = "" if "/" in name else "  # where this folder is, or its id on the hub"
    load = [f"model = crate_mae.{kind}.from_pretrained({given}){where}"]
    if has_transform:
        imported, images = ["from PIL import Image"], 'transform(Image.open("photo.jpg"))[None]'
        load += [f"transform = crate_mae.load_transform(crate_mae.download({given}))"]
    else:
        imported, images = [], f"torch.randn(1, {config.in_chans}, {height}, {width})"
    run = f"    {made}({images})  # [1, {shape}]"
    return "\n".join(["import crate_mae", "import torch", *imported, "", *load, "with torch.no_grad():", run])


def _training(origin: Origin | None) -> Iterator[str]:
    if origin is None or not (origin.recipe or origin.run):
        yield "## Training\n\nNothing is recorded of it here."
        return
    run = origin.run
    if data := origin.recipe.get("data"):
        batch = run.settings["schedule.batch_size"] if run else 0
        of_epoch = (
            f", {round(run.step / run.epochs):,} batches of {batch:,} images an epoch" if run and run.epochs else ""
        )
        start = f", from the weights of {origin.recipe['init']}" if "init" in origin.recipe else ", from random weights"
        val = f" Validated on {one_line(origin.recipe['val'])}." if origin.recipe.get("val") else ""
        yield f"## Data\n\nTrained on {one_line(data)}{of_epoch}{one_line(start)}.{val}"
    if origin.recipe:
        rows = [(name, value) for name, value in _flat(origin.recipe) if name not in ("data", "val", "init")]
        yield "## Recipe\n\n" + _table(("setting", "value"), ((f"`{name}`", _plain(value)) for name, value in rows))
    if run:
        curves = f"![Loss and validation error over steps, images and hours]({CURVES})"
        yield f"## Curves\n\n{' '.join(_course(run, origin))}\n\n{curves}"


def _course(run: ComparedRun, origin: Origin) -> Iterator[str]:
    hours = run.hours
    took = (
        f"{hours:.3g} hours" if hours >= 1 else f"{hours * 60:.3g} minutes" if hours * 60 >= 1 else "less than a minute"
    )
    batch = run.settings["schedule.batch_size"]
    yield f"The run {run.state}; it came to {run.step:,} steps of {batch:,} images, {took} of training."
    for start in run.starts:
        if start.changed:
            changed = one_line(_A_PATH.sub("(a path)", start.changed))
            yield f"Settings were changed at step {start.step:,}: {changed}; the recipe above has the last ones."
    if origin.step is not None:
        which = "the best validation" if origin.best else "the last that was saved"
        yield f"The weights are those of step {origin.step:,}, {which}."
    measured = run.best if origin.best else run.last
    if measured is None:
        return
    values = measured.values
    if run.kind == "finetune":
        error = f"top-1 {values['val_top1']:.1%}, cross-entropy {values['val_loss']:.4f} on validation images"
    else:
        error = f"mean squared error {values['val_loss']:.4f} on removed patches of validation images, in standardised pixels"
    beside = [f"{title} {values[name]:.4f}" for name, title in _GUESSES[run.kind].items() if name in values]
    guesses = f" (without a model: {', '.join(beside)})" if beside else ""
    yield f"At step {measured.step:,}: {error}{guesses}."


def _evaluation(scores: Sequence[Score]) -> Iterator[str]:
    rows = [
        (
            score.method,
            score.data,
            f"{score.train:,} / {score.test:,}",
            f"{score.top1:.1%}",
            _untrained(score),
        )
        for score in scores
    ]
    told = f"By `crate-mae evaluate`, of these weights; {' / '.join(dict.fromkeys(score.features for score in scores))}"
    yield f"## Evaluation\n\n{told}:\n\n" + _table(
        ("method", "images", "learnt from / tested on", "top-1", "top-1 of random weights"), rows
    )


def _untrained(score: Score) -> str:
    if score.untrained is None:
        return ""
    deviation = "" if score.deviation is None else f" +- {score.deviation:.1%}, {score.seeds} models"
    return f"{score.untrained:.1%}{deviation}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value: Any) -> str:
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else one_line(f"{value}")


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
