"""The sizes and constants of models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "int": (_is_integer, "an integer"),
    "int | tuple[int, int]": (
        lambda size: (
            _is_integer(size) or (isinstance(size, Sequence) and len(size) == 2 and all(map(_is_integer, size)))
        ),
        "an integer or a pair of them, (height, width)",
    ),
    "float": (lambda value: _is_integer(value) or isinstance(value, float), "a number"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "str": (lambda value: isinstance(value, str), "a name"),
}


_LARGEST = 2**16
"""The largest size that a field may have: beyond all uses, and small enough that counts made of sizes do not overflow."""

_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


def fits_float32(*values: float) -> bool:
    """Whether all values are finite in float32, the precision in which models compute."""
    return all(abs(value) <= _LARGEST_FLOAT32 for value in values)  # NaN is not


def _check(config: ModelConfig | ClassifierConfig) -> None:
    """Check the fields of a model's configuration, and make a tuple of an image size that is a list.

    Raises:
        TypeError: a field is not of its type.
        ValueError: a field is out of range, or does not go with another.
    """
    for field in fields(config):
        value, (holds, expected) = getattr(config, field.name), _TYPES[str(field.type)]
        if not holds(value):
            raise TypeError(f"{field.name}: expected {expected}, got {value!r}")
    if not isinstance(config.img_size, int):  # JSON has lists where we have tuples
        object.__setattr__(config, "img_size", tuple(config.img_size))
    least = dict.fromkeys(("patch_size", "in_chans", "embed_dim", "num_heads", "decoder_num_heads"), 1)
    least |= dict.fromkeys(("depth", "decoder_depth", "num_classes"), 0)
    for name, lowest in least.items():
        if hasattr(config, name) and not lowest <= getattr(config, name) <= _LARGEST:
            raise ValueError(f"{name}: expected at least {lowest} and at most {_LARGEST}, got {getattr(config, name)}")
    if max(config.image_shape) > _LARGEST:
        raise ValueError(f"img_size: expected at most {_LARGEST} pixels a side, got {config.img_size}")
    width, lambd, step_size = config.embed_dim, config.lambd, config.step_size
    for name in ("num_heads", "decoder_num_heads"):
        if hasattr(config, name) and width % getattr(config, name):
            raise ValueError(f"{name}: expected a divisor of embed_dim {width}, got {getattr(config, name)}")
    if config.has_fixed_positions and width % 4:
        raise ValueError(f"embed_dim: expected a multiple of 4 for sine-cosine positions, got {width}")
    if lambd < 0:
        raise ValueError(f"lambd: expected at least 0, got {lambd}")
    if step_size <= 0:
        raise ValueError(f"step_size: expected above 0, got {step_size}")
    if not fits_float32(lambd):
        raise ValueError(f"lambd: expected a number that is finite in float32, got {lambd}")
    if not fits_float32(step_size, step_size * lambd):
        what = "a number that is finite in float32, times lambd, too"
        raise ValueError(f"step_size: expected {what}, got {step_size}")
    grid_of(config.image_shape, config.patch_size)


def _pair(img_size: int | tuple[int, int]) -> tuple[int, int]:
    return (img_size, img_size) if isinstance(img_size, int) else img_size


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and constants of a CRATE-MAE model, saved with its weights.

    Attributes:
        img_size: side of the square images in pixels, or (height, width). Sets the stored position table; the model
            itself takes every size divisible by the patch.
        patch_size: side of a patch in pixels.
        in_chans: channels of the images.
        embed_dim: width of the tokens, encoder and decoder alike.
        depth: encoder layers.
        num_heads: attention heads of an encoder layer.
        decoder_depth: decoder layers.
        decoder_num_heads: attention heads of a decoder layer.
        lambd: sparsity weight of the ISTA steps. Official releases used 5.0 and later 0.5; the paper says 0.1.
        step_size: step of the ISTA steps. 0.1 in the official code.
        norm_pix_loss: standardise each target patch before it is compared.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_depth: int = 12
    decoder_num_heads: int = 12
    lambd: float = 0.5
    step_size: float = 0.1
    norm_pix_loss: bool = False

    def __post_init__(self) -> None:
        _check(self)
        if self.norm_pix_loss and self.patch_size**2 * self.in_chans == 1:
            raise ValueError(
                "norm_pix_loss: expected patches of two values or more, got patch_size 1 and in_chans 1; one has no variance"
            )

    has_fixed_positions: ClassVar[bool] = True
    """Whether positions are sine-cosine tables, which are computed and not learned."""

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return _pair(self.img_size)


FAMILIES = ("crate", "crate_alpha", "crate_mae")
POOLS = ("cls", "mean")


@dataclass(frozen=True)
class ClassifierConfig:
    """The sizes and constants of a classifier, saved with its weights.

    Attributes:
        family: "crate" (arXiv 2306.01129) or "crate_alpha" (arXiv 2405.20299), with the official parameter names, or
            "crate_mae": the encoder of a CRATE-MAE with a head.
        num_classes: of the logits; 0 for no head, features in place of logits.
        pool: what the head sees: "cls", the class token, or "mean", of the tokens: all in "crate" and "crate_alpha", as in the
            official CRATE, those of patches in "crate_mae", as in facebookresearch/mae.
        img_size: side of the square images in pixels, or (height, width). Sets the position table; the model itself takes
            every size divisible by the patch.
        patch_size: side of a patch in pixels.
        in_chans: channels of the images.
        embed_dim: width of the tokens.
        depth: layers.
        num_heads: attention heads of a layer.
        lambd: sparsity weight of the sparse steps. 0.1 in all official supervised models.
        step_size: step of the sparse steps. 0.1 in the official code.
    """

    family: str = "crate"
    num_classes: int = 1000
    pool: str = "cls"
    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    lambd: float = 0.1
    step_size: float = 0.1

    def __post_init__(self) -> None:
        _check(self)
        for name, known in (("family", FAMILIES), ("pool", POOLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return _pair(self.img_size)

    @property
    def has_fixed_positions(self) -> bool:
        """Whether positions are sine-cosine tables, which are computed and not learned."""
        return self.family == "crate_mae"


def grid_of(image_shape: Sequence[int], patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches in an image of (height, width) pixels.

    Raises:
        ValueError: height or width is not a positive multiple of the patch.
    """
    height, width = image_shape
    if height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"images: expected height and width divisible by patch_size {patch_size}, got {height} x {width}"
        )
    return height // patch_size, width // patch_size
