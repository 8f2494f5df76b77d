"""CRATE-MAE: a masked autoencoder whose layers are derived, its models and its pre-training, on ``crate_kernels``."""

from crate_kernels import __version__
from crate_mae import analysis
from crate_mae.backbone import Backbone
from crate_mae.checkpoints import load_model, load_transform, save_model
from crate_mae.classifiers import Classifier, classifier_of
from crate_mae.config import ClassifierConfig, ModelConfig
from crate_mae.model import CrateMAE, MAEOutput
from crate_mae.registry import CLASSIFIERS, MODELS, create_model

__all__ = [
    "CLASSIFIERS",
    "MODELS",
    "Backbone",
    "Classifier",
    "ClassifierConfig",
    "CrateMAE",
    "MAEOutput",
    "ModelConfig",
    "__version__",
    "analysis",
    "classifier_of",
    "create_model",
    "load_model",
    "load_transform",
    "save_model",
]
