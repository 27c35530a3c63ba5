"""Base classes of the 4-bit and int8 linear layers: the layer, and the parameter with its quantized codes."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from halfbyte.quant.layers.autocast import autocast_dtype


class QuantizedParameter(nn.Parameter):
    """Quantized codes, with the statistics that dequantization needs in one attribute.

    Before the layer has a weight, the parameter is (out, in) on meta and its statistics are None.

    The parameter has no other attribute, and the constructor accepts this one as an argument, because
    accelerate moves a parameter with `type(p)(data, requires_grad=..., **p.__dict__).to(device)`.
    """

    statistics_name: ClassVar[str]
    """The attribute's name. Its value is None, or has `to(device)` and `nbytes`."""

    @classmethod
    def make(cls, data: Tensor | None, requires_grad: bool, statistics: Any) -> Self:
        """Creates the parameter on `data`, or an empty one if `data` is None."""
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        setattr(self, cls.statistics_name, statistics)
        return self

    @property
    def statistics(self) -> Any:
        """The statistics that dequantization needs; None before the layer has a weight."""
        return getattr(self, self.statistics_name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if id(self) not in memo:
            # Nothing writes to the statistics, so copies of a layer can share them.
            memo[id(self)] = self.make(self.data.clone(), self.requires_grad, self.statistics)
        copy: Self = memo[id(self)]
        return copy

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # nn.Parameter's own __reduce_ex__ would unpickle as a plain parameter.
        return type(self), (self.data, self.requires_grad, self.statistics)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Moves or casts as Tensor.to does, with the statistics; returns a plain tensor if the dtype changes.

        A move to meta leaves the statistics where they are. accelerate's offloading frees a weight by moving
        it to meta, and when it brings the values back, it takes everything else from the parameter on meta.
        """
        data = super().to(*args, **kwargs)
        if data.dtype != self.dtype:
            return data
        stays = self.statistics is None or data.is_meta
        statistics = self.statistics if stays else self.statistics.to(data.device)
        return self.make(data, self.requires_grad, statistics)

    def nelement(self) -> int:
        """Returns the bytes of codes and statistics; the number of elements is `numel()`.

        `get_memory_footprint` of diffusers and transformers sums `nelement() * element_size()`, which would
        otherwise leave out the statistics.
        """
        return super().nelement() + (0 if self.statistics is None else self.statistics.nbytes)


class QuantizedLayer(nn.Linear):
    """An nn.Linear with a quantized weight. PEFT and diffusers add adapters to it as to any linear layer.

    It starts on meta without values. `quantize` fills it from a floating-point weight, `load_packed` fills it
    from codes, and `load_state_dict` accepts either.
    """

    weight: QuantizedParameter
    parameter_class: ClassVar[type[QuantizedParameter]]
    code_dtype: ClassVar[torch.dtype]
    statistic_keys: ClassVar[Mapping[str, str]]
    """Key of each statistic in a state dict, relative to the layer -> its name in `load_packed`."""
    on_host: bool = False
    """True if the weight stays on the host when the layer is moved, see `quant.layers.on_host`."""
    exact: Tensor | None
    """The weight (out, in) in full precision, if the layer multiplies by that instead, see
    `quant.layers.exact`. It is not saved."""

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
        """Quantizes a weight (out, in) in fp32, fp16 or bf16 on its device, and makes it the layer's weight.

        Raises ValueError, naming the weight by `name`, if it does not fit the layer or cannot be quantized.
        """
        raise NotImplementedError

    def load_packed(self, packed: Tensor, statistics: Mapping[str, Tensor], name: str = "weight") -> None:
        """Sets packed codes and the statistics of a bitsandbytes file as the weight, see `statistic_keys`.

        Raises ValueError, naming the tensor, if codes or statistics do not fit the layer.
        """
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the weight (out, in) in floating point."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Computes (..., out) from input (..., in).

        The result is in the input's dtype, or under autocast in autocast's dtype, as with nn.Linear.
        """
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
        """Computes x W^T + bias for x (..., in); all in one dtype."""
        raise NotImplementedError

    def _packed_statistics(self) -> dict[str, Tensor]:
        """Returns the weight's statistics by the keys of `statistic_keys`; the layer must have a weight."""
        raise NotImplementedError

    def _parameter(self, data: Tensor, statistics: Any) -> QuantizedParameter:
        return self.parameter_class.make(data, False, statistics)

    def _copy_from(self, linear: nn.Linear, name: str) -> Self:
        """Copies weight (quantized) and bias of `linear`, unless it is on meta; returns this layer."""
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
            # detach() gives a plain tensor: nn.Module cannot wrap a QuantizedParameter into a parameter
            # again.
            moved = fn(tensor).detach()
            # Module.type() would also cast the codes.
            return moved if tensor.is_floating_point() else moved.to(tensor.dtype)

        statistics = self.weight.statistics
        super()._apply(keep_codes, recurse)
        # nn.Module either swaps the data inside the parameter, which leaves the statistics on the old device,
        # or creates a plain nn.Parameter.
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
        # A copy without the statistics, which nn.Module would report as unexpected keys.
        rest = dict(state_dict)
        statistics = {
            name: rest.pop(prefix + suffix)
            for suffix, name in self.statistic_keys.items()
            if prefix + suffix in rest
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
            # The weight is loaded. nn.Module now finds the layer's own parameter under its key, and loads the
            # bias.
            rest[key] = self.weight
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
