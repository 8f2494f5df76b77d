"""`crate-mae share`: a run's model for others, with its card."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from crate_mae.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from crate_mae.cli.parsers import command_parser
from crate_mae.cli.runs import backbone_of, check_run
from crate_mae.cli.settings import path_of
from crate_mae.sharing.card import CARD, CURVES
from crate_mae.sharing.folder import check_repo_id, push_to_hub, save_pretrained
from crate_mae.training.image_sets import of_option
from crate_mae.training.run_folder import refuse_unwritable

HELP = "Write a run's model for others, with a card, or put it on the hub."


def make_parser() -> ArgumentParser:
    """The parser of `share`."""
    parser = command_parser(
        "Writes the model of a run as a folder for others, or puts it on the Hugging Face Hub: weights, "
        "configuration and a model card with data, recipe, curves and evaluation. Paths of this machine and images stay here.",
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        type=str,
        help="Folder of a run or of a model; RUN/best is the model of its best validation.",
    )
    parser.add_argument("--out", type=str, help="Folder to write.")
    parser.add_argument("--push", metavar="USER/NAME", type=str, help="Repository on the hub, made if it is not there.")
    parser.add_argument("--private", action="store_true", help="A repository that is made is for oneself alone.")
    parser.add_argument("--license", type=str, default="", help="Of the weights, for the card: mit, cc-by-nc-4.0, ...")
    parser.add_argument("--overwrite", action="store_true", help="Replace a model in --out.")
    return parser


def run(parser: ArgumentParser, chosen: Namespace) -> str:
    """Write or send the folder; returns what to print.

    Raises:
        OSError: there is no such run, the folder cannot be written, or the hub cannot be reached.
        ValueError: an argument cannot be used, or the run's files are damaged; the message names it.
        MissingLibrary: an ImportError: huggingface_hub is not installed.
    """
    asked = chosen.share
    if asked.out is None and asked.push is None:
        raise ValueError("expected --out FOLDER, --push USER/NAME, or both")
    folder = path_of(asked.run)
    check_run(folder)
    if asked.push is not None:
        with of_option("--push"):
            check_repo_id(asked.push)
    out = None if asked.out is None else path_of(asked.out)
    if out is not None:
        refuse_folder(out, "--out", asked.overwrite)
    model = backbone_of(folder)
    card = dict(run=folder, license=asked.license)
    lines = []
    if out is not None:
        save_pretrained(model, out, name=asked.push, **card)
        lines.append(f"{out / CARD} is the card of {out / WEIGHTS_FILE}; look at it before you give it away.")
    if asked.push is not None:
        lines.append(push_to_hub(model, asked.push, private=asked.private or None, **card))
    return "\n".join(lines)


def refuse_folder(out: Path, option: str, overwrite: bool) -> None:
    """Refuse a folder to which a model cannot be written.

    Raises:
        OSError: it cannot be written to, or holds a model and ``overwrite`` is not given.
    """
    refuse_unwritable(out, option)
    held = [name for name in (CONFIG_FILE, WEIGHTS_FILE, CARD, CURVES) if (out / name).exists()]
    if held and not overwrite:
        raise FileExistsError(
            f"{option}: {out} holds {', '.join(held)}; name another folder, or --overwrite replaces them"
        )
