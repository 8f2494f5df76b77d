"""Tables in Markdown: a device's report. Every number leads to the line that it comes from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.rows import Results, Row, absent, describe_model, describe_shape, select, size
from benchmarks.report.targets import TARGETS, Case, Target, copy_ceiling, product_ceiling

WRITTEN = "Written by `python -m benchmarks.report`."

# Providers in words, in the order in which they stand in tables and plots. A provider that is not named here comes last.
NAMES = {
    "reference": "official order, eager",
    "reference graph": "official order, CUDA graph",
    "official compiled": "official order, compiled",
    "official compiled graph": "official order, compiled, CUDA graph",
    "official max-autotune": "official order, max-autotune",
    "library": "library call",
    "products": "library products alone",
    "products with epilogue": "library products with epilogue",
    **{
        peer + summed: name + words
        for peer, name in {
            "sdpa flash": "SDPA flash",
            "sdpa cudnn": "SDPA cuDNN",
            "sdpa efficient": "SDPA efficient",
            "sdpa math": "SDPA math",
            "varlen": "varlen_attn",
            "flex": "FlexAttention",
        }.items()
        for summed, words in {"": "", " summed": ", gradients summed"}.items()
    },
    "vit-mae sdpa": "ViT-MAE, SDPA",
    "vit-mae compiled": "ViT-MAE, compiled",
    "best composed": "best composed, compiled",
    **{
        ours + variant: ours + words
        for ours in ("composed", "triton")
        for variant, words in {
            "": "",
            " compiled": ", compiled",
            " 16bit": ", 16-bit stream",
            " 16bit compiled": ", 16-bit stream, compiled",
            " recompute": ", 16-bit stream, recompute",
            " float32 recompute": ", recompute",
            " graph": ", 16-bit stream, CUDA graph",
        }.items()
    },
    "triton library": "triton, PyTorch's products",
    "pillow": "Pillow, decoding alone",
    "packed": "packed shards",
    "folder": "folder",
    "parquet": "Hugging Face dataset, Parquet",
    "synthetic": "synthetic images, nothing to decode",
    "torchvision": "torchvision's ImageFolder and v2 transforms",
    "webdataset": "webdataset, cropped by Pillow",
    "datasets": "Hugging Face's own decoding, cropped by Pillow",
    "pillow crop": "Pillow, decoding, cropping and resizing",
}
OPERATORS = {
    "training_step": "Training step",
    "encoder_layer": "Encoder layer",
    "decoder_layer": "Decoder layer",
    "attention": "Shared-QKV attention",
    "attention_causal": "Shared-QKV attention, causal",
    "attention_window_64": "Shared-QKV attention, window of 64",
    "attention_window_128": "Shared-QKV attention, window of 128",
    "attention_packed": "Shared-QKV attention, packed sequences",
    "attention_keys": "Shared-QKV attention, key mask",
    "ista": "ISTA",
    "mssa": "MSSA",
    "norm_linear": "LayerNorm and product",
    "overcomplete_ista": "Overcomplete ISTA",
    "memory": "Memory",
    "memory_per_rank": "Memory a rank",
    "data_loading": "Data loading",
    "ceilings": "Ceilings of this device",
}


DTYPES = ("float32", "tf32", "float16", "bfloat16")
MODES = ("forward", "backward", "forward+backward", "one process")

HOW_TO_READ = (
    "Times are medians of turns in which all providers alternate, with their 20th to 80th percentile; a ratio is the baseline's "
    "time over the provider's, taken within each turn. All numbers of a line come from the rows that it ends with."
)
DIRTY = "Rows marked dirty were measured with changes that no commit holds; README.md and docs/results.md show none of them."


def name_of(provider: str) -> str:
    return NAMES.get(provider, provider)


def provider_order(provider: str) -> tuple[int, str]:
    return _rank(list(NAMES), provider)


def operators_of(rows: Iterable[Row]) -> list[str]:
    """The operators of these rows, in the order of ``OPERATORS``, then those that are not named there."""
    return sorted({row["operator"] for row in rows}, key=lambda operator: _rank(list(OPERATORS), operator))


def row_order(row: Row) -> tuple[Any, ...]:
    """Sorts rows of one operator: models, dtypes and sizes in order, then providers as ``NAMES`` has them."""
    sizes = tuple(size(row, name) or 0 for name in ("width", "tokens", "heads", "batch"))
    mode, dtype = (_rank(known, row.get(key) or "") for key, known in (("mode", MODES), ("dtype", DTYPES)))
    return describe_model(row), mode, dtype, sizes, provider_order(row["provider"])


def _rank(known: Sequence[str], name: str) -> tuple[int, str]:
    return known.index(name) if name in known else len(known), name


def number(value: float) -> str:
    """Three digits or more, never an exponent for what is read as a time or a ratio."""
    magnitude = abs(value)
    if magnitude >= 100:
        return f"{value:.0f}"
    if magnitude >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if magnitude >= 1 else f"{value:.3g}"


def spread(values: dict[str, float]) -> str:
    return f"{number(values['p20'])} to {number(values['p80'])}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a column without a single entry is left out."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    used = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    lines = [[columns[index] for index in used], ["---"] * len(used), *([row[index] for index in used] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Links:
    """Links from a document to the lines of a folder's results."""

    def __init__(self, folder: Path, document: Path) -> None:
        self.folder = Path(os.path.relpath(folder, document.parent)).as_posix()

    def path(self, name: str) -> str:
        return name if self.folder == "." else f"{self.folder}/{name}"

    def line(self, row: Row, text: str | None = None) -> str:
        """``text`` as a link to the row's line; the file and line themselves if None."""
        text = text or f"{row['file']}:{row['line']}"
        return f"[{text}]({self.path(row['file'])}#L{row['line']})"


