"""The resumable states of a run: `states/step_<n>.pt`, and `step_<n>_diverging.pt` of steps at which it diverged.

One process writes a whole state into that file; several write its tensors beside it, see `shards`. Reading gives the same whole
tensors either way, so that a run can go on with any number of processes.
"""

from __future__ import annotations

import random
import re
import zipfile
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from crate_mae.files import make_folder, remove, replaced
from crate_mae.state_dicts import check_archive, differences, objection_to
from crate_mae.training.average import Average
from crate_mae.training.parallel import fill, is_sharded
from crate_mae.training.ranks import Ranks
from crate_mae.training.shards import remove_rubbish

_NAME = re.compile(r"step_(0|[1-9][0-9]*)(_diverging)?\.pt")

_PARTS = {
    "model": dict, "optimizer": dict, "step": int, "images": str, "image_count": int, "random": dict, "meter": dict,
    "watch": dict,
}  # fmt: skip
"""What a state holds, by type."""


class SavedState(NamedTuple):
    """A state in its folder."""

    step: int
    diverging: bool
    path: Path


def saved_states(folder: Path) -> list[SavedState]:
    """The states in a folder, the newest first; of two of one step, first the one that does not diverge."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [(match, path) for path in paths if (match := _NAME.fullmatch(path.name)) and path.is_file()]
    states = [SavedState(int(match[1]), match[2] is not None, path) for match, path in found]
    return sorted(states, key=lambda state: (-state.step, state.diverging))


def write_state(folder: Path, state: dict[str, Any], *, diverging: bool) -> Path:
    """Write a state, which is on the disk when this returns; returns its file.

    Raises:
        OSError: it could not be written; older states are still there.
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
    """Delete the states that are no longer needed at `step`; returns them.

    Of the states that do not diverge, these stay: the last `keep`, the one of the best validation, and those that `is_kept`. Of
    the diverging ones the last `keep` stay until one that does not diverge follows. All states of later steps are deleted: a run
    that went back to an earlier state takes these steps anew.
    """
    past = [state for state in saved_states(folder) if state.step <= step]
    sound = [state for state in past if not state.diverging]
    newest = sound[0].step if sound else -1
    stay = {*sound[:keep], *(state for state in sound if state.step == best or is_kept(state.step))}
    stay.update([state for state in past if state.diverging and state.step > newest][:keep])
    forgotten = [state.path for state in saved_states(folder) if state not in stay]
    for path in forgotten:
        remove(path)
    remove_unused_tensors(folder)
    return forgotten


def remove_unused_tensors(folder: Path) -> list[Path]:
    """Delete folders of tensors that no state names, such as those of a save that was killed; returns them.

    If a state cannot be read, the folders of its step stay as long as the state does.
    """
    used = set()
    for saved in saved_states(folder):
        folders = [path.name for path in folder.glob(f"step_{saved.step}-*")]
        if not folders:
            continue
        try:
            state = torch.load(saved.path, map_location="cpu", weights_only=True, mmap=True)
            if shards := state.get("shards"):  # without, one process wrote it
                used.add(shards["folder"])
        except Exception:  # whatever may be wrong with the file
            used.update(folders)
    return remove_rubbish(folder, used)


def read_state(
    folder: Path, wanted: bool | str | int, fits: Callable[[dict[str, Any]], None], without: Container[Path] = ()
) -> tuple[Any, dict[Path, str]]:
    """Read a state of the run; also returns what was wrong with newer ones that were passed over, a line for each file.

    Args:
        folder: of the states.
        wanted: True for the newest that can be read, "best" for that of the best validation, or a step.
        fits: raises a ValueError for a state that is not of this run.
        without: states to pass over, because another rank could not read them.

    Raises:
        FileNotFoundError: there is no state, or not the one that is wanted.
        ValueError: none of them can be read, or the one that is wanted cannot.
    """
    states, broken = [saved for saved in saved_states(folder) if saved.path not in without], {}
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
    """Load the weights of a state into a model; returns how many images the run trained on.

    Raises:
        ValueError: the state cannot be read, is of another model, or its weights are not finite.
    """

    def fits(state: dict[str, Any]) -> None:
        expected = model.state_dict()
        if problems := differences(exported(state), expected):
            raise ValueError(f"it is of another model: it {'; '.join(problems)}")
        for name, value in exported(state).items():
            if objection := objection_to(value, expected[name].dtype):
                raise ValueError(f"{name}: {objection}")

    state = _read(saved.path, fits)
    model.load_state_dict(exported(state))
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
        if isinstance(state, dict) and isinstance(state.get("shards"), dict):
            from crate_mae.training.shard_files import read_tensors

            state |= read_tensors(path.parent, state["shards"])
        for name, kind in _PARTS.items():
            if not isinstance(state, dict) or not isinstance(state.get(name), kind):
                raise ValueError(f"it holds no {name}, as the state of a run does")
        if not (named := _NAME.fullmatch(path.name)) or state["step"] != int(named[1]):
            raise ValueError(f"it is of step {state['step']}")
        fits(state)
    except Exception as error:  # a foreign file may raise anything, with the advice to trust it
        told = isinstance(error, (ValueError, OSError, zipfile.BadZipFile))
        why = str(error) if told else type(error).__name__
        raise ValueError(f"cannot read {path}: {' '.join(why.split())[:300]}") from error
    return state


