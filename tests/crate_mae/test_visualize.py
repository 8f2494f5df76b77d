"""What goes on inside a model, as pictures: `crate-mae visualize`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from tiny_runs import TINY

pytest.importorskip("jsonargparse")  # lacking where nothing can be installed, as on some GPU machines

import crate_mae
from crate_mae import visualizing
from crate_mae.analysis import ImageView, PrincipalComponents, most_attended, view
from crate_mae.cli import main, visualize
from crate_mae.data import Normalization
from crate_mae.model import CrateMAE
from crate_mae.pictures import inside, reconstruct
from crate_mae.pictures.colours import distinct
from crate_mae.pictures.sheet import cell_size, wrapped
from crate_mae.visualizing import place_of_layer

MODEL = dataclasses.replace(TINY, depth=2, norm_pix_loss=True)
NORMALIZATION = Normalization([0.5] * 3, [0.5] * 3, 3)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    crate_mae.save_model(CrateMAE(MODEL), tmp_path / "run", mean=[0.5] * 3, std=[0.5] * 3)
    return tmp_path / "run"


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What each page was asked to show."""
    asked: list[dict] = []
    made = visualizing.page

    def page(views, names, reconstructions, **options):
        asked.append(dict(views=views, names=names, reconstructions=reconstructions, **options))
        return made(views, names, reconstructions, **options)

    monkeypatch.setattr(visualizing, "page", page)
    return asked


def photograph(height: int, width: int) -> Image.Image:
    corners = np.random.default_rng(0).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """A wide one, a tall grey one, a transparent one, and the wide one as a camera held upright stores it."""
    folder = tmp_path / "images"
    folder.mkdir()
    wide = photograph(90, 150)
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent = photograph(20, 20)
    transparent.putalpha(Image.linear_gradient("L").resize((20, 20)))
    wide.save(folder / "a.png")
    photograph(100, 41).convert("L").save(folder / "b.png")
    transparent.save(folder / "c.png")
    wide.transpose(Image.Transpose.ROTATE_90).save(folder / "d.png", exif=exif)
    return sorted(folder.iterdir())


def seen(model: CrateMAE, height: int = 32, width: int = 48) -> ImageView:
    pixels = torch.from_numpy(np.array(photograph(height, width))).permute(2, 0, 1)
    return view(model, [pixels], NORMALIZATION)[0]


