"""The machine's own tiles: the cache, which tile is in force, the search, the command, and ranks that must agree."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.parts import run_while_it_tells
from crate_kernels import tiles, tune
from crate_kernels.products.preparation import prepare
from crate_kernels.products.triton import project
from crate_kernels.tiles import cache, search
from crate_kernels.tiles.products import TABLE

CPU = torch.device("cpu")
KEY = ("project", 4, 4)
SHIPPED = TABLE["default"][KEY]
OTHER = SHIPPED | {"BLOCK_M": 32, "num_warps": 2}


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the cache lies; what this process has read of one is forgotten before and after."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "tiles.json"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cache.tuned.cache_clear()
    yield tmp_path / "tiles.json"
    cache.tuned.cache_clear()


def save(file: Path, tile: dict[str, int] = OTHER, kept=()) -> None:
    tune.save(file, [search.Finding(KEY, SHIPPED, tile, 2.0, 1.0)], kept, CPU, models=["crate_mae_base"])


def selected() -> dict[str, int]:
    return tiles.select(TABLE, CPU, *KEY)


# The cache, and what is in force.


def test_without_a_cache_the_shipped_tiles_are_in_force() -> None:
    assert selected() == SHIPPED


def test_a_cache_goes_before_the_tables_and_is_read_once(file: Path) -> None:
    save(file)
    assert selected() == OTHER
    assert tiles.in_force(CPU)[KEY] == ("cache", OTHER)
    assert tiles.select(TABLE, CPU, "project", 2, 2) == TABLE["default"]["project", 2, 2]  # not in the cache
    file.unlink()
    assert selected() == OTHER


def test_selecting_hands_out_copies(file: Path) -> None:
    save(file)
    selected()["BLOCK_M"] = 1
    assert selected() == OTHER


def test_compiling_for_another_family_leaves_the_cache_aside(file: Path) -> None:
    save(file)
    with tiles.pretend("sm_90"):
        assert selected() == TABLE["sm_90"][KEY]


def test_a_trial_goes_before_the_cache_and_says_what_was_selected(file: Path) -> None:
    save(file)
    tried = SHIPPED | {"num_stages": 1}
    with tiles.trial({KEY: tried}) as asked:
        assert selected() == tried
        with tiles.trial({}) as inner:
            assert selected() == SHIPPED
        assert inner == {KEY: SHIPPED}
    assert asked == {KEY: tried}
    assert selected() == OTHER


@pytest.mark.parametrize("name", ["device", "triton", "crate_kernels", "tables"])
def test_a_cache_made_with_something_else_is_left_aside_aloud(file: Path, name: str) -> None:
    save(file)
    content = json.loads(file.read_text())
    content["for"][name] = "another"
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=f"{file}: tuned for {name} another, not .*crate_kernels.tune"):
        assert selected() == SHIPPED
    with warnings.catch_warnings():  # once a process
        warnings.simplefilter("error")
        assert selected() == SHIPPED


def test_a_changed_table_is_another_table(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.identity(CPU)
    monkeypatch.setitem(TABLE["sm_90"], KEY, OTHER)
    assert cache.identity(CPU)["tables"] != before["tables"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "{}",
        lambda text: text.replace('"for"', '"of"'),
        lambda text: text.replace('"BLOCK_M": 32', '"BLOCK_M": "32"'),
        lambda text: text.replace('"BLOCK_M": 32', '"BLOCK_M": -32'),
        lambda text: text.replace('"key"', '"name"'),
    ],
    ids=["empty", "torn", "a list", "an empty object", "no identity", "text for a number", "negative", "no key"],
)
def test_a_spoilt_cache_is_an_error_that_says_how_to_be_rid_of_it(file: Path, spoil) -> None:
    save(file)
    file.write_text(spoil(file.read_text()))
    with pytest.raises(cache.CacheError, match=rf"{file}: not a readable cache.*Delete the file, or .*--clear"):
        selected()


def test_writing_is_all_or_nothing(file: Path) -> None:
    save(file)
    before = file.read_text()
    with pytest.raises(TypeError):
        cache.write(file, {"for": {}, "tiles": [object()]})
    assert file.read_text() == before
    assert list(file.parent.iterdir()) == [file]


def test_saving_keeps_what_was_not_tuned_and_drops_what_fell_back(file: Path) -> None:
    elsewhere = {"key": ["project", 2, 2], "tile": SHIPPED}
    save(file, kept=[elsewhere, {"key": list(KEY), "tile": SHIPPED}])
    first, second = cache.entries(file, CPU)
    assert first == elsewhere and second["tile"] == OTHER and second["ms"] == 1.0
    assert second["measured"]["models"] == ["crate_mae_base"] and second["measured"]["torch"] == torch.__version__
    save(file, SHIPPED, kept=[elsewhere, second])
    assert cache.entries(file, CPU) == [elsewhere]


def test_the_file_lies_in_the_users_cache_folder_by_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.location(CPU) == tmp_path / "crate_kernels" / "tiles-cpu.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.location(CPU) == tmp_path / "home" / ".cache" / "crate_kernels" / "tiles-cpu.json"


def test_no_two_tables_share_a_key() -> None:
    keys = [key for table in cache.tables().values() for key in {key for of in table.values() for key in of}]
    assert len(keys) == len(set(keys)) > 0


# The search.


def test_neighbours_of_every_shipped_tile_are_new_and_possible() -> None:
    for table in cache.tables().values():
        for tile in (tile for of in table.values() for tile in of.values()):
            found = search.neighbours(tile)
            assert len(found) >= 3 and tile not in found
            for other in found:
                assert other.keys() == tile.keys()
                sides = [value for name, value in other.items() if name.startswith("BLOCK_")]
                assert all(value & (value - 1) == 0 for name, value in other.items() if name != "num_stages")
                assert all(16 <= side <= 256 for side in sides)
                assert 2 <= other["num_warps"] <= 8 and 1 <= other["num_stages"] <= 5


def product(spoil=lambda out, tile: out, seen: list | None = None) -> search.Problem:
    """A real launch of the smallest size; ``spoil`` makes its result wrong for some tiles."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter stands in for the device, and is off where there is one")
    x, operand = torch.randn(20, 32), prepare(torch.randn(32, 24), None, None, torch.float32)

    def run() -> tuple[torch.Tensor, ...]:
        out, _ = project(x, operand, torch.float32)
        if seen is not None:
            seen.append(selected())
        return (spoil(out, selected()),)

    return search.Problem("product", torch.float32, run)