def random_state(ranks: Ranks) -> dict[str, Any]:
    """The states of the global generators of torch, NumPy and Python in this process, as plain numbers and tensors."""
    of_numpy = np.random.get_state()
    assert isinstance(of_numpy, tuple)
    algorithm, keys, position, has_gauss, cached_gauss = of_numpy
    return {
        "torch": torch.get_rng_state(),
        "cuda": _states_of_cuda(ranks),
        "numpy": (algorithm, keys.tolist(), position, has_gauss, cached_gauss),
        "python": random.getstate(),
    }


def check_fits(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state that cannot be restored in full.

    Raises:
        ValueError: its weights, or the optimizer's means, have other names, shapes or types than the model's.
        Exception: a state of a random generator is none; the generator's own error.
    """
    expected = model.state_dict()
    if problems := differences(state["model"], expected):
        raise ValueError(f"it is of another model: it {'; '.join(problems)}")
    means = state["optimizer"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors = [(name, state["model"][name], value) for name, value in expected.items()]
    if set(means) not in (set(), set(range(len(parameters)))):
        raise ValueError("its optimizer is of another model")
    if average := state.get("average"):
        tensors += [
            (f"average of {name}", average.get(name), parameter) for name, parameter in model.named_parameters()
        ]
    for index, kept in means.items():
        for name in ("exp_avg", "exp_avg_sq"):
            tensors.append((f"{name} of parameter {index}", kept.get(name), parameters[index]))
    for name, found, wanted in tensors:
        if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(f"its {name} is none of {wanted.dtype}, {tuple(wanted.shape)}")
    if scale := state.get("scaler"):
        torch.amp.GradScaler("cpu").load_state_dict(scale)
    for of_rank in [state["random"], *state.get("random_of_others", [])]:
        _set_generators(of_rank, torch.Generator(), np.random.RandomState(), random.Random())


def restore(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None = None,
    scaler: torch.amp.GradScaler | None = None,
    ranks: Ranks | None = None,
) -> list[str]:
    """Restore model, optimizer and random generators from a state that fits; returns in words what could not be restored.

    The optimizer keeps its settings, which are those of the resumed run.
    """
    ranks = ranks or Ranks()
    expected = model.state_dict()
    fill(expected.values(), [state["model"][name] for name in expected])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    means = {
        index: {name: _shared_like(parameters[index], value) for name, value in kept.items()}
        for index, kept in state["optimizer"].items()
    }
    optimizer.load_state_dict({"state": means, "param_groups": optimizer.state_dict()["param_groups"]})
    without = []
    if average:
        average.load_state(state.get("average") or state["model"])
        without += [] if "average" in state else ["an average of the weights, which begins with them now"]
    if scaler and scaler.is_enabled():
        if state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        else:
            without.append("a scale of the loss, which is found anew")
    of_ranks = [state["random"], *state.get("random_of_others", [])]
    if ranks.rank < len(of_ranks):
        ours = of_ranks[ranks.rank]
        _set_generators(ours, torch.default_generator, np.random, random)
        had, has = len(ours["cuda"]), len(_states_of_cuda(ranks))
        if had != has:
            without.append(f"the random numbers of CUDA (of {had} devices; here are {has})")
        elif ranks.count > 1 and has:
            torch.cuda.set_rng_state(ours["cuda"][0])
        elif has:
            torch.cuda.set_rng_state_all(ours["cuda"])
    if len(of_ranks) < ranks.count:
        without.append(f"the random numbers of {ranks.count - len(of_ranks)} of {ranks.count} processes")
    return without


def exported(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a state that are drawn and exported: their average if it has one."""
    return state["model"] | state.get("average", {})


def _shared_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A value, sharded like the parameter if it has its shape."""
    if not is_sharded(parameter) or value.shape != parameter.shape:
        return value
    shared = torch.empty_like(parameter, requires_grad=False)
    fill([shared], [value])
    return shared


def _states_of_cuda(ranks: Ranks) -> list[torch.Tensor]:
    """The generators' states of all CUDA devices; with several ranks that of this one's device alone."""
    if not torch.cuda.is_initialized():  # a run on a CPU must not take memory of a GPU
        return []
    return torch.cuda.get_rng_state_all() if ranks.count == 1 else [torch.cuda.get_rng_state()]


def _set_generators(states: dict[str, Any], of_torch: torch.Generator, of_numpy: Any, of_python: Any) -> None:
    of_torch.set_state(states["torch"])
    algorithm, keys, *rest = states["numpy"]
    of_numpy.set_state((algorithm, np.array(keys, dtype=np.uint32), *rest))
    of_python.setstate(states["python"])
