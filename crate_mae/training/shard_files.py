"""Writes and reads the folders that `shards` describes. Apart from it, as importing PyTorch's part takes half a second."""

from __future__ import annotations

import pickle
import secrets
import shutil
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from crate_mae.files import make_folder, sync_folder
from crate_mae.training.ranks import TorchrunRanks
from crate_mae.training.shards import FOLDER, TENSORS

_CHUNK = 2**24


class BackgroundSave:
    """Writes the tensors of all ranks in the background, while the run goes on.

    Args:
        folder: of the states.
        state: of which `TENSORS` are written.
        ranks: of the run.
        commit: called on the first rank, in the background, when all tensors are on the disk, with what `read_tensors` needs.
    """

    def __init__(
        self, folder: Path, state: dict[str, Any], ranks: TorchrunRanks, commit: Callable[[dict[str, Any]], object]
    ) -> None:
        name = ranks.of_first(lambda: f"step_{state['step']}-{secrets.token_hex(4)}")
        self.folder = folder / name
        ranks.of_first(lambda: make_folder(self.folder))
        tensors = {part: {str(key): value for key, value in state[part].items()} for part in TENSORS if part in state}
        writer = _Writer(self.folder, commit)
        self._is_first = ranks.is_first
        saving: Any = dcp.async_save(tensors, storage_writer=writer, process_group=ranks.of_states)
        self._saving: Future[Any] = getattr(saving, "upload_completion", saving)

    def is_over(self) -> bool:
        return self._saving.done()

    def wait(self) -> None:
        """Return when the tensors are on the disk.

        Raises:
            OSError: they could not be written; older states are still there.
        """
        try:
            self._saving.result()
        except dcp.CheckpointException as error:
            if self._is_first:
                shutil.rmtree(self.folder, ignore_errors=True)
            failed = next((cause for cause, _ in error.failures.values() if isinstance(cause, OSError)), None)
            if failed is None:
                raise
            told = type(failed)(
                str(failed) if "cannot write" in str(failed) else f"cannot write {self.folder}: {failed.strerror}"
            )
            told.errno = failed.errno
            raise told from error


class _Writer(dcp.FileSystemWriter):
    """Writes and syncs the file of each rank; when all are there, the first rank calls `commit` with their checksums."""

    def __init__(self, folder: Path, commit: Callable[[dict[str, Any]], object]) -> None:
        super().__init__(folder)
        self._folder, self._commit = folder, commit

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, results)
        sync_folder(self._folder)
        names = {result.storage_data.relative_path for of_rank in results for result in of_rank} | {".metadata"}
        paths = [self._folder / name for name in sorted(names)]
        if missing := next((path for path in paths if not path.is_file()), None):
            raise FileNotFoundError(f"cannot write {missing}: it is not there; do all processes see the folder?")
        sums = {path.name: [path.stat().st_size, _checksum(path)] for path in paths}
        self._commit({"folder": self._folder.name, "files": sums})


def read_tensors(folder: Path, written: dict[str, Any]) -> dict[str, dict[Any, Any]]:
    """The parts of a state, whole, as one process would have written them.

    Args:
        folder: of the states.
        written: what `commit` was called with.

    Raises:
        ValueError: a file is gone, or is not what was written.
    """
    name, files = written.get("folder"), written.get("files")
    if not isinstance(name, str) or not FOLDER.fullmatch(name) or not isinstance(files, dict):
        raise ValueError("it does not say where its tensors are")
    for file, (size, checksum) in files.items():
        path = folder / name / Path(file).name
        if not path.is_file():
            raise ValueError(f"{name}/{file} is gone")
        if path.stat().st_size != size or _checksum(path) != checksum:
            raise ValueError(f"{name}/{file} is damaged")
    reader = _Reader(folder / name)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled"
        )  # as intended: each rank reads for itself
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    parts: dict[str, dict[Any, Any]] = {part: {} for part in TENSORS[:2]}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        if part == "optimizer":
            index, _, rest = rest.partition(".")
            parts[part].setdefault(int(index), {})[rest] = tensor
        else:
            parts.setdefault(part, {})[rest] = tensor
    return parts


class _Reader(dcp.FileSystemReader):
    """Reads the metadata, a pickle, without running what may be in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{self.path}: .metadata has none")
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(("torch", "pathlib", "collections")):
            found = super().find_class(module, name)
            # The class must be defined there: a name may have dots, and pathlib's "io.FileIO" would empty a file.
            of_metadata = isinstance(found, type) and found.__module__ in _OF_METADATA
            if of_metadata or isinstance(found, torch.dtype) or (module, name) in _ALSO:
                return found
        raise ValueError(f"it names {module}.{name}, which no state does")


_OF_METADATA = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "pathlib",
    "pathlib._local",
)
_ALSO = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