def timer_of(cost, seen: list) -> search.Timer:
    """Launches, and says what ``cost`` says of the tile launched with."""

    def timer(calls):
        times = []
        for call in calls:
            call()
            times.append(cost(seen[-1]))
        return times

    return timer


def find(cost, spoil=lambda out, tile: out, seconds=60.0, **kwargs) -> search.Finding:
    seen: list = []
    return search.search(KEY, SHIPPED, [product(spoil, seen)], timer_of(cost, seen), seconds, **kwargs)


def test_the_search_goes_on_from_the_fastest() -> None:
    found = find(lambda tile: tile["num_warps"] + tile["BLOCK_K"] / 32)
    assert found.tile == SHIPPED | {"num_warps": 2, "BLOCK_K": 16}  # two steps away
    assert (found.shipped_ms, found.ms) == (5.0, 2.5)
    assert not found.rejected and not found.out_of_time and found.tried > 18


@pytest.mark.parametrize(("gain", "kept"), [(0.031, True), (0.029, False)])
def test_a_gain_below_three_percent_changes_nothing(gain: float, kept: bool) -> None:
    target = SHIPPED | {"GROUP": 4}
    found = find(lambda tile: 1 - gain if tile == target else 1.0)
    assert found.tile == (target if kept else SHIPPED)


def test_a_lucky_winner_has_to_win_again() -> None:
    calls = iter(range(10**6))
    found = find(lambda tile: 0.5 if tile["GROUP"] == 4 and next(calls) == 0 else 1.0)
    assert next(calls) > 1
    assert found.tile == SHIPPED


def last_element_wrong(out: torch.Tensor) -> torch.Tensor:
    out[-1, -1] += 0.1
    return out


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (last_element_wrong, "a wrong result"),
        (torch.empty_like, "a wrong result"),  # writes nothing
        (lambda out: out.fill_(float("inf")), "a wrong result"),
        (lambda out: out[1:], "RuntimeError"),
    ],
    ids=["one element", "nothing written", "overflow", "another shape"],
)
def test_a_wrong_candidate_is_rejected_however_fast(wrong, reason: str) -> None:
    heard = []
    found = find(
        lambda tile: 0.1 if tile["GROUP"] == 4 else 0.5 if tile["GROUP"] == 16 else 1.0,
        lambda out, tile: wrong(out) if tile["GROUP"] == 4 else out,
        tell=lambda tile, objection: heard.append((tile, objection)),
    )
    assert found.tile == SHIPPED | {"GROUP": 16}
    assert found.rejected and all(tile["GROUP"] == 4 and reason in why for tile, why in found.rejected)
    assert [pair for pair in heard if pair[1]] == found.rejected and len(heard) == found.tried


