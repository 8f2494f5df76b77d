"""Models on disk: ``model.safetensors`` with ``config.json``, and official checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from crate_mae.classifiers import Classifier, model_of
from crate_mae.config import ClassifierConfig, ModelConfig
from crate_mae.data.transforms import Normalization
from crate_mae.files import make_folder, replaced
from crate_mae.model import CrateMAE
from crate_mae.registry import CLASSIFIERS, create_model
from crate_mae.state_dicts import (
    CHECKSUM,
    WRAPPED_AS,
    check_file,
    checksum,
    differences,
    fitting,
    objection_to,
    one_line,
    plain_name,
    plain_names,
    read_weights,
)

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

# Settings of a layer that are no weights. A caller may change them on one layer; the configuration has one value for all layers.
_SETTINGS = ("heads", "scale", "is_causal", "window", "dim", "step_size", "lambd", "eta", "lmbda", "threshold", "eps")


def save_model(
    model: nn.Module,
    directory: str | Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write the weights and the configuration, lambda and step size included; other keys of ``config.json`` stay.

    Both files are written before either replaces an older one; after an error the older files are unchanged. Settings of training
    (``stream``, ``recompute``, dropout, ``drop_path``), hooks and replaced forwards are not saved. The metadata of
    ``model.safetensors`` has a checksum of the weights, which ``load_model`` verifies.

    Args:
        model: a CrateMAE or Classifier, or one inside PyTorch's own wrappers (torch.compile, DistributedDataParallel,
            AveragedModel) as a whole or in parts: the names in the file are always those of the plain model. Weights keep their
            dtype. Weights that share memory are written separately: after loading they are equal, but no longer tied.
        mean, std: for each channel, the mean and standard deviation of pixels in [0, 1] by which the model's images were
            standardised, (pixels / 255 - mean) / std. ``load_transform`` needs them.
        classes: names of the classes, in the order of a classifier's logits; ``classes`` in ``config.json``.

    Raises:
        TypeError: model is of another class.
        ValueError: only one of mean and std is given, or one of them does not have a finite number for each channel; or classes
            are not a name for each logit; or ``load_model`` could not make the model from its ``config``: parameters have other
            names or shapes (parametrizations, adapters), no values (on the meta device), values that are not finite, or only a
            shard in this process, or layers have other settings.
    """
    directory, model = Path(directory), unwrapped(model)
    config_file = directory / CONFIG_FILE
    other = read_json(config_file) if config_file.exists() else {}
    write_files(directory, packed(model, weights_to_save(model), other, mean=mean, std=std, classes=classes))


def packed(
    model: CrateMAE | Classifier,
    weights: Mapping[str, Tensor],
    other: Mapping[str, Any],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, bytes]:
    """The files of a model directory, by name, as ``save_model`` writes them; arguments and errors as there.

    Args:
        weights: ``weights_to_save(model)``.
        other: further entries of ``config.json``; those of the model and of the arguments take their place.
    """
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std: expected both or neither, got {mean} and {std}")
    config = {**other, "model": dataclasses.asdict(model.config)}
    if mean is not None and std is not None:
        mean, std = _numbers("mean", mean), _numbers("std", std)
        Normalization(mean, std, model.config.in_chans)  # which checks them
        config["images"] = {**config.get("images", {}), "mean": mean, "std": std}
    if classes is not None:
        config["classes"] = _names(classes, model)
    # A single entry: safetensors writes several in an order that varies, and the same model shall be the same bytes.
    of_weights = save(dict(weights), metadata={CHECKSUM: checksum(weights)})
    return {CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(), WEIGHTS_FILE: of_weights}


def _numbers(name: str, values: Sequence[float]) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a number for each channel, got {values!r}") from error
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{name}: expected finite numbers, got {numbers}")
    return numbers


