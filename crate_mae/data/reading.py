"""Image files to pixels: any mode and depth that Pillow opens, upright, decoded at no larger scale than a crop needs.

Results have 8 bits a channel; `pixels` says how deeper and transparent pixels are converted.
"""

from __future__ import annotations

import errno
import functools
import io
import math
import os
import re
import stat
import struct
import warnings
from typing import BinaryIO

import PIL
import torch
from PIL import Image, ImageFile

from crate_mae.data.pixels import COLOUR_MODES, PlaceInPixels, as_shown, as_stored, in_eight_bits, in_mode, upright
from crate_mae.data.source import UnreadableImage
from crate_mae.data.transforms import Box, Size

# Pillow knows more formats, which are left out: those that it gives to another program (.eps, .ps, .wmf, .emf) or to a missing
# library (.bufr, .grib, .hdf, .h5, .mpg), .pdf, which it only writes, films (.fli, .flc), cursors and icons (.cur, .icns), game
# textures (.dds, .blp, .ftc, .gbr), measurements (.fits, .im), and suffixes that often mean raw pixels (.rgb, .bw).
# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg",
    ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".ras",
    ".sgi", ".tga", ".tif", ".tiff", ".webp", ".xbm", ".xpm",
})
# fmt: on
"""Lower-case suffixes of the still images that Pillow opens by itself."""

_BY_OTHER_PROGRAMS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

_IN_MEMORY = 64 * 2**20
"""Files of at most so many bytes are read at once: that is faster, and no descriptor stays open with the image."""

_TOLD_BY_THEIR_HEADERS = ("JPEG", "MPO")
"""Formats whose header has the size and orientation; they are decoded later, at the scale that a part needs."""

_NOT_THE_FILES_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_CAUSES_OF_ERRORS = {
    errno.ENOENT: "vanished",
    errno.ENOTDIR: "vanished",
    errno.ELOOP: "vanished",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.ENXIO: "no file",  # a socket
    errno.EISDIR: "no file",
}
_CUT_SHORT = re.compile(
    "truncat|end of (file|data|image)|EOF|requires a buffer|not enough|not large enough", re.IGNORECASE
)

_ORIENTATION = 0x0112  # a tag of EXIF

# These files are read all the same; from twice as many pixels on, Pillow raises an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings(
    "ignore", "(Possibly c|C)orrupt EXIF|Truncated File Read|Tag data larger|Metadata Warning", UserWarning
)
with warnings.catch_warnings():  # PyTorch warns once a process that bytes are read-only; nothing here writes to them
    warnings.simplefilter("ignore")
    torch.frombuffer(b"0", dtype=torch.uint8)


