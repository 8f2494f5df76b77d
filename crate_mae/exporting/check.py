"""Compares an exported file with its model, in a process that can import neither `crate_mae` nor `crate_kernels`."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from crate_kernels import use
from crate_mae.classifiers import Classifier
from crate_mae.model import CrateMAE

TOLERANCE = 1e-5
"""Differences may be this share of the largest value (or of 1, if that is larger), and their norm this share of the norm, which
judges small outputs, too."""

ROUNDINGS = 3
"""Where float32 is less exact than ``TOLERANCE``, the file may be this many times as far from the model as the model is from
itself in float64. Both round, each in its own way, so that twice as far is to be expected; the rest is a margin."""

_LEAST_EXACT = 1e-3
"""A model whose float32 output is further than this share of its largest value from float64 cannot be compared."""

LEAST_SIDE = 2
"""Patches a side. One is a case of its own to torch.export, whose guards would refuse it."""


class WrongExport(RuntimeError):
    """The file cannot be loaded without `crate_mae`, or does not compute what the model computes."""


class Checked(NamedTuple):
    """How far the file is from the model on a batch of images of one size; of several outputs, the worst of each.

    Attributes:
        difference: largest magnitude of the differences.
        relative: norm of the differences, as a share of the norm of what the model gives.
        largest: magnitude of what the model gives.
        rounding: largest magnitude of the model's differences from itself in float64, where that counted; else None.
    """

    batch: int
    height: int
    width: int
    difference: float
    relative: float
    largest: float
    rounding: float | None = None


def cases_of(model: CrateMAE | Classifier, output: str) -> list[dict[str, Tensor]]:
    """Inputs by name: the configured size, one that is not square, a smaller one; random, and the same every time."""
    patch, (rows, columns) = model.config.patch_size, model._configured_grid
    low, small_rows, small_columns = (
        max(LEAST_SIDE, round(side * share)) for side, share in ((rows, 5 / 7), (rows, 3 / 7), (columns, 3 / 7))
    )
    oblong = low, columns + (low == columns)
    random = torch.Generator().manual_seed(0)
    cases = []
    for batch, grid in (
        (1, (rows, columns)),
        (3, oblong),
        (1, (small_rows, small_columns)),
        (3, (small_rows, small_columns)),
    ):
        height, width = (patch * side for side in grid)
        case = {"images": torch.randn(batch, model.config.in_chans, height, width, generator=random)}
        if output == "reconstruction":
            case["noise"] = torch.rand(batch, grid[0] * grid[1], generator=random)
        cases.append(case)
    return cases


@torch.no_grad()
def outputs_of_model(
    model: CrateMAE | Classifier,
    case: Mapping[str, Tensor],
    output: str,
    mask_ratio: float,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The model's outputs for a case, in evaluation mode; float64 is computed by a copy."""
    images = case["images"].to(dtype)
    model = (model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)).eval()
    with use("composed"):
        if output == "reconstruction":
            reconstructed = model(images, mask_ratio, case["noise"])
            return [reconstructed.pred, reconstructed.mask]
        if output == "logits":
            return [model(images)]
        if output == "tokens":
            return [model.forward_features(images)]
        (tokens,) = model._layer_outputs(images, 1, norm=True)[1]
        return [tokens[:, 1:].mean(1)]


_CHILD = """
import sys


class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("crate_kernels", "crate_mae"):
            raise ImportError(f"{name}: an exported model is loaded without it")


sys.meta_path.insert(0, Refusing())
import numpy as np

file, given, into = sys.argv[1:]
if file.endswith(".onnx"):
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    run = lambda inputs: session.run(None, inputs)
else:
    import torch

    model = torch.export.load(file).module()

    def run(inputs):
        found = model(*map(torch.from_numpy, inputs.values()))
        return [value.numpy() for value in (found if isinstance(found, tuple) else (found,))]


cases = {}
with np.load(given) as stored:
    for key in stored.files:
        case, name = key.split(".")
        cases.setdefault(case, {})[name] = stored[key]
found = {case: run(inputs) for case, inputs in cases.items()}
np.savez(into, **{f"{case}.{index}": value for case, values in found.items() for index, value in enumerate(values)})
"""


def outputs_of_file(file: Path, cases: Sequence[Mapping[str, Tensor]], outputs: int) -> list[list[Tensor]]:
    """The file's outputs for each case, computed in a process that can import neither of our packages.

    Raises:
        WrongExport: it cannot be loaded there, or not be run; the message ends as that process did.
    """
    given, into = file.with_name("inputs.npz"), file.with_name("outputs.npz")
    stored = {f"{index}.{name}": value for index, case in enumerate(cases) for name, value in case.items()}
    arrays = {key: value.numpy() for key, value in stored.items()}
    np.savez(given, **arrays)  # type: ignore[arg-type]  # NumPy's stub takes an array for its option allow_pickle
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", _CHILD, *map(str, (file, given, into))]
    ended = subprocess.run(
        command, cwd=file.parent, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    if ended.returncode:
        # PyTorch logs the cause of its own error above, each line behind a stamp.
        said = re.findall(r"\w+(?:Error|Exception): .*", ended.stderr) or ended.stderr.strip().splitlines()
        last = "; ".join(said[-3:])
        raise WrongExport(f"what was exported cannot be used without crate_mae: exit status {ended.returncode}: {last}")
    with np.load(into) as found:
        return [[torch.from_numpy(found[f"{case}.{index}"]) for index in range(outputs)] for case in range(len(cases))]


def compared(
    case: Mapping[str, Tensor], wanted: Sequence[Tensor], found: Sequence[Tensor], exact: Callable[[], Sequence[Tensor]]
) -> Checked:
    """How far apart they are.

    Args:
        case: inputs by name.
        wanted: the model's outputs.
        found: the file's outputs.
        exact: computes the model's outputs in float64; only called where ``TOLERANCE`` does not hold.

    Raises:
        WrongExport: too far, or of other shapes.
    """
    batch, _, height, width = case["images"].shape
    where = f"{batch} x {height} x {width}"
    numbers, roundings = [], []
    for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
        if one.shape != other.shape:
            raise WrongExport(f"images {where}: the model gives {tuple(one.shape)}, and the file {tuple(other.shape)}")
        one = one.double()
        apart, largest = other.double() - one, one.abs().max().item()
        difference = apart.abs().max().item()
        relative = (apart.norm() / one.norm().clamp_min(1e-300)).item()
        numbers.append((difference, relative, largest))
        if difference <= TOLERANCE * max(1.0, largest) and relative <= TOLERANCE:
            continue
        roundings.append((exact()[index] - one).abs().max().item())
        if not difference <= ROUNDINGS * min(roundings[-1], _LEAST_EXACT * largest):
            raise WrongExport(
                f"images {where}: the file is up to {difference:.2g} from the model, {relative:.2g} of the norm; its values are "
                f"up to {largest:.3g}, and itself up to {roundings[-1]:.2g} from float64; expected at most {TOLERANCE:g} * max(1"
                f", {largest:.3g}) and {TOLERANCE:g} of the norm, or {ROUNDINGS} times that rounding"
            )
    difference, relative, largest = (max(each) for each in zip(*numbers, strict=True))
    return Checked(batch, height, width, difference, relative, largest, max(roundings, default=None))
