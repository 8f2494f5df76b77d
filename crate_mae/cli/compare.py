"""`crate-mae compare`: runs side by side, as curves on one page and as a table of figures and differing settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from crate_mae.cli.parsers import command_parser
from crate_mae.cli.settings import path_of
from crate_mae.comparing import ComparedRun, Comparison, Reading, Start, compare
from crate_mae.files import make_folder, replaced
from crate_mae.pictures.comparison import COLOURS, comparison_picture

HELP = "Draw and tabulate runs side by side."


def make_parser() -> ArgumentParser:
    """The parser of `compare`."""
    parser = command_parser(
        "Draws the losses and errors of runs over steps, images and hours, and prints how far each has come, what "
        "came of it, and in which settings they differ. Runs may be going on.",
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=str,
        help=f"Folders of runs, all of pretrain or all of finetune, {len(COLOURS)} at most.",
    )
    parser.add_argument("--out", type=Path, default=Path("comparison.png"), help="File for the picture, a PNG.")
    return parser


def run(parser: ArgumentParser, chosen: Namespace) -> str:
    """Write the picture; returns what to print.

    Raises:
        OSError: there is no such run, or the picture cannot be written.
        ValueError: the runs are none or cannot be compared, or the picture's name is none of a PNG; the message says which.
    """
    asked = chosen.compare
    runs, out = [path_of(name) for name in asked.runs], path_of(str(asked.out))
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out: expected the name of a file that ends in .png, got {out}")
    comparison = compare(runs)
    picture = comparison_picture(comparison)
    make_folder(out.absolute().parent)
    with replaced(out, alone=False) as file:
        picture.save(file, format="PNG")
    return "\n".join([*comparison_lines(comparison), "", f"Look at {out}."])


def comparison_lines(comparison: Comparison) -> list[str]:
    """What to print: a table of figures, the state of each run, the settings that differ, and those changed when resumed."""
    runs = comparison.runs
    lines = _table(["", *(run.name for run in runs)], [[name, *map(of, runs)] for name, of in _figures(comparison)])
    lines += ["", *_table(None, [[f"{run.name}:", run.state] for run in runs])]
    if comparison.differing:
        rows = [[name, *map(_value, values)] for name, values in comparison.differing.items()]
        lines += ["", *_table(["settings that differ", *(run.name for run in runs)], rows)]
    elif runs[1:]:
        lines += ["", "no settings differ"]
    if changed := [(run, start) for run in runs for start in run.starts if start.changed]:
        lines += ["", "settings changed when resumed"]
        lines += _table(None, [[f"{run.name}, step {start.step:,}:", _changed(start)] for run, start in changed])
    return lines + (["", *comparison.remarks] if comparison.remarks else [])


def _changed(start: Start) -> str:
    return start.changed + (" (the run later went back to a step before)" if start.forgotten else "")


def _figures(comparison: Comparison) -> Iterator[tuple[str, Callable[[ComparedRun], str]]]:
    """Rows of the table: a name, and the function that gives a run's figure."""
    yield "steps", lambda run: f"{run.step:,}"
    yield "epochs", lambda run: run.progress
    yield "images", lambda run: f"{run.images:,}"
    yield "time (h:mm:ss)", lambda run: f"{'about ' if run.hours_estimated else ''}{_clock(run.hours)}"
    yield "images/s (median)", lambda run: f"{run.images_per_second:,.1f}"
    yield "training loss", lambda run: f"{run.steps[-1].values['loss']:.4g}"
    if any(run.validations for run in comparison.runs):
        yield "validation error", lambda run: _of(run.last, "val_loss", "{:.4g}")
        if comparison.kind == "finetune":
            yield "top-1", lambda run: _of(run.last, "val_top1", "{:.2%}")
            yield "best top-1", lambda run: _of(run.best, "val_top1", "{:.2%}")
        else:
            yield "best error", lambda run: _of(run.best, "val_loss", "{:.4g}")
            yield "  mean fill", lambda run: _of(run.last, "mean_fill_loss", "{:.4g}")
            yield "  best blur", lambda run: _of(run.last, "blur_loss", "{:.4g}")
        yield "best at step", lambda run: f"{run.best.step:,}" if run.best else "-"


def _of(reading: Reading | None, name: str, form: str) -> str:
    return form.format(reading.values[name]) if reading and name in reading.values else "-"


def _clock(hours: float) -> str:
    minutes, seconds = divmod(round(3600 * hours), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _value(value: Any) -> str:
    """A setting as in a --config, without quotation marks."""
    return value if isinstance(value, str) else json.dumps(value)


def _table(headings: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns, as wide as need be: aligned right below headings, which are for numbers, else left, for words."""
    align = str.rjust if headings else str.ljust
    lines = [headings, *rows] if headings else rows
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join([line[0].ljust(widths[0]), *map(align, line[1:], widths[1:])]).rstrip() for line in lines]
