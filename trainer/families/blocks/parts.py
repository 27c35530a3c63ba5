"""Parts of the hand-written transformer blocks: buffers, kept activations and adapter gradients.

A block keeps as little of its forward as its `Keep` setting allows. Its backward recomputes the rest one
product at a time and never reruns the whole block, so it repeats only what a gradient depends on.

Names, for one `LinearGroup` (layers that share the input x, with LoRA factors A and B of scale s):

    xa = x A^T                      (M, extra)    "extra" is the sum of the ranks, rounded up
    y  = x W^T + b + s xa B^T       (M, N)
    gb = s g B                      (M, extra)    g = dL/dy
    dx = g W + gb A                 (M, K)
    dA = gb^T x                     (extra, K)
    dB = s g^T xa                   (N, rank)

M = B * S is the number of tokens in the batch. x and xa share one buffer (M, K + extra), and so do g and gb
(M, N + extra), so one product computes the layer and adds the adapter: y = [x, xa] [W, s B]^T + b, and
dx = [g, gb] [W; A].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels.copy_rows.ops import copy_rows
from halfbyte.kernels.fp32_product import product_in_fp32
from halfbyte.kernels.gelu.ops import gelu_tanh, gelu_tanh_gradients
from halfbyte.quant.lora.layers import group_layer
from halfbyte.quant.lora.linear_group import LinearGroup


def linear_group(layers: Sequence[nn.Module], x: Tensor) -> LinearGroup | None:
    """Returns the layers as one product over x, or None if one of them must be called as a module."""
    parts = [group_layer(layer, x) for layer in layers]
    whole = tuple(part for part in parts if part is not None)
    return LinearGroup(whole) if len(whole) == len(parts) else None


def adapters(groups: Sequence[LinearGroup]) -> list[Tensor | None]:
    """Returns A and B of every layer in order, the inputs whose gradients train the adapters."""
    return [part for group in groups for layer in group.layers for part in (layer.down, layer.up)]


@dataclass
class AdapterGradients:
    """Runs the backward of linear groups and collects dA and dB in the order of `adapters`."""

    groups: Sequence[LinearGroup]

    def __post_init__(self) -> None:
        # Gradients by id of their group, because a block's backward visits the groups from last to first.
        self._downs: dict[int, list[Tensor | None]] = {}  # dA of every layer
        self._ups: dict[int, list[Tensor | None]] = {}  # dB of every layer
        # dB of a group's last layer, where `gelu_backward` computed it.
        self._last_ups: dict[int, Tensor | None] = {}

    def linear_backward(
        self, group: LinearGroup, grad: Tensor, x: Tensor, xa: Tensor, *, wants_input: bool = True
    ) -> Tensor:
        """Computes the backward of a group and returns dx (M, K), or an empty tensor without `wants_input`.

        grad: (M, N + extra), dL/dy in its first N columns; the others are filled here with gb. x: (M, K).
        xa: (M, extra). If `gelu_backward` has already computed dB of the last layer, that value is used.
        """
        known = [self._last_ups[id(group)]] if id(group) in self._last_ups else []
        dx, downs, ups = group.gradients(grad, x, xa, wants_input=wants_input, known=known)
        self._downs[id(group)], self._ups[id(group)] = downs, ups
        return grad.new_empty(0) if dx is None else dx

    def reader_backward(self, group: LinearGroup, grad: Tensor, xa: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the backward of a group that reads gelu(hidden), except dA, which `gelu_backward` adds.

        grad: (M, N + extra) as in `linear_backward`. Returns dx (M, K) and gb (M, extra), a view of grad.
        """
        gb = group.lower(grad)  # must come before input_gradient, which reads the columns that it fills
        self._ups[id(group)] = group.up_gradients(grad[:, : group.outputs], xa)
        return group.input_gradient(grad), gb

    def gelu_backward(
        self,
        reader: LinearGroup,
        gb: Tensor,
        grad: Tensor,
        writer: LinearGroup,
        xa: Tensor,
        hidden: Tensor,
        room: Tensor,
        beside: Tensor | None = None,
    ) -> None:
        """Computes the backward of gelu(hidden) and the adapter gradients on both sides of it, in one pass.

        `writer` wrote hidden (M, H) with its last layer; `reader` reads gelu(hidden), after the columns
        `beside` (M, K - H) if its input starts with others. The pass computes

            dhidden   = grad * gelu'(hidden)        written into room (M, H)
            dA_reader = gb^T [beside, gelu(hidden)]
            dB_writer = s dhidden^T xa              of writer's last layer

        so gelu(hidden) is never stored. grad (M, H) is the gradient of gelu(hidden), gb the reader's and xa
        the writer's.
        """
        last = writer.layers[-1]
        # Column in xa where the last layer's rank begins.
        first = sum(layer.rank for layer in writer.layers[:-1])
        down, up = gelu_tanh_gradients(grad, hidden, gb, xa[:, first : first + last.rank], out=room)
        if beside is not None and reader.extra:
            down = torch.cat((product_in_fp32(gb.t(), beside), down), dim=1)
        self._downs[id(reader)] = reader.down_gradients(down)
        self._last_ups[id(writer)] = last.scaled(up) if last.rank else None

    def in_order(self) -> Iterator[Tensor | None]:
        """Yields dA and dB of every layer in the order of `adapters`."""
        for group in self.groups:
            for pair in zip(self._downs[id(group)], self._ups[id(group)], strict=True):
                yield from pair


