"""AdamW with a learning rate for each layer."""

from __future__ import annotations

import re

import torch

from crate_mae.classifiers import Classifier
from crate_mae.finetuning.config import FinetuneOptimizerConfig
from crate_mae.training.optimizer import is_decayed

_EMBEDDING = re.compile(r"(cls_token|pos_embedding|patch_embed\.|to_patch_embedding\.|conv1\.)")
_LAYER = re.compile(r"(blocks|transformer\.layers)\.([0-9]+)\.")


def layer_of(name: str, depth: int) -> int:
    """The number of the layer to which a parameter belongs, by its name: 0 for the patch embedding, the class token and the
    positions; 1 to depth for the layers; depth + 1 for the last norm and the head."""
    if _EMBEDDING.match(name):
        return 0
    layer = _LAYER.match(name)
    return int(layer[2]) + 1 if layer else depth + 1


def lr_scale(name: str, depth: int, decay: float) -> float:
    """The factor of a parameter's learning rate, decay ** (depth + 1 - layer), which is 1 for the head (BEiT, arXiv 2106.08254;
    MAE, arXiv 2111.06377, appendix A.1)."""
    return decay ** (depth + 1 - layer_of(name, depth))


def build_layerwise_optimizer(model: Classifier, config: FinetuneOptimizerConfig, batch_size: int) -> torch.optim.AdamW:
    """AdamW at base_lr * batch_size / 256 * ``lr_scale``, which each group keeps; with weight decay on matrices only."""
    depth, peak = model.config.depth, config.base_lr * batch_size / 256
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decayed = layer_of(name, depth), is_decayed(name, parameter)
        scale = lr_scale(name, depth, config.layer_decay)
        new = {"params": [], "weight_decay": config.weight_decay * decayed, "lr": peak * scale, "lr_scale": scale}
        groups.setdefault((layer, decayed), new)["params"].append(parameter)
    return torch.optim.AdamW([groups[key] for key in sorted(groups)], lr=peak, betas=config.betas, fused=True)