def test_a_candidate_that_does_not_compile_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    odd, good = SHIPPED | {"BLOCK_M": 24}, SHIPPED | {"num_stages": 2}
    monkeypatch.setattr(search, "neighbours", lambda tile: [odd, good])
    found = find(lambda tile: 0.1 if tile == odd else 0.9 if tile == good else 1.0)
    assert found.tile == good
    ((tile, why),) = found.rejected
    assert tile == odd and why.startswith("product: ") and "power of 2" in why


def test_a_shipped_tile_that_gives_nan_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="product: a result of the shipped tile is not finite"):
        find(lambda tile: 1.0, lambda out, tile: out * float("nan"))


def test_out_of_time_nothing_more_is_begun() -> None:
    found = find(lambda tile: 1.0, seconds=0.0)
    assert found.tried == 0 and found.out_of_time and found.tile == SHIPPED


# The command.


@pytest.fixture
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes the interpreter for a device, a tiny layer, and the number of warps for the time."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter stands in for the device, and is off where there is one")

    def timer(calls):
        times = []
        for call in calls:
            call()
            times.append(float(launched[-1]))
        return times

    def problems(*args):
        for posed in tune_problems(*args, tokens=9):

            def run(posed=posed):
                launched.append(
                    sum(tile["num_warps"] for source, tile in tiles.in_force(CPU).values() if source == "trial")
                )
                return posed.run()

            yield posed._replace(run=run)

    launched, tune_problems = [], tune.problems
    monkeypatch.setattr(tune, "_device", lambda: CPU)
    monkeypatch.setattr(tune, "cuda_timer", lambda device: timer)
    monkeypatch.setattr(tune, "problems", problems)
    monkeypatch.setitem(tune.MODELS, "crate_mae_base", (32, 2))
    neighbours = search.neighbours
    monkeypatch.setattr(
        search, "neighbours", lambda tile: [t for t in neighbours(tile) if t["num_warps"] < tile["num_warps"]][:1]
    )


