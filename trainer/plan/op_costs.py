"""Costs of one operation on CUDA: the temporary memory inside its kernel, and its floating-point operations.

Temporary memory does not show in arguments and results, and is freed when the operation returns. A 4-bit
product over many rows dequantizes its weight; attention's backward sums the queries' gradients in fp32; an
int8 product is int32 first; GELU's gradients are partial sums from several programs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

# Up to this many rows a kernel multiplies the packed 4-bit weight directly, without dequantizing it to memory
# (`kernels.linear_4bit.cuda_few_rows`).
_FEW_ROWS = 16
_FLASH_TILE = 128  # tokens; flash attention's backward rounds its buffers up to a multiple of it
_FLASH_HEAD = 32  # the same for the width of a head
# Programs that each write a partial sum, and the rows that each program takes at a time
# (`kernels.gelu.cuda_gradients`).
_GELU_SHARES = 8
_GELU_ROWS = 32

_Arguments = Sequence[Any]


@dataclass(frozen=True)
class OpCosts:
    """The costs of an operation as functions of its arguments and its result; None: no costs."""

    inside: Callable[[_Arguments, Any], int] | None
    """Bytes that it needs besides arguments and results."""
    work: Callable[[_Arguments, Any], int] | None
    """Floating-point operations in its products; a multiply-add counts as two."""


@cache
def costs_of(func: Any) -> OpCosts:
    """Returns the costs of an operator such as torch.ops.aten.mm.default."""
    name = func.name()
    return OpCosts(_INSIDE.get(name), _WORK.get(name))


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _dequantized(x: Tensor, weight: _Arguments) -> int:
    outputs, width = weight[-3]
    return outputs * width * x.element_size()


def _linear_4bit(args: _Arguments, _: Any) -> int:
    x = args[0]
    return 0 if _rows(x) <= _FEW_ROWS else _dequantized(x, args[2:])


def _add_linear_4bit(args: _Arguments, _: Any) -> int:
    x = args[1]
    return 0 if _rows(x) <= _FEW_ROWS else _dequantized(x, args[2:])


def _linear_int8(args: _Arguments, result: Any) -> int:
    # The activations as int8, and the product as int32.
    return int(args[0].numel() + 4 * result.numel())


def _linear_int8_input_grad(args: _Arguments, _: Any) -> int:
    # The weight in fp32, once before and once after it is multiplied by its scale.
    return 8 * int(args[1].numel())


def _attention_backward(args: _Arguments, _: Any) -> int:
    query, backend = args[1], args[-1]
    batch, tokens, heads, width = query.shape
    if backend == "flash":
        rows = -(-tokens // _FLASH_TILE) * _FLASH_TILE
        width = -(-width // _FLASH_HEAD) * _FLASH_HEAD
        return int(4 * batch * heads * rows * (width + 1))
    return int(4 * batch * heads * tokens * (width + 1))


def _gelu_columns(args: _Arguments) -> int:
    gb, xa = args[3:5]
    return int(gb.shape[1] + xa.shape[1])


def _gelu_gradients(args: _Arguments, _: Any) -> int:
    rows, width = args[2].shape
    return int(4 * min(_GELU_SHARES, -(-rows // _GELU_ROWS)) * _gelu_columns(args) * width)


_INSIDE: dict[str, Callable[[_Arguments, Any], int]] = {
    "halfbyte::linear_4bit": _linear_4bit,
    "halfbyte::linear_4bit_input_grad": lambda args, _: _dequantized(args[0], args[1:]),
    "halfbyte::add_linear_4bit_": _add_linear_4bit,
    "halfbyte::add_linear_4bit_input_grad_": lambda args, _: _dequantized(args[1], args[2:]),
    "halfbyte::linear_int8": _linear_int8,
    "halfbyte::linear_int8_input_grad": _linear_int8_input_grad,
    "halfbyte::attention_backward": _attention_backward,
    "halfbyte::gelu_tanh_gradients_": _gelu_gradients,
}


def _product(left: Tensor, right: Tensor) -> int:
    return 2 * left.numel() * int(right.shape[-1])


def _linear(x: Tensor, weight_size: int) -> int:
    return 2 * _rows(x) * weight_size


def _packed(x: Tensor, weight: _Arguments) -> int:
    outputs, width = weight[-3]
    return _linear(x, outputs * width)


def _attention_work(query: Tensor, key: Tensor, products: int) -> int:
    batch, tokens, heads, width = query.shape
    return int(2 * products * batch * heads * tokens * key.shape[1] * width)


def _convolution(args: _Arguments, result: Any) -> int:
    weight = args[1]
    return 2 * int(result.numel()) * math.prod(weight.shape[1:])


_WORK: dict[str, Callable[[_Arguments, Any], int]] = {
    "aten::mm": lambda args, _: _product(args[0], args[1]),
    "aten::mm.dtype": lambda args, _: _product(args[0], args[1]),
    "aten::mm.out": lambda args, _: _product(args[0], args[1]),
    "aten::bmm": lambda args, _: _product(args[0], args[1]),
    "aten::addmm": lambda args, _: _product(args[1], args[2]),
    "aten::addmm.out": lambda args, _: _product(args[1], args[2]),
    "aten::addmm_": lambda args, _: _product(args[1], args[2]),
    "aten::linear": lambda args, _: _linear(args[0], args[1].numel()),
    "aten::convolution": _convolution,
    "halfbyte::add_product_": lambda args, _: _product(args[1], args[2]),
    "halfbyte::gelu_tanh_gradients_": lambda args, _: 2 * args[2].numel() * _gelu_columns(args),
    "halfbyte::linear_4bit": lambda args, _: _packed(args[0], args[2:]),
    "halfbyte::linear_4bit_input_grad": lambda args, _: _packed(args[0], args[1:]),
    "halfbyte::add_linear_4bit_": lambda args, _: _packed(args[1], args[2:]),
    "halfbyte::add_linear_4bit_input_grad_": lambda args, _: _packed(args[1], args[2:]),
    "halfbyte::linear_int8": lambda args, _: _linear(args[0], args[1].numel()),
    "halfbyte::linear_int8_input_grad": lambda args, _: _linear(args[0], args[1].numel()),
    # Two matrix products in the forward, five in the backward: one of those recomputes the scores.
    "halfbyte::attention": lambda args, _: _attention_work(args[0], args[1], 2),
    "halfbyte::attention_backward": lambda args, _: _attention_work(args[1], args[2], 5),
}
