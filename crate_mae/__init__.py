"""CRATE-MAE: a masked autoencoder whose layers are derived, its models and its pre-training, on ``crate_kernels``."""

from crate_kernels import __version__
from crate_mae import analysis
from crate_mae.checkpoints import load_model, load_transform, save_model
from crate_mae.config import ModelConfig
from crate_mae.model import CrateMAE, MAEOutput
from crate_mae.registry import MODELS, create_model

__all__ = [
    "MODELS",
    "CrateMAE",
    "MAEOutput",
    "ModelConfig",
    "__version__",
    "analysis",
    "create_model",
    "load_model",
    "load_transform",
    "save_model",
]
