"""What the 4-bit and the int8 linear layer share: a frozen weight in codes, and how a module carries it."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from halfbyte.quant.layers.autocast import autocast_dtype


class QuantizedParameter(nn.Parameter):
    """Codes with, as an attribute, the statistics that it takes to read them; before that, on meta, (out, in).

    The attribute is the only one and is an argument of the constructor: accelerate moves a parameter by
    `type(p)(data, requires_grad=..., **p.__dict__).to(device)`.
    """

    statistics_name: ClassVar[str]
    """The attribute; its value has `to(device)` and `nbytes`, or is None."""

    @classmethod
    def make(cls, data: Tensor | None, requires_grad: bool, statistics: Any) -> Self:
        """The parameter over `data`, an empty one where that is None."""
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        setattr(self, cls.statistics_name, statistics)
        return self

    @property
    def statistics(self) -> Any:
        """What reads the codes; None before the weight is there."""
        return getattr(self, self.statistics_name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if id(self) not in memo:
            # The statistics are never written to, so copies of a layer may share them.
            memo[id(self)] = self.make(self.data.clone(), self.requires_grad, self.statistics)
        copy: Self = memo[id(self)]
        return copy

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # nn.Parameter's own would come back as a plain parameter.
        return type(self), (self.data, self.requires_grad, self.statistics)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Tensor.to, with the statistics moved along; a plain tensor where the dtype changes.

        On meta the statistics stay where they are: accelerate's offloading drops a weight by moving it there, and
        takes all but its values from what it finds there when it brings them back.
        """
        data = super().to(*args, **kwargs)
        if data.dtype != self.dtype:
            return data
        stays = self.statistics is None or data.is_meta
        statistics = self.statistics if stays else self.statistics.to(data.device)
        return self.make(data, self.requires_grad, statistics)

    def nelement(self) -> int:
        """The bytes of codes and statistics.

        `get_memory_footprint` of diffusers and transformers sums `nelement() * element_size()`, which would
        otherwise miss the statistics; the number of elements proper is `numel()`.
        """
        return super().nelement() + (0 if self.statistics is None else self.statistics.nbytes)


class QuantizedLayer(nn.Linear):
    """An nn.Linear with a quantized weight; adapters of PEFT and diffusers take it for the linear layer it is.

    It starts on meta with no values. `quantize` fills it from a floating-point weight, `load_packed` from codes, and
    `load_state_dict` from whichever of the two the state dict holds.
    """

    weight: QuantizedParameter
    parameter_class: ClassVar[type[QuantizedParameter]]
    code_dtype: ClassVar[torch.dtype]
    statistic_keys: ClassVar[Mapping[str, str]]
    """Where a state dict has the weight's statistics, below the layer, and what `load_packed` calls them."""
    on_host: bool = False
    """Whether the weight stays where it is when the layer is moved, see `quant.on_host`."""
    exact: Tensor | None
    """The weight (out, in) in full precision, where products are to be exact; in no file. See `quant.exact`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        compute_dtype: torch.dtype,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        self.weight = self._parameter(self.weight.data, None)
        self.compute_dtype = compute_dtype
        self.register_buffer("exact", None, persistent=False)
        self.requires_grad_(False)

    def quantize(self, weight: Tensor, name: str = "weight") -> None:
        """Take over a weight (out, in) in fp32, fp16 or bf16 on its device; ValueError names it by `name`."""
        raise NotImplementedError

    def load_packed(self, packed: Tensor, statistics: Mapping[str, Tensor], name: str = "weight") -> None:
        """Take over codes with the statistics that a bitsandbytes file has for them, see `statistic_keys`.

        Raises ValueError, naming the tensor, for what does not fit.
        """
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in)."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out), in the input's dtype; under autocast in autocast's, as nn.Linear."""
        autocast = autocast_dtype(input.device.type)
        compute_dtype = self.compute_dtype if autocast is None else autocast
        bias = None if self.bias is None else self.bias.to(compute_dtype)
        x = input.to(compute_dtype)
        if self.exact is None:
            output = self._product(x, bias)
        else:
            output = nn.functional.linear(x, self.exact.to(compute_dtype), bias)
        return output.to(input.dtype if autocast is None else autocast)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) times the weight transposed, plus bias, all in one dtype."""
        raise NotImplementedError

    def _packed_statistics(self) -> dict[str, Tensor]:
        """The weight's statistics by the keys of `statistic_keys`; only where there are any."""
        raise NotImplementedError

    def _parameter(self, data: Tensor, statistics: Any) -> QuantizedParameter:
        return self.parameter_class.make(data, False, statistics)

    def _take_over(self, linear: nn.Linear, name: str) -> Self:
        """This layer in place of `linear`: quantized where that has values, waiting for them where it is on meta."""
        if not linear.weight.is_meta:
            self.quantize(linear.weight, name)
            if linear.bias is not None:
                self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return self.train(linear.training)

    def _check_shape(self, name: str, shape: torch.Size) -> None:
        expected = (self.out_features, self.in_features)
        if tuple(shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(shape)}")

    def _no_weight(self) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__}({self.in_features}, {self.out_features}) has no weight yet; load one with"
            " load_quantized, load_state_dict or quantize"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_codes(tensor: Tensor) -> Tensor:
            if self.on_host and tensor is self.weight:
                return tensor.detach()
            # Detached it is a plain tensor, the only kind that nn.Module can wrap again.
            moved = fn(tensor).detach()
            # Module.type() would cast the codes as well.
            return moved if tensor.is_floating_point() else moved.to(tensor.dtype)

        statistics = self.weight.statistics
        super()._apply(keep_codes, recurse)
        # nn.Module either swaps the data below the parameter, where the statistics stay behind, or makes a plain
        # nn.Parameter.
        if not isinstance(self.weight, self.parameter_class):
            self.weight = self._parameter(self.weight.data, None)
        moved = None if statistics is None else statistics.to(self.weight.device)
        setattr(self.weight, self.weight.statistics_name, moved)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.statistics is not None:
            for key, tensor in self._packed_statistics().items():
                destination[prefix + key] = tensor

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
            name: rest.pop(prefix + place)
            for place, name in self.statistic_keys.items()
            if prefix + place in rest
        }
        if key in rest:
            weight = rest[key].detach()
            if not self.weight.is_meta:
                weight = weight.to(self.weight.device)
            try:
                if statistics or weight.dtype == self.code_dtype:
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
