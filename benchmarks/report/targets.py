"""The speed and memory that this package sets out to reach, and which stored rows say whether it does.

A target is asked in cases, and each case is answered by one number made of one or more rows, or by the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.report.rows import Row, absent, date, select, size

# What is ours on a GPU, and the same with recompute. The first that was measured at batch 256 answers the first three targets.
CONFIGURATIONS = {"triton 16bit": "triton recompute", "triton": "triton float32 recompute"}
GRAPH = "triton graph"
# What is ours on a CPU: the first that was measured at batch 8.
CPU_CONFIGURATIONS = ("composed 16bit compiled", "composed compiled", "composed")

OFFICIAL = ("reference",)
OFFICIAL_COMPILED = ("official compiled", "official max-autotune")
OFFICIAL_GRAPH = ("official compiled graph",)
BEST_COMPOSED = ("best composed",)
ATTENTION_PEERS = ("sdpa flash", "sdpa cudnn", "sdpa efficient", "flex")
VIT_MAE = ("vit-mae compiled",)


@dataclass(frozen=True)
class Case:
    """One question of a target and its answer: a value made of rows, ours first; or None and why."""

    name: str
    value: float | None
    sources: tuple[Row, ...] = ()
    why_not: str = ""


# Answers a target's cases from the rows of one device.
Measure = Callable[[Sequence[Row]], Iterator[Case]]


@dataclass(frozen=True)
class Target:
    """What shall be reached: at least ``floor``, better ``goal``, in ``unit``, on a "cuda" device or the "cpu".

    ``threads``: the number of CPU threads that it is about.
    """

    name: str
    floor: float
    goal: float
    unit: str
    measure: Measure
    better: Literal["higher", "lower"] = "higher"
    device: Literal["cuda", "cpu"] = "cuda"
    threads: int | None = None

    def cases(self, rows: Sequence[Row]) -> list[Case]:
        """The cases as these rows answer them; rows of models of other than published sizes do not count."""
        return list(self.measure([row for row in rows if not row.get("overrides") and _image(row) in ([], [224, 224])]))

    def verdict(self, value: float | None) -> str:
        """ "goal", "floor" and by how much the goal is missed, "below floor by x%", or "not measured"."""
        if value is None:
            return "not measured"
        if self._reaches(value, self.goal):
            return "goal"
        if self._reaches(value, self.floor):
            return f"floor, goal missed by {self._missed(value, self.goal)}"
        return f"below floor by {self._missed(value, self.floor)}"

    def worst(self, cases: Sequence[Case]) -> Case | None:
        """The case that decides: the worst measured one; None where nothing was measured."""
        found = [(case.value, case) for case in cases if case.value is not None]
        decides = min if self.better == "higher" else max
        return decides(found, key=lambda pair: pair[0])[1] if found else None

    def in_unit(self, value: float) -> str:
        """The value as it is printed: 3.5x, 45%, 30 s."""
        return f"{value:.0f}{self.unit}" if value >= 100 else f"{value:.3g}{self.unit}"

    def _reaches(self, value: float, mark: float) -> bool:
        return value >= mark if self.better == "higher" else value <= mark

    def _missed(self, value: float, mark: float) -> str:
        percent = 100 * abs(value / mark - 1)
        return f"{percent:.0f}%" if percent >= 10 else f"{percent:.2g}%"


def measured(rows: Sequence[Row], **wanted: object) -> Row | str:
    """The one row that has these values; where it is absent or missing, that in words.

    Raises:
        ValueError: several rows answer; the question does not say enough.
    """
    found = select(rows, **wanted)
    with_times = [row for row in found if not absent(row)]
    if len(with_times) > 1:
        places = ", ".join(f"{row['file']}:{row['line']}" for row in with_times)
        raise ValueError(f"targets: {wanted} is answered by several rows: {places}")
    if with_times:
        return with_times[0]
    if found:
        return f"{wanted['provider']}: {found[0]['unavailable']}"
    return f"no row of {wanted['provider']}"


def fastest(rows: Sequence[Row], providers: Sequence[str], **wanted: object) -> Row | str:
    """The row of the fastest of these providers; where all lack, why."""
    found = [measured(rows, provider=provider, **wanted) for provider in providers]
    present = [row for row in found if isinstance(row, dict)]
    return min(present, key=lambda row: row["ms"]["p50"]) if present else "; ".join(map(str, found))


def times_faster(ours: Row, peer: Row) -> float | str:
    """How many times faster ours is than the peer, from ratios to the baseline that both were timed in turns with.

    Times of different runs are never divided: clocks drift between runs, and ratios to the same baseline do not.
    """
    same_baseline = ours.get("baseline") == peer.get("baseline")
    if same_baseline and ours.get("ratio") and peer.get("ratio"):
        return ours["ratio"]["p50"] / peer["ratio"]["p50"]
    if date(ours) and date(ours) == date(peer):
        return peer["ms"]["p50"] / ours["ms"]["p50"]
    return f"{ours['provider']} and {peer['provider']} come from different runs without a common baseline"


def case(name: str, value: Callable[..., float | str], *sources: Row | str) -> Case:
    """The case's value, a function of its rows; or why a row, or the value, is lacking."""
    lacking = [source for source in sources if isinstance(source, str)]
    if lacking:
        return Case(name, None, why_not="; ".join(dict.fromkeys(lacking)))
    rows = tuple(source for source in sources if isinstance(source, dict))
    found = value(*rows)
    return Case(name, None, rows, found) if isinstance(found, str) else Case(name, found, rows)


