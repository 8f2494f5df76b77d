"""The options of facebookresearch/mae's main_pretrain.py, so that its commands run here."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from crate_mae.cli.errors import nearest
from crate_mae.registry import MODELS
from crate_mae.training import PretrainConfig
from crate_mae.training.config import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, Limit

_ALONE_THERE = ("--blr", "--data_path", "--output_dir", "--accum_iter", "--log_dir", "--input_size", "--job_dir")
"""Flags that only mae has, by which its commands are known; others, such as --epochs, may be meant as ours."""

_OURS = {
    "epochs": "schedule.epochs",
    "warmup_epochs": "schedule.warmup_epochs",
    "min_lr": "schedule.min_lr",
    "mask_ratio": "schedule.mask_ratio",
    "accum_iter": "schedule.accumulate",
    "weight_decay": "optimizer.weight_decay",
    "input_size": "model.img_size",
    "data_path": "data",
    "device": "run.device",
    "seed": "run.seed",
    "num_workers": "images.num_workers",
}
"""Flags, and our settings of the same meaning."""

_DEFAULTS = {"epochs": 400, "blr": 1e-3, "batch_size": 64, "model": "mae_vit_large_patch16"}
"""The defaults of mae's code that differ from ours; it also does not clip gradients."""

_LIMITS: dict[str, Limit] = {
    **{flag: PretrainConfig.limits[name] for flag, name in _OURS.items() if name in PretrainConfig.limits},
    **dict.fromkeys(
        ("batch_size", "accum_iter", "input_size"), AT_LEAST_ONE
    ),  # unlike our settings, they do not take "auto"
    **dict.fromkeys(("lr", "blr"), POSITIVE),
    "num_workers": NOT_NEGATIVE,
    "data_path": (bool, "a folder of images, or what else --data takes"),
}

_MODELS = {f"mae_vit_{size}_patch16": f"crate_mae_{size}" for size in ("base", "large")}

_WITHOUT_EFFECT = ("pin_mem", "no_pin_mem", "dist_on_itp", "use_volta32")
_OF_THE_LAUNCHER = ("world_size", "local_rank", "dist_url", "nodes", "ngpus", "timeout", "partition", "comment")

_NUMBERS = {
    **dict.fromkeys(("batch_size", "epochs", "accum_iter", "input_size", "start_epoch", "seed", "num_workers"), int),
    **dict.fromkeys(("mask_ratio", "weight_decay", "lr", "blr", "min_lr", "warmup_epochs"), float),
}
_TEXTS = ("model", "data_path", "output_dir", "job_dir", "log_dir", "device", "resume", *_OF_THE_LAUNCHER)


def in_our_options(options: list[str]) -> tuple[list[str], list[str]]:
    """The options of a command with facebookresearch/mae's flags replaced by ours, and lines that say what became of them.

    A command that has a flag only mae has means here what it means there: options that it leaves out have the defaults of mae's
    code, unless a --recipe, the run that is resumed, or (for the model) --init says them. Any other command is left as it is.

    ================================================== ==================================================================
    --batch_size B (of each process)                   --schedule.batch_size B * accum_iter * processes of torchrun
    --blr L, --lr L                                    --optimizer.base_lr L, or L * 256 / batch of all
    --model mae_vit_{base,large}_patch16               --architecture crate_mae_{base,large}; ours may be named, too
    --norm_pix_loss                                    --model.norm_pix_loss true
    --output_dir D, --job_dir D                        --out D
    --log_dir D                                        --run.log_to tensorboard, in the folder of the run
    --resume D/states/step_N.pt, --resume D            --out D --resume N, --out D --resume
    --epochs, --warmup_epochs, --mask_ratio, ...       the settings of these names
    --pin_mem, --world_size, --nodes, --dist_url, ...  nothing: that is done, or is the launcher's to say
    ================================================== ==================================================================

    Raises:
        ValueError: a flag has a value that it cannot have here, or one of our options is there for the same setting.
    """
    if not {option.partition("=")[0] for option in options} & {*_ALONE_THERE} and not _names_model(options):
        return options, []
    given, rest = _parsed(options)
    named = {option.partition("=")[0].removeprefix("--") for option in rest}
    defaults = _left_out(named | {name for name in ("resume",) if given.get(name)})
    # What --lr is in our terms depends on the batch size, for which a config may have another number than mae's default.
    says_batch = named & {"config", "schedule", "schedule.batch_size"}
    explicit = _settings(given, given if says_batch else defaults | given)
    for name, (flag, _) in explicit.items():
        if name in named:
            raise ValueError(f"--{flag}: expected it or --{name}, which are the same setting, not both")
    implied = _settings({name: value for name, value in defaults.items() if name not in given}, defaults | given)
    if "batch_size" in defaults:
        implied["optimizer.clip_grad"] = ("", 0)
    implied = {name: pair for name, pair in implied.items() if name not in named | explicit.keys()}
    first, last = (
        [f"--{name}" if value is True else f"--{name}={value}" for name, (_, value) in settings.items()]
        for settings in (implied, explicit)
    )
    if not {"data", "config", "resume"} & (named | explicit.keys()):
        raise ValueError("--data_path: expected the folder of the images, got nothing")
    left_out = f"; left out, and as its code has it: {' '.join(first)}" if first else ""
    said = [f"read as flags of facebookresearch/mae: {' '.join(last)}{left_out}"]
    if without := [f"--{name}" for name in (*_OF_THE_LAUNCHER, *_WITHOUT_EFFECT) if name in given]:
        said.append(f"without effect here: {', '.join(without)}")
    if "log_dir" in given:
        said.append("events for TensorBoard go to the folder tensorboard in that of the run")
    return [*first, *rest, *last], said


