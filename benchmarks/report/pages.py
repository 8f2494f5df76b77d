"""What is generated within pages: all results in docs/results.md, the few that say most in README.md.

Tables are short, and a link leads from every number to the line of its measurement.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import BASELINE, SAVED_BY
from benchmarks.report.rows import Results, Row, absent, describe_model, describe_shape, select, size
from benchmarks.report.tables import (
    WRITTEN,
    Links,
    commit,
    gibibytes,
    markdown,
    name_of,
    number,
    provider_order,
    row_order,
    spread,
    surroundings,
    targets_of,
)
from benchmarks.report.targets import times_faster

# The headline has no more lines; of training steps it has those of so many images or more, since fewer say little of training.
HEADLINE_LINES, HEADLINE_BATCH = 8, 8


def part(name: str, *paragraphs: str) -> str:
    """Paragraphs between the markers that a page has for them."""
    return "\n\n".join([begin(name), *paragraphs, end(name)])


def begin(name: str) -> str:
    return f"<!-- {name}: begin -->"


def end(name: str) -> str:
    return f"<!-- {name}: end -->"


def headline(results: Sequence[Results], page: Path) -> str:
    """The README's table: steps of CRATE-MAE-Base on each device, GPUs first; what a layer keeps; images that a core loads."""
    by_rank = sorted(results, key=lambda each: not each.on_cuda)
    steps = [line for each in by_rank for line in _headline_steps(each, Links(each.folder, page))]
    others = [line for each in by_rank for line in _headline_others(each, Links(each.folder, page))]
    columns = ("device", "what", "compared with", "crate-kernels", "ratio", "commit")
    return part("headline", markdown(columns, steps[: HEADLINE_LINES - len(others)] + others))


def _headline_steps(results: Results, links: Links) -> Iterator[list[str]]:
    """At the largest batch, in the dtype that the official order is fastest in: it, and others that do the same, against ours."""
    wanted = dict(operator="training_step", model="crate_mae_base", mode="forward+backward")
    rows = [row for row in select(results.rows, **wanted) if row.get("ms") and not row.get("overrides")]
    official = [row for row in select(rows, provider=BASELINE) if (size(row, "batch") or 0) >= HEADLINE_BATCH]
    if not official:
        return
    at = max(official, key=lambda row: (size(row, "batch"), -row["ms"]["p50"]))
    found = {row["provider"]: row for row in select(rows, shape=at["shape"], dtype=at["dtype"])}
    ours = [row for name, row in found.items() if name.startswith(("triton", "composed"))]
    if not ours:
        return
    best = min(ours, key=lambda row: row["ms"]["p50"])
    what = f"step, batch {size(at, 'batch')}, {at['dtype']}"
    for name in (BASELINE, "official compiled", "best composed"):
        if name in found:
            ratio = times_faster(best, found[name])
            cells = [_named(row, links, f"{number(row['ms']['p50'])} ms") for row in (found[name], best)]
            yield _headline_line(results.device, what, cells, ratio, best)


def _headline_others(results: Results, links: Links) -> Iterator[list[str]]:
    kept = [
        row for row in select(results.rows, operator="memory", mode=SAVED_BY["encoder_layer"]) if not absent(row)
    ]  # fmt: skip
    official = select(kept, provider=BASELINE)
    if official and len(kept) > 1:
        best = min(kept, key=lambda row: row["peak_bytes"])
        cells = [_named(row, links, gibibytes(row["peak_bytes"])) for row in (official[0], best)]
        what = f"kept by an encoder layer, batch {size(best, 'batch')}"
        yield _headline_line("a GPU, counted", what, cells, official[0]["peak_bytes"] / best["peak_bytes"], best)
    loading = select(results.rows, operator="data_loading", mode="one process")
    by_name = {row["provider"]: row for row in loading if not absent(row)}
    if {"torchvision", "packed"} <= by_name.keys():
        theirs, best = by_name["torchvision"], by_name["packed"]
        cells = [_named(row, links, f"{number(row['images_per_second'])} images/s") for row in (theirs, best)]
        yield _headline_line(results.device, "images one core loads", cells, times_faster(best, theirs), best)


