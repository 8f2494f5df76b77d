"""Files of every kind that a data set may hold, made here: legal ones with what must come out, and bad ones with the cause.

`EXOTIC` and `BAD_BYTES` are bytes by file name, for folders, shards and packing alike; the bad ones that are no bytes (a folder,
a pipe, a link to nothing) are made by `write_bad_files`.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, features

WIDTH, HEIGHT = 14, 10

EXOTIC: dict[str, bytes] = {}
"""Legal images, by name."""

EXPECTED: dict[str, np.ndarray] = {}
"""uint8 [height, width, 3]: the RGB pixels that must come out of each of `EXOTIC`, over white where it is transparent."""

TOLERANCE: dict[str, int] = {}
"""Grey levels that may be missed, of formats that lose some, or that round otherwise; 0 where there is none."""

BAD_BYTES: dict[str, tuple[bytes, str]] = {}
"""(content, cause) of files that are no readable image, by name."""


def write_exotic(folder: Path) -> dict[str, np.ndarray]:
    """Write all of `EXOTIC`; returns `EXPECTED`."""
    for name, content in EXOTIC.items():
        (folder / name).write_bytes(content)
    return EXPECTED


def write_bad(folder: Path) -> dict[str, str]:
    """Write all of `BAD_BYTES`; returns the causes by name."""
    for name, (content, _) in BAD_BYTES.items():
        (folder / name).write_bytes(content)
    return {name: cause for name, (_, cause) in BAD_BYTES.items()}


def write_bad_files(folder: Path) -> dict[str, str]:
    """Make what only a file system has; returns the causes by name; "secret.png" is left out for who may read it."""
    (folder / "folder.png").mkdir()
    causes = {"folder.png": "no file"}
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.jpg")
        (folder / "dangling.png").symlink_to("nowhere.png")
        (folder / "loop.png").symlink_to("loop.png")
        (folder / "device.png").symlink_to("/dev/zero")
        causes |= {"pipe.jpg": "no file", "dangling.png": "vanished", "loop.png": "vanished", "device.png": "no file"}
        secret = folder / "secret.png"
        secret.write_bytes(EXOTIC["rgb.png"])
        secret.chmod(0)
        if os.access(secret, os.R_OK):  # as root
            secret.unlink()
        else:
            causes["secret.png"] = "no permission"
    return causes


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(pixels: np.ndarray, depth: int, colour: int, *, chunks: bytes = b"") -> bytes:
    """A PNG of these values, [height, width] or [height, width, channels], at a depth that Pillow does not write."""
    height, width = pixels.shape[:2]
    flat = pixels.reshape(height, -1)
    if depth < 8:
        bits = (flat[..., None] >> np.arange(depth)[::-1]) & 1
        rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    else:
        rows = flat.astype(f">u{depth // 8}").view(np.uint8).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [chunk(b"IHDR", header), chunks, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def tiff(tags: dict[int, tuple[str, Any]], data: bytes = b"", order: str = "<") -> bytes:
    """A TIFF of one strip, or the content of EXIF: tags by number, as (a letter of struct, values); "s" is text.

    The tags of the strip, 273 and 279, are added where there is data.
    """
    size_of_directory = 2 + 12 * (len(tags) + 2 * bool(data)) + 4
    extra, places = b"", 8 + size_of_directory
    if data:
        extra = data + b"\0" * (len(data) % 2)
        tags = {**tags, 273: ("L", places), 279: ("L", len(data))}
    entries = b""
    types = {"s": 2, "H": 3, "L": 4, "f": 11}
    for tag, (letter, values) in sorted(tags.items()):
        values = values if isinstance(values, tuple) else (values,)
        packed = values[0] if letter == "s" else struct.pack(f"{order}{len(values)}{letter}", *values)
        count = len(packed) if letter == "s" else len(values)
        if len(packed) > 4:
            extra, packed = extra + packed + b"\0" * (len(packed) % 2), struct.pack(order + "L", places + len(extra))
        entries += struct.pack(order + "HHL", tag, types[letter], count) + packed.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    count = struct.pack(order + "H", len(tags))
    return magic + struct.pack(order + "L", 8) + count + entries + bytes(4) + extra


def grey_tiff(pixels: np.ndarray, *, bits: int, kind: int = 1, photometric: int = 1, **options: Any) -> bytes:
    """A TIFF of one channel; `kind` is its SampleFormat: 1 unsigned, 2 signed, 3 float."""
    tags = {256: ("H", pixels.shape[1]), 257: ("H", pixels.shape[0]), 258: ("H", bits), 259: ("H", 1)}
    tags |= {262: ("H", photometric), 277: ("H", 1), 278: ("H", pixels.shape[0]), 339: ("H", kind)}
    data = options.pop("data", None) or pixels.tobytes()
    order = ">" if pixels.dtype.byteorder == ">" else "<"
    return tiff({**tags, **options.pop("tags", {})}, data, order)


def odd_exif(orientation: int) -> bytes:
    """EXIF that is read, and cannot be written again: XResolution is a text."""
    return b"Exif\0\0" + tiff({0x0112: ("H", orientation), 0x011A: ("s", b"seventy-two\0")})


def as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels that a camera stores with this EXIF orientation for a picture that is `upright`."""
    turned = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 1, 7: 3, 8: 3}[orientation]  # quarters anti-clockwise
    pixels = np.rot90(upright, turned)
    mirrored = {2: 1, 4: 1, 5: 0, 7: 0}.get(orientation)
    return np.ascontiguousarray(pixels if mirrored is None else np.flip(pixels, mirrored))


