"""The machine's own tiles: the cache, which tile is in force, the search, the command, and ranks that must agree."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import pkgutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from limits import no_hang
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.parts import run_while_it_tells
from crate_kernels import tiles, tune
from crate_kernels.products.launchers import project
from crate_kernels.products.op import operands
from crate_kernels.tiles import cache
from crate_kernels.tiles.products import TABLE, USES

CPU = torch.device("cpu")
KEY = ("project", "plain", 4, 4)
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


def save(file: Path, tile: dict[str, int] = OTHER) -> None:
    cache.write(file, {KEY: tile}, CPU)


def selected() -> dict[str, int]:
    return tiles.select(TABLE, CPU, *KEY)


# The cache, and what is in force.


def test_without_a_cache_the_shipped_tiles_are_in_force() -> None:
    assert selected() == SHIPPED


def test_a_cache_goes_before_the_tables_and_is_read_once(file: Path) -> None:
    save(file)
    assert selected() == OTHER
    assert tiles.in_force(CPU)[KEY] == ("cache", OTHER)
    assert (
        tiles.select(TABLE, CPU, "project", "plain", 2, 2) == TABLE["default"]["project", "plain", 2, 2]
    )  # not in the cache
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
    ("spoil", "clearable"),
    [
        (lambda text: "", True),
        (lambda text: text[: len(text) // 2], True),
        (lambda text: "[1, 2]", False),
        (lambda text: "{}", False),
        (lambda text: "[" * 10**5, False),
        (lambda text: text.replace('"for"', '"of"'), False),
        (lambda text: text.replace('"device": "cpu"', '"device": "c\\npu"'), True),
        (lambda text: text.replace('"BLOCK_M": 32', '"BLOCK_M": "32"'), True),
        (lambda text: text.replace('"BLOCK_M": 32', '"BLOCK_M": -32'), True),
        (lambda text: text.replace('"tiles": [', '"tiles": [1, '), True),
        (lambda text: text.replace('"tiles": [', '"tiles": [[["project", "plain", 4, 4], {}], '), True),
        (lambda text: text + " " * 2**20, False),
    ],
    ids=[
        "empty",
        "torn",
        "a list",
        "an empty object",
        "deep",
        "no identity",
        "two lines",
        "text for a number",
        "negative",
        "no pair",
        "twice",
        "large",
    ],
)
def test_a_spoilt_cache_is_an_error_that_says_how_to_be_rid_of_it(file: Path, spoil, clearable: bool, capsys) -> None:
    """By --clear, where it begins as a cache, or is empty; anything else may be a file of value that the variable names."""
    save(file)
    file.write_text(spoil(file.read_text()))
    with pytest.raises(cache.CacheError, match=rf"^{file}: not a readable cache") as caught:
        selected()
    remedy = "Delete the file, or run `python -m crate_kernels.tune --clear`"
    assert str(caught.value).endswith(remedy if clearable else f"Have {cache.VARIABLE} name another file")
    assert str(caught.value).isprintable()
    if clearable:
        assert tune.main(["--clear"]) == 0 and not file.exists()
    else:
        ended_with_2(["--clear"], str(caught.value), capsys)
        assert file.exists()


def ended_with_2(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main(arguments)
    told = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and message in told, told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"BLOCK_M": 24}, "BLOCK_M: expected a power of 2 from 16 to 512, got 24"),
        ({"BLOCK_K": 8}, "BLOCK_K: expected a power of 2 from 16 to 512, got 8"),
        ({"BLOCK_N": 1024}, "BLOCK_N: expected a power of 2 from 16 to 512, got 1024"),
        ({"num_warps": 3}, "num_warps: expected a power of 2 from 1 to 16, got 3"),
        ({"num_warps": 32}, "num_warps: expected a power of 2 from 1 to 16, got 32"),
        ({"num_stages": 0}, "num_stages: expected a number from 1 to 8, got 0"),
        ({"PARTS": 0}, "PARTS: expected a power of 2 from 1 to 8, got 0"),
        ({"LIBRARY": 2}, "LIBRARY: expected a number from 0 to 1, got 2"),
        ({"num_ctas": 1}, "expected BLOCK_M, BLOCK_N, .*num_stages, got .*'num_ctas'"),
    ],
)
def test_a_tile_that_no_kernel_takes_is_told_before_a_launch(file: Path, change: dict, told: str) -> None:
    save(file, OTHER | change)
    with pytest.raises(
        cache.CacheError, match=rf"{file}: .*'project', 'plain', 4, 4.: {told}\)\. Delete the file, or run"
    ):
        selected()


def test_a_tile_of_no_kernel_is_told(file: Path) -> None:
    cache.write(file, {("project", "plain", 3, 3): OTHER}, CPU)
    with pytest.raises(cache.CacheError, match=r"'project', 'plain', 3, 3.: no kernel has this key"):
        selected()


@pytest.mark.parametrize("cached", [True, False])
def test_a_tile_that_does_not_fit_the_device_is_told_of_the_cache(file: Path, monkeypatch, cached: bool) -> None:
    class Large:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                raise OutOfResources(300_000, 232_448, "shared memory")

            return launch

    monkeypatch.setattr("crate_kernels.products.kernels.project_kernel", Large())
    if cached:
        save(file)
    (operand,) = operands([torch.randn(16, 16)], [None], [None], torch.float32)
    told = rf"{file}: .*Required: 300000.*--clear" if cached else "^out of resource"
    with pytest.raises(cache.CacheError if cached else OutOfResources, match=told):
        project(torch.randn(4, 16), operand, torch.float32)
    with pytest.raises(OutOfResources), tiles.trial({}):  # as the search tries tiles
        project(torch.randn(4, 16), operand, torch.float32)


def test_every_tile_that_ships_or_that_the_search_finds_can_be_launched(file: Path) -> None:
    for table in cache.TABLES:
        for of in table.values():
            for way in (lambda tile: [tile], tune.neighbours):
                for tiles_of in itertools.zip_longest(*map(way, of.values())):
                    held = {key: tile for key, tile in zip(of, tiles_of, strict=True) if tile}
                    cache.write(file, held, CPU)
                    assert cache.load(file, CPU) == held


def test_writing_is_all_or_nothing(file: Path) -> None:
    save(file)
    before = file.read_text()
    with pytest.raises(TypeError):
        cache.write(file, {KEY: object()}, CPU)
    assert file.read_text() == before
    assert list(file.parent.iterdir()) == [file]


def test_the_file_lies_in_the_users_cache_folder_by_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.location(CPU) == tmp_path / "crate_kernels" / "tiles-cpu.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.location(CPU) == tmp_path / "home" / ".cache" / "crate_kernels" / "tiles-cpu.json"


def test_every_table_counts_and_no_two_share_a_key() -> None:
    modules = [
        importlib.import_module(f"{tiles.__name__}.{info.name}") for info in pkgutil.iter_modules(tiles.__path__)
    ]
    assert [module.TABLE for module in modules if hasattr(module, "TABLE")] == list(cache.TABLES)
    keys = [key for table in cache.TABLES for key in {key for of in table.values() for key in of}]
    assert len(keys) == len(set(keys)) > 0


# The search.


def test_neighbours_of_every_shipped_tile_are_new_and_possible() -> None:
    for tile in (tile for table in cache.TABLES for of in table.values() for tile in of.values()):
        found = tune.neighbours(tile)
        assert len(found) >= 3 and tile not in found
        for other in found:
            assert other.keys() == tile.keys()
            numbers = {name: value for name, value in other.items() if name not in ("num_stages", "LIBRARY")}
            assert all(value & (value - 1) == 0 for value in numbers.values())
            assert all(16 <= value <= 256 for name, value in numbers.items() if name.startswith("BLOCK_"))
            assert 2 <= other["num_warps"] <= 8 and 1 <= other["num_stages"] <= 5


@pytest.mark.parametrize(
    ("change", "neighbours"),
    [
        ({"LIBRARY": 0}, [{"LIBRARY": 1}]),
        ({"LIBRARY": 1}, [{"LIBRARY": 0}]),
        ({"PARTS": 1}, [{"PARTS": 2}]),
        ({"PARTS": 2}, [{"PARTS": 1}, {"PARTS": 4}]),
        ({"PARTS": 4}, [{"PARTS": 2}]),
    ],
)
def test_the_library_and_the_parts_of_an_epilogue_are_tried(change: dict, neighbours: list[dict]) -> None:
    tile = SHIPPED | change
    (name,) = change
    assert [other for other in tune.neighbours(tile) if other[name] != tile[name]] == [tile | one for one in neighbours]


def product(spoil=lambda out, tile: out) -> tune.Problem:
    """A real launch of the smallest size; ``spoil`` makes its result wrong for some tiles."""
    x, (operand,) = torch.randn(20, 32), operands([torch.randn(32, 24)], [None], [None], torch.float32)
    run = lambda: spoil(project(x, operand, torch.float32)[0], selected())  # noqa: E731
    return tune.Problem("product", torch.float32, run)


@pytest.fixture
def timer_of(monkeypatch: pytest.MonkeyPatch):
    """Timers that launch, and say of the tile launched with what a function of it says."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter stands in for the device, and is off where there is one")
    launched: list = []
    trial = tiles.trial

    @contextmanager
    def noting(chosen):
        launched[:] = chosen.values()
        with trial(chosen) as selected:
            yield selected

    monkeypatch.setattr(tiles, "trial", noting)
    return lambda cost: lambda calls: [(call(), float(cost(*launched)))[1] for call in calls]