def _named(row: Row, links: Links, words: str) -> str:
    return f"{links.line(row, words)}, {name_of(row['provider'])}"


def _headline_line(device: str, what: str, cells: Sequence[str], ratio: float | str, ours: Row) -> list[str]:
    device = re.sub(r"\(R\)| Processor", "", device)
    return [device, what, *cells, ratio if isinstance(ratio, str) else f"{number(ratio)}x", f"`{commit(ours)}`"]


def results_part(results: Sequence[Results], page: Path) -> str:
    """All results: each device's targets and training steps, and what layers and ranks keep."""
    parts = [
        f"{WRITTEN} Every number leads to the line of its measurement; a ratio is the official order's time over the provider's."
    ]
    for each in results:
        links = Links(each.folder, page)
        steps = [row for row in select(each.rows, operator="training_step") if not absent(row) and row.get("ms")]
        parts.append(f"**{each.device}** ({surroundings(each.rows)}; [report]({links.path('report.md')})):")
        if steps:
            parts.append(steps_table(steps, links))
        if loading := [row for row in select(each.rows, operator="data_loading") if not absent(row)]:
            parts.append(loading_table(loading, links))
        parts.append(short_targets_table(each, links))
    parts += filter(None, (layers_table(results, page), ranks_table(results, page)))
    if not any(each.on_cuda for each in results):
        parts.append("Nothing has been measured on a GPU yet.")
    return part("results", *parts)


def layers_table(results: Sequence[Results], page: Path) -> str | None:
    """What one layer keeps for its backward, a line a provider: bytes, and their share of the official order's."""
    cells: dict[str, dict[str, str]] = {}
    for each in results:
        links = Links(each.folder, page)
        for layer, mode in SAVED_BY.items():
            found = {row["provider"]: row for row in select(each.rows, operator="memory", mode=mode) if not absent(row)}
            official = found.get(BASELINE)
            for name, row in found.items():
                if official is None:
                    break
                share = f"; {100 * row['peak_bytes'] / official['peak_bytes']:.1f}%" if name != BASELINE else ""
                cells.setdefault(name, {})[layer] = links.line(row, gibibytes(row["peak_bytes"]) + share)
                shape, model = describe_shape(row), describe_model(row)
    if not cells:
        return None
    columns = ["kept for the backward by one layer", *(layer.replace("_", " ") for layer in SAVED_BY)]
    lines = [
        [name_of(name), *(cells[name].get(layer, "") for layer in SAVED_BY)]
        for name in sorted(cells, key=provider_order)
    ]
    about = "Counted from shapes, on no device, with the share of the official order's under bfloat16 autocast"
    return f"{about}; `{model}`, {shape}:\n\n{markdown(columns, lines)}"


# The parts of what a rank needs, in words; together where they are small.
PARTS = {
    "parameters": ("parameters",),
    "gradients": ("gradients",),
    "AdamW": ("means",),
    "whole layers": ("whole",),
    "images, constants": ("batch", "constants"),
}


