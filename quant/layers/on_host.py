"""Keeps the weights of quantized layers in host memory, even when the model is moved to another device.

The host copy lives as long as the layer. `BlockStream` copies a block's weights to the device, points the
`data` of the layer's tensors to that copy while it exists, and points it back afterwards. Such a layer
therefore has its own tensor objects, which it shares with no other layer.
"""

from torch import Tensor

from halfbyte.quant.layers.quantized_layer import QuantizedLayer


def hold_on_host(layer: QuantizedLayer) -> None:
    """Moves the weight and its statistics to the host; `to` and similar methods then leave them there."""
    weight, statistics = layer.weight, layer.weight.statistics
    # Layers share their tables. Each layer gets its own tensor objects, because pointing a shared one to a
    # device copy would move the other layers' tables too.
    own = _own(statistics) if isinstance(statistics, Tensor) else statistics.map(_own)
    layer.weight = weight.make(_own(weight.data), False, own)
    layer.on_host = True


def held_tensors(layer: QuantizedLayer) -> list[Tensor]:
    """Returns the codes and all tensors of the statistics."""
    statistics = layer.weight.statistics
    tensors = [statistics] if isinstance(statistics, Tensor) else statistics.tensors
    return [layer.weight, *tensors]


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu")
