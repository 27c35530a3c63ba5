"""PEFT's LoRA layers with our arithmetic: base and adapter in one product each way, see `low_rank`.

PEFT owns everything else: names, files, the list of adapters, which is active, their scales. An adapter of the
plain kind or of DoRA's takes the fused path; for all else that PEFT can do (other variants, merged or several active
adapters, adapters chosen by sample, LoRA biases, bases of other kinds) the layer is PEFT's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from halfbyte.kernels.int8.ops import Int8Weight
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight
from halfbyte.quant.layers.autocast import autocast_dtype
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.layers.linear8bit import Linear8bit
from halfbyte.quant.lora.dora import Dora, rescale
from halfbyte.quant.lora.linear_group import GroupLayer
from halfbyte.quant.lora.low_rank import AdaptedWeight, FrozenWeight, low_rank_linears


class LoraLinear(peft_layer.Linear):
    """PEFT's LoRA over an nn.Linear, base and adapter fused. What runs in the compute dtype runs there for both:
    autocast's, or else the base's; PEFT without autocast multiplies fp32 adapters in fp32."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """PEFT's list of variants, with DoRA's weights unpacked by ourselves."""
        return {**super().lora_variants, ("use_dora",): Dora}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in) -> (..., out), in the dtype that the base layer gives."""
        fused = None if args or kwargs else _fused(self, x)
        if fused is None:
            return super().forward(x, *args, **kwargs)
        return _apply(x, [fused])[0]


class LoraQuantizedLinear(LoraLinear):
    """The same over a quantized base, which no adapter can be merged into."""

    base_kind: ClassVar[str]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError: the sum would be rounded to the base's few bits, and most of the adapter lost."""
        raise ValueError(
            f"cannot merge an adapter into {self.base_kind} base, where rounding would undo it; keep the adapter"
            " separate, or load the base unquantized and merge there"
        )


class LoraLinear4bit(LoraQuantizedLinear):
    """Over `Linear4bit`."""

    base_kind = "a 4-bit"


class LoraLinear8bit(LoraQuantizedLinear):
    """Over `Linear8bit`."""

    base_kind = "an int8"


# By the class of the base; the first that fits is taken, so the special ones come first.
LORA_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    Linear4bit: LoraLinear4bit,
    Linear8bit: LoraLinear8bit,
    nn.Linear: LoraLinear,
}


def fused_config(config: LoraConfig) -> LoraConfig:
    """The same configuration, which makes our layers; nothing of that is written to files."""
    config._register_custom_module(LORA_LAYERS)
    return config


def lora_linears(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """`tuple(layer(x) for layer in layers)`, with the A of all adapted layers in one product.

    Layers that are not ours, or whose adapters take PEFT's path, are called one by one; so are all where their
    compute dtypes differ, or an adapter's dropout is on, which draws a mask for each layer.
    """
    fused = [_fused(layer, x) if isinstance(layer, LoraLinear) else None for layer in layers]
    group = [layer for layer in fused if layer is not None and layer.dropout is None]
    if len(group) < 2 or any(layer.compute_dtype != group[0].compute_dtype for layer in group):
        return tuple(layer(x) for layer in layers)
    outputs = iter(_apply(x, group))
    return tuple(
        layer(x) if plan is None or plan.dropout is not None else next(outputs)
        for layer, plan in zip(layers, fused, strict=True)
    )


@dataclass(frozen=True, eq=False)
class _Fused:
    """One layer's part in a fused product."""

    adapted: AdaptedWeight
    dropout: nn.Module | None
    compute_dtype: torch.dtype
    output_dtype: torch.dtype
    excess: Tensor | None = None  # (N,) fp32, DoRA's; the bias is then added after the rescaling
    bias: Tensor | None = None  # (N,)


def _fused(layer: LoraLinear, x: Tensor) -> _Fused | None:
    """What the fused path needs of a layer; None where its state asks for PEFT's own."""
    adapter = _sole_adapter(layer)
    base: Any = layer.base_layer
    # A class that was derived from nn.Linear may compute anything.
    if adapter is None or type(base) not in LORA_LAYERS or base.weight.requires_grad:
        return None
    down, up, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    if not (_is_bare(base) and _is_bare(down) and _is_bare(up)):
        return None
    autocast = autocast_dtype(x.device.type)
    weight: FrozenWeight = base.weight
    if isinstance(base, Linear4bit | Linear8bit):
        weight = base.packed_weight() if isinstance(base, Linear4bit) else base.int8_weight()
        compute_dtype = base.compute_dtype if autocast is None else autocast
        output_dtype = x.dtype if autocast is None else autocast
    elif autocast is not None and torch.float64 not in (x.dtype, base.weight.dtype):
        compute_dtype = output_dtype = autocast
    elif x.dtype == base.weight.dtype:
        compute_dtype = output_dtype = x.dtype
    else:
        return None  # the base alone knows what it makes of this
    drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    seen = dropout if drops else None
    scale = layer.scaling[adapter]
    if adapter not in layer.lora_variant:
        adapted = AdaptedWeight(weight, base.bias, down.weight, up.weight, scale)
        return _Fused(adapted, seen, compute_dtype, output_dtype)
    adapted = AdaptedWeight(weight, None, down.weight, up.weight, scale)
    excess = layer.lora_magnitude_vector[adapter].excess(base, down.weight, up.weight, scale)
    return _Fused(adapted, seen, compute_dtype, output_dtype, excess, base.bias)


def _sole_adapter(layer: LoraLinear) -> str | None:
    """The one adapter to apply; None where there is none, several, or one of another kind than LoRA and DoRA."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.lora_bias[active[0]]:
        return None
    if not isinstance(layer.lora_variant.get(active[0]), Dora | None):
        return None
    return active[0]


def _is_bare(module: nn.Module) -> bool:
    """Whether calling the module does no more than its class says: offloading and hooks need the call."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _apply(x: Tensor, layers: Sequence[_Fused]) -> tuple[Tensor, ...]:
    first = layers[0]
    rows = x.reshape(-1, x.shape[-1]).to(first.compute_dtype)
    dropped = None if first.dropout is None else first.dropout(rows)
    outputs = low_rank_linears(rows, [layer.adapted for layer in layers], dropped)
    return tuple(
        (y if layer.excess is None else rescale(y, layer.excess, layer.bias))
        .view(*x.shape[:-1], y.shape[-1])
        .to(layer.output_dtype)
        for y, layer in zip(outputs, layers, strict=True)
    )


def group_layer(layer: nn.Module, x: Tensor) -> GroupLayer | None:
    """The layer's part in a `LinearGroup` over x, computed in x's dtype; None where it must be called as it is."""
    if not _is_bare(layer):
        return None
    base = layer
    if isinstance(layer, LoraLinear):
        if not layer.disable_adapters:
            fused = _fused(layer, x)
            if fused is None or fused.dropout is not None or fused.excess is not None:
                return None
            adapted = fused.adapted
            if fused.compute_dtype != x.dtype or isinstance(adapted.weight, Int8Weight):
                return None
            return GroupLayer(adapted.weight, adapted.bias, adapted.down, adapted.up, adapted.scale)
        base = layer.base_layer
    if type(base) not in LORA_LAYERS or not _is_bare(base) or base.weight.requires_grad:
        return None
    if isinstance(base, Linear4bit):
        weight: Tensor | PackedWeight = base.packed_weight()
        return None if base.compute_dtype != x.dtype else GroupLayer(weight, base.bias, None, None, 1.0)
    assert isinstance(base, nn.Linear)
    return None if base.weight.dtype != x.dtype else GroupLayer(base.weight, base.bias, None, None, 1.0)
