"""The sources of images that `--data` and `--val` name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from crate_mae.data.folder import FLOWERS, ImageFolder
from crate_mae.data.huggingface import HuggingFaceImages
from crate_mae.data.layouts import open_layout
from crate_mae.data.mixture import Mixture
from crate_mae.data.packing import JOURNAL
from crate_mae.data.parts import PART_NAMES, part_of
from crate_mae.data.reading import IMAGE_SUFFIXES
from crate_mae.data.shards import TarShards, shard_paths
from crate_mae.data.source import Source
from crate_mae.data.synthetic import SyntheticImages

FORMS = (
    "a folder of images or of .tar shards, a file such as shards/name-{000000..000099}.tar, hf:NAME, synthetic:COUNT, "
    'or several with weights, such as "2 photos + 1 hf:NAME"'
)

_WEIGHTED = re.compile(r"(\d+\.?\d*|\.\d+)\s+(\S.*)")


def open_source(what: str | Path, *, part: str | None = None) -> Source:
    """The images that an option names.

    ============================================  =====================================================================
    ``photos``                                    A folder of images, flat or with class sub-folders.
    ``cifar-10-batches-py``                       CIFAR-10 or -100, Flowers-102 or Pets as distributed (`layouts`).
    ``cifar-10-batches-py/test``                  A part of it, whether it is a folder there or not.
    ``shards``                                    A folder of .tar shards, in which no images lie beside them.
    ``shards/name-{000000..000099}.tar``          Tar shards; braces may be several, or none for one shard.
    ``hf:NAME,split=train,name=..,column=image``  A data set for the ``datasets`` library: the id of one on the hub, a folder, a
                                                  .parquet or .arrow file. All after the first comma may be left out.
    ``synthetic:1000,size=256x341``               So many images made up, height x width, to try and measure what follows them.
    ``2 photos + 1 shards``                       Several of these, with the share that each has of the samples.
    ============================================  =====================================================================

    Args:
        part: "train", "val" or "test", which is taken of a folder that holds a data set in parts; without it, all that is in
            there.

    Raises:
        FileNotFoundError: it is not there, or holds no images.
        ValueError: it is none of these; or a data set without images; or shards that `pack` has not finished.
        MissingLibrary: an ImportError: one that it needs is not installed.
    """
    what = str(what)
    if not what.strip():
        raise ValueError(f"expected {FORMS}; got nothing")
    if weighted := _weighted(what):
        sources = [open_source(each, part=part) for _, each in weighted]
        return Mixture(sources, [float(weight) for weight, _ in weighted])
    kind, colon, rest = what.partition(":")
    if colon and kind == "hf":
        name, settings = _settings(what, rest, {"split": str, "name": str, "column": str})
        return HuggingFaceImages(name, **settings)
    if colon and kind == "synthetic":
        count, settings = _settings(what, rest, {"size": _size})
        if not re.fullmatch("[0-9]{1,12}", count) or not int(count):
            raise ValueError(f"{what}: expected a number of images, 1 or more, after synthetic:, got {count!r}")
        return SyntheticImages(int(count), **settings)
    folder = part_of(Path(what), part) if part else Path(what)
    if published := open_layout(folder):
        return published
    if _is_shards(str(folder)):
        _refuse_unfinished(folder)
        return TarShards(shard_paths(str(folder)))
    if not folder.is_dir():
        raise FileNotFoundError(_not_there(folder))
    try:
        return ImageFolder(folder)
    except FileNotFoundError as error:
        if any(folder.glob("*.parquet")) or any(folder.glob("*.arrow")) or (folder / "dataset_dict.json").exists():
            raise FileNotFoundError(f"{error}; a data set of Hugging Face is named hf:{what}") from None
        raise


def members(what: str | Path) -> list[str]:
    """The sources that ``what`` names: several where they have weights, else ``what`` itself."""
    return [each for _, each in _weighted(str(what))] or [str(what)]


def _refuse_unfinished(folder: Path) -> None:
    """Refuse shards that `pack` has not finished, which would be taken for all images."""
    try:
        journal = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        done, images = journal["shards"][-1]["last"] + 1 if journal["shards"] else 0, journal["source"]["images"]
    except (OSError, ValueError, TypeError, LookupError):  # other shards, or a journal that `pack` will object to
        return
    if done < images:
        raise ValueError(
            f"{folder}: packing stopped after {done:,} of {images:,} images; the same crate-mae pack command goes on. To do with "
            f"these, name them: {folder}/NAME-{{000000..{len(journal['shards']) - 1:06}}}.tar"
        )


def _not_there(path: Path) -> str:
    """Why there is no folder of images, and what might be meant."""
    if path.exists():
        hint = f"; a data set of Hugging Face is named hf:{path}" if path.suffix in (".parquet", ".arrow") else ""
        return f"{path} is a file; expected {FORMS}{hint}"
    if "://" in str(path) or re.match(r"(https?|s3|gs):", str(path)):
        return f"{path}: nothing is read from other machines; download it, or expected {FORMS}"
    siblings = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=1, cutoff=0.7)
    return f"no such folder of images: {path}{f'; did you mean {path.with_name(near[0])}?' if near else ''}"


def absolute(what: str | Path) -> str:
    """``what`` with absolute paths, so that it means the same in any working directory."""
    what = str(what)
    if not what.strip():
        return what
    if weighted := _weighted(what):
        return " + ".join(f"{weight} {absolute(part)}" for weight, part in weighted)
    kind, colon, rest = what.partition(":")
    if colon and kind == "synthetic":
        return what
    if colon and kind == "hf":
        name, comma, settings = rest.partition(",")
        return f"hf:{os.path.abspath(name) if os.path.exists(name) else name}{comma}{settings}"
    return os.path.abspath(what)


def without_folders(what: str | Path | None) -> str:
    """The name of a source, without folders of this machine; None means the photographs of the package."""
    if what is None or str(what) == str(FLOWERS):
        return "the flower photographs of crate_mae"
    what = str(what)
    try:
        weighted = _weighted(what)
    except ValueError:  # a folder that was called so, and is there no longer
        weighted = []
    if weighted:
        return " + ".join(f"{weight} {without_folders(each)}" for weight, each in weighted)
    kind, colon, rest = what.partition(":")
    if colon and kind == "synthetic":
        return what
    if colon and kind == "hf":
        name, *settings = rest.split(",")
        on_the_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and not os.path.exists(name)
        is_file = name.endswith((".parquet", ".arrow"))
        named = name if on_the_hub and not is_file else _last(name)
        pairs = (each.partition("=") for each in settings)
        return ",".join([f"hf:{named}", *(f"{key}={value.rpartition('/')[2]}" for key, _, value in pairs)])
    return _last(what)


def _last(path: str) -> str:
    """The last part of a path; of a part of a data set, that and its folder's, unless that is of a user."""
    path = os.path.abspath(path) if path else path
    folder, name = os.path.split(path)
    is_of_user = os.path.dirname(folder) in ("/home", "/Users") or folder == os.path.expanduser("~")
    if name.lower() in PART_NAMES and folder != "/" and not is_of_user:
        return f"{os.path.basename(folder)}/{name}"
    return name or "a folder"


