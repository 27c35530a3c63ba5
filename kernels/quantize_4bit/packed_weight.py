"""`PackedWeight`: the tensors and numbers of a 4-bit weight, passed together."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.kernels.quantize_4bit import operands, ops


class PackedWeight(NamedTuple):
    """A quantized (N, K) weight. The three nested tensors are set with double quantization and None otherwise.

    `halfbyte.kernels.quantize_4bit.reference` defines the format.
    """

    packed: Tensor  # uint8, (N * K + 1) // 2 bytes
    absmax: Tensor  # fp32 (b,); with double quantization its uint8 codes
    nested_absmax: Tensor | None  # fp32 (ceil(b / nested_blocksize),)
    offset: Tensor | None  # fp32 ()
    code: Tensor  # fp32 (16,)
    nested_code: Tensor | None  # fp32 (256,)
    shape: tuple[int, int]  # (N, K)
    blocksize: int
    nested_blocksize: int

    @classmethod
    def of(cls, fields: tuple[Any, ...]) -> "PackedWeight":
        """Builds a weight from an op's arguments, in the order of `SCHEMA`."""
        *tensors, shape, blocksize, nested_blocksize = fields
        outputs, width = shape
        return cls._make((*tensors, (outputs, width), blocksize, nested_blocksize))

    def check(self) -> None:
        """Checks the fields, for kernels that read them directly; `dequantize` does its own checks.

        Raises:
            ValueError: with the name of the field that does not fit.
        """
        check = operands.check_dequantize_double if self._is_double else operands.check_dequantize
        check(*self._arguments(torch.float32))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight (N, K) in `dtype`."""
        dequantize = ops.dequantize_4bit_double if self._is_double else ops.dequantize_4bit
        return dequantize(*self._arguments(dtype))

    @property
    def _is_double(self) -> bool:
        return self.nested_absmax is not None

    def _arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Returns the arguments of the op that dequantizes this kind of weight."""
        if self.nested_absmax is None:
            return self.packed, self.absmax, self.code, self.shape, dtype, self.blocksize
        scales = (self.absmax, self.nested_absmax, self.offset)
        sizes = (self.blocksize, self.nested_blocksize)
        return self.packed, *scales, self.code, self.nested_code, self.shape, dtype, *sizes


_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", tuple[int, int]: "SymInt[]", int: "int"}
# The schema text for a weight's fields among the arguments of an op.
SCHEMA = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in PackedWeight.__annotations__.items())
