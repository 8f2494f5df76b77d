"""The kernel for the Hub: what is written computes what the package does, by any path, beside another version of itself."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest
import torch

import crate_kernels
from tools.hub_kernel import LEFT_OUT, PACKAGE, ROOT, VARIANT, BuildError, build, check, main, modules_of, relative

WIDTH, HEADS = 32, 2

# What each process begins with: the package cannot be had by its name, and the kernel is loaded as KERNEL says.
BEGINNING = """
import importlib.util, sys
from pathlib import Path
import torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "crate_kernels":
            raise ImportError(f"{name} is imported by its own name")

sys.meta_path.insert(0, Blocked())

def by_path(folder, name):
    spec = importlib.util.spec_from_file_location(name, Path(folder, "build", "torch-universal", "__init__.py"))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def by_kernels(folder, name):
    from kernels import get_local_kernel
    return get_local_kernel(Path(folder))
"""

IN_THE_INTERPRETER = """
w, grads = torch.randn(1, 2, 9, 16, requires_grad=True), []
for implementation in "reference", "triton":
    with crate.use(implementation):
        out = crate.shared_qkv_attention(w)
    grads.append((out, *torch.autograd.grad(out.square().sum(), w)))
assert crate.__name__ + ".shared_attention.triton" in sys.modules
for one, other in zip(*grads):
    assert (one - other).norm() < 1e-5 * one.norm()
"""

COMPARED = """
torch.set_num_threads(1)
given, expected = torch.load("given.pt"), torch.load("expected.pt")
crate = LOAD(sys.argv[1], "of_another_name")
found = results(crate, given)
assert found.keys() == expected.keys() and len(found) == 6
for name, tensors in expected.items():
    assert len(found[name]) == len(tensors) > 1
    for one, other in zip(found[name], tensors):
        assert one.abs().sum() > 0 and torch.equal(one, other), name
assert not [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("crate_kernels::")]
"""


def results(crate: ModuleType, given: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Output and gradients of each operator."""
    found = {}

    def call(name, function, *names):
        tensors = [given[one].clone().requires_grad_() for one in names]
        out = function(*tensors)
        found[name] = [out.detach(), *torch.autograd.grad(out, tensors, given["grad"].expand_as(out))]

    def layer(x, weight, bias, qkv, to_out, square):
        norm, attention = crate.Norm(weight, bias, 1e-5), crate.AttentionWeights(qkv, to_out, None)
        return crate.encoder_layer(x, norm, attention, norm, square, num_heads=2)

    call("mssa", lambda x, qkv, out: crate.mssa(x, qkv, out, num_heads=2), "x", "qkv", "out")
    call("ista", crate.ista, "x", "square")
    call("overcomplete_ista", crate.overcomplete_ista, "x", "wide", "wide_out")
    call("shared_qkv_attention", crate.shared_qkv_attention, "w")
    call("norm_linear", lambda x, w, *norm: crate.norm_linear(x, w, None, norm_weight=norm[0], norm_bias=norm[1]),
         "x", "square", "norm_weight", "norm_bias")  # fmt: skip
    call("encoder_layer", layer, "x", "norm_weight", "norm_bias", "qkv", "out", "square")
    return found


@pytest.fixture(scope="module")
def printed() -> StringIO:
    """What the command prints that makes ``kernel``."""
    return StringIO()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory, printed: StringIO) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "new" / "kernel"
    with redirect_stdout(printed):
        assert main(["--out", str(folder), "--repo-id", "me/crate"]) == 0
    return folder


