"""Registers LLM.int8() with torch: schemas, fakes, autograd and dispatch."""

import importlib
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import is_differentiated, is_eager
from halfbyte.kernels.int8 import cpu, reference
from halfbyte.kernels.int8.operands import check_int8
from halfbyte.kernels.rows import WEIGHT_DTYPES, check_rows

# Device type -> module that implements the quantization of rows and the product
# there. Other devices use the reference.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu}
# CUDA builds of torch include Triton. CPU builds do not and do not need it.
if importlib.util.find_spec("triton") is not None:
    BACKENDS["cuda"] = importlib.import_module("halfbyte.kernels.int8.cuda")


class Int8Weight(NamedTuple):
    """A frozen weight of LLM.int8(), as functions in `kernels` and `quant` pass it."""

    quantized: Tensor  # int8 (N, K)
    absmax: Tensor  # fp32 (N,), one per row
    threshold: float  # magnitude at which a column of the input is multiplied separately

    @property
    def shape(self) -> torch.Size:
        """(N, K)"""
        return self.quantized.shape


_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("quantize_int8(Tensor weight) -> (Tensor quantized, Tensor absmax)")
_library.define("dequantize_int8(Tensor quantized, Tensor absmax, ScalarType dtype) -> Tensor")
_library.define(
    "linear_int8(Tensor x, Tensor quantized, Tensor absmax, Tensor? bias, float threshold) -> Tensor"
)
_library.define("linear_int8_input_grad(Tensor grad, Tensor quantized, Tensor absmax) -> Tensor")


def _backend(tensor: Tensor) -> ModuleType:
    return BACKENDS.get(tensor.device.type, reference)


def _check_weight(weight: Tensor) -> None:
    if weight.dtype not in WEIGHT_DTYPES or weight.dim() != 2:
        raise ValueError(
            f"weight: got {weight.dtype} {tuple(weight.shape)}, expected (N, K) in one of"
            f" {', '.join(map(str, WEIGHT_DTYPES))}"
        )


def _check(x: Tensor, quantized: Tensor, absmax: Tensor, bias: Tensor | None) -> None:
    check_int8(quantized, absmax)
    check_rows("x", x, quantized.shape[1], bias, quantized.shape[0])


def _check_grad(grad: Tensor, quantized: Tensor, absmax: Tensor) -> None:
    check_int8(quantized, absmax)
    check_rows("grad", grad, quantized.shape[0])


def _linear(x: Tensor, quantized: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    _check(x, quantized, absmax, bias)
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _backend(x).linear_int8(rows, quantized, absmax, bias, threshold)
    return y.view(*x.shape[:-1], quantized.shape[0])


def _input_grad(grad: Tensor, quantized: Tensor, absmax: Tensor) -> Tensor:
    _check_grad(grad, quantized, absmax)
    return reference.linear_int8_input_grad(grad, quantized, absmax)


def _dequantize(quantized: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    check_int8(quantized, absmax)
    return reference.dequantize_rows(quantized, absmax, dtype)


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_weight(weight)
    result: tuple[Tensor, Tensor] = _backend(weight).quantize_rows(weight)
    return result


_library.impl("quantize_int8", _quantize, "CompositeExplicitAutograd")
_library.impl("dequantize_int8", _dequantize, "CompositeExplicitAutograd")
_library.impl("linear_int8", _linear, "CompositeExplicitAutograd")
_library.impl("linear_int8_input_grad", _input_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("halfbyte::quantize_int8", lib=_library)
def _fake_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    _check_weight(weight)
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(
        (weight.shape[0],), dtype=torch.float32
    )


@torch.library.register_fake("halfbyte::dequantize_int8", lib=_library)
def _fake_dequantize(quantized: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    check_int8(quantized, absmax)
    return quantized.new_empty(quantized.shape, dtype=dtype)


@torch.library.register_fake("halfbyte::linear_int8", lib=_library)
def _fake_linear(
    x: Tensor, quantized: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    _check(x, quantized, absmax, bias)
    return x.new_empty((*x.shape[:-1], quantized.shape[0]))


@torch.library.register_fake("halfbyte::linear_int8_input_grad", lib=_library)
def _fake_input_grad(grad: Tensor, quantized: Tensor, absmax: Tensor) -> Tensor:
    _check_grad(grad, quantized, absmax)
    return grad.new_empty((*grad.shape[:-1], quantized.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, quantized, absmax, bias, _ = inputs
    ctx.save_for_backward(quantized, absmax)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx = bias_grad = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.halfbyte.linear_int8_input_grad.default(grad, *ctx.saved_tensors)
    if ctx.needs_input_grad[3]:
        bias_grad = grad.reshape(-1, grad.shape[-1]).sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, None, None, bias_grad, None


torch.library.register_autograd("halfbyte::linear_int8", _backward, setup_context=_save, lib=_library)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes a weight (N, K) to (int8 (N, K), fp32 row absmax (N,)), after converting it to fp16.

    Raises:
        ValueError: for a dtype other than fp32, fp16 or bf16, or a weight that is no matrix.
    """
    return torch.ops.halfbyte.quantize_int8.default(weight)


def dequantize_int8(quantized: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantizes int8 (N, K) with fp32 row absmax (N,) to (N, K) in `dtype`."""
    if is_eager(quantized):
        return _dequantize(quantized, absmax, dtype)
    return torch.ops.halfbyte.dequantize_int8.default(quantized, absmax, dtype)


def linear_int8(
    x: Tensor, quantized: Tensor, absmax: Tensor, bias: Tensor | None = None, threshold: float = 6.0
) -> Tensor:
    """Returns x (..., K) times the int8 weight (N, K) transposed, plus bias (N,): (..., N) in x's dtype.

    Columns of x in which a magnitude reaches `threshold` are multiplied in x's dtype; 0 quantizes all
    columns. Differentiable in x and bias.
    """
    if is_eager(x) and not is_differentiated(x, bias):
        return _linear(x, quantized, absmax, bias, threshold)
    return torch.ops.halfbyte.linear_int8.default(x, quantized, absmax, bias, threshold)


def linear_int8_input_grad(grad: Tensor, quantized: Tensor, absmax: Tensor) -> Tensor:
    """Returns grad (..., N) times the dequantized weight (N, K): (..., K) in grad's dtype."""
    if is_eager(grad):
        return _input_grad(grad, quantized, absmax)
    return torch.ops.halfbyte.linear_int8_input_grad.default(grad, quantized, absmax)
