"""DoRA over a frozen base: the length of each row of the adapted weight is a parameter of its own.

With m the magnitudes and s the scale, y = (m / |W + s B A|) * ((W + s B A) x) + bias, where |.| is the length of a
row and a constant in the backward (Liu et al. 2024, section 4.3). At the start m = |W|. PEFT adds W and B A to
take the lengths, for which it unpacks W by bitsandbytes and multiplies B A out through a unit matrix of the layer's
width. Here neither is made:

    |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T        for a row w of W and the row b of B

The first term never changes, the second is one product of W with the few rows of A. Names, files and merging are
PEFT's.
"""

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from halfbyte.kernels.linear_4bit import ops as linear_ops
from halfbyte.quant.layers.autocast import autocast_dtype, without_autocast
from halfbyte.quant.layers.linear4bit import Linear4bit


class RowMagnitudes(DoraLinearLayer):
    """The magnitudes, `weight` (out,), and the base's squared row lengths, `base_squares` (out,) fp32."""

    base_squares: Tensor

    def update_layer(
        self,
        *,
        base_layer: nn.Module,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        place_on_cpu: bool = False,
    ) -> None:
        """PEFT's hook for a new adapter: magnitudes that leave the layer as it is."""
        squares = _dense(base_layer).detach().float().square().sum(1)
        # Follows from the base: it moves with the layer and is in no file.
        self.register_buffer("base_squares", squares, persistent=False)
        lengths = self._lengths(base_layer, lora_A, lora_B, scaling)
        self.weight = nn.Parameter(lengths, requires_grad=True)

    def excess(self, base: nn.Module, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """m / |W + s B A| - 1, (out,) fp32: small, so that rounding it to bf16 costs little."""
        return self.weight.float() / self._lengths(base, down, up, scale) - 1

    @torch.no_grad()
    def _lengths(self, base: nn.Module, down: Tensor, up: Tensor, scale: float) -> Tensor:
        down, up = down.float(), up.float()
        seen = _times_base(base, down).float()  # A W^T (rank, out)
        with without_autocast(down.device.type):
            inner = (up * seen.t()).sum(1)
            own = ((up @ (down @ down.t())) * up).sum(1)
            squares = self.base_squares + 2 * scale * inner + scale**2 * own
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


@torch.no_grad()
def keep_lengths(model: nn.Module, adapter: str) -> None:
    """Sets the magnitudes to the lengths that the adapted rows have: for adapters that do not start at zero."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_magnitude_vector:
            layer: Any = module
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            magnitudes = layer.lora_magnitude_vector[adapter]
            scale = layer.scaling[adapter]
            # m / length - 1 is the excess, and so the length m / (1 + excess).
            magnitudes.weight.div_(1 + magnitudes.excess(layer.get_base_layer(), down, up, scale))


class Dora(DoraLinearVariant):
    """PEFT's DoRA with `RowMagnitudes` in place of its own layer."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """PEFT's hook for a new adapter."""
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        magnitudes = RowMagnitudes(fan_in_fan_out=False)
        magnitudes.update_layer(
            base_layer=module.get_base_layer(),
            lora_A=module.lora_A[adapter_name].weight,
            lora_B=module.lora_B[adapter_name].weight,
            scaling=module.scaling[adapter_name],
        )
        module.lora_magnitude_vector[adapter_name] = magnitudes

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's hook where base and adapter are not fused: result (..., out) is the base's output.

        Dropout thins what A sees and, unlike in PEFT, not what the rescaled base sees.
        """
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scale = module.scaling[active_adapter]
        base = module.get_base_layer()
        excess = module.lora_magnitude_vector[active_adapter].excess(base, down.weight, up.weight, scale)
        update = up(down(module.lora_dropout[active_adapter](x))) * scale
        adapted = result + update
        direction = adapted if base.bias is None else adapted - base.bias
        return adapted + direction * excess.to(adapted.dtype)


def rescale(directions: Tensor, excess: Tensor, bias: Tensor | None) -> Tensor:
    """(1 + excess) * directions + bias in directions' dtype; directions (M, out), excess and bias (out,)."""
    excess = excess.to(directions.dtype)
    if bias is None:
        return torch.addcmul(directions, directions, excess)
    # The small terms first: what is rounded twice is then not of the result's size.
    return directions + torch.addcmul(bias.to(directions.dtype), directions, excess)


def _times_base(base: nn.Module, rows: Tensor) -> Tensor:
    """rows (R, in) fp32 times the base's weight: (R, out), in the precision that the base computes in."""
    if isinstance(base, Linear4bit):
        autocast = autocast_dtype(rows.device.type)
        dtype = base.compute_dtype if autocast is None else autocast
        return linear_ops.linear_4bit(rows.to(dtype), base.packed_weight(), None)
    weight = _dense(base)
    return rows.to(weight.dtype) @ weight.t()


def _dense(base: nn.Module) -> Tensor:
    """The weight (out, in) of a linear layer, unpacked where it is packed."""
    layer: Any = base
    return layer.dequantize() if hasattr(base, "dequantize") else layer.weight
