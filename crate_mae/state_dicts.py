"""State dicts in files of any origin: read without running code, and renamed to the names of a model."""

from __future__ import annotations

import argparse
import os
import re
import stat
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from crate_mae.classifiers import Classifier
from crate_mae.model import UNUSED_OFFICIAL_ENTRIES, CrateMAE
from crate_mae.registry import CLASSIFIERS, MODELS

# Entries of training checkpoints that hold the weights: facebookresearch/mae, official CRATE, PyTorch's tutorial, DeepSpeed.
ENTRIES = ("model", "state_dict", "model_state_dict", "module")

# Attributes in which PyTorch's wrappers hold the wrapped module. Those of torch.compile, activation checkpointing and
# FullyShardedDataParallel may stand anywhere in a name. "module" is that of DistributedDataParallel, DataParallel and
# AveragedModel, which wrap whole models, so that it only stands in front.
_WRAPPED_ANYWHERE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
WRAPPED_AS = (*_WRAPPED_ANYWHERE, "module")

# Dtypes that weights may have in a file; a loaded model is float32.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The entry in a safetensors file's metadata for the ``checksum`` of its weights, written by ``save_model``.
CHECKSUM = "crc32"

# Names of parameters that a weight is computed from, and how to turn them into that weight.
_COMPUTED_WEIGHTS = {
    r"\.parametrizations\.": "remove the parametrization first, torch.nn.utils.parametrize.remove_parametrizations",
    r"\.(lora_\w+|base_layer)\.": "merge the adapter first, merge_and_unload() of peft",
    r"_(orig|mask)$": "make the pruning permanent first, torch.nn.utils.prune.remove",
    r"\.weight_[gv]$": "remove the weight norm first, torch.nn.utils.remove_weight_norm",
}

_numpy_scalar: Any = np.float64(0).__reduce__()[0]  # the function that makes one; NumPy's stub takes it for a text

# What scripts usually save beside the weights: their arguments and numbers. These classes are plain data, and run no code when
# they are loaded. The names are those in the files, which versions of Python and NumPy and systems write differently.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (argparse.Namespace, "argparse.Namespace"),
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
    (np.dtype, "numpy.dtype"),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
]
_reading = threading.Lock()  # PyTorch has one list of safe classes for the whole process


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a weights file or a training checkpoint, with the names in the file.

    Checksums in the file are verified: that of ``save_model``, and those in archives of ``torch.save``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file, or not whole, or damaged; it holds no named tensors, or it does under more than
            one of ``ENTRIES``.
    """
    check_file(path)
    state: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    if _is_state_dict(state):
        return state
    found = [entry for entry in ENTRIES if isinstance(state, dict) and _is_state_dict(state.get(entry))]
    if len(found) > 1:
        raise ValueError(f"{path}: holds weights under {' and '.join(found)}; save the ones that are meant alone")
    if not found:
        raise ValueError(f"{path}: expected tensors by name, or a checkpoint with them under {', '.join(ENTRIES)}")
    return state[found[0]]


def _is_state_dict(state: Any) -> bool:
    entries = state.items() if isinstance(state, dict) else ()
    return bool(entries) and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in entries)


def check_file(path: Path, missing: str = "no such file") -> None:
    """Check that a path is a regular file: opening a pipe would wait for ever, and some devices never end.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is something else, or may not be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: {missing}") from None
    except (OSError, ValueError) as problem:  # a name with a zero byte is a ValueError
        raise ValueError(one_line(f"{path}: cannot be read ({_reason(problem)})")) from problem
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"{path}: expected a file, found {kinds.get(stat.S_IFMT(mode), 'a device')}")


