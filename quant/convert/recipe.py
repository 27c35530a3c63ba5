"""Defines QuantRecipe, the settings for quantizing a model's linear layers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import nn

from halfbyte.kernels.quantize_4bit import operands
from halfbyte.kernels.rows import WEIGHT_DTYPES
from halfbyte.quant.formats.int8 import DEFAULT_THRESHOLD
from halfbyte.quant.formats.nf4 import QuantSpec
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.layers.linear8bit import Linear8bit
from halfbyte.quant.layers.quantized_layer import QuantizedLayer

QUANT_TYPES = (*operands.QUANT_TYPES, "int8")

_USUAL_BLOCKSIZE = 64

_LARGEST_THRESHOLD = 65504.0  # the largest fp16 number; outliers are found in fp16


@dataclass(frozen=True)
class QuantRecipe:
    """The quantization settings of a model, with the layers to leave unquantized."""

    quant_type: str = "nf4"
    """`nf4`, `fp4` or `int8` (LLM.int8())."""
    double_quant: bool = True
    """Store the block scales in 8 bits as well. Always False for int8, which has one scale per row."""
    blocksize: int = _USUAL_BLOCKSIZE
    """Number of weights that share a scale, in the 4-bit types."""
    compute_dtype: torch.dtype = torch.bfloat16
    """Dtype of the matrix products: bfloat16, float16 or float32."""
    skip: tuple[str, ...] = ()
    """Modules to leave unquantized, matched by diffusers' rule. An entry matches the last part of a layer's
    path, its whole path, or any text in the path that is followed by a dot."""
    llm_int8_threshold: float = DEFAULT_THRESHOLD
    """int8 only: input columns that reach this magnitude are multiplied in compute_dtype. 0: none are."""
    scale_search: str | None = None
    """`mse`: the 4-bit scale of each block minimizes the squared error, instead of being the block's absmax.
    Files do not record this setting, and a folder that is already quantized keeps its scales."""

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type: got {self.quant_type!r}, accepted: {', '.join(QUANT_TYPES)}")
        if self.compute_dtype not in WEIGHT_DTYPES:
            raise ValueError(f"compute_dtype: got {self.compute_dtype}, accepted: bfloat16, float16, float32")
        if isinstance(self.skip, str) or not all(isinstance(entry, str) and entry for entry in self.skip):
            raise ValueError(f"skip: got {self.skip!r}, expected a list of module names")
        object.__setattr__(self, "skip", tuple(self.skip))
        if not 0 <= self.llm_int8_threshold <= _LARGEST_THRESHOLD:
            raise ValueError(
                f"llm_int8_threshold: got {self.llm_int8_threshold}, expected a number from 0 to 65504"
            )
        # diffusers rejects an integer llm_int8_threshold in config.json.
        object.__setattr__(self, "llm_int8_threshold", float(self.llm_int8_threshold))
        if self.quant_type == "int8":
            if self.scale_search is not None:
                raise ValueError(f"scale_search: got {self.scale_search!r}, expected None for int8")
            # A field that a type does not use gets a fixed value, so that equivalent recipes compare equal.
            object.__setattr__(self, "double_quant", False)
        else:
            object.__setattr__(self, "llm_int8_threshold", DEFAULT_THRESHOLD)
            QuantSpec(self.quant_type, self.double_quant, self.blocksize, self.scale_search)

    def describe(self) -> str:
        """Describes the storage of the layers in words, without the compute dtype."""
        text = self.quant_type
        if self.quant_type == "int8" and self.llm_int8_threshold:
            text += f", outliers from {self.llm_int8_threshold:g}"
        if self.double_quant:
            text += " with double quantization"
        if self.blocksize != _USUAL_BLOCKSIZE:
            text += f", blocks of {self.blocksize}"
        if self.scale_search is not None:
            text += f", scales by {self.scale_search}"
        return text + (f", all but {', '.join(self.skip)}" if self.skip else "")

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values; `of_json` reads them back."""
        return asdict(self) | {"compute_dtype": str(self.compute_dtype), "skip": list(self.skip)}

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> Self:
        """Returns the recipe from `as_json`'s fields. Raises KeyError, TypeError or ValueError for others."""
        dtypes = {str(dtype): dtype for dtype in WEIGHT_DTYPES}
        return cls(
            **{**fields, "compute_dtype": dtypes[fields["compute_dtype"]], "skip": tuple(fields["skip"])}
        )

    @property
    def spec(self) -> QuantSpec:
        """Returns the settings of a single 4-bit weight; the type must not be int8."""
        assert self.quant_type != "int8"
        return QuantSpec(self.quant_type, self.double_quant, self.blocksize, self.scale_search)

    def quantized(self, linear: nn.Linear, name: str) -> QuantizedLayer:
        """Returns the quantized layer that replaces `linear`, see `from_linear`.

        Raises ValueError, naming the weight by `name`, where it cannot be quantized.
        """
        if self.quant_type == "int8":
            return Linear8bit.from_linear(
                linear, threshold=self.llm_int8_threshold, compute_dtype=self.compute_dtype, name=name
            )
        return Linear4bit.from_linear(linear, spec=self.spec, compute_dtype=self.compute_dtype, name=name)
