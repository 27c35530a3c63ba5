"""Registers the 4-bit linear with torch (schema, fake, autograd) and chooses a kernel by the number of rows.

On CUDA, a few rows are multiplied by the packed weight directly; modulation and embedding
layers see one row per sample. For more rows, on CPU, and for dX, the weight is
dequantized for that one product and freed after it.
"""

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels.dispatch import HAS_TRITON, is_differentiated, is_eager
from halfbyte.kernels.quantize_4bit.packed_weight import SCHEMA, PackedWeight
from halfbyte.kernels.rows import check_rows

# Modules that multiply a few rows by the packed weight directly. The first
# that supports weight and rows is used.
FEW_ROWS: tuple[ModuleType, ...] = ()
if HAS_TRITON:
    FEW_ROWS = tuple(
        importlib.import_module(f"halfbyte.kernels.linear_4bit.{name}")
        for name in ("cuda_few_rows", "cuda_one_row")
    )
_MAX_ROWS = 16  # that any of them supports

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define(f"linear_4bit(Tensor x, Tensor? bias, {SCHEMA}) -> Tensor")
_library.define(f"linear_4bit_input_grad(Tensor grad, {SCHEMA}) -> Tensor")


def few_rows_kernel(x: Tensor, weight: PackedWeight) -> ModuleType | None:
    """Returns the kernel that is faster than dequantizing for these rows x (M, K), or None."""
    if x.is_cuda and 0 < x.shape[0] <= _MAX_ROWS:
        weight.check()
        return next((kernel for kernel in FEW_ROWS if kernel.supports(weight, x)), None)
    return None


def _linear(x: Tensor, bias: Tensor | None, weight: PackedWeight) -> Tensor:
    outputs, width = weight.shape
    check_rows("x", x, width, bias, outputs)
    rows = x.reshape(-1, width)
    kernel = few_rows_kernel(rows, weight)
    if kernel is not None:
        y: Tensor = kernel.linear_rows(rows, weight, bias)
        return y.view(*x.shape[:-1], outputs)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return nn.functional.linear(rows, weight.dequantize(x.dtype), bias).view(*x.shape[:-1], outputs)


def _input_grad(grad: Tensor, weight: PackedWeight) -> Tensor:
    outputs, width = weight.shape
    check_rows("grad", grad, outputs)
    return (grad.reshape(-1, outputs) @ weight.dequantize(grad.dtype)).view(*grad.shape[:-1], width)


def _linear_op(x: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
    return _linear(x, bias, PackedWeight.of(fields))


def _input_grad_op(grad: Tensor, *fields: Any) -> Tensor:
    return _input_grad(grad, PackedWeight.of(fields))


_library.impl("linear_4bit", _linear_op, "CompositeExplicitAutograd")
_library.impl("linear_4bit_input_grad", _input_grad_op, "CompositeExplicitAutograd")


@torch.library.register_fake("halfbyte::linear_4bit", lib=_library)
def _fake_linear(x: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
    weight = PackedWeight.of(fields)
    weight.check()
    check_rows("x", x, weight.shape[1], bias, weight.shape[0])
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("halfbyte::linear_4bit_input_grad", lib=_library)
def _fake_input_grad(grad: Tensor, *fields: Any) -> Tensor:
    weight = PackedWeight.of(fields)
    weight.check()
    check_rows("grad", grad, weight.shape[0])
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, *tensors, shape, blocksize, nested_blocksize = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = (shape, blocksize, nested_blocksize)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx = bias_grad = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.halfbyte.linear_4bit_input_grad.default(grad, *ctx.saved_tensors, *ctx.numbers)
    if ctx.needs_input_grad[1]:
        bias_grad = grad.reshape(-1, grad.shape[-1]).sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
    return (dx, bias_grad, *(None,) * len(PackedWeight._fields))


torch.library.register_autograd("halfbyte::linear_4bit", _backward, setup_context=_save, lib=_library)


def linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Returns x (..., K) times the 4-bit weight (N, K) transposed, plus bias (N,): (..., N) in x's dtype.

    Differentiable in x and bias; the weight is frozen. Autograd saves only the packed weight, not x.

    Raises:
        ValueError: if a shape or a field of the weight does not fit.
    """
    if is_eager(x) and not is_differentiated(x, bias):
        return _linear(x, bias, weight)
    return torch.ops.halfbyte.linear_4bit.default(x, bias, *weight)


def linear_4bit_input_grad(grad: Tensor, weight: PackedWeight) -> Tensor:
    """Returns dX: grad (..., N) times the 4-bit weight (N, K), (..., K) in grad's dtype."""
    if is_eager(grad):
        return _input_grad(grad, weight)
    return torch.ops.halfbyte.linear_4bit_input_grad.default(grad, *weight)
