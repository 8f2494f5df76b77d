"""Plots of stored results: what to draw, as data, and the drawing, which needs matplotlib (the extra ``plot``).

The colours are those of Okabe and Ito, which can be told apart with any colour vision; hatches and markers tell apart what shares
a colour.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from benchmarks.report.rows import Results, Row, describe_model, describe_shape, select, size
from benchmarks.report.tables import OPERATORS, name_of, number, operators_of, provider_order, row_order
from benchmarks.report.targets import copy_ceiling, product_ceiling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str = "o"
    hatch: str = ""


VARIANTS = {
    "": Style("", "o"),
    " 16bit": Style("", "s", "//"),
    " recompute": Style("", "^", ".."),
    " float32 recompute": Style("", "v", "oo"),
    " graph": Style("", "D", "xx"),
}
STYLES = {
    "reference": Style(BLACK),
    "reference graph": Style(BLACK, "D", "xx"),
    "official compiled": Style(BLUE),
    "official max-autotune": Style(BLUE, "s", "//"),
    "official compiled graph": Style(BLUE, "D", "xx"),
    "products": Style(YELLOW),
    "products with epilogue": Style(YELLOW, "s", "//"),
    "sdpa flash": Style(SKY),
    "sdpa flash summed": Style(SKY, "P", "oo"),
    "sdpa cudnn": Style(SKY, "s", "//"),
    "sdpa cudnn summed": Style(SKY, "X", "xx"),
    "sdpa efficient": Style(SKY, "^", ".."),
    "sdpa efficient summed": Style(SKY, "v", "++"),
    "sdpa math": Style(SKY, "D", "\\\\"),
    "sdpa math summed": Style(SKY, "d", "--"),
    "varlen": Style(BLUE, "^", ".."),
    "varlen summed": Style(BLUE, "v", "oo"),
    "flex": Style(ORANGE),
    "flex summed": Style(ORANGE, "s", "//"),
    "vit-mae sdpa": Style(PURPLE),
    "vit-mae compiled": Style(PURPLE, "s", "//"),
    "packed": Style(VERMILLION),
    "folder": Style(VERMILLION, "s", "//"),
    "parquet": Style(VERMILLION, "^", ".."),
    "synthetic": Style(VERMILLION, "D", "xx"),
    "torchvision": Style(BLUE),
    "webdataset": Style(SKY),
    "datasets": Style(PURPLE),
    "pillow crop": Style(BLACK),
    "best composed": Style(GREEN, "X", "++"),
    **{"composed" + name: replace(style, colour=GREEN) for name, style in VARIANTS.items()},
    **{"triton" + name: replace(style, colour=VERMILLION) for name, style in VARIANTS.items()},
}


def style_of(provider: str) -> Style:
    """A provider that no style is set for shares the colour of the one its name begins with, or is orange."""
    if provider in STYLES:
        return STYLES[provider]
    like = max((known for known in STYLES if provider.startswith(known)), key=len, default=None)
    return Style(STYLES[like].colour if like else ORANGE, "X", "\\\\")


@dataclass(frozen=True)
class Plot:
    """A picture to be drawn: its file's name without ending, its title, and one panel a subtitle."""

    name: str
    title: str
    panels: dict[str, list[Row]]
    draw: Callable[[Axes, list[Row]], None]
    panel_height: Callable[[list[Row]], float]


COLUMNS = 3


# A panel holds no more groups of bars than this; the tables hold them all.
MOST_GROUPS = 6


def plan(results: Results) -> list[Plot]:
    """The plots that these rows are enough for."""
    return [*_ratios(results), *_roofline(results)]


