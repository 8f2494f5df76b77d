"""The unattended GPU check loses nothing to a part that fails, hangs or crashes; proved without a GPU, on parts that do."""

from __future__ import annotations

import json
import stat
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from benchmarks import records
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import check, parts
from benchmarks.gpu.parts import RESULTS, Part, Runner
from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels.operators import OPERATORS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with nothing in it but a pytest configuration."""
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a device\n")
    (tmp_path / "tests").mkdir()
    return tmp_path


def write_tests(root: Path, body: str) -> None:
    marked = "import os, signal, time\nimport pytest\npytestmark = pytest.mark." + "gpu\n"
    (root / "tests" / "test_some.py").write_text(marked + textwrap.dedent(body))


def python(name: str, code: str, kind: str = "times", quiet_seconds: float = 100) -> Part:
    return Part(name, kind, (sys.executable, "-c", code, RESULTS), quiet_seconds)


WRITE_A_FIGURE = "import sys; open(sys.argv[1], 'a').write('{\"figure\": 1}\\n'); "


def outcomes_by_name(record: dict) -> dict[str, str]:
    return {test["test"].partition("::")[2]: test["outcome"] for test in record["tests"]}


def run_collected(root: Path) -> list[dict]:
    found, failures = check.collected_parts(root)
    runner = Runner(root, seconds=100)
    return failures + [runner.run(part) for part in found]


def test_outcomes_durations_and_messages(root):
    write_tests(
        root,
        """
        def test_right(): time.sleep(0.02)
        def test_wrong(): assert 1 == 2, "one is not two"
        @pytest.mark.skip(reason="not today")
        def test_left_out(): pass
        @pytest.fixture
        def broken(): raise OSError("no fixture")
        def test_without_its_fixture(broken): pass
        @pytest.fixture
        def untidy():
            yield
            raise OSError("left open")
        def test_untidy(untidy): pass
        """,
    )
    records = run_collected(root)
    assert [record["status"] for record in records] == ["passed", "failed", "passed", "failed", "failed"]
    tests = {test["test"].partition("::")[2]: test for record in records for test in record["tests"]}
    assert {name: test["outcome"] for name, test in tests.items()} == {
        "test_right": "passed",
        "test_wrong": "failed",
        "test_left_out": "skipped",
        "test_without_its_fixture": "failed",
        "test_untidy": "failed",
    }
    assert 0.02 <= tests["test_right"]["seconds"] < 5
    assert "one is not two" in tests["test_wrong"]["message"]
    assert "not today" in tests["test_left_out"]["message"]
    assert "no fixture" in tests["test_without_its_fixture"]["message"]
    assert "left open" in tests["test_untidy"]["message"]


CULPRITS = {
    "crash": ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
    "hang": ("time.sleep(60)", "timed out"),
    "lost context": ("raise RuntimeError('CUDA error: an illegal memory access was encountered')", "failed"),
}


@pytest.mark.parametrize(("culprit", "ending"), CULPRITS.values(), ids=CULPRITS)
def test_what_comes_after_a_culprit_still_runs(root, monkeypatch, culprit, ending):
    if ending == "timed out":  # long enough for pytest to start on busy cores
        monkeypatch.setitem(check.QUIET_SECONDS, "tests", 6)
    write_tests(
        root,
        f"""
        @pytest.mark.parametrize("case", range(5))
        def test_many(case):
            if case in (1, 3):
                {culprit}
        """,
    )
    (record,) = run_collected(root)
    names = {f"test_many[{case}]": ending if case in (1, 3) else "passed" for case in range(5)}
    assert outcomes_by_name(record) == names
    assert record["status"] == ending
    assert len(record["exit_status"]) == 3


def test_a_file_that_cannot_be_collected_is_reported_and_the_others_run(root):
    write_tests(root, "def test_right(): pass")
    (root / "tests" / "test_unimportable.py").write_text("import no_such_module  # mark." + "gpu")
    collection, right = run_collected(root)
    assert collection["status"] == "failed" and "no_such_module" in collection["output"]
    assert outcomes_by_name(right) == {"test_right": "passed"}


def test_a_part_that_hangs_is_ended_with_its_children(root):
    child = "import subprocess; child = subprocess.Popen(['sleep', '60']); "
    tell = "import json; open(sys.argv[1], 'a').write(json.dumps({'pid': child.pid}) + '\\n'); child.wait()"
    record = Runner(root, seconds=60).run(python("hangs", "import sys; " + child + tell, quiet_seconds=2))
    assert record["status"] == "timed out" and record["exit_status"] == [None]
    state = Path(f"/proc/{record['figures'][0]['pid']}/stat")
    gone_by = time.time() + 5
    while state.exists() and state.read_text().split()[2] != "Z" and time.time() < gone_by:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_lines_cut_off_by_a_crash_are_left_out(root):
    code = (
        WRITE_A_FIGURE
        + "open(sys.argv[1], 'a').write('{\"fig'); print('last words'); sys.stdout.flush(); import os; os.abort()"
    )
    record = Runner(root, seconds=60).run(python("crashes", code))
    assert record["status"] == "killed by SIGABRT"
    assert record["figures"] == [{"figure": 1}]
    assert "last words" in record["output"]


def test_a_program_that_cannot_be_started_fails_alone(root):
    record = Runner(root, seconds=60).run(Part("absent", "memory checker", (str(root / "absent"),), quiet_seconds=10))
    assert record["status"] == "failed" and "absent" in record["output"]


def test_nothing_is_started_when_the_time_is_up(root):
    record = Runner(root, seconds=0).run(python("late", "raise SystemExit(1)"))
    assert record["status"] == "not run: out of time" and record["exit_status"] == []


def test_a_time_limit_ends_what_runs(root):
    record = Runner(root, seconds=1).run(python("long", "import time; time.sleep(60)"))
    assert record["status"] == "timed out"


def test_a_process_is_ended_when_it_tells_nothing_and_not_before():
    code = "import time\nfor i in range(6): print(i, flush=True); time.sleep(0.5)\n"
    told = parts.run_while_it_tells([sys.executable, "-c", code], quiet_seconds=2)  # three seconds in all
    assert (told.returncode, told.stdout.split()) == (0, list("012345"))
    with pytest.raises(TimeoutError, match=r"2 s without a word(.|\n)*5"):
        parts.run_while_it_tells([sys.executable, "-c", code + "time.sleep(60)"], quiet_seconds=2)


class Checked:
    """The check's main on parts made for the purpose, on a pretended CUDA device."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = root / "results" / "gpu_check.json"
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(check, "find_memory_checker", lambda: None)
        monkeypatch.setattr(check, "surroundings", lambda device: {"device": "Pretended GPU"})
        monkeypatch.setattr(gpu, "environment", lambda device: {"device": "Pretended GPU", "commit": "0123abc"})

    def run(self, shared: list[Part], alone: list[Part]) -> tuple[int, dict]:
        self.monkeypatch.setattr(check, "collected_parts", lambda scratch: (shared, []))
        self.monkeypatch.setattr(check, "time_parts", lambda device: alone)
        status = gpu.main(["check", "--json", str(self.file), "--jobs", "2"])
        return status, json.loads(self.file.read_text())


