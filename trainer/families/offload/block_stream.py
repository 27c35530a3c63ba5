"""Blocks whose packed weights live in the host's memory and are on the device for as long as they compute.

The device has room for two blocks: while one computes, the next is copied beside it. A step visits blocks 0 to n - 1
and then n - 1 to 0; a visit in the backward serves both what is computed again there and the gradients.

A block does not know of it. Ahead of its forward, and of its backward, each tensor of its packed weights is pointed
to its bytes on the device, and back to the host's when the next block is visited. Whoever holds one of those tensors,
autograd among them, reads through it what is there at the time. Which block comes next is a guess; a wrong one costs
the time of a copy and no more.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.quant.layers.on_host import held_tensors, hold_on_host
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.fill import OnLayerLoaded
from halfbyte.trainer.families.offload.copies import BlockCopies, Mark

ROOMS = 2
_ALIGNMENT = 256  # bytes, more than any kernel asks of a pointer


def keep_on_host(blocks: Sequence[str]) -> OnLayerLoaded:
    """For loading: brings the packed layers of the blocks of these names to the host as they come."""
    prefixes = tuple(f"{name}." for name in blocks)

    def place(path: str, layer: QuantizedLayer) -> None:
        if path.startswith(prefixes):
            hold_on_host(layer)

    return place


def packed_blocks(model: nn.Module, names: Collection[str]) -> list[nn.Module]:
    """The blocks of these names that hold packed weights, in the model's order, in which they are called."""
    return [
        block
        for name, block in model.named_modules()
        if name in names and any(map(_is_packed, block.modules()))
    ]


class _HeldBlock:
    """The packed weights of one block: their tensors, and where each has its bytes."""

    def __init__(self, block: nn.Module, copies: BlockCopies) -> None:
        self._tensors = packed_tensors(block)
        self._offsets, self.nbytes = _laid_out(self._tensors)
        self._memory = copies.locked(self.nbytes)
        self._on_host = self.views(self.bytes)
        for view, tensor in zip(self._on_host, self._tensors, strict=True):
            view.copy_(tensor)
        self.restore_host()

    @property
    def bytes(self) -> Tensor:
        """(nbytes,) uint8 on the host."""
        return self._memory.bytes

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors in a copy of the block's bytes."""
        return [
            memory[offset : offset + tensor.numel() * tensor.element_size()]
            .view(tensor.dtype)
            .view(tensor.shape)
            for tensor, offset in zip(self._tensors, self._offsets, strict=True)
        ]

    def set_storage(self, views: Sequence[Tensor]) -> None:
        """Has the tensors be these views."""
        for tensor, view in zip(self._tensors, views, strict=True):
            tensor.data = view

    def restore_host(self) -> None:
        """Has them be what lies on the host."""
        self.set_storage(self._on_host)


@dataclass(eq=False)
class _Room:
    """Memory of the device for one block."""

    memory: Tensor  # uint8, as large as the largest block
    views: list[list[Tensor]]  # of every block
    free: Mark  # behind the last that read it
    arrived: Mark = None
    holds: int | None = None  # the number of a block, there or on its way


