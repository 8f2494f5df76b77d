"""The operators as a kernel for the Hugging Face Hub: a folder that ``kernels.get_kernel`` loads, with nothing to install.

    python -m tools.hub_kernel --out runs/hub_kernel
    python -m tools.hub_kernel --out runs/hub_kernel --repo-id me/crate-kernels     # names it in the card and in what is printed

Such a kernel may be loaded from any path, several versions in one process, so its imports are relative and its operators are
in a namespace of their own, named by a hash of what is written. It is the package but for these two, and for what only a command
line needs. There is one build for all devices (``torch-universal``), as Triton compiles on the machine that it runs on.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from crate_kernels._version import __version__

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "crate_kernels"
NAME = "crate-kernels"
VARIANT = Path("build", "torch-universal")
LEFT_OUT = ("__main__.py", "bench.py", "tune.py")
HUB_VERSION = int(__version__.split(".")[0])  # the Hub counts incompatible changes, and 0 is for what may still change
LEAST_KERNELS = "0.14.0"  # older ones find a kernel by the name of a folder within the build
AROUND = ("LICENSE", "README.md", str(VARIANT / "metadata.json"))  # what is written besides modules

# In a process of its own: the folder, by its path, and then each of its modules. Kernels can be imported only with Triton.
_IMPORT = f"""
import importlib.util, sys
from importlib.util import find_spec
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {PACKAGE!r}:
            raise ImportError(f"{{name}} is imported by its own name")

sys.meta_path.insert(0, Blocked())
folder, name = Path(sys.argv[1]), sys.argv[2]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
sys.modules[name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for file in sorted(folder.rglob("*.py")):
    if file.name != "__init__.py" and (file.name != "triton.py" or find_spec("triton")):
        importlib.import_module(".".join((name, *file.relative_to(folder).with_suffix("").parts)))
"""


class BuildError(RuntimeError):
    """What keeps the kernel from being built; the message names the file and line, or the folder."""


def relative(source: str, file: Path) -> str:
    """``source`` of the module at ``file``, a path within the package, with its imports of the package made relative.

    Raises:
        BuildError: it imports the package in a way that has no relative form.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.level or not _is_ours(node.module):
            continue
        absolute, line = f"from {node.module} import", lines[node.lineno - 1]
        if not line.startswith(absolute, node.col_offset):
            raise BuildError(f"{PACKAGE}/{file}:{node.lineno}: expected `{absolute} ...`, got `{line.strip()}`")
        dotted = "." * len(file.parts) + node.module.removeprefix(PACKAGE).removeprefix(".")
        end = node.col_offset + len(absolute)
        lines[node.lineno - 1] = f"{line[: node.col_offset]}from {dotted} import{line[end:]}"
    return "".join(lines)


def _is_ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == PACKAGE


def check(source: str, file: Path, modules: set[str]) -> None:
    """That a rewritten module would not reach for the package of its name, or for a module that is not there.

    Args:
        source, file: the module and its path within the package.
        modules: the dotted names of all modules and packages of the kernel, the kernel itself being "".

    Raises:
        BuildError: it would; the message says where.
    """
    for node in ast.walk(ast.parse(source)):
        if obstacle := _obstacle(node, file, modules):
            raise BuildError(f"{PACKAGE}/{file}:{node.lineno}: {obstacle}")


def _obstacle(node: ast.AST, file: Path, modules: set[str]) -> str | None:
    match node:
        case ast.Import(names=names) if ours := [one.name for one in names if _is_ours(one.name)]:
            return f"imports {ours[0]} by its name"
        case ast.ImportFrom(module=module, level=0) if _is_ours(module):
            return f"imports {module} by its name"
        case ast.ImportFrom(module=module, names=names, level=level) if level:
            origin = ".".join((*file.parts[: len(file.parts) - level], *([module] if module else [])))
            lacking = [origin] if origin not in modules else []
            if not origin:
                lacking = [one.name for one in names if f"{one.name}.py" in LEFT_OUT]
            return f"imports {lacking[0]}, which the kernel leaves out" if lacking else None
        case ast.Attribute(attr=name) if name == PACKAGE:
            return f"names the operators {ast.unparse(node)}"
        case ast.Constant(value=str(text)) if re.fullmatch(rf"{PACKAGE}(\.|::)[\w.:]*", text):
            return f"has the name {text!r}"
    return None


def modules_of(package: Path) -> dict[Path, str]:
    """What the kernel has for each module of ``package``, by its path within: the same but for imports and the namespace.

    Raises:
        BuildError: a module cannot be rewritten, or would still reach for the package by its name.
    """
    files = sorted(file.relative_to(package) for file in package.rglob("*.py"))
    sources = {
        file: relative((package / file).read_text(encoding="utf-8"), file)
        for file in files
        if str(file) not in LEFT_OUT
    }
    names = {".".join(file.with_suffix("").parts).removesuffix("__init__").removesuffix(".") for file in sources}
    for file, source in sources.items():
        check(source, file, names)
    file, absolute = Path("_ops.py"), f'NAMESPACE = "{PACKAGE}"\n'
    if sources.get(file, "").count(absolute) != 1:
        raise BuildError(f"{PACKAGE}/{file}: expected the line `{absolute.strip()}`, once")
    digest = hashlib.sha256()
    for part in (part for path, source in sources.items() for part in (path.as_posix(), source)):
        digest.update(f"{len(part)} {part}".encode())
    sources[file] = sources[file].replace(absolute, f'NAMESPACE = "_{PACKAGE}_{digest.hexdigest()[:10]}"\n')
    return sources


def build(out: Path, repo_id: str = f"USER/{NAME}", package: Path = ROOT / PACKAGE) -> str:
    """Write the kernel and import it once, in a process of its own.

    Args:
        out: a new or empty folder, or one that holds an earlier build, which is replaced.
        repo_id: where on the Hub the card says that it is.
        package: the folder of the package.

    Returns:
        The kernel's id: its namespace in ``torch.ops``.

    Raises:
        BuildError: out holds something else, or a module cannot be rewritten or imported. Then out is as it was.
    """
    check_out(out)
    out = out.resolve()
    modules = modules_of(package)
    identity = re.search(r'^NAMESPACE = "(\w+)"$', modules[Path("_ops.py")], re.MULTILINE)[1]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as made:
        folder = Path(made, "kernel")
        for file, source in modules.items():
            _write(folder / VARIANT / file, source)
        _write(folder / VARIANT / "metadata.json", json.dumps(_metadata(identity, modules), indent=2) + "\n")
        card = Path(__file__).with_name("hub_card.md").read_text(encoding="utf-8")
        _write(folder / "README.md", card.replace("REPO_ID", repo_id).replace("VERSION", str(HUB_VERSION)))
        shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
        _import_once(folder / VARIANT, identity)
        out.mkdir(exist_ok=True)
        for old in out.iterdir():  # not the folder itself: somebody may be in it
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        for new in folder.iterdir():
            new.rename(out / new.name)
    return identity


def check_out(out: Path) -> None:
    """Refuse, by BuildError, to write where there is something that is not an earlier build's."""
    if not out.exists():
        return
    if not out.is_dir():
        raise BuildError(f"--out {out}: expected a folder, got a file")
    found = {str(file.relative_to(out)) for file in out.rglob("*") if not file.is_dir() and file.suffix != ".pyc"}
    try:
        metadata = json.loads((out / VARIANT / "metadata.json").read_text(encoding="utf-8"))
        ours = {str(VARIANT / file) for file in metadata["digest"]["files"]} if metadata["name"] == NAME else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ours = set()
    if others := sorted(found - ours - (set(AROUND) if ours else set())):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise BuildError(f"--out {out}: expected a new or empty folder or an earlier build, got {others[0]}{more}")


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())


