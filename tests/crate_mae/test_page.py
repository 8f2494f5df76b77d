"""The page that shows images inside a model: what it holds, and what it does in a browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("playwright")  # lacking where nothing can be installed, as on some GPU machines

from playwright.sync_api import Browser, Page, sync_playwright

from crate_mae.analysis import ImageView, most_attended, view
from crate_mae.config import ModelConfig
from crate_mae.data import IMAGENET_MEAN, IMAGENET_STD, Normalization
from crate_mae.model import CrateMAE
from crate_mae.pictures import Reconstructions, reconstruct
from crate_mae.pictures.page import page

HOSTILE = '</script><b id="bold">"\'&<!--data--> \udcff \u00e9.png'
READABLE = HOSTILE.replace("\udcff", "\ufffd")
SHAPES = [(24, 40), (32, 32), (8, 1600)]
LAYERS = ["encoder-1", "encoder-2", "decoder-1"]
BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
NORM_PIX = "brightness and contrast of each patch shown here are the true ones"


class Shown(NamedTuple):
    views: list[ImageView]
    reconstructions: list[Reconstructions]

    def html(self, *, norm_pix_loss: bool = False) -> str:
        names = [HOSTILE, "square.png", "panorama.png"]
        return page(
            self.views,
            names,
            self.reconstructions,
            title=HOSTILE,
            caption=f"of {HOSTILE}",
            norm_pix_loss=norm_pix_loss,
        )

    def attention(self, image: int, layer: int, head: int | None, query: int) -> torch.Tensor:
        attention = self.views[image].layers[layer].attention.double()
        return (attention.mean(0) if head is None else attention[head])[query]


@pytest.fixture(scope="module")
def shown() -> Shown:
    """An image that is wider than high, a square one, and a strip; two heads in the encoder, three in the decoder."""
    torch.manual_seed(0)
    model = CrateMAE(
        ModelConfig(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, decoder_depth=1, decoder_num_heads=3)
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "qkv" in name:  # so that heads attend to few patches, and each to others
                weight.mul_(2)
    normalization = Normalization(IMAGENET_MEAN, IMAGENET_STD, 3)
    images = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for shape in SHAPES]
    return Shown(view(model, images, normalization), [reconstruct(model, each[None], normalization) for each in images])


class _Scripts(HTMLParser):
    """What a parser of HTML makes of a page: its elements, and its scripts of JSON by their id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.values: dict[str, Any] = {}
        self._id: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self._id = dict(attributes).get("id") if ("type", "application/json") in attributes else None

    def handle_data(self, text: str) -> None:
        if self._id:
            self.values[self._id] = json.loads(text)
            self._id = None


