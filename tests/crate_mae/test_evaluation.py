"""What a model is held against, and what its features are good for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from crate_mae.config import ModelConfig
from crate_mae.data import IMAGENET_MEAN, IMAGENET_STD, Normalization
from crate_mae.evaluation import (
    blurred_visible,
    class_accuracies,
    knn_accuracy,
    linear_probe_accuracy,
    pooled_features,
)
from crate_mae.evaluation.classes import RIDGE_PENALTIES
from crate_mae.model import CrateMAE

NORMALIZATION = Normalization(IMAGENET_MEAN, IMAGENET_STD, 3)


@pytest.fixture
def model() -> CrateMAE:
    torch.manual_seed(0)
    return CrateMAE(
        ModelConfig(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, decoder_depth=0, decoder_num_heads=2)
    )


@pytest.fixture
def pixels() -> list[torch.Tensor]:
    return list(torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


class TestBlur:
    def test_is_a_weighted_mean_of_visible_pixels(self):
        images = torch.randn(2, 3, 5, 7, dtype=torch.float64)
        visible = (torch.rand(2, 1, 5, 7) < 0.4).double()
        visible[..., 0, 0] = 1
        blurred = blurred_visible(images, visible, 1.5)
        for row, column in ((0, 0), (2, 6), (4, 3)):
            distances = (torch.arange(5)[:, None] - row) ** 2 + (torch.arange(7) - column) ** 2
            weights = torch.exp(-distances / (2 * 1.5**2)) * visible
            expected = (images * weights).sum((-2, -1)) / weights.sum((-2, -1))
            torch.testing.assert_close(blurred[..., row, column], expected)

    def test_what_is_out_of_reach_takes_the_mean(self):
        images = torch.rand(1, 1, 1, 200)
        visible = torch.zeros(1, 1, 1, 200)
        visible[..., :3] = 1
        blurred = blurred_visible(images, visible, 1.0)
        torch.testing.assert_close(blurred[..., 100:], images[..., :3].mean().expand(1, 1, 1, 100))

    def test_refuses_no_width(self):
        with pytest.raises(ValueError, match="sigma: expected a number of pixels above 0, got 0"):
            blurred_visible(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), 0)


class TestFeatures:
    def test_are_the_mean_of_the_patch_tokens(self, model, pixels):
        with torch.no_grad():
            expected = model.encode(NORMALIZATION(torch.stack(pixels)))[:, 1:].mean(1)
        state = torch.random.get_rng_state()
        torch.testing.assert_close(pooled_features(model, pixels, NORMALIZATION, batch_size=3), expected)
        assert torch.equal(torch.random.get_rng_state(), state)


def clusters(count: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three classes around three far centres."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return 4 * torch.eye(3, 12)[labels] + noise * torch.randn(count, 12, generator=generator), labels


@pytest.mark.parametrize("accuracy", [knn_accuracy, linear_probe_accuracy])
def test_classes_are_found_where_they_can_be(accuracy):
    assert accuracy(*clusters(60, 0.3, 0), *clusters(30, 0.3, 1)) == 1
    features, labels = clusters(60, 0.3, 0)
    test_features, test_labels = clusters(30, 0.3, 1)
    assert accuracy(features, labels, test_features, (test_labels + 1) % 3) == 0
    assert accuracy(torch.randn(300, 12), labels.repeat(5), torch.randn(300, 12), test_labels.repeat(10)) < 0.5


def test_the_probe_is_a_ridge_regression_chosen_by_leaving_one_out():
    (features, labels), (test_features, test_labels) = clusters(40, 3.0, 2), clusters(300, 3.0, 3)
    mean, deviation = features.mean(0), features.std(0)

    def fit(rows: torch.Tensor, targets: torch.Tensor, penalty: float) -> torch.Tensor:
        """Weights, the last of them the offset, which has no penalty."""
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1).double()
        ridge = penalty * torch.diag(torch.tensor([1.0] * 12 + [0])).double()
        return torch.linalg.solve(rows.T @ rows + ridge, rows.T @ targets)

    def scores(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, torch.ones(len(rows), 1)], 1).double() @ weights

    standard, targets = (features - mean) / deviation, F.one_hot(labels).double()
    errors = []
    for penalty in RIDGE_PENALTIES:
        kept = [torch.arange(40) != left for left in range(40)]
        left_out = [scores(standard[~k], fit(standard[k], targets[k], penalty)) - targets[~k] for k in kept]
        errors.append(torch.cat(left_out).square().mean().item())
    best = RIDGE_PENALTIES[errors.index(min(errors))]
    assert RIDGE_PENALTIES[0] < best < RIDGE_PENALTIES[-1]
    found = scores((test_features - mean) / deviation, fit(standard, targets, best)).argmax(1)
    expected = (found == test_labels).double().mean().item()
    assert linear_probe_accuracy(features, labels, test_features, test_labels) == expected
    assert 0.4 < expected < 0.95


def test_every_image_is_classified_once_by_the_others():
    features, labels = clusters(31, 0.3, 0)
    assert class_accuracies(features, labels) == (1, 1)
    # A lone image of a wrong label is missed, and misleads no other.
    labels[3] = 1
    assert class_accuracies(features, labels).knn == pytest.approx(30 / 31)
    with pytest.raises(ValueError, match="folds: expected 2 to 10, the images of the smallest class, got 11"):
        class_accuracies(features, labels, folds=11)
