"""Products that add into a matrix already there, as the two halves of an adapted layer need.

The sum is formed in fp32 and rounded once. They are ops because of what `torch.compile` would make of the same
lines: a dequantize in the forward and the same one in the backward count as one value there, which is saved between
the two at its full size; and addmm_ becomes a product into fresh memory, with the addend copied there first.
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import is_eager
from halfbyte.kernels.linear_4bit import ops as linear_ops
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
    kernel = linear_ops.few_rows_kernel(x, weight)
    if kernel is None:
        out.addmm_(x, weight.dequantize(x.dtype).t())
    elif x.shape[0] == 1:
        # The kernels add a bias in fp32, and of a single row any addend is a bias.
        out.copy_(kernel.linear_rows(x, weight, out[0]))
    else:
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
    """out (M, N) += left (M, K) times right (K, N); one dtype, not differentiable."""
    if is_eager(out):
        _add_product(out, left, right)
    else:
        torch.ops.halfbyte.add_product_.default(out, left, right)


def add_linear_4bit(out: Tensor, x: Tensor, weight: PackedWeight) -> None:
    """out (M, N) += x (M, K) times the weight (N, K) transposed; one dtype, not differentiable."""
    if is_eager(out):
        _add_linear(out, x, weight)
    else:
        torch.ops.halfbyte.add_linear_4bit_.default(out, x, *weight)


def add_linear_4bit_input_grad(out: Tensor, grad: Tensor, weight: PackedWeight) -> None:
    """out (M, K) += grad (M, N) times the weight (N, K); one dtype, not differentiable."""
    if is_eager(out):
        _add_input_grad(out, grad, weight)
    else:
        torch.ops.halfbyte.add_linear_4bit_input_grad_.default(out, grad, *weight)
