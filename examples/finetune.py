"""Fine-tune an encoder on the classes of the shipped flowers, and ask the classifier about one photograph.

    python examples/pretrain_with_callback.py        # makes runs/callback
    python examples/finetune.py --init runs/callback
    python examples/finetune.py --out runs/scratch   # the same from random weights, to compare

After so short a pre-training the two come out alike. Any run will do, and any folder with a sub-folder for each class (--data).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image

import crate_mae
from crate_mae.checkpoints import read_config
from crate_mae.classifiers import classifier_config
from crate_mae.data import FLOWERS
from crate_mae.finetuning import AugmentConfig, FinetuneOptimizerConfig, FinetuneRunConfig, FinetuneScheduleConfig
from crate_mae.preprocessing import read_normalization
from crate_mae.training import ImagesConfig, demo_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, help="folder of the run to start from; without it, random weights")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuned"), help="folder of the fine-tuning")
    parser.add_argument("--data", default=str(FLOWERS), help="labelled images, as of crate-mae finetune --data")
    parser.add_argument("--image", type=Path, default=FLOWERS / "val/sunflowers/14266917699_91b207888e.jpg")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--base_lr", type=float, default=1e-2, help="small models and batches want more than usual")
    parser.add_argument("--overwrite", action="store_true", help="delete the run that is in --out")
    options = parser.parse_args()

    if options.init is None:
        print("No --init: from random weights, with the sizes of the demo's encoder.")
        encoder, images = demo_config(options.out).model, ImagesConfig()
    else:
        # The classifier shall see images as the encoder saw them in pre-training.
        normalization = read_normalization(options.init)
        mean, std = (tuple(values.flatten().tolist()) for values in (normalization.mean, normalization.std))
        encoder, images = read_config(options.init), ImagesConfig(mean=mean, std=std)
    config = crate_mae.FinetuneConfig(
        out=options.out,
        init=options.init,
        data=options.data,
        model=classifier_config(encoder),
        images=images,
        optimizer=FinetuneOptimizerConfig(base_lr=options.base_lr, layer_decay=0.8),
        schedule=FinetuneScheduleConfig(epochs=options.epochs, warmup_epochs=options.epochs / 10, batch_size=16),
        augment=AugmentConfig(mixup=0.0, cutmix=0.0, drop_path=0.0),  # which are for runs of many epochs
        run=FinetuneRunConfig(threads=1),
    )
    result = crate_mae.finetune(config, overwrite=options.overwrite)
    chance = 1 / len(result.classes)
    print(f"Top-1 on {result.val_images} images not trained on: {result.scores.val_top1:.1%}; chance is {chance:.1%}.")

    model = crate_mae.load_model(options.out).eval()
    transform = crate_mae.load_transform(options.out)
    classes = json.loads((options.out / "config.json").read_text())["classes"]
    with Image.open(options.image) as image, torch.no_grad():
        probabilities = model(transform(image)[None]).softmax(-1)[0]
    print(f"{options.image.name} is, it says,")
    for probability, number in zip(*probabilities.topk(min(3, len(classes))), strict=True):
        print(f"  {probability:6.1%}  {classes[number]}")


if __name__ == "__main__":
    main()
