"""Features of all images of a source, computed and written in chunks that survive an interruption."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crate_mae import __version__
from crate_mae.backbone import Backbone
from crate_mae.checkpoints import load_model
from crate_mae.data import CentreCropped, Normalization, Source, UnreadableImage, in_order, open_source
from crate_mae.data.progress import Progress
from crate_mae.data.unreadable import Unreadable, by_cause
from crate_mae.embedding.chunks import Chunk, Chunks
from crate_mae.embedding.files import Rows, Shape, check_format, write
from crate_mae.evaluation import FeatureSpec, features_of
from crate_mae.evaluation.cache import fingerprint_of
from crate_mae.evaluation.features import none_readable, of_batches, refuse_not_finite
from crate_mae.files import replaced
from crate_mae.preprocessing import read_normalization
from crate_mae.state_dicts import checksum
from crate_mae.training.feed import workers_for
from crate_mae.training.fitting import fit
from crate_mae.training.image_sets import of_option
from crate_mae.training.interrupts import RunStopped, StopRequest, stop_requests
from crate_mae.training.ownership import owned
from crate_mae.training.precision import autocast, choose_device, choose_precision

_CHUNK = 1024
"""Images of a chunk, and the largest batch: an interruption costs at most one chunk."""

_ON_A_CPU = 32
"""The batch size on a CPU, where larger batches are no faster and need more memory."""

_SPEC = FeatureSpec()

_STOPPING = b"\nstopping after this batch; a second Ctrl-C, or signal, ends it at once and keeps finished chunks, too\n"


class Embedded(NamedTuple):
    """The file that was written.

    Attributes:
        path: the file.
        images: how many images it has.
        unreadable: how many images were left out, as they cannot be read.
        width: the width of an image's features.
    """

    path: Path
    images: int
    unreadable: int
    width: int


def embed(
    run: str | Path,
    data: str,
    out: str | Path,
    *,
    spec: FeatureSpec = _SPEC,
    batch_size: int | Literal["auto"] = "auto",
    num_workers: int | Literal["auto"] = "auto",
    device: str = "auto",
    precision: str = "auto",
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Embedded:
    """Write the features of all images of a source, in their order, to a file; ``read_embeddings`` reads it.

    The model sees whole images: the largest centred part of each, resized to its image size. What cannot be read is left out.
    Features are kept in chunks in a folder ``OUT.partial`` until the file is whole: after an interruption the same call goes on
    with the chunks that are lacking, unless weights, images or settings have changed, and the file is the same.

    Args:
        run: folder of a run or of a model.
        data: images, as ``data.open_source`` names them.
        out: a file to write, which ends in .npz or .parquet.
        spec: which features.
        batch_size: images at once, which change time and memory, and values by no more than rounding. "auto": on CUDA the
            largest power of two, up to 1,024, that fits, halved where memory runs out all the same; on a CPU 32.
        num_workers: processes that load images; "auto": one for each core that nothing computes on.
        device, precision: as of training.
        overwrite: a file that is there already is replaced, once the new one is whole.
        say: takes a line for the user.

    Raises:
        OSError: a folder or file is not there, or ``out`` is there already, or cannot be written.
        ValueError: an argument cannot be used; no image can be read, or features are not finite.
        MissingLibrary: an ImportError: one that the images or .parquet need is not installed.
        RunStopped: Ctrl-C, SIGTERM, SIGHUP or SIGUSR1; finished chunks are kept.
        torch.OutOfMemoryError: a batch of the size that was asked for does not fit.
    """
    out = Path(out)
    check_out(out, overwrite)
    made, left_out = embed_with(
        load_model(run),
        read_normalization(run),
        data,
        out,
        spec=spec,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        precision=precision,
        overwrite=overwrite,
        say=say,
    )
    say(in_words(made, left_out))
    return made


def check_out(out: Path, overwrite: bool) -> None:
    """Check the file to write, before anything is computed.

    Raises:
        OSError: it exists and may not be replaced, or it is a folder, or its folder does not exist.
        ValueError: its name does not end in .npz or .parquet.
        MissingLibrary: an ImportError: PyArrow, which .parquet needs, is not installed.
    """
    if out.is_dir():
        raise IsADirectoryError(f"--out {out}: expected the name of a file, and this is a folder")
    with of_option("--out"):
        check_format(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    if out.exists() and not overwrite:
        raise FileExistsError(f"--out {out}: it is there already; name another, or replace it with --overwrite")


def embed_with(
    model: Backbone,
    normalization: Normalization,
    data: str,
    out: Path,
    *,
    spec: FeatureSpec,
    batch_size: int | Literal["auto"],
    num_workers: int | Literal["auto"],
    device: str,
    precision: str,
    overwrite: bool,
    say: Callable[[str], None],
) -> tuple[Embedded, list[Unreadable]]:
    """As ``embed``, with a model in memory, which is moved to the device.

    Returns:
        What was written, and the images that are left out of it.
    """
    check_out(out, overwrite)
    if batch_size != "auto" and not 1 <= batch_size <= _CHUNK:
        raise ValueError(f"--batch_size: expected 1 to {_CHUNK:,}, or auto, got {batch_size}")
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--precision: expected auto, float32 or bfloat16, got {precision!r}")
    place = choose_device(device, "--device")
    chosen = choose_precision(precision, place)
    config = model.config
    spec.layers(len(model.encoder_layers))
    with of_option("--data"):
        source = open_source(data)
    for remark in source.remarks():
        say(remark)
    model.to(place).eval()
    images = CentreCropped(source, config.image_shape, config.in_chans)

    def compute(batch: Tensor) -> Tensor:
        with autocast(chosen, place):
            return features_of(model, batch, spec)

    folder = out.with_name(f"{out.name}.partial")
    try:
        with owned(folder, "--out"), stop_requests(_STOPPING) as stop:
            check_out(out, overwrite)  # again, now that no other process can write it
            # With the kind of device, as each rounds in its own way.
            fingerprint = f"{fingerprint_of(model, images, normalization, spec, chosen)} {place.type}"
            chunks = Chunks(folder, fingerprint, in_order(len(images), _CHUNK))
            size = _batch_size(chunks, compute, images, normalization, place) if batch_size == "auto" else batch_size
            taken = f"{size} image{'s' * (size > 1)} at once{' (auto)' * (batch_size == 'auto')}"
            say(f"embed: {len(images):,} images; {spec.in_words()}, {chosen} on {place}, {taken}")
            if chunks.held:
                say(f"going on: {len(chunks.held):,} of {len(chunks):,} chunks are in {folder} already")
            elif chunks.discarded:
                say(f"what was in {folder} is damaged, or of other weights, images or settings, and is made anew")
            forward = _Forward(compute, size, batch_size == "auto", say)
            batch_bytes = size * config.in_chans * config.image_shape[0] * config.image_shape[1]
            workers = workers_for(num_workers, place, torch.get_num_threads(), batch_bytes)
            batches_of = partial(of_batches, forward, images, normalization, place, num_workers=workers)
            width = spec.width(config.embed_dim)
            _make(chunks, batches_of, forward, source, width, stop, say)
            left_out = chunks.unreadable
            made = Embedded(out, len(images) - len(left_out), len(left_out), width)
            if made.images:
                about = _about(model, normalization, spec, data, chosen, left_out)
                _write(made, chunks, source, about, stop)
            chunks.remove()
    finally:
        with suppress(OSError):  # there is something in it, or it is gone
            folder.rmdir()
    if not made.images:
        raise none_readable(len(images))
    return made, left_out


def in_words(made: Embedded, left_out: list[Unreadable]) -> str:
    """One line about the written file."""
    line = f"{made.images:,} images, {made.width:,} numbers each, in {made.path} ({made.path.stat().st_size / 1e6:,.1f} MB)"
    if left_out:
        line += f"; {len(left_out):,} cannot be read and are left out ({by_cause(left_out)})"
    return line


class _Forward:
    """Computes features of batches; where memory runs out, it halves the batch size, if that is allowed."""

    def __init__(
        self, compute: Callable[[Tensor], Tensor], batch_size: int, may_halve: bool, say: Callable[[str], None]
    ) -> None:
        self.batch_size = batch_size
        self._compute, self._may_halve, self._say = compute, may_halve, say

    def __call__(self, batch: Tensor) -> Tensor:
        while True:
            try:
                return torch.cat([self._compute(part) for part in batch.split(self.batch_size)])
            except torch.OutOfMemoryError:
                if not self._may_halve or self.batch_size == 1:
                    raise
            self.batch_size //= 2
            self._say(f"memory ran out; going on with {self.batch_size} images at once")
            torch.cuda.empty_cache()


def _batch_size(
    chunks: Chunks,
    compute: Callable[[Tensor], Tensor],
    images: CentreCropped,
    normalization: Normalization,
    device: torch.device,
) -> int:
    """The batch size of the chunks on disk, for the same rounding. Without chunks a power of two, at most as large as the images
    need: on a CUDA device the largest that fits, found by trials, on a CPU ``_ON_A_CPU``.

    Raises:
        ValueError: not even one image fits.
    """
    if chunks.held:
        return chunks.held[max(chunks.held)].batch_size
    most = min(_CHUNK, 1 << (len(images) - 1).bit_length())
    if device.type != "cuda":
        return min(_ON_A_CPU, most)
    generator = torch.Generator(device).manual_seed(0)

    def trial(count: int) -> None:
        shape = (count, images.channels, *images.size)
        compute(normalization(torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)))

    try:
        fits = fit(trial, device, most).batch
    except ValueError as error:  # in the words of training
        raise ValueError(f"--device {device}: its memory does not take one image at once") from error
    return 1 << (fits.bit_length() - 1)


def _make(
    chunks: Chunks,
    batches_of: Callable[..., Generator[tuple[Tensor | None, Tensor]]],
    forward: _Forward,
    source: Source,
    width: int,
    stop: StopRequest,
    say: Callable[[str], None],
) -> None:
    """Compute the chunks that are missing.

    Args:
        batches_of: ``of_batches`` of the source's images, by ``forward``.

    Raises:
        RunStopped: it was asked for.
        ValueError: a feature is not finite.
    """
    size, met = forward.batch_size, list[UnreadableImage]()
    batches = {
        number: [images[first : first + size] for first in range(0, len(images), size)]
        for number, images in enumerate(chunks.images)
        if number not in chunks.held
    }
    in_a_row = [batch for of_chunk in batches.values() for batch in of_chunk]
    made = batches_of(in_a_row, unreadable=met.extend)
    with Progress(len(source), "embed", say) as progress, closing(made):
        progress.update(sum(len(chunks.images[number]) for number in chunks.held), done_before=True)
        for number, of_chunk in batches.items():
            found, numbers = [torch.empty(0, width)], [torch.empty(0, dtype=torch.int64)]
            for batch in of_chunk:
                _stop_if_asked(stop, chunks)
                features, indices = next(made)
                if features is not None:
                    refuse_not_finite(features, indices, source)
                    found.append(features)
                    numbers.append(indices)
                progress.update(len(batch))
            indices = torch.cat(numbers)
            names = [source.name(index) for index in indices.tolist()]
            unreadable = [Unreadable.of(error) for error in met]
            met.clear()
            chunks.write(number, Chunk(torch.cat(found), indices, names, unreadable, forward.batch_size))


def _write(made: Embedded, chunks: Chunks, source: Source, about: dict[str, Any], stop: StopRequest) -> None:
    """Write the file, with one chunk at a time in memory.

    Raises:
        RunStopped: it was asked for.
        OSError: it cannot be written; or a chunk is damaged that was whole before.
    """
    classes = list(source.classes)
    labels = source.labels if classes != [""] else None
    longest = max(chunk.longest_name for chunk in chunks.held.values())
    shape = Shape(made.images, made.width, longest, None if labels is None else classes, about)

    def rows() -> Iterator[Rows]:
        for number in range(len(chunks)):
            _stop_if_asked(stop, chunks)
            if (chunk := chunks.read(number)) is None:
                raise OSError(f"a chunk in {chunks.folder} is damaged or gone; the same command makes it again")
            of_rows = None if labels is None else labels[chunk.indices.numpy()].astype(np.int64)
            yield Rows(chunk.features.numpy(), chunk.names, of_rows)

    with replaced(made.path) as file:
        write(file, made.path, shape, rows)


def _stop_if_asked(stop: StopRequest, chunks: Chunks) -> None:
    if stop.signal is not None:
        kept = f"{len(chunks.held):,} of {len(chunks):,} chunks are kept in {chunks.folder}"
        raise RunStopped(f"stopped; {kept}" if chunks.held else "stopped before anything was kept", stop.signal)


def _about(
    model: Backbone,
    normalization: Normalization,
    spec: FeatureSpec,
    data: str,
    precision: str,
    left_out: list[Unreadable],
) -> dict[str, Any]:
    return {
        "model": {"kind": type(model).__name__, **dataclasses.asdict(model.config)},
        "weights": checksum(model.state_dict()),
        "images": {"mean": normalization.mean.flatten().tolist(), "std": normalization.std.flatten().tolist()},
        "features": spec.in_words(),
        "spec": dataclasses.asdict(spec),
        "data": str(data),
        "left_out": dict(Counter(image.cause for image in left_out).most_common()),
        "precision": precision,
        "versions": {"crate_mae": __version__, "torch": torch.__version__},
    }