def over_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """uint8 pixels, seen over white through alpha in 0 to 255."""
    opacity = alpha[..., None] / 255
    return np.round(pixels * opacity + 255 * (1 - opacity)).astype(np.uint8)


def _three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def _add(name: str, content: bytes, expected: np.ndarray, tolerance: int = 0) -> None:
    EXOTIC[name], EXPECTED[name] = content, expected.astype(np.uint8)
    if tolerance:
        TOLERANCE[name] = tolerance


# What they show: a gradient in each channel, and an alpha of all strengths.
_ROWS, _COLUMNS = np.mgrid[0:HEIGHT, 0:WIDTH]
GREY = (_COLUMNS * 15 + _ROWS * 6).astype(np.uint8)
RGB = np.stack([_COLUMNS * 18, _ROWS * 25, (_COLUMNS + _ROWS) * 11], axis=2).astype(np.uint8)
ALPHA = np.clip(_COLUMNS * 21 - 9, 0, 255).astype(np.uint8)
RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)  # every value of 16 bits
_BLACK_OR_WHITE = (GREY > 100).astype(np.uint8)


def _png_kinds() -> None:
    rgba = np.dstack([RGB, ALPHA])
    _add("rgb.png", saved(Image.fromarray(RGB), "PNG"), RGB)
    _add("bit.png", saved(Image.fromarray(_BLACK_OR_WHITE * 255).convert("1"), "PNG"), _three(_BLACK_OR_WHITE * 255))
    _add("grey.png", saved(Image.fromarray(GREY), "PNG"), _three(GREY))
    _add("rgba.png", saved(Image.fromarray(rgba), "PNG"), over_white(RGB, ALPHA), 1)
    la = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    _add("grey_alpha.png", saved(la, "PNG"), over_white(_three(GREY), ALPHA), 1)
    _add("grey_16.png", png(RAMP, 16, 0), _three(RAMP >> 8))
    _add("rgb_16.png", png(RGB.astype(np.uint16) * 257, 16, 2), RGB)
    _add("rgba_16.png", png(rgba.astype(np.uint16) * 257, 16, 6), over_white(RGB, ALPHA), 1)
    la_16 = np.dstack([GREY, ALPHA]).astype(np.uint16) * 257
    _add("grey_alpha_16.png", png(la_16, 16, 4), over_white(_three(GREY), ALPHA), 1)
    hole = np.equal(GREY, GREY[3, 4])[..., None]
    for depth in (2, 4, 8, 16):  # one grey level is transparent
        levels = (GREY.astype(np.uint16) * 257) >> (16 - depth)
        clear = int(levels[3, 4])
        seen = np.where((levels == clear)[..., None], 255, _three(np.round(levels * (255 / (2**depth - 1)))))
        if depth == 16:
            seen = np.where(hole, 255, _three(GREY))
        _add(f"clear_grey_{depth}.png", png(levels, depth, 0, chunks=chunk(b"tRNS", struct.pack(">H", clear))), seen)
    clear = struct.pack(">3H", *map(int, RGB[3, 4]))
    hole = np.equal(RGB, RGB[3, 4]).all(axis=2, keepdims=True)
    _add("clear_rgb.png", png(RGB, 8, 2, chunks=chunk(b"tRNS", clear)), np.where(hole, 255, RGB))
    clear = struct.pack(">3H", *(int(value) * 257 for value in RGB[3, 4]))
    wide = RGB.astype(np.uint16) * 257
    _add("clear_rgb_16.png", png(wide, 16, 2, chunks=chunk(b"tRNS", clear)), np.where(hole, 255, RGB))

    palette = np.random.default_rng(0).integers(0, 256, (16, 3), dtype=np.uint8)
    index = (GREY >> 4).astype(np.uint8)
    indexed = Image.fromarray(index)
    indexed.putpalette(palette.tobytes())
    _add("palette.png", saved(indexed, "PNG"), palette[index])
    seen = np.where((index == 5)[..., None], 255, palette[index])
    _add("palette_clear.png", saved(indexed, "PNG", transparency=5), seen)
    _add("palette_clear.gif", saved(indexed, "GIF", transparency=5), seen)
    alphas = np.arange(16, dtype=np.uint8) * 17
    seen = over_white(palette[index], alphas[index])
    _add("palette_alpha.png", saved(indexed, "PNG", transparency=alphas.tobytes()), seen, 1)

    for name, size in (("tall.png", (5000, 1)), ("wide.png", (1, 5000))):
        pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
        _add(name, saved(Image.fromarray(pixels), "PNG"), pixels)


