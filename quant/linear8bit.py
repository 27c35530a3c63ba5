"""A frozen linear layer of LLM.int8(): int8 weights and activations, outlier columns in the compute dtype."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels import int8_ops
from halfbyte.quant.autocast import autocast_dtype, without_autocast
from halfbyte.quant.int8 import (
    DEFAULT_THRESHOLD,
    STATISTICS,
    dequantize,
    pack_scales,
    quantize,
    unpack_scales,
)


class Int8Params(nn.Parameter):
    """int8 (out, in) with the scales of its rows in `SCB`; before quantization, on meta, floating-point.

    diffusers and PEFT know an int8 weight by this class name, and read `SCB` to dequantize it; accelerate moves
    one by `type(p)(data, requires_grad=..., **p.__dict__).to(device)`.
    """

    SCB: Tensor | None  # (out,) fp32, whatever the module around it is cast to

    def __new__(
        cls, data: Tensor | None = None, requires_grad: bool = False, SCB: Tensor | None = None
    ) -> "Int8Params":
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.SCB = SCB
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Int8Params":
        if id(self) not in memo:
            # The scales are never written to, so copies of a layer may share them.
            memo[id(self)] = Int8Params(self.data.clone(), self.requires_grad, self.SCB)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # nn.Parameter's own would come back as a plain parameter.
        return Int8Params, (self.data, self.requires_grad, self.SCB)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Tensor.to, with the scales moved along; a plain tensor where the dtype changes."""
        data = super().to(*args, **kwargs)
        if data.dtype != self.dtype:
            return data
        scales = None if self.SCB is None else self.SCB.to(data.device)
        return Int8Params(data, self.requires_grad, scales)

    def nelement(self) -> int:
        """The bytes of weight and scales.

        `get_memory_footprint` of diffusers and transformers sums `nelement() * element_size()`, which would
        otherwise miss the scales; the number of elements proper is `numel()`.
        """
        return super().nelement() + (0 if self.SCB is None else self.SCB.nbytes)


class _FrozenLinear8bit(torch.autograd.Function):
    """y = x W^T + b by LLM.int8(), dX = dY W with W dequantized: the rounding of x passes gradients as they are."""

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


class Linear8bit(nn.Linear):
    """An nn.Linear with an int8 weight; adapters of PEFT and diffusers take it for the linear layer it is.

    It starts on meta with no values. `quantize` fills it from a floating-point weight, `load_packed` from an
    int8 one, and `load_state_dict` from whichever of the two the state dict holds.
    """

    weight: Int8Params

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
        """Input columns with a magnitude of `threshold` or more are multiplied in `compute_dtype`; 0: none are.

        `dtype` is that of the bias (and of the weight to come).
        """
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        self.weight = Int8Params(self.weight.data)
        self.threshold = threshold
        self.compute_dtype = compute_dtype
        self.requires_grad_(False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        threshold: float = DEFAULT_THRESHOLD,
        compute_dtype: torch.dtype,
        name: str = "weight",
    ) -> "Linear8bit":
        """The layer that replaces `linear`: quantized where it has values, waiting for them where it is on meta."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            threshold=threshold,
            compute_dtype=compute_dtype,
            dtype=linear.weight.dtype,
        )
        if not linear.weight.is_meta:
            layer.quantize(linear.weight, name)
            if linear.bias is not None:
                layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    @property
    def state(self) -> Int8Params:
        """Where PEFT (DoRA) and diffusers (LoRAs that widen a layer) look for `SCB`."""
        return self.weight

    def quantize(self, weight: Tensor, name: str = "weight") -> None:
        """Take over a weight (out, in) in fp32, fp16 or bf16 on its device; ValueError names it by `name`."""
        expected = (self.out_features, self.in_features)
        if tuple(weight.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(weight.shape)}")
        quantized, scales = quantize(weight, name)
        self.weight = Int8Params(quantized, SCB=scales)

    def load_packed(self, packed: Tensor, statistics: Mapping[str, Tensor], name: str = "weight") -> None:
        """Take over an int8 weight with the statistics that a bitsandbytes file has for it, by name.

        Raises ValueError, naming the tensor, for what does not fit, see `unpack_scales`.
        """
        scales = unpack_scales(name, packed, (self.out_features, self.in_features), statistics)
        self.weight = Int8Params(packed, SCB=scales)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in), in `dtype` or else in the compute dtype: the format forgets what it was."""
        return dequantize(self.weight.data, self._scales(), dtype or self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out), in the input's dtype; under autocast in autocast's, as nn.Linear."""
        autocast = autocast_dtype(input.device.type)
        compute_dtype = self.compute_dtype if autocast is None else autocast
        output_dtype = input.dtype if autocast is None else autocast
        bias = None if self.bias is None else self.bias.to(compute_dtype)
        output = _FrozenLinear8bit.apply(
            input.to(compute_dtype), self.weight, self._scales(), bias, self.threshold
        )
        return output.to(output_dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold:g}, compute_dtype={self.compute_dtype}"

    def _scales(self) -> Tensor:
        if self.weight.SCB is None:
            raise RuntimeError(
                f"Linear8bit({self.in_features}, {self.out_features}) has no weight yet; load one with"
                " load_quantized, load_state_dict or quantize"
            )
        return self.weight.SCB

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear8bit":
        def keep_codes(tensor: Tensor) -> Tensor:
            # Detached it is a plain tensor, the only kind that nn.Module can wrap again.
            moved = fn(tensor).detach()
            # Module.type() would cast the codes as well.
            return moved if tensor.is_floating_point() else moved.to(tensor.dtype)

        scales = self.weight.SCB
        super()._apply(keep_codes, recurse)
        # nn.Module either swaps the data below the parameter, where the scales stay behind, or makes a plain
        # nn.Parameter.
        if not isinstance(self.weight, Int8Params):
            self.weight = Int8Params(self.weight.data)
        self.weight.SCB = None if scales is None else scales.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.SCB is not None:
            for leaf, tensor in pack_scales(self.weight.SCB).items():
                destination[prefix + leaf] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        rest = dict(state_dict)
        statistics = {leaf: rest.pop(prefix + leaf) for leaf in STATISTICS if prefix + leaf in rest}
        if key in rest:
            weight = rest[key].detach()
            if not self.weight.is_meta:
                weight = weight.to(self.weight.device)
            try:
                if statistics or weight.dtype == torch.int8:
                    self.load_packed(weight, statistics, key)
                else:
                    self.quantize(weight, key)
            except ValueError as error:
                error_msgs.append(str(error))
            # In place already: nn.Module sees the layer's own parameter and goes on to the bias.
            rest[key] = self.weight
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
