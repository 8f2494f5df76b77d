"""Pre-train from Python, look in with a callback, and see what the model makes of a photograph.

    python examples/pretrain_with_callback.py                               # the shipped flowers
    python examples/pretrain_with_callback.py --data photos --image photo.jpg --epochs 100 --out runs/photos

The callback says at each validation how much of the photograph's code, which the encoder's last layer gives, is zero; and it
ends the run when three validations in a row have brought no lower error.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import crate_mae
from crate_mae import analysis
from crate_mae.data import FLOWERS, Normalization
from crate_mae.pictures import reconstruction_sheet
from crate_mae.training import ImagesConfig, OptimizerConfig, RunConfig, ScheduleConfig


class Watch:
    """A callback: called with each row of metrics.jsonl and the model as it is then. A function would do as well."""

    def __init__(self, images: Tensor, patience: int = 3) -> None:
        self.images, self.patience = images, patience
        self.errors: list[float] = []

    def __call__(self, step: int, metrics: dict[str, Any], model: crate_mae.CrateMAE) -> bool:
        if "val_loss" not in metrics:  # a row of training steps
            return False
        self.errors.append(metrics["val_loss"])
        layers = analysis.trace(model, self.images.to(next(model.parameters()).device))
        *_, last = (layer for layer in layers if layer.stack == "encoder")
        zeros = analysis.zero_fraction(last.output).mean().item()
        print(f"  after {step} steps {zeros:.0%} of the photograph's code is zero")
        before, lately = self.errors[: -self.patience], self.errors[-self.patience :]
        return bool(before) and min(lately) >= min(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/callback"), help="folder of the run")
    parser.add_argument("--data", default=str(FLOWERS), help="images, as of crate-mae pretrain --data")
    parser.add_argument("--image", type=Path, default=FLOWERS / "val/sunflowers/14266917699_91b207888e.jpg")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--overwrite", action="store_true", help="delete the run that is in --out")
    options = parser.parse_args()

    sizes = dict(img_size=64, patch_size=8, embed_dim=128, depth=3, num_heads=4, decoder_depth=1, decoder_num_heads=4)
    config = crate_mae.PretrainConfig(
        out=options.out,
        data=options.data,
        model=crate_mae.ModelConfig(**sizes, lambd=0.1),
        images=ImagesConfig(crop_scale=(0.5, 1.0)),
        optimizer=OptimizerConfig(base_lr=0.024, weight_decay=0.2),  # a far higher rate than larger models bear
        schedule=ScheduleConfig(epochs=options.epochs, warmup_epochs=options.epochs / 10, batch_size=16),
        run=RunConfig(save_every=1, threads=1),
    )
    photograph = ImageOps.exif_transpose(Image.open(options.image)).convert("RGB")
    pixels = np.array(ImageOps.fit(photograph, (64, 64)))
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    normalization = Normalization(config.images.mean, config.images.std, 3)

    watch = Watch(normalization(pixels))
    result = crate_mae.pretrain(config, overwrite=options.overwrite, callbacks=[watch])
    print(f"{result.steps} steps; the validation error went from {watch.errors[0]:.4f} to {watch.errors[-1]:.4f}.")

    torch.manual_seed(0)  # by which patches are hidden
    model = crate_mae.load_model(options.out / "best")
    picture = options.out / "photograph.png"
    reconstruction_sheet(model, pixels, normalization, mask_ratio=config.schedule.mask_ratio).save(picture)
    print(f"What the best model makes of {options.image.name} with three quarters of it hidden: {picture}")


if __name__ == "__main__":
    main()
