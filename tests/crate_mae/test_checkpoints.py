"""Saving, loading, and official checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import SMALL, small_model

from crate_mae import CrateMAE, load_model, save_model


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
