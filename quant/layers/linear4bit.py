"""Linear4bit, a frozen linear layer with a 4-bit weight; gradients flow to its input and a trainable bias."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from halfbyte.kernels.dispatch import is_differentiated
from halfbyte.kernels.linear_4bit import ops as linear_ops
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight
from halfbyte.quant.formats.nf4 import QuantSpec, QuantState, dequantize, quantize
from halfbyte.quant.formats.packing import STATISTICS, pack_state, unpack_state
from halfbyte.quant.layers.autocast import without_autocast
from halfbyte.quant.layers.quantized_layer import QuantizedLayer, QuantizedParameter


class Params4bit(QuantizedParameter):
    """Packed codes, uint8 ((n + 1) // 2, 1), with their `quant_state`.

    diffusers and PEFT recognize a 4-bit weight by this class name, and read the layer's shape from
    `quant_state.shape`.
    """

    statistics_name = "quant_state"
    quant_state: QuantState | None

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
    ) -> "Params4bit":
        return cls.make(data, requires_grad, quant_state)


class _FrozenLinear(torch.autograd.Function):
    """Computes y = x W^T + b and dX = dY W.

    Both passes dequantize W for their own product only; the backward saves the packed codes and nothing of
    W's size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, state: QuantState) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.state = state
        return linear_ops.linear_4bit(x, packed_weight(packed, state), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        (packed,) = ctx.saved_tensors
        grad_x = grad_bias = None
        with without_autocast(grad_output.device.type):
            if ctx.needs_input_grad[0]:
                grad_x = linear_ops.linear_4bit_input_grad(grad_output, packed_weight(packed, ctx.state))
            if ctx.needs_input_grad[2]:
                grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return grad_x, None, grad_bias, None


def packed_weight(packed: Tensor, state: QuantState) -> PackedWeight:
    """Returns a packed weight (N, K) and its state in the form that the kernels take."""
    outputs, width = state.shape
    nested = state.nested
    return PackedWeight(
        packed=packed,
        absmax=state.absmax,
        nested_absmax=None if nested is None else nested.absmax,
        offset=None if nested is None else nested.offset,
        code=state.code,
        nested_code=None if nested is None else nested.code,
        shape=(outputs, width),
        blocksize=state.blocksize,
        nested_blocksize=0 if nested is None else nested.blocksize,
    )


class Linear4bit(QuantizedLayer):
    """A linear layer with a 4-bit weight, NF4 or FP4."""

    weight: Params4bit
    parameter_class = Params4bit
    code_dtype = torch.uint8
    statistic_keys: ClassVar = {f"weight.{suffix}": suffix for suffix in STATISTICS}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        spec: QuantSpec,
        compute_dtype: torch.dtype,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Creates the layer on meta without a weight.

        dtype: dtype of the bias, and of the weight before it is quantized. compute_dtype: dtype of the
        products.
        """
        super().__init__(in_features, out_features, bias, compute_dtype=compute_dtype, dtype=dtype)
        self.spec = spec

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, spec: QuantSpec, compute_dtype: torch.dtype, name: str = "weight"
    ) -> "Linear4bit":
        """Returns the layer that replaces `linear`, with its quantized weight, or empty if it is on meta."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            spec=spec,
            compute_dtype=compute_dtype,
            dtype=linear.weight.dtype,
        )
        return layer._copy_from(linear, name)

    def quantize(self, weight: Tensor, name: str = "weight") -> None:
        """Quantizes a weight, see `QuantizedLayer.quantize`."""
        self._check_shape(name, weight.shape)
        packed, state = quantize(weight, self.spec, name)
        self.weight = Params4bit(packed, quant_state=state)

    def load_packed(self, packed: Tensor, statistics: Mapping[str, Tensor], name: str = "weight") -> None:
        """Loads packed codes and the statistics of a bitsandbytes file, by suffix; sets `spec` from them.

        Raises ValueError, naming the tensor, for statistics that do not fit, see `unpack_state`.
        """
        state = unpack_state(name, packed, statistics)
        expected = (self.out_features, self.in_features)
        if tuple(state.shape) != expected:
            raise ValueError(f"{name}: expected a weight of shape {expected}, got {tuple(state.shape)}")
        self.weight = Params4bit(packed, quant_state=state)
        self.spec = QuantSpec(state.quant_type, state.nested is not None, state.blocksize)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the weight (out, in), in `dtype` or by default in the dtype it had before quantization."""
        return dequantize(self.weight.data, self._state(), dtype)

    def packed_weight(self) -> PackedWeight:
        """Returns the weight in the form that the kernels take."""
        return packed_weight(self.weight, self._state())

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if is_differentiated(x, bias):
            output: Tensor = _FrozenLinear.apply(x, self.weight, bias, self._state())
            return output
        return linear_ops.linear_4bit(x, self.packed_weight(), bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec}, compute_dtype={self.compute_dtype}"

    def _state(self) -> QuantState:
        state = self.weight.quant_state
        if state is None:
            raise self._no_weight()
        return state

    def _packed_statistics(self) -> dict[str, Tensor]:
        return {f"weight.{suffix}": tensor for suffix, tensor in pack_state(self._state()).items()}
