"""Streams blocks: packed weights stay in host memory and visit the device only while their block computes.

The device has two rooms, each as large as the largest block. While one block computes in its room, the next
block is copied into the other. A step visits blocks 0 to n - 1 in the forward and n - 1 to 0 in the backward:

    computes    block 0     block 1     block 2          ...
    room A      0           2 copied    2
    room B      1 copied    1           3 copied

One visit during the backward serves both the recomputation there and the gradients.

The block itself is not changed. Hooks before its forward and before its backward set `.data` of each packed
tensor to its bytes in the room; when the next block is visited, `.data` goes back to the host's bytes.
Everything that holds one of those tensor objects, autograd's saved tensors included, reads the bytes that are
current at that time.

The next block is a guess. A wrong guess costs the time of one copy; the result is the same.
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
_ALIGNMENT = 256  # bytes; more than any kernel requires of a pointer


def keep_on_host(blocks: Sequence[str]) -> OnLayerLoaded:
    """Returns a loading hook that moves each packed layer of the named blocks to host memory."""
    prefixes = tuple(f"{name}." for name in blocks)

    def place(path: str, layer: QuantizedLayer) -> None:
        if path.startswith(prefixes):
            hold_on_host(layer)

    return place


def packed_blocks(model: nn.Module, names: Collection[str]) -> list[nn.Module]:
    """Returns the named blocks that hold packed weights, in the order in which the model calls them."""
    return [
        block
        for name, block in model.named_modules()
        if name in names and any(map(_is_packed, block.modules()))
    ]


class _HeldBlock:
    """The packed tensors of one block, and the offset of each in one contiguous copy of their bytes."""

    def __init__(self, block: nn.Module, copies: BlockCopies) -> None:
        self._tensors = packed_tensors(block)
        self._offsets, self.nbytes = _laid_out(self._tensors)
        self._memory = copies.locked(self.nbytes)
        self._on_host = self.views(self.bytes)
        for view, tensor in zip(self._on_host, self._tensors, strict=True):
            view.copy_(tensor)
        self.restore_host()  # frees the tensors' original host memory

    @property
    def bytes(self) -> Tensor:
        """All tensors of the block in host memory, (nbytes,) uint8."""
        return self._memory.bytes

    def views(self, memory: Tensor) -> list[Tensor]:
        """Returns views of `memory` (>= nbytes,) uint8, one per tensor, with its dtype and shape."""
        return [
            memory[offset : offset + tensor.numel() * tensor.element_size()]
            .view(tensor.dtype)
            .view(tensor.shape)
            for tensor, offset in zip(self._tensors, self._offsets, strict=True)
        ]

    def set_storage(self, views: Sequence[Tensor]) -> None:
        """Points each tensor at its view."""
        for tensor, view in zip(self._tensors, views, strict=True):
            tensor.data = view

    def restore_host(self) -> None:
        """Points each tensor back at its bytes in host memory."""
        self.set_storage(self._on_host)


@dataclass(eq=False)
class _Room:
    """Device memory for one block."""

    memory: Tensor  # (nbytes of the largest block,) uint8
    views: list[list[Tensor]]  # of every block, made once: any block may come into any room
    free: Mark  # after the last kernel that read the memory; a copy into it must wait for this
    arrived: Mark = None  # end of the copy into it; kernels that read it must wait for this
    holds: int | None = None  # index of the block that is here or is being copied; None: nothing usable


class BlockStream:
    """Brings each block to the device before its forward and before its backward."""

    def __init__(self, blocks: Sequence[nn.Module], copies: BlockCopies) -> None:
        """Takes the blocks in the order of their calls, their layers in host memory (see `hold_on_host`)."""
        self._copies = copies
        self._blocks = [_HeldBlock(block, copies) for block in blocks]
        self._visited: int | None = None  # index of the block whose tensors point at the device
        self.copied = 0  # bytes since the start
        largest = max(block.nbytes for block in self._blocks)
        # In order of use, the room left longest ago first: `_fetch` reuses that one.
        self._rooms = [self._room(largest) for _ in range(ROOMS)]
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before_forward, number))
            block.register_forward_hook(partial(self._after_forward, number))

    @property
    def host_bytes(self) -> int:
        """Page-locked host memory of all blocks, in bytes."""
        return sum(block.nbytes for block in self._blocks)

    @property
    def device_bytes(self) -> int:
        """Device memory of all rooms, in bytes."""
        return sum(room.memory.nbytes for room in self._rooms)

    def visit(self, number: int, following: int) -> None:
        """Makes block `number` readable for later kernels and starts copying block `following`."""
        if number != self._visited:
            self._leave()
            # Already there or on its way if the last visit guessed right; else the copy starts now.
            room = self._fetch(number)
            self._copies.wait(room.arrived)
            self._blocks[number].set_storage(room.views[number])
            self._visited = number
        self._fetch(following)

    def _leave(self) -> None:
        """Ends the current visit. All kernels that read the block have been launched by now."""
        if self._visited is None:
            return
        room = next(room for room in self._rooms if room.holds == self._visited)
        self._blocks[self._visited].restore_host()
        self._visited = None
        # The kernels may still run. The next copy into this room waits until the device has passed this mark.
        room.free = self._copies.now()
        # To the end of the order of use.
        self._rooms.remove(room)
        self._rooms.append(room)

    def _fetch(self, number: int) -> _Room:
        """Returns the room that holds block `number` or into which it is being copied.

        Starts the copy if there is no such room, into the room that was left longest ago.
        """
        for room in self._rooms:
            if room.holds == number:
                return room
        room = next(room for room in self._rooms if self._visited is None or room.holds != self._visited)
        block = self._blocks[number]
        room.holds = None  # so that an exception in the copy leaves no room that claims a block
        room.arrived = self._copies.copy(block.bytes, room.memory[: block.nbytes], room.free)
        room.holds = number
        self.copied += block.nbytes
        return room

    def _room(self, nbytes: int) -> _Room:
        memory = self._copies.room(nbytes)
        # Kernels may still read what had this memory before.
        return _Room(memory, [block.views(memory) for block in self._blocks], self._copies.now())

    def _before_forward(self, number: int, *_: Any) -> None:
        last = len(self._blocks) - 1
        if number < last:
            following = number + 1
        else:
            # With gradients the backward comes next. It begins at this block and needs the one before;
            # without, the next forward begins at block 0.
            following = max(last - 1, 0) if torch.is_grad_enabled() else 0
        self.visit(number, following)

    def _before_backward(self, number: int) -> None:
        last = len(self._blocks) - 1
        # After block 0 comes the next step's forward, which finds 0 here and needs 1.
        self.visit(number, number - 1 if number else min(1, last))

    def _after_forward(self, number: int, _: nn.Module, __: Any, output: Any) -> Any:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [part for part in outputs if isinstance(part, Tensor)]
        if not any(tensor.requires_grad for tensor in tensors):
            return output
        # Add a node after the block's outputs to autograd's graph; it runs right before the block's backward.
        marked = iter(_BeforeBackward.apply(partial(self._before_backward, number), *tensors))
        parts = tuple(next(marked) if isinstance(part, Tensor) else part for part in outputs)
        return parts if isinstance(output, tuple) else parts[0]


class Visitors:
    """Predicts what streaming the named blocks of a model on the meta device takes: memory and copies.

    All predictions are zero if no block holds packed weights.
    """

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
        """Page-locked host memory, in bytes."""
        return sum(self.sizes)

    @property
    def copied(self) -> int:
        """Bytes that one forward and backward copy.

        The forward finds the first `ROOMS` blocks on the device and the backward the last, so neither copies
        those.
        """
        return sum(self.sizes[ROOMS:]) + sum(self.sizes[:-ROOMS])


class _BeforeBackward(torch.autograd.Function):
    """Passes a block's outputs through unchanged, and calls `begin` when the backward reaches them.

    Autograd runs the node created last first. No node of an earlier block runs before this block's backward
    is over, so the blocks' visits do not interleave.
    """

    @staticmethod
    def forward(ctx: Any, begin: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.begin = begin
        # An output without a gradient stays None instead of becoming a tensor of zeros.
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.begin()
        return None, *grads


def packed_tensors(block: nn.Module) -> list[Tensor]:
    """Returns the tensors that are streamed with a block: codes and statistics of its quantized layers."""
    layers = (module for module in block.modules() if isinstance(module, QuantizedLayer))
    return [tensor for layer in layers for tensor in held_tensors(layer)]


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLayer)


def _laid_out(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Returns the offset of each tensor in one contiguous buffer, and the size of the buffer, in bytes."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        # Not `tensor.nbytes`: for a packed weight that includes its statistics, which are tensors of their
        # own here.
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return offsets, end
