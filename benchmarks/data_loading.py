"""Images a second that one core gets ready for training, from every kind of source, beside other loaders of the same files.

    python -m benchmarks.data_loading --data photographs/ --json rows.jsonl
    python -m benchmarks.data_loading --workers 2     # then the whole loader with processes, too

The images of ``--data`` are packed as ``crate-mae pack`` does it, with a short side of 256 pixels; smaller ones are enlarged to
that. The same bytes are put into a folder and a Parquet file. Every loader makes batches of 224 x 224 pixels of them, from the
same crops, on one thread. The yardstick is Pillow that decodes the files and does nothing else: a ratio is the share of its
speed. Ours draws masks, too, and leaves flips to the device.
"""

from __future__ import annotations

import argparse
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from benchmarks import harness
from benchmarks.command_line import positive
from benchmarks.peers import Absent, needed
from benchmarks.records import Record, in_one_line
from crate_mae.data import (
    FLOWERS,
    HuggingFaceImages,
    ImageFolder,
    ImageLoader,
    PretrainImages,
    Source,
    Subset,
    SyntheticImages,
    TarShards,
    open_source,
    samples,
    shard_paths,
    whole,
)
from crate_mae.data.packing import PackSettings, pack
from crate_mae.data.transforms import Box

SHORT_SIDE, SIZE, PATCHES = 256, (224, 224), 14 * 14
BASELINE = "pillow"
ONE_PROCESS = "one process"
CACHES = ("XDG_CACHE_HOME", "HF_DATASETS_CACHE")

# The relative error allowed of an image in the first batch, against the same crop by Pillow. PyTorch's filter rounds
# differently; a wrong crop is 0.1 off and more.
TOLERANCE = 0.02


