"""What a model is held against, and what its features are good for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")  # lacking where nothing can be installed, as on some GPU machines

from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from crate_mae.classifiers import classifier_of
from crate_mae.config import ModelConfig
from crate_mae.data import IMAGENET_MEAN, IMAGENET_STD, CentreCropped, ImageFolder, Normalization
from crate_mae.evaluation import (
    FeatureSpec,
    blurred_visible,
    class_accuracies,
    features_of,
    linear_probe,
    logistic_regression,
    nearest_neighbours,
    pooled_features,
)
from crate_mae.evaluation.cache import Features, cached, fingerprint_of
from crate_mae.evaluation.neighbours import NEIGHBOURS, TEMPERATURES
from crate_mae.evaluation.probe import HELD_OUT, one_of
from crate_mae.evaluation.scores import score
from crate_mae.model import CrateMAE

NORMALIZATION = Normalization(IMAGENET_MEAN, IMAGENET_STD, 3)


@pytest.fixture
def model() -> CrateMAE:
    torch.manual_seed(0)
    return CrateMAE(
        ModelConfig(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2, decoder_depth=0, decoder_num_heads=2)
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

    @pytest.mark.parametrize("norm", [True, False])
    @pytest.mark.parametrize(
        "of", [lambda model: model, lambda model: classifier_of(model, 4)], ids=["mae", "classifier"]
    )
    def test_are_those_of_hooks(self, model, pixels, norm, of):
        model = of(model)
        seen: list[torch.Tensor] = []
        for block in list(model.blocks)[1:]:
            block.register_forward_hook(lambda module, inputs, output: seen.append(output))
        images = NORMALIZATION(torch.stack(pixels))
        found = features_of(model, images, FeatureSpec("both", layer=-1, last=2, norm=norm))
        tokens = [model.last_norm(each) if norm else each for each in seen[:2]]
        expected = torch.cat([part for each in tokens for part in (each[:, 0], each[:, 1:].mean(1))], 1)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(features_of(model, images, FeatureSpec("cls", 1, norm=norm)), expected[:, :32])

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (FeatureSpec(layer=3), "layer: expected -3 to 2 of 3 layers, got 3"),
            (FeatureSpec(layer=0, last=2), "last: expected 1 to 1, the layers up to layer 0, got 2"),
        ],
    )
    def test_of_layers_that_there_are_not(self, model, pixels, spec, message):
        with pytest.raises(ValueError, match=message):
            features_of(model, NORMALIZATION(torch.stack(pixels)), spec)


class TestCache:
    def folder(self, path: Path) -> CentreCropped:
        generator = np.random.default_rng(0)
        for label, number in itertools.product("ab", range(2)):
            (path / label).mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            image.save(path / label / f"{number}.png")
        return CentreCropped(ImageFolder(path), (16, 16))

    def test_features_are_made_once(self, tmp_path):
        made = Features(torch.randn(3, 4), torch.arange(3))
        times = []

        def make() -> Features:
            times.append(1)
            return made

        for fingerprint, expected in (("one", False), ("one", True), ("other", False), ("one", False)):
            found, was_there = cached(tmp_path / "features" / "a.safetensors", fingerprint, make)
            assert was_there is expected
            assert torch.equal(found.values, made.values) and torch.equal(found.indices, made.indices)
        file = tmp_path / "features" / "a.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
        assert cached(file, "one", make)[1] is False
        assert cached(file, "one", make)[1] is True
        assert len(times) == 4

    def test_the_fingerprint_is_of_all_that_they_depend_on(self, tmp_path, model):
        images, spec = self.folder(tmp_path / "one"), FeatureSpec()

        def fingerprint(**changed: object) -> str:
            return fingerprint_of(*({**given, **changed}).values())

        given = dict(model=model, images=images, normalization=NORMALIZATION, spec=spec, precision="float32")
        first = fingerprint()
        assert fingerprint() == first
        other = CrateMAE(model.config)
        stretched = CrateMAE(ModelConfig(**{**vars(model.config), "lambd": 0.4}))
        stretched.load_state_dict(model.state_dict())
        touched = self.folder(tmp_path / "one")
        before = [
            first,
            fingerprint(model=other),
            fingerprint(model=stretched),
            fingerprint(normalization=Normalization((0.5,) * 3, IMAGENET_STD, 3)),
            fingerprint(spec=FeatureSpec(norm=False)),
            fingerprint(precision="bfloat16"),
            fingerprint(images=CentreCropped(images.source, (8, 16))),
            fingerprint(images=self.folder(tmp_path / "other")),
        ]
        os.utime(touched.source.path(3), ns=(1, 1))
        assert len({*before, fingerprint()}) == 9


def clusters(count: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three classes around three far centres."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return 4 * torch.eye(3, 12)[labels] + noise * torch.randn(count, 12, generator=generator), labels


@pytest.mark.parametrize("method", [nearest_neighbours, linear_probe])
def test_classes_are_found_where_they_can_be(method: Callable):
    assert method(*clusters(60, 0.3, 0), *clusters(30, 0.3, 1)).top1 == 1
    features, labels = clusters(60, 0.3, 0)
    test_features, test_labels = clusters(30, 0.3, 1)
    shifted = method(features, labels, test_features, (test_labels + 1) % 3)
    assert shifted.top1 == 0 and shifted.of_classes == [0, 0, 0]
    assert torch.equal(shifted.confusion, torch.tensor([[0, 0, 10], [10, 0, 0], [0, 10, 0]]))
    assert method(torch.randn(300, 12), labels.repeat(5), torch.randn(300, 12), test_labels.repeat(10)).top1 < 0.5


def hard(count: int, seed: int, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of classes that overlap, correlated and of very different sizes, as those of models are."""
    generator = torch.Generator().manual_seed(0)
    centres, mixing = torch.randn(classes, 24, generator=generator), torch.randn(24, 24, generator=generator)
    sizes = torch.logspace(-2, 2, 24)
    generator.manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    noise = torch.randn(count, 24, generator=generator)
    return 5 + (centres[labels] + 1.5 * noise) @ mixing * sizes, labels


