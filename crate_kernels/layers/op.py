"""PyTorch operators of whole layers on the Triton path: schemas, shapes, FLOP counts. Imports torch only.

One pair serves both kinds of layer: an encoder has a step size (its sparse step is ISTA), a decoder has none (it is linear).
``kept`` is what the backward needs besides x and y, as ``layers.triton.Kept`` lists it and, where no ``prepared`` came,
``layers.triton.Prepared``. ``prepare_layers`` makes the latter for many layers, in tensors that ``split_prepared`` takes apart:
outside of the operator, whose results must not be views of one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crate_kernels import dispatch
from crate_kernels.precision import no_autocast, undisturbed
from crate_kernels.schemas import empty_gradient, or_empty


class Arguments(NamedTuple):
    """What both operators take, in the order of their schemas."""

    qkv_weight: Tensor
    out_weight: Tensor
    out_bias: Tensor | None
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor | None
    matrix: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    step_size: Tensor | None
    lambd: Tensor | None
    prepared: list[Tensor]
    attention_norm_eps: float
    norm_eps: float
    soft: bool
    num_heads: int
    scale: float
    recompute: bool
    dtype: torch.dtype

    @property
    def is_encoder(self) -> bool:
        return self.step_size is not None

    def load(self) -> tuple[ModuleType, Any, Any, Any]:
        """The kernels' module, and its ``Weights``, attention's ``Form`` and ISTA's ``Step``."""
        kernels = dispatch.load("layers", "triton")
        attention, sparse = kernels.attention, kernels.sparse
        norm = kernels.Norm(self.attention_norm_weight, self.attention_norm_bias, self.attention_norm_eps)
        of_attention = attention.Weights(self.qkv_weight, self.out_weight, self.out_bias, norm)
        weights = kernels.Weights(
            of_attention, kernels.Norm(self.norm_weight, self.norm_bias, self.norm_eps), self.matrix
        )
        form = attention.Form(self.num_heads, self.scale, False, not self.is_encoder)
        return kernels, weights, form, sparse.Step(self.step_size, self.lambd, self.soft)


WEIGHTS = 8  # leading arguments, which may ask for a gradient
TENSORS = 10  # those, and the numbers of the sparse step
SETTINGS = 7  # what comes after ``prepared``

_ARGUMENTS = (
    "Tensor qkv_weight, Tensor out_weight, Tensor? out_bias, Tensor attention_norm_weight, Tensor? attention_norm_bias, "
    "Tensor matrix, Tensor norm_weight, Tensor? norm_bias, Tensor? step_size, Tensor? lambd, Tensor[] prepared, "
    "float attention_norm_eps, float norm_eps, bool soft, int num_heads, float scale, bool recompute, ScalarType dtype"
)
torch.library.define("crate_kernels::layer_forward", f"(Tensor x, {_ARGUMENTS}) -> (Tensor y, Tensor[] kept)")
torch.library.define(
    "crate_kernels::layer_backward",
    f"(Tensor grad, Tensor x, Tensor y, Tensor[] kept, bool need_x, bool need_weights, {_ARGUMENTS}) -> "
    "(Tensor grad_x, Tensor grad_qkv, Tensor grad_out, Tensor grad_out_bias, Tensor grad_attention_norm_weight, "
    "Tensor grad_attention_norm_bias, Tensor grad_matrix, Tensor grad_norm_weight, Tensor grad_norm_bias)",
)


def _prepare(given: Arguments, kernels: Any, weights: Any, step: Any) -> Any:
    if given.prepared:
        return kernels.Prepared.of(given.prepared, given.out_bias is not None)
    return kernels.prepare_layer(weights, step if given.is_encoder else None, given.dtype)


@torch.library.impl("crate_kernels::layer_forward", "CompositeExplicitAutograd")
@undisturbed
def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    given = Arguments(*arguments)
    kernels, weights, form, step = given.load()
    prepared = _prepare(given, kernels, weights, step)
    if given.is_encoder:
        y, kept = kernels.encoder_forward(x, weights, prepared, form, step)
    else:
        y, kept = kernels.decoder_forward(x, weights, prepared, form)
    if given.recompute:
        kept = kept._replace(attention=None)
    y = torch.ops.aten._unsafe_view(y, x.shape)  # not a view, which autograd would not let a caller change in place
    return y, kept.flat() + ([] if given.prepared else prepared.flat())


