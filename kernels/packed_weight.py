"""A 4-bit weight as the kernels pass it among themselves."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.kernels import operands, ops


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
        if self.nested_absmax is None:
            operands.check_dequantize(
                self.packed, self.absmax, self.code, self.shape, torch.float32, self.blocksize
            )
            return
        assert self.offset is not None
        assert self.nested_code is not None
        operands.check_dequantize_double(
            self.packed,
            self.absmax,
            self.nested_absmax,
            self.offset,
            self.code,
            self.nested_code,
            self.shape,
            torch.float32,
            self.blocksize,
            self.nested_blocksize,
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The (N, K) weight in `dtype`."""
        if self.nested_absmax is None:
            return ops.dequantize_4bit(self.packed, self.absmax, self.code, self.shape, dtype, self.blocksize)
        assert self.offset is not None
        assert self.nested_code is not None
        return ops.dequantize_4bit_double(
            self.packed,
            self.absmax,
            self.nested_absmax,
            self.offset,
            self.code,
            self.nested_code,
            self.shape,
            dtype,
            self.blocksize,
            self.nested_blocksize,
        )


_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", tuple[int, int]: "SymInt[]", int: "int"}
# A weight among the arguments of an op.
SCHEMA = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in PackedWeight.__annotations__.items())