def _metadata(identity: str, modules: dict[Path, str]) -> dict[str, object]:
    """What ``kernels`` reads first. It has no name for a build for all devices, whose name is the folder's."""
    digests = {file: hashlib.sha256(source.encode()).digest() for file, source in modules.items()}
    return {
        "name": NAME,
        "id": identity,
        "version": HUB_VERSION,
        "kernels-minver": LEAST_KERNELS,
        "license": "mit",
        "python-depends": ["einops"],
        "backend": {"type": "cuda"},
        "digest": {
            "algorithm": "sha256",
            "files": {file.as_posix(): base64.b64encode(digest).decode() for file, digest in digests.items()},
        },
    }


def _import_once(folder: Path, identity: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-c", _IMPORT, str(folder.resolve()), identity]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"the kernel cannot be imported: {done.stderr.strip()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 0, or by ``SystemExit`` 2 where it cannot build."""
    parser = argparse.ArgumentParser("python -m tools.hub_kernel", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="a new folder, or an earlier build's, which is replaced"
    )
    parser.add_argument("--repo-id", default=f"USER/{NAME}", help="where on the Hub it will be (USER/crate-kernels)")
    options = parser.parse_args(arguments)
    try:
        identity = build(options.out, options.repo_id)
    except BuildError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    out, repo, kind = options.out, options.repo_id, "--repo-type kernel"
    files = [file for file in out.rglob("*") if file.is_file()]
    print(
        f"{out}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1024:.0f} KiB\n"
        f"operators: torch.ops.{identity}\n"
        f'load:   kernels.get_local_kernel(pathlib.Path("{out.resolve()}"))\n'
        f"upload: hf upload {repo} {out} . {kind} --revision v{HUB_VERSION}\n"
        f"        hf upload {repo} {out / 'README.md'} README.md {kind}          # the card, which the Hub shows\n"
        f'then:   kernels.get_kernel("{repo}", version={HUB_VERSION}, trust_remote_code=True)'
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
