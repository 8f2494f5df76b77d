"""Models for ``torch.hub.load``: the published sizes, by their names in ``crate_mae.create_model``, and ``load`` for any other.

    model = torch.hub.load("path/to/crate-kernels", "crate_mae_base", source="local")
    model = torch.hub.load("path/to/crate-kernels", "load", "user/model", source="local")

torch.hub has this folder on ``sys.path`` only while it loads. What crate_mae and crate_kernels import later is found all the
same, as Python looks for a package's modules in the package's own folder. A spawned process finds neither:
it needs an installation.

Names begin with an underscore here unless they are entries, as torch.hub takes everything else that can be called for one.
"""

import os as _os
import warnings as _warnings
from collections.abc import Callable as _Callable
from pathlib import Path as _Path
from typing import Any as _Any

import crate_mae as _crate_mae
from crate_mae import CLASSIFIERS as _CLASSIFIERS
from crate_mae import MODELS as _MODELS

dependencies = ["torch", "einops", "numpy", "PIL", "safetensors", "tqdm"]

_SIZES = ("family", "embed_dim", "depth", "num_heads", "decoder_depth", "decoder_num_heads")
_Model = _crate_mae.CrateMAE | _crate_mae.Classifier

_HERE, _IMPORTED = _Path(__file__).resolve().parent, _Path(_crate_mae.__file__).resolve().parents[1]
if _IMPORTED != _HERE:  # Python imports a package once
    _warnings.warn(f"{_HERE}: models are those of crate_mae in {_IMPORTED}, which was imported before", stacklevel=2)


def _entry(name: str) -> _Callable[..., _Model]:
    """What torch.hub calls for the published size ``name``."""
    config = {**_MODELS, **_CLASSIFIERS}[name]

    def entry(
        weights: str | _os.PathLike[str] | None = None,
        *,
        lambd: float | None = None,
        step_size: float | None = None,
        **overrides: _Any,
    ) -> _Model:
        numbers = {key: value for key, value in dict(lambd=lambd, step_size=step_size).items() if value is not None}
        if weights is None:
            return _crate_mae.create_model(name, **numbers, **overrides)
        if not _os.path.isdir(weights):
            return _crate_mae.load_model(_Path(weights), name, **numbers, **overrides)
        model = _crate_mae.load_model(_Path(weights), **numbers, **overrides)
        for field in _SIZES:
            wanted, found = (getattr(of, field, None) for of in (config, model.config))
            if found != wanted:
                raise ValueError(
                    f"{weights}: expected a model of the size {name}, whose {field} is {wanted}, found {found}; "
                    f"the entry 'load' takes a folder with any model"
                )
        return model

    kind, of_file = "Classifier", "0.1 unless given"
    if name in _MODELS:
        kind, of_file = "CrateMAE", "a file of weights does not hold them, and needs both"
    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"""A {kind} of the published size {name}, on the CPU and in training mode.

    Its configuration: {", ".join(f"{field}={value!r}" for field, value in vars(config).items())}.

    Args:
        weights: an official checkpoint, or a file of weights alone (.pth, .pt, .safetensors); or the folder of such a model, as
            save_pretrained, save_model and runs write it. Without, the model is freshly initialised.
        lambd, step_size: sparsity weight and step of the sparse steps: {of_file}. A folder's
            config.json says them.
        **overrides: further fields of the configuration that differ, such as img_size; not with a folder.

    Raises:
        FileNotFoundError: nothing is at weights.
        ValueError: a file of weights came without what is needed with it, or a folder with what it says itself; the model in
            the folder has another size; a file is damaged; or an override is out of range.
        TypeError: an override is no field of the configuration, or not of its type.
        RuntimeError: the weights do not fit the model; unknown entries count.
    """
    return entry


globals().update({name: _entry(name) for name in (*_MODELS, *_CLASSIFIERS)})


def load(name: str | _os.PathLike[str], **options: _Any) -> _Model:
    """The model in a folder, or in a repository on the Hugging Face Hub, on the CPU and in evaluation mode.

    Args:
        name: a folder that save_pretrained, save_model or a run wrote; or the id of a repository, "user/model", which
            huggingface_hub downloads.
        **options: revision, token, cache_dir, force_download and local_files_only, as of crate_mae.Backbone.from_pretrained.

    Raises:
        Exception: as of crate_mae.Backbone.from_pretrained.
    """
    return _crate_mae.Backbone.from_pretrained(_os.fspath(name), **options)
