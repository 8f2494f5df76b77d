"""The model card: README.md of a shared folder, in Markdown behind the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from crate_mae import __version__
from crate_mae.classifiers import Classifier
from crate_mae.comparing import GUESSES, ComparedRun
from crate_mae.config import ClassifierConfig, ModelConfig
from crate_mae.evaluation.classes import TITLES
from crate_mae.model import CrateMAE
from crate_mae.registry import count_parameters
from crate_mae.sharing.origin import Origin, Score

LIBRARY = "crate-kernels"
CARD, CURVES = "README.md", "curves.png"

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
        model: a plain one.
        name: under which others load it: of a repository on the hub, or of a folder.
        origin: what is known of its training; None of a model alone.
        has_transform: whether ``load_transform`` works of the folder.
        classes: of a classifier, by name.
        remark: a paragraph on where it comes from.
        license: an identifier of the hub, such as "mit"; without one the card says none.
    """
    config = model.config
    parts = [
        f"---\n{yaml.safe_dump(_metadata(model, name, origin, license), sort_keys=False)}---",
        f"# {name.rpartition('/')[2]}",
        *([remark] if remark else []),
        _in_words(model),
        *([f"Its classes, in the order of the logits: {', '.join(classes)}."] if classes else []),
        f"## Use\n\n`pip install {LIBRARY}`, then\n\n```python\n{_use(config, name, has_transform)}\n```",
        *_training(origin),
        *(_evaluation(origin.scores) if origin and origin.scores else ()),
        f"Written by crate_mae {__version__}.",
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
                "task": {"type": "image-classification", "name": TITLES[score.method]},
                "dataset": {"type": score.data, "name": score.data},
                "metrics": [
                    {"type": "accuracy", "value": round(score.top1, 4), "name": f"top-1, {TITLES[score.method]}"}
                ],
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
    kind = "CrateMAE" if isinstance(config, ModelConfig) else "Classifier"
    call, result = ("encode", "tokens") if kind == "CrateMAE" else ("__call__", "logits")
    run = f"model.{call}" if call != "__call__" else "model"
    lines = ["import crate_mae", "import torch"]
    if has_transform:
        lines += ["from PIL import Image", ""]
        images = 'transform(Image.open("photo.jpg"))[None]'
        load = [f'transform = crate_mae.load_transform(crate_mae.download("{name}"))']
    else:
        height, width = config.image_shape
        lines, images, load = [*lines, ""], f"torch.randn(1, {config.in_chans}, {height}, {width})", []
    shape = "# [1, 1 + patches, width]" if result == "tokens" else "# [1, classes]"
    lines += [f'model = crate_mae.{kind}.from_pretrained("{name}")', *load]
    return "\n".join([*lines, "with torch.no_grad():", f"    {result} = {run}({images})  {shape}"])


def _training(origin: Origin | None) -> Iterator[str]:
    if origin is None or not (origin.recipe or origin.run):
        yield "## Training\n\nNothing is recorded of it here."
        return
    run = origin.run
    if data := origin.recipe.get("data"):
        of_epoch = f": {round(run.images / run.epochs):,} images an epoch" if run and run.epochs else ""
        start = f", from the weights of {origin.recipe['init']}" if "init" in origin.recipe else ", from random weights"
        yield f"## Data\n\nTrained on {data}{of_epoch}{start}."
    if origin.recipe:
        rows = [(name, value) for name, value in _flat(origin.recipe) if name not in ("data", "init")]
        yield "## Recipe\n\n" + _table(("setting", "value"), ((f"`{name}`", _plain(value)) for name, value in rows))
    if run:
        yield f"## Curves\n\n{_course(run, origin.best)}\n\n![Loss and validation error over steps, images and hours]({CURVES})"


def _course(run: ComparedRun, best: bool) -> str:
    took = f"{run.hours:.3g} hours" if run.hours >= 1 else f"{run.hours * 60:.3g} minutes"
    done = f"{run.step:,} steps of {run.settings['schedule.batch_size']:,} images, {run.epochs:.4g} epochs, {took} of training"
    if not run.validations:
        return f"{done}."
    # As each kind of run chooses its best model.
    rank = ("val_top1", "val_loss") if run.kind == "finetune" else ("val_loss",)
    measured = run.validations[-1]
    if best:
        measured = min(
            run.validations,
            key=lambda reading: [reading.values[name] * (-1 if name == "val_top1" else 1) for name in rank],
        )
    error = f"validation error {measured.values['val_loss']:.4f} at step {measured.step:,}"
    if "val_top1" in measured.values:
        error = f"top-1 {measured.values['val_top1']:.1%}, {error}"
    name, guess = GUESSES[run.kind]
    beside = f" (of {guess}: {measured.values[name]:.4f})" if name in measured.values else ""
    which = "This is the model of the best validation" if best else "This is the last model"
    return f"{done}. {which}: {error}{beside}."


def _evaluation(scores: Iterable[Score]) -> Iterator[str]:
    rows = [
        (
            TITLES[score.method],
            score.data,
            f"{score.train:,} / {score.test:,}",
            f"{score.top1:.1%}",
            "" if score.untrained is None else f"{score.untrained:.1%}",
        )
        for score in scores
    ]
    yield "## Evaluation\n\nBy `crate-mae evaluate`, of these weights:\n\n" + _table(
        ("method", "images", "learnt from / tested on", "top-1", "top-1 of random weights"), rows
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value: Any) -> str:
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else f"{value}"


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
