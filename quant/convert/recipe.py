"""QuantRecipe: how a model's linear layers are quantized."""

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

_LARGEST_THRESHOLD = 65504.0  # of fp16, in which outliers are told


@dataclass(frozen=True)
class QuantRecipe:
    """How a model is quantized, and which of its layers are not."""

    quant_type: str = "nf4"
    """`nf4`, `fp4` or `int8` (LLM.int8())."""
    double_quant: bool = True
    """Store the block scales in 8 bits as well; always False for int8, which has a scale a row."""
    blocksize: int = _USUAL_BLOCKSIZE
    """Weights that share a scale, in the 4-bit types."""
    compute_dtype: torch.dtype = torch.bfloat16
    """What the products run in: bfloat16, float16 or float32."""
    skip: tuple[str, ...] = ()
    """Modules left alone, as diffusers matches them: the last part of a layer's path, its whole path, or anything
    that stands in the path before a dot."""
    llm_int8_threshold: float = DEFAULT_THRESHOLD
    """int8: input columns that reach this magnitude are multiplied in compute_dtype; 0: none are."""
    scale_search: str | None = None
    """`mse`: 4-bit scales with the least squared error instead of the block's largest magnitude. It leaves no
    trace in the files, and a folder that is quantized already keeps its scales."""

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
        # diffusers refuses a config.json with an integer there.
        object.__setattr__(self, "llm_int8_threshold", float(self.llm_int8_threshold))
        if self.quant_type == "int8":
            if self.scale_search is not None:
                raise ValueError(f"scale_search: got {self.scale_search!r}, expected None for int8")
            # What has no meaning for a type has one value there, so that recipes that mean the same are equal.
            object.__setattr__(self, "double_quant", False)
        else:
            object.__setattr__(self, "llm_int8_threshold", DEFAULT_THRESHOLD)
            QuantSpec(self.quant_type, self.double_quant, self.blocksize, self.scale_search)

    def describe(self) -> str:
        """How the layers are held, in words; what they compute in is not said."""
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
        """The fields as JSON holds them; see `of_json`."""
        return asdict(self) | {"compute_dtype": str(self.compute_dtype), "skip": list(self.skip)}

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> Self:
        """The recipe that `as_json` gave. Raises KeyError, TypeError or ValueError for other fields."""
        dtypes = {str(dtype): dtype for dtype in WEIGHT_DTYPES}
        return cls(
            **{**fields, "compute_dtype": dtypes[fields["compute_dtype"]], "skip": tuple(fields["skip"])}
        )

    @property
    def spec(self) -> QuantSpec:
        """The part that concerns a single 4-bit weight."""
        assert self.quant_type != "int8"
        return QuantSpec(self.quant_type, self.double_quant, self.blocksize, self.scale_search)

    def quantized(self, linear: nn.Linear, name: str) -> QuantizedLayer:
        """The layer that replaces `linear`; raises ValueError, naming the weight by `name`, see `from_linear`."""
        if self.quant_type == "int8":
            return Linear8bit.from_linear(
                linear, threshold=self.llm_int8_threshold, compute_dtype=self.compute_dtype, name=name
            )
        return Linear4bit.from_linear(linear, spec=self.spec, compute_dtype=self.compute_dtype, name=name)