def in_process(code: str, *arguments: str | Path, cwd: Path, **environment: str) -> str:
    """What ``code`` prints in a fresh process, which knows of this repository only what ``arguments`` say."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    whole = BEGINNING + inspect.getsource(results).replace("ModuleType", "object") + code
    done = subprocess.run(
        [sys.executable, "-c", "from __future__ import annotations\n" + whole, *map(str, arguments)],
        cwd=cwd, env=env | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def seeded_tensors() -> dict[str, torch.Tensor]:
    shapes = {
        "x": (2, 9, WIDTH), "qkv": (WIDTH, WIDTH), "out": (WIDTH, WIDTH), "square": (WIDTH, WIDTH), "wide": (WIDTH, 4 * WIDTH),
        "wide_out": (WIDTH, 4 * WIDTH), "w": (2, HEADS, 9, WIDTH), "norm_weight": (WIDTH,), "norm_bias": (WIDTH,),
        "grad": (9, WIDTH),
    }  # fmt: skip
    return {name: torch.randn(shape) / 3 for name, shape in shapes.items()}


@pytest.mark.parametrize("load", ["by_path", "by_kernels"])
def test_same_bits_as_the_package(kernel: Path, tmp_path: Path, load: str) -> None:
    """And, where Triton is installed, what its interpreter makes of a kernel is what the reference does."""
    if load == "by_kernels":
        pytest.importorskip("kernels")
    given, threads = seeded_tensors(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = results(crate_kernels, given)
    finally:
        torch.set_num_threads(threads)
    torch.save(given, tmp_path / "given.pt")
    torch.save(expected, tmp_path / "expected.pt")
    code = COMPARED.replace("LOAD", load) + IN_THE_INTERPRETER * (find_spec("triton") is not None)
    in_process(code, kernel, cwd=tmp_path, TRITON_INTERPRET="1")


def test_two_versions_in_one_process(kernel: Path, tmp_path: Path) -> None:
    """Another comment is another version. What one is forced to do, the other does not."""
    pytest.importorskip("kernels")
    package = tmp_path / PACKAGE
    shutil.copytree(ROOT / PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    with open(package / "ista" / "api.py", "a") as file:
        file.write("# changed\n")
    other = build(tmp_path / "other", package=package)
    code = """
one, other = (by_kernels(folder, "") for folder in sys.argv[1:])
assert one.ista is not other.ista
tensors = {"x": torch.randn(4, 8, 32), "square": torch.randn(32, 32)}
assert torch.equal(one.ista(*tensors.values()), other.ista(*tensors.values()))
with one.use("reference"):
    assert one.dispatch._forced_here() == "reference" and other.dispatch._forced_here() is None
for crate in one, other:
    assert crate._ops.ops.ista_forward.default._schema.name == crate.__name__ + "::ista_forward"
print(one.__name__, other.__name__)
"""
    names = in_process(code, kernel, tmp_path / "other", cwd=tmp_path).split()
    assert len(set(names)) == 2 and names[1] == other
    assert all(re.fullmatch(r"_crate_kernels_[0-9a-f]{10}", name) for name in names)


def test_what_the_card_says(kernel: Path, tmp_path: Path) -> None:
    """Its front matter, and its examples run as they stand: ``accelerate`` swaps what has CRATE's structure."""
    kernels = pytest.importorskip("kernels")
    card = (kernel / "README.md").read_text()
    assert re.match(r"---\n(?:.+\n)*license: mit\ntags:\n- kernel\n---\n", card)
    assert set(re.findall(r"`([A-Za-z_]+)`", card)) <= {*crate_kernels.__all__, "reference", "composed", "triton"}
    examples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(examples) == 2 and 'get_kernel("me/crate", version=0, ' in examples[0]
    code = f"""
import kernels
kernels.get_kernel = lambda repo_id, version, trust_remote_code: kernels.get_local_kernel(Path(sys.argv[1]))
{examples[0]}
assert tokens.grad.abs().sum() > 0
class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.scale, self.attend = 2, 4.0, torch.nn.Softmax(dim=-1)
        self.qkv = torch.nn.Linear(32, 32, bias=False)
        self.to_out = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Dropout(0.0))
    def forward(self, x):
        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.to_out((self.attend(w @ w.mT * self.scale) @ w).transpose(1, 2).flatten(2))
model, x = torch.nn.Sequential(Attention()), torch.randn(2, 9, 32)
before, keys = model(x), list(model.state_dict())
{examples[1]}
assert type(model[0]) is crate.MSSA and list(model.state_dict()) == keys
torch.testing.assert_close(model(x), before)
"""
    assert "MSSA" in in_process(code, kernel, cwd=tmp_path)
    metadata = kernels.Metadata.read_from_file(kernel / VARIANT / "metadata.json")
    assert metadata.name.python_name == PACKAGE and metadata.version == 0 and metadata.python_depends == ["einops"]


def test_digest_is_that_of_the_files(kernel: Path) -> None:
    rust = pytest.importorskip("kernels._rust")
    digest = rust.Metadata.read_from_file(kernel / VARIANT / "metadata.json").digest
    fresh = rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, kernel / VARIANT)
    assert {file: one for file, one in fresh.files.items() if "__pycache__" not in file} == digest.files


