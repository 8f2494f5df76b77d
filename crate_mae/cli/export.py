"""`crate-mae export`: a trained model as one file that is loaded without this package."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from crate_mae.checkpoints import read_config
from crate_mae.cli.parsers import command_parser
from crate_mae.cli.runs import check_run, trained_ratio
from crate_mae.cli.settings import path_of
from crate_mae.config import ModelConfig, grid_of
from crate_mae.exporting.check import LEAST_SIDE, ROUNDINGS, TOLERANCE
from crate_mae.exporting.writing import DEFAULT_OPSET, FORMATS, METADATA, OPSETS, OUTPUTS, Exported, export
from crate_mae.visualizing import check_mask_ratio

HELP = "Write a trained model for use without this package."


def make_parser() -> ArgumentParser:
    """The parser of `export`."""
    parser = command_parser(
        "Writes a trained model as one file, for any batch, height and width, which PyTorch or ONNX Runtime loads "
        "where crate_mae is not installed; before it takes its place, that is done, and compared with the model at three sizes.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="Folder of a run or model, such as runs/demo.")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="pt2",
        help="For torch.export.load, or onnx, which needs 'crate-kernels[export]'.",
    )
    parser.add_argument(
        "--output",
        choices=OUTPUTS,
        help="Tokens of all patches, behind the class token's; features, the mean patch token; logits of a classifier; or "
        "reconstruction, of images and mask noise. By default logits where the model has a head, else tokens.",
    )
    parser.add_argument("--out", type=Path, help="The file; by default model.pt2 or model.onnx in RUN.")
    parser.add_argument(
        "--mask_ratio",
        type=float,
        help="Fraction of the patches that reconstruction removes; by default, the run's own.",
    )
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET, help=f"Of ONNX, {OPSETS[0]} to {OPSETS[-1]}.")
    parser.add_argument("--overwrite", action="store_true", help="In place of a file that is there.")
    return parser


def run(parser: ArgumentParser, chosen: Namespace) -> str:
    """Write the file; returns what to print.

    Raises:
        OSError: there is no such run, or the file cannot be written.
        ValueError: an argument cannot be used; the message names it.
        Exception: as of `crate_mae.exporting.export`.
    """
    asked = chosen.export
    for path in (asked.run, *([asked.out] if asked.out else [])):
        path_of(str(path))
    check_run(asked.run)
    options = {}
    if asked.output == "reconstruction" and isinstance(config := read_config(asked.run), ModelConfig):
        options["mask_ratio"] = trained_ratio(asked.run) if asked.mask_ratio is None else asked.mask_ratio
        grid = grid_of(config.image_shape, config.patch_size)
        check_mask_ratio(options["mask_ratio"], grid, "an image", "--mask_ratio")
    elif asked.mask_ratio is not None:
        raise ValueError(
            "--mask_ratio: expected with --output reconstruction of a CRATE-MAE alone, which removes patches"
        )
    exported = export(
        asked.run,
        asked.out,
        format=asked.format,
        output=asked.output,
        opset=asked.opset,
        overwrite=asked.overwrite,
        **options,
    )
    return "\n".join(_lines(exported))


def _lines(exported: Exported) -> list[str]:
    path, inputs = exported.path, exported.inputs
    least = LEAST_SIDE * exported.patch_size
    lines = [
        f"{path}, {exported.size / 1e6:,.2f} MB: {' and '.join(inputs)} in, {' and '.join(exported.outputs)} out. "
        f"Any batch; height and width are multiples of {exported.patch_size}, {least} or more.",
        "Loaded where crate_mae and crate_kernels cannot be imported, and compared with the model; at most "
        f"{TOLERANCE:g} * max(1, largest value) and {TOLERANCE:g} of the norm apart, or {ROUNDINGS} times as far as the model is "
        "from itself in float64:",
        "  batch x height x width   largest difference   relative, in norm   largest value",
    ]
    for each in exported.checked:
        size = f"{each.batch} x {each.height} x {each.width}"
        line = f"  {size:<22}   {each.difference:>18.1e}   {each.relative:>17.1e}   {each.largest:>13.3g}"
        lines.append(line if each.rounding is None else f"{line}   itself {each.rounding:.1e} from float64")
    if exported.format == "onnx":
        given = ", ".join(f'"{name}": {name}' for name in inputs)
        loaded = f'onnxruntime.InferenceSession("{path}").run(None, {{{given}}})'
    else:
        loaded = f'torch.export.load("{path}").module()({", ".join(inputs)})'
    return [*lines, f"Use it as {loaded}; {METADATA} in its metadata says how images are standardised."]