def _tiff_kinds() -> None:
    for order in "<>":
        name = {"<": "little", ">": "big"}[order]
        wide = RAMP.astype(order + "u2")
        _add(f"grey_16_{name}.tif", grey_tiff(wide, bits=16), _three(RAMP >> 8))
        values = (GREY.astype(order + "f4") / 255).astype(order + "f4")
        _add(f"float_{name}.tif", grey_tiff(values, bits=32, kind=3), _three(GREY))
    _add("white_is_zero_16.tif", grey_tiff(RAMP.astype("<u2"), bits=16, photometric=0), _three(255 - (RAMP >> 8)))
    twelve = (GREY.astype(np.uint16) * 16 + 7).reshape(-1, 2)  # two values in three bytes
    packed = np.stack([twelve[:, 0] >> 4, (twelve[:, 0] & 15) << 4 | twelve[:, 1] >> 8, twelve[:, 1] & 255], axis=1)
    shape_of = np.empty((HEIGHT, WIDTH), "<u2")
    twelve_bits = grey_tiff(shape_of, bits=12, data=packed.astype(np.uint8).tobytes())
    _add("grey_12.tif", twelve_bits, _three(GREY))
    # Measurements: black is the least and white the most, which their file says, or they themselves.
    spread = np.linspace(-3, 7, WIDTH * HEIGHT, dtype="<f4").reshape(HEIGHT, WIDTH)
    own = np.round((spread.astype(np.float64) + 3) * 25.5)
    _add("measured.tif", grey_tiff(spread, bits=32, kind=3), _three(own), 1)
    above_one = grey_tiff(GREY.astype("<f4") / 170, bits=32, kind=3)
    _add("above_one.tif", above_one, _three(np.round(GREY * (255 / int(GREY.max())))), 1)
    holed, seen = spread.copy(), own.copy()
    holed[2, 2:5], seen[2, 2:5] = [np.nan, np.inf, -np.inf], [0, 255, 0]
    _add("holes.tif", grey_tiff(holed, bits=32, kind=3), _three(seen), 1)
    told = grey_tiff(spread, bits=32, kind=3, tags={340: ("f", -13.0), 341: ("f", 7.0)})
    _add("measured_in_a_range.tif", told, _three(np.round((spread.astype(np.float64) + 13) * 12.75)), 1)
    signed = np.round(spread * 1e6)
    _add("signed_32.tif", grey_tiff(signed.astype("<i4"), bits=32, kind=2), _three(own), 1)
    _add("signed_16.tif", grey_tiff((signed / 1e3).astype("<i2"), bits=16, kind=2), _three(own), 1)
    unsigned = ((signed + 3e6) * 400).astype("<u4")  # the upper half of them are negative where 32 bits have a sign
    _add("unsigned_32.tif", grey_tiff(unsigned, bits=32), _three(own), 1)

    image, rgba = Image.fromarray(RGB), Image.fromarray(np.dstack([RGB, ALPHA]))
    _add("cmyk.tif", saved(image.convert("CMYK"), "TIFF"), RGB)
    if int(PIL.__version__.split(".")[0]) > 12:  # older ones write what they do not read
        _add("ycbcr.tif", saved(image.convert("YCbCr"), "TIFF"), RGB, 3)
    _add("rgbx.tif", saved(image.convert("RGBX"), "TIFF"), RGB)
    _add("rgba_lzw.tif", saved(rgba, "TIFF", compression="tiff_lzw"), over_white(RGB, ALPHA), 1)
    lab = np.dstack([GREY, np.zeros_like(RGB[..., :2])])  # without colour: L* alone, at 255 steps
    lightness = GREY / 2.55
    linear = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    grey = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear) * 255
    if features.check("littlecms2"):
        _add(
            "lab.tif", saved(Image.frombytes("LAB", (WIDTH, HEIGHT), lab.tobytes()), "TIFF"), _three(np.round(grey)), 3
        )
    pages = [Image.fromarray(255 - RGB)]
    _add("pages.tif", saved(image, "TIFF", save_all=True, append_images=pages), RGB)


