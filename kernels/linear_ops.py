"""The 4-bit linear as torch sees it: schema, fake, autograd and the choice of kernel by the number of rows.

Up to `linear_triton.MAX_ROWS` rows on CUDA the packed weight is multiplied as it is (modulation and embedding
layers see one row a sample); above, on CPU and for dX, it is dequantized for the one product and dropped.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels.packed_weight import PackedWeight

# torch's CUDA builds bring Triton; its CPU builds have none, and no use for it.
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from halfbyte.kernels import linear_triton

_WEIGHT_SCHEMA = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, Tensor code, Tensor? nested_code,"
    " SymInt[] shape, int blocksize, int nested_blocksize"
)

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define(f"linear_4bit(Tensor x, {_WEIGHT_SCHEMA}, Tensor? bias) -> Tensor")
_library.define(f"linear_4bit_input_grad(Tensor grad, {_WEIGHT_SCHEMA}) -> Tensor")


def _linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    code: Tensor,
    nested_code: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    nested_blocksize: int,
    bias: Tensor | None,
) -> Tensor:
    outputs, width = shape
    weight = PackedWeight(
        packed,
        absmax,
        nested_absmax,
        offset,
        code,
        nested_code,
        (outputs, width),
        blocksize,
        nested_blocksize,
    )
    rows = x.reshape(-1, width)
    if rows.is_cuda and HAS_TRITON and linear_triton.supports(weight, rows):
        y = linear_triton.linear_rows(rows, weight, bias)
    else:
        y = nn.functional.linear(rows, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], outputs)


def _input_grad(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    code: Tensor,
    nested_code: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    nested_blocksize: int,
) -> Tensor:
    outputs, width = shape
    weight = PackedWeight(
        packed,
        absmax,
        nested_absmax,
        offset,
        code,
        nested_code,
        (outputs, width),
        blocksize,
        nested_blocksize,
    )
    return (grad.reshape(-1, outputs) @ weight.dequantize(grad.dtype)).view(*grad.shape[:-1], width)


_library.impl("linear_4bit", _linear, "CompositeExplicitAutograd")
_library.impl("linear_4bit_input_grad", _input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("halfbyte::linear_4bit", lib=_library)
def _fake_linear(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], arguments[6][0]))


@torch.library.register_fake("halfbyte::linear_4bit_input_grad", lib=_library)
def _fake_input_grad(grad: Tensor, *arguments: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], arguments[6][1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, shape, blocksize, nested_blocksize, bias = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = (shape, blocksize, nested_blocksize)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx = bias_grad = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.halfbyte.linear_4bit_input_grad.default(grad, *ctx.saved_tensors, *ctx.numbers)
    if ctx.needs_input_grad[10]:
        bias_grad = grad.flatten(end_dim=-2).sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
    return (dx, *(None,) * 9, bias_grad)


torch.library.register_autograd("halfbyte::linear_4bit", _backward, setup_context=_save, lib=_library)


def linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the 4-bit weight (N, K) transposed, plus bias (N,): (..., N) in x's dtype.

    Differentiable in x and bias; the weight is frozen. Backward keeps the packed weight and nothing of x.
    """
    return torch.ops.halfbyte.linear_4bit.default(x, *weight, bias)


def linear_4bit_input_grad(grad: Tensor, weight: PackedWeight) -> Tensor:
    """grad (..., N) times the 4-bit weight (N, K): (..., K) in grad's dtype."""
    return torch.ops.halfbyte.linear_4bit_input_grad.default(grad, *weight)
