"""State dicts that others wrote: read from their files without running anything, and brought to the names of a model."""

from __future__ import annotations

import argparse
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from crate_mae.model import UNUSED_OFFICIAL_ENTRIES, CrateMAE
from crate_mae.registry import MODELS

# Where a training checkpoint has its weights: facebookresearch/mae's, the official CRATE's, of PyTorch's tutorial, DeepSpeed's.
ENTRIES = ("model", "state_dict", "model_state_dict", "module")

# The names under which PyTorch's wrappers hold what they wrap. Those of torch.compile, of activation checkpointing and of
# FullyShardedDataParallel mean nothing else wherever they stand; "module" is of DistributedDataParallel, DataParallel and
# AveragedModel, which wrap whole models.
_WRAPPED_ANYWHERE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
WRAPPED_AS = (*_WRAPPED_ANYWHERE, "module")

# What a module has in place of a weight that something else computes, and how to be rid of it.
_COMPUTED_WEIGHTS = {
    r"\.parametrizations\.": "remove the parametrization first, torch.nn.utils.parametrize.remove_parametrizations",
    r"\.(lora_\w+|base_layer)\.": "merge the adapter first, merge_and_unload() of peft",
    r"_(orig|mask)$": "make the pruning permanent first, torch.nn.utils.prune.remove",
    r"\.weight_[gv]$": "remove the weight norm first, torch.nn.utils.remove_weight_norm",
}

# What scripts save beside the weights as a rule: their arguments and numbers. Each is data alone, and calls nothing when it is
# made. The names are those in the file, which other versions of Python and NumPy and other systems write differently.
_HARMLESS = [
    (argparse.Namespace, "argparse.Namespace"),
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
    (np.dtype, "numpy.dtype"),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
]
_reading = threading.Lock()  # PyTorch keeps one list for the process


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a weights file, under the names that it has there; of a training checkpoint, its weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no named tensors, or it does under more than one of ``ENTRIES``.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    except SafetensorError as problem:
        raise ValueError(f"{path}: not a whole safetensors file ({problem})") from problem
    if _is_state_dict(state):
        return state
    found = [entry for entry in ENTRIES if isinstance(state, dict) and _is_state_dict(state.get(entry))]
    if len(found) > 1:
        raise ValueError(f"{path}: holds weights under {' and '.join(found)}; save the ones that are meant alone")
    if not found:
        raise ValueError(f"{path}: expected tensors by name, or a checkpoint with them under {', '.join(ENTRIES)}")
    return state[found[0]]


def _is_state_dict(state: Any) -> bool:
    return isinstance(state, dict) and bool(state) and all(isinstance(value, Tensor) for value in state.values())


def _read_checkpoint(path: Path) -> Any:
    with _reading:
        # Not those that the caller allows as well: leaving the block would take them back.
        harmless = [known for known in _HARMLESS if known not in torch.serialization.get_safe_globals()]
        try:
            with torch.serialization.safe_globals(harmless):
                return torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as problem:  # what is no pickle of torch's raises anything, a KeyError for one
            met = re.search(r"GLOBAL (\S+)", str(problem))
            if met is None:
                raise ValueError(
                    f"{path}: expected a file that torch.save wrote, whole ({_line(problem)})"
                ) from problem
            raise ValueError(
                f"{path}: expected tensors and plain values, found {met[1]}, which may run code and is not loaded: save the "
                f"state_dict() alone; if you trust the file, torch.load(..., weights_only=False) reads it"
            ) from problem


def _line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:100]}"


def plain_name(name: str) -> str:
    """The name of a module or tensor without those of wrappers that may stand anywhere in it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED_ANYWHERE)


def plain_names(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The state dict without what PyTorch's wrappers put into its names, as ``load_model`` says.

    Raises:
        RuntimeError: two entries have one name then.
    """
    names = {name: plain_name(name) for name in state}
    while names and all(plain.startswith("module.") for plain in names.values()):
        names = {name: plain.removeprefix("module.") for name, plain in names.items()}
    plain_state: dict[str, Tensor] = {}
    for name, plain in names.items():
        if plain in plain_state:
            raise RuntimeError(f"{source}: {plain} is there twice, once as {name}")
        plain_state[plain] = state[name]
    return plain_state


def fitting(
    weights: Mapping[str, Tensor], model: CrateMAE, path: Path, *, own: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The weights by the model's names, where those in ``own`` keep the model's values.

    Raises:
        RuntimeError: they do not fit; in a line, where torch has one for every entry.
        ValueError: one has other than floating-point values, or none.
    """
    expected = model.state_dict()
    found = plain_names(weights, path)
    found = {name: value for name, value in found.items() if name not in UNUSED_OFFICIAL_ENTRIES}
    found |= {name: expected[name] for name in own if name in found}
    problems = differences(found, expected)
    if not problems:
        for name, value in found.items():
            if type(value) not in (Tensor, nn.Parameter) or value.is_meta or not value.is_floating_point():
                what = f"{type(value).__name__} of {value.dtype} on {value.device}"
                raise ValueError(f"{path}: {name}: expected a tensor of floating-point numbers, got a {what}")
        return found
    token, hint = found.get("cls_token"), ""
    if token is not None and token.ndim and token.shape[-1] != model.config.embed_dim:
        sizes = [name for name, config in MODELS.items() if config.embed_dim == token.shape[-1]]
        hint = f"; its tokens are {token.shape[-1]} wide{', as those of ' + sizes[0] if sizes else ''}"
    elif found.keys() != expected.keys() and (prefix := _prefix(weights, expected)) is not None:
        hint = (
            f"; they are there with the prefix {prefix!r}: save "
            f"{{k[{len(prefix)}:]: v for k, v in state.items() if k.startswith({prefix!r})}}"
        )
    raise RuntimeError(
        f"{path}: the weights are not this model's (width {model.config.embed_dim}): {'; '.join(problems)}{hint}"
    )


def _prefix(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Behind what ``weights`` has all expected entries, if there is such a prefix: the shortest."""
    prefixes = sorted({name.removesuffix("cls_token") for name in weights if name.endswith(".cls_token")}, key=len)
    for prefix in prefixes:
        behind = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if expected.keys() <= plain_names(behind, prefix).keys():
            return prefix
    return None


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Between the names and shapes of two state dicts, in words: one of each kind, and how many more there are."""
    problems = []
    for what, names in (("lacks", expected.keys() - found.keys()), ("has unknown", found.keys() - expected.keys())):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            remedies = (remedy for form, remedy in _COMPUTED_WEIGHTS.items() if re.search(form, first))
            remedy = next(remedies, None) if what == "has unknown" else None
            problems.append(f"{what} {first}{more}{f': {remedy}' if remedy else ''}")
    for name in sorted(expected.keys() & found.keys()):
        if expected[name].shape != found[name].shape:
            problems.append(f"{name} is {tuple(found[name].shape)} and not {tuple(expected[name].shape)}")
            break
    return problems