def open_file(path: str | bytes | os.PathLike[str], name: object = "") -> Image.Image:
    """The image in a regular file; a pipe, a device or a folder is an error at once.

    Args:
        path: of the file.
        name: what messages call it; the path by default.

    Raises:
        UnreadableImage: as of `open_image`; or there is no such file, or it cannot be read.
        OSError, MemoryError: this process has too many files open, or too little memory.
    """
    name = name or os.fsdecode(path)
    flags = (getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    with errors_named(name):
        descriptor = os.open(path, sum(flags, os.O_RDONLY))
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                folder = stat.S_ISDIR(about.st_mode)
                raise UnreadableImage(name, "no file", "Is a directory" if folder else "not a regular file")
            if about.st_size <= _IN_MEMORY:
                with open(descriptor, "rb", closefd=False) as file:
                    return open_image(file.read(), name)
            file = open(os.dup(descriptor), "rb")  # noqa: SIM115
            try:
                return open_image(file, name)  # which closes it when nobody has it any more
            except BaseException:
                file.close()
                raise
        finally:
            os.close(descriptor)


def open_image(file: BinaryIO | bytes, name: object) -> Image.Image:
    """The image in a file or its bytes: only its header is read, its pixels when they are needed.

    Args:
        file: a seekable file, which must stay open as long as the image.
        name: what messages call it.

    Raises:
        UnreadableImage: it is no image, or its header is not whole, or it claims too many pixels.
        OSError, MemoryError: this process has too many files open, or too little memory.
    """
    with errors_named(name):
        if isinstance(file, bytes):
            file = io.BytesIO(file)
        try:
            return Image.open(file, formats=_formats())
        except Exception as error:
            if _is_not_the_files_fault(error):
                raise
            raise _objection(file, name, error) from error


def shown_size(image: Image.Image, name: object) -> tuple[int, int]:
    """(width, height) of the image when it is upright.

    For a JPEG the header is enough. Other formats are decoded first: a PNG may have its orientation after its pixels, a TIFF or
    an icon another size than in its header. For the number of pixels alone, `image.size` is enough.

    Raises:
        UnreadableImage: of this name; its pixels cannot be decoded.
        OSError, MemoryError: as of `open_image`.
    """
    if image.format not in _TOLD_BY_THEIR_HEADERS:
        with errors_named(name):
            _decode(image)
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def whole(image: Image.Image, channels: int, name: object) -> Image.Image:
    """All of the image: upright, in 8 bits, in mode L, RGB or RGBA for 1, 3 or 4 channels.

    Args:
        image: of any mode; it is decoded, if it was not, and else left as it is.
        channels: 1, 3 or 4.
        name: what messages call it.

    Raises:
        UnreadableImage: its pixels cannot be decoded.
        OSError, MemoryError: as of `open_image`.
    """
    mode = _mode_of(channels)
    with errors_named(name):
        _decode(image)
        pixels = upright(in_mode(in_eight_bits(image), mode), _orientation(image))
        pixels = pixels.copy() if pixels is image else pixels
        pixels.info = {}  # it is upright now, and its EXIF would have it turned again
        return pixels


def part(
    image: Image.Image, box: Box, size: Size, channels: int, name: object, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """A part of the upright image, resized with bicubic interpolation as if it were an image of its own.

    A JPEG that is not decoded yet is decoded at 1/2, 1/4 or 1/8 of its scale, as long as the part keeps at least twice the wanted
    pixels on both sides; with fewer the result would visibly differ. With 4 channels colours are weighted by their opacity, so
    that colours of transparent pixels do not bleed.

    Args:
        image: of any mode; it may be asked for further parts.
        box: (left, top, right, bottom) in pixels of the upright image (`shown_size`).
        size: (height, width) of the result.
        channels: 1, 3 or 4.
        name: what messages call it.
        out: a tensor for the result; channels last is faster.

    Returns:
        uint8 [channels, height, width]; without `out` channels last in memory.

    Raises:
        UnreadableImage: its pixels cannot be decoded.
        ValueError: the box is empty, or not within the image.
        OSError, MemoryError: as of `open_image`.
    """
    mode, (width, height) = _mode_of(channels), shown_size(image, name)
    if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        raise ValueError(f"box: expected a part of an image of {width} x {height} pixels, got {tuple(box)}")
    if out is None:
        out = torch.empty(*size, channels, dtype=torch.uint8).permute(2, 0, 1)
    with errors_named(name):
        scale, image = _at_reduced_scale(image, box, size)
        _decode(image)
        orientation = _orientation(image)
        left, top, right, bottom = (side / scale for side in as_stored(box, (width, height), orientation))
        x, y = math.floor(left), math.floor(top)
        pixels = in_eight_bits(image).crop((x, y, math.ceil(right), math.ceil(bottom)))
        pixels = upright(in_mode(pixels, mode), orientation)
    if scale == 1:
        return _resized(pixels, size, out)
    return _resized(pixels, size, out, as_shown((left - x, top - y, right - x, bottom - y), pixels.size, orientation))


def _resized(pixels: Image.Image, size: Size, out: torch.Tensor, box: PlaceInPixels | None = None) -> torch.Tensor:
    """Resize by PyTorch, three times as fast as Pillow with the same filter; only Pillow handles opacity and fractional boxes."""
    if pixels.mode == "RGBA" or box is not None:
        pixels = pixels.resize(size[::-1], Image.Resampling.BICUBIC, box=box)
    (width, height), channels = pixels.size, len(out)
    values = torch.frombuffer(pixels.tobytes(), dtype=torch.uint8)  # not copied again, as np.array would
    values = values.as_strided((1, channels, height, width), (0, 1, width * channels, channels))
    if (height, width) == size:
        out.copy_(values[0])
    else:  # what `interpolate` calls, with the result in given memory
        torch.ops.aten._upsample_bicubic2d_aa.out(values, list(size), False, None, None, out=out[None])
    return out


def _at_reduced_scale(image: Image.Image, box: Box, size: Size) -> tuple[int, Image.Image]:
    """(s, an image of 1/s of the scale). Where s > 1 it is a new image, as `draft` changes the one that it is called on."""
    if image.format not in _TOLD_BY_THEIR_HEADERS or not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return 1, image
    if image.fp is None:  # closed
        return 1, image
    (height, width), (left, top, right, bottom) = size, box
    fitting = min((right - left) // (2 * width), (bottom - top) // (2 * height))
    if fitting < 2:
        return 1, image
    scale = 8 if fitting >= 8 else 4 if fitting >= 4 else 2
    reduced = Image.open(image.fp, formats=("JPEG",))
    reduced.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))
    return scale, reduced


def _orientation(image: Image.Image) -> int:
    """The image's EXIF orientation, 1 to 8; 1 where it has none, or no valid one."""
    if image.format == "TIFF":  # which Pillow has turned as it decoded it
        return 1
    if image.format in _TOLD_BY_THEIR_HEADERS and not {"exif", "xmp"} & image.info.keys():
        return 1
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception as error:
        if _is_not_the_files_fault(error):
            raise
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decode(image: Image.Image) -> None:
    """Load the pixels, and scale a PNG's transparent value to the depth to which Pillow scales the pixels."""
    clear, tile = image.info.get("transparency"), getattr(image, "tile", None)
    stored_as = tile[0][3] if tile else ""
    image.load()
    if clear is None:
        return
    if stored_as in ("L;2", "L;4"):
        image.info["transparency"] = clear * (85 if stored_as == "L;2" else 17)
    elif stored_as == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _mode_of(channels: int) -> str:
    if channels not in COLOUR_MODES:
        raise ValueError(f"channels: image files give {sorted(COLOUR_MODES)} channels, not {channels}")
    return COLOUR_MODES[channels]


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that Pillow decodes without other programs, JPEG first."""
    Image.init()
    return tuple(sorted(set(Image.ID) - _BY_OTHER_PROGRAMS, key=lambda name: (name != "JPEG", Image.ID.index(name))))


def _is_not_the_files_fault(error: Exception) -> bool:
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in _NOT_THE_FILES_FAULT


class errors_named:
    """A block in which any error of Pillow's decoders for a broken file becomes an UnreadableImage of this name."""

    def __init__(self, name: object) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, UnreadableImage):
            return
        if not _is_not_the_files_fault(error):
            raise UnreadableImage(self._name, _cause(error), _spoken(error)) from error