def test_all_of_the_package_but_its_command_lines(kernel: Path) -> None:
    package = {file.relative_to(ROOT / PACKAGE) for file in (ROOT / PACKAGE).rglob("*.py")}
    written = {file.relative_to(kernel / VARIANT) for file in (kernel / VARIANT).rglob("*.py")}
    assert package - written == set(map(Path, LEFT_OUT)) and not written - package
    assert (kernel / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_relative_imports() -> None:
    source = (
        "import torch\nfrom crate_kernels import (\n    a,\n)\ndef f():\n    from crate_kernels.x.y import z  # why\n"
    )
    expected = source.replace("from crate_kernels import", "from . import").replace("crate_kernels.x", ".x")
    assert relative(source, Path("top.py")) == expected
    assert relative(source, Path("x", "y.py")) == expected.replace("from .", "from ..")
    with pytest.raises(
        BuildError, match=r"^crate_kernels/top.py:2: expected `from crate_kernels import \.\.\.`, got `from"
    ):
        relative("\nfrom  crate_kernels import a\n", Path("top.py"))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("import torch, crate_kernels.mssa", "imports crate_kernels.mssa by its name"),
        ("from crate_kernels.mssa import api", "imports crate_kernels.mssa by its name"),
        ("from ..tune import search", "imports tune, which the kernel leaves out"),
        ("from .. import checks, tune", "imports tune, which the kernel leaves out"),
        ("torch.ops.crate_kernels.ista_forward(x)", "names the operators torch.ops.crate_kernels"),
        ('load("crate_kernels.mssa.triton")', "has the name 'crate_kernels.mssa.triton'"),
        ('load(f"crate_kernels::{name}")', "has the name 'crate_kernels::'"),
    ],
)
def test_what_reaches_for_the_package_is_named(line: str, what: str) -> None:
    modules = {"", "checks", "mssa", "mssa.api"}
    check('from .. import checks\nfrom .api import mssa, tune\n"crate_kernels: a word"', Path("mssa", "op.py"), modules)
    with pytest.raises(BuildError, match=re.escape(f"crate_kernels/mssa/op.py:2: {what}")):
        check(f"x = 0\n{line}\n", Path("mssa", "op.py"), modules)


def test_package_without_its_namespace(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").touch()
    with pytest.raises(BuildError, match=r'_ops\.py: expected the line `NAMESPACE = "crate_kernels"`, once'):
        modules_of(tmp_path)


def test_what_cannot_be_imported_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, out = tmp_path / PACKAGE, tmp_path / "out"
    package.mkdir()
    (package / "_ops.py").write_text(f'NAMESPACE = "{PACKAGE}"\n')
    (package / "__init__.py").write_text("from crate_kernels import _ops\n")
    (package / "later.py").write_text("\nraise ValueError('of later')\n")
    with pytest.raises(BuildError, match=r"(?s)cannot be imported: .*later.py\", line 2.*ValueError: of later"):
        build(out, package=package)
    assert {file.name for file in tmp_path.iterdir()} == {PACKAGE}
    (package / "later.py").write_text("")
    first = build(out, package=package)
    (package / "later.py").unlink()
    monkeypatch.chdir(out)
    assert build(Path("."), package=package) != first and not (out / VARIANT / "later.py").exists()
    assert {file.name for file in Path(".").iterdir()} == {"LICENSE", "README.md", "build"}


def test_refuses_to_write_over_something_else(kernel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    copy = tmp_path / "copy"
    shutil.copytree(kernel, copy)
    (copy / "build" / "notes.txt").write_text("x")
    for out, got in ((tmp_path / "thesis.tex", "a file"), (tmp_path, "LICENSE"), (copy, "build/notes.txt")):
        with pytest.raises(SystemExit, match=r"^2$"):
            main(["--out", str(out)])
        error = capsys.readouterr().err
        assert f"--out {out}: expected a" in error and (got in error or out == tmp_path), error
    assert (tmp_path / "thesis.tex").read_text() == (copy / "build" / "notes.txt").read_text() == "x"


def test_command(kernel: Path, printed: StringIO) -> None:
    upload = f"hf upload me/crate {kernel} . --repo-type kernel --revision v0"
    for line in (f'get_local_kernel(pathlib.Path("{kernel}"))', upload, 'get_kernel("me/crate", version=0, '):
        assert line in printed.getvalue()
