"""The base of all models of the CRATE family: from images to the tokens of any layer, with timm's interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crate_kernels import PreparedLayer, prepare_layers
from crate_kernels.dispatch import choose
from crate_kernels.dtypes import compute_dtype, is_autocast
from crate_kernels.fusing import attached
from crate_mae.config import ClassifierConfig, ModelConfig, grid_of
from crate_mae.layers import Block, DecoderBlock, EncoderBlock
from crate_mae.patches import patch_grid

if TYPE_CHECKING:
    from typing_extensions import Self

FINAL_NORM_EPS = 1e-6


class Backbone(nn.Module, ABC):
    """Images to tokens: a class token, embedded patches, positions, layers. ``CrateMAE`` and ``Classifier`` inherit from it.

    Two attributes say how layers run. Both may be changed at any time, and neither is part of a checkpoint:

    stream: "float32" or "16bit". With "16bit" tokens go from layer to layer in the autocast dtype (no effect without autocast),
        which halves memory and traffic between the kernels.
    recompute: layers compute projection and attention again in the backward, and keep half as much for it.

    Methods and arguments are those of timm's ``VisionTransformer`` (pytorch-image-models 1.0).
    """

    stream: Literal["float32", "16bit"] = "float32"
    recompute: bool = False
    num_prefix_tokens = 1

    config: ModelConfig | ClassifierConfig
    cls_token: nn.Parameter

    @property
    def num_features(self) -> int:
        """The width of the tokens, and of the features ``forward_head(tokens, pre_logits=True)``."""
        return self.config.embed_dim

    @property
    @abstractmethod
    def encoder_layers(self) -> nn.ModuleList:
        """The layers between ``embed`` and the head."""

    @property
    @abstractmethod
    def last_norm(self) -> nn.Module:
        """The LayerNorm behind the last layer; in some models it is part of the head."""

    def embed(self, images: Tensor) -> Tensor:
        """The first layer's input [batch, 1 + patches, width]: the class token, then the patches, each with its position."""
        return self._placed(self._embedded_patches(images), images)

    def _placed(self, x: Tensor, images: Tensor) -> Tensor:
        """Embedded patches x behind the class token, each with its position."""
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self._positions(patch_grid(images, self.config.patch_size))

    @abstractmethod
    def _embedded_patches(self, images: Tensor) -> Tensor:
        """Embedded patches [batch, patches, width], without positions."""

    @abstractmethod
    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Positions [1, 1 + patches, width] for any grid of patches."""

    def _normed(self, x: Tensor) -> Tensor:
        """The last layer's tokens x after the final norm, where it normalises all tokens before the head; else x."""
        return x

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens [batch, 1 + patches, width] of whole images, as ``forward_head`` takes them; the class token is first.

        Args:
            images: [batch, channels, height, width]; height and width divisible by the patch.

        Raises:
            TypeError: images are no tensor of the parameters' dtype (under autocast: of a floating-point dtype).
            ValueError: their shape does not fit.
        """
        self.patch_count(images)
        return self._encode(self.embed(images))

    def _encode(self, x: Tensor) -> Tensor:
        return self._normed(self._through(self.encoder_layers, x, self.config.num_heads))

    @abstractmethod
    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """The head's output for the tokens that ``forward_features`` returns: a classifier's logits.

        ``pre_logits``: return instead the features [batch, width] that a classifier's last linear map takes.
        """

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | list[tuple[Tensor, Tensor]] | tuple[Tensor, list[Tensor] | list[tuple[Tensor, Tensor]]]:
        """The outputs of chosen layers, as timm's ``VisionTransformer.forward_intermediates`` gives them.

        Args:
            images: as for ``forward_features``.
            indices: how many layers, counted back from the last, or a list of layer numbers, in any order, where negative ones
                count back from the last; all layers if None.
            return_prefix_tokens: for each layer a pair: its patches, and its class token [batch, 1, width].
            norm: apply ``last_norm`` to each layer's output.
            stop_early: do not run the layers behind the last chosen one; the returned tokens are then its output.
            output_fmt: patches as "NCHW", [batch, width, rows, columns], or as "NLC", [batch, patches, width].
            intermediates_only: return the list alone, without the tokens.

        Returns:
            The tokens, as ``forward_features`` gives them, and a list with one entry for each chosen layer, first to last.

        Raises:
            IndexError: there is no such layer.
            ValueError: ``indices`` chooses no or too many layers; ``output_fmt`` is unknown; or as ``forward_features``.
            TypeError: as ``forward_features``.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        x, taken = self._layer_outputs(images, indices, norm=norm, stop_early=stop_early)
        prefix, found = ([x[:, part] for x in taken] for part in (slice(0, 1), slice(1, None)))
        if output_fmt == "NCHW":
            grid = patch_grid(images, self.config.patch_size)
            found = [patches.mT.unflatten(-1, grid).contiguous() for patches in found]
        intermediates = list(zip(found, prefix, strict=True)) if return_prefix_tokens else found
        return intermediates if intermediates_only else (self._normed(x), intermediates)

    def _layer_outputs(
        self, images: Tensor, indices: int | Sequence[int] | None, *, norm: bool, stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """The last tokens, before ``_normed``, and those behind each chosen layer, all [batch, 1 + patches, width].

        Arguments and errors are those of ``forward_intermediates``.
        """
        self.patch_count(images)
        layers = self.encoder_layers
        chosen = _chosen(indices, len(layers))
        taken: list[Tensor] = []

        def take(index: int, x: Tensor) -> None:
            if index in chosen:
                taken.append(self.last_norm(x) if norm else x)

        run = list(layers)[: max(chosen, default=-1) + 1] if stop_early else layers
        return self._through(run, self.embed(images), self.config.num_heads, take), taken

    def attention_map(self, images: Tensor, layer: int = -1) -> Tensor:
        """Attention weights [batch, heads, tokens, tokens] of one encoder layer on whole images; negative layers count back.

        Raises:
            IndexError: there is no such layer.
        """
        self.patch_count(images)
        layers = self.encoder_layers
        depth = len(layers)
        if not -depth <= layer < depth:
            raise IndexError(f"layer: expected {-depth} to {depth - 1}, got {layer}")
        x = self.embed(images)
        for block in layers[: layer % depth]:
            x = block(x)
        return _blocks_in(layers[layer])[0].attention(x)

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth in training: ``drop_path`` of the layers, from 0 at the first linearly to ``rate`` at the last.

        Raises:
            ValueError: rate is not at least 0 and below 1; or a layer is not of this package, nor a wrapper of one that is.
        """
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path: expected at least 0 and below 1, got {rate}")
        layers = self.encoder_layers
        for index, layer in enumerate(layers):
            ours = _blocks_in(layer)
            if not ours:
                raise ValueError(f"drop_path: layer {index} is of class {type(layer).__name__}, which has none")
            for block in ours:
                block.drop_path = rate * index / max(1, len(layers) - 1)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Self:
        """A model that ``save_pretrained``, ``save_model`` or a run wrote, on the CPU and in evaluation mode.

        Args:
            name: its folder, or the id of a repository on the Hugging Face Hub, "user/model", which huggingface_hub downloads
                (``pip install 'crate-kernels[hub]'``).
            **options: of the download, as for ``crate_mae.download``: ``revision``, ``token``, ``cache_dir``,
                ``force_download``, ``local_files_only``.

        Raises:
            FileNotFoundError: there is no such folder, and nothing by this name could be had from the hub; or no model in it.
            ValueError, RuntimeError: it is damaged, as of ``load_model``.
            TypeError: it is a model of another kind, or there is no such option.
            MissingLibrary: an ImportError: there is no such folder, and huggingface_hub is not installed.
        """
        from crate_mae.sharing.loading import from_pretrained

        return from_pretrained(name, cls, **options)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        run: str | Path | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        classes: Sequence[str] | None = None,
        license: str = "",
        name: str | None = None,
    ) -> None:
        """Write ``model.safetensors``, ``config.json`` (lambda and step size included) and a model card, ``README.md``.

        For a model from a run the card also has data, recipe, curves (``curves.png``) and the scores that ``crate-mae evaluate``
        measured of these weights, and ``config.json`` the recipe. No file has paths of this machine, or images.

        Args:
            folder: created if it does not exist; files of these names in it are replaced, all together.
            run: folder of the run, or of a model, that the weights are from. Its mean, std and classes are taken where none are
                given.
            mean, std, classes: as for ``save_model``.
            license: an identifier of the Hugging Face Hub, such as "mit".
            name: under which others will load the model, for the card; the folder's own where none is given.

        Raises:
            FileNotFoundError: there is no model in ``run``.
            FileExistsError: ``folder`` is that of a run.
            ValueError: the weights are not those of ``run``, a file there is damaged, or as of ``save_model``.
            OSError: the files cannot be written; older ones are still there.
        """
        from crate_mae.sharing.folder import save_pretrained

        save_pretrained(self, folder, run=run, mean=mean, std=std, classes=classes, license=license, name=name)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        **saved: Any,
    ) -> str:
        """Upload what ``save_pretrained`` writes to a repository on the Hugging Face Hub, which is created if it does not exist.

        Nothing is created or sent before all files are written.

        Args:
            repo_id: "user/model".
            private, token, branch, create_pr: as of ``huggingface_hub.ModelHubMixin.push_to_hub``.
            **saved: ``run``, ``mean``, ``std``, ``classes``, ``license``, as for ``save_pretrained``.

        Returns:
            The address of the commit.

        Raises:
            MissingLibrary: an ImportError: huggingface_hub is not installed.
            OSError: the hub cannot be reached, or refuses, such as where nobody is logged in (``hf auth login``).
            Exception: as of ``save_pretrained``.
        """
        from crate_mae.sharing.folder import push_to_hub

        return push_to_hub(self, repo_id, private=private, token=token, branch=branch, create_pr=create_pr, **saved)

    @property
    def _configured_grid(self) -> tuple[int, int]:
        return grid_of(self.config.image_shape, self.config.patch_size)

    def patch_count(self, images: Tensor) -> int:
        """How many patches each image has; raises the errors of ``forward`` for images that do not fit."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images: expected a tensor [batch, channels, height, width], got {type(images).__name__}")
        if images.ndim != 4 or images.shape[1] != self.config.in_chans:
            raise ValueError(
                f"images: expected [batch, {self.config.in_chans} channels, height, width], got shape {tuple(images.shape)}"
            )
        parameters = self.cls_token.dtype
        if not (images.is_floating_point() if is_autocast(images) else images.dtype == parameters):
            raise TypeError(
                f"images: expected {parameters}, standardised as in training ((pixels / 255 - mean) / std), got {images.dtype}"
            )
        rows, columns = patch_grid(images, self.config.patch_size)
        return rows * columns

    def _through(
        self, blocks: Iterable[nn.Module], x: Tensor, num_heads: int, take: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """The tokens behind all blocks; ``take`` is called with the number and the output of each block."""
        if self.stream == "16bit":
            x = x.to(compute_dtype(x))
        prepared = self._prepared(blocks, x, num_heads)
        for index, block in enumerate(blocks):
            if _is_ours(block):
                x = block(x, recompute=self.recompute, prepared=prepared.get(block))
            else:  # a wrapper or another module in a layer's place: called as in the official model
                x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
            if take is not None:
                take(index, x)
        return x

    def _prepared(self, blocks: Iterable[nn.Module], x: Tensor, num_heads: int) -> dict[nn.Module, PreparedLayer]:
        """The weights of all blocks that can be prepared together; the other blocks prepare themselves, one by one."""
        # A hook on one block may change the weights of a later one, so that with hooks each block prepares itself when called.
        name = type(self).__name__
        if choose(name, x, compute_dtype(x)) != "triton" or any(attached("", block) for block in blocks):
            return {}
        fused = [block for block in blocks if _is_ours(block) and block.obstacle(x) is None]
        encoders = [block for block in fused if isinstance(block, EncoderBlock)]
        decoders = [block for block in fused if isinstance(block, DecoderBlock)]
        prepared: Sequence[Block] = encoders or decoders
        if encoders:
            # Layers whose step sizes differ, or are learned, are not prepared together.
            sizes = [block.step_size for block in encoders]
            if any(size is not sizes[0] and not (isinstance(size, float) and size == sizes[0]) for size in sizes):
                return {}
            weights = [block.weights() for block in encoders]
            made = prepare_layers(x, weights, num_heads=num_heads, step_size=sizes[0])
        else:
            made = prepare_layers(x, [block.weights() for block in decoders], num_heads=num_heads)
        return {block: ready for block, ready in zip(prepared, made, strict=True) if ready is not None}


def _blocks_in(layer: nn.Module) -> list[Block]:
    """Our layers in what stands in a layer's place: the layer itself, or the one inside a wrapper."""
    return [module for module in layer.modules() if isinstance(module, Block)]


def _is_ours(block: nn.Module) -> TypeGuard[Block]:
    """Whether ``block`` takes our arguments. FSDP's subclasses do; a block with an overridden or replaced forward does not."""
    return isinstance(block, Block) and type(block).forward is Block.forward and "forward" not in vars(block)


def _chosen(indices: int | Sequence[int] | None, depth: int) -> set[int]:
    """The numbers of the layers that ``indices`` chooses of ``depth``; errors as of ``forward_intermediates``."""
    if indices is None:
        return set(range(depth))
    if isinstance(indices, int):
        if not 1 <= indices <= depth:
            raise ValueError(f"indices: expected 1 to {depth}, the number of layers, got {indices}")
        return set(range(depth - indices, depth))
    if not indices:
        raise ValueError(f"indices: expected numbers of layers, got {indices!r}")
    if wrong := [index for index in indices if not -depth <= index < depth]:
        raise IndexError(f"indices: expected {-depth} to {depth - 1}, got {wrong[0]}")
    return {index % depth for index in indices}
