"""One quantized weight: its packed codes, what it takes to read them, and the way there and back."""

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
    """A weight that is whole, with values that a format cannot hold."""


@dataclass(frozen=True)
class QuantSpec:
    """How a weight becomes 4 bits."""

    quant_type: str = "nf4"
    """`nf4`, for weights that are spread like a normal distribution, or `fp4`."""
    double_quant: bool = True
    """Store the block scales in 8 bits as well: 0.37 bit a parameter less."""
    blocksize: int = 64
    """Elements that share a scale."""
    scale_search: str | None = None
    """`mse`: the scale of each block is the one with the least squared error; None: its largest magnitude."""

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
    """How 8-bit scales are read: `code[codes] * absmax + offset`."""

    absmax: Tensor  # (ceil(b / blocksize),) fp32, for b scales
    code: Tensor  # (256,) fp32
    offset: Tensor  # () fp32; stays a tensor, because a Python number would break a compiled graph
    blocksize: int

    # What bitsandbytes' own reader asks of such a state, see `QuantState.state2`.
    nested: ClassVar[None] = None
    dtype: ClassVar[torch.dtype] = torch.float32


@dataclass(frozen=True, eq=False)
class QuantState:
    """All that is needed, with the packed codes, to have the weight back."""

    quant_type: str
    shape: torch.Size
    dtype: torch.dtype  # of the weight before it was quantized
    blocksize: int
    code: Tensor  # (16,) fp32
    absmax: Tensor  # (b,), fp32, or uint8 codes when `nested` says how to read them
    nested: NestedState | None = None

    # diffusers (LoRAs that widen a layer) and PEFT (DoRA) hand the state of a `Params4bit` to bitsandbytes'
    # dequantize_4bit, which looks for the nested part under these two names.
    @property
    def offset(self) -> Tensor | None:
        """What is added to the scales."""
        return None if self.nested is None else self.nested.offset

    @property
    def state2(self) -> NestedState | None:
        """How the scales are read."""
        return self.nested

    def scales(self) -> Tensor:
        """The fp32 scales of the blocks (b,)."""
        nested = self.nested
        if nested is None:
            return self.absmax
        return reference.dequantize_absmax(
            self.absmax, nested.absmax, nested.offset, nested.code, nested.blocksize
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        nested = self.nested
        return [self.absmax, self.code] + (
            [] if nested is None else [nested.absmax, nested.code, nested.offset]
        )

    @property
    def nbytes(self) -> int:
        """Bytes held on the device besides the packed codes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> "QuantState":
        """The same state over what `change` makes of each tensor."""
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
        """The same state on `device`; dtypes never change, whatever the module around it is cast to."""
        device = torch.device(device)
        if self.absmax.device == device:
            return self
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))


def quantize(weight: Tensor, spec: QuantSpec, name: str = "weight") -> tuple[Tensor, QuantState]:
    """Quantize a weight of any shape on its own device, into (packed uint8 ((n + 1) // 2, 1), state).

    Raises ValueError, naming the tensor by `name`, where it is empty, not fp32, fp16 or bf16, or not finite, and
    BeyondFormatError where it would not come back finite.
    """
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name}: cannot quantize {weight.dtype}; accepted: float32, float16, bfloat16")
    if weight.numel() == 0:
        raise ValueError(f"{name}: cannot quantize an empty tensor of shape {tuple(weight.shape)}")
    weight = weight.detach().contiguous()
    # aminmax is one pass without a temporary, and passes NaN on.
    largest = float(torch.stack(torch.aminmax(weight)).abs().max())
    if not math.isfinite(largest):
        raise ValueError(f"{name}: the weight holds NaN or infinite values; the checkpoint is damaged")
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
    # Scales are rounded, so that they may pass the largest magnitude; near the dtype's end that makes infinities.
    if largest > limit / 2 and not (state.scales() <= limit).all():
        raise BeyondFormatError(
            f"{name}: holds {largest:g}, and its quantized scales do not fit {weight.dtype}, which ends at {limit:g};"
            " skip the layer, or set double_quant to false"
        )
    return packed, state


def dequantize(packed: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of `state.shape`, in `dtype` or else in the dtype it had."""
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
