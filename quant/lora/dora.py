"""DoRA on a frozen base: the norm of each row of the adapted weight is a trained parameter, the magnitude.

With the magnitudes m (out,) and the scale s:

    y = (m / |W + s B A|) * ((W + s B A) x) + bias

|.| is the norm of each row; the backward treats it as a constant (Liu et al. 2024, section 4.3). Training
starts at m = |W|.

To compute the norms, PEFT materializes W + s B A: it dequantizes W with bitsandbytes, and multiplies B A out
through an identity matrix of the layer's width. This module materializes neither. For a row w of W and the
matching row b of B:

    |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T

The first term never changes, so it is a buffer. The second takes one product of W with the few rows of A, and
the third only matrices of the size of the adapter. PEFT still owns names, files and merging.
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
    """Holds the magnitudes, `weight` (out,), and the base's squared row norms, `base_squares` (out,) fp32."""

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
        """Implements PEFT's hook for a new adapter: sets magnitudes that do not change the layer's output."""
        squares = _dense(base_layer).detach().float().square().sum(1)
        # Computed from the base, so it is not saved. As a buffer it moves to the layer's device.
        self.register_buffer("base_squares", squares, persistent=False)
        magnitude = self._row_norms(base_layer, lora_A, lora_B, scaling)
        self.weight = nn.Parameter(magnitude, requires_grad=True)

    def excess(self, base: nn.Module, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """Computes m / |W + s B A| - 1, (out,) fp32.

        The ratio itself is close to 1, where bf16 has a spacing of 2^-7. Its excess over 1 is small, so
        rounding that to bf16 costs little.
        """
        return self.weight.float() / self._row_norms(base, down, up, scale) - 1

    @torch.no_grad()
    def _row_norms(self, base: nn.Module, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """Computes |W + s B A|, (out,) fp32, with the module's formula."""
        down, up = down.float(), up.float()
        base_product = _times_base(base, down).float()  # A W^T (rank, out)
        with without_autocast(down.device.type):
            cross = (up * base_product.t()).sum(1)  # b (A w) for each row
            adapter_squares = ((up @ (down @ down.t())) * up).sum(1)  # b (A A^T) b^T for each row
            squares = self.base_squares + 2 * scale * cross + scale**2 * adapter_squares
        # Rounding can make the sum of a row near zero negative, and `excess` divides by the norm.
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()


@torch.no_grad()
def reset_magnitudes(model: nn.Module, adapter: str) -> None:
    """Sets the magnitudes to the row norms of the adapted weights.

    For an adapter that does not start at zero: DoRA then starts with the output of the plain LoRA adapter.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_magnitude_vector:
            layer: Any = module
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            magnitudes = layer.lora_magnitude_vector[adapter]
            scale = layer.scaling[adapter]
            # excess = m / norm - 1, so the norm is m / (1 + excess).
            magnitudes.weight.div_(1 + magnitudes.excess(layer.get_base_layer(), down, up, scale))


class Dora(DoraLinearVariant):
    """PEFT's DoRA variant, with `RowMagnitudes` in place of PEFT's magnitude layer."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Implements PEFT's hook for a new adapter."""
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
        """Implements PEFT's hook for a base and adapter that are not fused.

        `result` (..., out) is the base's output. Dropout applies to the input of A. Unlike in PEFT, it does
        not apply to the input of the rescaled base.
        """
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scale = module.scaling[active_adapter]
        base = module.get_base_layer()
        excess = module.lora_magnitude_vector[active_adapter].excess(base, down.weight, up.weight, scale)
        update = up(down(module.lora_dropout[active_adapter](x))) * scale
        adapted = result + update
        # The magnitude rescales (W + s B A) x only, and `result` includes the bias.
        direction = adapted if base.bias is None else adapted - base.bias
        return adapted + direction * excess.to(adapted.dtype)


def rescale(directions: Tensor, excess: Tensor, bias: Tensor | None) -> Tensor:
    """Computes (1 + excess) * directions + bias in directions' dtype.

    directions is (M, out); excess and bias are (out,).
    """
    excess = excess.to(directions.dtype)
    if bias is None:
        return torch.addcmul(directions, directions, excess)
    # bias + directions * excess is summed first: the term that is rounded twice is then smaller than the
    # result.
    return directions + torch.addcmul(bias.to(directions.dtype), directions, excess)


def _times_base(base: nn.Module, rows: Tensor) -> Tensor:
    """Computes rows W^T (R, out) from rows (R, in) fp32, in the dtype that the base computes in."""
    if isinstance(base, Linear4bit):
        autocast = autocast_dtype(rows.device.type)
        dtype = base.compute_dtype if autocast is None else autocast
        return linear_ops.linear_4bit(rows.to(dtype), base.packed_weight(), None)
    weight = _dense(base)
    return rows.to(weight.dtype) @ weight.t()


def _dense(base: nn.Module) -> Tensor:
    """Returns the weight (out, in) of a linear layer, dequantized where it is packed."""
    layer: Any = base
    return layer.dequantize() if hasattr(base, "dequantize") else layer.weight
