"""Quantized layers whose weights stay in the host's memory, whatever device the model around them is moved to.

They are held there for good, and pointed to a copy on the device for as long as one is there (`BlockStream`): the
tensors of such a layer are objects of its own, whose `data` may be changed in place of the objects.
"""

from torch import Tensor

from halfbyte.quant.layers.quantized_layer import QuantizedLayer


def hold_on_host(layer: QuantizedLayer) -> None:
    """Brings the weight with its statistics to the host; from now on `to` and its like leave them where they are."""
    weight, statistics = layer.weight, layer.weight.statistics
    # Layers share the tables of their codes, and whoever points one layer elsewhere must not move the others.
    own = _own(statistics) if isinstance(statistics, Tensor) else statistics.map(_own)
    layer.weight = weight.make(_own(weight.data), False, own)
    layer.on_host = True


def held_tensors(layer: QuantizedLayer) -> list[Tensor]:
    """The codes, and all that it takes to read them."""
    statistics = layer.weight.statistics
    beside = [statistics] if isinstance(statistics, Tensor) else statistics.tensors
    return [layer.weight, *beside]


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu")
