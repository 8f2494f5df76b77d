"""Checkpoints from elsewhere: the model that they belong to is told by the names and shapes of their weights."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crate_mae.classifiers import Classifier, model_of
from crate_mae.config import ClassifierConfig, ModelConfig, grid_of
from crate_mae.model import CrateMAE
from crate_mae.positions import sine_cosine
from crate_mae.registry import CLASSIFIERS, MODELS
from crate_mae.state_dicts import fitting, one_line, plain_names, read_weights

_HEADS = {config.embed_dim: config.num_heads for config in MODELS.values()}
_HEADS |= {config.embed_dim: config.num_heads for config in CLASSIFIERS.values()}
"""Numbers of heads of the published models, by width: models of one width have the same number."""

_KINDS = {"CRATE-MAE": "CRATE-MAE", "crate": "CRATE", "crate_alpha": "CRATE-alpha", "crate_mae": "CRATE-MAE's encoder"}

_HEAD = re.compile(r"(\w+\.)*(\w*head\w*|fc|fc_norm|classifier|linear)(\.\d+)*\.(weight|bias)")
"""Names that heads have in code that fine-tunes or probes such models."""


def import_checkpoint(
    path: str | Path,
    *,
    lambd: float | None = None,
    step_size: float | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    pool: str | None = None,
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
        in_chans: of a CRATE, where one channel in patches of twice the size would have the same shapes.
        pool: of CRATE and CRATE-alpha, "cls" unless given, which no weight tells.
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
    fields = _sizes(found, family, path, in_chans)
    idle = dict(decoder_num_heads=decoder_num_heads, norm_pix_loss=norm_pix_loss or None, pool=pool, in_chans=in_chans)
    _refuse_idle(family, path, **idle)
    published = fields.get("num_heads")
    given: dict[str, Any] = dict(lambd=lambd, step_size=step_size, num_heads=num_heads, img_size=img_size, pool=pool)
    fields |= {name: value for name, value in given.items() if value is not None}
    if "num_heads" not in fields:
        known = ", ".join(f"{width}: {heads}" for width, heads in sorted(_HEADS.items()))
        raise ValueError(
            f"num_heads: {path} is {fields['embed_dim']} wide, and shapes do not tell how many heads that is; name them "
            f"(published, by width: {known})"
        )
    if published not in (None, fields["num_heads"]):
        told = f"published models {fields['embed_dim']} wide have {published} heads, and this one is given {num_heads}"
        warnings.warn(f"num_heads: {told}; with another number than in training, weights mean nothing", stacklevel=2)
    if "img_size" not in fields:
        raise ValueError(f"img_size: {path} has positions of no square of patches; name height and width")
    if family in ("CRATE-MAE", "crate_mae"):
        missing = [name for name in ("lambd", "step_size") if given[name] is None]
        if missing:
            raise ValueError(
                f"{', '.join(missing)}: {path} does not hold what its weights mean nothing without; name it (official releases "
                f"were trained with lambd 5.0 and later 0.5, and step_size 0.1)"
            )
    if family == "CRATE-MAE":
        fields["decoder_num_heads"] = fields["num_heads"] if decoder_num_heads is None else decoder_num_heads
        config: ModelConfig | ClassifierConfig = ModelConfig(**fields, norm_pix_loss=norm_pix_loss)
    else:
        config = ClassifierConfig(family=family, **fields)
    if config.has_fixed_positions and "decoder_pos_embed" in found:
        _check_positions(found["decoder_pos_embed"], config, path)
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


def _refuse_idle(family: str, path: Path, **given: Any) -> None:
    """Raise a ValueError for what was given and is of no meaning to such a model."""
    of_families = {
        "CRATE-MAE": ("decoder_num_heads", "norm_pix_loss"),
        "crate": ("pool", "in_chans"),
        "crate_alpha": ("pool",),
    }
    for name, value in given.items():
        if value is not None and name not in of_families.get(family, ()):
            raise ValueError(f"{name}: {path} is of a {_KINDS[family]}, which has none to choose, got {value!r}")


def _check_positions(positions: Tensor, config: ModelConfig | ClassifierConfig, path: Path) -> None:
    """Check that fixed positions are those of the configured images: 8 x 2 patches are as many as 4 x 4.

    Raises:
        ValueError: they are not.
    """
    expected = sine_cosine(grid_of(config.image_shape, config.patch_size), config.embed_dim)
    if positions.shape != expected.shape or not torch.allclose(positions.float(), expected, atol=1e-3):
        height, width = config.image_shape
        raise ValueError(
            f"img_size: decoder_pos_embed in {path} is not the table of images of {height} x {width} pixels; name their height "
            f"and width"
        )


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
    """How many layers have a name; whether one in between is missing is seen when the weights are loaded."""
    return len({match[1] for name in found if (match := re.match(rf"{layers}\.(\d+)\.", name))})


def _sizes(found: Mapping[str, Tensor], family: str, path: Path, in_chans: int | None) -> dict[str, Any]:
    """The fields of a configuration that the shapes of the weights tell."""
    of_mae = family in ("CRATE-MAE", "crate_mae")
    layers = "blocks" if of_mae else r"transformer\.layers"
    token = _shape(found, "cls_token", 3, path)
    fields: dict[str, Any] = {"embed_dim": token[-1], "depth": _depth(found, layers)}
    if fields["embed_dim"] in _HEADS:
        fields["num_heads"] = _HEADS[fields["embed_dim"]]
    if family == "crate":
        values = _shape(found, "to_patch_embedding.2.weight", 2, path)[1]
        possible = [count for count in (1, 3, 4) if math.isqrt(values // count) ** 2 * count == values]
        if in_chans is not None:
            possible = [in_chans] if in_chans > 0 and math.isqrt(values // in_chans) ** 2 * in_chans == values else []
        if len(possible) != 1:
            ways = " or ".join(f"{count} (patches of {math.isqrt(values // count)})" for count in possible)
            told = (
                f"may have {ways} channels; say which"
                if ways
                else f"has {values} values a patch, of no square of so many"
            )
            raise ValueError(f"in_chans: {path} {told}")
        fields |= {"in_chans": possible[0], "patch_size": math.isqrt(values // possible[0])}
    else:
        embedding = "patch_embed.proj.weight" if of_mae else "conv1.weight"
        _, fields["in_chans"], fields["patch_size"], _ = _shape(found, embedding, 4, path)
    positions = "decoder_pos_embed" if of_mae else "pos_embedding"
    if positions in found:
        patches = _shape(found, positions, 3, path)[1] - 1
        if patches < 1:
            raise ValueError(
                f"{path}: {positions}: expected a row for the class token and one for each patch, got {patches + 1}"
            )
        if math.isqrt(patches) ** 2 == patches:
            fields["img_size"] = math.isqrt(patches) * fields["patch_size"]
    else:
        fields["img_size"] = 224
    if family == "CRATE-MAE":
        fields["decoder_depth"] = _depth(found, "decoder_blocks")
        if not fields["decoder_depth"]:
            raise ValueError(f"{path}: lacks decoder_blocks, and has the mask_token of a whole CRATE-MAE")
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