def one_line(text: str) -> str:
    """A message that quotes a file, such as names of entries, as one line that a terminal can show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def checksum(weights: Mapping[str, Tensor]) -> str:
    """The CRC-32 of all names, dtypes, shapes and values, in the order of the names; eight hexadecimal digits."""
    crc = 0
    for name, value in sorted(weights.items()):
        crc = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), crc)
        crc = zlib.crc32(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            written = (file.metadata() or {}).get(CHECKSUM)
    except OSError as problem:
        raise ValueError(f"{path}: cannot be read ({_reason(problem)})") from problem
    except Exception as problem:  # SafetensorError, or PyTorch's errors for a dtype that it does not have
        raise ValueError(one_line(f"{path}: not a whole safetensors file ({_reason(problem)})")) from problem
    if written is not None and (found := checksum(state)) != written:
        raise ValueError(
            one_line(
                f"{path}: damaged: {CHECKSUM} of its weights is {found}, and was {written:.40} when they were saved; "
                f"copy the file again, or take another"
            )
        )
    return state


def _read_checkpoint(path: Path) -> Any:
    with _reading:
        # Without those that the caller has allowed already: leaving the block would forbid them again.
        harmless = [known for known in _HARMLESS if known not in torch.serialization.get_safe_globals()]
        try:
            check_archive(path)
            with torch.serialization.safe_globals(harmless):
                return torch.load(path, map_location="cpu", weights_only=True)
        except OSError as problem:
            raise ValueError(f"{path}: cannot be read ({_reason(problem)})") from problem
        except Exception as problem:  # a file that torch.save did not write may raise anything, such as a KeyError
            met = re.search(r"GLOBAL (\S+)", str(problem))
            if met is None:
                message = f"expected a file that torch.save wrote, whole ({type(problem).__name__}: {_reason(problem)})"
                raise ValueError(one_line(f"{path}: {message}")) from problem
            raise ValueError(
                one_line(
                    f"{path}: expected tensors and plain values, found {met[1]:.100}, which may run code and is not loaded; "
                    f"where the file was made, save the state_dict() alone"
                )
            ) from problem


def check_archive(path: Path) -> bool:
    """Verify the checksums of an archive's entries, which PyTorch itself does not.

    Returns:
        Whether the file is an archive; before 1.6 PyTorch wrote bare pickles, without checksums.

    Raises:
        Exception: it is not whole; usually a zipfile.BadZipFile or ValueError.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch.load tells
            return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:  # PyTorch writes them uncompressed
            raise ValueError("its entries claim to be larger than the file")
        for entry in entries:
            if entry.CRC:  # not after torch.serialization.set_crc32_options(False)
                with archive.open(entry) as content:
                    while content.read(2**20):
                        pass
    return True


def _reason(problem: Exception) -> str:
    """The first sentence of an error. For torch.load's it is that of the error inside, without the advice to run code."""
    text = (problem.strerror if isinstance(problem, OSError) else None) or str(problem)
    inner = re.search(r"WeightsUnpickler error: (.*)", text)
    return re.split(r"\.?\s*\n|\.\s", inner[1] if inner else text.strip())[0].rstrip(".")[:150]


def plain_name(name: str) -> str:
    """The name of a module or tensor without the parts that wrappers add anywhere in it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED_ANYWHERE)


def plain_names(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The state dict with names as they are without PyTorch's wrappers; ``load_model`` lists them.

    Raises:
        RuntimeError: two entries get the same name.
    """
    names = {name: plain_name(name) for name in state}
    while names and all(plain.startswith("module.") for plain in names.values()):
        names = {name: plain.removeprefix("module.") for name, plain in names.items()}
    plain_state: dict[str, Tensor] = {}
    for name, plain in names.items():
        if plain in plain_state:
            raise RuntimeError(one_line(f"{source}: {plain:.200} is there twice, once as {name:.200}"))
        plain_state[plain] = state[name]
    return plain_state