def commit(row: Row) -> str:
    return (row.get("commit") or "unknown")[:7] + (" (dirty)" if row.get("dirty") else "")


def surroundings(rows: Sequence[Row]) -> str:
    """Driver and versions, those that the rows name."""
    words = []
    for key in ("driver", "torch", "triton", "python"):
        versions = sorted({str(row[key]) for row in rows if row.get(key)})
        words += [f"{key} {', '.join(versions)}"] * bool(versions)
    return "; ".join(words)


def report(results: Sequence[Results], document: Path, plots: Callable[[Results], Sequence[Any]]) -> str:
    """The text of ``report.md`` of one folder: for each device targets, plots, and all rows by operator."""
    parts = [f"<!-- {WRITTEN} -->", "# Results"]
    for each in results:
        links = Links(each.folder, document)
        parts += [
            f"## {each.device}",
            f"{surroundings(each.rows)}. {HOW_TO_READ}",
            *[DIRTY] * any(row.get("dirty") for row in each.rows),
            "### Targets",
            targets_table(each, links),
        ]
        figures = plots(each)
        if figures:
            parts += ["### Plots", *(f"![{figure.title}](plots/{figure.name}.png)" for figure in figures)]
        for operator in operators_of(each.rows):
            rows = [row for row in select(each.rows, operator=operator) if not absent(row)]
            if rows:
                parts += [f"### {OPERATORS.get(operator, operator)}", operator_table(rows, links)]
        missing = [row for row in each.rows if absent(row)]
        if missing:
            parts += ["### Absent", absent_table(missing, links)]
    return "\n\n".join(parts) + "\n"


def targets_of(results: Results) -> list[tuple[Target, list[Case]]]:
    found = [target for target in TARGETS if target.device == ("cuda" if results.on_cuda else "cpu")]
    threads = {target.threads for target in found} & {row.get("threads") for row in results.rows}
    return [
        (target, target.cases(results.rows)) for target in found if target.threads is None or target.threads in threads
    ]


