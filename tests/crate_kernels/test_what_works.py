"""What of PyTorch works around each operator and model, on each path: right or refused by name, and nothing else.

Every cell of the table in docs/operators.md is found by running it. ``CRATE_KERNELS_WRITE=1`` writes what was found.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from calls import CALLS, Call
from official import Attention, FeedForward
from support import error, small_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import crate_kernels

pytest.importorskip("triton")

BEGIN, END = "<!-- what works: begin -->", "<!-- what works: end -->"
PAGE = Path(__file__).parents[2] / "docs" / "operators.md"
# In which dtype, and how far from the reference in float64.
PATHS = {"composed": (torch.float64, 1e-10), "triton": (torch.float32, 2e-5)}


class Operator(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        _, *weights = call.inputs(torch.float64)
        self.function, self.weights = call.function, nn.ParameterList(weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


class Official(nn.Module):
    """A layer of the official CRATE."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.attention, self.sparsify = Attention(dim, 2, dim // 2), FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.sparsify(self.norms[1](x + self.attention(self.norms[0](x))))


class Reconstruction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.noise = small_model(embed_dim=8, img_size=8), torch.rand(1, 4)

    def forward(self, images: Tensor) -> Tensor:
        loss, pred, _ = self.model(images, noise=self.noise)
        return loss + pred


def accelerated() -> nn.Module:
    model = Official()
    assert len(crate_kernels.accelerate(model).swapped) == 2
    return model


# Each with the shape of what it takes.
ROWS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (lambda call=call: Operator(call), (2, 4, 6)) for name, call in CALLS.items()},
    "an official CRATE, accelerated": (accelerated, (2, 9, 8)),
    "CrateMAE": (Reconstruction, (1, 3, 8, 8)),
}


