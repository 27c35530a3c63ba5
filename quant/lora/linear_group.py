"""Computes linear layers that share an input, and their adapters, with one matrix product in each direction.

Layer i has the weight W_i (N_i, K), the bias b_i and the adapter s_i B_i A_i:

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T

Stack W_i into W (N, K) and A_i into A (r, K), and put s_i B_i on the diagonal of a block-diagonal B (N, r).
With u = x A^T (M, r), all layers together are one product:

    y = [x, u] [W, B]^T + b

The adapters only add r columns to the inner dimension, and no output is read back to be added to. The
backward has the same form. With the gradients g (M, N) of y and p = g B (M, r):

    dx = [g, p] [W; A]      dA = p^T x      dB_i = s_i g_i^T u_i

`widened` allocates x and u in one buffer, and g and p in another, so that [x, u] and [g, p] need no copy.

The methods are plain functions over matrices without autograd. The transformer blocks that are autograd
functions as a whole (`trainer.families`) call them in both passes. The backward takes x and u as separate
matrices: a block keeps the small u from the forward and recomputes x.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.kernels.fp32_product import product_in_fp32
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight
from halfbyte.kernels.stacked.ops import stack_downs, stack_ups, stack_weight, stackable

# Rows of the stacked matrices start at multiples of this many values, which the matrix units of a GPU
# require.
_ALIGNMENT = 8


@dataclass(frozen=True, eq=False)
class GroupLayer:
    """One frozen layer of a group, with or without an adapter."""

    weight: Tensor | PackedWeight  # (N, K)
    bias: Tensor | None  # (N,)
    down: Tensor | None  # A (rank, K); None without an adapter
    up: Tensor | None  # B (N, rank); None without an adapter
    scale: float  # s, which multiplies B A

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]

    def scaled(self, grad: Tensor) -> Tensor:
        """Multiplies g^T u (N, rank) by the adapter's scale, which gives dB; contiguous."""
        return grad.contiguous() if self.scale == 1 else grad * self.scale


