"""Source distribution and wheel: what they hold, and that the wheel installs and works in an empty environment."""

from __future__ import annotations

import email
import fnmatch
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import benchmarks.kernels
import benchmarks.training_step

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import crate_kernels, crate_mae, torch
from crate_mae.data import FLOWERS
assert "site-packages" in crate_kernels.__file__.replace("dist-packages", "site-packages"), crate_kernels.__file__
model = crate_mae.create_model("crate_mae_tiny", depth=1, decoder_depth=1, img_size=32)
loss, pred, mask = model(torch.randn(1, 3, 32, 32))
loss.backward()
print(crate_kernels.__version__, len(list(FLOWERS.rglob("*.jpg"))))
"""


GENERATED = ("PKG-INFO", "setup.cfg", "crate_kernels.egg-info/")


NOT_COPIED = [".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines())]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository to build in, as building leaves files in the folder."""
    return Path(
        shutil.copytree(
            ROOT, tmp_path_factory.mktemp("source") / "copy", ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True
        )
    )


@pytest.fixture(scope="module")
def distributions(source: Path) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it."""
    result = subprocess.run([sys.executable, "-m", "build", "--no-isolation", source], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,), (wheel,) = source.glob("dist/*.tar.gz"), source.glob("dist/*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def sdist(distributions: tuple[Path, Path]) -> dict[str, bytes]:
    """Its files, by their names below its one folder."""
    with tarfile.open(distributions[0]) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        return {member.name.partition("/")[2]: archive.extractfile(member).read() for member in members}


@pytest.fixture(scope="module")
def wheel(distributions: tuple[Path, Path]) -> Path:
    return distributions[1]


def test_both_pass_the_checks_of_an_index(distributions: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *map(str, distributions)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("PASSED") == 2


def test_the_readme_is_the_long_description(sdist: dict[str, bytes], wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (file,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        of_wheel = archive.read(file)
    for metadata in (of_wheel, sdist["PKG-INFO"]):
        fields = email.message_from_bytes(metadata)
        assert fields["Description-Content-Type"] == "text/markdown"
        assert fields["License-Expression"] == "MIT" and "LICENSE" in fields.get_all("License-File")
        assert fields.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text().strip()


def test_the_source_distribution_is_the_repository(sdist: dict[str, bytes]) -> None:
    """Tests and benchmarks too, so that who builds from it can run what the repository can: they need each other."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not in a git repository, whose files are compared")
    tracked = {name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()}
    assert {"crate_mae/pictures/page.html", "LICENSE", "hubconf.py", "tests/ranks.py", ".ci/constraints.txt"} <= tracked
    assert not tracked - sdist.keys()
    added = [name for name in sdist.keys() - tracked if not name.startswith(GENERATED)]
    assert not [name for name in added if name.split("/")[0] not in {name.split("/")[0] for name in tracked}]
    assert not [name for name in added if "__pycache__" in name or name.endswith((".pyc", ".so"))]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.usefixtures("distributions")
def test_git_ignores_and_make_clean_removes_what_building_leaves(source: Path) -> None:
    left = {name for name in os.listdir(source) if name not in os.listdir(ROOT) or _matches(name, NOT_COPIED)}
    assert left == {"dist", "crate_kernels.egg-info"}
    assert all(_matches(name, NOT_COPIED) for name in left)
    removed = subprocess.check_output(["make", "--dry-run", "--silent", "clean"], cwd=source, text=True).split()
    assert removed[:2] == ["rm", "-rf"] and all(_matches(name, removed) for name in left)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def test_wheel_holds_packages_types_photographs_and_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    for expected in (
        "crate_kernels/py.typed",
        "crate_mae/py.typed",
        "crate_kernels/ista/triton.py",
        "crate_kernels/tiles/products.py",
        "crate_mae/data/flowers/ATTRIBUTION.csv",
        "crate_mae/data/flowers/LICENSE.txt",
        "crate_mae/pictures/page.html",
    ):
        assert expected in sizes
    assert not [name for name in sizes if name.startswith(("tests/", "benchmarks/", "tools/", "hubconf"))]
    photographs = sum(size for name, size in sizes.items() if "/flowers/" in name and ".dist-info" not in name)
    assert 0 < photographs <= 3_000_000


def test_wheel_installs_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Its own files come from the wheel; the libraries it depends on from the environment the tests run in."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "libraries.pth").write_text("".join(f"{path}\n" for path in libraries))
    (site / "benchmarks").mkdir()  # as other projects have installed theirs
    (site / "benchmarks" / "__init__.py").touch()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    result = run(python, "-c", CHECK)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0.1.0", "700"]
    command = run(tmp_path / "venv" / "bin" / "crate-mae", "--help")
    assert command.returncode == 0 and "pretrain" in command.stdout, command.stderr
    report = run(python, "-m", "crate_kernels")
    assert report.returncode == 0, report.stderr
    assert report.stdout.split()[:2] == ["crate_kernels", "0.1.0"] and "auto, on CPUs" in report.stdout
    assert "not known" not in report.stdout
    bench = run(python, "-m", "crate_kernels.bench")
    assert bench.returncode == 2 and not bench.stdout
    assert bench.stderr.count("\n") == 1
    for told in ("source repository", "`make gpu-bench`", "python -m benchmarks.training_step"):
        assert told in bench.stderr


def test_bench_lists_the_programs_of_a_checkout() -> None:
    command = [sys.executable, "-m", "crate_kernels.bench"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    told = dict(line.split(maxsplit=3)[2:] for line in result.stdout.splitlines())
    programs = {
        "ahead_of_time",
        "data_loading",
        "gpu",
        "kernels",
        "memory",
        "report",
        "training_step",
    }
    assert told.keys() >= {f"benchmarks.{name}" for name in programs}
    assert not told.keys() & {"benchmarks.harness", "benchmarks.__init__", "benchmarks.test_step"}
    assert told["benchmarks.training_step"] == benchmarks.training_step.__doc__.splitlines()[0]
    assert told["benchmarks.kernels"] == benchmarks.kernels.__doc__.splitlines()[0]
