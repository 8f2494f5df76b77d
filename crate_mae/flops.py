"""The floating-point operations that a model asks for."""

from __future__ import annotations

from crate_mae.config import ClassifierConfig, ModelConfig, grid_of


def least_flops(config: ModelConfig | ClassifierConfig, batch: int, *, mask_ratio: float = 0.75) -> int:
    """Of one training step, forward and backward: a multiplication and an addition of each product count as two.

    ISTA is one product, every layer's products count once forward and twice backward, attention's 2 and 5; what is computed
    twice to save memory counts once. CRATE-alpha's sparse step is four products of four times the width. Of CRATE-MAE only the
    patches that are kept are embedded. Norms, softmax and all else that is no product are left out.

    Args:
        batch: images of the step.
        mask_ratio: fraction of the patches removed from an image, of CRATE-MAE alone.
    """
    rows, columns = grid_of(config.image_shape, config.patch_size)
    patches, width = rows * columns, config.embed_dim
    tokens, patch = patches + 1, config.patch_size**2 * config.in_chans
    is_mae, is_alpha = isinstance(config, ModelConfig), getattr(config, "family", None) == "crate_alpha"
    layers = config.depth + (config.decoder_depth if is_mae else 0)
    layer = 3 * (2 + (4 * 4 if is_alpha else 1)) * 2 * tokens * width**2 + (2 + 5) * 2 * tokens**2 * width
    combinations = 0 if is_alpha else config.depth * 2 * 2 * width**3  # W^T W and its gradient, once a step
    embedded = int(patches * (1 - mask_ratio)) if is_mae else patches
    embedding = 2 * 2 * embedded * width * patch  # no gradient of the images
    prediction = 3 * 2 * width * (tokens * patch if is_mae else config.num_classes)
    return batch * (layers * layer + embedding + prediction) + combinations
