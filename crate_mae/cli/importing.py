"""`crate-mae import`: an official checkpoint as a folder that all commands take."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from crate_mae.checkpoints import WEIGHTS_FILE
from crate_mae.cli.parsers import command_parser
from crate_mae.cli.settings import path_of
from crate_mae.cli.share import refuse_folder
from crate_mae.config import POOLS, ClassifierConfig
from crate_mae.registry import count_parameters
from crate_mae.sharing.folder import save_pretrained
from crate_mae.sharing.importing import import_checkpoint

HELP = "Make a model's folder of an official checkpoint."


def make_parser() -> ArgumentParser:
    """The parser of `import`."""
    parser = command_parser(
        "Reads an official checkpoint of CRATE-MAE, CRATE or CRATE-alpha, of any size, and writes a folder with "
        "model.safetensors, config.json and a model card, as all commands and from_pretrained take it.",
    )
    parser.add_argument("file", metavar="FILE", type=str, help="Checkpoint: .pth, .pt or .safetensors.")
    parser.add_argument("out", metavar="OUT", type=str, help="Folder to write.")
    parser.add_argument(
        "--lambd",
        type=float,
        help="Sparsity weight that it was trained with, which it does not hold: official releases of CRATE-MAE had 5.0 and later "
        "0.5; CRATE and CRATE-alpha 0.1, the default for these.",
    )
    parser.add_argument("--step_size", type=float, help="Likewise; 0.1 in all official releases.")
    parser.add_argument("--num_heads", type=int, help="Of a width that no published model has; those are known.")
    parser.add_argument("--decoder_num_heads", type=int, help="By default, as many as the encoder's.")
    parser.add_argument(
        "--img_size",
        type=int,
        nargs="+",
        help="Side of the images, or height and width; by default, as the positions tell.",
    )
    parser.add_argument("--in_chans", type=int, help="Channels of a CRATE's images, where its shapes leave them open.")
    parser.add_argument(
        "--pool",
        choices=POOLS,
        help="What a CRATE's or CRATE-alpha's head sees, which no weight tells; by default, cls.",
    )
    parser.add_argument(
        "--norm_pix_loss", action="store_true", help="It was trained to reconstruct standardised patches."
    )
    parser.add_argument("--mean", type=float, nargs="+", help="Of each channel, by which its images were standardised.")
    parser.add_argument("--std", type=float, nargs="+", help="Likewise.")
    parser.add_argument("--license", type=str, default="", help="Of the weights, for the card: mit, cc-by-nc-4.0, ...")
    parser.add_argument("--overwrite", action="store_true", help="Replace a model in OUT.")
    return parser


def run(parser: ArgumentParser, chosen: Namespace) -> str:
    """Write the folder; returns what to print.

    Raises:
        OSError: there is no such file, or the folder cannot be written.
        ValueError: an argument is missing or does not fit, or the file is of no such model; the message names it.
    """
    asked = chosen["import"]
    file, out = path_of(asked.file), path_of(asked.out)
    refuse_folder(out, "OUT", asked.overwrite)
    size = asked.img_size
    if size is not None and len(size) > 2:
        raise ValueError(f"--img_size: expected a side, or height and width, got {len(size)} numbers")
    try:
        model = import_checkpoint(
            file,
            lambd=asked.lambd,
            step_size=asked.step_size,
            num_heads=asked.num_heads,
            decoder_num_heads=asked.decoder_num_heads,
            in_chans=asked.in_chans,
            pool=asked.pool,
            img_size=size and (size[0] if len(size) == 1 else tuple(size)),
            norm_pix_loss=asked.norm_pix_loss,
        )
        remark = f"Made of the checkpoint `{file.name}` by `crate-mae import`."
        save_pretrained(model, out, mean=asked.mean, std=asked.std, license=asked.license, remark=remark)
    except (RuntimeError, TypeError) as error:  # weights that do not fit, or settings of a wrong type
        raise ValueError(str(error)) from error
    config, (trained, _) = model.config, count_parameters(model)
    what = "CRATE-MAE"
    if isinstance(config, ClassifierConfig):
        what = f"classifier of {config.num_classes} classes, pool {config.pool}"
    assumed = "" if asked.num_heads else " (as published models of this width have)"
    lines = [
        f"{out / WEIGHTS_FILE}: {what}, width {config.embed_dim}, {config.depth} layers, {config.num_heads} heads{assumed}, "
        f"patch {config.patch_size}, images of {' x '.join(map(str, config.image_shape))}, {trained:,} parameters; lambda "
        f"{config.lambd:g}, step size {config.step_size:g}"
    ]
    if asked.mean is None:
        lines.append(
            "How its images were standardised is not in it, and commands that show it photographs will refuse it: say so by "
            "--mean and --std (and --overwrite), ImageNet's being --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
        )
    return "\n".join(lines)