def input_room(group: LinearGroup, like: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates a group's input buffer (B * S, K + extra), uninitialized, for a stream shaped (B, S, ...).

    Returns the buffer and its first K columns as a view (B, S, K). `LinearGroup.forward` fills the rest with
    xa.
    """
    return _room(group, group.width, like)


def gradient_room(group: LinearGroup, like: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates a group's gradient buffer (B * S, N + extra), uninitialized, for a stream shaped (B, S, ...).

    Returns the buffer and its first N columns as a view (B, S, N). `LinearGroup.lower` fills the rest with
    gb.
    """
    return _room(group, group.outputs, like)


def _room(group: LinearGroup, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens = like.shape[:2]
    wide = group.widened(batch * tokens, columns, like)
    return wide, wide.view(batch, tokens, -1)[..., :columns]


def widened(group: LinearGroup, stream: Tensor) -> Tensor:
    """Returns a group's input buffer (B * S, K + extra) with the stream (B, S, K) in its first columns."""
    wide, room = input_room(group, stream)
    copy_rows(stream, out=room)
    return wide


def gelu_input(group: LinearGroup, hidden: Tensor, first: int = 0) -> Tensor:
    """Returns a group's input buffer (M, K + extra) with gelu(hidden) (M, H) in the columns from `first` on.

    The caller fills the columns before `first`.
    """
    wide = group.widened(hidden.shape[0], group.width, hidden)
    gelu_tanh(hidden[None], out=wide[None, :, first : group.width])
    return wide


def copied_xa(group: LinearGroup, wide: Tensor, wanted: bool) -> Tensor | None:
    """Returns a copy of xa (M, extra) from an input buffer that `group.forward` has read; None unless wanted.

    The copy lets the rest of `wide` be freed.
    """
    # Not contiguous(): it returns a view with zero columns unchanged, and that view would keep all of `wide`
    # alive.
    return group.xa(wide).clone(memory_format=torch.contiguous_format) if wanted else None


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Concatenates (B, T, D) and (B, S, D) to (B, T + S, D); a view if they are neighbors in one buffer."""
    batch, tokens, width = first.shape
    total = tokens + second.shape[1]
    if torch.compiler.is_compiling():
        return torch.cat((first, second), dim=1)  # the compiler's tensors have no storage to look at
    strides = (total * width, width, 1)
    if (
        first.stride() == strides
        and second.stride() == strides
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and second.storage_offset() == first.storage_offset() + tokens * width
    ):
        return first.as_strided((batch, total, width), strides)
    return torch.cat((first, second), dim=1)


def plain(module: Any) -> bool:
    """Returns True if calling the module runs its class's forward: no hooks, no replaced forward."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
