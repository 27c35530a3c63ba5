"""A frozen linear layer whose weight stays in 4 bits; gradients reach its input, and its bias if asked."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels import linear_ops
from halfbyte.kernels.packed_weight import PackedWeight
from halfbyte.kernels.tracing import is_eager_without_grad
from halfbyte.quant.autocast import autocast_dtype, without_autocast
from halfbyte.quant.nf4 import QuantSpec, QuantState, dequantize, quantize
from halfbyte.quant.packing import STATISTICS, pack_state, unpack_state


class Params4bit(nn.Parameter):
    """Packed codes uint8 ((n + 1) // 2, 1) with `quant_state`; before quantization, on meta, (out, in).

    diffusers and PEFT know a 4-bit weight by this class name and take the layer's shape from
    `quant_state.shape`; accelerate moves one by `type(p)(data, requires_grad=..., **p.__dict__).to(device)`.
    """

    quant_state: QuantState | None

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
    ) -> "Params4bit":
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.quant_state = quant_state
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Params4bit":
        if id(self) not in memo:
            # The statistics are never written to, so copies of a layer may share them.
            memo[id(self)] = Params4bit(self.data.clone(), self.requires_grad, self.quant_state)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # nn.Parameter's own would come back as a plain parameter.
        return Params4bit, (self.data, self.requires_grad, self.quant_state)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Tensor.to, with the statistics moved along; a plain tensor where the dtype changes."""
        data = super().to(*args, **kwargs)
        if data.dtype != self.dtype:
            return data
        state = None if self.quant_state is None else self.quant_state.to(data.device)
        return Params4bit(data, self.requires_grad, state)

    def nelement(self) -> int:
        """The bytes of the packed codes and their statistics.

        `get_memory_footprint` of diffusers and transformers sums `nelement() * element_size()`, which would
        otherwise miss the statistics; the number of elements proper is `numel()`.
        """
        return super().nelement() + (0 if self.quant_state is None else self.quant_state.nbytes)


class _FrozenLinear(torch.autograd.Function):
    """y = x W^T + b, W dequantized for the product alone and again for dX: nothing of W's size is saved."""

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
    """A packed (N, K) weight with its state, as the kernels take it."""
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


class Linear4bit(nn.Linear):
    """An nn.Linear with a 4-bit weight; adapters of PEFT and diffusers take it for the linear layer it is.

    It starts on meta with no values. `quantize` fills it from a floating-point weight, `load_packed` from
    packed codes, and `load_state_dict` from whichever of the two the state dict holds.
    """

    weight: Params4bit

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
        """`dtype` is that of the bias (and of the weight to come); the products run in `compute_dtype`."""
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        self.weight = Params4bit(self.weight.data)
        self.spec = spec
        self.compute_dtype = compute_dtype
        self.requires_grad_(False)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, spec: QuantSpec, compute_dtype: torch.dtype, name: str = "weight"
    ) -> "Linear4bit":
        """The layer that replaces `linear`: quantized where it has values, waiting for them where it is on meta."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            spec=spec,
            compute_dtype=compute_dtype,
            dtype=linear.weight.dtype,
        )
        if not linear.weight.is_meta:
            layer.quantize(linear.weight, name)
            if linear.bias is not None:
                layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    def quantize(self, weight: Tensor, name: str = "weight") -> None:
        """Take over a weight (out, in) in fp32, fp16 or bf16 on its device; ValueError names it by `name`."""
        expected = (self.out_features, self.in_features)
        if tuple(weight.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(weight.shape)}")
        packed, state = quantize(weight, self.spec, name)
        self.weight = Params4bit(packed, quant_state=state)

    def load_packed(self, packed: Tensor, statistics: Mapping[str, Tensor], name: str = "weight") -> None:
        """Take over packed codes with the statistics that a bitsandbytes file has for them, by suffix.

        Raises ValueError, naming the tensor, for statistics that do not fit, see `unpack_state`.
        """
        state = unpack_state(name, packed, statistics)
        expected = (self.out_features, self.in_features)
        if tuple(state.shape) != expected:
            raise ValueError(f"{name}: expected a weight of shape {expected}, got {tuple(state.shape)}")
        self.weight = Params4bit(packed, quant_state=state)
        self.spec = QuantSpec(state.quant_type, state.nested is not None, state.blocksize)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in), in `dtype` or else in the dtype it had before it was quantized."""
        return dequantize(self.weight.data, self._state(), dtype)

    def packed_weight(self) -> PackedWeight:
        """The weight as the kernels take it."""
        return packed_weight(self.weight, self._state())

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out), in the input's dtype; under autocast in autocast's, as nn.Linear."""
        autocast = autocast_dtype(input.device.type)
        compute_dtype = self.compute_dtype if autocast is None else autocast
        bias = None if self.bias is None else self.bias.to(compute_dtype)
        x = input.to(compute_dtype)
        if is_eager_without_grad(x, bias):
            output = linear_ops.linear_4bit(x, self.packed_weight(), bias)
        else:
            output = _FrozenLinear.apply(x, self.weight, bias, self._state())
        return output.to(input.dtype if autocast is None else autocast)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec}, compute_dtype={self.compute_dtype}"

    def _state(self) -> QuantState:
        state = self.weight.quant_state
        if state is None:
            raise RuntimeError(
                f"Linear4bit({self.in_features}, {self.out_features}) has no weight yet; load one with"
                " load_quantized, load_state_dict or quantize"
            )
        return state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear4bit":
        def keep_codes(tensor: Tensor) -> Tensor:
            # Detached it is a plain tensor, the only kind that nn.Module can wrap again.
            moved = fn(tensor).detach()
            # Module.type() would cast the codes as well.
            return moved if tensor.is_floating_point() else moved.to(tensor.dtype)

        state = self.weight.quant_state
        super()._apply(keep_codes, recurse)
        # nn.Module either swaps the data below the parameter, where the statistics stay behind, or makes a
        # plain nn.Parameter.
        if not isinstance(self.weight, Params4bit):
            self.weight = Params4bit(self.weight.data)
        self.weight.quant_state = None if state is None else state.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = self.weight.quant_state
        if state is not None:
            for suffix, tensor in pack_state(state).items():
                destination[f"{prefix}weight.{suffix}"] = tensor

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
        statistics = {
            suffix: rest.pop(f"{key}.{suffix}") for suffix in STATISTICS if f"{key}.{suffix}" in rest
        }
        if key in rest:
            weight = rest[key].detach()
            if not self.weight.is_meta:
                weight = weight.to(self.weight.device)
            try:
                if statistics or weight.dtype == torch.uint8:
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