def _ratios(results: Results) -> Iterable[Plot]:
    rows = [row for row in results.rows if row.get("ratio") and row["provider"] != row.get("baseline")]
    for operator in operators_of(rows):
        for dtype in sorted({row.get("dtype") or "" for row in select(rows, operator=operator)}):
            panels: dict[str, list[Row]] = {}
            found = sorted(select(rows, operator=operator, dtype=dtype), key=row_order)
            baselines = dict.fromkeys(name_of(row["baseline"]) for row in found)
            for row in found:
                panels.setdefault(row.get("mode") or "", []).append(row)
            yield Plot(
                f"{results.slug}-ratios-{operator}-{dtype}",
                f"{OPERATORS.get(operator, operator)}, {dtype}: how many times better than {', '.join(baselines)}",
                {mode: _most_compared(of_mode) for mode, of_mode in panels.items()},
                _draw_ratios,
                _height_of_bars,
            )


def _most_compared(rows: list[Row]) -> list[Row]:
    """The rows to draw: of each size the largest batch, then of these the sizes with the most providers, smaller ones first."""
    groups: dict[str, list[Row]] = {}
    largest: dict[Any, str] = {}
    for row in sorted(rows, key=_sizes):
        groups.setdefault(_group(row), []).append(row)
        largest[_sizes(row)[:3] if isinstance(row.get("shape"), dict) else _group(row)] = _group(row)
    chosen = sorted((groups[name] for name in largest.values()), key=lambda found: (-len(found), _sizes(found[0])))
    return [row for found in sorted(chosen[:MOST_GROUPS], key=lambda found: _sizes(found[0])) for row in found]


def _sizes(row: Row) -> tuple[int, ...]:
    return tuple(size(row, name) or 0 for name in ("width", "tokens", "heads", "batch"))


def _group(row: Row) -> str:
    """What a group of bars is labelled with, in lines short enough to stand beside them."""
    lines = [fill(describe_model(row), 30), describe_shape(row).replace(", width", "\nwidth")]
    return "\n".join(filter(None, lines))


def _roofline(results: Results) -> Iterable[Plot]:
    """The roofline of bfloat16, whose product bounds no other dtype; of each size the largest batch, which fills the device."""
    product, copy = product_ceiling(results.rows), copy_ceiling(results.rows)
    if not isinstance(product, dict) or not isinstance(copy, dict):
        return
    largest: dict[tuple[Any, ...], Row] = {}
    for row in sorted(select(results.rows, dtype="bfloat16"), key=row_order):
        if row["operator"] != "ceilings" and row.get("tflops") and row.get("gigabytes_per_second"):
            sizes = tuple(size(row, name) for name in ("tokens", "width", "heads"))
            largest[row["operator"], describe_model(row), row.get("mode"), sizes, row["provider"]] = row
    rows = list(largest.values())
    if rows:
        yield Plot(
            f"{results.slug}-roofline",
            "Roofline, bfloat16, under the product and copy rates measured here; open markers: backward alone",
            {OPERATORS.get(name, name): [product, copy, *select(rows, operator=name)] for name in operators_of(rows)},
            _draw_roofline,
            lambda _: 3.6,
        )


