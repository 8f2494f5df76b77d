"""The classifier from which a fine-tuning starts: with the encoder of a trained model, or with random weights."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from crate_mae.checkpoints import load_model
from crate_mae.classifiers import Classifier, classifier_of, model_of
from crate_mae.config import ClassifierConfig, ModelConfig, grid_of
from crate_mae.model import CrateMAE
from crate_mae.state_dicts import fitting, plain_names, read_weights

_OWN = ("num_classes", "pool", "img_size", "lambd", "step_size")
"""Settings in which the classifier may differ from the model it starts from."""


def starting_classifier(config: ClassifierConfig, init: Path | None) -> Classifier:
    """The classifier of a configuration, with the encoder of `init` and a fresh head; without `init`, with random weights.

    Args:
        config: of the classifier.
        init: the folder of a CRATE-MAE run or of a classifier, or a file with the weights of either. Family and sizes must be
            those of the configuration. Its head is not taken.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it cannot be read, or its encoder is another.
        RuntimeError: the weights do not fit the model.
    """
    model = model_of(config)
    if init is None:
        return model
    trained = load_model(init) if init.is_dir() else _of_file(config, init)
    made = classifier_of(trained, config.num_classes, pool=config.pool, img_size=config.img_size)
    for field in dataclasses.fields(ClassifierConfig):
        found, wanted = getattr(made.config, field.name), getattr(config, field.name)
        if found != wanted and field.name not in _OWN:
            raise ValueError(f"{init}: the model there has {field.name} {found}, and this one {wanted}")
    model.load_state_dict(made.state_dict())
    return model


def _of_file(config: ClassifierConfig, path: Path) -> CrateMAE | Classifier:
    """The model in a file of weights; the configuration tells what weights do not. Errors as of ``fitting``."""
    weights = plain_names(read_weights(path), path)
    head = f"{model_of(dataclasses.replace(config, depth=0)).head_name}.weight"
    model: CrateMAE | Classifier
    if config.family == "crate_mae" and head not in weights:
        model = CrateMAE(_mae_config(config, weights))
    else:
        classes = len(weights[head]) if head in weights and weights[head].ndim else 0
        pool = config.pool
        if config.family == "crate_mae":
            pool = "mean" if "fc_norm.weight" in weights else "cls"
        model = model_of(
            dataclasses.replace(config, num_classes=classes, pool=pool, img_size=_trained_size(config, weights))
        )
    own = ("decoder_pos_embed",) if config.family == "crate_mae" else ()
    model.load_state_dict(fitting(weights, model, path, own=own))
    return model


def _mae_config(config: ClassifierConfig, weights: Mapping[str, Tensor]) -> ModelConfig:
    """The configuration of the CRATE-MAE with these weights, which tell the depth of its decoder."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    shared = {name: value for name, value in vars(config).items() if name in names}
    layers = {match[1] for name in weights if (match := re.match(r"decoder_blocks\.([0-9]+)\.", name))}
    return ModelConfig(**shared, decoder_depth=len(layers), decoder_num_heads=config.num_heads)


def _trained_size(config: ClassifierConfig, weights: Mapping[str, Tensor]) -> int | tuple[int, int]:
    """The image size for which positions were learned: the configured one if it has as many patches, else a square."""
    positions = weights.get("pos_embedding")
    if positions is None or positions.ndim != 3:
        return config.img_size
    patches = positions.shape[1] - 1
    side = math.isqrt(max(patches, 1))
    if patches == math.prod(grid_of(config.image_shape, config.patch_size)) or side * side != patches:
        return config.img_size
    return side * config.patch_size