@pytest.fixture
def checked(root: Path, monkeypatch: pytest.MonkeyPatch) -> Checked:
    return Checked(root, monkeypatch)


def test_everything_passes(checked, capsys):
    status, document = checked.run([python("one", "pass", "tests")], [python("two", "pass")])
    assert status == 0
    assert document["complete"] and document["passed"] and not document["rehearsal"]
    assert document["device"] == "Pretended GPU" and document["compute_sanitizer"] == "absent"
    assert [part["part"] for part in document["parts"]] == ["one", "two"]
    assert "passed in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fault",
    ["raise SystemExit(3)", "import os; os.abort()", "import time; time.sleep(60)"],
    ids=["fails", "crashes", "hangs"],
)
def test_one_fault_fails_the_check_and_the_rest_is_there(checked, capsys, fault):
    status, document = checked.run(
        [python("faulty", fault, "memory checker", quiet_seconds=2), python("right", "pass", "tests")],
        [python("last", "pass")],
    )
    assert status == 1
    assert document["complete"] and not document["passed"]
    statuses = {part["part"]: part["status"] for part in document["parts"]}
    assert statuses.pop("faulty") in ("failed", "killed by SIGABRT", "timed out")
    assert statuses == {"right": "passed", "last": "passed"}
    assert "FAILED in" in capsys.readouterr().out


def test_the_file_is_whole_while_parts_still_run(checked):
    copy = f"import shutil; shutil.copy({str(checked.file)!r}, {str(checked.file)!r} + '.seen')"
    checked.run([python("first", "pass", "tests")], [python("copies", copy)])
    seen = json.loads(Path(f"{checked.file}.seen").read_text())
    assert [part["part"] for part in seen["parts"]] == ["first"]
    assert not seen["complete"] and not seen["passed"]


def test_no_parts_is_not_a_pass(checked):
    assert checked.run([], [])[0] == 1


def test_nothing_but_skipped_tests_is_not_a_pass(checked, root):
    write_tests(root, "def test_left_out(): pytest.skip('no device after all')")
    found, _ = check.collected_parts(root)
    status, document = checked.run(found, [python("last", "pass")])
    assert status == 1 and document["complete"]
    assert [record["status"] for record in document["parts"]] == ["passed", "passed"]