class Trial:
    """One row in one dtype: a model, its leaves (what it takes, then its parameters), and it as a function of them."""

    def __init__(self, row: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        make, shape = ROWS[row]
        self.model = make().to(dtype)
        named = dict(self.model.named_parameters())
        self.names, self.leaves = list(named), [torch.randn(shape, dtype=torch.float64).to(dtype), *named.values()]
        self.leaves[0].requires_grad_()

    def __call__(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(self.model, dict(zip(self.names, parameters, strict=True)), (x,))

    def with_gradients(self, run: Callable[[Tensor], Tensor], leaves: list[Tensor] | None = None) -> list[Tensor]:
        leaves = leaves or self.leaves
        out = run(leaves[0])
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def plain(trial: Trial) -> list[Tensor]:
    return trial.with_gradients(trial.model)


def double_backward(trial: Trial) -> list[Tensor]:
    """Of a function that is linear in the output, too: no gradient that arrives has a derivative."""
    first = torch.autograd.grad(trial(*trial.leaves).sum(), trial.leaves, create_graph=True)
    squares = torch.stack([grad.square().sum() for grad in first])
    return [*first, *torch.autograd.grad(squares.sum(), trial.leaves, materialize_grads=True)]


def func_grad(trial: Trial) -> list[Tensor]:
    leaves = [leaf.detach() for leaf in trial.leaves]
    return list(torch.func.grad(lambda *leaves: trial(*leaves).square().sum(), tuple(range(len(leaves))))(*leaves))


def vmap(trial: Trial) -> list[Tensor]:
    x, *parameters = trial.leaves
    return [torch.vmap(lambda x: trial(x, *parameters))(torch.stack([x, x + 1]))]


def jvp(trial: Trial) -> list[Tensor]:
    leaves = tuple(leaf.detach() for leaf in trial.leaves)
    return list(torch.func.jvp(trial, leaves, tuple(leaf.cos() for leaf in leaves)))


def export(trial: Trial) -> list[Tensor]:
    """Saved, loaded, and run with gradients."""
    file = io.BytesIO()
    program = torch.export.export(trial.model, (trial.leaves[0].detach(),))
    assert "crate_kernels" not in str(program.graph), "an operator of ours was exported"
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    parameters = dict(loaded.named_parameters())
    return trial.with_gradients(loaded, [trial.leaves[0], *(parameters[name] for name in trial.names)])


def compiled(trial: Trial) -> list[Tensor]:
    torch.compiler.reset()
    return trial.with_gradients(torch.compile(trial.model, fullgraph=True, backend="aot_eager"))


def checkpointed(trial: Trial) -> list[Tensor]:
    return trial.with_gradients(lambda x: checkpoint(trial.model, x, use_reentrant=False))


def threads(trial: Trial) -> list[Tensor]:
    """Beside a thread that forces another path meanwhile."""
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with crate_kernels.use("reference"):
            inside.set()
            assert done.wait(60)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other)
        assert inside.wait(60)
        found = plain(trial)
        done.set()
        waiting.result()
    return found


COLUMNS = {
    "double backward": double_backward,
    "`func.grad`": func_grad,
    "`vmap`": vmap,
    "`jvp`": jvp,
    "`export`": export,
    "`compile`": compiled,
    "`checkpoint`": checkpointed,
    "threads": threads,
}
# The reference needs not be compiled, nor anything of the kind, to be the truth.
PLAIN = (export, compiled, checkpointed, threads)


@cache
def truth(row: str, column: Callable[[Trial], list[Tensor]]) -> list[Tensor]:
    with crate_kernels.use("reference"):
        return column(Trial(row, torch.float64))


def outcome(row: str, path: str, column: Callable[[Trial], list[Tensor]]) -> str:
    (dtype, tolerance), exact = PATHS[path], truth(row, plain if column in PLAIN else column)
    try:
        with crate_kernels.use(path):
            found = column(Trial(row, dtype))
    except RuntimeError as refusal:
        named = re.match(r'(\w+): .*; (run the forward under )?crate_kernels\.use\("composed"\)', str(refusal))
        if named is None or named[1] not in (*CALLS, "CrateMAE"):
            raise
        return "refused"
    for one, wanted in zip(found, exact, strict=True):
        assert error(one, wanted) < tolerance, column.__name__
    return "right"


@cache
def outcomes(row: str, path: str) -> tuple[str, ...]:
    return tuple(outcome(row, path, column) for column in COLUMNS.values())


def lines() -> Iterable[str]:
    """The table; rows that agree on a path are one."""
    yield "| | path | " + " | ".join(COLUMNS) + " |"
    yield "| --- " * (2 + len(COLUMNS)) + "|"
    for path in PATHS:
        alike: dict[tuple[str, ...], list[str]] = {}
        for row in ROWS:
            alike.setdefault(outcomes(row, path), []).append(f"`{row}`" if row.isidentifier() else row)
        for cells, rows in alike.items():
            yield "| " + " | ".join(("all" if len(rows) == len(ROWS) else ", ".join(rows), path, *cells)) + " |"


def split_page() -> tuple[str, str, str]:
    """What stands before the table, the table, and what stands behind it."""
    before, rest = PAGE.read_text().split(BEGIN)
    table, after = rest.split(END)
    return before, table.strip(), after


def said() -> dict[tuple[str, str], tuple[str, ...]]:
    """The page's outcomes by row and path."""
    head, _, *rows = split_page()[1].splitlines()
    assert head == next(iter(lines())), "CRATE_KERNELS_WRITE=1 writes what was found"
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for line in rows:
        names, path, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for row in ROWS if names == "all" else [name.strip("`") for name in names.split(", ")]:
            assert found.setdefault((row, path), tuple(cells)) == tuple(cells)
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", ROWS)
def test_right_or_refused(row: str, path: str) -> None:
    """``outcome`` raises where it is neither; nothing is refused for want of kernels where there are none; the page says so."""
    assert path == "triton" or set(outcomes(row, path)) == {"right"}
    if os.environ.get("CRATE_KERNELS_WRITE") != "1":
        assert said()[row, path] == outcomes(row, path), "CRATE_KERNELS_WRITE=1 writes what was found"


def test_the_page_has_each_row_and_path() -> None:
    if os.environ.get("CRATE_KERNELS_WRITE") == "1":
        before, _, after = split_page()
        PAGE.write_text(before + BEGIN + "\n\n" + "\n".join(lines()) + "\n\n" + END + after)
    assert set(said()) == {(row, path) for row in ROWS for path in PATHS}
