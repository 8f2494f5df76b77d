"""The floating-point operations that a model asks for."""

from __future__ import annotations

from crate_mae.config import ClassifierConfig, ModelConfig, grid_of


def least_flops(config: ModelConfig | ClassifierConfig, batch: int, *, mask_ratio: float = 0.75) -> int:
    """The operations of one training step, forward and backward; a multiplication and an addition count as two.

    Only matrix products count: norms, softmax and element-wise operations are left out, and so is what is computed a second time
    to save memory. A product with weights is one in the forward and two in the backward, attention two and five, ISTA's sparse
    step a single product, CRATE-alpha's four of four times the width. A CRATE-MAE embeds the patches that are kept alone.

    Args:
        config: the model's sizes.
        batch: images of the step.
        mask_ratio: fraction of the patches that a CRATE-MAE removes from an image; without effect on classifiers.
    """
    rows, columns = grid_of(config.image_shape, config.patch_size)
    patches, width = rows * columns, config.embed_dim
    tokens, patch = patches + 1, config.patch_size**2 * config.in_chans
    if isinstance(config, ModelConfig):
        layers, is_alpha = config.depth + config.decoder_depth, False
        embedded, outputs = int(patches * (1 - mask_ratio)), tokens * patch
    else:
        layers, is_alpha = config.depth, config.family == "crate_alpha"
        embedded, outputs = patches, config.num_classes
    layer = 3 * (2 + (4 * 4 if is_alpha else 1)) * 2 * tokens * width**2 + (2 + 5) * 2 * tokens**2 * width
    combining = 0 if is_alpha else config.depth * 2 * 2 * width**3  # W^T W and its gradient, once a step
    embedding = 2 * 2 * embedded * width * patch  # no gradient of the images
    prediction = 3 * 2 * width * outputs
    return batch * (layers * layer + embedding + prediction) + combining