@pytest.fixture
def find(timer_of):
    def find(cost, spoil=lambda out, tile: out, seconds=60.0, problems=1) -> tune.Finding:
        return tune.search(KEY, SHIPPED, [product(spoil)] * problems, timer_of(cost), seconds)

    return find


def test_the_search_goes_on_from_what_is_faster(find) -> None:
    found = find(lambda tile: tile["num_warps"] + tile["BLOCK_K"] / 32, problems=2)
    assert (found.tile["num_warps"], found.tile["BLOCK_K"]) == (2, 16)  # more than one step away
    assert (found.shipped_ms, found.ms) == (10.0, 5.0)  # of both problems together
    assert not found.rejected and not found.out_of_time and found.tried > len(tune.neighbours(SHIPPED))


def test_the_search_takes_the_library_where_it_is_faster(find) -> None:
    found = find(lambda tile: 1.0 - 0.5 * tile["LIBRARY"])
    assert found.tile == SHIPPED | {"LIBRARY": 1} and not found.rejected


@pytest.mark.parametrize(("gain", "kept"), [(0.031, True), (0.029, False)])
def test_a_gain_below_three_percent_changes_nothing(find, gain: float, kept: bool) -> None:
    target = SHIPPED | {"GROUP": 4}
    found = find(lambda tile: 1 - gain if tile == target else 1.0)
    assert found.tile == (target if kept else SHIPPED)


