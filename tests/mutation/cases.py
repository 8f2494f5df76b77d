"""The modules that are mutated, their probes, and which mutants of theirs compute the same."""

from __future__ import annotations

import pytest
from mutation import attention_probes, composed_probes, layer_probes, module_probes, product_probes
from mutation.hunting import Case
from mutation.memory import Watch
from mutation.modules import (
    attention,
    attention_kernels,
    attention_mask,
    composed_attention,
    composed_ista,
    composed_mssa,
    composed_norm_linear,
    composed_overcomplete,
    form,
    kernel_modules,
    layers,
    library_products,
    masks,
    patches,
    positions,
    preparation_kernels,
    product_kernels,
    products,
    row_pairs,
)
from mutation.mutants import Source

ROW_PAIRS = Source(row_pairs)
PRODUCT_SOURCE = Source(product_kernels, ROW_PAIRS)

ATTENTION = {
    "a second part without features, where Triton makes one, is read by nobody": ("zero_parts: DIM_B == 0 -> False",),
    "a negative length ends every walk and mask where zero does": (
        "count_tokens: tl.maximum(tl.load(lengths_ptr + head // heads), 0) -> tl.load(lengths_ptr + head // heads)",
    ),
    "what is the same in all rows may be one number": (
        "reach: rows * 0 + end -> end",
        "reach: rows * 0 -> 0 (place 2)",
    ),
    "of rows past the end nothing is stored, and nothing but zero where padding is": (
        "reach: tl.load(spans_ptr + rows, ...) -> tl.load(spans_ptr + rows, mask=rows < end, other=1.0)",
        "reach: tl.load(spans_ptr + tokens + rows, ...) -> tl.load(spans_ptr + tokens + rows, mask=rows < end, other=1.0)",
        "reach: rows < end -> rows <= end",
        "reach: end -> tokens (place 2)",
        "reach: end -> tokens (place 3)",
        "queries_of: reach(rows, end, tokens, ...) -> reach(rows, tokens, tokens, ...)",
        "load_key_mask: tl.load(...) -> tl.load(..., other=1.0)",
        "forward_kernel: load_parts(...) -> load_parts(w_head_ptr, rows_i, tokens, ...",
        "forward_kernel: ... if GAPS else rows_i >= end -> ...",
        "forward_kernel: rows_i >= end -> rows_i > end",
        "forward_kernel: GAPS or MASK_ROWS -> ...",
        "forward_kernel: end -> tokens (place 3)",
        "backward_kernel: load_parts(...) -> load_parts(..., rows_j, tokens, ...",
        "backward_kernel: load_pairs(...) -> load_pairs(..., rows_j, tokens, ...",
        "backward_kernel: keys_of(rows_j, end, ...) -> keys_of(rows_j, tokens, ...",
        "backward_kernel: queries_of(rows_j, end, ...) -> queries_of(rows_j, tokens, ...",
        "backward_kernel: tl.where(rows_j < end, gradient_of_scale(sums_j), 0.0) -> ...",
        "backward_kernel: rows_j < end -> rows_j <= end",
        "backward_kernel: correct_delta(...) -> correct_delta(..., rows_j, tokens, ...",
        "backward_kernel: end -> tokens (place 5)",
    ),
    "spans are clamped once more by the walk, or hold no row": (
        "reach: tl.maximum(tl.load(spans_ptr + tokens + rows, ...), 0) -> ...",
        "reach: tl.minimum(tl.maximum(tl.load(spans_ptr + tokens + rows, ...), 0), end) -> ...",
        "reach: tl.load(spans_ptr + rows, mask=rows < end, other=0) -> tl.load(spans_ptr + rows)",
    ),
    "a mask of rows that all exist is true everywhere": (
        "store_numbers: MASK_ROWS -> True",
        "...: HAS_PADDING or not WHOLE_ROWS -> not WHOLE_ROWS",
    ),
    "intervals of all tokens end where these do": (
        "attend_to_tile: is_within(...) if INTERVALS else rows_j[None, :] < end -> is_within(...",
        "backward_kernel: INTERVALS=False -> INTERVALS=True",
    ),
    "a whole tile's mask is true everywhere, and tiles of TAIL, masked, cover what whole tiles do: only work is saved": (
        "load_pairs: ... if MASK_ROWS else ... -> tl.load(pointers, mask=rows < end, other=0)",
        "add_tile_gradient: (CORRECT or NEED_SCALE) and MASKED and (not INTERVALS) -> ...",
        "attend_to_tokens: TAIL < BLOCK -> False",
        "...: MASKED=False -> MASKED=True",
        "backward_kernel: TAIL < BLOCK_COLUMNS -> False",
        "attend_to_tokens: attend_to_tile(...MASKED=False, ...) -> ...",
    ),
    "tiles beyond all intervals, past the end, or of padding are masked or not stored: to leave them out saves work": (
        "forward_kernel: INTERVALS -> False",
        "forward_kernel: tl.minimum(start_i + BLOCK_ROWS, end) -> end",
        "forward_kernel: tl.maximum(tl.minimum(start_i + BLOCK_ROWS, end) - 1, 0) -> ...",
        "forward_kernel: keys_of(start_i, ...",
        "forward_kernel: keys_of(last_i, ...",
        "forward_kernel: lengths_ptr is not None -> False",
        "forward_kernel: end_j = tl.where(start_i < end, end_j, 0) -> pass",
        "forward_kernel: tl.where(start_i < end, end_j, 0) -> ...",
        "forward_kernel: start_i < end -> start_i <= end",
        "forward_kernel: end -> ...",
        "forward_kernel: tokens -> end",
        "forward_kernel: attend_to_tokens(...) -> attend_to_tokens(w_i, rows_i, keys_i, first_j, ...",
        "backward_kernel: INTERVALS -> False",
        "backward_kernel: tl.minimum(start_j + BLOCK_ROWS, end) -> end",
        "backward_kernel: tl.maximum(tl.minimum(start_j + BLOCK_ROWS, end) - 1, 0) -> ...",
        "backward_kernel: keys_of(start_j, ...",
        "backward_kernel: keys_of(last_j, ...",
        "backward_kernel: queries_of(start_j, ...",
        "backward_kernel: queries_of(last_j, ...",
        "backward_kernel: lengths_ptr is not None -> False",
        "backward_kernel: tl.where(start_j < end, end_key, 0) -> ...",
        "backward_kernel: tl.where(start_j < end, end_query, 0) -> ...",
        "backward_kernel: start_j < end -> start_j <= end...",
        "backward_kernel: end -> ...",
        "backward_kernel: tokens -> end...",
        "backward_kernel: range(first_key, end_key, BLOCK_COLUMNS) -> range(...",
        "backward_kernel: range(first_query, end_query, BLOCK_COLUMNS) -> range(...",
        "backward_kernel: add_tile_gradient(...) -> ...start_i, tokens, ...",
    ),
    "without a causal mask keys and queries are the same tokens": (
        "backward_kernel: first_key, first_query, end_key, end_query = (0, 0, end, end) -> ...",
        "backward_kernel: first_key -> first_query",
        "backward_kernel: end_key -> end_query...",
        "backward_kernel: tl.range(whole, end_key, ...) -> tl.range(whole, end_query, ...",
        "backward_kernel: add_tile_gradient(...) -> ...rows_j, queries_j, keys_j, ...J_IS_KEY=True, J_IS_QUERY=True, ...",
    ),
    "what only the other side asks for": (
        "backward_kernel: ... -> add_tile_gradient(dw_j, sums_j, w_j, grad_out_j, lse_j, delta_j, rows_j, keys_j, queries_j, "
        "start_i, end, w_head_ptr, ...J_IS_KEY=False, J_IS_QUERY=True, ...",
        "backward_kernel: ... -> add_tile_gradient(dw_j, sums_j, w_j, ..., rows_j, keys_j, queries_j, start_i, end, w_head_ptr, "
        "grad_out_head_ptr, pairs_head_ptr, w_token, w_feature, grad_out_token, grad_out_feature, ..."
        "J_IS_KEY=True, J_IS_QUERY=False, ...",
    ),
    "one walk for both sides, or one for each, sum the same terms": (
        "backward_kernel: IS_CAUSAL or PRECISION == 'ieee' -> True",
        "backward_kernel: IS_CAUSAL or PRECISION == 'ieee' -> IS_CAUSAL",
    ),
    "past the end w_i and dO_i are zero, and so is all that they add: a number there need only be finite": (
        "load_pairs: tl.load(..., other=0) -> tl.load(..., other=1.0)",
    ),
    "scores are scaled, or their exponents": ("attend_to_tile: DIM_A == 64 and DIM_B == 16 -> ...",),
    "the second w is the first": (
        "backward_kernel: load_parts(w_head_ptr, ...) -> load_parts(w_head_ptr, ..., own_token, w_feature, ...",
        "backward_kernel: load_parts(w_head_ptr, ...) -> load_parts(w_head_ptr, ..., w_token, own_feature, ...",
        "backward_kernel: load_parts(own_head_ptr, ...) -> load_parts(w_head_ptr, ...",
        "backward_kernel: add_tile_gradient(...) -> ...pairs_head_ptr, own_token, w_feature, ...",
        "backward_kernel: add_tile_gradient(...) -> ...pairs_head_ptr, w_token, own_feature, ...",
    ),
    "w and dO have one dtype": ("add_tile_gradient: w_j -> grad_out_j", "backward_kernel: w_j -> grad_out_j"),
    "the first term is added to zero": (
        "add_tile_gradient: grad_scores += p_ij * (...) -> grad_scores = p_ij * (...)",
    ),
}

