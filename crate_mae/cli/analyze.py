"""`crate-mae analyze`: what each layer of a run's model does to tokens, in numbers and on one page."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from crate_mae.analysis import Analysis
from crate_mae.analyzing import (
    analysis_lines,
    analyze_models,
    description,
    model_in_words,
    random_model,
    write_analysis,
)
from crate_mae.cli.parsers import add_device, command_parser
from crate_mae.cli.pretraining import config_of
from crate_mae.cli.runs import check_run, is_run, model_of, normalization_of
from crate_mae.cli.settings import path_of
from crate_mae.config import ModelConfig
from crate_mae.data import CentreCropped, Source, Subset, UnreadableImage, open_source, spread
from crate_mae.data.progress import Progress, say
from crate_mae.data.unreadable import Unreadable, by_cause
from crate_mae.model import CrateMAE
from crate_mae.pictures.layers import TRAINED, UNTRAINED
from crate_mae.training.config import PretrainConfig
from crate_mae.training.image_sets import image_sets, of_option
from crate_mae.training.precision import choose_device, cpu_threads
from crate_mae.training.run_folder import IMAGES, STATES, refuse_unwritable
from crate_mae.training.states import SavedState, load_state_weights, saved_states

HELP = "Measure what each layer of a run's model does to tokens."


def make_parser() -> ArgumentParser:
    """The parser of `analyze`."""
    parser = command_parser(
        "Measures layer by layer how far tokens are compressed and made sparse, and what attention looks at; "
        "writes analysis.json and analysis.png.",
    )
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="Folder of a run, or of a model alone, which needs --data."
    )
    parser.add_argument(
        "--data",
        type=str,
        help="Images, as --data of pretrain names them; of a data set in parts, val/. By default, those that the run "
        "validated on, else those that it trained on.",
    )
    parser.add_argument("--images", type=int, default=200, help="Most images, spread evenly over those that there are.")
    parser.add_argument("--untrained", type=bool, default=True, help="Show a model with random weights, too.")
    parser.add_argument("--states", action="store_true", help="Show the states that the run has kept, too.")
    parser.add_argument("--out", type=Path, help="Folder for the files; by default, RUN.")
    add_device(parser)
    parser.add_argument("--batch_size", type=int, default=20, help="Images at once: fewer need less memory.")
    return parser


def run(parser: ArgumentParser, chosen: Namespace) -> str:
    """Write the analysis; returns what to print.

    Raises:
        OSError: there is no such run, or there are no such images, or the files cannot be written.
        ValueError: an argument cannot be used, or a model's values are not finite; the message names it.
        MissingLibrary: an ImportError: one that the images need is not installed.
    """
    asked = chosen.analyze
    folder, out = path_of(str(asked.run)), path_of(str(asked.out or asked.run))
    for name in ("images", "batch_size"):
        if asked[name] < 1:
            raise ValueError(f"--{name}: expected 1 or more, got {asked[name]}")
    check_run(folder)
    device = choose_device(asked.device, "--device")
    normalization = normalization_of(folder)
    model = model_of(folder).to(device).eval()
    refuse_unwritable(out)
    config = config_of(folder) if is_run(folder) else None
    if config is None and (asked.data is None or asked.states):
        lacking = "images: name some by --data" if asked.data is None else "states: leave out --states"
        raise ValueError(f"{folder} holds a model alone, without {lacking}")
    source, which, images, unreadable = _images(folder, model.config, config, asked.data, asked.images)
    states = list(reversed(saved_states(folder / STATES))) if asked.states else []
    analyses: dict[str, Analysis] = {}
    # As many threads as the run had: small models are slower on two if something else computes, too.
    threads = min(config.run.threads if config else 0, os.cpu_count() or 1)
    with cpu_threads(threads), Progress((1 + asked.untrained + len(states)) * len(images), "analyze", say) as progress:

        def batches() -> Iterator[Tensor]:
            return (normalization(part.to(device)) for part in torch.stack(images).split(asked.batch_size))

        def measure(name: str, of: CrateMAE) -> None:
            analyses.update(analyze_models({name: of}, batches, done=progress.update))

        # One after the other, so that no more than two models take memory.
        if asked.untrained:
            measure(UNTRAINED, random_model(model).to(device))
        for saved in states:
            try:
                measure(*_of_state(saved, model, config))
            except ValueError as error:
                say(f"passed over {saved.path}: {error}")
                progress.update(len(images), done_before=True)
        try:
            measure(TRAINED, model)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    if asked.states and not analyses.keys() - {TRAINED, UNTRAINED}:
        say(
            f"there is no other state in {folder / STATES} to show; --run.save_every, --run.keep_states and --run.keep_every of "
            "pretrain say which are saved and kept"
        )
    described = description(folder, model, source, which, models=len(analyses), unreadable=unreadable)
    numbers, picture = write_analysis(out, analyses, **described)
    return "\n".join(
        [
            *analysis_lines(analyses),
            f"{folder}: {model_in_words(folder, model)}.",
            f"Look at {picture}; all numbers are in {numbers}.",
        ]
    )


class _Images(NamedTuple):
    """The images to analyse.

    Attributes:
        source: the images that can be read.
        which: what they are, in words.
        pixels: of each, at the model's size.
        unreadable: how many more cannot be read.
    """

    source: Source
    which: str
    pixels: list[Tensor]
    unreadable: int


def _images(folder: Path, model: ModelConfig, config: PretrainConfig | None, data: str | None, most: int) -> _Images:
    """At most `most` images, spread evenly over those of --data, or else of the run; read once for all models."""
    if data is not None:
        with of_option("--data"):
            source, which = open_source(data, part="val"), f"images of {data}"
    else:
        assert config is not None
        source, which = _images_of(folder, config)
    taken = spread(len(source), most)
    cropped = CentreCropped(source, model.image_shape, model.in_chans)
    found, pixels, unreadable = [], [], []
    for index in taken:
        try:
            pixels.append(cropped[index])
            found.append(index)
        except UnreadableImage as error:
            unreadable.append(Unreadable.of(error))
    if unreadable:
        left_out = f"{len(unreadable):,} of {len(taken):,} images cannot be read ({by_cause(unreadable)})"
        if not found:
            where = f"the images of {folder}" if data is None else "--data"
            raise ValueError(f"{where}: {left_out}; the first is {unreadable[0].name} ({unreadable[0].reason})")
        say(f"{left_out} and are left out; crate-mae check lists such images")
    say(f"analyze: {len(found):,} of the {len(source):,} {which}")
    return _Images(Subset(source, found), which, pixels, len(unreadable))


def _images_of(folder: Path, config: PretrainConfig) -> tuple[Source, str]:
    """The images on which the run in a folder validated, or else trained, and what they are in words."""
    # No cache of all decoded images: few of them are needed.
    few = dataclasses.replace(config.images, cache_mb=0)
    try:
        sets = image_sets(dataclasses.replace(config, out=folder, init=None, images=few), folder / IMAGES)
    except (OSError, ValueError) as error:
        raise type(error)(f"the images of the run in {folder}: {error}; --data names others") from error
    for said in sets.said:
        say(said)
    if sets.val is None:
        return sets.train, "images that the run trained on, as it validated on none"
    return sets.val, "images that the run validated on"


def _of_state(saved: SavedState, trained: CrateMAE, config: PretrainConfig | None) -> tuple[str, CrateMAE]:
    """The name of a state, "epoch N" or "step N", and its model.

    Raises:
        ValueError: it cannot be shown.
    """
    assert config is not None
    model = CrateMAE(trained.config).eval()
    images = load_state_weights(saved, model)
    model.to(next(trained.parameters()).device)
    weights = model.state_dict()
    if all(value.equal(weights[name]) for name, value in trained.state_dict().items()):
        raise ValueError("it is the trained model itself")
    epoch, rest = divmod(saved.step, max(1, images // int(config.schedule.batch_size)))
    name = f"step {saved.step}" if rest else f"epoch {epoch}"
    return f"{name}, diverging" if saved.diverging else name, model