class AsWanted(Subset):
    """A source's images; those with a side below ``SHORT_SIDE`` are enlarged to it and stored as JPEG, as packing stores them."""

    def image(self, index: int) -> Image.Image:
        image = super().image(index)
        if min(image.size) >= SHORT_SIDE:
            return image
        image = whole(image, 3, self.name(index))
        scale = SHORT_SIDE / min(image.size)
        image = image.resize([max(SHORT_SIDE, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        file = BytesIO()
        image.save(file, "JPEG", quality=PackSettings().quality)
        return Image.open(file)


@dataclass(frozen=True)
class Files:
    """The same JPEG files, in the same order, in every form.

    draws: of each the crop and whether it is flipped, as ours draws them in epoch 0.
    about: in words.
    """

    folder: Path
    paths: list[Path]
    shards: list[Path]
    parquet: Path
    draws: list[tuple[Box, bool]]
    batches: list[list[int]]
    seed: int
    about: str

    @property
    def in_order(self) -> Files:
        """For a loader that cannot seek."""
        numbers, size = list(range(len(self.paths))), len(self.batches[0])
        return replace(self, batches=[numbers[first : first + size] for first in numbers[::size]])


def prepare(source: Source, count: int, batch: int, seed: int, out: Path) -> Files:
    """Whole batches of at most so many images of a source, taken evenly from all of it, packed and unpacked.

    Raises:
        SystemExit: there is no whole batch of them, or one cannot be read.
    """
    count = min(count, len(source)) // batch * batch
    if not count:
        raise SystemExit(
            f"--batch {batch}: expected no more than --images, and than --data holds, which is {len(source)}"
        )
    chosen = AsWanted(source, np.linspace(0, len(source) - 1, count).round().astype(int))
    settings = PackSettings(short_side=SHORT_SIDE)
    packed = pack(chosen, out / "packed", settings, max_unreadable=1, say=lambda line: None)
    if packed.unreadable:
        raise SystemExit(f"--data: {len(packed.unreadable)} images cannot be read, {packed.unreadable[0].name} for one")
    enlarged = sum(min(source.image(index).size) < SHORT_SIDE for index in chosen.indices.tolist())
    shards = shard_paths(str(out / "packed"))
    images = TarShards(shards, progress=False)
    folder = out / "folder" / "photographs"  # torchvision wants a folder for each class
    folder.mkdir(parents=True)
    paths: list[Path] = []
    for shard in shards:
        with tarfile.open(shard) as members:
            for member in members:
                content = members.extractfile(member)
                assert content is not None  # None of what is no file, which packing never writes
                paths.append(folder / f"{len(paths):06}.jpg")
                paths[-1].write_bytes(content.read())
    sizes = [images.image(index).size for index in range(count)]
    order = np.random.default_rng((seed, 0)).permutation(count).tolist()
    batches = [order[first : first + batch] for first in range(0, count, batch)]
    kilobytes = mean(path.stat().st_size for path in paths) / 1e3
    about = f"{len(paths)} JPEGs, {'x'.join(f'{mean(side):.0f}' for side in zip(*sizes, strict=True))}"
    about += f" pixels and {kilobytes:.0f} kB in the mean" + (f", {enlarged} of them enlarged" if enlarged else "")
    return Files(folder.parent, paths, shards, out / "images.parquet", drawn(images, seed), batches, seed, about)


def drawn(source: Source, seed: int) -> list[tuple[Box, bool]]:
    """Which part of each image ours takes, and whether it is flipped."""
    boxes: list[Box] = []
    with patch.object(samples, "part", lambda image, box, *_, **__: boxes.append(box)):
        batch = PretrainImages(source, SIZE, seed, patches=PATCHES).batch([(0, index) for index in range(len(source))])
    return list(zip(boxes, batch.flip.tolist(), strict=True))


def write_parquet(files: Files) -> None:
    """Write the files as one Parquet file, in the format of datasets on the Hugging Face Hub.

    Raises:
        Absent: the library that writes it is not installed.
    """
    datasets = needed("datasets")
    if not files.parquet.exists():
        rows = [{"bytes": path.read_bytes(), "path": path.name} for path in files.paths]
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(files.parquet)


Loader = Callable[[], Iterable[Tensor]]
"""Batches, uint8 [batch, 3, 224, 224]; new ones each time that it is called."""


def ours(source: Source, files: Files, workers: int = 0, epochs: int = 1) -> Loader:
    """The loader that training uses."""
    images = PretrainImages(source, SIZE, files.seed, patches=PATCHES)
    keys = [[(epoch, index) for index in batch] for epoch in range(epochs) for batch in files.batches]
    return lambda: (batch.pixels.permute(0, 3, 1, 2) for batch in ImageLoader(images, keys, num_workers=workers))


def of_synthetic(files: Files) -> Source:
    with Image.open(files.paths[0]) as image:
        return SyntheticImages(len(files.paths), size=image.size[::-1], seed=files.seed)


def of_parquet(files: Files) -> Source:
    write_parquet(files)
    return HuggingFaceImages(str(files.parquet))


OURS: dict[str, Callable[[Files], Source]] = {
    "folder": lambda files: ImageFolder(files.folder),
    "packed": lambda files: TarShards(files.shards, progress=False),
    "parquet": of_parquet,
    "synthetic": of_synthetic,
}


class Mapped(Dataset[Tensor]):
    """Others' images by number, cropped and flipped by a function of theirs, or by Pillow."""

    def __init__(self, read: Callable[[int], Image.Image], transform: Callable[..., Tensor], files: Files) -> None:
        self.read, self.transform, self.draws = read, transform, files.draws

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.read(index), *self.draws[index])


def crop_by_pillow(image: Image.Image, box: Box, flip: bool) -> Tensor:
    image = image.crop(box).resize(SIZE[::-1], Image.Resampling.BICUBIC)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def by_pillow(files: Files) -> Loader:
    images = Mapped(lambda index: Image.open(files.paths[index]).convert("RGB"), crop_by_pillow, files)
    return lambda: DataLoader(images, batch_sampler=files.batches)


def by_torchvision(files: Files) -> Loader:
    # Wheels for CUDA lack their compiled operators beside a PyTorch without; nothing here calls one, but each is looked for.
    with patch.object(torch.library, "register_fake", lambda *_, **__: lambda function: function):
        transforms, datasets = needed("torchvision.transforms.v2"), needed("torchvision.datasets")
    functional, bicubic = transforms.functional, transforms.InterpolationMode.BICUBIC

    def crop(image: Image.Image, box: Box, flip: bool) -> Tensor:
        left, top, right, bottom = box
        corner, size = (top, left), (bottom - top, right - left)
        image = functional.resized_crop(image, *corner, *size, SIZE, bicubic, antialias=True)
        return functional.to_image(functional.horizontal_flip(image) if flip else image)

    folder = datasets.ImageFolder(str(files.folder))
    images = Mapped(lambda index: folder[index][0], crop, files)
    return lambda: DataLoader(images, batch_sampler=files.batches)


def by_webdataset(files: Files) -> Loader:
    webdataset = needed("webdataset")

    class Images(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            shards = webdataset.WebDataset([str(path) for path in files.shards], shardshuffle=False)
            for (image,), draw in zip(shards.decode("pil").to_tuple("jpg"), files.draws, strict=True):
                yield crop_by_pillow(image, *draw)

    return lambda: DataLoader(Images(), batch_size=len(files.batches[0]))


def by_datasets(files: Files) -> Loader:
    write_parquet(files)
    table = needed("datasets").load_dataset("parquet", data_files={"train": str(files.parquet)}, split="train")
    images = Mapped(lambda index: table[index]["image"], crop_by_pillow, files)
    return lambda: DataLoader(images, batch_sampler=files.batches)


OTHERS: dict[str, Callable[[Files], Loader]] = {
    "pillow crop": by_pillow,
    "torchvision": by_torchvision,
    "webdataset": by_webdataset,
    "datasets": by_datasets,
}
IN_ORDER = {"webdataset"}
PROVIDERS = (BASELINE, *OURS, *OTHERS)


def decode(files: Files) -> None:
    """The yardstick: every pixel of every file that is in a batch, and nothing else."""
    for batch in files.batches:
        for index in batch:
            with Image.open(files.paths[index]) as image:
                image.load()


def exhaust(loader: Loader) -> int:
    """Load everything; how many images there were."""
    return sum(len(batch) for batch in loader())


def check(name: str, loader: Loader, wanted: Sequence[Tensor]) -> dict[str, float]:
    """The largest relative error of an image in the first batch.

    Raises:
        ValueError: it is no such batch, or too far off.
    """
    batch = next(iter(loader()))
    if batch.dtype != torch.uint8 or batch.shape != (len(wanted), 3, *SIZE):
        raise ValueError(f"{name}: expected uint8 {[len(wanted), 3, *SIZE]}, got {batch.dtype} {list(batch.shape)}")
    error = max(map(harness.relative_error, batch, wanted))
    if not error <= TOLERANCE:
        raise ValueError(f"{name}: an image is {error:.1e} off, relative; allowed are {TOLERANCE:.1e}")
    return {"images": error}


def first_crops(files: Files, source: Source | None) -> list[Tensor]:
    """The first batch as Pillow crops it: from a source of ours, which leaves flips to the device, or from the files."""
    if source is None:
        return [crop_by_pillow(Image.open(files.paths[index]), *files.draws[index]) for index in files.batches[0]]
    draws = drawn(source, files.seed)
    return [crop_by_pillow(source.image(index), draws[index][0], flip=False) for index in files.batches[0]]


def measure(record: Record, files: Files, names: Sequence[str], rounds: int) -> None:
    """One row a loader: in turns, each over all batches."""
    common: dict[str, Any] = {"operator": "data_loading", "mode": ONE_PROCESS, "dtype": "uint8", "data": files.about}
    common |= {"shape": [len(files.batches[0]), 3, *SIZE], "baseline": BASELINE}
    providers: dict[str, harness.Provider] = {BASELINE: lambda: decode(files)}
    errors: dict[str, dict[str, float]] = {}
    for name in names:
        if name == BASELINE:
            continue
        visits = files.in_order if name in IN_ORDER else files
        try:
            if name in OURS:
                source = OURS[name](files)
                loader = ours(source, files)
            else:
                source, loader = None, OTHERS[name](visits)
        except Absent as problem:
            record.add(**common, provider=name, unavailable=str(problem))
            continue
        errors[name] = check(name, loader, first_crops(visits, source))
        providers[name] = partial(exhaust, loader)
    # Processor time, so that other work on the machine does not count; the files were just written, and no loader waits for them.
    times = harness.time_interleaved(providers, torch.device("cpu"), rounds=rounds, clock=time.process_time)
    count = sum(map(len, files.batches))
    for name, sample in times.items():
        ms = harness.Spread.of(sample)
        record.add(
            **common,
            provider=name,
            timed_by="processor time",
            rounds=rounds,
            ms=vars(ms),
            images_per_second=1e3 * count / ms.p50,
            ratio=harness.ratios_to(times[BASELINE], sample),
            error=errors.get(name),
        )


def measure_workers(record: Record, files: Files, workers: int, rounds: int) -> None:
    """The whole loader with processes, once they have begun: from the first batch of each to the last of all, of packed files."""
    epochs = max(1, -(-16 * workers // len(files.batches)))
    loader = ours(OURS["packed"](files), files, workers, epochs)
    count, sample = sum(map(len, files.batches)), []
    for _ in range(rounds):
        batches = iter(loader())
        for _ in range(workers):
            next(batches)
        begin = time.perf_counter()
        rest = sum(len(batch) for batch in batches)
        sample.append(1e3 * (time.perf_counter() - begin) * count / rest)
    ms = harness.Spread.of(sample)
    common: dict[str, Any] = {
        "operator": "data_loading",
        "mode": f"{workers} workers",
        "dtype": "uint8",
        "data": files.about,
    }
    common |= {"shape": [len(files.batches[0]), 3, *SIZE], "provider": "packed", "timed_by": "host clock"}
    record.add(**common, rounds=rounds, ms=vars(ms), images_per_second=1e3 * count / ms.p50)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(1)
    record = Record(torch.device("cpu"), arguments.seed, arguments.json)
    # Indices and what the datasets library makes of Parquet are kept as long as the files that they are of, no longer.
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, dict.fromkeys(CACHES, folder)):
        try:
            source = open_source(arguments.data)
        except (OSError, ValueError, ImportError) as problem:
            raise SystemExit(f"--data {arguments.data}: {in_one_line(problem)}") from None
        files = prepare(source, arguments.images, arguments.batch, arguments.seed, Path(folder))
        measure(record, files, arguments.providers, arguments.rounds)
        if arguments.workers:
            measure_workers(record, files, arguments.workers, arguments.rounds)
    record.show()
    return record.rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_loading", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data",
        default=str(FLOWERS / "train"),
        metavar="SOURCE",
        help="what crate-mae's --data may name; by default the shipped photographs, which are so small that they are enlarged",
    )
    parser.add_argument("--images", type=positive, default=256, help="at most so many of it")
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--rounds", type=positive, default=15, help="over all images by each loader, in turns")
    parser.add_argument("--workers", type=positive, help="measure the loader with so many processes, too")
    parser.add_argument(
        "--providers", nargs="+", choices=PROVIDERS, metavar="NAME", default=PROVIDERS, help=", ".join(PROVIDERS)
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="append the rows to this file")
    return parser


if __name__ == "__main__":
    main()