def test_the_overlay_is_brightest_at_the_patch_attended_to_most():
    attention = torch.full((4, 6), 0.01)
    attention[2, 5] = 0.3
    picture = inside.overlay(torch.full((3, 32, 48), 60, dtype=torch.uint8), attention, (32, 48))
    brightness = np.asarray(picture).astype(int).sum(-1)
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert (row // 8, column // 8) == (2, 5)
    assert np.ptp(brightness[:, :24]) < 15 < np.ptp(brightness)


@pytest.mark.parametrize("patch", [None, (1, 4)])
def test_regions_drawn_are_the_patches_attended_to_most(monkeypatch, patch):
    drawn = []

    def region(pixels, mask, colour, size):
        picture = draw(pixels, mask, colour, size)
        middles = np.asarray(picture.resize((48, 32), Image.Resampling.BOX)).astype(int)[4::8, 4::8]
        drawn.append(np.ptp(middles, axis=-1) > 0)  # what is not in the region is grey
        return picture

    draw = inside.region
    monkeypatch.setattr(inside, "region", region)
    image = seen(CrateMAE(MODEL))
    inside.segmentation_picture([image], ["a"], 1, inside.Query(patch), 0.3, "")
    token = 0 if patch is None else 1 + 1 * 6 + 4
    expected = most_attended(image.layers[1].attention[:, token, 1:], 0.3).view(-1, 4, 6)
    assert np.array_equal(np.stack(drawn), expected.numpy())


@pytest.mark.parametrize(
    ("grid", "patch"), [((4, 5), (1, 3)), ((40, 100), (39, 99)), ((1, 500), (0, 250)), ((500, 1), (0, 0))]
)
def test_the_frame_is_on_the_patch(grid, patch):
    """Of patches that are smaller than a frame around their middle; a strip is broad enough to be seen."""
    height, width = cell_size((8 * grid[0], 8 * grid[1]))
    panel = Image.new("RGB", (width, height), "blue")
    changed = (np.asarray(inside.Query(patch).marked(panel, grid)) != (0, 0, 255)).any(-1)
    for axis, place, count, side in zip((1, 0), patch, grid, (height, width), strict=True):
        found = np.flatnonzero(changed.any(axis))
        middle, length = (place + 0.5) * side / count, max(12, side / count)
        assert side >= 16 and abs(np.ptp(found) + 1 - length) <= 1
        assert found[0] <= middle <= found[-1] + 1


def test_rounding_is_not_drawn_as_differences(monkeypatch):
    """Where both ends of a scale read the same, all patches have one colour."""
    drawn = []
    monkeypatch.setattr(inside, "sheet", lambda title, lines, columns, rows, **options: drawn.extend(rows))
    image = seen(CrateMAE(MODEL))
    noise = torch.linspace(0, 1e-6, 24).view(4, 6)
    layers = [layer._replace(norms=5 + noise, zeros=0.5 + 0.1 * noise * 1e6) for layer in image.layers]
    inside.path_picture(image._replace(layers=layers), "a", "")
    assert drawn[0].scales[4] == ("all 5", "") and drawn[0].scales[3] == ("0.5", "0.6")
    zeros, norms = (np.unique(np.asarray(drawn[0].cells[place]).reshape(-1, 3), axis=0) for place in (3, 4))
    assert len(zeros) == 24 and len(norms) == 1


def test_cells_are_of_what_their_columns_say(monkeypatch):
    drawn = []
    monkeypatch.setattr(inside, "sheet", lambda title, lines, columns, rows, **options: drawn.append(rows))
    model = CrateMAE(MODEL)
    image, query = seen(model), inside.Query((1, 4))
    shown = reconstruct(model, image.pixels[None], NORMALIZATION)
    inside.attention_picture([image], ["a"], 1, query, "")
    inside.segmentation_picture([image], ["a"], 1, inside.Query(), 0.6, "")
    inside.components_picture([image], ["a"], "")
    inside.path_picture(image, "a", "")
    inside.reconstructions_picture([shown], ["a"], 8, norm_pix_loss=True, caption="")
    attention, segmentation, components, path, reconstructions = drawn

    weights = image.layers[1].attention[:, 1 + 1 * 6 + 4, 1:]
    largest = [float(each.max()) for each in (weights.mean(0), *weights)]
    assert [float(note.removeprefix("largest ")) for note in attention[0].notes[1:]] == pytest.approx(largest, rel=0.01)

    def middles(cell, size=(6, 4)):
        return np.asarray(cell.resize(size, Image.Resampling.NEAREST)).astype(int)

    photograph, *_, owned = map(middles, segmentation[0].cells)
    owner = image.layers[1].attention[:, 0, 1:].argmax(0).view(4, 6)
    assert np.abs(owned - 0.4 * photograph - 0.6 * distinct(2)[owner]).max() <= 1
    colours = [each for layer in image.layers for each in (layer.token_colours, layer.key_colours)]
    assert all(np.array_equal(middles(cell), of) for cell, of in zip(components[0].cells[1:], colours, strict=True))
    keys = image.layers[1].projected.transpose(0, 1).flatten(1)[1:]  # without the class token's
    of_keys = PrincipalComponents.of(keys).colours(keys).view(4, 6, 3) * 255
    assert torch.equal(image.layers[1].key_colours, of_keys.round().to(torch.uint8))
    for row, layer in zip(path, image.layers, strict=True):
        maps = (layer.compression, layer.sparsification, layer.zeros, layer.norms)
        for cell, values in zip(row.cells[1:5], maps, strict=True):
            brightest = middles(cell).sum(-1).argmax()
            assert values.max() - values.flatten()[brightest] <= 0.02 * values.max()
    for cell, pixels in zip(reconstructions[0].cells, shown[:4], strict=True):
        assert np.array_equal(middles(cell, (48, 32)), pixels[0].permute(1, 2, 0))


def test_models_that_cannot_be_drawn_are_refused(tmp_path):
    """And of one without encoder layers, the decoder's are drawn."""
    pixels, folder = torch.zeros(3, 32, 32, dtype=torch.uint8), tmp_path / "inside"

    def draw(model: CrateMAE) -> None:
        visualizing.visualize(model, [pixels], ["a"], NORMALIZATION, folder)

    with pytest.raises(ValueError, match="model: expected one with layers"):
        draw(CrateMAE(dataclasses.replace(MODEL, depth=0, decoder_depth=0)))
    overflowing = CrateMAE(MODEL)
    torch.nn.init.constant_(overflowing.decoder_pred.weight, torch.inf)
    with pytest.raises(ValueError, match="model: expected a finite prediction"):
        draw(overflowing)
    assert not folder.exists()
    assert place_of_layer(dataclasses.replace(MODEL, depth=0), -1) == 0


def test_the_command_draws_images_of_all_kinds(run_folder, images, pages, capsys, monkeypatch):
    lines = []

    def sheet(title, texts, *arguments, **options):
        lines.extend([title, *texts])
        return drawn(title, texts, *arguments, **options)

    drawn = inside.sheet
    monkeypatch.setattr(inside, "sheet", sheet)
    arguments = ["visualize", str(run_folder), *map(str, images), "--size", "30"]
    assert main(arguments) == 0
    said, folder = capsys.readouterr().out, run_folder / "inside"
    page = pages[0]
    pixels = [image.pixels for image in page["views"]]
    assert [tuple(each.shape) for each in pixels] == [(3, 32, 48), (3, 72, 32), (3, 32, 32), (3, 32, 48)]
    assert torch.equal(pixels[0], pixels[3]) and torch.equal(pixels[1][0], pixels[1][2])
    assert page["names"] == [path.name for path in images] and page["norm_pix_loss"] is True
    assert not torch.equal(page["reconstructions"][0].removed, page["reconstructions"][3].removed)
    assert inside.GIVEN_CONTRAST in said and inside.GIVEN_CONTRAST in lines
    assert "--size 30: 32, the nearest multiple of the patch" in said and f"Open {folder / 'index.html'} first" in said
    assert {"Attention of the class token, encoder layer 2 of 2", "The path of d.png through the layers"} <= {*lines}

    assert main([*arguments, "--out", str(folder.with_name("again"))]) == 0
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) == 10 and all(name in said for name in files)
    assert all((folder / name).read_bytes() == (folder.with_name("again") / name).read_bytes() for name in files)

    monkeypatch.setattr(visualize, "OF_A_FOLDER", 3)
    monkeypatch.setattr(visualizing, "_pictures", lambda *_: [])
    assert main(["visualize", str(run_folder), str(images[0].parent)]) == 0
    assert "3 of the 4 images in" in capsys.readouterr().out
    assert sorted({*files} - {path.name for path in folder.iterdir()}) == ["path_4.png"]