def test_a_lucky_winner_has_to_win_again(find) -> None:
    lucky = iter([0.5])
    found = find(lambda tile: next(lucky, 1.0) if tile["GROUP"] == 4 else 1.0)
    assert next(lucky, None) is None and found.tile == SHIPPED


def last_element_wrong(out: torch.Tensor) -> torch.Tensor:
    out[-1, -1] += 0.1
    return out


@pytest.mark.parametrize(
    "wrong",
    [last_element_wrong, torch.empty_like, lambda out: out.fill_(float("inf")), lambda out: out[1:]],
    ids=["one element", "nothing written", "overflow", "another shape"],
)
def test_a_wrong_candidate_is_rejected_however_fast(find, wrong) -> None:
    found = find(
        lambda tile: 0.1 if tile["GROUP"] == 4 else 0.5 if tile["GROUP"] == 16 else 1.0,
        lambda out, tile: wrong(out) if tile["GROUP"] == 4 else out,
    )
    assert found.tile == SHIPPED | {"GROUP": 16}
    ((tile, why),) = found.rejected
    assert tile == SHIPPED | {"GROUP": 4} and why.startswith("product: AssertionError: ")


def test_a_candidate_that_does_not_compile_is_rejected(find, monkeypatch: pytest.MonkeyPatch) -> None:
    odd, good = SHIPPED | {"BLOCK_M": 24}, SHIPPED | {"num_stages": 2}
    monkeypatch.setattr(tune, "neighbours", lambda tile: [odd, good])
    found = find(lambda tile: 0.1 if tile == odd else 0.9 if tile == good else 1.0)
    assert found.tile == good
    ((tile, why),) = found.rejected
    assert tile == odd and why.startswith("product: ") and "power of 2" in why


