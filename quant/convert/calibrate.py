"""Round a 4-bit model's weights by what its layers see, so that the outputs come out right rather than the weights.

The model runs over a user's own data in 4 bits, while second moments of the layers' inputs are gathered; then each
weight is rounded anew for those, from its full precision, with the scales it has. Files and speed are those of any
other 4-bit model. Layers whose blocks go over the ends of rows stay as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.kernels.fp32_product import product_in_fp32
from halfbyte.kernels.quantize_4bit import reference
from halfbyte.kernels.quantize_4bit.gptq import output_error, round_calibrated
from halfbyte.quant.formats.nf4 import QuantState
from halfbyte.quant.layers.linear4bit import Linear4bit, Params4bit

ReadWeight = Callable[[str], Tensor]
"""A layer's weight (N, K) in full precision, by the layer's path."""


@dataclass(frozen=True)
class LayerFit:
    """How near a layer comes to its output in full precision, over the calibrating inputs."""

    path: str
    inputs: int  # rows that the layer saw
    before: float  # relative RMS error of the output, rounded to the nearest
    after: float  # the same now; as before where it was left alone


@torch.no_grad()
def calibrate(
    model: nn.Module,
    weights: ReadWeight,
    forwards: Sequence[Callable[[], None]],
    *,
    moment_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerFit]:
    """Rounds the 4-bit layers of `model` anew, in place, for the inputs that `forwards` give them; a Fit for each.

    forwards: each sends some of the data through the model; all are called as often as it takes to hold no more than
    `moment_bytes` of second moments at a time, though at least one layer's, 4 K^2 bytes. Layers that get no input keep
    their codes and have no Fit. progress: called with (steps done, steps in all), of which each forward is one, and
    each layer. Raises ValueError, naming the layer, for inputs that are not finite.
    """
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, Linear4bit) and layer.in_features % layer.spec.blocksize == 0
    }
    windows = list(_windows(layers, moment_bytes))
    total = len(windows) * len(forwards) + len(layers)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    fits: list[LayerFit] = []
    for paths in windows:
        with _watched({path: layers[path] for path in paths}) as seen:
            for forward in forwards:
                forward()
                step()
        for path in paths:
            moment = seen.pop(path)
            if moment.inputs:
                fits.append(_refit(path, layers[path], weights(path), moment))
            del moment  # as large as the layer's weight, or larger
            step()
    return fits


class _Moment:
    """The sum of x x^T over the inputs of a layer, (K, K) fp32."""

    def __init__(self, layer: Linear4bit) -> None:
        self.inputs = 0
        self._sum: Tensor | None = None
        self._layer = layer

    def add(self, x: Tensor) -> None:
        """x: (..., K)."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(self._layer.compute_dtype)
        # Most of a calibration's arithmetic at full size: 135 TFLOP for a FLUX step's layers at 1024 px.
        added = product_in_fp32(rows.t(), rows)
        self._sum = added if self._sum is None else self._sum.add_(added)
        self.inputs += len(rows)

    @property
    def sum(self) -> Tensor:
        """What has been added so far."""
        assert self._sum is not None
        return self._sum


def _windows(layers: Mapping[str, Linear4bit], moment_bytes: int) -> Iterator[Sequence[str]]:
    """The paths in the model's order, as many at a time as there is room for."""
    window: list[str] = []
    held = 0
    for path, layer in layers.items():
        needed = 4 * layer.in_features**2
        if window and held + needed > moment_bytes:
            yield window
            window, held = [], 0
        window.append(path)
        held += needed
    if window:
        yield window


@contextmanager
def _watched(layers: Mapping[str, Linear4bit]) -> Iterator[dict[str, _Moment]]:
    """Within it, whatever comes to the layers is added to the moments."""
    seen = {path: _Moment(layer) for path, layer in layers.items()}
    with ExitStack() as stack:
        for path, layer in layers.items():

            def watch(_: nn.Module, arguments: tuple[Tensor, ...], moment: _Moment = seen[path]) -> None:
                moment.add(arguments[0])

            stack.callback(layer.register_forward_pre_hook(watch).remove)
        yield seen


def _refit(path: str, layer: Linear4bit, weight: Tensor, moment: _Moment) -> LayerFit:
    state = layer.weight.quant_state
    assert state is not None
    weight = weight.to(layer.weight.device)
    scale = _scales(state)
    try:
        packed = round_calibrated(weight, moment.sum, scale, state.quant_type, state.blocksize)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    whole = output_error(weight, moment.sum)

    def relative() -> float:
        missing = weight.float() - layer.dequantize(torch.float32)
        return (output_error(missing, moment.sum) / whole).clamp_(min=0).sqrt().item() if whole > 0 else 0.0

    before, plain = relative(), layer.weight
    layer.weight = Params4bit(packed, quant_state=state)
    after = relative()
    if after >= before:
        layer.weight, after = plain, before
    return LayerFit(path, moment.inputs, before, after)


def _scales(state: QuantState) -> Tensor:
    """(b,) fp32, as the kernels read them."""
    nested = state.nested
    if nested is None:
        return state.absmax
    return reference.dequantize_absmax(
        state.absmax, nested.absmax, nested.offset, nested.code, nested.blocksize
    )
