"""Registers in-place ops out += product, with which an adapted layer adds its base and adapter halves.

This file holds what does not belong to the 4-bit linear itself (`ops`): the same products, but accumulated
into an existing matrix. The sum is computed in fp32 and rounded once.

They are ops because `torch.compile` would spoil the same lines of plain torch in two ways. It treats the
dequantized weights of forward and backward as one value and saves it at full size between the two. And it
turns addmm_ into a product into new memory, after copying the addend there.
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import is_eager
from halfbyte.kernels.linear_4bit import ops
from halfbyte.kernels.quantize_4bit.packed_weight import SCHEMA, PackedWeight
from halfbyte.kernels.rows import check_rows

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("add_product_(Tensor(a!) out, Tensor left, Tensor right) -> ()")
_library.define(f"add_linear_4bit_(Tensor(a!) out, Tensor x, {SCHEMA}) -> ()")
_library.define(f"add_linear_4bit_input_grad_(Tensor(a!) out, Tensor grad, {SCHEMA}) -> ()")


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    out.addmm_(left, right)


def _check(out: Tensor, name: str, rows: Tensor, width: int, outputs: int) -> None:
    check_rows(name, rows, width)
    if rows.dim() != 2 or tuple(out.shape) != (rows.shape[0], outputs):
        raise ValueError(
            f"out: got shape {tuple(out.shape)}, expected ({rows.shape[0]}, {outputs}) for {name} of shape"
            f" {tuple(rows.shape)}"
        )


def _add_linear(out: Tensor, x: Tensor, weight: PackedWeight) -> None:
    outputs, width = weight.shape
    _check(out, "x", x, width, outputs)
    kernel = ops.few_rows_kernel(x, weight)
    if kernel is None:
        out.addmm_(x, weight.dequantize(x.dtype).t())
    elif x.shape[0] == 1:
        # The kernels add a bias in fp32 before they round. With a single row,
        # `out` can be passed as the bias.
        out.copy_(kernel.linear_rows(x, weight, out[0]))
    else:
        # Here the product is rounded before the sum is: two roundings.
        out.add_(kernel.linear_rows(x, weight, None))


def _add_input_grad(out: Tensor, grad: Tensor, weight: PackedWeight) -> None:
    outputs, width = weight.shape
    _check(out, "grad", grad, outputs, width)
    out.addmm_(grad, weight.dequantize(grad.dtype))


def _add_linear_op(out: Tensor, x: Tensor, *fields: Any) -> None:
    _add_linear(out, x, PackedWeight.of(fields))


def _add_input_grad_op(out: Tensor, grad: Tensor, *fields: Any) -> None:
    _add_input_grad(out, grad, PackedWeight.of(fields))


_library.impl("add_product_", _add_product, "CompositeExplicitAutograd")
_library.impl("add_linear_4bit_", _add_linear_op, "CompositeExplicitAutograd")
_library.impl("add_linear_4bit_input_grad_", _add_input_grad_op, "CompositeExplicitAutograd")


@torch.library.register_fake("halfbyte::add_product_", lib=_library)
def _fake_add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    return None


@torch.library.register_fake("halfbyte::add_linear_4bit_", lib=_library)
def _fake_add_linear(out: Tensor, x: Tensor, *fields: Any) -> None:
    weight = PackedWeight.of(fields)
    weight.check()
    outputs, width = weight.shape
    _check(out, "x", x, width, outputs)


@torch.library.register_fake("halfbyte::add_linear_4bit_input_grad_", lib=_library)
def _fake_add_input_grad(out: Tensor, grad: Tensor, *fields: Any) -> None:
    weight = PackedWeight.of(fields)
    weight.check()
    outputs, width = weight.shape
    _check(out, "grad", grad, outputs, width)


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left (M, K) times right (K, N) to out (M, N), all of one dtype. Not differentiable."""
    if is_eager(out):
        _add_product(out, left, right)
    else:
        torch.ops.halfbyte.add_product_.default(out, left, right)


def add_linear_4bit(out: Tensor, x: Tensor, weight: PackedWeight) -> None:
    """Adds x (M, K) times the weight (N, K) transposed to out (M, N), in one dtype. Not differentiable."""
    if is_eager(out):
        _add_linear(out, x, weight)
    else:
        torch.ops.halfbyte.add_linear_4bit_.default(out, x, *weight)


def add_linear_4bit_input_grad(out: Tensor, grad: Tensor, weight: PackedWeight) -> None:
    """Adds grad (M, N) times the weight (N, K) to out (M, K), in one dtype. Not differentiable."""
    if is_eager(out):
        _add_input_grad(out, grad, weight)
    else:
        torch.ops.halfbyte.add_linear_4bit_input_grad_.default(out, grad, *weight)
