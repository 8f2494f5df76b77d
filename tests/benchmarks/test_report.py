"""What is done with results: the newest row counts, verdicts follow from rows, no number of the README is without its line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import targets
from benchmarks.kernels.operators import OPERATORS as kernels
from benchmarks.memory import SAVED_BY
from benchmarks.report import __main__ as command
from benchmarks.report import tables
from benchmarks.report.plots import plan, save
from benchmarks.report.rows import by_device, newest, read
from benchmarks.report.tables import BEGIN, END, number

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
    return {case.name: case.value for case in target.measure(numbered(rows))}


@pytest.fixture
def place(tmp_path: Path) -> dict[str, Path]:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    return {"results": tmp_path / "results", "readme": readme}


def run(place: dict[str, Path], *arguments: str) -> int:
    return command.main(["--results", str(place["results"]), "--readme", str(place["readme"]), *arguments])


def test_what_is_committed_is_what_the_results_say(capsys):
    assert command.main(["--check"]) == 0, capsys.readouterr().out


def test_every_link_of_the_readme_leads_to_a_line_with_its_number():
    part = (ROOT / "README.md").read_text().partition(BEGIN)[2].partition(END)[0]
    links = re.findall(r"\[([^]]*)\]\(([^)#]*\.jsonl)#L(\d+)\)", part)
    assert links
    for text, file, line in links:
        row = json.loads((ROOT / file).read_text().splitlines()[int(line) - 1])
        assert not row["dirty"]
        if re.fullmatch(r"[0-9.]+(; .*)?", text):  # milliseconds, and perhaps a ratio with its spread; or images/s
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
    of_one, of_two = place["readme"].read_text().split("**Some CPU, 2 threads**")
    assert "**Some CPU, 1 threads**" in of_one and "training step" not in of_one and speed not in of_two
    assert "| packed shards | one process | [900](results/cpu/rows.jsonl#L2) | 0.6 (0.54 to 0.66) | 9 JPEGs |" in of_one
    assert f"| {speed} | 700 images/s | 1000 images/s | packed shards: [900 images/s]" in of_one


def test_an_absent_peer_is_named_with_its_reason():
    rows = [step("triton", 5, 2), lacking(step("best composed", 1, 1), "no C compiler")]
    (found,) = targets.step_against(targets.BEST_COMPOSED, [256])(numbered(rows))
    assert found.value is None and found.why_not == "best composed: no C compiler"


def test_every_operator_has_a_name_in_words():
    assert tables.OPERATORS.keys() > kernels.keys()


def test_report_and_readme(place, capsys):
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
    readme = place["readme"].read_text()
    assert readme.startswith("before\n") and readme.endswith("\nafter\n")
    assert "[80.0; 5.00x (4.50 to 5.50)](results/nvidia_h200/steps.jsonl#L2)" in readme
    assert "**NVIDIA H200**" in readme and "`0123456`" in readme and "on a GPU yet" not in readme

    capsys.readouterr()
    assert run(place, "--check") == 0
    assert capsys.readouterr().out.endswith(f"{place['readme']}: what the results say\n")
    place["readme"].write_text(readme.replace("[80.0", "[79.0"))
    assert run(place, "--check") == 1
    assert capsys.readouterr().out.startswith(f"{place['readme']} is not what the results say")


def test_rows_of_a_dirty_tree_stay_out_of_the_readme(place, capsys):
    clean = step("triton", 90, 4)
    dirty = step("triton", 10, 40, dirty=True, date="2026-11-23T00:00:00+00:00")
    folder = write(place["results"] / "h200", [step("reference", 400, 1), clean, dirty])
    assert run(place) == 0
    assert (
        "rows measured on a dirty tree, refused for the README: 1 (1 in rows.jsonl, first in line 3)"
        in capsys.readouterr().out
    )
    assert "#L2" in place["readme"].read_text() and "#L3" not in place["readme"].read_text()
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
    readme = place["readme"].read_text()
    assert (
        "| official order, eager | [1000 MiB](results/cpu/rows.jsonl#L1) | [1000 MiB](results/cpu/rows.jsonl#L3) |"
        in readme
    )
    assert "[104 MiB; 10.4%](results/cpu/rows.jsonl#L2)" in readme and "Nothing has been measured on a GPU" in readme


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
    readme = place["readme"].read_text()
    parts = "| parameters | gradients | AdamW | whole layers | images, constants |"
    assert f"{parts} saved by triton; sum | saved by triton, 16-bit stream, recompute; sum |" in readme
    whole = "| 1.00 MiB | 1.00 MiB | 3.00 MiB |  |  | 70.0 MiB; [75.0 MiB](results/cpu/rows.jsonl#L4) |"
    assert f"| `crate_mae_base`, batch 64, 224 x 224 px | one process; DDP, 8 ranks {whole} 30.0 MiB; " in readme
    assert "| FSDP2, 8 ranks | 0.5 MiB |  |  | 2.00 MiB | 1.50 MiB | 70.0 MiB; " in readme
    assert "Nothing has been measured on a GPU" in readme


def test_one_device_can_be_asked_for(place):
    for name in ("one", "two"):
        write(place["results"] / name, [step("triton", 90, 4)])
    assert run(place, "--device", "two") == 0
    assert [path.parent.name for path in place["results"].glob("*/report.md")] == ["two"]
    with pytest.raises(SystemExit, match="has results of: one, two"):
        run(place, "--device", "three")


def test_a_readme_without_markers_is_refused(place):
    write(place["results"] / "h200", [step("triton", 90, 4)])
    place["readme"].write_text("nothing here")
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
    assert set(plots) == {
        "ratios-training_step-bfloat16", "ratios-attention-bfloat16", "roofline", "time-batch-training_step",
        "time-batch-attention", "time-tokens-attention", "memory-batch-training_step", "memory-batch-attention",
        "memory-tokens-attention",
    }  # fmt: skip
    (along_tokens,) = plots["time-tokens-attention"].panels.values()
    assert {(row["shape"]["batch"], row["shape"]["tokens"]) for row in along_tokens} == {(64, 197), (4, 3137)}
    (bars,) = plots["ratios-attention-bfloat16"].panels.values()
    assert {row["shape"]["batch"] for row in bars} == {64, 4} and "reference" not in {row["provider"] for row in bars}


def test_the_same_rows_draw_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    folder = write(tmp_path / "h200", many_rows())
    (results,) = by_device(folder, read(folder))
    plots = [plot for plot in plan(results) if plot.name.endswith(("roofline", "tokens-attention", "bfloat16"))]
    first, second = (save(plots, results, tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == [f"{plot.name}.{ending}" for plot in plots for ending in ("png", "svg")]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    svg = (tmp_path / "a" / "nvidia-h200-roofline.svg").read_text()
    assert "NVIDIA H200" in svg and "TFLOP/s" in svg and "<dc:date>" not in svg