def _other_kinds() -> None:
    image, rgba = Image.fromarray(RGB), Image.fromarray(np.dstack([RGB, ALPHA]))
    others = [Image.fromarray(255 - RGB)]
    for suffix, format in ((".bmp", "BMP"), (".dib", "DIB"), (".tga", "TGA"), (".pcx", "PCX"), (".sgi", "SGI")):
        _add(f"rgb{suffix}", saved(image, format), RGB)
    _add("rgb.ppm", saved(image, "PPM"), RGB)
    _add("bit.pbm", saved(Image.fromarray(_BLACK_OR_WHITE * 255).convert("1"), "PPM"), _three(_BLACK_OR_WHITE * 255))
    size = f"{WIDTH} {HEIGHT}".encode()
    _add("grey_16.pgm", b"P5\n256 256\n65535\n" + RAMP.astype(">u2").tobytes(), _three(RAMP >> 8))
    ten = (GREY.astype(np.uint16) * 4 + 1).astype(">u2")  # of 0 to 1,023
    _add("grey_10.pgm", b"P5\n" + size + b"\n1023\n" + ten.tobytes(), _three(np.round(ten / 1023 * 65535) // 256))
    floats = (GREY[::-1].astype("<f4") / 255).tobytes()  # from the bottom up
    if ".pfm" in Image.registered_extensions():
        _add("float.pfm", b"Pf\n" + size + b"\n-1.0\n" + floats, _three(GREY))
    sixteen = Image.fromarray(np.tile(RGB, (2, 2, 1))[:16, :16])
    _add("rgb.ico", saved(sixteen, "ICO", sizes=[(16, 16)]), np.asarray(sixteen))

    _add("animated.gif", saved(image.quantize(256), "GIF", save_all=True, append_images=others), RGB)
    _add("animated.apng", saved(image, "PNG", save_all=True, append_images=others), RGB)
    _add("animated.webp", saved(image, "WEBP", lossless=True, save_all=True, append_images=others), RGB)
    _add("rgba.webp", saved(rgba, "WEBP", lossless=True, exact=True), over_white(RGB, ALPHA), 1)
    if features.check("jpg_2000"):
        _add("rgb.jp2", saved(image, "JPEG2000"), RGB)
        wide = Image.fromarray(GREY.astype(np.uint16) * 257)
        _add("grey_16.j2k", saved(wide, "JPEG2000", no_jp2=True), _three(GREY))
    if "avif" in features.modules and features.check("avif"):
        _add("rgb.avif", saved(image, "AVIF", quality=100, subsampling="4:4:4"), RGB, 6)

    best = {"quality": 100, "subsampling": 0}
    _add("rgb.jpg", saved(image, "JPEG", **best), RGB, 4)
    _add("grey.jfif", saved(Image.fromarray(GREY), "JPEG", quality=100), _three(GREY), 4)
    _add("cmyk.jpeg", saved(image.convert("CMYK"), "JPEG", **best), RGB, 6)
    for orientation in (3, 6):
        turned = Image.fromarray(as_stored(RGB, orientation))
        _add(f"turned_{orientation}.jpg", saved(turned, "JPEG", exif=odd_exif(orientation), **best), RGB, 4)
        _add(f"turned_{orientation}.webp", saved(turned, "WEBP", exif=odd_exif(orientation), lossless=True), RGB)
        _add(f"turned_{orientation}.png", saved(turned, "PNG", exif=odd_exif(orientation)[6:]), RGB)
        stored = as_stored(RAMP, orientation).astype("<u2")
        tags = {0x0112: ("H", orientation), 0x011A: ("s", b"seventy-two\0")}
        _add(f"turned_{orientation}.tif", grey_tiff(stored, bits=16, tags=tags), _three(RAMP >> 8))
    _add("turned_9.jpg", saved(image, "JPEG", exif=odd_exif(9), **best), RGB, 4)  # which is no orientation
    _add("broken_exif.jpg", saved(image, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(5), **best), RGB, 4)


def _bad_kinds() -> None:
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    BAD_BYTES["empty.png"] = (b"", "empty")
    BAD_BYTES["text.jpg"] = (b"This is no image, whatever its name says.\n", "no image")
    BAD_BYTES["zeros.png"] = (bytes(5000), "no image")
    whole = {
        "jpg": saved(noise, "JPEG"),
        "png": saved(noise, "PNG"),
        "webp": saved(noise, "WEBP", lossless=True),
        "gif": saved(noise.quantize(256), "GIF"),
        "tif": saved(noise, "TIFF"),
        "bmp": saved(noise, "BMP"),
        "ppm": saved(noise, "PPM"),
    }
    for suffix, content in whole.items():
        for share in (2, 50, 95):
            BAD_BYTES[f"cut_{share}.{suffix}"] = (content[: len(content) * share // 100], "truncated")
    size = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
    BAD_BYTES["bomb.png"] = (bomb, "too large")
    middle = len(whole["png"]) // 2
    flipped = bytes([whole["png"][middle] ^ 255])
    BAD_BYTES["crc.png"] = (whole["png"][:middle] + flipped + whole["png"][middle + 1 :], "damaged")
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(70_000_000), 9))
    BAD_BYTES["text_bomb.png"] = (png(RGB, 8, 2, chunks=text), "damaged")
    tags = {256: ("H", 9), 257: ("H", 9), 258: ("H", 8), 259: ("H", 1), 262: ("H", 1), 277: ("H", 1), 278: ("H", 9)}
    BAD_BYTES["offset.tif"] = (tiff({**tags, 273: ("L", 0xFFFFFF00), 279: ("L", 81)}), "truncated")
    wild = {**tags, 258: ("H", 77), 273: ("L", 8), 279: ("L", 81)}
    BAD_BYTES["depth.tif"] = (tiff(wild), "damaged")


for _kinds in (_png_kinds, _tiff_kinds, _other_kinds, _bad_kinds):
    _kinds()
