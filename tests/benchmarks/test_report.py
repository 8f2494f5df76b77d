"""What is done with results: the newest row counts, verdicts follow from rows, no number of the README is without its line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels.masks import MASKS
from benchmarks.kernels.operators import OPERATORS as kernels
from benchmarks.records import SAVED_BY
from benchmarks.report import __main__ as command
from benchmarks.report import tables, targets
from benchmarks.report.pages import begin, end
from benchmarks.report.plots import plan, save
from benchmarks.report.rows import by_device, newest, read
from benchmarks.report.tables import number

ROOT = Path(__file__).resolve().parents[2]

GPU = dict(device="NVIDIA H200", driver="580.1", torch="2.13.0", triton="3.9.0", python="3.12.1", threads=16)
CPU = dict(device="Some CPU", driver=None, torch="2.13.0+cpu", triton="3.9.0", python="3.12.1", threads=2)
COMMIT = dict(commit="0123456789abcdef", dirty=False, date="2026-11-22T10:00:00+00:00", seed=0)


def spread(value: float) -> dict[str, float]:
    return {"p20": 0.9 * value, "p50": value, "p80": 1.1 * value}


def step(provider: str, ms: float, ratio: float, batch: int = 256, **values: Any) -> dict[str, Any]:
    row = dict(
        operator="training_step", model="crate_mae_base", overrides={}, shape=[batch, 3, 224, 224], dtype="bfloat16"
    )
    row |= dict(mode="forward+backward", provider=provider, baseline="reference", ms=spread(ms), ratio=spread(ratio))
    return {**row, **COMMIT, **GPU, **values}


def kernel(operator: str, provider: str, ratio: float, mode: str, **values: Any) -> dict[str, Any]:
    shape = dict(batch=64, tokens=197, width=768, heads=12)
    shape |= {name: values.pop(name) for name in tuple(shape) if name in values}
    row = dict(operator=operator, shape=shape, dtype="bfloat16", mode=mode, provider=provider, baseline="reference")
    return {**row, "ms": spread(1 / ratio), "ratio": spread(ratio), **COMMIT, **GPU, **values}


def memory(provider: str, mode: str = "peak", batch: int = 256, **values: Any) -> dict[str, Any]:
    return step(provider, 0, 0, batch) | {"operator": "memory", "mode": mode, "ms": None, "ratio": None, **values}


def lacking(row: dict[str, Any], reason: str) -> dict[str, Any]:
    return row | {"ms": None, "ratio": None, "unavailable": reason}


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def numbered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"file": "rows.jsonl", "line": line} for line, row in enumerate(rows, start=1)]


def answers(name: str, rows: list[dict[str, Any]]) -> dict[str, float | None]:
    (target,) = (target for target in targets.TARGETS if target.name == name)
    return {case.name: case.value for case in target.cases(numbered(rows))}


@pytest.fixture
def place(tmp_path: Path) -> dict[str, Path]:
    found = {"results": tmp_path / "results", "readme": tmp_path / "README.md", "page": tmp_path / "results.md"}
    for option, name in (("readme", "headline"), ("page", "results")):
        found[option].write_text(f"before\n{begin(name)}\n{end(name)}\nafter\n")
    return found


def run(place: dict[str, Path], *arguments: str) -> int:
    options = [word for option, path in place.items() for word in (f"--{option}", str(path))]
    return command.main([*options, *arguments])


def test_what_is_committed_is_what_the_results_say(capsys):
    assert command.main(["--check"]) == 0, capsys.readouterr().out


def test_every_stored_plot_is_shown_and_every_shown_plot_is_stored():
    for report in (ROOT / "benchmarks" / "results").glob("*/report.md"):
        shown = set(re.findall(r"!\[[^]]*\]\((plots/[^)]*)\)", report.read_text()))
        assert shown == {f"plots/{path.name}" for path in report.parent.glob("plots/*")}


@pytest.mark.parametrize("option", command.PAGES)
def test_every_link_of_a_page_leads_to_a_line_with_its_number(option):
    page, name, _ = command.PAGES[option]
    part = page.read_text().partition(begin(name))[2].partition(end(name))[0]
    links = re.findall(r"\[([^]]*)\]\(([^)#]*\.jsonl)#L(\d+)\)", part)
    assert links
    for text, file, line in links:
        row = json.loads((page.parent / file).read_text().splitlines()[int(line) - 1])
        assert not row["dirty"]
        if re.fullmatch(r"[0-9.]+(; .*| ms| images/s)?", text):  # perhaps with a ratio and its spread
            of_loading = row["operator"] == "data_loading"
            values = [row["images_per_second"]] if of_loading else [row["ms"]["p50"]]
            values += [row["ratio"][key] for key in ("p50", "p20", "p80") if not of_loading]
            found = re.findall(r"[0-9]+(?:\.[0-9]+)?", text)
            assert found == [number(value) for value in values][: len(found)]
    without_links = re.sub(r"\[[^]]*\]\([^)]*\)", "", part)
    assert not re.search(r"\d+(\.\d+)? ?ms", without_links)


def test_the_newest_row_counts():
    old, new = step("triton", 9, 1), step("triton", 5, 2, date="2026-11-23T00:00:00+00:00")
    other = step("triton", 7, 1, dtype="float16")
    assert newest([new, old, other]) == [new, other]
    assert newest([old, step("triton", 4, 3)])[0]["ms"]["p50"] == 4  # of the same date the later line


def test_the_largest_batch_found_replaces_another():
    old, new = memory("reference", "largest batch", 400), memory("reference", "largest batch", 500)
    assert newest([old, new | {"date": "2026-11-24T00:00:00+00:00"}])[0]["shape"][0] == 500


def test_a_peer_once_absent_is_present_when_it_was_measured_later():
    absent = lacking(kernel("attention", "flex", 1, "forward"), "not built") | {"mode": None}
    measured = kernel("attention", "flex", 2, "forward", date="2026-11-23T00:00:00+00:00")
    assert newest([absent, measured]) == [measured]
    assert newest([measured | {"date": "2026-11-20T00:00:00+00:00"}, absent])[-1] == absent


def test_devices_of_one_folder_stay_apart(tmp_path):
    folder = write(tmp_path / "cpu", [step("composed", 5, 2, **CPU), step("composed", 6, 2, **{**CPU, "threads": 16})])
    assert [each.device for each in by_device(folder, read(folder))] == ["Some CPU, 16 threads", "Some CPU, 2 threads"]


def test_an_absent_kernel_does_not_make_a_cpu_a_gpu(tmp_path):
    absent = lacking(step("triton", 1, 1, **CPU), "needs a CUDA device")
    (found,) = by_device(tmp_path, [absent, step("composed", 5, 2, **CPU)])
    assert (found.device, found.on_cuda) == ("Some CPU, 2 threads", False)
    (found,) = by_device(tmp_path, [step(provider, 5, 2, driver=None) for provider in ("reference", "triton")])
    assert (found.device, found.on_cuda) == ("NVIDIA H200", True)


@pytest.mark.parametrize("line", ["{", "[1]", '{"operator": "ista"}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    folder = write(tmp_path / "device", [step("triton", 1, 1)])
    (folder / "broken.jsonl").write_text(f"{json.dumps(step('triton', 1, 1))}\n{line}\n")
    with pytest.raises(ValueError, match=r"broken\.jsonl:2: expected"):
        read(folder)


def test_verdicts():
    higher = targets.Target("speed", 1.5, 2, "x", lambda rows: iter(()))
    assert [higher.verdict(value) for value in (None, 2, 1.5, 1.4)] == [
        "not measured",
        "goal",
        "floor, goal missed by 25%",
        "below floor by 6.7%",
    ]
    lower = targets.Target("memory", 30, 20, "%", lambda rows: iter(()), better="lower")
    assert [lower.verdict(value) for value in (20, 30, 33)] == [
        "goal",
        "floor, goal missed by 50%",
        "below floor by 10%",
    ]
    cases = [targets.Case("a", 25.0), targets.Case("b", None), targets.Case("c", 40.0)]
    assert lower.worst(cases) is cases[2] and higher.worst(cases) is cases[0] and higher.worst(cases[1:2]) is None


def test_floors_and_goals_are_the_right_way_round():
    for target in targets.TARGETS:
        assert (target.floor < target.goal) == (target.better == "higher"), target.name
        assert target.verdict(target.goal) == "goal"


def test_steps_are_compared_with_the_fastest_of_the_peers():
    rows = [
        step("reference", 400, 1),
        step("official compiled", 200, 2),
        step("official max-autotune", 160, 2.5),
        step("best composed", 125, 3.2),
        step("triton", 90, 4.4),
        step("triton 16bit", 80, 5),
        step("triton recompute", 92, 4.35),
        step("vit-mae compiled", 100, 4, model="vit_mae_base"),
        step("triton 16bit", 1, 99, overrides={"depth": 1}),
        step("triton 16bit", 1, 99, shape=[256, 3, 32, 32]),
        step("triton 16bit", 1, 99, mode="forward+backward+adamw"),
    ]
    name = "training step against "
    not_measured = {f"batch {batch}": None for batch in (64, 128, 512)}
    assert answers(name + "official eager autocast", rows) == {**not_measured, "batch 256": 5}
    assert answers(name + "official compiled", rows) == {**not_measured, "batch 256": 2}
    assert answers(name + "best composed", rows)["batch 256"] == pytest.approx(5 / 3.2)
    assert answers("recompute's price in time", rows)["batch 256"] == pytest.approx(5 / 4.35)
    assert answers("images/s against ViT-MAE-Base, compiled", rows) == {"batch 256": 1.25}
    without_16bit = [row for row in rows if row["provider"] != "triton 16bit"]
    assert answers(name + "official eager autocast", without_16bit)["batch 256"] == 4.4


def test_times_of_different_runs_are_not_divided():
    ours, peer = step("triton", 10, 3, baseline="other"), step("best composed", 20, 2)
    assert targets.times_faster(ours, peer) == 2  # one run, other baselines
    assert "different runs" in targets.times_faster(ours | {"date": "2026-11-23T00:00:00+00:00"}, peer)
    assert targets.times_faster(step("triton", 99, 3, date="2026-11-23T00:00:00+00:00"), peer) == 1.5


def test_share_of_the_product_rate():
    name = "share of the measured matmul rate, least FLOPs"
    assert answers(name, [step("triton 16bit", 80, 5, roofline_percent=51.0)]) == {"batch 256": 51}
    assert answers(name, [step("triton 16bit", 80, 5)]) == {"batch 256": None}


def test_a_target_names_how_near_to_the_ceilings_of_its_dtype_it_came(place):
    ceiling = dict(operator="ceilings", mode="product", provider="library", ms=spread(1), **COMMIT, **GPU)
    rows = [step("reference", 400, 1), step("triton 16bit", 80, 5, tflops=360.0, gigabytes_per_second=1000.0)]
    rows += [ceiling | dict(dtype="bfloat16", tflops=720.0), ceiling | dict(dtype="float32", tflops=50.0)]
    rows.append(ceiling | dict(dtype="bfloat16", mode="copy", gigabytes_per_second=4000.0))
    write(place["results"] / "h200", rows)
    run(place)
    assert "50% of the product rate, 25% of the copy rate" in (place["results"] / "h200" / "report.md").read_text()


def test_memory_targets():
    rows = [memory(provider, peak_bytes=count) for provider, count in
            {"reference": 1000, "triton 16bit": 220, "triton recompute": 150}.items()]  # fmt: skip
    rows += [memory("reference", "largest batch", 400), memory("triton 16bit", "largest batch", 2000)]
    assert answers("peak memory against official eager", rows) == {"batch 256": 22}
    assert answers("peak memory with recompute", rows) == {"batch 256": 15}
    assert answers("largest batch against official eager", rows) == {"default": 5, "with recompute": None}


def test_attention_is_compared_at_each_head_width_with_the_best_backend():
    rows = [kernel("attention", provider, ratio, "backward", width=12 * 64) for provider, ratio in
            {"reference": 1, "triton": 6, "sdpa flash": 3, "flex": 4, "flex summed": 2, "products": 9}.items()]  # fmt: skip
    rows.append(kernel("attention", "triton", 50, "backward", batch=1))
    found = answers("attention, 197 tokens, backward", rows)
    assert found == {f"197 tokens, d = {d}": 1.5 if d == 64 else None for d in (48, 64, 80, 128)}
    assert answers("attention, 197 tokens, backward, peers summing", rows)["197 tokens, d = 64"] == 3


def test_ista_targets():
    rows = [kernel("ista", provider, ratio, "forward+backward") for provider, ratio in
            {"reference": 1, "official compiled": 1.5, "triton": 3, "products": 3.6}.items()]  # fmt: skip
    case = "197 tokens, width 768"
    assert answers("ISTA against the official three products, eager", rows) == {case: 3}
    assert answers("ISTA against the official three products, compiled", rows) == {case: 2}
    assert answers("ISTA: cuBLAS's least products over ours", rows)[case] == pytest.approx(100 * 3 / 3.6)


def test_small_batches_under_graphs_and_the_first_step():
    rows = [step("official compiled graph", 4, 2, 8), step("triton graph", 2, 4, 8)]
    assert answers("small batches, CUDA graphs, against official compiled", rows) == {"batch 1": None, "batch 8": 2}
    assert answers("first step, cold", [step("triton", 12000, 1, mode="first step")]) == {"triton, batch 256": 12}


def test_the_step_on_a_cpu_counts_on_two_cores_alone():
    name = "training step on two cores against the official order"
    rows = [step("reference", 4, 1, 8, **CPU), step("composed", 2, 2, 8, **CPU)]
    assert answers(name, rows) == {"batch 8, float32, composed": None, "batch 8, bfloat16, composed": 2}
    assert list(answers(name, [row | {"threads": 4} for row in rows]).values()) == [None, None]
    rows.append(step("composed compiled", 1.6, 2.5, 8, **CPU))
    assert answers(name, rows)["batch 8, bfloat16, composed compiled"] == 2.5, (
        "one configuration, compiled where it was"
    )


def loaded(provider: str, speed: float, ratio: float, **values: Any) -> dict[str, Any]:
    row = dict(
        operator="data_loading", mode="one process", provider=provider, shape=[64, 3, 224, 224], baseline="pillow"
    )
    row |= dict(dtype="uint8", data="9 JPEGs", images_per_second=speed, ratio=spread(ratio), ms=spread(1e3 / speed))
    return {**row, **COMMIT, **CPU, "threads": 1, **values}


def test_data_loading_counts_on_one_core_alone_and_is_shown(place):
    share, speed = "images a second of one core, of what Pillow alone decodes", "images a second of one core"
    rows = [loaded("pillow", 1500, 1), loaded("packed", 900, 0.6), loaded("packed", 1700, 1.1, mode="2 workers")]
    assert answers(share, rows) == {"packed shards": 0.6}
    assert answers(speed, rows) == {"packed shards": 900}
    assert answers(speed, [row | {"threads": 2} for row in rows]) == {"packed shards": None}
    write(place["results"] / "cpu", [*rows, step("reference", 4, 1, 8, **CPU)])
    assert run(place) == 0
    of_one, of_two = place["page"].read_text().split("**Some CPU, 2 threads**")
    assert "**Some CPU, 1 threads**" in of_one and "training step" not in of_one and speed not in of_two
    assert "| packed shards | one process | [900](results/cpu/rows.jsonl#L2) | 0.6 (0.54 to 0.66) | 9 JPEGs |" in of_one
    assert f"| {speed} | 700 images/s | 1000 images/s | packed shards: [900 images/s]" in of_one


def test_an_absent_peer_is_named_with_its_reason():
    rows = [step("triton", 5, 2), lacking(step("best composed", 1, 1), "no C compiler")]
    (found,) = targets.step_against(targets.BEST_COMPOSED, [256])(numbered(rows))
    assert found.value is None and found.why_not == "best composed: no C compiler"


def test_every_operator_has_a_name_in_words():
    assert tables.OPERATORS.keys() > kernels.keys() | {f"attention_{mask}" for mask in MASKS}


def test_report_and_page(place, capsys):
    write(
        place["results"] / "nvidia_h200",
        [
            step("reference", 400, 1),
            step("triton 16bit", 80, 5),
            lacking(step("best composed", 1, 1), "no C compiler"),
            kernel("attention", "triton", 2, "forward"),
        ],
        "steps.jsonl",
    )
    write(place["results"] / "ahead_of_time", [{"kernel": "not a row of ours"}])
    assert run(place, "--check") == 1
    assert run(place) == 0
    report = (place["results"] / "nvidia_h200" / "report.md").read_text()
    eager = "| training step against official eager autocast | batch 256 | 3.5x | 5x | 5x | goal |"
    assert eager in report and "[steps.jsonl:2](steps.jsonl#L2)" in report
    assert "| best composed, compiled | batch 256, 224 x 224 px; bfloat16 | no C compiler |" in report
    assert "| attention, 197 tokens, forward | 197 tokens, d = 64 | 1.2x | 1.6x |  | not measured |" in report
    page = place["page"].read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n")
    assert "[80.0; 5.00x (4.50 to 5.50)](results/nvidia_h200/steps.jsonl#L2)" in page
    assert "**NVIDIA H200**" in page and "`0123456`" in page and "on a GPU yet" not in page

    capsys.readouterr()
    assert run(place, "--check") == 0
    assert capsys.readouterr().out.endswith(f"{place['page']}: what the results say\n")
    place["page"].write_text(page.replace("[80.0", "[79.0"))
    assert run(place, "--check") == 1
    assert capsys.readouterr().out.startswith(f"{place['page']} is not what the results say")


def test_rows_of_a_dirty_tree_stay_out_of_the_pages(place, capsys):
    clean = step("triton", 90, 4)
    dirty = step("triton", 10, 40, dirty=True, date="2026-11-23T00:00:00+00:00")
    folder = write(place["results"] / "h200", [step("reference", 400, 1), clean, dirty])
    assert run(place) == 0
    assert (
        "rows measured on a dirty tree, refused for README.md and docs/results.md: 1 (1 in rows.jsonl, first in line 3)"
        in capsys.readouterr().out
    )
    assert "#L2" in place["page"].read_text() and "#L3" not in place["page"].read_text()
    assert "0123456 (dirty)" in (folder / "report.md").read_text()


def test_what_layers_keep_is_of_no_device(place):
    rows = [
        memory(
            provider,
            mode=mode,
            shape={"batch": 256, "tokens": 197, "width": 768},
            peak_bytes=count * 2**20,
            driver=None,
        )
        for mode in SAVED_BY.values()
        for provider, count in (("reference", 1000), ("triton recompute", 104))
    ]
    write(place["results"] / "cpu", rows)
    assert run(place) == 0
    page = place["page"].read_text()
    assert (
        "| official order, eager | [1000 MiB](results/cpu/rows.jsonl#L1) | [1000 MiB](results/cpu/rows.jsonl#L3) |"
        in page
    )
    assert "[104 MiB; 10.4%](results/cpu/rows.jsonl#L2)" in page and "Nothing has been measured on a GPU" in page


def test_what_ranks_need_is_of_no_device(place):
    alone = {"parameters": 2**20, "gradients": 2**20, "means": 3 * 2**20}
    rows = [
        memory(provider, mode=mode, batch=64, operator="memory_per_rank", driver=None)
        | {"parts": parts | {"saved": saved * 2**20}, "peak_bytes": (saved + 5) * 2**20}
        for provider, saved in (("triton recompute", 30), ("triton", 70))
        for mode, parts in {
            "one process": alone,
            "DDP, 8 ranks": alone,
            "FSDP2, 8 ranks": {"parameters": 2**19, "whole": 2**21, "batch": 2**20, "constants": 2**19},
        }.items()
    ]
    write(place["results"] / "cpu", rows)
    assert run(place) == 0
    page = place["page"].read_text()
    parts = "| parameters | gradients | AdamW | whole layers | images, constants |"
    assert f"{parts} saved by triton; sum | saved by triton, 16-bit stream, recompute; sum |" in page
    whole = "| 1.00 MiB | 1.00 MiB | 3.00 MiB |  |  | 70.0 MiB; [75.0 MiB](results/cpu/rows.jsonl#L4) |"
    assert f"| `crate_mae_base`, batch 64, 224 x 224 px | one process; DDP, 8 ranks {whole} 30.0 MiB; " in page
    assert "| FSDP2, 8 ranks | 0.5 MiB |  |  | 2.00 MiB | 1.50 MiB | 70.0 MiB; " in page
    assert "Nothing has been measured on a GPU" in page


def headline_of(place: dict[str, Path], rows: list[dict[str, Any]]) -> list[str]:
    write(place["results"] / "some", rows)
    assert run(place) == 0
    lines = [line for line in place["readme"].read_text().splitlines() if line.startswith("| ")]
    return [re.sub(r"\]\([^)]*\)", "]", line) for line in lines[2:]]


def test_the_headline_has_the_largest_batch_against_the_best_of_ours_also_where_it_is_slower(place):
    times = {"reference": 400, "official compiled": 200, "best composed": 50, "triton": 100, "triton 16bit": 80}
    rows = [step(provider, ms, 400 / ms) for provider, ms in times.items()]
    rows += [step("reference", 100, 1, 64), step("triton", 10, 10, 64), lacking(step("composed", 1, 1), "no compiler")]
    rows += [step("reference", 900, 1, dtype="float32"), step("triton", 100, 9, dtype="float32")]
    what = "| NVIDIA H200 | step, batch 256, bfloat16 |"
    assert headline_of(place, rows) == [
        f"{what} [400 ms], official order, eager | [80.0 ms], triton, 16-bit stream | 5.00x | `0123456` |",
        f"{what} [200 ms], official order, compiled | [80.0 ms], triton, 16-bit stream | 2.50x | `0123456` |",
        f"{what} [50.0 ms], best composed, compiled | [80.0 ms], triton, 16-bit stream | 0.625x | `0123456` |",
    ]


def test_the_headline_has_memory_and_loading_whatever_else_there_is(place):
    rows = [step(name, ms, 100 / ms, 8, **CPU) | {"device": f"CPU {count}"} for count in range(9)
            for name, ms in (("reference", 100), ("composed", 50))]  # fmt: skip
    rows += [
        memory(name, SAVED_BY["encoder_layer"], peak_bytes=count * 2**20, driver=None)
        for name, count in {"reference": 900, "triton": 300, "triton recompute": 100}.items()
    ]
    rows += [loaded("torchvision", 500, 0.4), loaded("packed", 1000, 0.8)]
    found = headline_of(place, rows)
    assert len(found) == 8 and all("[100 ms]" in line and "2.00x" in line for line in found[:6])
    assert "[900 MiB], official order, eager | [100 MiB], triton, 16-bit stream, recompute | 9.00x" in found[6]
    assert "[500 images/s], torchvision" in found[7] and "[1000 images/s], packed shards | 2.00x" in found[7]


def test_one_device_can_be_asked_for(place):
    for name in ("one", "two"):
        write(place["results"] / name, [step("triton", 90, 4)])
    assert run(place, "--device", "two") == 0
    assert [path.parent.name for path in place["results"].glob("*/report.md")] == ["two"]
    with pytest.raises(SystemExit, match="has results of: one, two"):
        run(place, "--device", "three")


def test_a_page_without_markers_is_refused(place):
    write(place["results"] / "h200", [step("triton", 90, 4)])
    place["page"].write_text("nothing here")
    with pytest.raises(ValueError, match="expected one line <!-- results: begin -->"):
        run(place)


def test_without_matplotlib_it_says_so(place, capsys, monkeypatch):
    write(place["results"] / "h200", [step("reference", 9, 1), step("triton", 3, 3)])
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert run(place) == 0
    assert "no plots: matplotlib is not installed" in capsys.readouterr().out
    assert (
        "plots/nvidia-h200-ratios-training_step-bfloat16.png" in (place["results"] / "h200" / "report.md").read_text()
    )


def many_rows() -> list[dict[str, Any]]:
    ceiling = dict(operator="ceilings", provider="library", dtype="bfloat16", ms=spread(1), **COMMIT, **GPU)
    rows = [ceiling | dict(mode="product", tflops=700.0), ceiling | dict(mode="copy", gigabytes_per_second=4000.0)]
    rates = dict(tflops=300.0, gigabytes_per_second=1000.0, peak_bytes=2**30)
    for provider, ratio in {"reference": 1, "sdpa flash": 2, "triton": 4, "someone else": 3}.items():
        rows += [step(provider, 80 * batch / ratio, ratio, batch, peak_bytes=2**30 * batch) for batch in (1, 8)]
        for batch, tokens in ((1, 197), (64, 197), (4, 3137)):
            rows.append(kernel("attention", provider, ratio, "forward", batch=batch, tokens=tokens, **rates))
    return rows


def test_plots_follow_from_the_rows(tmp_path):
    folder = write(tmp_path / "h200", many_rows())
    (results,) = by_device(folder, read(folder))
    plots = {plot.name.removeprefix("nvidia-h200-"): plot for plot in plan(results)}
    assert set(plots) == {"ratios-training_step-bfloat16", "ratios-attention-bfloat16", "roofline"}
    (bars,) = plots["ratios-attention-bfloat16"].panels.values()
    assert {row["shape"]["batch"] for row in bars} == {64, 4} and "reference" not in {row["provider"] for row in bars}


def test_the_same_rows_draw_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    folder = write(tmp_path / "h200", many_rows())
    (results,) = by_device(folder, read(folder))
    plots = plan(results)
    first, second = (save(plots, results, tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == [f"{plot.name}.png" for plot in plots]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