PAIRS_OF_ROWS = {
    "rows outside are not stored": ("store_row_pairs: tl.load(..., other=0.0) -> tl.load(..., other=1.0)",),
}

MODULES = {
    "one by one or fused, by the operator or in steps: the same computation": (
        "MSSA._attended: (hooks_of_all_modules() or self.attention_obstacle()) is None -> False",
    ),
    "of four dimensions the last two": (
        "MSSA._weights: w.transpose(-1, -2) -> w.transpose(-2, -1)",
        "MSSA._weights: -2 -> 2",
    ),
    "a new buffer of the same name takes the old one's place": ("ISTA.freeze: self.unfreeze() -> pass",),
}
IN_MODULES = {
    "whether a module is fused, and what is said if not: test_fusing.py": (
        "comparisons: MSSA.obstacle: hooks_of_all_modules() ...",
    ),
    "attention without an output projection: test_accelerate.py": ("branches: MSSA.weights: out is None -> False",),
}
LAYERS = {
    "a product by one library or another": ("linear: choose('linear', x, dtype) != 'composed' -> False",),
}
IN_LAYERS = {
    "whether a layer is fused, and what is said if not: test_fusing.py, test_model.py": (
        "...: PreNorm.forward: takes_norm(self.fn) -> False",
        "...: Block.forward: ...reason... -> ...",
        "...: Block.forward: ...self.obstacle(x) -> ...",
        "...: Block.forward: say(...) -> pass",
        "...: Block.obstacle: ...",
        "factors: Block._pairs: _children(...",
        "branches: Block._obstacle_of: isinstance(step, (ISTA, DecoderStep)) and ...",
        "comparisons: Block._obstacle_of: isinstance(step, (ISTA, DecoderStep)) and (not is_plain(...",
    ),
    "what is said of a layer of other steps, and hooks on all modules: test_model.py": (
        "...: embedding_obstacle: hooks_of_all_modules() or obstacle('patch_embed', embed, PatchEmbed) -> ...",
        "...: _norm_and_step: not isinstance(...",
        "names: _norm_and_step: type(...",
        "order: _norm_and_step: ...",
    ),
    "what is kept for the backward: test_memory.py": (
        "...recompute... -> ...",
        "...use_reentrant=False -> ...",
        "...: AlphaBlock._fused: checkpoint(...",
    ),
    "dtypes under autocast: test_model.py": ("casts: ...",),
    "what nobody asks for who does not drop paths": (
        "branches: Block._kept: not (self.training and self.drop_path) -> False",
        "comparisons: Block._kept: self.training and self.drop_path -> ...",
    ),
    "patches are square": ("operands: PatchEmbed.of_patches: self.proj.kernel_size[0] -> ...",),
}

