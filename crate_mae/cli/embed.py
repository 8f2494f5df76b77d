"""`crate-mae embed`: the features of all images of a source, in a file."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from crate_mae.cli.features import add_computing, add_features, number_or_auto, spec_of
from crate_mae.cli.parsers import command_parser
from crate_mae.cli.runs import backbone_of, check_run, normalization_of
from crate_mae.cli.settings import path_of
from crate_mae.data.progress import say
from crate_mae.embedding import check_out, embed_with, in_words
from crate_mae.training.precision import cpu_threads

HELP = "Write the features of all images of a source to a file."


def make_parser() -> ArgumentParser:
    """The parser of `embed`."""
    parser = command_parser(
        "Writes what a model's encoder makes of each image of a source, a vector an image, to a file. If it ends "
        "before it is done, the same command goes on.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of a run or of a model.")
    parser.add_argument("--data", type=str, help="Images, as --data of pretrain names them; all that are in there.")
    parser.add_argument(
        "--out",
        type=Path,
        help="File to write: .npz for NumPy, .parquet for tables, which needs pip install '.[data]'.",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace FILE if it is there, once the new one is whole."
    )
    add_features(parser)
    parser.add_argument(
        "--batch_size",
        type=str,
        default="auto",
        help='Images at once; "auto": on CUDA the largest power of two, up to 1,024, that fits, on a CPU 32.',
    )
    add_computing(parser)
    return parser


def run(parser: ArgumentParser, chosen: Namespace) -> str:
    """Write the file; returns what to print. Errors as of `check_run` and of `crate_mae.embedding.embed`."""
    asked = chosen.embed
    folder = path_of(str(asked.run))
    for name, what in (("data", "images, as --data of pretrain names them"), ("out", "a file, .npz or .parquet")):
        if asked[name] is None:
            raise ValueError(f"--{name}: expected {what}")
    out = path_of(str(asked.out))
    check_out(out, asked.overwrite)
    batch_size = number_or_auto(asked, "batch_size")
    check_run(folder)
    model = backbone_of(folder)
    with cpu_threads(asked.threads):
        made = embed_with(
            model,
            normalization_of(folder),
            asked.data,
            out,
            spec=spec_of(asked, [len(model.encoder_layers)]),
            batch_size=batch_size,
            num_workers=number_or_auto(asked, "num_workers"),
            device=asked.device,
            precision=asked.precision,
            overwrite=asked.overwrite,
            say=say,
        )
    return in_words(*made)