STEP = {"operator": "training_step", "model": "crate_mae_base", "mode": "forward+backward", "dtype": "bfloat16"}


def _image(row: Row) -> list[int]:
    shape = row.get("shape")
    return shape[2:] if isinstance(shape, list) else []


def configuration(rows: Sequence[Row], known: Iterable[str] = CONFIGURATIONS, batch: int = 256) -> str:
    """The provider that is ours: the first of the known ones that was measured at this batch, or the first of all."""
    found = {row["provider"] for row in select(rows, **STEP, batch=batch) if not absent(row)}
    return next((provider for provider in known if provider in found), next(iter(known)))


def step_against(
    peers: Sequence[str], batches: Sequence[int], provider: str | None = None, dtype: str = "bfloat16"
) -> Measure:
    """The training step of CRATE-MAE-Base: ours, ``configuration`` if None, against the fastest of the peers."""

    def measure(rows: Sequence[Row]) -> Iterator[Case]:
        ours = provider or configuration(rows)
        for batch in batches:
            wanted = {**STEP, "dtype": dtype, "batch": batch}
            # ViT-MAE's rows bear their own model's name.
            peer = {key: value for key, value in wanted.items() if key != "model" or peers != VIT_MAE}
            yield case(
                f"batch {batch}", times_faster, measured(rows, provider=ours, **wanted), fastest(rows, peers, **peer)
            )

    return measure


def share_of_matmul(rows: Sequence[Row]) -> Iterator[Case]:
    """A step's roofline is the product rate that the same process measured; its FLOPs are the least."""
    step = measured(rows, provider=configuration(rows), **STEP, batch=256)
    yield case("batch 256", lambda ours: ours.get("roofline_percent") or "roofline_percent is not in the row", step)


def product_ceiling(rows: Sequence[Row], dtype: str = "bfloat16") -> Row | str:
    """The row of the large product that the device was measured to reach; the newest, and of this dtype if it says."""
    found = [row for row in select(rows, operator="ceilings", mode="product") if row.get("dtype") in (None, dtype)]
    return max(found, key=date) if found else "no row of the large product"


def copy_ceiling(rows: Sequence[Row]) -> Row | str:
    found = [row for row in select(rows, operator="ceilings", mode="copy") if row.get("gigabytes_per_second")]
    return max(found, key=date) if found else "no row of the large copy"