def is_folder(what: str | Path) -> bool:
    """Whether ``what`` names a folder of images, or could name nothing else."""
    what = str(what)
    return not (_weighted(what) or re.match("(hf|synthetic):", what) or _is_shards(what))


def _is_shards(what: str) -> bool:
    """Whether ``what`` names tar shards, or a folder that holds shards, and neither images nor folders."""
    if os.path.isdir(what):
        found = False
        with os.scandir(what) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir() or os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                    return False
                found = found or entry.name.endswith(".tar")
        return found
    return what.endswith((".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2"))


def _weighted(what: str) -> list[tuple[str, str]]:
    """Weights, as they are written, and what they are of; none where it is one source."""
    if os.path.exists(what):  # whatever its name looks like
        return []
    parts = what.split(" + ")
    found = [_WEIGHTED.fullmatch(part.strip()) for part in parts]
    if len(parts) == 1 and not any(found):
        return []
    if not all(found):
        lacking = next(part for part, match in zip(parts, found, strict=True) if not match)
        raise ValueError(
            f"{what}: expected a positive weight and a blank before each of several sources, such as "
            f'"2 photos + 1 shards", got {lacking.strip()!r}'
        )
    return [(match[1], match[2]) for match in found if match]


def _settings(what: str, rest: str, known: dict[str, Callable[[str], object]]) -> tuple[str, dict]:
    """The name before the first comma, and the settings after it."""
    first, *given = rest.split(",")
    settings = {}
    for each in given:
        name, equals, value = each.partition("=")
        if name not in known or not equals or not value:
            raise ValueError(
                f"{what}: expected {', '.join(f'{name}=...' for name in known)} after a comma, got {each!r}"
            )
        try:
            settings[name] = known[name](value)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
    if not first:
        raise ValueError(f"{what}: expected a name after the colon")
    return first, settings


def _size(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch("([0-9]{1,5})x([0-9]{1,5})", text)) or 0 in (sides := (int(match[1]), int(match[2]))):
        raise ValueError(f"expected size=HEIGHTxWIDTH in pixels, got {text!r}")
    return sides