def targets_table(results: Results, links: Links) -> str:
    """A line a case: measured value, verdict, how near to the device's ceilings ours came, and the rows it is made of."""
    lines = []
    for target, cases in targets_of(results):
        for each in cases:
            lines.append([
                target.name,
                each.name,
                target.in_unit(target.floor),
                target.in_unit(target.goal),
                "" if each.value is None else target.in_unit(each.value),
                target.verdict(each.value),
                each.why_not if each.value is None else share_of_ceilings(each.sources[0], results.rows),
                ", ".join(f"{name_of(row['provider'])} {links.line(row)}" for row in each.sources),
            ])  # fmt: skip
    return markdown(("target", "case", "floor", "goal", "measured", "verdict", "remark", "rows"), lines)


def share_of_ceilings(ours: Row, rows: Sequence[Row]) -> str:
    """How much of the measured product and copy rate a row reaches: what limits it, seen from outside."""
    words = []
    for key, ceiling, what in (
        ("tflops", product_ceiling(rows, ours.get("dtype") or ""), "product"),
        ("gigabytes_per_second", copy_ceiling(rows), "copy"),
    ):
        if ours.get(key) and isinstance(ceiling, dict):
            words.append(f"{100 * ours[key] / ceiling[key]:.0f}% of the {what} rate")
    return ", ".join(words)


def operator_table(rows: Sequence[Row], links: Links) -> str:
    """A line a row: sizes in order, providers as ``NAMES`` has them."""

    columns = {
        "model": describe_model,
        "shape": describe_shape,
        "dtype": lambda row: row.get("dtype") or "",
        "mode": lambda row: row.get("mode") or "",
        "data": lambda row: row.get("data") or "",
        "provider": lambda row: name_of(row["provider"]),
        "ms": _spread_of("ms"),
        "ratio": _spread_of("ratio"),
        "baseline": lambda row: name_of(row["baseline"]) if row.get("baseline") else "",
        "images/s": _number_of("images_per_second"),
        "TFLOP/s": _number_of("tflops"),
        "GB/s": _number_of("gigabytes_per_second"),
        "% of roofline": _number_of("roofline_percent"),
        "memory": lambda row: gibibytes(row["peak_bytes"]) if row.get("peak_bytes") else "",
        "of it": lambda row: ", ".join(
            f"{name} {gibibytes(count)}" for name, count in (row.get("parts") or {}).items()
        ),
        "error": lambda row: _error(row.get("error")),
        "timed by": lambda row: row.get("timed_by") or "",
        "commit": commit,
        "row": links.line,
    }
    return markdown(list(columns), ([text(row) for text in columns.values()] for row in sorted(rows, key=row_order)))


def _spread_of(key: str) -> Callable[[Row], str]:
    return lambda row: f"{number(row[key]['p50'])} ({spread(row[key])})" if row.get(key) else ""


def _number_of(key: str) -> Callable[[Row], str]:
    return lambda row: number(row[key]) if row.get(key) else ""


def gibibytes(count: float) -> str:
    return f"{number(count / 2**30)} GiB" if count >= 2**30 else f"{number(count / 2**20)} MiB"


def _error(error: Any) -> str:
    """The largest of a row's relative errors."""
    values = [value for value in (error.values() if isinstance(error, dict) else [error]) if value is not None]
    return f"{max(values):.1e}" if values else ""


def absent_table(rows: Sequence[Row], links: Links) -> str:
    """Providers that could not run, and why; one line for all sizes with the same reason."""
    reasons: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        reasons.setdefault((row["operator"], row["provider"], row["unavailable"]), []).append(row)
    lines = []
    for (operator, provider, reason), found in reasons.items():
        first = "; ".join(dict.fromkeys(filter(None, (describe_shape(found[0]), found[0].get("dtype")))))
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        where = ", ".join(map(links.line, found[:3])) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        lines.append(
            [OPERATORS.get(operator, operator), name_of(provider), first + more, " ".join(reason.split()), where]
        )
    return markdown(("operator", "provider", "asked for", "reason", "rows"), lines)