def fitting(
    weights: Mapping[str, Tensor], model: CrateMAE | Classifier, path: Path, *, own: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The weights by the model's names; entries in ``own`` keep the model's values. Warns where dtypes differ from the model's.

    Raises:
        RuntimeError: they do not fit the model; the message is one line, where PyTorch's has one for every entry.
        ValueError: a value is not finite, or not floating-point.
    """
    expected = model.state_dict()
    found = plain_names(weights, path)
    if isinstance(model, Classifier):
        _check_classes(found, model, path)
    else:
        found = {name: value for name, value in found.items() if name not in UNUSED_OFFICIAL_ENTRIES}
    for name in sorted(found.keys() & expected.keys() - set(own)):
        value, wanted = found[name], expected[name]
        fits = (
            value.is_nested or value.shape == wanted.shape
        )  # a nested one has no shape to compare; others are told below
        if fits and (objection := objection_to(value, wanted.dtype)):
            raise ValueError(f"{path}: {name}: {objection}")
    found |= {name: expected[name] for name in own if name in found}
    problems = differences(found, expected)
    if not problems:
        if converted := [name for name, value in found.items() if value.dtype != expected[name].dtype]:
            dtypes, own_dtypes = (
                " and ".join(sorted({str(state[name].dtype).removeprefix("torch.") for name in converted}))
                for state in (found, expected)
            )
            counts = f"{len(converted)} of {len(found)} entries are {dtypes}"
            warnings.warn(f"{path}: {counts}, and become {own_dtypes} in the model", stacklevel=3)
        return found
    token, hint = found.get("cls_token"), ""
    if token is not None and token.ndim and token.shape[-1] != model.config.embed_dim:
        known = CLASSIFIERS if isinstance(model, Classifier) else MODELS
        sizes = [name for name, config in known.items() if config.embed_dim == token.shape[-1]]
        hint = f"; its tokens are {token.shape[-1]} wide{', as those of ' + sizes[0] if sizes else ''}"
    elif found.keys() != expected.keys() and (prefix := _prefix(weights, expected)) is not None:
        hint = (
            f"; they are there with the prefix {prefix!r}: save "
            f"{{k[{len(prefix)}:]: v for k, v in state.items() if k.startswith({prefix!r})}}"
        )
    raise RuntimeError(
        one_line(
            f"{path}: the weights are not this model's (width {model.config.embed_dim}): {'; '.join(problems)}{hint}"
        )
    )


def _check_classes(found: Mapping[str, Tensor], model: Classifier, path: Path) -> None:
    """Check that a head in the file has as many classes as the model.

    Raises:
        RuntimeError: it has not.
    """
    head = found.get(f"{model.head_name}.weight")
    if head is not None and not head.is_nested and head.ndim == 2 and len(head) != model.num_classes:
        raise RuntimeError(
            f"{path}: its head is for {len(head)} classes, and num_classes is {model.num_classes}: load it with "
            f"num_classes={len(head)}, and reset_classifier({model.num_classes}) makes another"
        )


def objection_to(value: Tensor, dtype: torch.dtype) -> str | None:
    """Why a tensor cannot be a weight that is ``dtype`` in the model, in words; None where it can."""
    dense = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_nested
    if not dense or value.is_meta or value.dtype not in _DTYPES:
        kind = "nested tensor" if value.is_nested else type(value).__name__
        what = f"{kind} of {value.dtype} ({value.layout}, {value.device})"
        return f"expected a dense tensor of floating-point numbers of 16, 32 or 64 bits, got a {what}"
    finite = value.to(dtype).isfinite()
    if finite.all():
        return None
    counts = f"{int((~finite).sum())} of {value.numel()} values are not finite"
    return f"{counts}{f' as {dtype}' if value.dtype != dtype else ''}; take weights from before the training broke down"


def _prefix(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The shortest prefix with which ``weights`` has all expected entries; None where there is none."""
    prefixes = sorted({name.removesuffix("cls_token") for name in weights if name.endswith(".cls_token")}, key=len)
    for prefix in prefixes:
        behind = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if expected.keys() <= plain_names(behind, prefix).keys():
            return prefix
    return None


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Differences in names and shapes between two state dicts, in words: one of each kind, and how many more there are."""
    problems = []
    for what, names in (("lacks", expected.keys() - found.keys()), ("has unknown", found.keys() - expected.keys())):
        if names:
            first, more = f"{min(names):.200}", f" and {len(names) - 1} more" if len(names) > 1 else ""
            remedies = (remedy for form, remedy in _COMPUTED_WEIGHTS.items() if re.search(form, first))
            remedy = next(remedies, None) if what == "has unknown" else None
            problems.append(f"{what} {first}{more}{f': {remedy}' if remedy else ''}")
    for name in sorted(expected.keys() & found.keys()):
        if expected[name].shape != found[name].shape:
            problems.append(f"{name} is {tuple(found[name].shape)} and not {tuple(expected[name].shape)}")
            break
    return problems