@pytest.mark.parametrize("words", ["one two three four five six", "IMG_20260101_123456_HDR_edited.jpg"])
def test_long_names_are_broken_into_lines(words):
    lines, font = wrapped(words, 13, 68), ImageFont.load_default(13)
    assert len(lines) > 2 and all(font.getlength(line) <= 68 for line in lines)
    assert (" " if " " in words else "").join(lines) == words
    assert wrapped(words, 13, 68, most=2) == [lines[0], lines[1][:-2] + "..."]
    assert wrapped("日本 é.jpg", 13, 68) == ["?? e.jpg"]


@pytest.mark.parametrize(
    ("layer", "place"), [(-1, 1), ("-2", 0), ("1", 0), (2, 1), ("decoder:1", 2), ("decoder:-1", 2), ("encoder:2", 1)]
)
def test_layers_are_named_as_pictures_number_them(layer, place):
    assert place_of_layer(MODEL, layer) == place


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("{run} {run}/nowhere.png", "cannot read the image {run}/nowhere.png (vanished"),
        ("{run} {run}/config.json", "IMAGE: expected photographs"),
        ("{run} {run}", "no images under {run}"),
        ("{run}/nowhere {image}", "RUN: expected the folder of a run, got {run}/nowhere, which is not there"),
        ("{image} {run}", "RUN: expected the folder of a run, got {image}, a file"),
        ("{run} {image} --patch 5,1", "--patch: expected a row from 1 to 4 and a column from 1 to 6, the patches of a.png"),
        ("{run} {image} --patch 3", "--patch: expected a row and a column"),
        ("{run} {image} --layer 3", "--layer: expected 1 to 2 (or -1, the last), or decoder:1 to decoder:1"),
        ("{run} {image} --layer 0", "--layer: expected"),
        ("{run} {image} --layer last", "--layer: expected"),
        ("{run} {image} --size 3", "--size: expected 8 to 512 pixels"),
        ("{run} {image} --size 100000", "--size: expected 8 to 512 pixels"),
        ("{run} {image} --size 512", "--size: expected at most 4,096 patches an image, and {image} would have 64 x 106"),
        ("{run} {image} --size 512", "--size 392 or less makes it fit"),
        ("{run} {long}", "cut it to a part that is less long"),
        ("{run} {image} --mass 0", "--mass: expected above 0 and at most 1"),
        ("{run} {image} --mask_ratio 0.99", "--mask_ratio: expected above 0, and to leave one patch of 24 of a.png visible"),
        ("{run} {image} --seed -1", "--seed: expected 0"),
        ("{run} {image} --out {image}", "--out {image}: {image} is a file"),
        ("{run} {run}/path.png --out {run}", "--out: {run}/path.png is one of the images"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(run_folder, images, tmp_path, pages, capsys, arguments, says):
    Image.new("RGB", (1, 5000)).save(tmp_path / "long.png")
    if "path.png" in arguments:
        photograph(32, 32).save(run_folder / "path.png")
    names = dict(run=run_folder, image=images[0], long=tmp_path / "long.png")
    assert main(["visualize", *arguments.format(**names).split()]) == 2
    error = capsys.readouterr().err
    assert says.format(**names) in error and error.count("\n") == 1
    assert not (run_folder / "inside").exists() and not pages


def test_more_than_fits_is_refused(run_folder, images, pages, capsys, monkeypatch):
    """The tokens of 4 x 6 and 9 x 4 patches, and the class tokens, in three layers, twice: 4 bytes each."""
    arguments = ["visualize", str(run_folder), *map(str, images[:2])]
    monkeypatch.setattr(visualizing, "_pictures", lambda *_: [])
    monkeypatch.setattr(visualize, "MOST_MEMORY", 62 * 3 * 32 * 8)
    assert main(arguments) == 0
    monkeypatch.setattr(visualize, "MOST_MEMORY", 62 * 3 * 32 * 8 - 1)
    assert main(arguments) == 2
    assert "a lower --size needs less, and so do fewer images" in capsys.readouterr().err


def test_a_folders_images_that_cannot_be_read_are_left_out(run_folder, images, pages, capsys, monkeypatch):
    monkeypatch.setattr(visualizing, "_pictures", lambda *_: [])
    for path in images[:2]:
        path.write_bytes(b"no image")
    arguments = ["visualize", str(run_folder), str(images[0].parent)]
    assert main(arguments) == 0
    assert pages[0]["names"] == ["c.png", "d.png"]
    assert f"{images[0]} is left out: no image (" in capsys.readouterr().out
    for path in images:
        path.write_bytes(b"")
    assert main(arguments) == 2 and len(pages) == 1
    assert "IMAGE: none of the 4 images tried can be read" in capsys.readouterr().err


def test_the_masks_are_those_of_the_run(run_folder, images, pages, monkeypatch):
    """The ratio that it was trained with, and one mask a place, whatever else is shown."""
    monkeypatch.setattr(visualizing, "_pictures", lambda *_: [])
    settings = json.loads((run_folder / "config.json").read_text())
    (run_folder / "config.json").write_text(json.dumps(settings | {"schedule": {"mask_ratio": 0.5}}))
    for shown in (images[:1], images[::3]):
        assert main(["visualize", str(run_folder), *map(str, shown), "--seed", "7"]) == 0
    alone, beside = (page["reconstructions"][0].removed for page in pages)
    assert torch.equal(alone, beside)
    assert alone.float().mean() == 0.5
