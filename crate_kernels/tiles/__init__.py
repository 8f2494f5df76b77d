"""Tile sizes that ship with the package: one table an operator, keyed by device family.

A table is a plain dict ``{family: {(kernel, ...key): {constexpr: value, num_warps, num_stages}}}``. The family
``"default"`` serves every device without a table of its own; the ahead-of-time gate proves each entry by compiling it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Table = Mapping[str, Mapping[tuple, Mapping[str, int]]]

_pretended: str | None = None


@contextmanager
def pretend(family: str) -> Iterator[None]:
    """Choose tiles as if running on ``family`` ("sm_90"): how kernels are compiled ahead of time without a device."""
    global _pretended
    previous, _pretended = _pretended, family
    try:
        yield
    finally:
        _pretended = previous


def family(device: torch.device) -> str:
    """The device family tiles are chosen for: "sm_90" on an H100 or H200, "default" where there is no CUDA device."""
    if _pretended is not None:
        return _pretended
    if device.type != "cuda":
        return "default"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def select(table: Table, device: torch.device, *key: Any) -> dict[str, int]:
    """The launch options for ``key`` on ``device``: its family's entry, else the conservative default."""
    entries = table.get(family(device), {})
    return dict(entries.get(key) or table["default"][key])
