"""Embed a folder of images with a run, and find those that are most like one of them.

    python examples/embed_and_search.py                                    # pre-trains on the shipped flowers first
    python examples/embed_and_search.py --run runs/demo                    # with a run that is there
    python examples/embed_and_search.py --run runs/mine --data photos --query beach.jpg --count 9

Likeness is the cosine between embeddings. By default the images are the flowers that the run has not learnt from.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import crate_mae
from crate_mae.data import FLOWERS
from crate_mae.embedding import embed, read_embeddings
from crate_mae.pictures.sheet import CELL, Column, Row, sheet
from crate_mae.training import demo_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run; without it, one is made in OUT/run")
    parser.add_argument("--epochs", type=int, default=15, help="of the run that is made")
    parser.add_argument("--data", default=str(FLOWERS / "val"), help="folder of images to search in")
    parser.add_argument("--query", default="14266917699_91b207888e.jpg", help="name of one of them, or its end")
    parser.add_argument("--count", type=int, default=6, help="neighbours to find")
    parser.add_argument("--out", type=Path, default=Path("runs/search"), help="folder for what is written")
    parser.add_argument("--overwrite", action="store_true", help="delete what an earlier call has left in --out")
    options = parser.parse_args()

    run = options.run or options.out / "run"
    if options.run is None:
        config = demo_config(run)
        schedule = replace(config.schedule, epochs=options.epochs, warmup_epochs=options.epochs / 10)
        crate_mae.pretrain(replace(config, schedule=schedule), overwrite=options.overwrite)
    options.out.mkdir(parents=True, exist_ok=True)
    embedded = embed(run, options.data, options.out / "embeddings.npz", overwrite=options.overwrite)

    features, paths, *_ = read_embeddings(embedded.path)  # of a folder, the names of images are their paths
    names = [Path(path).relative_to(options.data).as_posix() for path in paths]
    query = next((number for number, name in enumerate(names) if name.endswith(options.query)), None)
    if query is None:
        raise SystemExit(f"--query: expected the name of an image in {options.data}, or its end, got {options.query}")
    directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = directions @ directions[query]
    nearest = [number for number in np.argsort(-cosines) if number != query][: options.count]

    print(f"Most like {names[query]}:")
    for number in nearest:
        print(f"  {cosines[number]:.4f}  {names[number]}")

    def cell(number: int) -> Image.Image:
        with Image.open(paths[number]) as image:
            return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (2 * CELL, 2 * CELL))

    shown = [query, *nearest]
    columns = [Column("query"), *(Column(f"cosine {cosines[number]:.4f}") for number in nearest)]
    row = Row("", (), [cell(number) for number in shown], notes=[Path(names[number]).name for number in shown])
    picture = options.out / "neighbours.png"
    sheet(f"Most like {names[query]}", [f"by the encoder of {run}"], columns, [row]).save(picture)
    print(f"Side by side: {picture}")


if __name__ == "__main__":
    main()
