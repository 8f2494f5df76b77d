"""Image files to pixels: every kind of file, orientations, parts, reduced scale, and what is no image."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin

pytest.importorskip("hypothesis")  # lacking where nothing can be installed, as on some GPU machines

from fuzzing import fuzzed, spoilt
from hypothesis import given
from hypothesis import strategies as st
from images_of_all_kinds import (
    BAD_BYTES,
    EXOTIC,
    EXPECTED,
    RGB,
    TOLERANCE,
    as_stored,
    grey_tiff,
    odd_exif,
    saved,
    write_bad,
    write_bad_files,
    write_exotic,
)
from limits import no_hang

from crate_mae.data import FLOWERS, reading
from crate_mae.data.reading import COLOUR_MODES, open_file, open_image, part, shown_size, whole
from crate_mae.data.source import CAUSES, UnreadableImage

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:PIL"
)  # pytest replaces the filters that are set in `reading`


def cut_and_resized(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """[height, width, channels], as Pillow makes it of an upright image."""
    pixels = image.crop(box).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(pixels).reshape(*size, -1)


def distance(found: torch.Tensor, expected: np.ndarray) -> int:
    """The most grey levels between uint8 [channels, height, width] and [height, width, channels]."""
    assert found.dtype == torch.uint8
    assert found.shape == (expected.shape[2], *expected.shape[:2])
    return int(np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected.astype(int)).max())


class TestEveryKind:
    @pytest.mark.parametrize("name", EXOTIC)
    def test_comes_out_right(self, name):
        image = open_image(EXOTIC[name], name)
        expected = EXPECTED[name]
        assert shown_size(image, name) == expected.shape[1::-1], "before it is decoded"
        found = whole(image, 3, name)
        assert shown_size(image, name) == found.size == expected.shape[1::-1], "and after"
        assert np.abs(np.asarray(found).astype(int) - expected).max() <= TOLERANCE.get(name, 0)
        assert whole(found, 3, name) == found, "which is not turned again"

    @pytest.mark.parametrize("channels", COLOUR_MODES)
    @pytest.mark.parametrize("name", EXOTIC)
    def test_a_part_is_what_pillow_makes_of_the_whole(self, name, channels):
        """For a second part of one image, too."""
        upright = whole(open_image(EXOTIC[name], name), channels, name)
        assert upright.mode == COLOUR_MODES[channels]
        width, height = upright.size
        image = open_image(EXOTIC[name], name)
        for box in [(0, 0, width, height), (width // 3, height // 4, width // 3 * 2 + 1, height)]:
            for size in [(9, 7), (box[3] - box[1], box[2] - box[0])]:
                found = part(image, box, size, channels, name)
                assert distance(found, cut_and_resized(upright, box, size)) <= 1
                assert torch.equal(found, part(upright, box, size, channels, name)), "whether it is kept decoded or not"

    def test_files_are_read_as_bytes_are(self, tmp_path):
        for name, expected in write_exotic(tmp_path).items():
            found = whole(open_file(tmp_path / name), 3, name)
            assert np.abs(np.asarray(found).astype(int) - expected).max() <= TOLERANCE.get(name, 0)

    @pytest.mark.parametrize("channels", [0, 2, 5])
    def test_channels_that_images_do_not_have(self, channels):
        image = Image.fromarray(RGB)
        with pytest.raises(ValueError, match=f"channels: .*not {channels}"):
            whole(image, channels, "")
        with pytest.raises(ValueError, match=f"channels: .*not {channels}"):
            part(image, (0, 0, 1, 1), (1, 1), channels, "")

    @pytest.mark.parametrize("box", [(0, 0, 15, 1), (-1, 0, 3, 3), (3, 3, 3, 4), (0, 5, 1, 2)])
    def test_a_box_lies_within_the_image(self, box):
        with pytest.raises(ValueError, match="box: expected a part of an image of 14 x 10 pixels"):
            part(Image.fromarray(RGB), box, (4, 4), 3, "")

    def test_the_image_given_stays_as_it_is(self):
        image = Image.fromarray(RGB)
        whole(image, 3, "").paste(0, (0, 0, 14, 10))
        part(image, (0, 0, 14, 10), (10, 14), 3, "").zero_()
        assert np.array_equal(np.asarray(image), RGB)


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
    def test_parts_are_of_the_upright_image(self, format, orientation):
        """JPEGs at reduced scale."""
        scale = 16 if format == "JPEG" else 1
        upright = np.asarray(Image.fromarray(RGB).resize((14 * scale, 10 * scale), Image.Resampling.BICUBIC))
        stored = Image.fromarray(as_stored(upright, orientation))
        if format == "TIFF":
            upright = upright[..., :1]
            content = grey_tiff(as_stored(upright[..., 0], orientation), bits=8, tags={0x0112: ("H", orientation)})
        else:
            exif = odd_exif(orientation)
            options = dict(quality=100, subsampling=0) if format == "JPEG" else dict(lossless=True)
            content = saved(stored, format, exif=exif[6:] if format == "PNG" else exif, **options)
        image = open_image(content, "")
        assert shown_size(image, "") == (14 * scale, 10 * scale)
        box = (2 * scale, scale, 12 * scale, 5 * scale)
        found = part(image, box, (4, 10), upright.shape[2], "")
        expected = Image.fromarray(upright.squeeze()).crop(box).resize((10, 4), Image.Resampling.BICUBIC)
        assert distance(found, np.asarray(expected).reshape(4, 10, -1)) <= (6 if format == "JPEG" else 1)
        assert whole(image, 3, "").size == (14 * scale, 10 * scale)


class TestTransparency:
    def test_what_lies_under_transparent_pixels_does_not_bleed(self):
        pixels = np.zeros((8, 8, 4), dtype=np.uint8)
        pixels[:, :4] = (0, 0, 255, 255)
        pixels[:, 4:] = (255, 0, 0, 0)
        image = Image.fromarray(pixels)
        kept = part(image, (0, 0, 8, 8), (5, 5), 4, "")
        assert kept[0].max() == 0 and kept[3, :, 0].min() == 255 and kept[3, :, 4].max() == 0
        assert 0 < kept[3, 0, 2] < 255, "half of it lies in either"
        seen = part(image, (0, 0, 8, 8), (5, 5), 3, "")
        assert (seen[0] == seen[1]).all(), "white over blue has no red of its own"
        assert seen[:, 0, 4].tolist() == [255, 255, 255]


@pytest.fixture
def large() -> bytes:
    """A photograph of 600 x 450 pixels as JPEG, with the edges and textures that it has at 256."""
    photograph = Image.open(sorted(FLOWERS.rglob("*.jpg"))[0])
    return saved(photograph.resize((603, 451), Image.Resampling.BICUBIC), "JPEG", quality=95)


class TestReducedScale:
    @pytest.mark.parametrize(
        ("box", "size", "scale"),
        [
            ((0, 0, 603, 451), (112, 112), 2),
            ((1, 3, 450, 450), (55, 55), 4),  # sides that no scale divides
            ((3, 1, 600, 449), (28, 28), 8),
            ((0, 0, 603, 451), (113, 113), 1),  # 452 pixels are lacking
            ((100, 50, 323, 300), (63, 28), 1),
            ((7, 7, 231, 231), (56, 56), 2),
        ],
    )
    def test_is_near_the_full_one(self, large, monkeypatch, box, size, scale):
        asked = []
        draft = JpegImagePlugin.JpegImageFile.draft
        monkeypatch.setattr(
            JpegImagePlugin.JpegImageFile, "draft", lambda image, *how: asked.append(draft(image, *how))
        )
        image = open_image(large, "")
        found = part(image, box, size, 3, "")
        assert [603 / whole_of[2] for _, whole_of in asked] == ([scale] if scale > 1 else [])
        assert torch.equal(part(image, box, size, 3, ""), found), "the image is as it was"
        upright = whole(image, 3, "")
        assert upright.size == (603, 451)
        found, full = found.permute(1, 2, 0).numpy(), cut_and_resized(upright, box, size)
        difference = found.astype(float) - full
        if scale == 1:
            assert np.abs(difference).max() <= 1
        # A shift of a quarter of a pixel, or another gain, would be more.
        assert np.sqrt(np.mean(difference**2)) < 1.5 and abs(difference.mean()) < 0.25
        # Both are to show the mean of the pixels below each; either is about as far from it.
        area = np.asarray(upright.crop(box).resize(size[::-1], Image.Resampling.BOX)).astype(float)
        errors = [np.sqrt(np.mean((pixels - area) ** 2)) for pixels in (found, full)]
        assert errors[0] < 1.1 * errors[1]


class TestUnreadable:
    @pytest.mark.parametrize("name", BAD_BYTES)
    def test_bytes_tell_their_cause(self, name):
        content, cause = BAD_BYTES[name]
        for ask in (lambda image: whole(image, 3, name), lambda image: part(image, (0, 0, 9, 9), (4, 4), 3, name)):
            with pytest.raises(UnreadableImage) as raised:
                ask(open_image(content, name))
            assert (raised.value.name, raised.value.cause) == (name, cause) and cause in CAUSES
            assert "0x" not in str(raised.value), "the place in memory tells nobody anything"
            again = pickle.loads(pickle.dumps(raised.value))
            assert str(again) == str(raised.value) and "\n" not in str(again)

    def test_files_tell_their_cause(self, tmp_path):
        causes = {**write_bad(tmp_path), **write_bad_files(tmp_path)}
        causes["nowhere.png"] = causes["rgb.png/under_a_file.png"] = "vanished"
        (tmp_path / "rgb.png").write_bytes(EXOTIC["rgb.png"])
        found = {}
        for name in causes:
            with pytest.raises(UnreadableImage, match=name) as raised:
                whole(open_file(tmp_path / name), 3, str(tmp_path / name))
            found[name] = raised.value.cause
        assert found == causes

    @pytest.mark.parametrize(
        ("number", "cause"), [("EIO", "read error"), ("ESTALE", "read error"), ("EACCES", "no permission")]
    )
    def test_errors_of_the_file_are_its_own(self, monkeypatch, number, cause):
        def failing(*arguments, **options):
            raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

        monkeypatch.setattr(os, "open", failing)
        with pytest.raises(UnreadableImage) as raised:
            open_file("a.png", "shard.tar/a.png")
        assert (raised.value.name, raised.value.cause) == ("shard.tar/a.png", cause)

    @pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
    def test_what_this_process_lacks_is_not_the_files_fault(self, monkeypatch, tmp_path, error):
        def failing(*arguments, **options):
            raise error

        image = open_image(EXOTIC["rgb.png"], "")
        monkeypatch.setattr(os, "open", failing)
        with pytest.raises(type(error)):
            open_file(tmp_path / "a.png")
        monkeypatch.setattr(Image, "open", failing)
        with pytest.raises(type(error)):
            open_image(EXOTIC["rgb.png"], "")
        monkeypatch.setattr(image, "load", failing)
        with pytest.raises(type(error)):
            whole(image, 3, "")

    def test_other_programs_are_not_started(self):
        with pytest.raises(UnreadableImage) as raised:
            open_image(saved(Image.fromarray(RGB), "EPS"), "")
        assert raised.value.cause == "no image"

    @fuzzed
    @given(data=st.data())
    def test_spoilt_files_are_images_or_unreadable(self, data):
        name = data.draw(st.sampled_from(sorted(EXOTIC)))
        content = data.draw(spoilt(EXOTIC[name]))
        channels = data.draw(st.sampled_from(sorted(COLOUR_MODES)))
        with no_hang():
            try:
                image = open_image(content, name)
                width, height = shown_size(image, name)
                found = part(image, (width // 3, height // 3, width, height), (5, 6), channels, name)
                assert found.shape == (channels, 5, 6)
                assert whole(image, channels, name).size == (width, height)
            except UnreadableImage as error:
                assert error.name == name and error.cause in CAUSES


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted where Linux lists them")
@pytest.mark.parametrize("in_memory", [0, 2**20])
def test_no_descriptor_stays_open(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(reading, "_IN_MEMORY", in_memory)
    expected = write_exotic(tmp_path)
    bad = {**write_bad(tmp_path), **write_bad_files(tmp_path)}
    before = len(os.listdir("/proc/self/fd"))
    kept = [open_file(tmp_path / name) for name in expected]
    assert in_memory == 0 or len(os.listdir("/proc/self/fd")) == before
    for name, image in zip(expected, kept, strict=True):
        found = np.asarray(whole(pickle.loads(pickle.dumps(image)) if image.mode == "RGB" else image, 3, name))
        assert found.size == expected[name].size
    for name in bad:
        with pytest.raises(UnreadableImage):
            whole(open_file(tmp_path / name), 3, name)
    del kept, image
    assert len(os.listdir("/proc/self/fd")) == before


def test_large_images_are_read_without_a_warning():
    """In a process of its own, as pytest has its own idea of warnings."""
    large = saved(Image.new("L", (12, 12)), "PNG")
    program = (
        "import sys, warnings; from PIL import Image; Image.MAX_IMAGE_PIXELS = 100; warnings.simplefilter('error', UserWarning); "
        "warnings.simplefilter('error', Image.DecompressionBombWarning); from crate_mae.data import reading; "
        "print(reading.part(reading.open_image(sys.stdin.buffer.read(), ''), (0, 0, 12, 12), (3, 3), 1, '').sum().item())"
    )
    ended = subprocess.run([sys.executable, "-c", program], input=large, capture_output=True, check=False)
    assert ended.stdout == b"0\n" and not ended.stderr