LIBRARY_PRODUCTS = {
    "which library multiplies, which test_library_products.py asks; what only CUDA takes, and what is kept": (
        "casts: ...", "comparisons: linear: ...", "names: ...", "functions: ...",
        "branches: product: ...", "branches: plus_product: ...", "comparisons: plus_product: ...",
        "...: float32_product: ...", "...: _onednn: ...", "branches: _linear: ...", "branches: _Linear...",
    ),
}  # fmt: skip
ISTA = {
    "of two dtypes one within rounding, what is kept, and work in vain; test_ista.py sees some of it": (
        "casts: ...", "factors: ..._at_least_float32(...) -> ...", "...: _plus_product: ...",
        "comparisons: forward: operand is x or norm is not None -> ...", "terms: backward: grad_dictionary = ... -> pass",
        "comparisons: backward: ... and ... -> ...", "comparisons: backward: ... or ... -> ...",
    ),
    "of square matrices, and of two dimensions": ("names: ...", "signs: ...-1 -> 1...", "order: backward: _plus_product(...",
    ),
    "what was combined before is for one product": ("comparisons: forward: one and combined is None -> one",),
}  # fmt: skip

COMPOSED_ATTENTION = {
    "the same values, parted otherwise, in other memory, or with more kept; strides are test_shared_attention.py's": (
        "...: _Part.of: ...", "...: _even: ...", "...: _features_in_a_row: ...", "names: forward: ...", "names: backward: ...",
        "casts: ...", "factors: ...: _corner(...", "factors: ...: _features_in_a_row(...", "factors: backward: _unflatten(...",
        "names: _generator: ...", "branches: backward: w.shape[:2] if need_scales else (0, 0) -> w.shape[:2]",
        "branches: ...: takes_flash_attention(...", "...: forward: keeps == ...", "branches: backward: kept...",
        "order: backward: ..._room...", "comparisons: backward: part.rows < tokens -> ...", "branches: _unflatten: ...",
    ),
    "the public function draws a seed where none is given": ("branches: _generator: seed is None -> False",),
    "a sum of three in another order": ("order: backward: as_query, as_key, as_value = ...",),
    "rows of padding have no gradient already": (
        "...: backward: grad_w.masked_fill_(...", "branches: backward: grad_w if padding is None else ...",
    ),
}  # fmt: skip

