"""The modules whose functions are mutated, and those that launch the kernels among them: named here and nowhere else."""

# ruff: noqa: F401

from crate_kernels import cpu, library_products, row_pairs
from crate_kernels import nn as kernel_modules
from crate_kernels.ista import composed as composed_ista
from crate_kernels.ista import form
from crate_kernels.mssa import composed as composed_mssa
from crate_kernels.norm_linear import composed as composed_norm_linear
from crate_kernels.overcomplete import composed as composed_overcomplete
from crate_kernels.products import kernels as product_kernels
from crate_kernels.products import launchers as products
from crate_kernels.products import preparation, preparation_kernels
from crate_kernels.shared_attention import composed as composed_attention
from crate_kernels.shared_attention import kernels as attention_kernels
from crate_kernels.shared_attention import mask as attention_mask
from crate_kernels.shared_attention import op as attention_op
from crate_kernels.shared_attention import triton as attention
from crate_mae import layers, masks, patches, positions
