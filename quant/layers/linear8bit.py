"""Linear8bit, a frozen LLM.int8() linear layer: int8 products, with outlier columns in the compute dtype."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from halfbyte.kernels.dispatch import is_differentiated
from halfbyte.kernels.int8 import ops as int8_ops
from halfbyte.quant.formats.int8 import (
    DEFAULT_THRESHOLD,
    STATISTICS,
    dequantize,
    pack_scales,
    quantize,
    unpack_scales,
)
from halfbyte.quant.layers.autocast import without_autocast
from halfbyte.quant.layers.quantized_layer import QuantizedLayer, QuantizedParameter


class Int8Params(QuantizedParameter):
    """An int8 weight (out, in), with the scales of its rows in `SCB`.

    diffusers and PEFT recognize an int8 weight by this class name, and read `SCB` to dequantize it.
    """

    statistics_name = "SCB"
    SCB: Tensor | None  # (out,) fp32, even if the module around it is cast

    def __new__(
        cls, data: Tensor | None = None, requires_grad: bool = False, SCB: Tensor | None = None
    ) -> "Int8Params":
        return cls.make(data, requires_grad, SCB)


class _FrozenLinear8bit(torch.autograd.Function):
    """Computes y = x W^T + b with LLM.int8(), and dX = dY W with W dequantized.

    The backward treats the rounding of x as the identity (straight-through).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, quantized: Tensor, scales: Tensor, bias: Tensor | None, threshold: float
    ) -> Tensor:
        ctx.save_for_backward(quantized, scales)
        with without_autocast(x.device.type):
            return int8_ops.linear_int8(x, quantized, scales, bias, threshold)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        grad_x = grad_bias = None
        with without_autocast(grad_output.device.type):
            if ctx.needs_input_grad[0]:
                grad_x = int8_ops.linear_int8_input_grad(grad_output, *ctx.saved_tensors)
            if ctx.needs_input_grad[3]:
                grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return grad_x, None, None, grad_bias, None


class Linear8bit(QuantizedLayer):
    """A linear layer with an int8 weight."""

    weight: Int8Params
    parameter_class = Int8Params
    code_dtype = torch.int8
    statistic_keys: ClassVar = {name: name for name in STATISTICS}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        threshold: float = DEFAULT_THRESHOLD,
        compute_dtype: torch.dtype,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Creates the layer on meta without a weight.

        threshold: input columns with this magnitude or more are multiplied in `compute_dtype`; 0 turns this
        off.
        dtype: dtype of the bias, and of the weight before it is quantized.
        """
        super().__init__(in_features, out_features, bias, compute_dtype=compute_dtype, dtype=dtype)
        self.threshold = threshold

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        threshold: float = DEFAULT_THRESHOLD,
        compute_dtype: torch.dtype,
        name: str = "weight",
    ) -> "Linear8bit":
        """Returns the layer that replaces `linear`, with its quantized weight, or empty if it is on meta."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            threshold=threshold,
            compute_dtype=compute_dtype,
            dtype=linear.weight.dtype,
        )
        return layer._copy_from(linear, name)

    @property
    def state(self) -> Int8Params:
        """The weight. PEFT (for DoRA) and diffusers (for LoRAs that widen a layer) read `state.SCB`."""
        return self.weight

    def quantize(self, weight: Tensor, name: str = "weight") -> None:
        """Quantizes a weight, see `QuantizedLayer.quantize`."""
        self._check_shape(name, weight.shape)
        quantized, scales = quantize(weight, name)
        self.weight = Int8Params(quantized, SCB=scales)

    def load_packed(self, packed: Tensor, statistics: Mapping[str, Tensor], name: str = "weight") -> None:
        """Loads an int8 weight and the statistics of a bitsandbytes file, by name.

        Raises ValueError, naming the tensor, if they do not fit, see `unpack_scales`.
        """
        scales = unpack_scales(name, packed, (self.out_features, self.in_features), statistics)
        self.weight = Int8Params(packed, SCB=scales)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the weight (out, in), in `dtype` or by default in the compute dtype.

        The format does not record the dtype that the weight had before quantization.
        """
        return dequantize(self.weight.data, self._scales(), dtype or self.compute_dtype)

    def int8_weight(self) -> int8_ops.Int8Weight:
        """Returns the weight in the form that the kernels take."""
        return int8_ops.Int8Weight(self.weight, self._scales(), self.threshold)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if is_differentiated(x, bias):
            output: Tensor = _FrozenLinear8bit.apply(x, self.weight, self._scales(), bias, self.threshold)
            return output
        with without_autocast(x.device.type):
            return int8_ops.linear_int8(x, self.weight, self._scales(), bias, self.threshold)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold:g}, compute_dtype={self.compute_dtype}"

    def _scales(self) -> Tensor:
        scales = self.weight.SCB
        if scales is None:
            raise self._no_weight()
        return scales

    def _packed_statistics(self) -> dict[str, Tensor]:
        return pack_scales(self._scales())