def test_the_command_tunes_writes_shows_and_clears(file: Path, pretended_device: None, capsys) -> None:
    assert tune.main(["--dtypes", "float32", "--batch", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {file}" in printed
    assert printed.count(" 0 rejected") == printed.count("tried, ") == 6  # rounding is not taken for a wrong result
    line = next(line for line in printed.splitlines() if line.startswith("project/4/4"))
    assert "12.0000 ms -> 6.0000 ms, 100% faster (1 tried, 0 rejected)" in line  # of three problems together
    found = {tuple(entry["key"]): entry["tile"] for entry in cache.entries(file, CPU)}
    products, attention = ("project", "input_gradient"), ("forward", "delta", "backward", "attend")
    assert {key[0] for key in found} == {*products, *(f"{name}_kernel" for name in attention)}
    assert all(tile["num_warps"] == 2 for tile in found.values())
    assert selected() == found[KEY] != SHIPPED  # what a process takes that starts now

    assert tune.main(["--show"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{file}: 6 tiles for device cpu, triton ")
    assert any(
        line.startswith("cache") and "project/4/4" in line and "num_warps=2" in line for line in printed.splitlines()
    )
    assert any(line.startswith("default") and "project/2/4" in line for line in printed.splitlines())
    assert f"fingerprint {tiles.fingerprint(CPU)}" in printed

    assert tune.main(["--clear"]) == 0 and not file.exists()
    assert "deleted" in capsys.readouterr().out
    assert tune.main(["--clear"]) == 0
    assert "there is none" in capsys.readouterr().out


def test_a_spoilt_cache_stops_the_command_before_it_tunes_and_can_be_cleared(file, pretended_device, capsys) -> None:
    file.write_text("{")
    for arguments in ([], ["--show"]):
        with pytest.raises(SystemExit) as stopped:
            tune.main(arguments)
        assert stopped.value.code == 2 and f"{file}: not a readable cache" in capsys.readouterr().err
    assert tune.main(["--clear"]) == 0 and not file.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "vit"], "argument --models: invalid choice: 'vit'"),
        (["--dtypes", "int8"], "argument --dtypes: invalid choice: 'int8'"),
        (["--batch", "0"], "argument --batch: expected above 0, got 0"),
        (["--seconds", "-1"], "argument --seconds: expected above 0, got -1.0"),
        (["--show", "--clear"], "not allowed with argument"),
    ],
)
def test_wrong_arguments_end_with_2(arguments: list[str], message: str, pretended_device: None, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_without_a_cuda_device_the_command_ends_with_2() -> None:
    command = [sys.executable, "-m", "crate_kernels.tune"]
    ended = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert ended.returncode == 2 and "needs a CUDA device, and PyTorch sees none" in ended.stderr


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_device", lambda: None)


def test_without_a_device_a_named_cache_is_shown_and_cleared(file: Path, no_device: None, capsys) -> None:
    save(file)
    content = json.loads(file.read_text())
    content["for"]["device"] = "NVIDIA H200"  # nor does it matter that it does not count here
    file.write_text(json.dumps(content))
    for arguments in (["--show"], ["--show", "--output", str(file)]):
        assert tune.main(arguments) == 0
        made_for, *entries = capsys.readouterr().out.splitlines()
        assert made_for.startswith(f"{file}: 1 tiles for device NVIDIA H200, triton ")
        assert entries == ["cache    project/4/4: " + " ".join(f"{name}={value}" for name, value in OTHER.items())]
    assert tune.main(["--clear"]) == 0 and not file.exists()
    assert capsys.readouterr().out == f"{file}: deleted\n"
    for argument in ("--show", "--clear"):
        assert tune.main([argument]) == 0
        assert capsys.readouterr().out == f"{file}: there is none\n"


def test_without_a_device_every_cache_of_the_user_is_shown_and_cleared(
    tmp_path: Path, no_device: None, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for argument in ("--show", "--clear"):
        assert tune.main([argument]) == 0
        assert "no cache of any" in capsys.readouterr().out
    files = [tmp_path / "crate_kernels" / f"tiles-{name}.json" for name in ("A100", "H200")]
    for one in files:
        save(one)
    assert tune.main(["--show"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{one}: 1 tiles for device cpu" in printed for one in files) and printed.count("project/4/4") == 2
    assert tune.main(["--clear"]) == 0 and not any(one.exists() for one in files)


def test_a_rank_never_tunes(pretended_device: None, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="one process alone"):
        tune.tune([product()], lambda calls: [1.0] * len(calls), 1.0)
    with pytest.raises(SystemExit) as stopped:
        tune.main([])
    assert stopped.value.code == 2 and "one process alone" in capsys.readouterr().err


def test_shapes_are_those_of_the_models() -> None:
    from crate_mae.registry import MODELS

    assert {name: (of.embed_dim, of.num_heads) for name, of in MODELS.items()} == tune.MODELS
    assert {(of.img_size, of.patch_size) for of in MODELS.values()} == {(224, 16)} and tune.TOKENS == 14 * 14 + 1


# Ranks.


def test_fingerprints_tell_tiles_apart(file: Path) -> None:
    before = tiles.fingerprint(CPU)
    assert before == tiles.fingerprint(CPU) == tiles.check_same_on_all_ranks(CPU)  # no process group
    save(file, SHIPPED)
    cache.tuned.cache_clear()
    assert tiles.fingerprint(CPU) == before  # a cache that changes nothing
    save(file)
    cache.tuned.cache_clear()
    assert tiles.fingerprint(CPU) != before


RANK = """
import os, sys, torch
from crate_kernels import tiles
rendezvous, rank, other = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=2)
print(tiles.check_same_on_all_ranks(torch.device("cpu")), flush=True)
if rank == "1":
    os.environ["CRATE_KERNELS_CACHE"] = other
    tiles.cache.tuned.cache_clear()
tiles.check_same_on_all_ranks(torch.device("cpu"))
"""


def test_every_rank_is_told_where_tiles_differ(file: Path) -> None:
    """Two processes: first with the same cache, then the second without."""
    save(file)
    arguments = [str(file.with_name("rendezvous")), str(file.with_name("none"))]
    commands = [[sys.executable, "-c", RANK, arguments[0], str(rank), arguments[1]] for rank in range(2)]
    with ThreadPoolExecutor() as threads:
        ranks = list(threads.map(run_while_it_tells, commands))
    tuned = tiles.fingerprint(CPU)
    with tiles.trial({}):
        shipped = tiles.fingerprint(CPU)
    for rank in ranks:
        assert rank.stdout.strip() == tuned, rank.stderr
        assert rank.returncode != 0
        assert f"different tiles in force: {tuned} on ranks 0; {shipped} on ranks 1" in rank.stderr, rank.stderr


@pytest.mark.gpu
def test_tuning_on_a_gpu(file: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A few candidates of every key of a small layer, by the real timer; what was found is right, since it was checked."""
    monkeypatch.setattr(tune, "problems", functools.partial(tune.problems, tokens=50))
    assert tune.main(["--models", "crate_mae_tiny", "--batch", "2", "--seconds", "20"]) == 0
    assert f"wrote {file}" in capsys.readouterr().out
    device = torch.device("cuda", torch.cuda.current_device())
    for entry in cache.entries(file, device):
        assert 0 < entry["ms"] <= (1 - search.LEAST_GAIN) * entry["shipped_ms"]
    assert tiles.in_force(device)
