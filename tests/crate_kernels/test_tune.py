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
import tarfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from limits import no_hang
from triton.runtime.errors import OutOfResources

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
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
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


def ended_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main(arguments)
    told = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and message in told, told


# The cache, and what is in force.


def test_a_trial_goes_before_the_cache_and_the_cache_before_the_tables(file: Path) -> None:
    assert selected() == SHIPPED
    cache.tuned.cache_clear()
    save(file)
    assert selected() == OTHER and tiles.in_force(CPU)[KEY] == ("cache", OTHER)
    another = "project", "plain", 2, 2
    assert tiles.select(TABLE, CPU, *another) == TABLE["default"][another]  # not in the cache
    tried = SHIPPED | {"num_stages": 1}
    with tiles.trial({KEY: tried}) as asked:
        assert selected() == tried
        with tiles.trial({}) as inner:
            assert selected() == SHIPPED
        assert inner == {KEY: SHIPPED}
    assert asked == {KEY: tried}
    with tiles.pretend("sm_90"):
        assert selected() == TABLE["sm_90"][KEY]
    file.unlink()  # it is read once
    selected()["BLOCK_M"] = 1  # and copies are handed out
    assert selected() == OTHER


@pytest.mark.parametrize("name", ["device", "triton", "crate_kernels", "tables"])
def test_a_cache_made_with_something_else_is_left_aside_aloud(file: Path, name: str, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(cache, "identity", lambda device, own=cache.identity: own(device) | {name: "another"})
        save(file)
    with pytest.warns(UserWarning, match=f"{file}: tuned for {name} another, not .*crate_kernels.tune"):
        assert selected() == SHIPPED
    with warnings.catch_warnings():  # once a process
        warnings.simplefilter("error")
        assert selected() == SHIPPED


def test_a_changed_table_is_another_table(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.identity(CPU)
    monkeypatch.setitem(TABLE["sm_90"], KEY, OTHER)
    assert cache.identity(CPU)["tables"] != before["tables"]


def edited(edit: Callable[[str], str]) -> Callable[[Path], None]:
    """A cache with its text replaced."""

    def make(file: Path) -> None:
        save(file)
        file.write_text(edit(file.read_text()))

    return make


# What lies in the cache's place, why it is not read, and whether --clear deletes it: where it begins as a cache, or is empty.
# Anything else may be a file of value that the variable names by mistake.
NO_CACHES = {
    "empty": (edited(lambda text: ""), "JSONDecodeError: Expecting value", True),
    "torn": (edited(lambda text: text[: len(text) // 2]), "JSONDecodeError", True),
    "another number": (edited(lambda text: text.replace('"BLOCK_M": 32', '"BLOCK_M": 64')), "checksum", True),
    "another device": (edited(lambda text: text.replace('"cpu"', '"c\\npu"')), "checksum", True),
    "no checksum": (edited(lambda text: text.replace("sha256", "sha")), "checksum", True),
    "another name": (edited(lambda text: text.replace('"for"', '"of"')), "checksum", False),
    "a list": (edited(lambda text: "[1, 2]"), "checksum", False),
    "deep": (edited(lambda text: "[" * 10**5), "RecursionError", False),
    "large": (edited(lambda text: text + " " * 2**20), " bytes", False),
    "text": (edited(lambda text: "my thesis"), "JSONDecodeError: Expecting value", False),
    "zeros": (edited(lambda text: "\0" * 100), "JSONDecodeError: Expecting value", False),
    "folder": (Path.mkdir, "no regular file", False),
    "pipe": (os.mkfifo, "no regular file", False),
    "device": (lambda path: path.symlink_to("/dev/zero"), "no regular file", False),
    "loop": (lambda path: path.symlink_to(path), "Too many levels of symbolic links", False),
}


@pytest.mark.parametrize(("make", "why", "clearable"), NO_CACHES.values(), ids=NO_CACHES)
def test_what_is_no_cache_is_told_and_not_used(file: Path, make, why: str, clearable: bool, capsys) -> None:
    def status() -> tuple[int, ...]:
        """All but the time at which it was last read, which the reading may change."""
        return tuple(os.lstat(file)[:7]) + tuple(os.lstat(file)[8:10])

    make(file)
    before = status()
    with no_hang():
        with pytest.raises(cache.CacheError, match=rf"^{file}: not a readable cache of tiles \(.*{why}") as caught:
            selected()
        remedy = "Delete the file, or run `python -m crate_kernels.tune --clear`"
        assert str(caught.value).endswith(remedy if clearable else f"Have {cache.VARIABLE} name another file")
        assert str(caught.value).isprintable()
        for arguments in ([], ["--show"], *([] if clearable else [["--clear"]])):
            ended_with_2(arguments, str(caught.value), capsys)
        assert status() == before
        if clearable:
            assert tune.main(["--clear"]) == 0 and not file.exists()


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


def test_writing_is_all_or_nothing(file: Path) -> None:
    save(file)
    before = file.read_text()
    with pytest.raises(TypeError):
        cache.write(file, {KEY: object()}, CPU)
    assert file.read_text() == before
    assert list(file.parent.iterdir()) == [file]


def test_the_file_lies_in_the_users_cache_folder_where_all_is_cleared(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.location(CPU) == tmp_path / "home" / ".cache" / "crate_kernels" / "tiles-cpu.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.location(CPU) == tmp_path / "crate_kernels" / "tiles-cpu.json"
    file = cache.location(tiles.this_device())
    file.parent.mkdir()
    file.write_bytes(b"\xff\0")
    assert tune.main(["--clear"]) == 0 and not file.exists()


def test_every_table_counts_and_no_two_share_a_key() -> None:
    names = [f"{tiles.__name__}.{info.name}" for info in pkgutil.iter_modules(tiles.__path__)]
    found = [module.TABLE for module in map(importlib.import_module, names) if hasattr(module, "TABLE")]
    assert found == list(cache.TABLES)
    keys = [key for table in cache.TABLES for key in {key for of_family in table.values() for key in of_family}]
    assert len(keys) == len(set(keys)) > 0


# The search.


def test_every_tile_that_ships_or_that_is_one_step_away_can_be_launched(file: Path) -> None:
    for of_family in (of_family for table in cache.TABLES for of_family in table.values()):
        for tile in of_family.values():
            found = tune.neighbours(tile)
            assert len(found) >= 3 and tile not in found and len({str(other) for other in found}) == len(found)
            for other in [tile, *found]:
                powers = [
                    value
                    for name, value in other.items()
                    if name not in ("num_stages", "LIBRARY", "PERSISTENT", "maxnreg")
                ]
                assert other.keys() == tile.keys() - ({"maxnreg"} if other is not tile else set()) and all(
                    value.bit_count() == 1 for value in powers
                )
        cache.write(file, of_family, CPU)
        assert cache.load(file, CPU) == of_family


@pytest.mark.parametrize(
    ("change", "neighbours"),
    [
        ({"LIBRARY": 0}, [{"LIBRARY": 1}]),
        ({"LIBRARY": 1}, [{"LIBRARY": 0}]),
        ({"LIBRARY": 0, "PERSISTENT": 1}, []),
        ({"PERSISTENT": 0}, [{"PERSISTENT": 1}]),
        ({"PERSISTENT": 0, "LIBRARY": 1}, []),
        ({"PERSISTENT": 1}, [{"PERSISTENT": 0}]),
        ({"PARTS": 1}, [{"PARTS": 2}]),
        ({"PARTS": 2}, [{"PARTS": 1}, {"PARTS": 4}]),
        ({"num_stages": 8}, [{"num_stages": 7}]),
        ({"BLOCK_M": 16}, [{"BLOCK_M": 32}, {"BLOCK_M": 32, "num_warps": 8}]),
        ({"BLOCK_N": 256}, [{"BLOCK_N": 128}, {"BLOCK_N": 128, "num_warps": 2}]),
        ({"BLOCK_M": 128, "BLOCK_N": 256}, [{"BLOCK_M": 64}]),  # 256, or 64 by 2 warps, would take too many registers
        ({"BLOCK_M": 128, "BLOCK_N": 256, "num_warps": 8}, [{"BLOCK_M": 64}, {"BLOCK_M": 64, "num_warps": 4}]),
    ],
)
def test_neighbours_are_one_step_away(change: dict, neighbours: list[dict]) -> None:
    tile, name = SHIPPED | change, next(iter(change))
    assert [other for other in tune.neighbours(tile) if other[name] != tile[name]] == [tile | one for one in neighbours]


def product(spoil: Callable = lambda out, tile: out) -> tune.Launch:
    """A real launch of the smallest size; ``spoil`` makes its result wrong for some tiles."""
    x, (operand,) = torch.randn(20, 32), operands([torch.randn(32, 24)], [None], [None], torch.float32)
    return tune.Launch("product", torch.float32, lambda: spoil(project(x, operand, torch.float32)[0], selected()))


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Has a function of a tile stand in for the time that it takes."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter stands in for the device, and is off where there is one")
    return lambda cost: monkeypatch.setattr(tune, "milliseconds", lambda _, key, choices: [*map(cost, choices)])


@pytest.fixture
def find(times) -> Callable[..., tune.Finding]:
    def find(cost, spoil=lambda out, tile: out, seconds=60.0, launches=1) -> tune.Finding:
        times(cost)
        torch.use_deterministic_algorithms(False)  # the search itself fills memory with NaN
        return tune.search(KEY, SHIPPED, [product(spoil)] * launches, seconds)

    return find


def test_the_search_goes_on_from_what_is_faster(find) -> None:
    found = find(lambda tile: tile["num_warps"] + tile["BLOCK_K"] / 32, launches=2)
    assert (found.tile["num_warps"], found.tile["BLOCK_K"]) == (2, 16)  # more than one step away
    assert found.times == (10.0, 5.0)  # of both launches together
    assert not found.rejected and not found.out_of_time and found.tried > len(tune.neighbours(SHIPPED))


@pytest.mark.parametrize(
    ("change", "gain", "kept"),
    [({"GROUP": 4}, 0.031, True), ({"GROUP": 4}, 0.029, False), ({"LIBRARY": 1}, 0.5, True)],
)
def test_a_gain_below_three_percent_changes_nothing(find, change: dict, gain: float, kept: bool) -> None:
    target = SHIPPED | change
    found = find(lambda tile: 1 - gain if tile == target else 1.0)
    assert found.tile == (target if kept else SHIPPED) and (found.times is not None) == kept and not found.rejected


def test_a_lucky_winner_has_to_win_again(find) -> None:
    lucky = iter([0.5])
    found = find(lambda tile: next(lucky, 1.0) if tile["GROUP"] == 4 else 1.0)
    assert next(lucky, None) is None and found.tile == SHIPPED and found.times is None


def last_element_wrong(out: torch.Tensor) -> torch.Tensor:
    out[-1, -1] += 0.1
    return out


def nothing_written(out: torch.Tensor) -> torch.Tensor:
    """To memory where the tile before wrote its result, unless that is filled with NaN."""
    return torch.empty_like(out) if torch.are_deterministic_algorithms_enabled() else out


@pytest.mark.parametrize(
    "wrong",
    [last_element_wrong, nothing_written, lambda out: out.fill_(float("inf")), lambda out: out[1:]],
    ids=["one element", "nothing written", "overflow", "another shape"],
)
def test_a_wrong_candidate_is_rejected_however_fast(find, wrong) -> None:
    found = find(
        lambda tile: {4: 0.1, 16: 0.5}.get(tile["GROUP"], 1.0),
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


@pytest.mark.parametrize(("seconds", "begun"), [(25.0, 3), (21.0, 2), (15.0, 2), (0.0, 0)])
def test_keys_that_take_longest_come_first_as_long_as_there_is_time(
    monkeypatch, capsys, seconds: float, begun: int
) -> None:
    ms = {
        ("project", "plain", 4, 4): 1.0,
        ("input_gradient", "plain", 4, 4): 3.0,
        ("input_gradient", "norm", 4, 4): 2.0,
    }
    clock, shares = [0.0], []

    def search(key: tuple, tile: tiles.Tile, launched: list, share: float, compilers: None) -> tune.Finding:
        shares.append(share)
        clock[0] += 10.0  # two seconds for each of four tiles and the shipped one
        return tune.Finding(key, tile, None, 4, [], False)

    monkeypatch.setattr(tune, "milliseconds", lambda launch, key, choices: [ms[key]])
    monkeypatch.setattr(tune, "search", search)
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[0])
    launched = [tune.Launch("", torch.float32, functools.partial(tiles.select, TABLE, CPU, *key)) for key in ms]
    ordered = sorted(ms, key=lambda key: -ms[key])
    assert [found.key for found in tune.tune(launched, seconds)] == ordered[:begun]
    assert shares == [(seconds - 10 * index) / (3 - index) for index in range(begun)]
    late = ", ".join(map(tune._text, ordered[begun:]))
    assert not late or f"not begun, for want of time: {late}\n" in capsys.readouterr().out


AHEAD = """
import launching_nothing, torch
from benchmarks.ahead_of_time.targets import TARGETS
from crate_kernels import tiles, tune
from crate_kernels.products.launchers import project
from crate_kernels.products.op import operands
from crate_kernels.tiles.compiling import Compilers, StandIn
import triton

if __name__ == "__main__":
    triton.runtime.driver.set_active(StandIn(TARGETS["sm_90"].gpu))
    hits, tried = launching_nothing.activate(), []
    x, (operand,) = torch.zeros(1024, 768).half(), operands([torch.zeros(768, 768)], [None], [None], torch.float16)
    launch = tune.Launch("product", torch.float16, lambda: project(x, operand, torch.float16))

    def results(launch, key, tile):
        with tiles.trial({key: tile}):
            launch.run()
        tried.append(tile)
        return []

    tune._results = results  # nothing has run: there is nothing to compare
    tune.milliseconds = lambda launch, key, choices: [1.0 for _ in choices]
    with tiles.pretend("sm_90"), Compilers(2) as compilers:
        key, (tile, using, _) = next(iter(tune.by_worth([launch]).items()))
        wrong = {**tile, "BLOCK_M": 48}
        good, more = tune.neighbours(tile)[:2]
        tune.neighbours = lambda tile: [good, wrong, more]
        found = tune.search(key, tile, using, 1000.0, compilers)
        assert tried == [tile, good, more] and found.tried == 3 and found.tile == tile, found
        ((rejected, why),) = found.rejected
        assert rejected == wrong and "power of 2" in why, found
        late = tune.search(key, tile, using, 0.0, compilers)
        assert late.tried == 0 and late.out_of_time
    print(hits)
"""


def test_tiles_are_compiled_by_other_processes_before_they_run(tmp_path: Path) -> None:
    (tmp_path / "ahead.py").write_text(AHEAD)
    root = Path(__file__).parents[2]
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"PYTHONPATH": f"{root}:{root / 'tests'}", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    ended = subprocess.run([sys.executable, str(tmp_path / "ahead.py")], env=variables, capture_output=True, text=True)
    # Only the shipped tile was compiled here, because nobody had asked for it: its launch found nothing.
    assert ended.stdout.splitlines()[-1:] == ["[False, True, True]"], ended.stdout + ended.stderr


def test_tiles_are_timed_in_turns_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that remember the tile in force when they were captured stand in for CUDA's."""
    graphs: list[SimpleNamespace] = []

    def graph() -> SimpleNamespace:
        graphs.append(SimpleNamespace(replay=len(graphs)))
        return graphs[-1]

    asked, clock = [], iter([1.0, 20.0, 3.0, 10.0, 2.0, 90.0])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    monkeypatch.setattr("triton.testing.do_bench", lambda replay, **_: asked.append(replay) or next(clock))
    captured: list[dict[str, int]] = []
    launch = tune.Launch("product", torch.float32, lambda: captured.append(selected()))
    assert tune.milliseconds(launch, KEY, [SHIPPED, OTHER]) == [2.0, 20.0]
    assert captured == [SHIPPED, OTHER] and asked == [0, 1] * 3


# The command.


@pytest.fixture
def pretended_device(monkeypatch: pytest.MonkeyPatch, times) -> None:
    """The command takes the interpreter for a device, a tiny layer, and the number of warps for the time."""
    times(lambda tile: float(tile["num_warps"]))
    monkeypatch.setattr(tune, "_refusal", lambda device: None)
    monkeypatch.setattr(tune, "launches", functools.partial(tune.launches, tokens=9))
    monkeypatch.setitem(tune.MODELS, "crate_mae_base", (32, 2))
    fewer = lambda tile, of=tune.neighbours: [one for one in of(tile) if one["num_warps"] < tile["num_warps"]]  # noqa: E731
    monkeypatch.setattr(tune, "neighbours", lambda tile: fewer(tile)[:1])


def test_the_command_tunes_writes_shows_and_clears(file: Path, pretended_device: None, capsys) -> None:
    elsewhere = ("project", "plain", 2, 2)
    cache.write(file, {elsewhere: OTHER, KEY: OTHER | {"GROUP": 16}}, CPU)
    assert tune.main(["--dtypes", "float32", "--batch", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {file}" in printed
    assert printed.count(" 0 rejected") == printed.count("tried, ") == 8  # rounding is not taken for a wrong result
    line = next(line for line in printed.splitlines() if line.startswith("project/plain/4/4"))
    assert "12.0000 ms -> 6.0000 ms, 100% faster (1 tried, 0 rejected)" in line
    found = cache.load(file, CPU)
    assert found.pop(elsewhere) == OTHER  # what was not tuned stays
    attention = {f"{name}_kernel" for name in ("forward", "row_pairs", "backward")}
    products = set(itertools.product(("project", "input_gradient"), USES)) - {
        ("project", "norm")
    }  # not folded in float32
    assert {key[:2] for key in found if key[0] not in attention} == products
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

    for told in ("deleted", "there is none"):
        assert tune.main(["--clear"]) == 0 and not file.exists()
        assert capsys.readouterr().out == f"{file}: {told}\n"


def test_an_interrupt_loses_only_the_key_at_work(file: Path, pretended_device: None, tmp_path, monkeypatch) -> None:
    search, begun, archive = tune.search, [], tmp_path / "tune.tar.gz"

    def interrupted(key: tuple, *arguments: object) -> tune.Finding:
        begun.append(key)
        if len(begun) == 3:
            assert cache.load(file, CPU).keys() == set(begun[:2])  # already
            raise KeyboardInterrupt
        return search(key, *arguments)

    monkeypatch.setattr(tune, "search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--dtypes", "float32", "--batch", "1", "--archive", str(archive)])
    assert cache.load(file, CPU).keys() == set(begun[:2])
    with tarfile.open(archive) as held:
        assert held.extractfile(file.name).read() == file.read_bytes()
    monkeypatch.setattr(tune, "search", search)
    assert tune.main(["--dtypes", "float32", "--batch", "1"]) == 0 and len(cache.load(file, CPU)) == 8


def test_a_cache_that_cannot_be_is_none_and_told_before_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretended_device: None, capsys
) -> None:
    (tmp_path / "text").write_text("my thesis")
    file = tmp_path / "text" / "tiles.json"
    monkeypatch.setenv(cache.VARIABLE, str(file))
    assert selected() == SHIPPED
    assert tune.main(["--clear"]) == 0 and capsys.readouterr().out == f"{file}: there is none\n"
    monkeypatch.setattr(tune, "launches", lambda *_: pytest.fail("tuned"))
    ended_with_2([], f"{file}: cannot be written (", capsys)


def test_a_named_cache_is_shown_and_cleared_whatever_it_is_for(tmp_path: Path, monkeypatch, capsys) -> None:
    named, of_an_h200 = tmp_path / "named.json", cache.identity(CPU) | {"device": "NVIDIA H200"}
    monkeypatch.setattr(cache, "identity", lambda device: of_an_h200)
    save(named)
    named.write_text(json.dumps(dict(reversed(json.loads(named.read_text()).items()))))  # and in whatever order
    assert tune.main(["--show", "--output", str(named)]) == 0
    header, *entries = capsys.readouterr().out.splitlines()
    assert header.startswith(f"{named}: 1 tiles for device NVIDIA H200, triton ")
    assert entries == [f"cache    {tune._text(KEY)}: {tune._text(OTHER)}"]
    for argument, told in (("--clear", "deleted"), ("--show", "there is none"), ("--clear", "there is none")):
        assert tune.main([argument, "--output", str(named)]) == 0 and not named.exists()
        assert capsys.readouterr().out == f"{named}: {told}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "vit"], "argument --models: invalid choice: 'vit'"),
        (["--dtypes", "int8"], "argument --dtypes: invalid choice: 'int8'"),
        (["--batch", "0"], "argument --batch: expected above 0, got 0"),
        (["--seconds", "-1"], "argument --seconds: expected above 0, got -1.0"),
        (["--show", "--clear"], "not allowed with argument"),
        ([], "one process alone"),
    ],
)
def test_wrong_arguments_and_ranks_end_with_2(arguments: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended_with_2(arguments, message, capsys)


def test_without_a_cuda_device_the_command_ends_with_2() -> None:
    command = [sys.executable, "-m", "crate_kernels.tune"]
    ended = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert ended.returncode == 2 and "needs a CUDA device, and PyTorch sees none" in ended.stderr


def test_shapes_are_those_of_the_models() -> None:
    from crate_mae.registry import MODELS

    assert {name: (of.embed_dim, of.num_heads) for name, of in MODELS.items()} == tune.MODELS
    assert {(of.img_size, of.patch_size) for of in MODELS.values()} == {(224, 16)} and tune.TOKENS == 14 * 14 + 1


# Ranks.


def test_fingerprints_tell_tiles_apart(file: Path) -> None:
    before = tiles.fingerprint(CPU)
    assert before == tiles.fingerprint(CPU) == tiles.check_same_on_all_ranks(CPU)  # no process group
    for tile, same in ((SHIPPED, True), (OTHER, False)):  # a cache may change nothing
        save(file, tile)
        cache.tuned.cache_clear()
        assert (tiles.fingerprint(CPU) == before) == same


RANK = """
import os, sys, torch
from crate_kernels import tiles
rendezvous, other, rank = sys.argv[1:]
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
    command = [sys.executable, "-c", RANK, str(file.with_name("rendezvous")), str(file.with_name("none"))]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ranks = [subprocess.Popen([*command, str(rank)], **pipes) for rank in range(2)]
    tuned = tiles.fingerprint(CPU)
    with tiles.trial({}):
        shipped = tiles.fingerprint(CPU)
    for rank in ranks:
        out, err = rank.communicate(timeout=300)
        assert out.strip() == tuned and rank.returncode != 0, err
        assert f"different tiles in force: {tuned} on ranks [0]; {shipped} on ranks [1]" in err, err


@pytest.mark.gpu
def test_tuning_on_a_gpu() -> None:
    """A few candidates of every key of a small layer, by the real times; what was found is right, since it was checked."""
    launches = tune.launches("crate_mae_tiny", "bfloat16", 2, tiles.this_device(), tokens=50)
    for found in tune.tune(launches, 20.0):
        assert found.times is None or 0 < found.times[1] <= (1 - tune.LEAST_GAIN) * found.times[0]