def memory(mode: str, **sizes: int) -> dict[str, object]:
    return {"operator": "memory", "model": "crate_mae_base", "mode": mode, "dtype": "bfloat16", **sizes}


def peak_memory(recompute: bool) -> Measure:
    def measure(rows: Sequence[Row]) -> Iterator[Case]:
        provider = CONFIGURATIONS[configuration(rows)] if recompute else configuration(rows)
        wanted = memory("peak", batch=256)
        ours, official = (measured(rows, provider=name, **wanted) for name in (provider, *OFFICIAL))
        yield case("batch 256", lambda ours, theirs: 100 * ours["peak_bytes"] / theirs["peak_bytes"], ours, official)

    return measure


def largest_batch(rows: Sequence[Row]) -> Iterator[Case]:
    ours = configuration(rows)
    for name, provider in (("default", ours), ("with recompute", CONFIGURATIONS[ours])):
        found = [measured(rows, provider=each, **memory("largest batch")) for each in (provider, *OFFICIAL)]
        yield case(name, lambda ours, theirs: ours["shape"][0] / theirs["shape"][0], *found)


def price_of_recomputing(rows: Sequence[Row]) -> Iterator[Case]:
    ours = configuration(rows)
    again, kept = (measured(rows, provider=name, **STEP, batch=256) for name in (CONFIGURATIONS[ours], ours))
    yield case("batch 256", lambda again, kept: times_faster(kept, again), again, kept)


def largest_against(rows: Sequence[Row], peers: Sequence[str], name: str, wanted: Mapping[str, object]) -> Case:
    """Ours against the fastest of the peers, on the largest tensor that ours was measured on."""
    found = [row for row in select(rows, **wanted, provider="triton") if not absent(row)]
    if not found:
        return case(name, times_faster, "no row of triton")
    shape = max(found, key=lambda row: (size(row, "batch"), size(row, "width")))["shape"]
    ours = measured(rows, **wanted, shape=shape, provider="triton")
    return case(name, times_faster, ours, fastest(rows, peers, **wanted, shape=shape))


def attention(mode: str, tokens: Sequence[int], head_dims: Sequence[int], summed: bool = False) -> Measure:
    """Shared-QKV attention against the fastest of SDPA's backends and FlexAttention, in bfloat16."""
    peers = [peer + SUMMED for peer in ATTENTION_PEERS] if summed else ATTENTION_PEERS

    def measure(rows: Sequence[Row]) -> Iterator[Case]:
        for count in tokens:
            for head_dim in head_dims:
                wanted = {
                    "operator": "attention",
                    "mode": mode,
                    "dtype": "bfloat16",
                    "tokens": count,
                    "head_dim": head_dim,
                }
                yield largest_against(rows, peers, f"{count} tokens, d = {head_dim}", wanted)

    return measure


# After the name of an attention peer: its backward with dq + dk + dv added up, as one tensor's gradient must be.
SUMMED = " summed"

ISTA = {"operator": "ista", "mode": "forward+backward", "dtype": "bfloat16", "tokens": 197, "width": 768}


def ista_against(peers: Sequence[str]) -> Measure:
    def measure(rows: Sequence[Row]) -> Iterator[Case]:
        yield largest_against(rows, peers, "197 tokens, width 768", ISTA)

    return measure


def ista_share_of_products(rows: Sequence[Row]) -> Iterator[Case]:
    for found in ista_against(("products",))(rows):
        yield Case(found.name, None if found.value is None else 100 * found.value, found.sources, found.why_not)


def first_step(rows: Sequence[Row]) -> Iterator[Case]:
    wanted = {"operator": "training_step", "model": "crate_mae_base", "mode": "first step"}
    found = [row for row in select(rows, **wanted) if row["provider"] in CONFIGURATIONS and not absent(row)]
    if not found:
        yield Case("cold cache", None, why_not="no row of a first step")
    for row in found:
        yield Case(f"{row['provider']}, batch {size(row, 'batch')}", row["ms"]["p50"] / 1e3, (row,))


