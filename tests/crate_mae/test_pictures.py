"""The reconstruction sheet."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from crate_mae.config import ModelConfig
from crate_mae.data import IMAGENET_MEAN, IMAGENET_STD, Normalization
from crate_mae.masks import kept_patches, removed_patches
from crate_mae.model import CrateMAE
from crate_mae.pictures import predicted_patches, reconstruction_sheet

GAP, TITLE = 4, 18


def tiny_model(**overrides) -> CrateMAE:
    torch.manual_seed(0)
    tiny = ModelConfig(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, decoder_depth=1, decoder_num_heads=2
    )
    return CrateMAE(dataclasses.replace(tiny, **overrides))


def sheet_cells(sheet, rows: int, height: int, width: int) -> np.ndarray:
    """uint8 [rows, 4, height, width, 3]: the cells of a sheet, shrunk back to the images' own pixels."""
    pixels = np.asarray(sheet)
    zoom = -(-128 // min(height, width))
    assert pixels.shape == (TITLE + rows * (height * zoom + GAP), GAP + 4 * (width * zoom + GAP), 3)
    cells = [
        [
            pixels[top : top + height * zoom : zoom, left : left + width * zoom : zoom]
            for left in (GAP + column * (width * zoom + GAP) for column in range(4))
        ]
        for top in (TITLE + row * (height * zoom + GAP) for row in range(rows))
    ]
    return np.array(cells)


@pytest.mark.parametrize("shape", [(32, 32), (16, 40)], ids=["square", "wide"])
def test_columns_show_what_they_say(shape):
    model = tiny_model()
    normalization = Normalization(IMAGENET_MEAN, IMAGENET_STD, 3)
    pixels = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    grid = (shape[0] // 8, shape[1] // 8)
    noise = torch.rand(2, grid[0] * grid[1])

    sheet = reconstruction_sheet(model, pixels, normalization, noise=noise)

    original, masked, prediction, pasted = sheet_cells(sheet, 2, *shape).swapaxes(0, 1)
    removed = removed_patches(kept_patches(noise, 0.75), noise.shape[1]).view(2, *grid)
    removed = removed.repeat_interleave(8, 1).repeat_interleave(8, 2).bool().numpy()
    assert np.array_equal(original, pixels.permute(0, 2, 3, 1).numpy())
    assert np.all(masked[removed] == 128)
    assert np.array_equal(masked[~removed], original[~removed])
    assert np.array_equal(pasted[removed], prediction[removed])
    assert np.array_equal(pasted[~removed], original[~removed])
    assert not np.array_equal(prediction[~removed], original[~removed])


def test_titles_are_drawn():
    sheet = reconstruction_sheet(
        tiny_model(), torch.zeros(1, 3, 32, 32, dtype=torch.uint8), Normalization(IMAGENET_MEAN, IMAGENET_STD, 3)
    )
    titles = np.asarray(sheet.convert("L"))[:TITLE]
    assert all((part < 100).any() for part in np.array_split(titles, 4, axis=1))


def test_other_channel_counts_are_shown_grey():
    model = tiny_model(in_chans=1)
    pixels = torch.randint(0, 256, (1, 1, 32, 32), dtype=torch.uint8)
    sheet = reconstruction_sheet(model, pixels, Normalization((0.5,), (0.5,), 1))
    original = sheet_cells(sheet, 1, 32, 32)[0, 0]
    assert np.array_equal(original, pixels[0].permute(1, 2, 0).expand(-1, -1, 3).numpy())


def test_the_model_keeps_its_mode_and_gathers_no_gradient():
    model = tiny_model().train()
    reconstruction_sheet(
        model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), Normalization(IMAGENET_MEAN, IMAGENET_STD, 3)
    )
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_predictions_of_standardised_patches_come_back_to_pixels():
    model = tiny_model(norm_pix_loss=True)
    images = torch.randn(2, 3, 32, 32) * 3 + 1
    target = model.patchify(images)
    standardised = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(predicted_patches(model, images, standardised), target)


def test_plain_predictions_are_pixels_already():
    model = tiny_model()
    images, pred = torch.randn(1, 3, 32, 32), torch.randn(1, 16, 192).bfloat16()
    assert torch.equal(predicted_patches(model, images, pred), pred.float())
