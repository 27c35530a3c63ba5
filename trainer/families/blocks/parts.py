"""What the transformer blocks that are autograd functions as a whole are put together from.

A block keeps as little of its forward as it is told to (`Keep`) and makes the rest anew in its backward, product by
product and not by running itself again: what no gradient depends on is never computed twice.
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
    """The layers as one product over x; None where one of them must be called as the module it is."""
    parts = [group_layer(layer, x) for layer in layers]
    whole = tuple(part for part in parts if part is not None)
    return LinearGroup(whole) if len(whole) == len(parts) else None


def adapters(groups: Sequence[LinearGroup]) -> list[Tensor | None]:
    """A and B of every layer of the groups in order: the tensors through which gradients leave a block."""
    return [part for group in groups for layer in group.layers for part in (layer.down, layer.up)]


@dataclass
class AdapterGradients:
    """Collects the gradients of the groups' A and B, to be given back in the order of `adapters`."""

    groups: Sequence[LinearGroup]

    def __post_init__(self) -> None:
        self._downs: dict[int, list[Tensor | None]] = {}
        self._ups: dict[int, list[Tensor | None]] = {}
        self._last_ups: dict[int, Tensor | None] = {}

    def through(
        self, group: LinearGroup, grad: Tensor, x: Tensor, u: Tensor, *, wants_input: bool = True
    ) -> Tensor:
        """dx (M, K) of a group from its gradient (M, N + extra), with those of its adapters; x and u as in
        `LinearGroup.gradients`. Of a group that writes what `gelu` has seen, the last B's gradient is there."""
        known = [self._last_ups[id(group)]] if id(group) in self._last_ups else []
        dx, downs, ups = group.gradients(grad, x, u, wants_input=wants_input, known=known)
        self._downs[id(group)], self._ups[id(group)] = downs, ups
        return grad.new_empty(0) if dx is None else dx

    def before(self, group: LinearGroup, grad: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """dx (M, K) and p (M, extra) of a group that reads gelu(hidden): all but its A's gradients, see `gelu`."""
        p = group.lower(grad)
        self._ups[id(group)] = group.up_gradients(grad[:, : group.outputs], u)
        return group.input_gradient(grad), p

    def gelu(
        self,
        reader: LinearGroup,
        p: Tensor,
        grad: Tensor,
        writer: LinearGroup,
        u: Tensor,
        hidden: Tensor,
        room: Tensor,
        beside: Tensor | None = None,
    ) -> None:
        """Fills room (M, H) with the gradient of `hidden` (M, H), the output of writer's last layer, from that of
        gelu(hidden) (M, H), which `reader` reads behind the columns `beside` (M, K - H); p is the reader's, u the
        writer's."""
        last = writer.layers[-1]
        first = sum(layer.rank for layer in writer.layers[:-1])
        down, up = gelu_tanh_gradients(grad, hidden, p, u[:, first : first + last.rank], out=room)
        if beside is not None and reader.extra:
            down = torch.cat((product_in_fp32(p.t(), beside), down), dim=1)
        self._downs[id(reader)] = reader.down_gradients(down)
        self._last_ups[id(writer)] = last.scaled(up) if last.rank else None

    def in_order(self) -> Iterator[Tensor | None]:
        """As autograd wants them."""
        for group in self.groups:
            for pair in zip(self._downs[id(group)], self._ups[id(group)], strict=True):
                yield from pair


def input_room(group: LinearGroup, like: Tensor) -> tuple[Tensor, Tensor]:
    """(B * S, K + extra), uninitialized, and its first columns as (B, S, K), for a stream like (B, S, ...)."""
    return _room(group, group.width, like)


def gradient_room(group: LinearGroup, like: Tensor) -> tuple[Tensor, Tensor]:
    """(B * S, N + extra), uninitialized, and its first columns as (B, S, N), for a stream like (B, S, ...)."""
    return _room(group, group.outputs, like)


def _room(group: LinearGroup, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens = like.shape[:2]
    wide = group.widened(batch * tokens, columns, like)
    return wide, wide.view(batch, tokens, -1)[..., :columns]


def widened(group: LinearGroup, stream: Tensor) -> Tensor:
    """(B * S, K + extra) with the stream (B, S, K) in its first columns."""
    wide, room = input_room(group, stream)
    copy_rows(stream, out=room)
    return wide


def gelu_input(group: LinearGroup, hidden: Tensor, first: int = 0) -> Tensor:
    """(M, K + extra) with gelu(hidden) (M, H) in the columns from `first`; those before are for the caller."""
    wide = group.widened(hidden.shape[0], group.width, hidden)
    gelu_tanh(hidden[None], out=wide[None, :, first : group.width])
    return wide


def lifted_alone(group: LinearGroup, wide: Tensor, wanted: bool) -> Tensor | None:
    """u (M, extra) of what `group` has seen, by itself: the rest of `wide` need not be kept for it."""
    # contiguous() would give a view without columns as it is, which holds all of `wide`.
    return group.xa(wide).clone(memory_format=torch.contiguous_format) if wanted else None


def joined(first: Tensor, second: Tensor) -> Tensor:
    """(B, T, D) and (B, S, D) -> (B, T + S, D); a view where they already lie in memory as one."""
    batch, tokens, width = first.shape
    total = tokens + second.shape[1]
    if torch.compiler.is_compiling():
        return torch.cat((first, second), dim=1)  # storages are not to be had there
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
    """Whether calling the module does no more than its class says: hooks and offloading need the call."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