def test_a_shipped_tile_that_gives_nan_is_an_error(find) -> None:
    with pytest.raises(RuntimeError, match="product: a result of the shipped tile is not finite"):
        find(lambda tile: 1.0, lambda out, tile: out * float("nan"))


def test_out_of_time_nothing_more_is_begun(find) -> None:
    found = find(lambda tile: 1.0, seconds=0.0)
    assert found.tried == 0 and found.out_of_time and found.tile == SHIPPED


# The command.


@pytest.fixture
def pretended_device(monkeypatch: pytest.MonkeyPatch, timer_of) -> None:
    """The command takes the interpreter for a device, a tiny layer, and the number of warps for the time."""
    monkeypatch.setattr(tune, "_refusal", lambda device: None)
    monkeypatch.setattr(tune, "cuda_timer", lambda device: timer_of(lambda tile: tile["num_warps"]))
    monkeypatch.setattr(tune, "problems", functools.partial(tune.problems, tokens=9))
    monkeypatch.setitem(tune.MODELS, "crate_mae_base", (32, 2))
    neighbours = tune.neighbours
    monkeypatch.setattr(
        tune, "neighbours", lambda tile: [t for t in neighbours(tile) if t["num_warps"] < tile["num_warps"]][:1]
    )


def test_the_command_tunes_writes_shows_and_clears(file: Path, pretended_device: None, capsys) -> None:
    elsewhere = ("project", "plain", 2, 2)
    cache.write(file, {elsewhere: OTHER, KEY: OTHER | {"GROUP": 16}}, CPU)
    assert tune.main(["--dtypes", "float32", "--batch", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {file}" in printed
    assert printed.count(" 0 rejected") == printed.count("tried, ") == 8  # rounding is not taken for a wrong result
    line = next(line for line in printed.splitlines() if line.startswith("project/plain/4/4"))
    assert "8.0000 ms -> 4.0000 ms, 100% faster (1 tried, 0 rejected)" in line
    found = cache.load(file, CPU)
    assert found.pop(elsewhere) == OTHER  # what was not tuned stays
    attention = {f"{name}_kernel" for name in ("forward", "delta", "backward")}
    assert {key[:2] for key in found if key[0] not in attention} == {
        (name, use) for name in ("project", "input_gradient") for use in USES
    } - {("project", "norm")}  # float32 tokens are not folded
    assert {key[0] for key in found} == attention | {"project", "input_gradient"}
    assert all(tile["num_warps"] == 2 for tile in found.values())
    cache.tuned.cache_clear()  # as in a process that starts now
    assert selected() == found[KEY] != SHIPPED

    assert tune.main(["--show"]) == 0
    header, *lines, fingerprint = capsys.readouterr().out.splitlines()
    assert header.startswith(f"{file}: 9 tiles for device cpu, triton ")
    assert f"cache    {tune._text(KEY)}: {tune._text(found[KEY])}" in lines
    assert any(line.startswith("default  project/plain/2/4: ") for line in lines)
    assert fingerprint == f"fingerprint {tiles.fingerprint(CPU)}"

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


def unread(status: os.stat_result) -> tuple[int, ...]:
    """All but the time at which it was last read, which the reading may change."""
    return tuple(status[:7]) + tuple(status[8:10])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (Path.mkdir, "not a readable cache of tiles (no regular file)"),
        (os.mkfifo, "not a readable cache of tiles (no regular file)"),
        (lambda path: path.symlink_to("/dev/zero"), "not a readable cache of tiles (no regular file)"),
        (lambda path: path.symlink_to(path), "not a readable cache of tiles (Too many levels of symbolic links)"),
        (lambda path: path.write_text("my thesis"), "not a readable cache of tiles (JSONDecodeError: Expecting value"),
        (lambda path: path.write_bytes(bytes(100)), "not a readable cache of tiles (JSONDecodeError: Expecting value"),
    ],
    ids=["folder", "pipe", "device", "loop", "text", "zeros"],
)
@pytest.mark.parametrize("arguments", [["--clear"], ["--show"], []])
def test_what_is_no_cache_is_told_and_stays(
    arguments: list[str], make, told: str, file: Path, pretended_device: None, capsys
) -> None:
    make(file)
    before = unread(os.lstat(file))
    with no_hang():
        ended_with_2(arguments, f"{file}: {told}", capsys)
        with pytest.raises(cache.CacheError, match="not a readable cache"):
            selected()
    assert unread(os.lstat(file)) == before