def test_without_a_device_nothing_is_written(root, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["check", "--json", str(root / "file.json")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (root / "file.json").exists()


FAKE_CHECKER = """#!/bin/sh
[ "$1" = --tool ] || exit 9
echo "========= COMPUTE-SANITIZER"
echo "========= {summary}"
exit {status}
"""


@pytest.mark.parametrize(
    ("summary", "exit_status", "status"),
    [
        ("ERROR SUMMARY: 0 errors", 0, "passed"),
        ("ERROR SUMMARY: 10 errors", 0, "failed"),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "passed"),
        ("RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 0, "failed"),
        ("ERROR SUMMARY: 0 errors", 1, "failed"),
        ("Target application terminated before first instrumented API call", 0, "failed"),
        ("Error: Device not supported. Please refer to the manual", 1, "unavailable"),
    ],
)
def test_the_memory_checker_is_judged_by_its_summary(root, monkeypatch, summary, exit_status, status):
    checker = root / "compute-sanitizer"
    checker.write_text(FAKE_CHECKER.format(summary=summary, status=exit_status))
    checker.chmod(checker.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(root), prepend=":")
    assert check.find_memory_checker() == str(checker)
    found = check.memory_parts(str(checker))
    assert len(found) == 2 * len(check.MEMORY_CHECKS)
    record = Runner(root, seconds=60).run(found[0])
    assert record["status"] == status and summary in record["output"]


@pytest.mark.parametrize("arguments", check.MEMORY_CHECKS.values(), ids=check.MEMORY_CHECKS)
def test_what_the_memory_checker_watches_runs(arguments):
    assert kernels.main([*arguments, "--once", "--device", "cpu"]) == []


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Part], list[dict]]:
    """What is found of the tests in this repository."""
    return check.collected_parts(tmp_path_factory.mktemp("collected"))


def test_dry_run_lists_every_kind_of_part(monkeypatch, capsys, collected):
    monkeypatch.setattr(check, "collected_parts", lambda scratch: collected)
    monkeypatch.setattr(check, "find_memory_checker", lambda: "/usr/local/cuda/bin/compute-sanitizer")
    assert gpu.main(["check", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    for expected in ("test_gpu.py::test_mssa", "memcheck attention", "racecheck ista", "times of a training step"):
        assert expected in listed


def test_rehearsal_on_the_cpu(tmp_path, capsys, in_this_process):
    file = tmp_path / "rehearsal.json"
    status = gpu.main(["check", "--device", "cpu", "--json", str(file)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    document = json.loads(file.read_text())
    assert document["rehearsal"] and document["passed"] and document["complete"]
    assert all(name in document for name in ("device", "torch", "triton", "python", "cuda", "commit", "dirty", "date"))
    rows = [row for part in document["parts"] for row in part["figures"]]
    assert {row["operator"] for row in rows} == {*OPERATORS, "ceilings", "training_step"}
    timed = [row for row in rows if row["operator"] in OPERATORS and "unavailable" not in row]
    assert {row["mode"] for row in timed} == {"forward", "backward"}
    for row in timed:
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        assert row["tflops"] > 0 and row["timed_by"] == "host clock"
        assert row["provider"].startswith("products") or row["error"].keys() >= {"out", "gradient 0"}
    assert "products" in printed and "images/s" in printed


def test_a_copy_without_its_repository_is_not_called_clean(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    found = records.environment(torch.device("cpu"))
    assert found["commit"] is None and found["dirty"] is None
    monkeypatch.setenv("CRATE_KERNELS_COMMIT", "0123abc")
    found = records.environment(torch.device("cpu"))
    assert found["commit"] == "0123abc" and found["dirty"] is None
    monkeypatch.undo()
    assert records.environment(torch.device("cpu"))["commit"] != "0123abc"


OPTIONAL = ("hypothesis", "jsonargparse", "matplotlib", "tensorboard", "pytest_benchmark", "transformers", "timm")


def test_collection_needs_no_optional_package(tmp_path, collected):
    """On a machine where nothing can be installed, every test marked for the device is still found."""
    code = f"""
import sys
for name in {OPTIONAL}:
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
    file = tmp_path / "collected.jsonl"
    expected, failures = collected
    assert not failures
    files = sorted({test.partition("::")[0] for part in expected for test in part.tests})
    options = [str(file) if word == RESULTS else word for word in check.PYTEST[3:]]
    result = parts.run_while_it_tells(
        [sys.executable, "-c", code, *options, "--collect-only", *files],
        cwd=ROOT,
        env={**parts.environment_variables(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = {line["test"] for line in parts.read_lines(file)}
    assert found == {test for part in expected for test in part.tests}
