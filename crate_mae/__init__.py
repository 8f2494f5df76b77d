"""CRATE-MAE, a white-box masked autoencoder: models and pre-training, on the operators of ``crate_kernels``."""

import importlib
from typing import Any

from crate_kernels import __version__
from crate_mae import analysis
from crate_mae.backbone import Backbone
from crate_mae.checkpoints import load_model, save_model
from crate_mae.classifiers import Classifier, classifier_of
from crate_mae.config import ClassifierConfig, ModelConfig
from crate_mae.model import CrateMAE, MAEOutput
from crate_mae.preprocessing import load_transform
from crate_mae.registry import CLASSIFIERS, MODELS, create_model

__all__ = [
    "CLASSIFIERS",
    "MODELS",
    "Backbone",
    "Classifier",
    "ClassifierConfig",
    "CrateMAE",
    "FinetuneConfig",
    "MAEOutput",
    "ModelConfig",
    "PretrainConfig",
    "__version__",
    "analysis",
    "classifier_of",
    "create_model",
    "download",
    "embed",
    "export",
    "finetune",
    "import_checkpoint",
    "load_model",
    "load_transform",
    "pretrain",
    "read_embeddings",
    "save_model",
]

_LATER = {
    "FinetuneConfig": "finetuning",
    "download": "sharing.loading",
    "embed": "embedding",
    "export": "exporting",
    "finetune": "finetuning",
    "import_checkpoint": "sharing.importing",
    "PretrainConfig": "training",
    "pretrain": "training",
    "read_embeddings": "embedding",
}
"""Names whose modules are imported at first use: not everybody needs them, and importing them takes time."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
