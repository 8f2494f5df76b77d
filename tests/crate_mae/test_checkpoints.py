"""Saving, loading, and official checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import SMALL, small_model

from crate_mae import CrateMAE, create_model, load_model, load_transform, save_model


def official_state(model: CrateMAE) -> dict[str, torch.Tensor]:
    """A state dict with the entries that official checkpoints carry and never use."""
    unused = dict(pos_embed=torch.randn(1, 17, 32), **{"decoder_embed.weight": torch.randn(32, 32)})
    return {**model.state_dict(), **unused, "decoder_embed.bias": torch.randn(32)}


def same(a: CrateMAE, b: CrateMAE) -> bool:
    other = b.state_dict()
    return a.config == b.config and all(torch.equal(value, other[name]) for name, value in a.state_dict().items())


def test_round_trip_keeps_weights_lambda_and_step_size(tmp_path: Path) -> None:
    model = small_model(lambd=0.3, step_size=0.2, img_size=(8, 16))
    save_model(model, tmp_path)
    assert same(load_model(tmp_path), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_save_keeps_other_keys_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": 7}')
    save_model(small_model(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 7


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_checkpoint_loads_strictly(suffix: str, tmp_path: Path) -> None:
    model, path = small_model(lambd=5.0), tmp_path / f"official{suffix}"
    if suffix == ".pth":
        torch.save({"model": official_state(model), "epoch": 3}, path)
    else:
        save_file(official_state(model), path)
    loaded = load_model(path, "crate_mae_tiny", lambd=5.0, step_size=0.1, **SMALL)
    assert same(loaded, model)


def test_unknown_entries_are_an_error() -> None:
    model = small_model()
    with pytest.raises(RuntimeError, match="rotary"):
        model.load_state_dict({**official_state(model), "rotary": torch.ones(1)}, strict=True)
    with pytest.raises(RuntimeError, match="mask_token"):
        model.load_state_dict({k: v for k, v in official_state(model).items() if k != "mask_token"}, strict=True)


def test_loading_does_not_change_the_callers_state_dict() -> None:
    state = official_state(small_model())
    names = set(state)
    small_model().load_state_dict(state, strict=True)
    assert set(state) == names


def test_weights_alone_need_lambda_and_step_size_named(tmp_path: Path) -> None:
    path = tmp_path / "official.safetensors"
    save_file(official_state(small_model()), path)
    with pytest.raises(ValueError, match="do not say lambd, step_size"):
        load_model(path, "crate_mae_tiny", **SMALL)
    with pytest.raises(ValueError, match="do not say name, lambd"):
        load_model(path, step_size=0.1)


def test_a_directory_knows_what_it_holds(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path)
    with pytest.raises(ValueError, match="pass no name, lambd"):
        load_model(tmp_path, lambd=0.1)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model"]["lambd"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks lambd"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_model(tmp_path / "nowhere.pth", "crate_mae_tiny", lambd=1.0, step_size=0.1)


def test_weights_are_as_readable_as_their_config(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


OFFICIAL = dict(lambd=0.5, step_size=0.1)


def test_weights_that_do_not_fit_are_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = small_model().state_dict()
    cases = [
        (create_model("crate_mae_tiny", depth=1, decoder_depth=1).state_dict(), "384 wide, as those of crate_mae_tiny"),
        ({f"module.{name}": value for name, value in state.items()}, "save model.module.state_dict()"),
        ({**state, "rotary": torch.ones(1)}, "has unknown rotary"),
        ({name: value for name, value in state.items() if name != "mask_token"}, "lacks mask_token"),
    ]
    for weights, told in cases:
        torch.save(weights, path)
        with pytest.raises(RuntimeError) as caught:
            load_model(path, "crate_mae_tiny", **OFFICIAL, **SMALL)
        message = str(caught.value)
        assert told in message and str(path) in message and "\n" not in message and len(message) < 400, message


def test_checkpoints_under_state_dict_load(tmp_path: Path) -> None:
    model, path = small_model(**OFFICIAL), tmp_path / "weights.pt"
    torch.save({"state_dict": official_state(model)}, path)
    assert same(load_model(path, "crate_mae_tiny", **OFFICIAL, **SMALL), model)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_checkpoint_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    contents: list[bytes] = [b"", b"hello", b"\xff\xd8\xff\xe0"]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"weights{suffix}: "):
            load_model(path, "crate_mae_tiny", **OFFICIAL, **SMALL)
    if suffix == ".pth":
        for content in (small_model(), [torch.ones(1)], {"epoch": 3}):
            torch.save(content, path)
            with pytest.raises(ValueError, match=r"weights\.pth: expected"):
                load_model(path, "crate_mae_tiny", **OFFICIAL, **SMALL)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"model": ', "not whole JSON"),
        ("[]", "expected a JSON object"),
        ('{"model": {"foo": 1}}', "lacks lambd, step_size"),
        ('{"model": 3}', "model: expected a section"),
        ('{"model": {"lambd": 0.5, "step_size": 0.1, "img_size": "96"}}', "model.img_size: expected an integer"),
    ],
)
def test_a_config_that_says_nothing_is_named(content: str, told: str, tmp_path: Path) -> None:
    save_model(small_model(), tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json: .*{told}"):
        load_model(tmp_path)


def test_unknown_fields_of_a_config_are_named(tmp_path: Path) -> None:
    save_model(small_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model": config["model"] | {"depht": 3}}))
    with pytest.raises(ValueError, match="has depht"):
        load_model(tmp_path)


def test_transform_standardises_the_centre_as_the_run_did(tmp_path: Path) -> None:
    save_model(small_model(img_size=8), tmp_path)
    with pytest.raises(ValueError, match=r"section images .*save_model\(model, directory, mean=..., std=...\)"):
        load_transform(tmp_path)
    save_model(small_model(img_size=8), tmp_path, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 2.0])
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    expected = torch.tensor(pixels[:, 2:10]).permute(2, 0, 1) / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    expected /= torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    found = load_transform(tmp_path)(Image.fromarray(pixels))
    torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match=r"image: expected a Pillow image, .* got str"):
        load_transform(tmp_path)("a.jpg")
    grey = Image.fromarray(pixels[..., 0])
    assert load_model(tmp_path).encode(load_transform(tmp_path)(grey)[None]).isfinite().all()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(mean=[0.5] * 3), "mean and std: expected both or neither"),
        (dict(mean=[0.5], std=[0.5]), "mean: expected 3 values"),
        (dict(mean=[0.5] * 3, std=[0.0] * 3), "std: expected positive"),
    ],
)
def test_a_normalisation_that_is_none_is_not_saved(given: dict, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        save_model(small_model(), tmp_path / "model", **given)
    assert not (tmp_path / "model").exists()
