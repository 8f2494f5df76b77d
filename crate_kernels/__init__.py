"""Fused operators for white-box transformers (CRATE, CRATE-MAE, CRATE-alpha): the public names, and nothing else."""

from crate_kernels._version import __version__
from crate_kernels.accelerate import accelerate
from crate_kernels.dispatch import use
from crate_kernels.ista.api import ista
from crate_kernels.mssa.api import mssa
from crate_kernels.nn import ISTA, MSSA
from crate_kernels.shared_attention.api import shared_qkv_attention

__all__ = ["ISTA", "MSSA", "__version__", "accelerate", "ista", "mssa", "shared_qkv_attention", "use"]