@dataclass(frozen=True, eq=False)
class LinearGroup:
    """Layers with a common input width K, in the order of their outputs."""

    layers: Sequence[GroupLayer]

    @property
    def width(self) -> int:
        """The input width K."""
        return int(self.layers[0].weight.shape[1])

    @property
    def outputs(self) -> int:
        """The outputs N of all layers together."""
        return sum(layer.outputs for layer in self.layers)

    @property
    def extra(self) -> int:
        """The columns that the adapters add to x and to g: the sum of their ranks, rounded up to 8."""
        ranks = sum(layer.rank for layer in self.layers)
        return -(-ranks // _ALIGNMENT) * _ALIGNMENT

    def widened(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Allocates (rows, columns + extra) without initializing it.

        columns is `width` for a buffer of [x, u], and `outputs` for a buffer of [g, p].
        """
        return like.new_empty((rows, columns + self.extra))

    def lift(self, x: Tensor) -> None:
        """Computes u = x A^T from the first K columns of x (M, K + extra) into the other columns."""
        if self.extra:
            _clear_adjacent_columns(x[:, self.width :])
            _matmul(x[:, : self.width], self._down(x).t(), x[:, self.width :])

    def forward(self, x: Tensor) -> Tensor:
        """Computes y (M, N) in x's dtype; x (M, K + extra) holds the input in its first K columns.

        Writes u into the other columns of x.
        """
        self.lift(x)
        if self._stackable:
            # [W, B], (N, K + extra). It holds every weight of the group dequantized, and lives for this
            # product only.
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
        """Returns u (M, extra) as a view of an x (M, K + extra) that `forward` or `lift` has filled."""
        return x[:, self.width :]

    def lower(self, grad: Tensor) -> Tensor:
        """Computes p = g B from the first N columns of grad (M, N + extra) into the other columns.

        Returns p as a view (M, extra).
        """
        p = grad[:, self.outputs :]
        if self.extra:
            _clear_adjacent_columns(p)
            upstream = grad[:, : self.outputs]
            torch.mm(upstream, self._up(upstream), out=p)
        return p

    def gradients(
        self, grad: Tensor, x: Tensor, u: Tensor, *, wants_input: bool, known: Sequence[Tensor | None] = ()
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
        """Computes dx (M, K), each layer's dA and each layer's dB, the last two in fp32.

        grad (M, N + extra) holds the outputs' gradients in its first N columns; p is written into the others.
        x is (M, K) and u is (M, extra). `known` holds dB of the last layers where the caller already has it.
        dx is None unless `wants_input`; a layer without an adapter has None for dA and dB.
        """
        p = self.lower(grad)
        # dA of all layers in one product: p^T x (extra, K), not rounded to the compute dtype.
        downs = self.down_gradients(product_in_fp32(p.t(), x) if self.extra else p)
        # The layers in `known` are the last ones, so their outputs are the last columns.
        outputs = sum(layer.outputs for layer in self.layers[: len(self.layers) - len(known)])
        ups = [*self.up_gradients(grad[:, :outputs], u), *known]
        return self.input_gradient(grad) if wants_input else None, downs, ups

    def down_gradients(self, whole: Tensor) -> list[Tensor | None]:
        """Splits p^T x (extra, K) into each layer's dA (rank, K); None where a layer has no adapter."""
        downs: list[Tensor | None] = []
        first = 0
        for layer in self.layers:
            downs.append(whole[first : first + layer.rank] if layer.rank else None)
            first += layer.rank
        return downs

    def up_gradients(self, upstream: Tensor, u: Tensor) -> list[Tensor | None]:
        """Computes dB_i = s_i g_i^T u_i in fp32 for the first layers, as many as `upstream` covers.

        upstream (M, n) holds the gradients of the outputs of these layers, n <= N; u is (M, extra).
        """
        # One product g^T u (n, extra) for all layers, of which only the diagonal blocks g_i^T u_i are used.
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
        """Computes dx (M, K) from grad (M, N + extra), whose last columns `lower` has filled with p."""
        if not self._stackable:
            # dx = p A + sum over i of g_i W_i. Each dequantized W_i lives for its own product only.
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
        # [W; A], (N + extra, K): as in `forward`, it lives for this product only.
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
        """Computes y layer by layer, where Triton is missing or a weight is not packed.

        Copying an unpacked weight into the stack would cost what stacking saves.
        """
        y = x.new_empty((x.shape[0], self.outputs))
        row, first = 0, self.width
        for layer in self.layers:
            part = y[:, row : row + layer.outputs]
            inner, weight = x[:, : self.width], self._weight(layer, x.dtype).t()
            if layer.up is not None:
                # The adapter's product goes first. addmm_ adds the base's product to it in fp32 and rounds
                # the sum once, so only the smaller term is rounded twice; see `low_rank`.
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
        """Stacks all A into (extra, K) in like's dtype; the rows after the ranks are zero."""
        stacked = like.new_empty((self.extra, self.width))
        stack_downs(stacked, self._downs)
        return stacked

    def _up(self, like: Tensor) -> Tensor:
        """Lays out all s_i B_i as the block-diagonal B (N, extra) in like's dtype; all else is zero."""
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


def _clear_adjacent_columns(columns: Tensor) -> None:
    """Zeros uninitialized columns next to the operand of a product, on the CPU.

    oneDNN's bf16 kernel for AMX rounds K up to a multiple of 32 and multiplies the values after the operand's
    last column by zero. An uninitialized NaN there makes the product NaN (torch 2.13; K = 100 in rows of
    108).
    """
    if columns.device.type == "cpu":
        columns.zero_()


def _affine(left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes left @ right + bias into `out`."""
    if bias is None:
        _matmul(left, right, out)
    elif torch.compiler.is_compiling():
        out.copy_(torch.addmm(bias.to(left.dtype), left, right))
    else:
        torch.addmm(bias.to(left.dtype), left, right, out=out)


def _matmul(left: Tensor, right: Tensor, out: Tensor) -> None:
    # Dynamo does not accept a slice as `out`.
    if torch.compiler.is_compiling():
        out.copy_(left @ right)
    else:
        torch.mm(left, right, out=out)


def _scaled(layer: GroupLayer, dtype: torch.dtype) -> Tensor:
    """Computes s B (N, rank); the scale is applied in fp32, before the rounding to `dtype`."""
    assert layer.up is not None
    return (layer.up if layer.scale == 1 else layer.up.float() * layer.scale).to(dtype)