def ranks_table(results: Sequence[Results], page: Path) -> str | None:
    """What each rank needs memory for: a line a model and ways of running that need the same, a column more a provider's step."""
    parts: dict[tuple[str, str], dict[str, dict[str, int]]] = {}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for each in results:
        links = Links(each.folder, page)
        for row in select(each.rows, operator="memory_per_rank"):
            key, provider = (f"`{describe_model(row)}`, {describe_shape(row)}", row["mode"]), row["provider"]
            parts.setdefault(key, {})[provider] = row["parts"]
            sum_of_it = links.line(row, gibibytes(row["peak_bytes"]))
            cells.setdefault(key, {})[provider] = f"{gibibytes(row['parts']['saved'])}; {sum_of_it}"
    if not parts:
        return None
    providers = sorted({provider for found in parts.values() for provider in found}, key=provider_order)
    alike: dict[str, list[tuple[str, str]]] = {}
    for key, found in parts.items():
        alike.setdefault(json.dumps([key[0], found], sort_keys=True), []).append(key)
    table = []
    for keys in alike.values():
        counts = next(iter(parts[keys[0]].values()))
        sums = [sum(counts.get(name, 0) for name in names) for names in PARTS.values()]
        of_providers = [cells[keys[0]].get(provider, "") for provider in providers]
        where = "; ".join(mode for _, mode in keys)
        table.append([keys[0][0], where, *(gibibytes(count) if count else "" for count in sums), *of_providers])
    columns = ["model", "on each of", *PARTS, *(f"saved by {name_of(provider)}; sum" for provider in providers)]
    about = (
        "What each rank needs memory for, counted likewise (`python -m benchmarks.memory_per_rank` says what is not); "
        "accumulated: with several micro-batches a step, between which FSDP2 keeps whole gradients"
    )
    return f"{about}:\n\n{markdown(columns, table)}"


def steps_table(rows: Sequence[Row], links: Links) -> str:
    """Forward and backward of whole models, a line a model, dtype and batch, a column a provider: milliseconds and ratio."""
    rows = [row for row in rows if (row.get("mode") or "").startswith("forward+backward")]
    providers = sorted({row["provider"] for row in rows}, key=provider_order)
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in sorted(rows, key=row_order):
        key = describe_model(row), row["mode"], row.get("dtype") or "", str(row["shape"][0])
        lines.setdefault(key, {})[row["provider"]] = row
    table = []
    for (model, mode, dtype, batch), found in lines.items():
        commits = dict.fromkeys(map(commit, found.values()))
        cells = [_step_cell(found[provider], links) if provider in found else "" for provider in providers]
        table.append([f"`{model}`", mode, dtype, batch, *cells, ", ".join(f"`{each}`" for each in commits)])
    headings = [f"{name_of(provider)}, ms" for provider in providers]
    return markdown(["model", "step", "dtype", "batch", *headings, "commit"], table)


def loading_table(rows: Sequence[Row], links: Links) -> str:
    """Images a second of each loader, and its share of what Pillow alone decodes in the same turns."""
    lines = []
    for row in sorted(rows, key=row_order):
        share = f"{number(row['ratio']['p50'])} ({spread(row['ratio'])})" if row.get("ratio") else ""
        speed = links.line(row, number(row["images_per_second"]))
        lines.append([name_of(row["provider"]), row["mode"], speed, share, row["data"], f"`{commit(row)}`"])
    return markdown(["images from", "in", "images/s", "share of Pillow's", "files", "commit"], lines)


def _step_cell(row: Row, links: Links) -> str:
    """Milliseconds and ratio, as one link."""
    words = number(row["ms"]["p50"])
    if row.get("ratio") and row["provider"] != row.get("baseline"):
        words += f"; {number(row['ratio']['p50'])}x ({spread(row['ratio'])})"
    return links.line(row, words)


def short_targets_table(results: Results, links: Links) -> str:
    """A line a target: what was measured, and the verdict on the worst of it."""
    lines = []
    for target, cases in targets_of(results):
        found = [each for each in cases if each.value is not None]
        numbers = "; ".join(
            f"{each.name}: {links.line(each.sources[0], target.in_unit(each.value))}"
            + "".join(f" against {links.line(row, name_of(row['provider']))}" for row in each.sources[1:])
            for each in found
            if each.value is not None
        )
        worst = target.worst(cases)
        verdict = target.verdict(worst.value if worst else None)
        verdict += f" ({worst.name})" if worst and len(found) > 1 else ""
        missing = len(cases) - len(found)
        verdict += f"; {missing} of {len(cases)} not measured" if found and missing else ""
        lines.append([target.name, target.in_unit(target.floor), target.in_unit(target.goal), numbers, verdict])
    return markdown(("target", "floor", "goal", "measured", "verdict"), lines)
