"""``hubconf.py``: torch.hub lists, explains and loads the models of a folder that Python knows nothing of otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import SMALL, SMALL_CLASSIFIER, small_classifier, small_model

from crate_mae import CLASSIFIERS, MODELS, create_model, load_model

ROOT = Path(__file__).resolve().parents[1]
NAMES = [*MODELS, *CLASSIFIERS]

UNKNOWN_TO_PYTHON = f"""
import importlib.util, os, sys
root = {str(ROOT)!r}
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
sys.path[:] = [path for path in sys.path if os.path.realpath(path) != root]
assert importlib.util.find_spec("crate_mae") is None and importlib.util.find_spec("crate_kernels") is None
import torch
"""
"""Without what ``pip install --editable`` and PYTHONPATH do."""


def run(script: str, folder: Path) -> list[str]:
    """The lines that a script prints in a fresh process elsewhere, which cannot import crate_mae by itself."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"TORCH_HOME": str(folder / "torch"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", UNKNOWN_TO_PYTHON + script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def loaded(*args: object, **options: object) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), *args, source="local", **options)


def test_list_and_help(tmp_path: Path) -> None:
    """These two take repositories of GitHub alone, of which torch.hub finds its copy in the cache."""
    hub = tmp_path / "torch" / "hub"
    hub.mkdir(parents=True)
    (hub / "user_crate-kernels_main").symlink_to(ROOT)
    script = """
torch.hub._validate_not_a_forked_repo = None  # which would ask GitHub
options = dict(trust_repo=True)
entries = torch.hub.list("user/crate-kernels:main", verbose=False, **options)
print(*entries)
print(*(torch.hub.help("user/crate-kernels:main", entry, **options).splitlines()[0] for entry in entries), sep=chr(10))
"""
    entries, *first_lines = run(script, tmp_path)
    assert sorted(entries.split()) == sorted([*NAMES, "load"])
    for entry, line in zip(entries.split(), first_lines, strict=True):
        assert line.startswith(("A CrateMAE of", "A Classifier of", "The model in a folder"))
        assert entry == "load" or f" {entry}, " in line


def test_models_of_each_family_train_after_the_folder_left_the_path(tmp_path: Path) -> None:
    """By a relative path, which the working directory then makes another: what is imported late is found all the same."""
    script = f"""
models = {{
    name: torch.hub.load(os.path.relpath(root), name, source="local", **settings)
    for name, settings in {dict(crate_mae_tiny=SMALL, crate_tiny=SMALL_CLASSIFIER, crate_alpha_base=SMALL_CLASSIFIER)}.items()
}}
os.chdir("/")
assert not {{root, os.path.relpath(root)}} & set(sys.path)
assert "crate_kernels.ista.composed" not in sys.modules and "crate_mae.training" not in sys.modules
for name, model in models.items():
    out = model(torch.randn(2, 3, 16, 16))
    (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
    print(name, all(bool(p.grad.abs().sum() > 0) for p in model.parameters() if p.requires_grad))
import crate_mae
models["crate_tiny"].save_pretrained({str(tmp_path / "saved")!r})
print(*(getattr(crate_mae, name).__name__ for name in ("pretrain", "finetune", "download")))
"""
    assert run(script, tmp_path) == [
        "crate_mae_tiny True",
        "crate_tiny True",
        "crate_alpha_base True",
        "pretrain finetune download",
    ]
    assert {"config.json", "model.safetensors", "README.md"} <= set(os.listdir(tmp_path / "saved"))


def test_the_dependencies_named_are_those_of_loading(tmp_path: Path) -> None:
    """Each is imported, and what else the package depends on is not needed."""
    small_model().save_pretrained(tmp_path / "saved")
    script = """
sys.modules.update(dict.fromkeys(["triton", "jsonargparse", "yaml", "huggingface_hub", "datasets"]))
model = torch.hub.load(root, "load", "saved", source="local")
with torch.no_grad():
    model.encode(torch.randn(1, 3, 16, 16))
sys.path.insert(0, root)
import hubconf
print(*(name for name in hubconf.dependencies if name not in sys.modules))
"""
    assert run(script, tmp_path) == [""]


def test_load_gives_the_bits_that_were_saved(tmp_path: Path) -> None:
    model = small_classifier("crate_alpha")
    model.save_pretrained(tmp_path / "saved")
    script = """
model = torch.hub.load(root, "load", "saved", source="local")
torch.save((model.state_dict(), vars(model.config), model.training), "loaded.pt")
"""
    run(script, tmp_path)
    state, config, training = torch.load(tmp_path / "loaded.pt")
    assert config == vars(model.config) and not training
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_is_create_model_of_its_name(name: str) -> None:
    with torch.device("meta"):
        model = loaded(name, img_size=112, lambd=0.25)
        assert model.config == create_model(name, img_size=112, lambd=0.25).config
        assert loaded(name).config == {**MODELS, **CLASSIFIERS}[name]


def test_weights_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    model = create_model("crate_tiny", depth=1, img_size=32)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    of_file = loaded("crate_tiny", weights=tmp_path / "weights.pth", lambd=0.2, depth=1, img_size=32)
    assert of_file.config.lambd == 0.2 and torch.equal(of_file.cls_token, model.cls_token)
    whole = create_model("crate_tiny", lambd=0.3, img_size=32, patch_size=4, num_classes=3)
    whole.save_pretrained(tmp_path / "saved")
    of_folder = loaded("crate_tiny", weights=str(tmp_path / "saved"))
    assert of_folder.config == whole.config and torch.equal(of_folder.cls_token, whole.cls_token)


def test_weights_that_do_not_say_enough_or_are_of_another_size(tmp_path: Path) -> None:
    model = small_model()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="do not say lambd, step_size"):
        loaded("crate_mae_tiny", weights=tmp_path / "weights.pth", **SMALL)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"size crate_mae_tiny, whose embed_dim is 384, found 32; the entry 'load'"):
        loaded("crate_mae_tiny", weights=tmp_path / "saved")
    with pytest.raises(ValueError, match="whose family is crate, found None"):
        loaded("crate_tiny", weights=tmp_path / "saved")
    with pytest.raises(ValueError, match=r"config\.json says"):
        loaded("crate_mae_tiny", weights=tmp_path / "saved", lambd=0.5)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        loaded("crate_mae_tiny", weights=tmp_path / "nowhere", lambd=0.5, step_size=0.1)
    assert load_model(tmp_path / "saved").config == loaded("load", tmp_path / "saved").config


def test_another_crate_mae_that_was_imported_before_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "hubconf.py").write_bytes((ROOT / "hubconf.py").read_bytes())
    with pytest.warns(
        UserWarning, match=f"{tmp_path}: models are those of crate_mae in {ROOT}, which was imported before"
    ):
        torch.hub.load(str(tmp_path), "crate_mae_tiny", source="local", **SMALL)