@torch.library.impl("crate_kernels::layer_backward", "CompositeExplicitAutograd")
@undisturbed
def _backward(
    grad: Tensor, x: Tensor, y: Tensor, kept: list[Tensor], need_x: bool, need_weights: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    given = Arguments(*arguments)
    kernels, weights, form, step = given.load()
    of_tokens = _kept_count(given)
    prepared = kernels.Prepared.of(given.prepared or kept[of_tokens:], given.out_bias is not None)
    kept = kernels.Kept.of(kept[:of_tokens])
    grad, needs = grad.flatten(0, 1), (need_x, need_weights)
    if given.is_encoder:
        found = kernels.encoder_backward(
            grad, x, y.flatten(0, 1), kept, weights, prepared, form, step, *needs
        )  # fmt: skip
    else:
        found = kernels.decoder_backward(grad, x, kept, weights, prepared, form, *needs)
    grad_x = or_empty(None if found.x is None or not need_x else found.x.view(x.shape), x)
    qkv, out, of_step = found.attention.qkv, found.attention.out, found.step
    if not need_weights:
        return grad_x, *(or_empty(None, like) for like in arguments[:WEIGHTS])
    values = (
        qkv.matrix.t(), out.matrix.t(), out.bias, qkv.norm_weight, qkv.norm_bias,
        of_step.matrix if given.is_encoder else of_step.matrix.t(), of_step.norm_weight, of_step.norm_bias,
    )  # fmt: skip
    return grad_x, *map(or_empty, values, arguments[:WEIGHTS])


def _kept_count(given: Arguments) -> int:
    """How many tensors ``Kept`` lists: the middle and its moments; then w, attention's output, log-sum-exp and moments."""
    return 2 if given.recompute else 6


@torch.library.register_fake("crate_kernels::layer_forward")
def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    given = Arguments(*arguments)
    batch, tokens, width = x.shape
    inner = given.qkv_weight.shape[0]
    stream = x.dtype if given.is_encoder else given.dtype
    float32 = dict(dtype=torch.float32)
    kept = [x.new_empty(batch * tokens, width, dtype=stream), x.new_empty(2, batch * tokens, **float32)]
    if not given.recompute:
        kept += [x.new_empty(batch * tokens, inner, dtype=given.dtype) for _ in range(2)]
        kept += [x.new_empty(batch, given.num_heads, tokens, **float32), x.new_empty(2, batch * tokens, **float32)]
    if not given.prepared:
        kept += _prepared_fake(x, given)
    return x.new_empty(x.shape, dtype=stream), kept


def _prepared_fake(x: Tensor, given: Arguments) -> list[Tensor]:
    """Operands as ``layers.triton.Prepared.flat`` lists them; transposed where the official weight is."""
    inner, width = given.qkv_weight.shape
    qkv, out = (x.new_empty(shape, dtype=given.dtype).t() for shape in ((inner, width), (width, inner)))
    step = x.new_empty(width, width, dtype=given.dtype)
    vectors = [x.new_empty(size, dtype=torch.float32) for size in (inner, inner, width, width, width)]
    prepared = [qkv, *vectors[:2], step if given.is_encoder else step.t(), *vectors[2:4], out]
    if given.out_bias is not None:
        prepared.append(vectors[4])
    return [*prepared, x.new_empty(width, width, dtype=torch.float32)] if given.is_encoder else prepared


@torch.library.register_fake("crate_kernels::layer_backward")
def _backward_fake(
    grad: Tensor, x: Tensor, y: Tensor, kept: list[Tensor], need_x: bool, need_weights: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    weights = arguments[:WEIGHTS]
    return empty_gradient(x, need_x), *(empty_gradient(like, need_weights) for like in weights)


torch.library.define(
    "crate_kernels::prepare_layers",
    "(Tensor[] qkv_weight, Tensor[] out_weight, Tensor[] out_bias, Tensor[] attention_norm_weight, "
    "Tensor[] attention_norm_bias, Tensor[] matrix, Tensor[] norm_weight, Tensor[] norm_bias, Tensor? step_size, "
    "ScalarType dtype) -> Tensor[]",
)


@torch.library.impl("crate_kernels::prepare_layers", "CompositeExplicitAutograd")
def _prepare_layers(*arguments: Any) -> list[Tensor]:
    *columns, step_size, dtype = arguments
    kernels = dispatch.load("layers", "triton")
    first = columns[0][0]
    none = [None] * len(columns[0])
    layers = []
    for qkv, out, bias, *norm_and_matrix in zip(*(column or none for column in columns), strict=True):
        attention_norm, matrix, norm = norm_and_matrix[:2], norm_and_matrix[2], norm_and_matrix[3:]
        attention = kernels.attention.Weights(qkv, out, bias, kernels.Norm(*attention_norm))
        layers.append(kernels.Weights(attention, kernels.Norm(*norm), matrix))
    step = None if step_size is None else kernels.sparse.Step(step_size, step_size, False)
    with no_autocast(first), torch.cuda.device_of(first):
        return kernels.prepare_layers(layers, step, dtype)


@torch.library.register_fake("crate_kernels::prepare_layers")
def _prepare_layers_fake(*arguments: Any) -> list[Tensor]:
    qkv, out, *_, matrix, _, _, step_size, dtype = arguments
    found, roles = [], [qkv, out] if step_size is not None else [qkv, out, matrix]
    if step_size is not None:
        square = len(matrix), *matrix[0].shape
        found.append(matrix[0].new_empty(square, dtype=torch.float32))
        found += [matrix[0].new_empty(square, dtype=dtype), *_vectors_fake(matrix, 1)]
    if qkv[0].shape == out[0].shape:
        roles = [[weight for role in roles for weight in role]]
    for role in roles:
        found += [role[0].new_empty(len(role), *role[0].shape, dtype=dtype).mT, *_vectors_fake(role, 0)]
    return found


def _vectors_fake(role: Sequence[Tensor], axis: int) -> list[Tensor]:
    """Column sums and offsets of operands."""
    return [role[0].new_empty(len(role), role[0].shape[axis], dtype=torch.float32) for _ in range(2)]


def split_prepared(tensors: list[Tensor], count: int, is_encoder: bool, has_bias: bool) -> list[list[Tensor]]:
    """What ``prepare_layers`` gave for ``count`` layers, as each layer's ``prepared``, in the order of ``Prepared.flat``."""
    combined, step = None, []
    if is_encoder:
        combined, *step = tensors[:4]
        tensors = tensors[4:]
    if len(tensors) == 3:  # all attention's matrices, and a decoder's third, came from one launch
        tensors = [part for parts in zip(*(tensor.split(count) for tensor in tensors), strict=True) for part in parts]
    qkv, (out, _, offset), step = tensors[:3], tensors[3:6], step or tensors[6:]
    stacks = [*qkv, *step, out, *([offset] if has_bias else []), *([] if combined is None else [combined])]
    return [list(one) for one in zip(*(stack.unbind(0) for stack in stacks), strict=True)]


@register_flop_formula(torch.ops.crate_kernels.prepare_layers)
def _prepare_flops(*arguments: Any, **_: Any) -> int:
    *_, matrix, _, _, step_size, _ = arguments
    return 0 if step_size is None else len(matrix) * 2 * matrix[0][0] ** 3


def _flops(x_shape: tuple[int, ...], given: Arguments) -> tuple[int, int, int, int]:
    """Of one projection, one tokens x tokens product, the sparse step's product, and one product of two dictionaries."""
    (batch, tokens, width), inner = x_shape, given.qkv_weight[0]
    large = 2 * batch * tokens * width
    return large * inner, 2 * batch * tokens * tokens * inner, large * width, 2 * width**3 * given.is_encoder


@register_flop_formula(torch.ops.crate_kernels.layer_forward)
def _forward_flops(x_shape: Any, *arguments: Any, **_: Any) -> int:
    given = Arguments(*arguments)
    projection, scores, step, small = _flops(x_shape, given)
    return 2 * projection + 2 * scores + step + (0 if given.prepared else small)


@register_flop_formula(torch.ops.crate_kernels.layer_backward)
def _backward_flops(
    grad: Any, x_shape: Any, y: Any, kept: Any, need_x: bool, need_weights: bool, *arguments: Any, **_: Any
) -> int:
    given = Arguments(*arguments)
    projection, scores, step, small = _flops(x_shape, given)
    inputs = projection * (need_x + 1) + 5 * scores + step
    again = (projection + 2 * scores) * given.recompute
    return inputs + again + (2 * projection + step + small) * need_weights