def _left_out(named: set[str]) -> dict[str, Any]:
    """The flags that a command with the options `named` may leave out, with mae's defaults."""
    defaults: dict[str, Any] = {"output_dir": "./output_dir"}
    if "resume" in named:
        return defaults
    defaults |= {"model": _DEFAULTS["model"]} if "recipe" in named else _DEFAULTS  # recipes do not say the model's size
    return {flag: value for flag, value in defaults.items() if not (flag == "model" and "init" in named)}


def _names_model(options: list[str]) -> bool:
    return any(map(_is_model, _values(options, "--model")))


def _values(options: list[str], name: str) -> Iterator[str]:
    """The values of an option, given as --name VALUE or --name=VALUE."""
    for option, following in pairwise([*options, "--"]):
        if option == name:
            yield following
        elif option.startswith(f"{name}="):
            yield option.removeprefix(f"{name}=")


def _is_model(value: str) -> bool:
    """Whether the value of --model names a model; else it is a section of settings."""
    return re.fullmatch(r"(mae_vit|crate)_\w+", value) is not None


def _parsed(options: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The flags of mae among the options, and all other options."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--norm_pix_loss", action="store_true")
    for name in _WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", action="store_true")
    for name, kind in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=kind)
    for name in _TEXTS:
        if (name != "model" or _names_model(options)) and (name != "resume" or _resumes_a_file(options)):
            parser.add_argument(f"--{name}")
    try:
        given, rest = parser.parse_known_args(options)
    except argparse.ArgumentError as error:
        kinds = {"int": "a whole number", "float": "a number"}
        wrong = re.match(r"invalid (int|float) value: (.*)", error.message or "")
        what = f"expected {kinds[wrong[1]]}, got {wrong[2]}" if wrong else error.message
        raise ValueError(f"{error.argument_name}: {what}") from error
    for flag, value in vars(given).items():
        holds, expected = _LIMITS.get(flag, (lambda _: True, ""))
        if not holds(value):
            raise ValueError(f"--{flag}: expected {expected}, got {value!r}")
    return vars(given), rest


def _resumes_a_file(options: list[str]) -> bool:
    """Whether --resume is mae's, which is followed by a file or folder; ours by nothing, "best" or a number."""
    values = _values(options, "--resume")
    return any(not value.startswith("--") and value != "best" and not value.isdigit() for value in values)


def _settings(flags: dict[str, Any], all_flags: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Our options that the flags stand for, each with its flag and value.

    Args:
        flags: to replace.
        all_flags: these, and those on which their values depend.
    """
    ours = {_OURS[flag]: (flag, value) for flag, value in flags.items() if flag in _OURS}
    processes = int(os.environ.get("WORLD_SIZE", 1))
    batch = None
    if "batch_size" in all_flags:
        batch = all_flags["batch_size"] * all_flags.get("accum_iter", 1) * processes
    if "batch_size" in flags:
        ours["schedule.batch_size"] = ("batch_size", batch)
    if "lr" in flags:
        if batch is None:
            raise ValueError("--lr: expected --batch_size beside it, or --blr, which is for a batch of 256")
        ours["optimizer.base_lr"] = ("lr", flags["lr"] * 256 / batch)
    elif "blr" in flags and "lr" not in all_flags:
        ours["optimizer.base_lr"] = ("blr", flags["blr"])
    if "model" in flags:
        ours["architecture"] = ("model", _architecture(flags["model"]))
    if "norm_pix_loss" in flags:
        ours["model.norm_pix_loss"] = ("norm_pix_loss", "true")
    for flag in ("output_dir", "job_dir"):
        if flag in flags:
            if not flags[flag]:
                raise ValueError(f"--{flag}: expected a folder, got nothing: a run without files could not go on")
            ours["out"] = (flag, flags[flag])
    if "log_dir" in flags:
        ours["run.log_to"] = ("log_dir", "tensorboard")
    if flags.get("start_epoch"):
        raise ValueError(f"--start_epoch: expected 0, got {flags['start_epoch']}; --resume goes on where a state is")
    if flags.get("resume"):
        ours |= _resumed(Path(flags["resume"]), ours.get("out"))
    return ours


def _architecture(name: str) -> str:
    architecture = _MODELS.get(name, name)
    if architecture not in MODELS:
        known = [*_MODELS, *MODELS]
        raise ValueError(f"--model: expected one of {', '.join(known)}, got {name!r}{nearest(name, known)}")
    return architecture


def _resumed(path: Path, out: tuple[str, str] | None) -> dict[str, tuple[str, Any]]:
    state = re.fullmatch(r"step_([0-9]+)(_diverging)?\.pt", path.name)
    folder = path.absolute().parent.parent if state else path
    if not state and (path.is_file() or path.suffix in (".pth", ".pt")):
        raise ValueError(
            f"--resume: expected a state of ours, RUN/states/step_N.pt, or the folder of a run, got {path}; --init starts from a "
            "file of weights"
        )
    if out and os.path.abspath(out[1]) != os.path.abspath(folder):
        raise ValueError(
            f"--resume: expected a state of the run in --{out[0]} {out[1]}, got {path}; a run goes on in its folder"
        )
    return {"out": ("resume", folder), "resume": ("resume", int(state[1]) if state else True)}