class TestAgainstScikitLearn:
    """On the same features, of 2,000 test images: one image more or less is 5e-4."""

    def test_nearest_neighbours(self):
        (features, labels), (test_features, test_labels) = hard(900, 1), hard(2000, 2)
        scores = nearest_neighbours(features, labels, test_features, test_labels)
        assert len(scores.tried) == len(NEIGHBOURS) * len(TEMPERATURES)
        left_out = {}
        for tried in scores.tried:
            count, temperature = tried["neighbours"], tried["temperature"]

            def weights(distances: np.ndarray, temperature: float = temperature) -> np.ndarray:
                return np.exp((1 - distances) / temperature)

            peer = KNeighborsClassifier(count, weights=weights, metric="cosine", algorithm="brute")
            peer.fit(features.numpy(), labels.numpy())
            assert peer.score(test_features.numpy(), test_labels.numpy()) == pytest.approx(tried["top1"], abs=1e-3)
            distances, others = peer.kneighbors()  # of the training images, none its own neighbour
            votes = np.zeros((len(labels), 7))
            np.add.at(votes, (np.arange(len(labels))[:, None], labels.numpy()[others]), weights(distances))
            found = (votes.argmax(1) == labels.numpy()).mean()
            assert found == pytest.approx(tried["leave_one_out"], abs=1.2e-3)  # one image of 900
            left_out[count, temperature] = tried["leave_one_out"]
        chosen = tuple(scores.chosen.values())
        assert left_out[chosen] == max(left_out.values())
        assert min(left_out.values()) < left_out[chosen] - 0.05

    def test_linear_probe(self):
        (features, labels), (test_features, test_labels) = hard(900, 1), hard(2000, 2)
        scores = linear_probe(features, labels, test_features, test_labels, seed=3)
        mean, deviation = features.double().mean(0), features.double().std(0)
        standard, test_standard = ((each.double() - mean) / deviation for each in (features, test_features))
        held_out = one_of(HELD_OUT, labels, 3)

        def peer(rows: torch.Tensor, penalty: float) -> LogisticRegression:
            of = standard[rows].numpy(), labels[rows].numpy()
            return LogisticRegression(C=1 / (penalty * len(of[0])), tol=1e-8, max_iter=10_000).fit(*of)

        everything = torch.ones(len(labels), dtype=torch.bool)
        for tried in scores.tried:
            known = peer(~held_out, tried["penalty"])
            assert known.score(test_standard.numpy(), test_labels.numpy()) == pytest.approx(tried["top1"], abs=1e-3)
            probabilities = known.predict_proba(standard[held_out].numpy())
            loss = -np.log(probabilities[np.arange(len(probabilities)), labels[held_out].numpy()]).mean()
            assert loss == pytest.approx(tried["held_out_cross_entropy"], abs=1e-3)
        penalty = scores.chosen["penalty"]
        least = min(scores.tried, key=lambda tried: tried["held_out_cross_entropy"])
        assert penalty == least["penalty"] and 0 < scores.tried.index(least) < len(scores.tried) - 1
        found = peer(everything, penalty)
        assert found.score(test_standard.numpy(), test_labels.numpy()) == pytest.approx(scores.top1, abs=1e-3)
        solution = logistic_regression(standard, labels, 7, penalty)
        assert np.abs(solution.weight.numpy() - found.coef_).max() < 1e-3

    def test_a_fifth_of_each_class_is_held_out(self):
        labels = torch.tensor([0] * 20 + [1] * 11 + [2] * 2 + [3])
        held_out = one_of(5, labels, 0)
        assert labels[held_out].bincount(minlength=4).tolist() == [4, 2, 1, 0]
        assert not torch.equal(held_out, one_of(5, labels, 1))


class TestScores:
    def test_top5_and_classes_out_of_the_question(self):
        scores = torch.full((3, 7), -torch.inf)
        scores[:, 0], scores[:, 1] = 2.0, 1.0
        found = score(scores, torch.tensor([0, 1, 4]))
        # The class of the last has no score, though five places are more than the classes that have one.
        assert (found.top1, found.top5) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
        assert found.of_classes == [1, 0, None, None, 0, None, None]
        assert found.class_mean == pytest.approx(1 / 3)
        assert score(scores[:, :5], torch.tensor([0, 1, 4])).top5 is None

    def test_features_that_are_all_the_same_teach_nothing(self):
        features, labels = clusters(60, 0.3, 0)
        constant = torch.cat([features, torch.full((60, 1), 1 / 3)], 1)
        test = torch.cat([features, torch.full((60, 1), 7.0)], 1)
        assert linear_probe(constant, labels, test, labels).top1 == 1


def test_every_image_is_classified_once_by_the_others():
    features, labels = clusters(31, 0.3, 0)
    assert class_accuracies(features, labels) == (1, 1)
    # A lone image of a wrong label is missed, and misleads no other.
    labels[3] = 1
    assert class_accuracies(features, labels).knn == pytest.approx(30 / 31)
    with pytest.raises(ValueError, match="folds: expected 2 to 10, the images of the smallest class, got 11"):
        class_accuracies(features, labels, folds=11)
