"""Layers that share an input, with their adapters, as one product each way.

For layers i with weights W_i (N_i, K), biases b_i and adapters s_i B_i A_i,

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T

is the i-th part of [x, u] [W, B]^T + b, with u = x A^T of all A stacked, W stacked, and B the s_i B_i on a diagonal
of blocks: the adapters lengthen the sum by their ranks, and nothing is read back to be added to. In the same way

    dx = [g, p] [W; A]    with p = g B,    dA = p^T x,    dB_i = s_i g_i^T u_i.

These are plain functions over matrices; the blocks that are autograd functions as a whole (`trainer.families`) call
them in both passes. x and u lie side by side in one matrix, and so do g and p: `widened` makes room for them. Of x
and u the backward reads each by itself, so that u, which is small, can be kept where x is made anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.kernels.fp32_product import product_in_fp32
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight
from halfbyte.kernels.stacked.ops import stack_downs, stack_ups, stack_weight, stackable

# Rows of the stacked matrices start at multiples of this many values, as the matrix units of a GPU want them.
_ALIGNMENT = 8


@dataclass(frozen=True, eq=False)
class GroupLayer:
    """One frozen layer of a group; A (rank, K) and B (N, rank) are None where it has no adapter."""

    weight: Tensor | PackedWeight  # (N, K)
    bias: Tensor | None  # (N,)
    down: Tensor | None
    up: Tensor | None
    scale: float  # of the update

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]

    def scaled(self, grad: Tensor) -> Tensor:
        """dB (N, rank), contiguous, from the product that has not been scaled."""
        return grad.contiguous() if self.scale == 1 else grad * self.scale


@dataclass(frozen=True, eq=False)
class LinearGroup:
    """Layers of one width, in the order of their outputs."""

    layers: Sequence[GroupLayer]

    @property
    def width(self) -> int:
        """K."""
        return int(self.layers[0].weight.shape[1])

    @property
    def outputs(self) -> int:
        """N, of all layers."""
        return sum(layer.outputs for layer in self.layers)

    @property
    def extra(self) -> int:
        """Columns that the adapters add to x and to the gradients: their ranks, rounded up."""
        ranks = sum(layer.rank for layer in self.layers)
        return -(-ranks // _ALIGNMENT) * _ALIGNMENT

    def widened(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """(rows, columns + extra), uninitialized: room for x (columns = width) or for the gradients (= outputs)."""
        return like.new_empty((rows, columns + self.extra))

    def lift(self, x: Tensor) -> None:
        """Fills the last columns of x (M, K + extra) with u."""
        if self.extra:
            _make_finite(x[:, self.width :])
            _matmul(x[:, : self.width], self._down(x).t(), x[:, self.width :])

    def forward(self, x: Tensor) -> Tensor:
        """x (M, K + extra), whose last columns are filled here with u -> (M, N) in x's dtype."""
        self.lift(x)
        if self._stackable:
            stacked = x.new_empty((self.outputs, self.width + self.extra))
            row = first = 0
            for layer in self.layers:
                assert isinstance(layer.weight, PackedWeight)
                rows = stacked[row : row + layer.outputs]
                stack_weight(rows, layer.weight, layer.up, layer.scale, first, self.extra)
                row, first = row + layer.outputs, first + layer.rank
            return nn.functional.linear(x, stacked, self._bias(x))
        return self._one_by_one(x)

    def xa(self, x: Tensor) -> Tensor:
        """u (M, extra) of an x (M, K + extra) that `forward` has seen, a view."""
        return x[:, self.width :]

    def lower(self, grad: Tensor) -> Tensor:
        """Fills the last columns of grad (M, N + extra) with p, which is returned as a view (M, extra)."""
        p = grad[:, self.outputs :]
        if self.extra:
            _make_finite(p)
            upstream = grad[:, : self.outputs]
            torch.mm(upstream, self._up(upstream), out=p)
        return p

    def gradients(
        self, grad: Tensor, x: Tensor, u: Tensor, *, wants_input: bool, known: Sequence[Tensor | None] = ()
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
        """dx (M, K), and the fp32 gradients of each A and B.

        grad (M, N + extra) has the gradients in its first columns, the rest is filled here; x (M, K) and u (M, extra).
        known: dB of the last layers, where it was made elsewhere.
        """
        p = self.lower(grad)
        downs = self.down_gradients(product_in_fp32(p.t(), x) if self.extra else p)
        outputs = sum(layer.outputs for layer in self.layers[: len(self.layers) - len(known)])
        ups = [*self.up_gradients(grad[:, :outputs], u), *known]
        return self.input_gradient(grad) if wants_input else None, downs, ups

    def down_gradients(self, whole: Tensor) -> list[Tensor | None]:
        """Each layer's dA of p^T x (extra, K)."""
        downs: list[Tensor | None] = []
        first = 0
        for layer in self.layers:
            downs.append(whole[first : first + layer.rank] if layer.rank else None)
            first += layer.rank
        return downs

    def up_gradients(self, upstream: Tensor, u: Tensor) -> list[Tensor | None]:
        """dB, fp32, of as many layers as upstream (M, <= N) has outputs of, from u (M, extra)."""
        whole = product_in_fp32(upstream.t(), u) if self.extra else None
        ups: list[Tensor | None] = []
        row = first = 0
        for layer in self.layers:
            if row == upstream.shape[1]:
                break
            if layer.rank and whole is not None:
                ups.append(layer.scaled(whole[row : row + layer.outputs, first : first + layer.rank]))
            else:
                ups.append(None)
            row, first = row + layer.outputs, first + layer.rank
        return ups

    def input_gradient(self, grad: Tensor) -> Tensor:
        """dx (M, K) of grad (M, N + extra), whose last columns `lower` has filled."""
        if not self._stackable:
            total = None
            if self.extra:
                total = grad[:, self.outputs :] @ self._down(grad)
            row = 0
            for layer in self.layers:
                part, weight = grad[:, row : row + layer.outputs], self._weight(layer, grad.dtype)
                total = part @ weight if total is None else total.addmm_(part, weight)
                row += layer.outputs
            assert total is not None
            return total
        stacked = grad.new_empty((self.outputs + self.extra, self.width))
        row = 0
        for layer in self.layers:
            assert isinstance(layer.weight, PackedWeight)
            stack_weight(stacked[row : row + layer.outputs], layer.weight, None, 1.0, 0, 0)
            row += layer.outputs
        if self.extra:
            stack_downs(stacked[row:], self._downs)
        return grad @ stacked

    def _one_by_one(self, x: Tensor) -> Tensor:
        """Without Triton, or over weights that are not packed: copying those would cost what stacking saves."""
        y = x.new_empty((x.shape[0], self.outputs))
        row, first = 0, self.width
        for layer in self.layers:
            part = y[:, row : row + layer.outputs]
            inner, weight = x[:, : self.width], self._weight(layer, x.dtype).t()
            if layer.up is not None:
                # The adapter's product first: the sum is formed in fp32 and rounded once, see `low_rank`.
                _affine(x[:, first : first + layer.rank], _scaled(layer, x.dtype).t(), layer.bias, part)
                part.addmm_(inner, weight)
            else:
                _affine(inner, weight, layer.bias, part)
            row, first = row + layer.outputs, first + layer.rank
        return y

    @property
    def _stackable(self) -> bool:
        return all(
            isinstance(layer.weight, PackedWeight) and stackable(layer.weight) for layer in self.layers
        )

    @staticmethod
    def _weight(layer: GroupLayer, dtype: torch.dtype) -> Tensor:
        weight = layer.weight
        return weight.dequantize(dtype) if isinstance(weight, PackedWeight) else weight.to(dtype)

    def _down(self, like: Tensor) -> Tensor:
        """All A in like's dtype, (extra, K); rows beyond the ranks are zero."""
        stacked = like.new_empty((self.extra, self.width))
        stack_downs(stacked, self._downs)
        return stacked

    def _up(self, like: Tensor) -> Tensor:
        """All s B as a diagonal of blocks, (N, extra)."""
        stacked = like.new_empty((self.outputs, self.extra))
        ups, starts, scales, row = [], [], [], 0
        for layer in self.layers:
            if layer.up is not None:
                ups.append(layer.up)
                starts.append(row)
                scales.append(layer.scale)
            row += layer.outputs
        stack_ups(stacked, ups, starts, scales)
        return stacked

    @property
    def _downs(self) -> list[Tensor]:
        return [layer.down for layer in self.layers if layer.down is not None]

    def _bias(self, x: Tensor) -> Tensor | None:
        if all(layer.bias is None for layer in self.layers):
            return None
        biases = [x.new_zeros(layer.outputs) if layer.bias is None else layer.bias for layer in self.layers]
        return (biases[0] if len(biases) == 1 else torch.cat(biases)).to(x.dtype)


def _make_finite(room: Tensor) -> None:
    """Clears columns behind those that a product reads, where it reads them too.

    oneDNN's bf16 kernel for AMX rounds K up to 32 and multiplies what lies there by zero: NaN, where that is NaN
    (torch 2.13; K = 100 of rows of 108).
    """
    if room.device.type == "cpu":
        room.zero_()


def _affine(left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        _matmul(left, right, out)
    elif torch.compiler.is_compiling():
        out.copy_(torch.addmm(bias.to(left.dtype), left, right))
    else:
        torch.addmm(bias.to(left.dtype), left, right, out=out)


def _matmul(left: Tensor, right: Tensor, out: Tensor) -> None:
    # Dynamo takes no slice for `out`.
    if torch.compiler.is_compiling():
        out.copy_(left @ right)
    else:
        torch.mm(left, right, out=out)


def _scaled(layer: GroupLayer, dtype: torch.dtype) -> Tensor:
    assert layer.up is not None
    return (layer.up if layer.scale == 1 else layer.up.float() * layer.scale).to(dtype)
