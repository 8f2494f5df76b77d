"""Fused operators for white-box transformers (CRATE, CRATE-MAE, CRATE-alpha): the public names, and nothing else."""

from crate_kernels._version import __version__
from crate_kernels.accelerate import accelerate
from crate_kernels.dispatch import use
from crate_kernels.ista.api import combine, ista
from crate_kernels.layers.api import (
    DecoderWeights,
    EncoderWeights,
    PreparedLayer,
    decoder_layer,
    encoder_layer,
    prepare_layers,
)
from crate_kernels.mssa.api import AttentionWeights, mssa
from crate_kernels.nn import ISTA, MSSA, DecoderStep, OvercompleteISTA
from crate_kernels.norm_linear.api import norm_linear
from crate_kernels.overcomplete.api import overcomplete_ista
from crate_kernels.products.norm_folding import Norm
from crate_kernels.shared_attention.api import shared_qkv_attention

__all__ = [
    "ISTA",
    "MSSA",
    "AttentionWeights",
    "DecoderStep",
    "DecoderWeights",
    "EncoderWeights",
    "Norm",
    "OvercompleteISTA",
    "PreparedLayer",
    "__version__",
    "accelerate",
    "combine",
    "decoder_layer",
    "encoder_layer",
    "ista",
    "mssa",
    "norm_linear",
    "overcomplete_ista",
    "prepare_layers",
    "shared_qkv_attention",
    "use",
]
