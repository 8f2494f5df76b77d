"""Compares what the layers of several models do to images, and writes the results; for ``crate-mae analyze`` and the demo."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from crate_mae import __version__
from crate_mae.analysis import MEASURES, OFFICIAL_EPS, Analysis, analyze
from crate_mae.classifiers import Classifier, model_of
from crate_mae.data import Source
from crate_mae.files import make_folder, replaced
from crate_mae.model import CrateMAE
from crate_mae.pictures.layers import TRAINED, UNTRAINED, layers_picture
from crate_mae.registry import count_parameters
from crate_mae.training.run_folder import ANALYSIS, ANALYSIS_PICTURE, progress

_COLUMNS = {
    "coding_rate_before": ("R^c before", "{:.1f}"),
    "coding_rate_after": ("after MSSA", "{:.1f}"),
    "token_coding_rate": ("R of tokens", "{:.1f}"),
    "zeros": ("zeros", "{:.1%}"),
    "effective_rank": ("rank", "{:.1f}"),
    "coherence": ("coherence", "{:.3f}"),
}
"""The columns of the table: measure, heading and format."""


def model_in_words(run: Path, model: CrateMAE) -> str:
    """The sizes of a run's model, and how far its training has come if its folder tells."""
    config, trained = model.config, progress(run)
    return (
        f"{f'trained for {trained}, ' if trained else ''}{config.depth} + {config.decoder_depth} layers of width "
        f"{config.embed_dim}, {count_parameters(model)[0]:,} parameters"
    )


