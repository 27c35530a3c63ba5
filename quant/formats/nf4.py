"""Quantizes a weight to 4 bits (NF4 or FP4) and back, and defines the state that dequantization needs.

A weight is cut into blocks of `blocksize` elements in row-major order. Each block has a scale, its absmax
unless `scale_search` finds a better one, and each element is stored as the 4-bit index of the nearest value
in a table:

    weight ~ code[index] * scale        code: 16 values in [-1, 1]

Double quantization stores the scales in 8 bits too, as deviations from their mean (`offset`):

    scale ~ nested.code[index8] * nested.absmax + nested.offset        one nested.absmax for 256 scales
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from halfbyte.kernels.quantize_4bit import operands, ops, reference, scale_search
from halfbyte.kernels.rows import WEIGHT_DTYPES

NESTED_BLOCKSIZE = 256
SCALE_SEARCHES = (None, "mse")


class BeyondFormatError(ValueError):
    """Raised for a finite weight with values outside the range of a format."""


@dataclass(frozen=True)
class QuantSpec:
    """The settings for quantizing one weight to 4 bits."""

    quant_type: str = "nf4"
    """`nf4`, for weights with a normal distribution, or `fp4`."""
    double_quant: bool = True
    """Store the block scales in 8 bits as well, which saves 0.37 bit per parameter."""
    blocksize: int = 64
    """Number of elements that share a scale."""
    scale_search: str | None = None
    """`mse`: the scale of each block minimizes its squared error. None: the scale is the block's absmax."""

    def __post_init__(self) -> None:
        if self.scale_search not in SCALE_SEARCHES:
            raise ValueError(f"scale_search: got {self.scale_search!r}, accepted: None, mse")
        if self.quant_type not in operands.QUANT_TYPES:
            raise ValueError(
                f"quant_type: got {self.quant_type!r}, accepted: {', '.join(operands.QUANT_TYPES)}"
            )
        if type(self.blocksize) is not int or self.blocksize not in operands.BLOCKSIZES:
            accepted = ", ".join(map(str, operands.BLOCKSIZES))
            raise ValueError(f"blocksize: got {self.blocksize!r}, accepted: {accepted}")


@dataclass(frozen=True, eq=False)
class NestedState:
    """The state that dequantizes 8-bit scales: `code[codes] * absmax + offset`."""

    absmax: Tensor  # (ceil(b / blocksize),) fp32, for b scales
    code: Tensor  # (256,) fp32
    offset: Tensor  # () fp32; a tensor, because reading it into a Python number would break a compiled graph
    blocksize: int

    # Attributes that bitsandbytes' own reader expects, see `QuantState.state2`.
    nested: ClassVar[None] = None
    dtype: ClassVar[torch.dtype] = torch.float32


@dataclass(frozen=True, eq=False)
class QuantState:
    """The state that, together with the packed codes, gives the weight back."""

    quant_type: str
    shape: torch.Size
    dtype: torch.dtype  # of the weight before it was quantized
    blocksize: int
    code: Tensor  # (16,) fp32, the table of values
    absmax: Tensor  # (b,), the scales of b blocks: fp32, or uint8 codes if `nested` is set
    nested: NestedState | None = None

    # diffusers (for LoRAs that widen a layer) and PEFT (for DoRA) pass the state of a `Params4bit` to
    # bitsandbytes' dequantize_4bit, which expects the nested state under the names `offset` and `state2`.
    @property
    def offset(self) -> Tensor | None:
        """The offset that is added to the scales; None without double quantization."""
        return None if self.nested is None else self.nested.offset

    @property
    def state2(self) -> NestedState | None:
        """The state of the scales; None without double quantization."""
        return self.nested

    def scales(self) -> Tensor:
        """Returns the fp32 scales of the blocks, (b,)."""
        nested = self.nested
        if nested is None:
            return self.absmax
        return reference.dequantize_absmax(
            self.absmax, nested.absmax, nested.offset, nested.code, nested.blocksize
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        nested = self.nested
        return [self.absmax, self.code] + (
            [] if nested is None else [nested.absmax, nested.code, nested.offset]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the state's tensors, without the packed codes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> "QuantState":
        """Returns the same state with `change` applied to each tensor."""
        nested = self.nested
        if nested is not None:
            nested = replace(
                nested,
                absmax=change(nested.absmax),
                code=change(nested.code),
                offset=change(nested.offset),
            )
        return replace(self, code=change(self.code), absmax=change(self.absmax), nested=nested)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "QuantState":
        """Returns the same state on `device`; dtypes never change, even if the module around it is cast."""
        device = torch.device(device)
        if self.absmax.device == device:
            return self
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))


def quantize(weight: Tensor, spec: QuantSpec, name: str = "weight") -> tuple[Tensor, QuantState]:
    """Quantizes a weight of any shape with n elements on its own device.

    Returns the packed codes, uint8 ((n + 1) // 2, 1), and their state.

    Raises ValueError, naming the tensor by `name`, if it is empty, not fp32, fp16 or bf16, or not finite;
    BeyondFormatError if the dequantized weight would not be finite.
    """
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name}: cannot quantize {weight.dtype}; accepted: float32, float16, bfloat16")
    if weight.numel() == 0:
        raise ValueError(f"{name}: cannot quantize an empty tensor of shape {tuple(weight.shape)}")
    weight = weight.detach().contiguous()
    # aminmax reads the weight once, allocates no copy of it, and propagates NaN.
    largest = float(torch.stack(torch.aminmax(weight)).abs().max())
    if not math.isfinite(largest):
        raise ValueError(f"{name}: the weight contains NaN or infinite values; the checkpoint is damaged")
    code = reference.on_device(f"{spec.quant_type.upper()}_CODE", weight.device)
    nested = None
    kernels = ops if spec.scale_search is None else scale_search
    if spec.double_quant:
        packed, absmax, nested_absmax, offset = kernels.quantize_4bit_double(
            weight, spec.quant_type, spec.blocksize, NESTED_BLOCKSIZE
        )
        nested_code = reference.on_device("DYNAMIC_CODE", weight.device)
        nested = NestedState(nested_absmax, nested_code, offset, NESTED_BLOCKSIZE)
    else:
        packed, absmax = kernels.quantize_4bit(weight, spec.quant_type, spec.blocksize)
    state = QuantState(spec.quant_type, weight.shape, weight.dtype, spec.blocksize, code, absmax, nested)
    limit = torch.finfo(weight.dtype).max
    # Rounding to 8 bits can raise a scale above the block's absmax. Near the end of the weight's dtype, the
    # dequantized weight would then be infinite. The comparison synchronizes with the device, hence the cheap
    # first test.
    if largest > limit / 2 and not (state.scales() <= limit).all():
        raise BeyondFormatError(
            f"{name}: contains {largest:g}, and its quantized scales exceed {limit:g}, the largest {weight.dtype};"
            " skip the layer, or set double_quant to false"
        )
    return packed, state


def dequantize(packed: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the weight with shape `state.shape`, in `dtype` or by default in the dtype it had before."""
    dtype = state.dtype if dtype is None else dtype
    nested = state.nested
    if nested is None:
        return ops.dequantize_4bit(packed, state.absmax, state.code, state.shape, dtype, state.blocksize)
    return ops.dequantize_4bit_double(
        packed,
        state.absmax,
        nested.absmax,
        nested.offset,
        state.code,
        nested.code,
        state.shape,
        dtype,
        state.blocksize,
        nested.blocksize,
    )