def _decoded(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def test_what_the_page_holds(shown: Shown) -> None:
    first, *others = shown.views[0].layers
    silent = first._replace(
        projected=first.projected * torch.tensor([1.0, 0.0])[:, None, None]
    )  # a head without a step
    shown = shown._replace(views=[shown.views[0]._replace(layers=[silent, *others]), *shown.views[1:]])
    text = shown.html()
    text.encode("ascii")
    scripts = _Scripts(text)
    assert len(scripts.values) == 1 + len(SHAPES) * len(LAYERS)
    assert scripts.values["data"]["images"][0]["name"] == READABLE
    for image, (held, seen) in enumerate(zip(scripts.values["data"]["images"], shown.views, strict=True)):
        assert (held["rows"], held["columns"]) == seen.grid
        for number, (layer, expected) in enumerate(zip(held["layers"], seen.layers, strict=True)):
            assert f"{layer['stack']}-{layer['number']}" == LAYERS[number]
            levels = _decoded(scripts.values[f"w-{image}-{number}"], "<i2").reshape(expected.projected.shape)
            w = levels * np.array(layer["steps"])[:, None, None]
            assert np.abs(w - expected.projected.numpy()).max() <= 1e-4 * expected.projected.abs().max()
            assert layer["rates"] == list(expected.coding_rates)
            for name in ("compression", "sparsification", "zeros", "norms"):
                assert np.array_equal(_decoded(layer[name], "<f4"), getattr(expected, name).flatten())
            for name in ("token_colours", "key_colours"):
                assert np.array_equal(_decoded(layer[name], "u1"), getattr(expected, name).flatten())


@pytest.mark.parametrize("views, names, wrong", [(0, 0, "views"), (2, 1, "names"), (2, 2, "reconstructions")])
def test_what_it_is_called_with(shown: Shown, views: int, names: int, wrong: str) -> None:
    with pytest.raises(ValueError, match=rf"^{wrong}: expected"):
        page(shown.views[:views], ["name"] * names, [], title="", caption="", norm_pix_loss=False)


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = f"needs Chromium: install Debian's package chromium, or put one of {', '.join(BROWSERS)} on PATH"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    quiet = ["disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync", "no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=[f"--{each}" for each in quiet])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser, shown: Shown, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Opens the page from the file system; at the end it has said nothing on the console, and asked for nothing but itself."""
    said: list[str] = []
    asked: list[str] = []
    context = browser.new_context(viewport={"width": 1200, "height": 1000}, reduced_motion="reduce")
    context.set_default_timeout(5000)
    path = tmp_path / "page.html"

    def open_page(address: str = "", **options: Any) -> Page:
        path.write_text(shown.html(**options), encoding="utf-8")
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri() + address)
        return tab

    yield open_page
    context.close()
    assert not said
    assert {url.partition("#")[0] for url in asked if not url.startswith("data:")} == {path.as_uri()}


def _go(tab: Page, address: str) -> None:
    """To another address of the same page, as somebody who edits it does."""
    tab.evaluate(
        """async address => {
            if (location.hash === `#${address}`) return;
            const changed = new Promise(done => addEventListener('hashchange', done, {once: true}));
            location.hash = address;
            await changed;
        }""",
        address,
    )


def _hash(tab: Page) -> dict[str, str]:
    return dict(pair.split("=") for pair in tab.evaluate("location.hash").removeprefix("#").split("&"))


def _pixels(tab: Page, canvas: str) -> str:
    return tab.evaluate("canvas => document.querySelector(canvas).toDataURL()", canvas)


def _assert_attention(tab: Page, expected: torch.Tensor) -> None:
    shown = torch.tensor(tab.evaluate("view.attention()"), dtype=torch.float64)
    torch.testing.assert_close(shown, expected, rtol=0, atol=1e-3)


def _click_patch(tab: Page, row: int, column: int, grid: tuple[int, int], canvas: str = "#map") -> None:
    box = tab.locator(canvas).bounding_box()
    rows, columns = grid
    position = {"x": box["width"] * (column + 0.5) / columns, "y": box["height"] * (row + 0.5) / rows}
    tab.locator(canvas).click(position=position)


def test_attention_is_the_models(opened: Callable[..., Page], shown: Shown) -> None:
    tab = opened()
    assert _hash(tab) == {"image": "1", "layer": "encoder-2", "head": "mean", "query": "cls"}
    for image, layer, head, query in [
        (0, 1, None, 0),
        (0, 0, 0, 7),
        (0, 1, 1, 15),
        (1, 1, 0, 16),
        (1, 2, 2, 1),
        (1, 2, None, 9),
        (2, 0, 1, 150),
    ]:
        address = f"image={image + 1}&layer={LAYERS[layer]}&head={'mean' if head is None else head + 1}&query={query or 'cls'}"
        _go(tab, address)
        assert tab.evaluate("location.hash") == f"#{address}"
        expected = shown.attention(image, layer, head, query)
        assert (expected - shown.attention(image, layer, head, query - 1)).abs().max() > 0.01
        _assert_attention(tab, expected)
    for nowhere in ("image=9&layer=encoder-9&head=9&query=99", "image=-1&query=%3Cb%3E&head=x&layer="):
        _go(tab, nowhere)
        assert _hash(tab) == {"image": "1", "layer": "encoder-2", "head": "mean", "query": "cls"}


def test_clicks(opened: Callable[..., Page], shown: Shown) -> None:
    tab = opened()
    canvases = ("#map", "#heads label:nth-child(2) canvas", "#path tr:nth-child(2) td:nth-child(4) canvas")
    before = [_pixels(tab, canvas) for canvas in canvases]
    _click_patch(tab, 1, 3, (3, 5))
    assert _hash(tab)["query"] == "9"
    assert "row 2, column 4" in tab.locator("#said").inner_text()
    assert all(_pixels(tab, canvas) != earlier for canvas, earlier in zip(canvases, before, strict=True))
    _assert_attention(tab, shown.attention(0, 1, None, 9))

    _click_patch(tab, 2, 0, (3, 5), "#key_colours")
    assert _hash(tab)["query"] == "11"
    tab.get_by_label("head 2").click()
    _assert_attention(tab, shown.attention(0, 1, 1, 11))
    tab.get_by_label("encoder 1", exact=True).first.click()
    _assert_attention(tab, shown.attention(0, 0, 1, 11))
    tab.get_by_label("square.png").first.click()
    _assert_attention(tab, shown.attention(1, 0, 1, 11))
    tab.locator("#path tr").nth(2).click()
    _assert_attention(tab, shown.attention(1, 2, 1, 11))
    tab.get_by_role("button", name="CLS").click()
    assert _hash(tab) == {"image": "2", "layer": "decoder-1", "head": "2", "query": "cls"}
    _assert_attention(tab, shown.attention(1, 2, 1, 0))

    smooth = _pixels(tab, "#map")
    tab.get_by_label("smooth").click()
    assert _hash(tab)["smooth"] == "0" and _pixels(tab, "#map") != smooth
    tab.locator("#map").hover(position={"x": 3, "y": 3})
    first = float(shown.attention(1, 2, 1, 0)[1])
    said = tab.locator("#said").inner_text()
    assert "row 1, column 1" in said and float(re.search(r"([\d.e-]+)%$", said)[1]) == pytest.approx(
        100 * first, rel=0.05
    )


@pytest.mark.parametrize("image, layer, query", [(0, 2, 9), (1, 2, 13)])
def test_the_map_lies_on_the_patches(
    opened: Callable[..., Page], shown: Shown, image: int, layer: int, query: int
) -> None:
    tab = opened(f"#image={image + 1}&layer={LAYERS[layer]}&query={query}&smooth=0")
    tab.locator("#opacity").fill("100")
    rows, columns = shown.views[image].grid
    middles = [((row + 0.5) / rows, (column + 0.5) / columns) for row in range(rows) for column in range(columns)]
    read = """middles => {
        const {width, height} = map, words = new Uint32Array(
            map.getContext('2d').getImageData(0, 0, width, height).data.buffer);
        return middles.map(([y, x]) => words[Math.floor(y * height) * width + Math.floor(x * width)]);
    }"""
    attention = shown.attention(image, layer, None, query)[1:]
    levels = (255 * attention / attention.max()).round().int().tolist()
    colours = tab.evaluate("Array.from(COLOURS)")
    assert len({level // 3 for level in levels}) > 5
    for drawn, level in zip(tab.evaluate(read, middles), levels, strict=True):
        assert drawn in colours[max(level - 1, 0) : level + 2]
    frame, canvas = (tab.locator(each).bounding_box() for each in ("#query", "#map"))
    for start, length, at in zip("yx", ("height", "width"), middles[query - 1], strict=True):
        middle = (frame[start] + frame[length] / 2 - canvas[start]) / canvas[length]
        assert middle == pytest.approx(at, abs=0.01)


def test_keyboard(opened: Callable[..., Page], shown: Shown) -> None:
    tab = opened("#layer=encoder-1&query=cls")
    tab.keyboard.press("ArrowRight")
    assert _hash(tab)["layer"] == "encoder-2"
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    assert _hash(tab)["layer"] == "decoder-1"
    tab.locator("#map").focus()
    queries = []
    for key in ("Down", "Down", "Down", "Left", "Up", "Right"):  # the first goes to the middle, the third nowhere
        tab.keyboard.press(f"Arrow{key}")
        queries.append(_hash(tab)["query"])
    assert queries == ["8", "13", "13", "12", "7", "8"] and _hash(tab)["layer"] == "decoder-1"
    tab.get_by_label("mean").focus()
    tab.keyboard.press("ArrowRight")
    assert _hash(tab)["head"] == "1" and _hash(tab)["layer"] == "decoder-1"
    _assert_attention(tab, shown.attention(0, 2, 0, 8))


def test_segmentation_is_what_is_most_attended(opened: Callable[..., Page], shown: Shown) -> None:
    tab = opened()
    plain = _pixels(tab, "#map")
    tab.get_by_label("segmentation").click()
    assert _hash(tab)["segment"] == "60" and _pixels(tab, "#map") != plain
    tab.locator("#mass").fill("35")
    assert _hash(tab)["segment"] == "35"
    sizes = set()
    for image, layer, head, query, mass in [(0, 1, None, 0, 60), (0, 0, 1, 3, 90), (1, 1, 0, 5, 85), (1, 2, 2, 0, 100)]:
        name = "mean" if head is None else head + 1
        _go(tab, f"image={image + 1}&layer={LAYERS[layer]}&head={name}&query={query}&segment={mass}")
        attention = shown.attention(image, layer, head, query)[1:]
        shares = attention.sort(descending=True).values.cumsum(0) / attention.sum()
        assert mass == 100 or (shares - mass / 100).abs().min() > 1e-3, "a tie"
        expected = most_attended(attention, mass / 100).tolist()
        assert tab.evaluate("view.mask()") == expected
        sizes.add(sum(expected))
    assert len(sizes) == 4


def test_pictures_are_of_what_they_say(opened: Callable[..., Page], shown: Shown) -> None:
    tab = opened("#image=1&layer=encoder-2&head=1&query=7&segment=60")
    tab.locator("#opacity").fill("100")
    view, filled = shown.views[0], shown.reconstructions[0]
    read = "selector => Array.from(document.querySelectorAll(selector), each => each.src ?? each.toDataURL())"

    def pictures(selector: str) -> list[np.ndarray]:
        files = [io.BytesIO(base64.b64decode(url.partition(",")[2])) for url in tab.evaluate(read, selector)]
        return [np.asarray(Image.open(file).convert("RGB")).astype(int) for file in files]

    names = ["original", "what the model sees", "its prediction", "prediction around what is visible"]
    assert tab.locator("#reconstruction figcaption").all_inner_texts() == names
    for picture, pixels in zip(pictures("#reconstruction img"), filled[:4], strict=True):
        assert np.array_equal(picture, pixels[0].permute(1, 2, 0))
    for name in ("token_colours", "key_colours"):
        assert np.array_equal(pictures(f"#{name}")[0], getattr(view.layers[1], name))

    titles = [text.partition("\n")[0] for text in tab.locator("th").all_inner_texts()]
    assert titles[4:] == ["MSSA changed", "Sparse step changed", "Zeros", "Norms"]
    rates = np.array([layer.coding_rates for layer in view.layers])
    marks = tab.locator("#path circle").evaluate_all("all => all.map(each => parseFloat(each.getAttribute('cx')))")
    assert np.allclose(marks, 2 + 96 * ((rates - rates.min()) / np.ptp(rates)).flatten())
    for number, layer in enumerate(view.layers, 1):
        maps = pictures(f"#path tr:nth-child({number}) td:nth-child(n+5) canvas")
        for picture, name in zip(maps, ("compression", "sparsification", "zeros", "norms"), strict=True):
            values = getattr(layer, name).flatten()
            assert values.max() - values[picture.sum(-1).argmax()] <= (values.max() - values.min()) / 255

    attention = shown.attention(0, 1, 0, 7)[1:]
    assert float(tab.locator("#most").inner_text().rstrip("%")) == pytest.approx(100 * float(attention.max()), rel=0.05)
    (drawn,), (rows, columns) = pictures("#map"), view.grid
    side = len(drawn) // rows
    dark = (drawn[side // 2 :: side, side // 2 :: side] == (11, 13, 18)).all(-1)
    assert np.array_equal(~dark, most_attended(attention, 0.6).view(rows, columns))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_what_is_written(opened: Callable[..., Page], norm_pix_loss: bool) -> None:
    tab = opened(norm_pix_loss=norm_pix_loss)
    assert tab.title() == READABLE == tab.locator("h1").inner_text()
    assert tab.locator("header .note").inner_text() == f"of {READABLE}"
    assert tab.locator("#name").inner_text() == READABLE
    assert tab.locator("#bold").count() == 0
    assert (NORM_PIX in tab.locator("main").inner_text().replace("\n", " ")) == norm_pix_loss
    tab.emulate_media(color_scheme="dark")
    for width in (800, 360):
        tab.set_viewport_size({"width": width, "height": 700})
        assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 23)"


def test_rows_of_the_path_say_what_they_show(opened: Callable[..., Page]) -> None:
    """Also those of layers that have no head of this number, and those that are not in sight when the page is printed."""
    tab = opened()
    tab.set_viewport_size({"width": 360, "height": 100})
    _go(tab, "image=2&layer=decoder-1&head=3&query=1")
    said = tab.locator("#path td:nth-child(4) small")
    assert said.last.inner_text() == ""
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert [text.partition("%")[2] for text in said.all_inner_texts()] == [" (mean)", " (mean)", ""]
    assert said.last.inner_text()