@overload
def random_model(like: CrateMAE, seed: int = 0) -> CrateMAE: ...
@overload
def random_model(like: Classifier, seed: int = 0) -> Classifier: ...
def random_model(like: CrateMAE | Classifier, seed: int = 0) -> CrateMAE | Classifier:
    """A model of the same configuration with random weights, the same for one seed, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_of(like.config).eval()


def analyze_models(
    models: Mapping[str, CrateMAE],
    batches: Callable[[], Iterable[Tensor]],
    *,
    done: Callable[[int], None] = lambda images: None,
) -> dict[str, Analysis]:
    """``crate_mae.analysis.analyze`` of each model on the same images.

    Args:
        models: by name; they keep their device and mode.
        batches: called for each model; gives the images as the model takes them, where the models are.
        done: told how many images each batch had, for a progress bar over images times models.

    Raises:
        ValueError: there are no images, or a model's values are not finite; the message names the model.
    """
    analyses = {}
    for name, model in models.items():
        try:
            analyses[name] = analyze(model, batches(), done=done)
        except ValueError as error:
            raise ValueError(f"the {name} model: {error}") from error
    return analyses


def write_analysis(
    folder: Path, analyses: Mapping[str, Analysis], *, caption: str, about: dict[str, Any]
) -> tuple[Path, Path]:
    """Write ``analysis.json`` and ``analysis.png`` into a folder, which is made if it is not there; returns their paths.

    The JSON holds ``about``, ``versions``, ``definitions`` (``measures``, ``eps``) and ``models``: for each its
    ``Analysis.to_dict()``. It has no NaN and no infinity.

    Args:
        folder: to write to.
        analyses: by the name of the model, as for ``layers_picture``.
        caption: of the picture, as for ``layers_picture``.
        about: what else a reader should know, in plain values, such as which images; its ``definitions`` are added to those here.

    Raises:
        OSError: a file cannot be written; former files are still there.
        ValueError: there are no analyses, or a number is not finite.
    """
    definitions = {"measures": MEASURES, "eps": OFFICIAL_EPS, **about.get("definitions", {})}
    content = {
        "versions": {"crate_mae": __version__, "torch": torch.__version__},
        **about,
        "definitions": definitions,
        "models": {name: analysis.to_dict() for name, analysis in analyses.items()},
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    picture = layers_picture(analyses, caption=caption)
    paths = folder / ANALYSIS, folder / ANALYSIS_PICTURE
    make_folder(folder)
    with replaced(*paths, alone=False) as (of_numbers, of_picture):  # two processes may analyze one run at once
        of_numbers.write(text.encode())
        picture.save(of_picture, format="PNG")
    return paths


def description(
    run: Path, model: CrateMAE, source: Source, which: str, *, models: int, unreadable: int = 0
) -> dict[str, Any]:
    """``caption`` and ``about``, as ``write_analysis`` takes them.

    Args:
        run: the run's folder.
        model: of the run.
        source, which: the images, and what they are in words, such as "images that the run validated on".
        models: how many models are compared.
        unreadable: images that were left out.
    """
    config, names = model.config, [source.name(index) for index in range(len(source))]
    bars = "error bars (trained and untrained)" if models > 2 else "error bars"
    caption = (
        f"{run.absolute().name}: {model_in_words(run, model)}, lambda {config.lambd:g}; means over {len(names)} {which}, whole; "
        f"{bars}: standard deviation over images"
    )
    images = {
        "count": len(names),
        "which": which,
        "unreadable": unreadable,
        "names": names,
        "size": list(config.image_shape),
    }
    about = {"run": str(run.absolute()), "images": images, "definitions": {"lambda": config.lambd}}
    return {"caption": caption, "about": about}


def analysis_lines(analyses: Mapping[str, Analysis]) -> list[str]:
    """A table of the first and the last layer of each stack; and how coding rate and sparsity change with depth."""
    order = sorted(analyses, key=lambda name: (name != TRAINED, name == UNTRAINED))
    compared = {name: analyses[name] for name in order}
    headings = "".join(f"{heading:>13}" for heading, _ in _COLUMNS.values())
    lines = [f"First and last layer, means over images; coding rates in nats:\n{'':<32}{headings}"]
    stacks = next(iter(compared.values())).stacks
    for stack, measures in stacks.items():
        count = len(measures["zeros"].mean)
        for layer in sorted({0, count - 1}):
            for place, (name, analysis) in enumerate(compared.items()):
                of_stack = analysis.stacks[stack]
                where = "" if place else f"{stack} layer {layer + 1}"
                cells = "".join(f"{form.format(of_stack[m].mean[layer]):>13}" for m, (_, form) in _COLUMNS.items())
                lines.append(f"  {where:<18}{name:<12}{cells}")
    told = [name for name in (TRAINED, UNTRAINED) if name in analyses] or list(analyses)
    return lines + [_with_depth(name, analyses[name]) for name in told if "encoder" in analyses[name].stacks]


def _with_depth(name: str, analysis: Analysis) -> str:
    """A sentence on coding rate and sparsity over the layers of a model's encoder."""
    encoder = analysis.stacks["encoder"]
    before, after, zeros = (encoder[m].mean for m in ("coding_rate_before", "coding_rate_after", "zeros"))
    compressing = sum(end < start for start, end in zip(before, after, strict=True))
    said = f"In the {name} encoder MSSA lowers R^c in {compressing} of {len(after)} layers"
    if len(after) == 1:
        return f"{said}; one layer has no trend with depth."
    return (
        f"{said}; from layer 1 to {len(after)}, R^c after MSSA {_trend(after, '{:.1f}')}, "
        f"and the share of zeros {_trend(zeros, '{:.1%}')}."
    )


def _trend(values: Sequence[float], form: str) -> str:
    """First and last value, and in how many steps from layer to layer it moves in that direction: "falls from 3.0 to 1.0 (in 2 of
    2 steps)"."""
    first, last = form.format(values[0]), form.format(values[-1])
    if values[0] == values[-1]:
        return f"ends as it began, at {last}"
    falls = values[-1] < values[0]
    same = sum((after < before) if falls else (after > before) for before, after in pairwise(values))
    return f"{'falls' if falls else 'rises'} from {first} to {last} (in {same} of {len(values) - 1} steps)"