def cpu_step(rows: Sequence[Row]) -> Iterator[Case]:
    two_cores = select(rows, threads=2)
    ours = configuration(two_cores, CPU_CONFIGURATIONS, batch=8)
    for dtype in ("float32", "bfloat16"):
        for found in step_against(OFFICIAL, [8], ours, dtype)(two_cores):
            yield Case(f"{found.name}, {dtype}, {ours}", found.value, found.sources, found.why_not)


def loading(value: Callable[[Row], float]) -> Measure:
    def measure(rows: Sequence[Row]) -> Iterator[Case]:
        wanted = {"operator": "data_loading", "mode": "one process", "provider": "packed"}
        yield case("packed shards", value, measured(select(rows, threads=1), **wanted))

    return measure


LARGE_BATCHES = (64, 128, 256, 512)
HEAD_DIMS = (48, 64, 80, 128)

TARGETS = (
    Target("training step against official eager autocast", 3.5, 5, "x", step_against(OFFICIAL, LARGE_BATCHES)),
    Target("training step against official compiled", 1.6, 2.2, "x", step_against(OFFICIAL_COMPILED, LARGE_BATCHES)),
    Target("training step against best composed", 1.2, 1.4, "x", step_against(BEST_COMPOSED, LARGE_BATCHES)),
    Target("share of the measured matmul rate, least FLOPs", 45, 60, "%", share_of_matmul),
    Target("peak memory against official eager", 30, 23, "%", peak_memory(recompute=False), better="lower"),
    Target("peak memory with recompute", 18, 13, "%", peak_memory(recompute=True), better="lower"),
    Target("largest batch against official eager", 4, 6, "x", largest_batch),
    Target("recompute's price in time", 1.2, 1.1, "x", price_of_recomputing, better="lower"),
    Target("attention, 197 tokens, forward", 1.2, 1.6, "x", attention("forward", [197], HEAD_DIMS)),
    Target("attention, 197 tokens, backward", 1.5, 2.2, "x", attention("backward", [197], HEAD_DIMS)),
    Target(
        "attention, 197 tokens, backward, peers summing", 1.5, 2.2, "x", attention("backward", [197], HEAD_DIMS, True)
    ),
    Target("attention, longer, forward", 1.0, 1.2, "x", attention("forward", [785, 3137], [64])),
    Target("attention, longer, backward", 1.0, 1.2, "x", attention("backward", [785, 3137], [64])),
    Target("attention, longer, backward, peers summing", 1.0, 1.2, "x", attention("backward", [785, 3137], [64], True)),
    Target("ISTA against the official three products, eager", 2.5, 3.5, "x", ista_against(OFFICIAL)),
    Target("ISTA against the official three products, compiled", 2.0, 2.7, "x", ista_against(OFFICIAL_COMPILED)),
    Target("ISTA: cuBLAS's least products over ours", 75, 90, "%", ista_share_of_products),
    Target(
        "small batches, CUDA graphs, against official compiled", 1.0, 1.4, "x", step_against(OFFICIAL_GRAPH, (1, 8), GRAPH)
    ),
    Target("images/s against ViT-MAE-Base, compiled", 0.9, 1.1, "x", step_against(VIT_MAE, [256])),
    Target("first step, cold", 30, 15, " s", first_step, better="lower"),
    Target("training step on two cores against the official order", 1.3, 1.6, "x", cpu_step, device="cpu", threads=2),
    Target(
        "images a second of one core, of what Pillow alone decodes", 0.6, 0.8, "x",
        loading(lambda row: row["ratio"]["p50"]), device="cpu", threads=1,
    ),
    Target(
        "images a second of one core", 700, 1000, " images/s",
        loading(lambda row: row["images_per_second"]), device="cpu", threads=1,
    ),
)  # fmt: skip
