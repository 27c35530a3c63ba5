"""Calibrated rounding (GPTQ): rounds a 4-bit model's weights to minimize the error of each layer's output.

Rounding to the nearest code minimizes the error of the weight. Calibration minimizes the error of the output

    sum over x of |(W - W_q) x|^2  =  trace((W - W_q) H (W - W_q)^T)        with H = sum over x of x x^T

The quantized model runs over the user's own data, and hooks accumulate the second moment H (K, K) of each
layer's inputs. Then each weight is rounded again for its H, from full precision, with the scales that it
already has. File format and speed do not change. Layers in which blocks cross the ends of rows (K is not a
multiple of the block size) are not calibrated.
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
"""Reads a layer's weight (N, K) in full precision, by the layer's path."""


@dataclass(frozen=True)
class LayerFit:
    """The error of a layer's output over the calibration inputs, before and after calibration.

    Errors are relative RMS errors against the output in full precision.
    """

    path: str
    inputs: int  # input rows that reached the layer
    before: float  # with the weight rounded to the nearest code
    after: float  # with calibrated rounding; equal to `before` if calibration did not reduce the error


@torch.no_grad()
def calibrate(
    model: nn.Module,
    weights: ReadWeight,
    forwards: Sequence[Callable[[], None]],
    *,
    moment_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerFit]:
    """Rounds the 4-bit layers of `model` again, in place, for the inputs that `forwards` produce.

    Returns one LayerFit for each layer that received input; the other layers keep their codes.

    forwards: each call sends part of the data through the model.
    moment_bytes: limit on the second moments in memory at one time, 4 K^2 bytes for each layer. Layers are
    processed in windows that fit the limit, at least one layer to a window, and every window calls all of
    `forwards`.
    progress: called with (steps done, total steps); each forward call is a step, and so is each layer.

    Raises ValueError, naming the layer, for inputs that are not finite.
    """
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, Linear4bit) and layer.in_features % layer.spec.blocksize == 0
    }
    # Later windows see inputs that come through the layers calibrated in earlier ones.
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
        with _accumulated_moments({path: layers[path] for path in paths}) as moments:
            for forward in forwards:
                forward()
                step()
        for path in paths:
            # A moment (K, K) in fp32 can be larger than the layer's weight, so it is freed after its use.
            moment = moments.pop(path)
            if moment.inputs:
                fits.append(_round_layer(path, layers[path], weights(path), moment))
            del moment
            step()
    return fits


class _Moment:
    """Accumulates H, the sum of x x^T over the inputs of a layer, (K, K) fp32."""

    def __init__(self, layer: Linear4bit) -> None:
        self.inputs = 0
        self._sum: Tensor | None = None
        self._layer = layer

    def add(self, x: Tensor) -> None:
        """Adds x x^T for every row of x (..., K)."""
        # The layer multiplies x in its compute dtype, so H describes x in that dtype.
        rows = x.detach().reshape(-1, x.shape[-1]).to(self._layer.compute_dtype)
        # Most of the arithmetic of a full-size calibration: 135 TFLOP for a FLUX step's layers at 1024 px.
        # 16-bit rows are multiplied at their own speed, and the sum is not rounded to 16 bits.
        added = product_in_fp32(rows.t(), rows)
        self._sum = added if self._sum is None else self._sum.add_(added)
        self.inputs += len(rows)

    @property
    def sum(self) -> Tensor:
        """Returns H over the rows added so far; at least one `add` must have been called."""
        assert self._sum is not None
        return self._sum


def _windows(layers: Mapping[str, Linear4bit], moment_bytes: int) -> Iterator[Sequence[str]]:
    """Yields windows of paths whose moments fit `moment_bytes` together, with at least one path each."""
    window: list[str] = []
    window_bytes = 0
    for path, layer in layers.items():
        needed = 4 * layer.in_features**2  # fp32 (K, K)
        if window and window_bytes + needed > moment_bytes:
            yield window
            window, window_bytes = [], 0
        window.append(path)
        window_bytes += needed
    if window:
        yield window


@contextmanager
def _accumulated_moments(layers: Mapping[str, Linear4bit]) -> Iterator[dict[str, _Moment]]:
    """Hooks the layers for the duration of the block; adds each layer's inputs to its moment."""
    moments = {path: _Moment(layer) for path, layer in layers.items()}
    with ExitStack() as stack:
        for path, layer in layers.items():

            def add_input(
                _: nn.Module, arguments: tuple[Tensor, ...], moment: _Moment = moments[path]
            ) -> None:
                moment.add(arguments[0])

            stack.callback(layer.register_forward_pre_hook(add_input).remove)
        yield moments


def _round_layer(path: str, layer: Linear4bit, weight: Tensor, moment: _Moment) -> LayerFit:
    """Rounds the weight (N, K) for `moment`; the layer keeps its codes if that does not reduce the error."""
    state = layer.weight.quant_state
    assert state is not None
    weight = weight.to(layer.weight.device)
    scale = _scales(state)
    try:
        packed = round_calibrated(weight, moment.sum, scale, state.quant_type, state.blocksize)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    norm = output_error(weight, moment.sum)  # sum of |W x|^2

    def relative_error() -> float:
        """Computes sqrt(sum of |(W - W_q) x|^2 / sum of |W x|^2) for the codes that the layer has now."""
        delta = weight.float() - layer.dequantize(torch.float32)
        # Rounding in fp32 can make a sum of squares near zero negative.
        return (output_error(delta, moment.sum) / norm).clamp_(min=0).sqrt().item() if norm > 0 else 0.0

    before, nearest = relative_error(), layer.weight
    # The state (scales and tables) is shared by the old and the new codes.
    layer.weight = Params4bit(packed, quant_state=state)
    after = relative_error()
    if after >= before:
        layer.weight, after = nearest, before
    return LayerFit(path, moment.inputs, before, after)


def _scales(state: QuantState) -> Tensor:
    """Returns the scales of the b blocks, (b,) fp32, as the kernels read them."""
    nested = state.nested
    if nested is None:
        return state.absmax
    return reference.dequantize_absmax(
        state.absmax, nested.absmax, nested.offset, nested.code, nested.blocksize
    )