ATTENTION_MASK = {
    "an interval of all tokens hides nothing": (
        "Mask.intervals: not self.is_causal and self.window is None and (self.spans is None) -> False",
    ),
    "what is equal is equal the other way round": ("Mask.idle: first, end = intervals -> end, first = intervals",),
}
IN_ATTENTION_MASK = {
    "what is refused: test_shared_attention.py": (
        "...: checked_mask: ...", "...: _check_integers: ...", "...: _check_device: ...",
    ),
    "what is finite in padding meets weights of zero; NaN is stored there in test_shared_attention.py": (
        "...: Mask.without_padding: w...",
    ),
    "kernels read int32: test_shared_attention_triton.py": ("casts: spans_of: ...",),
}  # fmt: skip

PATCHES = {"of four dimensions the last two": ("patch_grid: -2 -> 2",)}
POSITIONS = {"one column, or one row, in a row": ("resampled: F.interpolate(...).mT -> F.interpolate(...)",)}

PRODUCTS = {
    "WHOLE only saves a mask that is true everywhere": (
        "load_tile: (rows < row_count) | WHOLE_ROWS -> rows < row_count",
        "load_tile: (columns < column_count) | WHOLE_COLUMNS -> columns < column_count",
    ),
    "rows are clamped, so a mask along them is true everywhere": (
        "...clamped_rows, ..., True, WHOLE_... -> ...clamped_rows, ..., False, WHOLE_...",
        "...clamped_rows, ... -> ..., width, width, True, WHOLE_N)",
        "...clamped_rows, ... -> ..., inner_width, ..., True, WHOLE_...)",
    ),
    "all columns of tiles have the same moments": (
        "behind_projection: (rows < tokens)[:, None] & (first == 0) -> (rows < tokens)[:, None]",
    ),
    "moments are of rounded values: test_products.py": ("project_part: product.to(out.dtype.element_ty) -> product",),
    "rows past the last are copies of the last: to write them there once more changes nothing": (
        "... -> ...clamped_rows, columns, tokens, width)",
        "... -> ...clamped_rows, clamped_rows, ...",
        "project_part: store_moments_of_part(...) -> ..., clamped_rows, first, ...",
        "behind_projection: rows -> clamped_rows (place 2)",
        "behind_projection: rows -> clamped_rows (place 3)",
        "input_gradient_part: rows -> clamped_rows",
        "input_gradient_part: rows -> clamped_rows (place 3)",
    ),
    "numbers beyond the end meet a gradient of zero, or a column that is not stored; they need only be finite": (
        "load_row: tl.load(..., other=0.0) -> tl.load(..., other=1.0)",
    ),
    "what the compiler makes of it": (
        "...: tl.assume(...",
        "...: inner_width > 0 -> ...",
        "..._kernel: inner_width -> width",
        "...: flatten=True -> ...",
    ),
    "parts past the last have no features: what is taken for their mean need only be finite": (
        "merge_moments: tl.load(addresses, mask=is_part, other=0.0) -> ...",
    ),
    "tiles past the last are masked": (
        "moments_kernel: range(0, width, BLOCK_N) -> range(0, x_row_stride, BLOCK_N) (place 2)",
        "project_kernel: count_tiles(...) -> count_tiles(tokens, x_row_stride, ...",
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
        "before_threshold: ACTIVATION == 'relu' -> False",
    ),
}
PREPARATION = {
    "an operand is contiguous: its rows are as far apart as they are wide": (
        "prepare_kernel: load_tile(...) -> load_tile(..., inner_width, operand_row_stride, WHOLE_K, WHOLE_N)",
    ),
    "no address is negative": ("load_optional: address != 0 -> address > 0",),
    "beyond the end gamma and beta meet rows of zeros, and a bias columns that are not stored": (
        "load_optional: tl.load(..., other=0.0) -> tl.load(..., other=1.0)",
    ),
    "beyond the end there are rows that are not stored: what they are multiplied with need only be finite": (
        "gradient_kernel: tl.load(..., other=0.0) -> tl.load(..., other=1.0)",
        "gradient_kernel: tl.load(...) -> tl.load(..., other=1.0) (place 2)",
    ),
    "a matrix with a transpose of its own shape is square": (
        "gradient_kernel: load_tile(product, rows, columns, product_column_stride...) -> ..., width, inner_width, ...",
        "gradient_kernel: load_tile(product, rows, columns, product_column_stride...) -> ..., width, width, ...",
        "gradient_kernel: load_tile(product, rows, columns, product_column_stride...) -> ..., inner_width, inner_width, ...",
        "gradient_kernel: load_row(gamma, columns, width) -> load_row(gamma, columns, inner_width)",
        "gradient_kernel: load_row(beta, columns, width) -> load_row(beta, columns, inner_width)",
    ),
}
CASES = {
    "products": Case(PRODUCT_SOURCE, product_probes.product_probes, PRODUCTS),
    "attention": Case(Source(attention_kernels, ROW_PAIRS), attention_probes.attention_probes, ATTENTION),
    "row pairs": Case(ROW_PAIRS, attention_probes.row_pairs_probes, PAIRS_OF_ROWS),
    "preparation": Case(Source(preparation_kernels, PRODUCT_SOURCE), product_probes.preparation_probes, PREPARATION),
    "composed ista": Case(Source(composed_ista), composed_probes.ista_probes, {}, ISTA),
    "form": Case(Source(form), composed_probes.ista_probes, {}),
    "composed mssa": Case(Source(composed_mssa), composed_probes.mssa_probes, {}),
    "composed norm_linear": Case(Source(composed_norm_linear), composed_probes.norm_linear_probes, {}),
    "composed overcomplete": Case(Source(composed_overcomplete), composed_probes.overcomplete_probes, {}),
    "composed attention": Case(Source(composed_attention), composed_probes.attention_probes, {}, COMPOSED_ATTENTION),
    "attention's mask": Case(Source(attention_mask), composed_probes.mask_probes, ATTENTION_MASK, IN_ATTENTION_MASK),
    "library products": Case(Source(library_products), composed_probes.product_probes, {}, LIBRARY_PRODUCTS),
    "modules": Case(Source(kernel_modules), module_probes.kernel_module_probes, MODULES, IN_MODULES),
    "layers": Case(Source(layers), layer_probes.layer_probes, LAYERS, IN_LAYERS),
    "patches": Case(Source(patches), layer_probes.patch_probes, PATCHES),
    "masks": Case(Source(masks), layer_probes.patch_probes, {}),
    "positions": Case(Source(positions), layer_probes.position_probes, POSITIONS),
}


def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, and a watch over the memory that kernels touch."""
    watch = Watch()
    watch.install(monkeypatch)
    for module in (product_kernels, preparation_kernels, attention_kernels, row_pairs):
        watch.over(monkeypatch, *vars(module).values())
    monkeypatch.setattr(products, "TABLE", product_probes.PRODUCT_TILES)
    monkeypatch.setattr(products, "_ROWS", product_probes.ROWS)
    monkeypatch.setattr(attention, "TABLE", attention_probes.ATTENTION_TILES)
