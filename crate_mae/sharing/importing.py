"""Checkpoints that came from elsewhere: what model their weights are of, told by names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crate_mae.classifiers import Classifier, model_of
from crate_mae.config import ClassifierConfig, ModelConfig
from crate_mae.model import CrateMAE
from crate_mae.registry import CLASSIFIERS, MODELS
from crate_mae.state_dicts import fitting, one_line, plain_names, read_weights

_HEADS = {config.embed_dim: config.num_heads for config in (*MODELS.values(), *CLASSIFIERS.values())}
"""Of the published models, by width; those of one width have as many."""

_HEAD = re.compile(r"(\w*head\w*|fc|fc_norm|classifier|linear)(\.\d+)?\.(weight|bias)")
"""Names of what classifies, in the codes that fine-tune or probe such models."""


def import_checkpoint(
    path: str | Path,
    *,
    lambd: float | None = None,
    step_size: float | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    norm_pix_loss: bool = False,
) -> CrateMAE | Classifier:
    """The model of an official checkpoint of any size, which names and shapes of its weights tell.

    What is read, and which wrappers' names are dropped: ``load_model``. The weights must be all of the model's, and no others. A
    CRATE-MAE without its decoder is a classifier's encoder, with or without a head.

    Args:
        path: a ``.pth``, ``.pt`` or ``.safetensors`` file.
        lambd, step_size: which no checkpoint holds; needed of a CRATE-MAE (official releases: lambd 5.0 and later 0.5, step_size
            0.1). Of CRATE and CRATE-alpha 0.1 and 0.1, as in their code, where none are given.
        num_heads, decoder_num_heads: of encoder and decoder, which shapes do not tell; needed of widths that no published model
            has. The decoder's are the encoder's where they are not given.
        img_size: of images that are not square, or where the positions do not tell.
        norm_pix_loss: whether a CRATE-MAE reconstructs standardised patches, which no weight tells.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the weights are of no model that is known, or an argument is missing or contradicts them; or as of
            ``load_model``.
        RuntimeError: entries are missing or unknown, heads that do not belong to the model among them; each is named.
    """
    path = Path(path)
    weights = read_weights(path)
    found = plain_names(weights, path)
    family = _family(found, path)
    fields = _sizes(found, family, path)
    given: dict[str, Any] = dict(lambd=lambd, step_size=step_size, num_heads=num_heads, img_size=img_size)
    fields |= {name: value for name, value in given.items() if value is not None}
    if "num_heads" not in fields:
        known = ", ".join(f"{width}: {heads}" for width, heads in sorted(_HEADS.items()))
        raise ValueError(
            f"num_heads: {path} is {fields['embed_dim']} wide, and shapes do not tell how many heads that is; name them "
            f"(published, by width: {known})"
        )
    if family in ("CRATE-MAE", "crate_mae"):
        missing = [name for name in ("lambd", "step_size") if given[name] is None]
        if missing:
            raise ValueError(
                f"{', '.join(missing)}: {path} does not hold what its weights mean nothing without; name it (official releases "
                f"were trained with lambd 5.0 and later 0.5, and step_size 0.1)"
            )
    if family == "CRATE-MAE":
        fields["decoder_num_heads"] = decoder_num_heads or fields["num_heads"]
        config: ModelConfig | ClassifierConfig = ModelConfig(**fields, norm_pix_loss=norm_pix_loss)
    else:
        config = ClassifierConfig(family=family, **fields)
    with torch.device("meta"):  # a small file can have the names and shapes of a model that no memory holds
        expected = model_of(config)
    heads = sorted(name for name in found.keys() - expected.state_dict().keys() if _HEAD.fullmatch(name))
    if heads:
        raise RuntimeError(
            one_line(
                f"{path}: has a head, {', '.join(heads):.300}, which {type(expected).__name__} has not: remove these entries, or "
                f"import what they belong to"
            )
        )
    state = fitting(weights, expected, path)
    model = model_of(config)
    model.load_state_dict(state, strict=True)
    return model


def _family(found: Mapping[str, Tensor], path: Path) -> str:
    """ "CRATE-MAE", or the family of a ``ClassifierConfig``."""
    if "conv1.weight" in found and _depth(found, r"transformer\.layers"):
        return "crate_alpha"
    if any(name.startswith("to_patch_embedding.") for name in found) and _depth(found, r"transformer\.layers"):
        return "crate"
    if any(re.match(r"blocks\.\d+\.layers\.0\.", name) for name in found):
        return "CRATE-MAE" if "mask_token" in found or _depth(found, "decoder_blocks") else "crate_mae"
    names = ", ".join(sorted(found)[:3])
    raise ValueError(
        one_line(
            f"{path}: expected the weights of a CRATE-MAE (blocks.0.layers...), a CRATE (to_patch_embedding...) or a CRATE-alpha "
            f"(conv1, transformer.layers...), found {len(found)} entries such as {names:.200}"
        )
    )


def _depth(found: Mapping[str, Tensor], layers: str) -> int:
    """How many layers there are of a name, which is all that counts: that none is left out is seen when they are loaded."""
    return len({match[1] for name in found if (match := re.match(rf"{layers}\.(\d+)\.", name))})


def _sizes(found: Mapping[str, Tensor], family: str, path: Path) -> dict[str, Any]:
    """What shapes tell of the fields of a configuration."""
    of_mae = family in ("CRATE-MAE", "crate_mae")
    layers = "blocks" if of_mae else r"transformer\.layers"
    token = _shape(found, "cls_token", 3, path)
    fields: dict[str, Any] = {"embed_dim": token[-1], "depth": _depth(found, layers)}
    if fields["embed_dim"] in _HEADS:
        fields["num_heads"] = _HEADS[fields["embed_dim"]]
    if family == "crate":
        values = _shape(found, "to_patch_embedding.2.weight", 2, path)[1]
        channels = next((count for count in (3, 1, 4) if math.isqrt(values // count) ** 2 * count == values), None)
        if channels is None:
            raise ValueError(
                f"{path}: to_patch_embedding.2.weight has {values} columns, of no square patch of 1, 3 or 4 channels"
            )
        fields |= {"in_chans": channels, "patch_size": math.isqrt(values // channels)}
    else:
        embedding = "patch_embed.proj.weight" if of_mae else "conv1.weight"
        _, fields["in_chans"], fields["patch_size"], _ = _shape(found, embedding, 4, path)
    positions = "decoder_pos_embed" if of_mae else "pos_embedding"
    if positions in found:
        patches = _shape(found, positions, 3, path)[1] - 1
        if math.isqrt(patches) ** 2 == patches:
            fields["img_size"] = math.isqrt(patches) * fields["patch_size"]
    if family == "CRATE-MAE":
        fields["decoder_depth"] = _depth(found, "decoder_blocks")
    else:
        head = {"crate_mae": "head.weight"}.get(family, "mlp_head.1.weight")
        fields["num_classes"] = _shape(found, head, 2, path)[0] if head in found else 0
        if "fc_norm.weight" in found:
            fields["pool"] = "mean"
    return fields


def _shape(found: Mapping[str, Tensor], name: str, dimensions: int, path: Path) -> tuple[int, ...]:
    value = found.get(name)
    if value is None or value.is_nested or value.ndim != dimensions:
        what = "none" if value is None else "a nested tensor" if value.is_nested else f"shape {tuple(value.shape)}"
        raise ValueError(one_line(f"{path}: {name}: expected a tensor of {dimensions} dimensions, found {what}"))
    return tuple(value.shape)
