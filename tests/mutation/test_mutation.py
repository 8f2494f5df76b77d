"""Every mistake in a kernel is caught: a copy of its module with one mistake fails some probe, the module itself none.

Which mistakes are made: ``mutants.py``. What a kernel has to show: ``probes.py``. A mutant that computes the same is listed
below with the reason, and is run too: one that a probe kills does not belong there. A new line in a kernel brings its mutants
with it; where one survives, a probe is missing, or a reason. ``-s`` prints all mutants and what killed them; those that no
longer run at all, for want of types that fit, are counted apart.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from mutation import probes
from mutation.memory import OutOfBounds, Watch
from mutation.mutants import Mistake, Mutant, callers, copy_of, grafted, mutants

from crate_kernels.products import launchers as products
from crate_kernels.products import preparation
from crate_kernels.shared_attention import triton as shared_attention

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, which a GPU switches off"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # mutants overflow
]

PRODUCT_MISTAKES = [
    # The wrong operand.
    Mistake("multiply", "x_row_stride, x_column_stride, tokens, width", "x_column_stride, x_row_stride, tokens, width"),
    Mistake("multiply", "x_row_stride, x_column_stride, tokens, inner", "x_column_stride, x_row_stride, tokens, inner"),
    Mistake(
        "multiply",
        "matrix_row_stride, matrix_column_stride, inner_width",
        "matrix_column_stride, matrix_row_stride, inner_width",
    ),
    *(
        Mistake(
            kernel,
            "matrix_row_stride, matrix_column_stride,\n        LIBRARY",
            "matrix_column_stride, matrix_row_stride,\n        LIBRARY",
        )
        for kernel in ("project_kernel", "input_gradient_kernel")
    ),
    Mistake(
        "project_kernel",
        "inner_width, width, x_row_stride, x_column_stride",
        "inner_width, width, x_column_stride, x_row_stride",
    ),
    Mistake(
        "input_gradient_kernel",
        "inner_width, width, g_row_stride, g_column_stride",
        "inner_width, width, g_column_stride, g_row_stride",
    ),
    *(
        Mistake(kernel, "mean, rstd = load_pairs", "rstd, mean = load_pairs")
        for kernel in ("behind_projection", "gradient_rows_kernel", "behind_input_gradient")
    ),
    Mistake("behind_projection", "mean * load_row(column_sum,", "mean * load_row(offset,"),
    Mistake("behind_projection", "product += load_row(offset,", "product += load_row(column_sum,"),
    Mistake("behind_projection", "* load_row(norm_weight,", "* load_row(norm_bias,"),
    Mistake("behind_projection", "skip_tile += load_row(norm_bias,", "skip_tile += load_row(norm_weight,"),
    Mistake("behind_projection", "product = rectify(product,", "product = soft_threshold(product,"),
    Mistake("behind_projection", "product = soft_threshold(product,", "product = rectify(product,"),
    Mistake(
        "behind_projection",
        "skip_row_stride, skip_column_stride, tokens",
        "skip_column_stride, skip_row_stride, tokens",
    ),
    Mistake("gradient_rows_kernel", "load_row(product_sum,", "load_row(product_offset,"),
    Mistake("gradient_rows_kernel", "load_row(product_offset,", "load_row(product_sum,"),
    Mistake("gradient_rows_kernel", "tl.sum(c1, 1)", "tl.sum(c2, 1)"),
    Mistake("gradient_rows_kernel", "tl.sum(c2, 1)", "tl.sum(c1, 1)"),
    Mistake("gradient_rows_kernel", "tl.sum(g, 0)", "tl.sum(g * rstd, 0)"),
    Mistake("gradient_rows_kernel", "tl.sum(mean * g, 0)", "tl.sum(rstd * g, 0)"),
    Mistake(
        "gradient_rows_kernel",
        "grad_row_stride, grad_column_stride, tokens",
        "grad_column_stride, grad_row_stride, tokens",
    ),
    Mistake("gradient_rows_kernel", "y_row_stride, y_column_stride, tokens", "y_column_stride, y_row_stride, tokens"),
    Mistake("behind_input_gradient", "c1, c2 = load_pairs", "c2, c1 = load_pairs"),
    Mistake("behind_input_gradient", "            grad, clamped_rows", "            g, clamped_rows"),
    *(
        Mistake(
            "behind_input_gradient",
            f"{name}_row_stride, {name}_column_stride, tokens",
            f"{name}_column_stride, {name}_row_stride, tokens",
        )
        for name in ("grad", "y", "x", "extra")
    ),
    Mistake("behind_input_gradient", "columns, width, 1, tokens", "columns, 1, width, tokens"),
    Mistake("moments_kernel", "tl.store(stats + rows, mean,", "tl.store(stats + rows, rstd,"),
    Mistake("moments_kernel", "+ rows, rstd, mask", "+ rows, mean, mask"),
    Mistake("moments_kernel", "float32) - mean[:, None]) * rstd[:, None]", "float32) - rstd[:, None]) * mean[:, None]"),
    Mistake("add_moments", "step * step * (start * share)", "0.0"),
    Mistake("add_moments", "tl.minimum(width - start, columns.shape[0])", "(columns.shape[0] + 0 * start)"),
    # A mask, a factor or a rounding dropped, in a form that still runs.
    Mistake("load_tile", "(rows < row_count) | WHOLE_ROWS", "(rows < row_count) | True"),
    Mistake("load_tile", "(columns < column_count) | WHOLE_COLUMNS", "(columns < column_count) | True"),
    Mistake("inverse_deviation", "1.0 / tl.sqrt(squares / width + eps)", "tl.sqrt(squares / width + eps)"),
    Mistake(
        "gradient_rows_kernel", "(g * rstd if SCALED else g).to(g_out.dtype.element_ty)", "g * rstd if SCALED else g"
    ),
    Mistake("behind_input_gradient", "product.to(out.dtype.element_ty).to(tl.float32)", "product"),
    Mistake("inverse_deviation", "(squares / width + eps)", "(0.0 * squares / width + eps)"),
    # NaN taken for a value that the threshold stops, or a mask that fits the other threshold.
    Mistake("rectify", "u <= threshold, 0.0, u - threshold", "u > threshold, u - threshold, 0.0"),
    Mistake(
        "soft_threshold",
        "tl.abs(u) <= threshold, 0.0, tl.where(u < 0.0, u + threshold, u - threshold)",
        "tl.abs(u) > threshold, tl.where(u < 0.0, u + threshold, u - threshold), 0.0",
    ),
    Mistake("masked_gradient", "y != 0.0", "y > 0.0"),
    # A tile forgotten.
    Mistake("multiply", "in range(0,", "in range(BLOCK_K,"),
    Mistake("gradient_rows_kernel", "in range(0,", "in range(BLOCK_N,"),
    *(
        Mistake("moments_kernel", before, before.replace("range(0,", "range(BLOCK_N,"))
        for before in (
            "squares = tl.zeros((BLOCK_M,), tl.float32)\n    for start in range(0,",
            "is not None:\n        for start in range(0,",
        )
    ),
]

ATTENTION_MISTAKES = [
    # The wrong operand.
    Mistake("add_tile_gradient", "lse_i = load_numbers(lse_head_ptr,", "lse_i = load_numbers(delta_head_ptr,"),
    Mistake("add_tile_gradient", "delta_i = load_numbers(delta_head_ptr,", "delta_i = load_numbers(lse_head_ptr,"),
    Mistake("add_tile_gradient", "exp2(scores - lse_i[None, :])", "exp2(scores - lse_j[:, None])"),
    Mistake("add_tile_gradient", "exp2(scores - lse_j[:, None])", "exp2(scores - delta_j[:, None])"),
    Mistake("add_tile_gradient", "grad_p_ij - delta_i[None, :]", "grad_p_ij - delta_j[:, None]"),
    Mistake("add_tile_gradient", "grad_p_ji - delta_j[:, None]", "grad_p_ji - lse_j[:, None]"),
    Mistake("add_tile_gradient", "factor_ji, factor_ij =", "factor_ij, factor_ji ="),
    Mistake("add_tile_gradient", "p_ij * factor_ij if", "p_ij * factor_ji if"),
    Mistake("add_tile_gradient", "grad_p_ij *= factor_ij", "grad_p_ij *= factor_ji"),
    Mistake("add_tile_gradient", "grad_p_ji *= factor_ji", "grad_p_ji *= factor_ij"),
    Mistake("add_tile_gradient", "products_of_rows(w_j, grad_out_i,", "products_of_rows(w_j, w_i,"),
    Mistake("add_tile_gradient", "products_of_rows(grad_out_j, w_i,", "products_of_rows(w_j, w_i,"),
    Mistake("add_tile_gradient", "else p_ij, grad_out_i,", "else p_ij, w_i,"),
    Mistake("add_tile_gradient", "grad_scores, w_i,", "grad_scores, grad_out_i,"),
    Mistake("dropout_factors", "tl.where(row <= column, first, second)", "tl.where(row <= column, second, first)"),
    Mistake("dropout_factors", "tl.where(column <= row, first, second)", "tl.where(column <= row, second, first)"),
    Mistake("dropout_factors", "head, 0)", "0, head)"),
    # The wrong direction of time.
    Mistake("attend_to_tile", "rows_j[None, :] <= rows_i[:, None]", "rows_j[None, :] >= rows_i[:, None]"),
    Mistake(
        "add_tile_gradient", "rows_i[None, :] >= rows_j[:, None], p_ij", "rows_i[None, :] <= rows_j[:, None], p_ij"
    ),
    Mistake(
        "add_tile_gradient", "rows_i[None, :] <= rows_j[:, None], p_ji", "rows_i[None, :] >= rows_j[:, None], p_ji"
    ),
    # What was summed is not rescaled, or not divided in the end.
    Mistake("attend_to_tile", "scale_rows(out_i, rescale, DIM_B)", "out_i"),
    Mistake("forward_kernel", "1.0 / row_sum", "row_sum"),
    # A tail mask dropped.
    Mistake("attend_to_tile", "HEAD_DIM, DIM_A, DIM_B, MASKED)", "HEAD_DIM, DIM_A, DIM_B, False)"),
    Mistake(
        "add_tile_gradient",
        "w_token, w_feature, HEAD_DIM, DIM_A, DIM_B, MASKED",
        "w_token, w_feature, HEAD_DIM, DIM_A, DIM_B, False",
    ),
    Mistake(
        "add_tile_gradient",
        "grad_out_feature, HEAD_DIM, DIM_A, DIM_B, MASKED",
        "grad_out_feature, HEAD_DIM, DIM_A, DIM_B, False",
    ),
    Mistake("add_tile_gradient", "(lse_head_ptr, rows_i, end, MASKED)", "(lse_head_ptr, rows_i, end, False)"),
    Mistake("add_tile_gradient", "(delta_head_ptr, rows_i, end, MASKED)", "(delta_head_ptr, rows_i, end, False)"),
    Mistake("backward_kernel", "(lse_head_ptr, rows_j, end)", "(lse_head_ptr, rows_j, end, False)"),
    Mistake("backward_kernel", "(delta_head_ptr, rows_j, end)", "(delta_head_ptr, rows_j, end, False)"),
    Mistake("forward_kernel", "rows_i, end, tokens, out_token", "rows_i, tokens, tokens, out_token"),
    Mistake("backward_kernel", "rows_j, end, tokens, dw_token", "rows_j, tokens, tokens, dw_token"),
    # A tile forgotten, or walked twice.
    Mistake("attend_to_tokens", "range(0, whole,", "range(BLOCK, whole,"),
    Mistake("attend_to_tokens", "tl.range(whole,", "tl.range(0,"),
    Mistake("attend_to_tokens", "tl.range(whole,", "tl.range(whole + TAIL,"),
    Mistake("backward_kernel", "range(0, end_key,", "range(BLOCK_COLUMNS, end_key,"),
    Mistake("backward_kernel", "range(first_query,", "range(first_query + BLOCK_COLUMNS,"),
    Mistake("backward_kernel", "range(0, end_i -", "range(BLOCK_COLUMNS, end_i -"),
    Mistake("backward_kernel", "tl.range(whole,", "tl.range(0,"),
    Mistake("backward_kernel", "tl.range(whole,", "tl.range(whole + TAIL,"),
]

# Mutants that compute the same, by the reason why.
PRODUCT_EQUIVALENTS = {
    "WHOLE only saves a mask that is true everywhere": (
        "load_tile: (rows < row_count) | WHOLE_ROWS -> (rows < row_count)",
        "load_tile: (columns < column_count) | WHOLE_COLUMNS -> (columns < column_count)",
    ),
    "rows are clamped, so a mask along them is true everywhere": (
        "multiply: load_tile, argument 7: True -> False (every place)",
        "behind_projection: load_tile, argument 7: True -> False (every place)",
        "behind_input_gradient: load_tile, argument 7: True -> False (every place)",
    ),
    "numbers beyond the end meet a gradient of zero, or a column that is not stored; they need only be finite": (
        "load_row: tl.load(vector + columns, mask=columns < column_count, other=0.0)"
        " -> tl.load(vector + columns, mask=columns < column_count, other=1.0)",
    ),
    "at the threshold itself both branches give zero": (
        "rectify: u <= threshold -> u < threshold",
        "soft_threshold: tl.abs(u) <= threshold -> tl.abs(u) < threshold",
    ),
    "zero is inside the threshold, and a gradient is zero there": (
        "soft_threshold: u < 0.0 -> u <= 0.0",
        "before_threshold: y < 0.0 -> y <= 0.0",
    ),
    "a relu's output is never negative, so the signed form says the same": (
        "before_threshold: if ACTIVATION == 'relu' -> False",
    ),
}

ATTENTION_EQUIVALENTS = {
    "a second part without features, where Triton makes one, is read by nobody": (
        "zero_parts: if DIM_B == 0 -> False",
    ),
    "a negative length ends every walk and mask where zero does": (
        "count_tokens: tl.maximum(tl.load(lengths_ptr + head // heads), 0) -> tl.load(lengths_ptr + head // heads)",
    ),
    "a whole tile's mask is true everywhere, and tiles of TAIL, masked, cover what whole tiles do: only work is saved": (
        "load_numbers: if MASK_ROWS -> True",
        "attend_to_tokens: if TAIL < BLOCK -> False",
        "attend_to_tokens: MASKED=False -> MASKED=True",
        "backward_kernel: if TAIL < BLOCK_COLUMNS -> False",
        "backward_kernel: MASKED=False -> MASKED=True",
    ),
    "past the end w_i and dO_i are zero, and so is all that they add: a number there need only be finite": (
        "load_numbers: tl.load(pointer + rows, mask=rows < end, other=0.0)"
        " -> tl.load(pointer + rows, mask=rows < end, other=1.0)",
    ),
    "keys past the end come after every row that is stored, and the causal mask stops them already": (
        "attend_to_tile: is_key & (rows_j[None, :] <= rows_i[:, None]) -> (rows_j[None, :] <= rows_i[:, None])",
    ),
    "a row's score with itself is not negative, so its maximum may start at zero": (
        "attend_to_tokens: float('-inf') -> 0.0",
    ),
    "tiles above the diagonal, past the end, or of padding are masked or not stored: leaving them out saves work only": (
        "forward_kernel: if IS_CAUSAL -> False",
        "forward_kernel: tl.minimum(end, start_i + BLOCK_ROWS) -> end",
        "forward_kernel: tl.minimum(end, start_i + BLOCK_ROWS) -> start_i + BLOCK_ROWS",
        "forward_kernel: if lengths_ptr is not None -> False",
        "forward_kernel: end_j = tl.where(start_i < end, end_j, 0) -> pass",
        "forward_kernel: tl.where(start_i < end, end_j, 0) -> end_j",
        "forward_kernel: start_i < end -> start_i <= end",
        "backward_kernel: if lengths_ptr is not None -> False",
        "backward_kernel: tl.where(start_j < end, end, 0) -> end",
        "backward_kernel: start_j < end -> start_j <= end",
        "backward_kernel: if IS_CAUSAL -> False",
        "backward_kernel: tl.minimum(end_i, start_j + BLOCK_ROWS) -> end_i",
        "backward_kernel: tl.minimum(end_i, start_j + BLOCK_ROWS) -> start_j + BLOCK_ROWS",
    ),
    "rows of padding are stored as zero whatever they were divided by": (
        "forward_kernel: row_sum = tl.where(rows_i < end, row_sum, 1.0) -> pass",
        "forward_kernel: tl.where(rows_i < end, row_sum, 1.0) -> row_sum",
        "forward_kernel: rows_i < end -> rows_i <= end",
    ),
    "the first term is added to zero": (
        "add_tile_gradient: grad_scores += p_ij * (grad_p_ij - delta_i[None, :])"
        " -> grad_scores = p_ij * (grad_p_ij - delta_i[None, :])",
    ),
    "one walk for both sides, or one for each, sum the same terms": (
        "backward_kernel: if IS_CAUSAL or PRECISION == 'ieee' -> True",
        "backward_kernel: IS_CAUSAL or PRECISION == 'ieee' -> IS_CAUSAL",
    ),
}

PREPARATION_MISTAKES = [
    # The wrong operand.
    Mistake("prepare_kernel", "tl.load(given + 1), tl.load(given + 2)", "tl.load(given + 2), tl.load(given + 1)"),
    Mistake("prepare_kernel", "load_optional(tl.load(given + 3),", "load_optional(tl.load(given + 1),"),
    Mistake("prepare_kernel", "columns, row_stride, column_stride,", "columns, column_stride, row_stride,"),
    Mistake(
        "prepare_kernel",
        "operand_row_stride, operand_column_stride, VECTOR",
        "operand_column_stride, operand_row_stride, VECTOR",
    ),
    Mistake("combine_kernel", "tl.load(given + 1), tl.load(given + 2)", "tl.load(given + 2), tl.load(given + 1)"),
    Mistake("combine_kernel", "tl.dot(tl.trans(left), right,", "tl.dot(tl.trans(right), left,"),
    Mistake(
        "combine_kernel",
        "left = load_tile(weight, inner, rows, row_stride, column_stride",
        "left = load_tile(weight, inner, rows, column_stride, row_stride",
    ),
    Mistake("gradient_kernel", "load_row(mean_column,", "load_row(column,"),
    Mistake("gradient_kernel", "load_row(column,", "load_row(mean_column,"),
    Mistake("gradient_kernel", "tl.load(column + rows,", "tl.load(mean_column + rows,"),
    Mistake("gradient_kernel", "tl.load(beta + rows,", "tl.load(gamma + rows,"),
    Mistake("gradient_kernel", "tl.sum(tile * h, 1)", "tl.sum(weight * h, 1)"),
    Mistake("gradient_kernel", "tl.sum(tile * sums, 1)", "tl.sum(h * sums, 1)"),
    *(
        Mistake(
            "gradient_kernel",
            f"{name}_row_stride, {name}_column_stride, inner",
            f"{name}_column_stride, {name}_row_stride, inner",
        )
        for name in ("product", "matrix")
    ),
    Mistake(
        "gradient_kernel",
        "grad_row_stride + columns.to(tl.int64)[None, :] * grad_column_stride",
        "grad_column_stride + columns.to(tl.int64)[None, :] * grad_row_stride",
    ),
    Mistake("scale_tile", "tl.sum(beta[:, None] * tile, 0)", "tl.sum(beta[:, None] * scaled, 0)"),
    Mistake("scale_tile", "inner_width, 1.0, VECTOR", "inner_width, 0.0, VECTOR"),
    Mistake("scale_tile", "inner_width, 0.0, VECTOR", "inner_width, 1.0, VECTOR"),
    # A tile forgotten.
    Mistake("prepare_kernel", "range(0, inner_width,", "range(BLOCK_K, inner_width,"),
    Mistake("gradient_kernel", "range(0, width,", "range(BLOCK_N, width,"),
    Mistake("combine_kernel", "start in range(0, width, BLOCK_M", "start in range(BLOCK_M, width, BLOCK_M"),
    Mistake("combine_kernel", "inner_start in range(0, width", "inner_start in range(BLOCK_K, width"),
]

PREPARATION_EQUIVALENTS = {
    "beyond the end gamma and beta meet rows of zeros, and a bias columns that are not stored": (
        "load_optional: tl.load(vector + entries, mask=entries < count, other=0.0)"
        " -> tl.load(vector + entries, mask=entries < count, other=1.0)",
    ),
    "beyond the end there are rows that are not stored: what they are multiplied with need only be finite": tuple(
        f"gradient_kernel: tl.load({vector} + rows, mask=inside, other=0.0)"
        f" -> tl.load({vector} + rows, mask=inside, other=1.0)"
        for vector in ("gamma", "beta", "column", "diagonal")
    ),
}


class Case(NamedTuple):
    """A module of kernels, and what belongs to its mutation."""

    module: ModuleType
    tiles: dict
    probes: object
    mistakes: list[Mistake]
    equivalents: dict[str, tuple[str, ...]]


CASES = {
    "products": Case(products, probes.PRODUCT_TILES, probes.product_probes, PRODUCT_MISTAKES, PRODUCT_EQUIVALENTS),
    "shared_attention": Case(
        shared_attention,
        probes.ATTENTION_TILES,
        probes.attention_probes,
        ATTENTION_MISTAKES,
        ATTENTION_EQUIVALENTS,
    ),
    "preparation": Case(preparation, {}, probes.preparation_probes, PREPARATION_MISTAKES, PREPARATION_EQUIVALENTS),
}
KERNELS = [
    *(
        ("products", kernel)
        for kernel in ("moments_kernel", "project_kernel", "gradient_rows_kernel", "input_gradient_kernel")
    ),
    *(("shared_attention", kernel) for kernel in ("forward_kernel", "delta_kernel", "backward_kernel")),
    *(("preparation", kernel) for kernel in ("prepare_kernel", "combine_kernel", "gradient_kernel")),
]


@functools.cache
def probes_of(case: str) -> list[probes.Probe]:
    return CASES[case].probes()


@functools.cache
def mutants_of(case: str) -> list[Mutant]:
    return mutants(source_of(case), CASES[case].mistakes)


def source_of(case: str) -> str:
    return Path(CASES[case].module.__file__).read_text()


def equivalent(case: str, name: str) -> str | None:
    """The listed name that stands for a mutant, itself or its name in every place."""
    listed = {entry for names in CASES[case].equivalents.values() for entry in names}
    everywhere = f"{name.split(' (place ')[0]} (every place)"
    return name if name in listed else everywhere if everywhere in listed else None


def ready(case: str, folder: Path, watch: Watch) -> ModuleType:
    module = copy_of(CASES[case].module, folder)
    module.TABLE = CASES[case].tiles
    if case == "products":
        module._ROWS = probes.ROWS
    watch.over(*vars(module).values())
    return module


def killer(probe: probes.Probe, module: ModuleType) -> str | None:
    """How the probe fails on the module, in words; None where it passes."""
    try:
        probe.check(module)
    except Exception as failure:
        while failure.__cause__ is not None:
            failure = failure.__cause__
        if isinstance(failure, OutOfBounds):
            return "touches memory outside its tensors"
        what = str(failure).splitlines()[0] if str(failure) else ""
        return what if isinstance(failure, AssertionError) else f"raises {type(failure).__name__}: {what}"
    return None


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    watch.install(monkeypatch)
    return watch


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_as_they_are_pass_every_probe(case: str, tmp_path: Path, watch: Watch) -> None:
    module = ready(case, tmp_path, watch)
    failed = {f"{probe.kernel}, {probe.name}": killer(probe, module) for probe in probes_of(case)}
    assert not any(failed.values()), failed


@pytest.mark.parametrize(("case", "kernel"), KERNELS, ids=[kernel for _, kernel in KERNELS])
def test_every_mutant_is_killed(case: str, kernel: str, tmp_path: Path, watch: Watch) -> None:
    """The mutants of a kernel, and of the functions that it is the first to use."""
    users, module = callers(source_of(case)), ready(case, tmp_path, watch)
    order = [name for owner, name in KERNELS if owner == case]
    survivors, alive, killed, broken = [], [], 0, 0
    for number, mutant in enumerate(mutants_of(case)):
        if kernel != next(name for name in order if name in users[mutant.function]):
            continue
        asked = [probe for probe in probes_of(case) if probe.kernel in users[mutant.function]]
        last = None
        with grafted(module, mutant, tmp_path / f"mutant_{number}.py") as function:
            watch.over(function)
            for last in ((probe, how) for probe in asked if (how := killer(probe, module))):
                if not last[1].startswith("raises"):  # a wrong number tells more than code that does not run: ask on
                    break
        listed = equivalent(case, mutant.name)
        if last is None and not listed:
            survivors.append(mutant.name)
        elif last is None:
            print(f"equivalent  {mutant.name}")
        elif listed and not last[1].startswith("raises"):  # whether it runs at all may depend on Triton's version
            alive.append(f"{mutant.name}: {last[1]}")
        else:
            ran = not last[1].startswith("raises")
            killed, broken = killed + ran, broken + (not ran)
            by = f"{last[0].kernel}, {last[0].name}: {last[1]}"
            print(f"{'killed    ' if ran else 'cannot run'}  {mutant.name}\n            by {by}")
    print(f"{kernel}: {killed} mutants killed, {broken} cannot run, {len(survivors)} survived")
    assert not survivors, "no probe sees the difference:\n" + "\n".join(survivors)
    assert not alive, "listed as equivalent, but killed:\n" + "\n".join(alive)


@pytest.mark.parametrize("case", CASES)
def test_the_list_of_equivalent_mutants_is_not_stale(case: str) -> None:
    used = {equivalent(case, mutant.name) for mutant in mutants_of(case)}
    for reason, names in CASES[case].equivalents.items():
        print(reason, *names, sep="\n    ")
        assert not set(names) - used, f"no such mutants: {sorted(set(names) - used)}"


def test_every_kernel_function_has_mutants_and_a_kernel_that_runs_it() -> None:
    for case in CASES:
        users, kernels = callers(source_of(case)), {kernel for owner, kernel in KERNELS if owner == case}
        assert all(using & kernels for using in users.values())
        assert users.keys() == {mutant.function for mutant in mutants_of(case)}
        assert {probe.kernel for probe in probes_of(case)} == kernels


def test_a_stale_mistake_is_an_error() -> None:
    source = "@triton.jit\ndef f(a, b):\n    return a + b + b\n"
    for mistake, message in (
        (Mistake("g", "a", "b"), "g is no kernel function"),
        (Mistake("f", "a - b", "a"), "found it 0 times"),
        (Mistake("f", "+ b", ""), "found it 2 times"),
    ):
        with pytest.raises(ValueError, match=message):
            mutants(source, [mistake])
    *_, last = mutants(source, [Mistake("f", "a + b", "b + a")])
    assert last.source == source.replace("a + b", "b + a", 1)
