"""What the transformer blocks that are autograd functions as a whole are put together from.

A block keeps as little of its forward as it is told to (`Keep`) and makes the rest anew in its backward, product by
product and not by running itself again: what no gradient depends on is never computed twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halfbyte.kernels.gelu_ops import gelu_tanh, gelu_tanh_backward
from halfbyte.quant.linear_group import LinearGroup
from halfbyte.quant.lora import group_layer
from halfbyte.trainer.families.host_store import HostStore

# inputs: a block's inputs alone (full checkpointing). attention: also what attention gave and the stream behind it
# (selective). everything: also the outputs of the products; what elementwise work makes is made again even so.
Keep = Literal["inputs", "attention", "everything"]


@dataclass(frozen=True)
class BlockSettings:
    """How the blocks of a transformer run; none of it changes a result beyond rounding."""

    keep: Keep = "everything"
    """What a block keeps between forward and backward."""
    store: HostStore | None = None
    """Where whole blocks leave their inputs between forward and backward; None: on the device."""
    whole: bool = True
    """Run each block as one function where it can be."""
    backend: str | None = None
    """Of attention, see `halfbyte.kernels.attention`; None: what is right without a probe."""


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
        self._found: dict[int, list[Tensor | None]] = {}

    def through(self, group: LinearGroup, grad: Tensor, x: Tensor, *, wants_input: bool = True) -> Tensor:
        """dx of `group`, whose adapters' gradients are kept; see `LinearGroup.gradients`."""
        dx, downs, ups = group.gradients(grad, x, wants_input=wants_input)
        self._found[id(group)] = [part for pair in zip(downs, ups, strict=True) for part in pair]
        return grad.new_empty(0) if dx is None else dx

    def in_order(self) -> Iterator[Tensor | None]:
        """As autograd wants them."""
        for group in self.groups:
            yield from self._found[id(group)]


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
    room.copy_(stream)
    return wide


def gelu_input(group: LinearGroup, hidden: Tensor, first: int = 0) -> Tensor:
    """(M, K + extra) with gelu(hidden) (M, H) in the columns from `first`; those before are for the caller."""
    wide = group.widened(hidden.shape[0], group.width, hidden)
    gelu_tanh(hidden[None], out=wide[None, :, first : group.width])
    return wide


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


def hidden_gradient(grad: Tensor, hidden: Tensor, out: Tensor) -> None:
    """Fills out (M, H) with the gradient of `hidden` (M, H) from that of gelu(hidden); all may be slices."""
    gelu_tanh_backward(grad[None], hidden[None], out=out[None])


def plain(module: Any) -> bool:
    """Whether calling the module does no more than its class says: hooks and offloading need the call."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