class BlockStream:
    """Makes blocks visit the device, each ahead of its forward and of its backward."""

    def __init__(self, blocks: Sequence[nn.Module], copies: BlockCopies) -> None:
        """blocks: in the order in which they are called; their layers on the host, see `hold_on_host`."""
        self._copies = copies
        self._blocks = [_HeldBlock(block, copies) for block in blocks]
        self._visited: int | None = None
        self.copied = 0  # bytes, since the beginning
        largest = max(block.nbytes for block in self._blocks)
        # The one that was left longest ago comes first.
        self._rooms = [self._room(largest) for _ in range(ROOMS)]
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before_forward, number))
            block.register_forward_hook(partial(self._behind_forward, number))

    @property
    def host_bytes(self) -> int:
        """Page-locked memory that the blocks take."""
        return sum(block.nbytes for block in self._blocks)

    @property
    def device_bytes(self) -> int:
        """Memory of the device that they visit."""
        return sum(room.memory.nbytes for room in self._rooms)

    def visit(self, number: int, following: int) -> None:
        """Has a block on the device for what is computed from now on, and the `following` one on its way there."""
        if number != self._visited:
            self._leave()
            room = self._fetch(number)
            self._copies.wait(room.arrived)
            self._blocks[number].set_storage(room.views[number])
            self._visited = number
        self._fetch(following)

    def _leave(self) -> None:
        """Ends the visit: all that reads the block has been given to the device by now."""
        if self._visited is None:
            return
        room = next(room for room in self._rooms if room.holds == self._visited)
        self._blocks[self._visited].restore_host()
        self._visited = None
        room.free = self._copies.now()
        self._rooms.remove(room)
        self._rooms.append(room)

    def _fetch(self, number: int) -> _Room:
        """The room that has a block or will, once what goes on there is over."""
        for room in self._rooms:
            if room.holds == number:
                return room
        room = next(room for room in self._rooms if self._visited is None or room.holds != self._visited)
        block = self._blocks[number]
        room.holds = None
        room.arrived = self._copies.copy(block.bytes, room.memory[: block.nbytes], room.free)
        room.holds = number
        self.copied += block.nbytes
        return room

    def _room(self, nbytes: int) -> _Room:
        memory = self._copies.room(nbytes)
        # What had the memory before may be read still.
        return _Room(memory, [block.views(memory) for block in self._blocks], self._copies.now())

    def _before_forward(self, number: int, *_: Any) -> None:
        last = len(self._blocks) - 1
        if number < last:
            following = number + 1
        else:
            # The backward comes next and begins here, or else another forward.
            following = max(last - 1, 0) if torch.is_grad_enabled() else 0
        self.visit(number, following)

    def _before_backward(self, number: int) -> None:
        last = len(self._blocks) - 1
        self.visit(number, number - 1 if number else min(1, last))

    def _behind_forward(self, number: int, _: nn.Module, __: Any, output: Any) -> Any:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [part for part in outputs if isinstance(part, Tensor)]
        if not any(tensor.requires_grad for tensor in tensors):
            return output
        marked = iter(_AheadOfBackward.apply(partial(self._before_backward, number), *tensors))
        parts = tuple(next(marked) if isinstance(part, Tensor) else part for part in outputs)
        return parts if isinstance(output, tuple) else parts[0]


class Visitors:
    """What a model on meta would take if its blocks were streamed; nothing where there are none."""

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        blocks = [packed_tensors(block) for block in packed_blocks(model, names)]
        self.sizes = [_laid_out(tensors)[1] for tensors in blocks]
        self.tensors = {id(tensor) for tensors in blocks for tensor in tensors}
        self.rooms = [
            torch.empty(max(self.sizes), dtype=torch.uint8, device="meta")
            for _ in range(ROOMS if blocks else 0)
        ]

    @property
    def host_bytes(self) -> int:
        """Page-locked memory."""
        return sum(self.sizes)

    @property
    def copied(self) -> int:
        """Bytes that a forward with its backward copies: each way begins with the blocks that are there."""
        return sum(self.sizes[ROOMS:]) + sum(self.sizes[:-ROOMS])


class _AheadOfBackward(torch.autograd.Function):
    """What a block gives, as it is; `begin` is called when the backward gets there.

    Autograd runs what was computed last first: nothing of the blocks ahead comes before this one's backward is over.
    """

    @staticmethod
    def forward(ctx: Any, begin: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.begin = begin
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.begin()
        return None, *grads


def packed_tensors(block: nn.Module) -> list[Tensor]:
    """All that comes and goes with a block."""
    layers = (module for module in block.modules() if isinstance(module, QuantizedLayer))
    return [tensor for layer in layers for tensor in held_tensors(layer)]


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLayer)


def _laid_out(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each begins in one piece of memory, and the size of that in bytes."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        # Not `nbytes`, which counts a packed weight's statistics.
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return offsets, end
