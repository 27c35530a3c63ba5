"""Registers the 4-bit quantization ops with torch: schemas, fakes and dispatch.

An op checks its operands and then runs a backend: the module in `BACKENDS` for the device type, or the
plain-torch reference on other devices. A backend module implements the four functions with the reference's
meaning; tests compare them.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import is_eager
from halfbyte.kernels.quantize_4bit import cpu, operands, reference

_library = torch.library.Library("halfbyte", "DEF")
_library.define(
    "quantize_4bit(Tensor weight, str quant_type, int blocksize) -> (Tensor packed, Tensor absmax)"
)
_library.define(
    "quantize_4bit_double(Tensor weight, str quant_type, int blocksize, int nested_blocksize)"
    " -> (Tensor packed, Tensor codes, Tensor nested_absmax, Tensor offset)"
)
_library.define(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor code, SymInt[] shape, ScalarType dtype, int blocksize)"
    " -> Tensor"
)
_library.define(
    "dequantize_4bit_double(Tensor packed, Tensor codes, Tensor nested_absmax, Tensor offset, Tensor code,"
    " Tensor nested_code, SymInt[] shape, ScalarType dtype, int blocksize, int nested_blocksize) -> Tensor"
)


def _reference_quantize_double(
    weight: Tensor, quant_type: str, blocksize: int, nested_blocksize: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed, absmax = reference.quantize_4bit(weight, quant_type, blocksize)
    return packed, *reference.quantize_absmax(absmax, nested_blocksize)


def _reference_dequantize_double(
    packed: Tensor,
    codes: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    code: Tensor,
    nested_code: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
) -> Tensor:
    absmax = reference.dequantize_absmax(codes, nested_absmax, offset, nested_code, nested_blocksize)
    return reference.dequantize_4bit(packed, absmax, code, shape, dtype, blocksize)


REFERENCE: Mapping[str, Callable[..., Any]] = {
    "quantize_4bit": reference.quantize_4bit,
    "quantize_4bit_double": _reference_quantize_double,
    "dequantize_4bit": reference.dequantize_4bit,
    "dequantize_4bit_double": _reference_dequantize_double,
}

# Device type -> module whose functions have the names of the ops.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu}
# CUDA builds of torch include Triton. CPU builds do not and do not need it.
if importlib.util.find_spec("triton") is not None:
    BACKENDS["cuda"] = importlib.import_module("halfbyte.kernels.quantize_4bit.cuda")

_CHECKS: Mapping[str, Callable[..., None]] = {
    "quantize_4bit": operands.check_quantize,
    "quantize_4bit_double": operands.check_quantize,
    "dequantize_4bit": operands.check_dequantize,
    "dequantize_4bit_double": operands.check_dequantize_double,
}


def _checked(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that checks the op's operands and then calls the kernel."""
    check = _CHECKS[name]

    def run(*arguments: Any) -> Any:
        check(*arguments)
        return kernel(*arguments)

    return run


for _name, _kernel in REFERENCE.items():
    _library.impl(_name, _checked(_name, _kernel), "CompositeExplicitAutograd")
    for _device_type, _backend in BACKENDS.items():
        _library.impl(_name, _checked(_name, getattr(_backend, _name)), _device_type.upper())


def _blocks(numel: int, blocksize: int) -> int:
    return (numel + blocksize - 1) // blocksize


@torch.library.register_fake("halfbyte::quantize_4bit", lib=_library)
def _fake_quantize(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    operands.check_quantize(weight, quant_type, blocksize)
    numel = weight.numel()
    packed = weight.new_empty(((numel + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty((_blocks(numel, blocksize),), dtype=torch.float32)


@torch.library.register_fake("halfbyte::quantize_4bit_double", lib=_library)
def _fake_quantize_double(
    weight: Tensor, quant_type: str, blocksize: int, nested_blocksize: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands.check_quantize(weight, quant_type, blocksize, nested_blocksize)
    packed, absmax = _fake_quantize(weight, quant_type, blocksize)
    codes = absmax.new_empty(absmax.shape, dtype=torch.uint8)
    nested_absmax = absmax.new_empty((_blocks(absmax.numel(), nested_blocksize),))
    return packed, codes, nested_absmax, absmax.new_empty(())


@torch.library.register_fake("halfbyte::dequantize_4bit", lib=_library)
def _fake_dequantize(
    packed: Tensor, absmax: Tensor, code: Tensor, shape: Sequence[int], dtype: torch.dtype, blocksize: int
) -> Tensor:
    operands.check_dequantize(packed, absmax, code, shape, dtype, blocksize)
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("halfbyte::dequantize_4bit_double", lib=_library)
def _fake_dequantize_double(
    packed: Tensor,
    codes: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    code: Tensor,
    nested_code: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
) -> Tensor:
    operands.check_dequantize_double(
        packed, codes, nested_absmax, offset, code, nested_code, shape, dtype, blocksize, nested_blocksize
    )
    return packed.new_empty(shape, dtype=dtype)


def _eager(name: str, *arguments: Any) -> Tensor:
    """Runs the op as the dispatcher would for the device of its first argument."""
    _CHECKS[name](*arguments)
    backend = BACKENDS.get(arguments[0].device.type)
    kernel = REFERENCE[name] if backend is None else getattr(backend, name)
    result: Tensor = kernel(*arguments)
    return result


def quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantizes n elements to (packed uint8 ((n + 1) // 2, 1), absmax fp32 (ceil(n / blocksize),)).

    Raises:
        ValueError: with the name of the argument that does not fit; the other three ops do the same.
    """
    return torch.ops.halfbyte.quantize_4bit.default(weight, quant_type, blocksize)


def quantize_4bit_double(
    weight: Tensor, quant_type: str, blocksize: int, nested_blocksize: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes a weight like `quantize_4bit`, and its b absmax values to 8 bits.

    Returns (packed, codes uint8 (b,), nested_absmax fp32 (ceil(b / nested_blocksize),), offset fp32 ()).
    """
    return torch.ops.halfbyte.quantize_4bit_double.default(weight, quant_type, blocksize, nested_blocksize)


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, shape: Sequence[int], dtype: torch.dtype, blocksize: int
) -> Tensor:
    """Returns the weight of `shape` in `dtype`; `code` is the table (16,) fp32 that packed codes index."""
    if is_eager(packed):
        return _eager("dequantize_4bit", packed, absmax, code, shape, dtype, blocksize)
    return torch.ops.halfbyte.dequantize_4bit.default(packed, absmax, code, shape, dtype, blocksize)


def dequantize_4bit_double(
    packed: Tensor,
    codes: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    code: Tensor,
    nested_code: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
) -> Tensor:
    """Returns the weight of `shape` in `dtype`; `nested_code` is the table (256,) fp32 of the absmax codes."""
    if is_eager(packed):
        return _eager(
            "dequantize_4bit_double",
            packed,
            codes,
            nested_absmax,
            offset,
            code,
            nested_code,
            shape,
            dtype,
            blocksize,
            nested_blocksize,
        )
    return torch.ops.halfbyte.dequantize_4bit_double.default(
        packed, codes, nested_absmax, offset, code, nested_code, shape, dtype, blocksize, nested_blocksize
    )