def _names(classes: Sequence[str], model: CrateMAE | Classifier) -> list[str]:
    wanted = model.num_classes if isinstance(model, Classifier) else 0
    named = not isinstance(classes, str) and all(isinstance(name, str) for name in classes)
    if not named or len(classes) != wanted:
        raise ValueError(f"classes: expected {wanted} names, one for each logit, got {classes!r:.200}")
    return list(classes)


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write several files, by name, into a directory, which is created if need be: all of them, or none.

    Raises:
        OSError: one cannot be written.
    """
    make_folder(directory)
    with replaced(*(directory / name for name in files)) as outputs:
        for output, content in zip(outputs, files.values(), strict=True):
            output.write(content)


def load_model(
    path: str | Path,
    name: str | None = None,
    *,
    lambd: float | None = None,
    step_size: float | None = None,
    **overrides: Any,
) -> CrateMAE | Classifier:
    """A model from a directory that ``save_model`` or a pre-training run wrote, or from an official checkpoint file.

    It is on the CPU and in training mode, like a new one; its layers compute the same in evaluation. Its parameters are float32:
    16-bit weights are widened, float64 is rounded, and a warning says so.

    A file of weights is a ``.safetensors`` file or a file of ``torch.save``: a state dict, or a training checkpoint with one
    under ``model``, ``state_dict``, ``model_state_dict`` or ``module``. No code in it is run: beside tensors and plain values it
    may hold what scripts usually save, an ``argparse.Namespace``, paths and NumPy's numbers.

    Parts of names that PyTorch's own wrappers add are dropped: ``_orig_mod.``, ``_checkpoint_wrapped_module.`` and
    ``_fsdp_wrapped_module.`` anywhere, ``module.`` in front of every name, in any order and number. Any other prefix, such as
    that of a model inside another, is an error that names it.

    Args:
        path: the directory, or a ``.pth``, ``.pt`` or ``.safetensors`` file with weights alone.
        name: the published size of weights alone, as for ``create_model``.
        lambd, step_size: needed with weights alone of a CRATE-MAE, which do not hold them and mean nothing without them. Official
            releases were trained with lambd 5.0, later 0.5, and step size 0.1. For CRATE and CRATE-alpha both are 0.1 by default,
            as in all their releases.
        **overrides: further fields of ``ModelConfig`` or ``ClassifierConfig`` that differ from the published size.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: weights alone came without name, lambd or step_size; or a directory came with any of them; or a file is
            not what its name says, or damaged; or weights are no finite floating-point numbers.
        RuntimeError: the weights do not fit the model; unknown entries count.
    """
    path = Path(path)
    if os.path.isdir(path):
        if name is not None or lambd is not None or step_size is not None or overrides:
            raise ValueError(
                f"{path}: its {CONFIG_FILE} says what the model is; pass no name, lambd, step_size or overrides"
            )
        model = model_of(read_config(path))
        path = path / WEIGHTS_FILE
    else:
        check_file(path, "no such file or directory")
        numbers = dict(lambd=lambd, step_size=step_size)
        needed = dict(name=name) if name in CLASSIFIERS else dict(name=name, **numbers)
        missing = [key for key, value in needed.items() if value is None]
        if name is None or missing:
            raise ValueError(
                f"{path}: weights alone do not say {', '.join(missing)}; name them (official: step_size=0.1), "
                f"or pass the directory of a run, whose {CONFIG_FILE} says them"
            )
        said = {key: value for key, value in numbers.items() if value is not None}
        model = create_model(name, **said, **overrides)
    model.load_state_dict(fitting(read_weights(path), model, path), strict=True)
    return model


def load_weights(model: CrateMAE, path: str | Path) -> None:
    """Give a model the weights of a directory or a file, to start a new training from.

    The image size may differ, as the positions are no weights; lambda, step size and the kind of target may differ, too, as a
    training may change them.

    Args:
        path: as for ``load_model``.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the model in the directory has other sizes, heads included; or as for ``load_model``.
        RuntimeError: the weights do not fit the model; unknown entries count.
    """
    path = Path(path)
    if os.path.isdir(path):
        config = read_mae_config(path)
        for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "decoder_depth", "decoder_num_heads"):
            found, wanted = getattr(config, name), getattr(model.config, name)
            if found != wanted:
                raise ValueError(f"{path}: the model there has {name} {found}, and this one {wanted}")
        path = path / WEIGHTS_FILE
    weights = fitting(read_weights(path), model, path, own=("decoder_pos_embed",))
    model.load_state_dict(weights, strict=True)


def unwrapped(model: nn.Module) -> CrateMAE | Classifier:
    """The model inside PyTorch's wrappers, which have no parameters of their own."""
    inner: Any = model
    while isinstance(inner, nn.Module) and not isinstance(inner, CrateMAE | Classifier):
        children, own = list(inner.named_children()), list(inner.parameters(recurse=False))
        inner = children[0][1] if len(children) == 1 and children[0][0] in WRAPPED_AS and not own else None
    if not isinstance(inner, CrateMAE | Classifier):
        raise TypeError(
            f"model: expected a CrateMAE, a Classifier, or one in torch.compile or DistributedDataParallel, "
            f"got {type(model).__name__}"
        )
    return inner


