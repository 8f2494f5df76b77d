"""The layers of the models, their patches and positions, against the official steps in float64; their choices, in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mutation.composed_probes import agreement, random, truth
from mutation.module_probes import Build, Call, X, edited, hooked, module_probe, refusals
from mutation.modules import layers, masks, patches, positions
from mutation.probes import Probe
from torch import Tensor, nn

from crate_kernels import ISTA, MSSA, use
from crate_mae.config import ClassifierConfig, ModelConfig


def layer_probes() -> list[Probe]:
    model = ModelConfig(embed_dim=8, num_heads=2, decoder_num_heads=4, patch_size=2, img_size=4)
    classifier = ClassifierConfig(embed_dim=8, num_heads=2, patch_size=2, img_size=4)
    blocks: dict[str, Build] = {
        "encoder": lambda: layers.EncoderBlock(model),
        "encoder, not nested": lambda: layers.EncoderBlock(classifier, nested=False),
        "decoder": lambda: layers.DecoderBlock(model),
        "alpha": lambda: layers.AlphaBlock(classifier),
    }
    recomputed: Call = lambda m, x: m(x, recompute=True)  # noqa: E731
    plainly: Call = lambda m, x: m(x)  # noqa: E731
    probes = []
    for name, build in blocks.items():
        step = "layers.0.1.fn" if name in ("encoder", "decoder") else "1.fn"
        for path, made in {"fused": build, "in steps": edited(build, hooked(step))}.items():
            probes.append(module_probe(f"{name}, {path}", made, plainly))
            probes.append(module_probe(f"{name}, {path}, recomputed", made, recomputed, plainly))
        if name != "decoder":
            drops = edited(build, lambda module: setattr(module, "drop_path", 0.5))
            probes.append(module_probe(f"{name}, drops paths", drops, plainly, _dropping_by_hand))
            probes.append(module_probe(f"{name}, drops no more", edited(drops, nn.Module.eval), plainly))
    encoder, patched = blocks["encoder"], lambda: layers.PatchEmbed(model)
    weights: Call = lambda m, x: m.attention(x)  # noqa: E731
    official_weights: Call = lambda m, x: m.layers[0][0](x, return_attention=True)  # noqa: E731
    (images,) = random((2, 3, 4, 6))
    of_patches: Call = lambda m, x: m.of_patches(patches.patchify(x, 2))  # noqa: E731
    return [
        *probes,
        module_probe("attention weights", encoder, weights, official_weights),
        module_probe("patches, as a module", patched, plainly, x=images),
        module_probe("patches, one linear map", patched, of_patches, plainly, x=images),
        module_probe("a linear layer", lambda: layers.Linear(8, 5), plainly),
        module_probe("a linear layer of PyTorch's", lambda: layers.Linear(8, 5), use("reference")(plainly), plainly),
        truth("step size", lambda: dict(step_size=layers.EncoderBlock(model).step_size), step_size=model.step_size),
        _words_of_layers(blocks, patched),
    ]


def _dropping_by_hand(block: nn.Module, x: Tensor) -> Tensor:
    """Each branch of a sample is left out, or counts twice: in the order in which the block draws."""
    attention, sparsify = block.layers[0] if hasattr(block, "layers") else block.children()
    adds = hasattr(sparsify.fn, "D")
    for step in (attention, sparsify) if adds else (attention,):
        x = x + step(x) * torch.empty(len(x), 1, 1, dtype=x.dtype).bernoulli_(0.5).div_(0.5)
    return x if adds else sparsify(x)


def _words_of_layers(blocks: dict[str, Build], embeds: Build) -> Probe:
    """Why a layer is not fused, or its patches not embedded by one product: of layers that were changed in all these ways."""
    edits: dict[str, Callable[[Any], object]] = {
        "plain": lambda m: None,
        "drops": lambda m: setattr(m, "drop_path", 0.5),
        "drops, evaluation": lambda m: setattr(m.eval(), "drop_path", 0.5),
        "list hooked": lambda m: m.layers.register_forward_hook(lambda *_: None),
        "two pairs": lambda m: m.layers.append(m.layers[0]),
        "three steps": lambda m: m.layers[0].append(nn.Identity()),
        "step": lambda m: m.layers[0].__setitem__(0, nn.Identity()),
        "step inside": lambda m: setattr(m.layers[0][1], "fn", nn.Identity()),
        "norm": lambda m: setattr(m.layers[0][1], "norm", nn.LayerNorm(8, elementwise_affine=False)),
        "hook": lambda m: m.layers[0][0].fn.register_forward_hook(lambda *_: None),
        "attention's bias": lambda m: setattr(_attention(m), "qkv", nn.Linear(8, 8)),
        "causal": lambda m: setattr(_attention(m), "is_causal", True),
        "dropout": lambda m: [setattr(d, "p", 0.5) for d in m.modules() if isinstance(d, nn.Dropout)],
        "frozen": lambda m: [s.freeze() for s in m.modules() if isinstance(s, ISTA)],
    }
    of_embeds: dict[str, Callable[[Any], object]] = {
        "plain": lambda m: None,
        "hook": lambda m: m.register_forward_hook(lambda *_: None),
        "hook inside": lambda m: m.proj.register_forward_hook(lambda *_: None),
        **{
            f"{name} {value}": lambda m, name=name, value=value: setattr(m.proj, name, value)
            for name, value in (
                ("stride", (1, 2)),
                ("padding", (1, 0)),
                ("dilation", (1, 2)),
                ("groups", 3),
                ("groups", 0),
            )
        },
    }

    def words() -> dict[str, object]:
        found: dict[str, object] = {}
        for kind in ("encoder", "decoder"):
            for name, edit in edits.items():
                block = blocks[kind]()
                edit(block)
                found[f"{kind}, {name}"] = block.obstacle(X.float())
        for name, edit in of_embeds.items():
            embed = embeds()
            edit(embed)
            found[f"patches, {name}"] = layers.embedding_obstacle(embed)
        return found

    return truth("obstacles", words, **words())


def _attention(block: nn.Module) -> MSSA:
    return next(module for module in block.modules() if isinstance(module, MSSA))


def patch_probes() -> list[Probe]:
    (images,) = random((2, 3, 4, 6))
    (noise,) = random((2, 7))

    def by_hand(images: Tensor) -> Tensor:
        rows = [
            images[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].permute(0, 2, 3, 1).flatten(1)
            for i in range(2)
            for j in range(3)
        ]
        return torch.stack(rows, 1)

    def numbers() -> dict[str, object]:
        kept = masks.kept_patches(noise, 0.5)
        mask = masks.removed_patches(kept, 7)
        return {
            "kept": kept.tolist(),
            "mask": [[float(j not in row) for j in range(7)] for row in kept.tolist()] == mask.tolist(),
            "dtype": mask.dtype,
        }

    wide = torch.zeros(2, 6, 13)
    return [
        agreement("patchify", lambda images: patches.patchify(images, 2), [images], by_hand),
        agreement(
            "unpatchify", lambda images: patches.unpatchify(by_hand(images), 2, 3, (2, 3)), [images], lambda images: 1 * images
        ),
        truth(
            "which are removed", numbers, mask=True, dtype=torch.float32,
            kept=[sorted(range(7), key=lambda j, row=row: row[j])[:3] for row in noise.tolist()],
        ),
        refusals(
            "unpatchify",
            width=(lambda: patches.unpatchify(wide, 2, 3, (2, 3)), "channels = 12"),
            narrow=(lambda: patches.unpatchify(wide[..., :11], 2, 3, (2, 3)), "channels = 12"),
            dimensions=(lambda: patches.unpatchify(wide[0, :, :12], 2, 3, (2, 3)), "channels = 12"),
            number=(lambda: patches.unpatchify(wide[:, :5, :12], 2, 3, (2, 3)), "2 x 3 = 6"),
        ),
    ]  # fmt: skip


def position_probes() -> list[Probe]:
    (learned,) = random((1, 7, 4))

    def waves() -> dict[str, Tensor]:
        return {"positions": positions.sine_cosine((2, 3), 12)}

    rows = [[0.0] * 12]
    for row in range(2):
        for column in range(3):
            frequencies = [10000.0 ** (-i / 3) for i in range(3)]
            rows.append(
                [wave(place * f) for place in (column, row) for wave in (math.sin, math.cos) for f in frequencies]
            )

    def resampled(old: tuple[int, int], new: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        return lambda learned: positions.resampled(learned, old, new)

    def formula(old: tuple[int, int], new: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        def function(learned: Tensor) -> Tensor:
            grid = learned[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)
            grid = F.interpolate(grid.double(), size=new, mode="bicubic", antialias=True).to(learned.dtype)
            return torch.cat([learned[:, :1], grid.flatten(2).permute(0, 2, 1)], 1)

        return function

    def one_column(learned: Tensor) -> Tensor:
        """Of a grid on its side."""
        turned = torch.cat([learned[:, :1], learned[:, 1:].unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)], 1)
        return formula((3, 2), (1, 4))(turned)

    return [
        Probe("sines and cosines", waves, {"positions": torch.tensor([rows]).double()}, {"positions": 1e-6}),
        agreement("more", resampled((2, 3), (4, 5)), [learned], formula((2, 3), (4, 5))),
        agreement("fewer", resampled((3, 2), (2, 2)), [learned], formula((3, 2), (2, 2))),
        agreement("one column", resampled((2, 3), (4, 1)), [learned], one_column),
        agreement(
            "bfloat16", resampled((2, 3), (4, 5)), [learned.bfloat16()], formula((2, 3), (4, 5)), allowed=2**-6
        ),
    ]  # fmt: skip
