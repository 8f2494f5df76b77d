"""Supervised models of the same layers: CRATE, CRATE-alpha, and the encoder of CRATE-MAE with a head."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from crate_mae.backbone import FINAL_NORM_EPS, Backbone
from crate_mae.config import ClassifierConfig, ModelConfig
from crate_mae.layers import AlphaBlock, EncoderBlock, Linear
from crate_mae.model import CrateMAE, MAEEncoder
from crate_mae.positions import resampled


class Classifier(Backbone):
    """Images to logits; build one with ``crate_mae.create_model`` or ``classifier_of``. ``config.family`` says which kind.

    ``Backbone`` has what all models share: tokens of any layer, stochastic depth, how layers run. Images may have any size
    divisible by the patch.
    """

    config: ClassifierConfig
    family: str

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        if config.family != self.family:
            raise ValueError(f"family: expected {self.family!r} for {type(self).__name__}, got {config.family!r}")
        self.config = config

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    @abstractmethod
    def head_name(self) -> str:
        """The name of the linear map to logits in the state dict."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, num_classes] of images [batch, channels, height, width]; features [batch, width] without a head.

        Raises:
            TypeError, ValueError: as of ``forward_features``.
        """
        return self.forward_head(self.forward_features(images))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh head for so many classes in place, none for 0, and change the pool where one is given: "cls" or "mean".

        Raises:
            TypeError, ValueError: of ``ClassifierConfig``.
        """
        pool = self.config.pool if global_pool is None else global_pool
        config = dataclasses.replace(self.config, num_classes=num_classes, pool=pool)
        self._make_head(config)
        self.config = config

    @abstractmethod
    def _make_head(self, config: ClassifierConfig) -> None:
        """Put a fresh head of ``config``'s classes and pool in place."""

    def _head(self, num_classes: int) -> nn.Module:
        """A fresh linear map to logits, or the identity for 0 classes, on the model's device and in its dtype."""
        head = Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        return head.to(self.cls_token.device, self.cls_token.dtype)