def weights_to_save(model: CrateMAE | Classifier) -> dict[str, Tensor]:
    """The model's state dict, by plain names and each in memory of its own; errors as of ``save_model``."""
    with torch.device("meta"):
        loaded = model_of(model.config)  # the model that ``load_model`` will make, without values
    state = plain_names(model.state_dict(), "model")
    if problems := differences(state, loaded.state_dict()):
        raise ValueError(f"model: not what load_model makes of its config: {'; '.join(problems)}")
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    for name, other in loaded.named_modules():
        found = modules.get(name)
        if found is None or not (
            type(found).forward is type(other).forward or (type(found) is nn.Linear and isinstance(other, nn.Linear))
        ):
            raise ValueError(
                f"model: {name} is {type(found).__name__}, and load_model makes it {type(other).__name__}; save its "
                f"state_dict() yourself, and make the same change again after loading"
            )
        if isinstance(other, nn.Sequential) and len(found) != len(other):
            raise ValueError(f"model: {name} has {len(found)} steps, and load_model makes it with {len(other)}")
        for setting in _SETTINGS:
            if not hasattr(other, setting):
                continue
            value, expected = getattr(found, setting, None), getattr(other, setting)
            is_same = value is None if expected is None else isinstance(value, (int, float, str)) and value == expected
            if not is_same:
                shared = hasattr(model.config, setting)
                remedy = f"what all layers share can be set there: dataclasses.replace(model.config, {setting}=...)"
                raise ValueError(
                    f"model: {name}.{setting} is {value}, and load_model makes it {expected} of model.config; "
                    f"{remedy if shared else 'save its state_dict() yourself, and set it again after loading'}"
                )
    weights: dict[str, Tensor] = {}
    taken = set()
    for name, value in state.items():
        if type(value) is not Tensor:
            raise ValueError(
                f"model: {name}: expected a plain tensor, got a {type(value).__name__}; gather sharded weights first, on all "
                f"ranks, by torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
            )
        if value.is_meta:
            raise ValueError(f"model: {name}: expected values, got none (meta device); load or initialise it first")
        if objection := objection_to(value, torch.float32):
            raise ValueError(f"model: {name}: {objection}")
        value = value.cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        weights[name] = value.clone() if memory in taken else value
        taken.add(memory)
    return weights


def read_config(directory: str | Path) -> ModelConfig | ClassifierConfig:
    """The configuration of the model that ``save_model`` or a pre-training run wrote to ``directory``.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: it has no whole model section.
    """
    path = Path(directory) / CONFIG_FILE
    fields = read_json(path).get("model", {})
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: model: expected a section of settings, got {fields!r}")
    missing = {"lambd", "step_size"} - fields.keys()
    if missing:
        raise ValueError(
            f"{path}: its model section lacks {', '.join(sorted(missing))}; the weights mean nothing without"
        )
    kind = ClassifierConfig if "family" in fields else ModelConfig
    unknown = fields.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        names = one_line(", ".join(sorted(unknown)))
        raise ValueError(f"{path}: its model section has {names}, which no {kind.__name__} has")
    try:
        return kind(**fields)
    except (TypeError, ValueError) as problem:
        raise ValueError(one_line(f"{path}: model.{problem}")) from problem


def read_mae_config(directory: str | Path) -> ModelConfig:
    """As ``read_config``, with a ValueError where the model is not a CRATE-MAE, the only kind that reconstructs."""
    config = read_config(directory)
    if not isinstance(config, ModelConfig):
        raise ValueError(f"{directory}: expected a CRATE-MAE, found a classifier (family {config.family})")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The content of a ``config.json``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object.
    """
    check_file(path, f"no such file; a model directory holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as problem:  # no UTF-8; numbers of 5,000 digits; 10,000 times "["
        raise ValueError(f"{path}: not whole JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object with a model section, got {type(content).__name__}")
    return content
