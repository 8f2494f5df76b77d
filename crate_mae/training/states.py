"""The resumable states of a run: `states/step_<n>.pt`, and `step_<n>_diverging.pt` of steps at which it diverged."""

from __future__ import annotations

import random
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from crate_mae.files import make_folder, remove, replaced
from crate_mae.state_dicts import check_archive, differences, objection_to

_NAME = re.compile(r"step_(0|[1-9][0-9]*)(_diverging)?\.pt")

_PARTS = {
    "model": dict, "optimizer": dict, "step": int, "images": str, "image_count": int, "random": dict, "meter": dict,
    "watch": dict,
}  # fmt: skip
"""What a state holds, and of which type."""


class SavedState(NamedTuple):
    """A state in its folder."""

    step: int
    diverging: bool
    path: Path


def saved_states(folder: Path) -> list[SavedState]:
    """The states in a folder, the newest first; of one step, the one that does not diverge."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [(match, path) for path in paths if (match := _NAME.fullmatch(path.name)) and path.is_file()]
    states = [SavedState(int(match[1]), match[2] is not None, path) for match, path in found]
    return sorted(states, key=lambda state: (-state.step, state.diverging))


def write_state(folder: Path, state: dict[str, Any], *, diverging: bool) -> Path:
    """Write a state, on the disk when this returns; returns its file.

    Raises:
        OSError: it could not be written; what was there before is there still.
    """
    make_folder(folder)
    names = [f"step_{state['step']}{mark}.pt" for mark in ("", "_diverging")]
    path, other = (folder / name for name in (reversed(names) if diverging else names))
    with replaced(path) as file:
        torch.save(state, file)
    remove(other)
    return path


def forget_states(
    folder: Path, *, step: int, keep: int, best: int | None, is_kept: Callable[[int], bool]
) -> list[Path]:
    """Delete the states that are not to be kept at `step`; returns them.

    Those stay that do not diverge and are among the last `keep` of these, the best one, or `is_kept`; and, until a state that
    does not diverge has followed, the last `keep` that do. Of steps after this one, nothing is left: a run that went back to an
    earlier state takes them anew.
    """
    past = [state for state in saved_states(folder) if state.step <= step]
    sound = [state for state in past if not state.diverging]
    newest = sound[0].step if sound else -1
    stay = {*sound[:keep], *(state for state in sound if state.step == best or is_kept(state.step))}
    stay.update([state for state in past if state.diverging and state.step > newest][:keep])
    forgotten = [state.path for state in saved_states(folder) if state not in stay]
    for path in forgotten:
        remove(path)
    return forgotten


def read_state(
    folder: Path, wanted: bool | str | int, fits: Callable[[dict[str, Any]], None]
) -> tuple[Any, dict[Path, str]]:
    """A state of the run, and what was wrong with newer ones that were passed over, a line for each file.

    Args:
        wanted: True for the newest that can be read, "best" for the one with the best validation, or a step.
        fits: raises a ValueError for a state that is no state of this run.

    Raises:
        FileNotFoundError: there is no state, or not the one that is wanted.
        ValueError: none of them can be read, or the one that is wanted cannot.
    """
    states, broken = saved_states(folder), {}
    if wanted is not True and wanted != "best":
        return _read(_of_step(states, int(wanted), folder).path, fits), {}
    for saved in states:
        try:
            state = _read(saved.path, fits)
        except ValueError as error:
            broken[saved.path] = str(error)
            continue
        if wanted != "best":
            return state, broken
        best = state["watch"].get("best_step")
        if best is None:
            raise FileNotFoundError(f"nothing to resume: the run in {folder.parent} has validated nothing yet")
        return _read(_of_step(states, best, folder).path, fits), broken
    if broken:
        raise ValueError(f"none of the states can be read: {'; '.join(broken.values())}")
    raise FileNotFoundError(f"nothing to resume: there is no state in {folder}")


def load_state_weights(saved: SavedState, model: nn.Module) -> int:
    """Give a model the weights of a state; returns how many images the run trained on.

    Raises:
        ValueError: the state cannot be read, is of another model, or its weights are not finite.
    """

    def fits(state: dict[str, Any]) -> None:
        expected = model.state_dict()
        if problems := differences(state["model"], expected):
            raise ValueError(f"it is of another model: it {'; '.join(problems)}")
        for name, value in state["model"].items():
            if objection := objection_to(value, expected[name].dtype):
                raise ValueError(f"{name}: {objection}")

    state = _read(saved.path, fits)
    model.load_state_dict(state["model"])
    return state["image_count"]


def _of_step(states: Sequence[SavedState], step: int, folder: Path) -> SavedState:
    found = next((state for state in states if state.step == step), None)
    if found is None:
        there = ", ".join(str(state.step) for state in reversed(states)) or "none"
        raise FileNotFoundError(f"nothing to resume: {folder} holds no state of step {step}, but of {there}")
    return found


def _read(path: Path, fits: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    try:
        if not check_archive(path):
            raise ValueError("no file that a run wrote, or a part of one")
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, kind in _PARTS.items():
            if not isinstance(state, dict) or not isinstance(state.get(name), kind):
                raise ValueError(f"it holds no {name}, as the state of a run does")
        if state["step"] != int(_NAME.fullmatch(path.name)[1]):
            raise ValueError(f"it is of step {state['step']}")
        fits(state)
    except Exception as error:  # what is no state of ours may raise anything, with advice to trust it
        told = isinstance(error, (ValueError, OSError, zipfile.BadZipFile))
        why = str(error) if told else type(error).__name__
        raise ValueError(f"cannot read {path}: {' '.join(why.split())[:300]}") from error
    return state


def random_state() -> dict[str, Any]:
    """The states of the global generators of torch, NumPy and Python, as plain numbers and tensors."""
    algorithm, keys, position, has_gauss, cached_gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (algorithm, keys.tolist(), position, has_gauss, cached_gauss),
        "python": random.getstate(),
    }


def check_fits(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state that could not be restored, or not all of it.

    Raises:
        Exception: a ValueError if its weights, or the optimizer's means of them, have other names, shapes or types than these; or
            what the generators of random numbers say of states that are none of theirs.
    """
    expected = model.state_dict()
    if problems := differences(state["model"], expected):
        raise ValueError(f"it is of another model: it {'; '.join(problems)}")
    means = state["optimizer"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors = [(name, state["model"][name], value) for name, value in expected.items()]
    if set(means) not in (set(), set(range(len(parameters)))):
        raise ValueError("its optimizer is of another model")
    for index, kept in means.items():
        for name in ("exp_avg", "exp_avg_sq"):
            tensors.append((f"{name} of parameter {index}", kept.get(name), parameters[index]))
    for name, found, wanted in tensors:
        if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(f"its {name} is none of {wanted.dtype}, {tuple(wanted.shape)}")
    _set_generators(state["random"], torch.Generator(), np.random.RandomState(), random.Random())


def restore(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Give the model, the optimizer and the generators what a state that fits holds; returns what it could not, in words.

    The optimizer's settings stay: those of the run as it goes on, not as it was.
    """
    model.load_state_dict(state["model"])
    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["optimizer"], "param_groups": settings})
    _set_generators(state["random"], torch.default_generator, np.random, random)
    of_cuda = state["random"]["cuda"]
    had, has = len(of_cuda), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if had == has:
        torch.cuda.set_rng_state_all(of_cuda)
        return []
    return [f"the random numbers of CUDA (of {had} devices; here are {has})"]


def _set_generators(states: dict[str, Any], of_torch: torch.Generator, of_numpy: Any, of_python: Any) -> None:
    of_torch.set_state(states["torch"])
    algorithm, keys, *rest = states["numpy"]
    of_numpy.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    of_python.setstate(states["python"])
