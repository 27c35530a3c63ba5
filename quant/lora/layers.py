"""LoRA layers for PEFT that compute base and adapter together, see `low_rank`.

PEFT owns everything else: names, files, the list of adapters, the active adapter and the scales. Plain LoRA
and DoRA adapters take the fused path. In every other case the layer runs PEFT's own forward: other variants,
merged adapters, several active adapters, adapters chosen per sample, LoRA biases, and other kinds of base.
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
    """PEFT's LoRA layer on an nn.Linear, with base and adapter fused.

    Base and adapter both compute in autocast's dtype, or without autocast in the base's. Without autocast,
    PEFT would multiply fp32 adapters in fp32.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Returns PEFT's variants, with our `Dora`, which dequantizes the base without bitsandbytes."""
        return {**super().lora_variants, ("use_dora",): Dora}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Computes the adapted output (..., out) of x (..., in), in the dtype of the base layer's output."""
        fused = None if args or kwargs else _fused(self, x)
        if fused is None:
            return super().forward(x, *args, **kwargs)
        return _apply(x, [fused])[0]


class LoraQuantizedLinear(LoraLinear):
    """The same layer on a quantized base. Adapters cannot be merged into it."""

    base_kind: ClassVar[str]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError: rounding the sum to the base's few bits would lose most of the adapter."""
        raise ValueError(
            f"cannot merge an adapter into {self.base_kind} base: rounding to the base's few bits would lose most of"
            " the adapter; keep the adapter separate, or load the base unquantized and merge there"
        )


class LoraLinear4bit(LoraQuantizedLinear):
    """The LoRA layer on a `Linear4bit`."""

    base_kind = "a 4-bit"


class LoraLinear8bit(LoraQuantizedLinear):
    """The LoRA layer on a `Linear8bit`."""

    base_kind = "an int8"


# The LoRA layer for each class of base. PEFT takes the first match, so subclasses of nn.Linear come before
# it.
LORA_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    Linear4bit: LoraLinear4bit,
    Linear8bit: LoraLinear8bit,
    nn.Linear: LoraLinear,
}


def fused_config(config: LoraConfig) -> LoraConfig:
    """Makes PEFT build our layers from this configuration, and returns it; files do not record the change."""
    config._register_custom_module(LORA_LAYERS)
    return config


def lora_linears(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Computes `tuple(layer(x) for layer in layers)`, with the A of all adapted layers in one product.

    A layer is called separately if it is not ours, if its adapter takes PEFT's path, or if its adapter's
    dropout is active, since each layer draws its own dropout mask. If the compute dtypes differ, all layers
    are.
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
    """The operands of one layer in a fused product."""

    adapted: AdaptedWeight
    dropout: nn.Module | None
    compute_dtype: torch.dtype
    output_dtype: torch.dtype
    excess: Tensor | None = None  # (N,) fp32, with DoRA only
    bias: Tensor | None = None  # (N,), with DoRA only, which adds it after rescaling; else in `adapted`


def _fused(layer: LoraLinear, x: Tensor) -> _Fused | None:
    """Returns the layer's operands for the fused path; None where it must take PEFT's own."""
    adapter = _sole_adapter(layer)
    base: Any = layer.base_layer
    # The exact class is compared: another subclass of nn.Linear may compute anything in its forward.
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
        return None  # x and the weight differ in dtype: only the base's own forward decides what happens then
    is_dropping = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
    active_dropout = dropout if is_dropping else None
    scale = layer.scaling[adapter]
    if adapter not in layer.lora_variant:
        adapted = AdaptedWeight(weight, base.bias, down.weight, up.weight, scale)
        return _Fused(adapted, active_dropout, compute_dtype, output_dtype)
    # DoRA: y = (1 + excess) * ((W + s B A) x) + bias, so the fused product leaves the bias to `rescale`.
    adapted = AdaptedWeight(weight, None, down.weight, up.weight, scale)
    excess = layer.lora_magnitude_vector[adapter].excess(base, down.weight, up.weight, scale)
    return _Fused(adapted, active_dropout, compute_dtype, output_dtype, excess, base.bias)


def _sole_adapter(layer: LoraLinear) -> str | None:
    """Returns the adapter to apply; None for no adapter, several, or any kind other than LoRA and DoRA."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.lora_bias[active[0]]:
        return None
    if not isinstance(layer.lora_variant.get(active[0]), Dora | None):
        return None
    return active[0]


def _is_bare(module: nn.Module) -> bool:
    """Tests that the module has no hooks and no replaced forward, so that bypassing its call changes nothing.

    accelerate's offloading replaces `forward` on the instance.
    """
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _apply(x: Tensor, layers: Sequence[_Fused]) -> tuple[Tensor, ...]:
    """Computes the outputs (..., out) of x (..., in) for layers with equal compute dtype and dropout."""
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
    """Returns the layer's operands in a `LinearGroup` that computes in x's dtype.

    Returns None if the layer cannot be computed that way and must be called instead.
    """
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