def _cause(error: BaseException) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "too large"
    if (number := getattr(error, "errno", None)) is not None:
        return _CAUSES_OF_ERRORS.get(number, "read error")
    ended = (EOFError, IndexError, struct.error)
    if isinstance(error, ended) or isinstance(error.__cause__, ended) or _CUT_SHORT.search(str(error)):
        return "truncated"
    return "damaged"


def _spoken(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _objection(file: BinaryIO, name: object, error: Exception) -> UnreadableImage:
    """Why Pillow does not open this file; Pillow itself does not say that of a broken header."""
    size = file.seek(0, io.SEEK_END)
    if not size:
        cause, reason = "empty", "of 0 bytes"
    elif not isinstance(error, PIL.UnidentifiedImageError):
        cause, reason = _cause(error), _spoken(error)
    else:
        cause, reason = "no image", f"in no format that Pillow {PIL.__version__} opens"
        for format in _formats():
            factory, accept = Image.OPEN[format]
            file.seek(0)
            answer = accept and accept(file.read(16))
            if isinstance(answer, str):  # a format that this build of Pillow lacks
                reason = answer
            elif answer:
                try:
                    file.seek(0)
                    factory(file, "")
                except Exception as told:
                    cause, reason = _cause(told), f"{format}: {_spoken(told)}"
                    break
    file.seek(0)
    start = file.read(8)
    if cause == "damaged" and start[:4] == b"RIFF" and int.from_bytes(start[4:], "little") + 8 > size:
        cause = "truncated"  # WebP: its decoder does not tell a reason
    return UnreadableImage(name, cause, reason)