class _Layers(nn.Module):
    """Holds the layers under their official name, ``transformer.layers``."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Crate(Classifier):
    """CRATE with the official parameter names and initialisation (arXiv 2306.01129).

    Positions are learned for the configured size of images, and resampled for other sizes. (The official code takes the first
    rows of its table instead, which belong to other places.) The head, ``mlp_head``, is a LayerNorm and a linear map behind the
    pool; the official "mean" is over all tokens, the class token included.
    """

    family = "crate"

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        width = config.embed_dim
        rows, columns = self._configured_grid
        self._make_embedding(config)
        self.pos_embedding = nn.Parameter(torch.randn(1, rows * columns + 1, width))
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.transformer = _Layers([self._layer(config) for _ in range(config.depth)])
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), self._head(config.num_classes))

    def _make_embedding(self, config: ClassifierConfig) -> None:
        size = config.patch_size
        values = size**2 * config.in_chans
        self.to_patch_embedding = nn.Sequential(
            Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=size, q=size),
            nn.LayerNorm(values),
            Linear(values, config.embed_dim),
            nn.LayerNorm(config.embed_dim),
        )

    def _layer(self, config: ClassifierConfig) -> nn.Module:
        return EncoderBlock(config, nested=False)

    @property
    def head_name(self) -> str:
        return "mlp_head.1"

    @property
    def encoder_layers(self) -> nn.ModuleList:
        return self.transformer.layers

    @property
    def last_norm(self) -> nn.Module:
        return self.mlp_head[0]

    def _embedded_patches(self, images: Tensor) -> Tensor:
        return self.to_patch_embedding(images)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self._configured_grid:
            return self.pos_embedding
        return resampled(self.pos_embedding, self._configured_grid, grid)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = tokens.mean(dim=1) if self.config.pool == "mean" else tokens[:, 0]
        return self.mlp_head[0](pooled) if pre_logits else self.mlp_head(pooled)

    def _make_head(self, config: ClassifierConfig) -> None:
        self.mlp_head[1] = self._head(config.num_classes)


class CrateAlpha(Crate):
    """CRATE-alpha with the official parameter names and initialisation (arXiv 2405.20299): ``Crate`` with other layers.

    Patches are embedded by one linear map, ``conv1``. The official pool is "cls".
    """

    family = "crate_alpha"

    def _make_embedding(self, config: ClassifierConfig) -> None:
        self.conv1 = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)

    def _layer(self, config: ClassifierConfig) -> nn.Module:
        return AlphaBlock(config)

    def _embedded_patches(self, images: Tensor) -> Tensor:
        return self.conv1(images).flatten(2).mT


class CrateMAEClassifier(MAEEncoder, Classifier):
    """The encoder of a CRATE-MAE, with its names and initialisation, and the head with which facebookresearch/mae fine-tunes.

    With the pool "mean" the patches' tokens are averaged and go through ``fc_norm`` and ``head``; there is no ``norm``. With
    "cls" all tokens go through ``norm``, and the class token through ``head``. A fresh head is nearly zero: normal with standard
    deviation 2e-5.
    """

    family = "crate_mae"
    norm: nn.LayerNorm
    fc_norm: nn.LayerNorm

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self._make_encoder()
        self._initialise()
        self._make_head(config)

    @property
    def head_name(self) -> str:
        return "head"

    @property
    def last_norm(self) -> nn.Module:
        return self.fc_norm if self.config.pool == "mean" else self.norm

    def _normed(self, x: Tensor) -> Tensor:
        return x if self.config.pool == "mean" else self.norm(x)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        features = self.fc_norm(tokens[:, 1:].mean(dim=1)) if self.config.pool == "mean" else tokens[:, 0]
        return features if pre_logits else self.head(features)

    def _make_head(self, config: ClassifierConfig) -> None:
        present, other = ("fc_norm", "norm") if config.pool == "mean" else ("norm", "fc_norm")
        if other in self._modules:
            delattr(self, other)
        if present not in self._modules:
            token = self.cls_token
            norm = nn.LayerNorm(self.num_features, eps=FINAL_NORM_EPS).to(token.device, token.dtype)
            setattr(self, present, norm)
        self.head = self._head(config.num_classes)
        if isinstance(self.head, Linear):
            nn.init.trunc_normal_(self.head.weight, std=2e-5)
            nn.init.zeros_(self.head.bias)


CLASSES: dict[str, Callable[[ClassifierConfig], Classifier]] = {
    kind.family: kind for kind in (Crate, CrateAlpha, CrateMAEClassifier)
}


@overload
def model_of(config: ModelConfig) -> CrateMAE: ...
@overload
def model_of(config: ClassifierConfig) -> Classifier: ...
def model_of(config: ModelConfig | ClassifierConfig) -> CrateMAE | Classifier:
    """The freshly initialised model that a configuration describes."""
    return CrateMAE(config) if isinstance(config, ModelConfig) else CLASSES[config.family](config)


def classifier_config(config: ModelConfig | ClassifierConfig, **changes: Any) -> ClassifierConfig:
    """The configuration of a classifier with the encoder of a configured model; with the pool "mean" if that is a CRATE-MAE.

    Args:
        **changes: fields with other values.

    Raises:
        TypeError, ValueError: as of ``ClassifierConfig``.
    """
    if isinstance(config, ModelConfig):
        shared = {field.name for field in dataclasses.fields(ClassifierConfig)} & vars(config).keys()
        changes = {"pool": "mean"} | {name: getattr(config, name) for name in shared} | changes
        return ClassifierConfig(family="crate_mae", **changes)
    return dataclasses.replace(config, **changes)


def classifier_of(
    model: CrateMAE | Classifier,
    num_classes: int,
    *,
    pool: str | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> Classifier:
    """A classifier with a fresh head on a copy of a trained encoder, on the model's device and in its dtype and mode.

    Args:
        model: a CrateMAE, whose encoder is taken, or a classifier.
        num_classes: classes of the new head; 0 for no head.
        pool: "cls" or "mean"; if None, the classifier's own, or "mean" for a CrateMAE.
        img_size: the new model's image size, if it differs; learned positions are resampled.

    Norms that both models have are copied, too; a CrateMAE has no ``fc_norm``, which the pool "mean" needs: it is fresh.

    Raises:
        TypeError: model is neither, or as of ``ClassifierConfig``.
        ValueError: an argument does not fit the model.
    """
    if not isinstance(model, CrateMAE | Classifier):
        raise TypeError(f"model: expected a CrateMAE or a Classifier, got {type(model).__name__}")
    changes = {name: value for name, value in dict(pool=pool, img_size=img_size).items() if value is not None}
    new = model_of(classifier_config(model.config, num_classes=num_classes, **changes))
    new.to(model.cls_token.device, model.cls_token.dtype).train(model.training)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(new.head_name + ".")}
    if "pos_embedding" in weights:
        weights["pos_embedding"] = model._positions(new._configured_grid)
    own = new.state_dict()
    kept = {name: value for name, value in own.items() if name == "decoder_pos_embed" or name not in weights}
    fresh = {f"{new.head_name}.weight", f"{new.head_name}.bias", "fc_norm.weight", "fc_norm.bias", "decoder_pos_embed"}
    if unexpected := kept.keys() - fresh:
        raise ValueError(f"model: its encoder has no {min(unexpected)}, as {type(new).__name__} has")
    new.load_state_dict({name: weights[name] if name not in kept else kept[name] for name in own})
    return new