def save(plots: Sequence[Plot], results: Results, folder: Path) -> list[Path]:
    """Draw the plots of a device as PNG, the same bytes for the same rows and the same matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "hatch.linewidth": 0.6,
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(settings):
        for plot in plots:
            figure = Figure(layout="constrained")
            _compose(figure, plot, results)
            written.append(folder / f"{plot.name}.png")
            figure.savefig(written[-1], dpi=120, metadata={"Software": None})
    return written


def _compose(figure: Figure, plot: Plot, results: Results) -> None:
    """Panels in a grid, one legend for all below them, device and versions in the title."""
    columns = min(COLUMNS, len(plot.panels))
    rows = -(-len(plot.panels) // columns)
    contents = list(plot.panels.values())
    heights = [max(map(plot.panel_height, contents[row * columns : (row + 1) * columns])) for row in range(rows)]
    providers = sorted(
        {row["provider"] for found in contents for row in found if row["operator"] != "ceilings"}, key=provider_order
    )
    legend_columns = 3 if columns > 1 else 2
    lines_of_legend = -(-len(providers) // legend_columns)
    figure.set_size_inches(max(4.2 * columns, 6.4), sum(heights) + 0.9 + 0.2 * lines_of_legend)
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": heights}).flatten()
    for ax in axes[len(contents) :]:
        ax.set_axis_off()
    for ax, (title, found) in zip(axes, plot.panels.items(), strict=False):
        plot.draw(ax, found)
        ax.set_title(title, fontsize=9)
    figure.suptitle(f"{plot.title}\n{results.device}", fontsize=11)
    figure.legend(
        handles=[_key(plot, provider) for provider in providers],
        loc="outside lower center",
        ncols=legend_columns,
        frameon=False,
    )


def _key(plot: Plot, provider: str) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    style, label = style_of(provider), name_of(provider)
    if plot.draw is _draw_ratios:
        return Patch(facecolor=style.colour, edgecolor="white", hatch=style.hatch, label=label)
    return Line2D([], [], color=style.colour, linestyle="none", marker=style.marker, label=label)


def _height_of_bars(rows: list[Row]) -> float:
    groups = Counter(map(_group, rows))
    return 0.9 + sum(0.15 + max(0.19 * bars, 0.16 * (1 + group.count("\n"))) for group, bars in groups.items())


def _draw_ratios(ax: Axes, rows: list[Row]) -> None:
    """Bars from 1, where the baseline is, with the 20th to 80th percentile; a group a shape."""
    position, ticks, labels = 0.0, [], []
    for group in dict.fromkeys(map(_group, rows)):
        found = sorted((row for row in rows if _group(row) == group), key=lambda row: provider_order(row["provider"]))
        for offset, row in enumerate(found):
            style, ratio = style_of(row["provider"]), row["ratio"]
            y, value = position + offset, ratio["p50"]
            ax.barh(y, value, height=0.9, color=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0)
            ax.plot([ratio["p20"], ratio["p80"]], [y, y], color="#555555", linewidth=1.2)
            ax.annotate(
                number(value),
                (max(value, ratio["p80"]), y),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        ticks.append(position + (len(found) - 1) / 2)
        labels.append(group)
        position += len(found) + 0.8
    ax.axvline(1, color=BLACK, linewidth=1, linestyle="--")
    ax.set_xlim(0, 1.15 * max(max(1.0, row["ratio"]["p80"]) for row in rows))
    ax.set_yticks(ticks, labels)
    ax.set_ylim(position - 0.8, -0.8)
    ax.set_xlabel("ratio to the baseline (dashed)")


def _draw_roofline(ax: Axes, rows: list[Row]) -> None:
    """TFLOP/s over FLOPs a byte, both counted at their least, under the large product's and the large copy's rate."""
    product, copy, *points = rows
    ceiling, slope = product["tflops"], copy["gigabytes_per_second"] / 1e3
    intensities = [row["tflops"] * 1e3 / row["gigabytes_per_second"] for row in points]
    left, right = min([*intensities, ceiling / slope]) / 3, max([*intensities, ceiling / slope]) * 3
    ax.plot([left, ceiling / slope, right], [left * slope, ceiling, ceiling], color=BLACK, linewidth=1.2)
    ax.annotate(
        f"{number(ceiling)} TFLOP/s",
        (right, ceiling),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    ax.annotate(
        f"{number(slope * 1e3)} GB/s",
        (left, left * slope),
        xytext=(2, -2),
        textcoords="offset points",
        fontsize=8,
        va="top",
    )
    for row, intensity in zip(points, intensities, strict=True):
        style = style_of(row["provider"])
        face = "none" if row.get("mode") == "backward" else style.colour
        ax.plot(
            intensity, row["tflops"], style.marker, color=style.colour, markerfacecolor=face, markersize=5, alpha=0.8
        )
    ax.set(xscale="log", yscale="log", xlabel="FLOP a byte (least of both)", ylabel="TFLOP/s")
    _plain_numbers(ax.xaxis)
    _plain_numbers(ax.yaxis)
    ax.grid(which="major", color="#dddddd", linewidth=0.6)


def _plain_numbers(axis: Axis) -> None:
    """On a logarithmic axis 0.2, 0.5, 1, 2, 5 for powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())