def test_a_cache_that_cannot_be_is_none_and_told_before_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretended_device: None, capsys
) -> None:
    (tmp_path / "text").write_text("my thesis")
    file = tmp_path / "text" / "tiles.json"
    monkeypatch.setenv(cache.VARIABLE, str(file))
    assert selected() == SHIPPED
    assert tune.main(["--clear"]) == 0 and capsys.readouterr().out == f"{file}: there is none\n"
    monkeypatch.setattr(tune, "problems", lambda *_: pytest.fail("tuned"))
    ended_with_2([], f"{file}: cannot be written (", capsys)


def test_whatever_lies_in_the_own_place_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = cache.location(tiles.this_device())
    file.parent.mkdir()
    file.write_bytes(b"\xff\0")
    assert tune.main(["--clear"]) == 0 and not file.exists()


def test_a_cache_in_another_order_is_cleared(file: Path) -> None:
    save(file)
    content = json.loads(file.read_text())
    file.write_text(json.dumps({name: content[name] for name in ("tiles", "for")}))
    assert selected() == OTHER
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


def test_a_named_cache_is_shown_and_cleared_whatever_it_is_for(tmp_path: Path, capsys) -> None:
    named = tmp_path / "named.json"
    save(named)
    named.write_text(named.read_text().replace('"device": "cpu"', '"device": "NVIDIA H200"'))
    assert tune.main(["--show", "--output", str(named)]) == 0
    header, *entries = capsys.readouterr().out.splitlines()
    assert header.startswith(f"{named}: 1 tiles for device NVIDIA H200, triton ")
    assert entries == [f"cache    {tune._text(KEY)}: {tune._text(OTHER)}"]
    assert tune.main(["--clear", "--output", str(named)]) == 0 and not named.exists()
    assert capsys.readouterr().out == f"{named}: deleted\n"
    for argument in ("--show", "--clear"):
        assert tune.main([argument, "--output", str(named)]) == 0
        assert capsys.readouterr().out == f"{named}: there is none\n"


def test_a_rank_never_tunes(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
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
        assert f"different tiles in force: {tuned} on ranks [0]; {shipped} on ranks [1]" in rank.stderr, rank.stderr


@pytest.mark.gpu
def test_tuning_on_a_gpu() -> None:
    """A few candidates of every key of a small layer, by the real timer; what was found is right, since it was checked."""
    device = tiles.this_device()
    posed = tune.problems("crate_mae_tiny", "bfloat16", 2, device, tokens=50)
    for found in tune.tune(posed, tune.cuda_timer(device), 20.0):
        assert found.tile == found.shipped or 0 < found.ms <= (1 - tune.LEAST_GAIN) * found.shipped_ms
