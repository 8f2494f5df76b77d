"""What a model is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any


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
"""Of every size: beyond all uses, and small enough that what is made of them can be counted."""

_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


def fits_float32(*values: float) -> bool:
    """Whether all are finite numbers in float32, in which models compute."""
    return all(abs(value) <= _LARGEST_FLOAT32 for value in values)  # which no NaN is


@dataclass(frozen=True)  # as its heirs are: the command line takes one of any other class for a class to be chosen
class _Config:
    """The checks that all configurations share, of those fields that they have."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (holds, expected) = getattr(self, field.name), _TYPES[field.type]
            if not holds(value):
                raise TypeError(f"{field.name}: expected {expected}, got {value!r}")
        if not isinstance(self.img_size, int):  # JSON has lists where we have tuples
            object.__setattr__(self, "img_size", tuple(self.img_size))
        least = dict.fromkeys(("patch_size", "in_chans", "embed_dim", "num_heads", "decoder_num_heads"), 1)
        least |= dict.fromkeys(("depth", "decoder_depth", "num_classes"), 0)
        for name, lowest in least.items():
            if hasattr(self, name) and not lowest <= getattr(self, name) <= _LARGEST:
                raise ValueError(
                    f"{name}: expected at least {lowest} and at most {_LARGEST}, got {getattr(self, name)}"
                )
        if max(self.image_shape) > _LARGEST:
            raise ValueError(f"img_size: expected at most {_LARGEST} pixels a side, got {self.img_size}")
        for name in ("num_heads", "decoder_num_heads"):
            if hasattr(self, name) and self.embed_dim % getattr(self, name):
                raise ValueError(f"{name}: expected a divisor of embed_dim {self.embed_dim}, got {getattr(self, name)}")
        if self.has_fixed_positions and self.embed_dim % 4:
            raise ValueError(f"embed_dim: expected a multiple of 4 for sine-cosine positions, got {self.embed_dim}")
        if self.lambd < 0:
            raise ValueError(f"lambd: expected at least 0, got {self.lambd}")
        if self.step_size <= 0:
            raise ValueError(f"step_size: expected above 0, got {self.step_size}")
        if not fits_float32(self.lambd):
            raise ValueError(f"lambd: expected a number that is finite in float32, got {self.lambd}")
        if not fits_float32(self.step_size, self.step_size * self.lambd):
            what = "a number that is finite in float32, times lambd, too"
            raise ValueError(f"step_size: expected {what}, got {self.step_size}")
        grid_of(self.image_shape, self.patch_size)

    has_fixed_positions = True

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size


@dataclass(frozen=True)
class ModelConfig(_Config):
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
        super().__post_init__()
        if self.norm_pix_loss and self.patch_size**2 * self.in_chans == 1:
            raise ValueError(
                "norm_pix_loss: expected patches of two values or more, got patch_size 1 and in_chans 1; one has no variance"
            )


FAMILIES = ("crate", "crate_alpha", "crate_mae")
POOLS = ("cls", "mean")


@dataclass(frozen=True)
class ClassifierConfig(_Config):
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
        super().__post_init__()
        for name, known in (("family", FAMILIES), ("pool", POOLS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def has_fixed_positions(self) -> bool:
        return self.family == "crate_mae"


def grid_of(image_shape: tuple[int, int], patch_size: int) -> tuple[int, int]:
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
