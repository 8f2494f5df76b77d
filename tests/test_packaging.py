"""The wheel: what it holds, and that it installs and works in an empty environment."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(target.glob("*.whl"))


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
    assert not [name for name in sizes if name.startswith(("tests/", "benchmarks/"))]
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
    result = subprocess.run([python, "-c", CHECK], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0.1.0", "700"]
    command = subprocess.run([tmp_path / "venv" / "bin" / "crate-mae", "--help"], capture_output=True, text=True)
    assert command.returncode == 0 and "pretrain" in command.stdout, command.stderr
