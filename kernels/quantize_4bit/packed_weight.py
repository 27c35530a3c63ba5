"""A 4-bit weight as the kernels pass it among themselves."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.kernels.quantize_4bit import operands, ops


class PackedWeight(NamedTuple):
    """The tensors and numbers of one quantized (N, K) weight; the three nested ones go together or are None."""

    packed: Tensor  # uint8, (N * K + 1) // 2 bytes
    absmax: Tensor  # fp32 scales (b,), or their uint8 codes where double-quantized
    nested_absmax: Tensor | None  # fp32 (ceil(b / nested_blocksize),)
    offset: Tensor | None  # fp32 ()
    code: Tensor  # fp32 (16,)
    nested_code: Tensor | None  # fp32 (256,)
    shape: tuple[int, int]  # (N, K)
    blocksize: int
    nested_blocksize: int

    @classmethod
    def of(cls, fields: tuple[Any, ...]) -> "PackedWeight":
        """The weight that an op got field by field, as `SCHEMA` has them."""
        *tensors, shape, blocksize, nested_blocksize = fields
        outputs, width = shape
        return cls._make((*tensors, (outputs, width), blocksize, nested_blocksize))

    def check(self) -> None:
        """For kernels that read it as it is; `dequantize` checks for itself.

        Raises:
            ValueError: naming the field that does not fit.
        """
        check = operands.check_dequantize_double if self._is_double else operands.check_dequantize
        check(*self._arguments(torch.float32))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The (N, K) weight in `dtype`."""
        dequantize = ops.dequantize_4bit_double if self._is_double else ops.dequantize_4bit
        return dequantize(*self._arguments(dtype))

    @property
    def _is_double(self) -> bool:
        return self.nested_absmax is not None

    def _arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Of the op that dequantizes a weight of its kind."""
        if self.nested_absmax is None:
            return self.packed, self.absmax, self.code, self.shape, dtype, self.blocksize
        scales = (self.absmax, self.nested_absmax, self.offset)
        sizes = (self.blocksize, self.nested_blocksize)
        return self.packed, *scales, self.code, self.nested_code, self.shape, dtype, *sizes


_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", tuple[int, int]: "SymInt[]", int: "int"}
# A weight among the arguments of an op.
SCHEMA = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in PackedWeight.__annotations__.items())
