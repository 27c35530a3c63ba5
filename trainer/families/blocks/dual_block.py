"""A block of two streams as one autograd function, for FLUX and SD3: forward, and a backward that makes anew what
was not kept.

The two streams, text and image, meet in attention alone. Of their products the ones into queries, keys and values
and into the MLP are made anew where they were not kept; the projections out of both only where the modulation
learns, whose gates' gradients depend on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.modulation.ops import (
    gated_residual,
    gated_residual_backward,
    gated_residual_grads,
    layer_norm_modulate,
    layer_norm_modulate_backward,
    layer_norm_modulate_grads,
)
from halfbyte.quant.layers.autocast import without_autocast
from halfbyte.quant.lora.linear_group import LinearGroup
from halfbyte.trainer.families.blocks.attention import JointAttention
from halfbyte.trainer.families.blocks.fused_block import Keep
from halfbyte.trainer.families.blocks.parts import (
    AdapterGradients,
    gelu_input,
    gradient_room,
    input_room,
    lifted_alone,
    widened,
)
from halfbyte.trainer.families.offload.activations import HostStore, save, saved


@dataclass(frozen=True, eq=False)
class StreamPart:
    """The layers of one stream."""

    heads: LinearGroup  # queries, keys, values
    out: LinearGroup  # of the attention
    up: LinearGroup  # into the MLP
    down: LinearGroup  # out of it
    clip: bool  # hold an fp16 stream within its finite range behind the block, as diffusers does FLUX's text

    @classmethod
    def of(cls, groups: Sequence[LinearGroup], *, clip: bool) -> "StreamPart":
        """From the four groups in the order of the fields."""
        heads, out, up, down = groups
        return cls(heads, out, up, down, clip)

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.heads, self.out, self.up, self.down


@dataclass(frozen=True, eq=False)
class DualBlock:
    """A dual block without its parameters' names; streams in the order of the joint attention (FLUX: text first)."""

    attention: JointAttention
    streams: tuple[StreamPart, StreamPart]
    norm_eps: float
    keep: Keep
    store: HostStore | None  # where the inputs wait; None: on the device

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return tuple(group for stream in self.streams for group in stream.groups)

    def widened(self, group: LinearGroup, stream: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The modulated stream (M, D + extra); the last columns are not filled."""
        wide, room = input_room(group, stream)
        layer_norm_modulate(stream, scale, shift, eps=self.norm_eps, out=room)
        return wide

    def normed(self, stream: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The modulated stream (M, D)."""
        return layer_norm_modulate(stream, scale, shift, eps=self.norm_eps).flatten(0, 1)


@dataclass(frozen=True)
class Modulation:
    """One stream's (B, 6 D) in its six parts, (B, D) each, in diffusers' order."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    mlp_shift: Tensor
    mlp_scale: Tensor
    mlp_gate: Tensor

    @classmethod
    def of(cls, whole: Tensor) -> "Modulation":
        return cls(*whole.chunk(6, dim=-1))


class DualBlockFunction(torch.autograd.Function):
    """(two streams, the modulation of each (B, 6 D)) -> the streams, (B, S_i, D) each."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor,
        first_modulation: Tensor,
        second_modulation: Tensor,
        block: DualBlock,
        *_: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs, modulations = (first, second), (first_modulation, second_modulation)
        with without_autocast(first.device.type):
            # What each group's A make of its input, in the order of `StreamPart.groups`, where it is not made anew.
            learns, keep = any(ctx.needs_input_grad), block.keep
            projected, lifts = [], []
            for part, stream, whole in zip(block.streams, inputs, modulations, strict=True):
                wide, product = _project(block, part.heads, stream, Modulation.of(whole))
                projected.append(product)
                lifts.append(lifted_alone(part.heads, wide, learns and keep == "everything"))
                del wide, product
            out, statistics = block.attention.attend(block.attention.streams(projected, len(first)))
            if keep != "everything":
                projected = []
            middles, hiddens, results = [], [], []
            for part, stream, whole, attended in zip(
                block.streams, inputs, modulations, _apart(out, inputs), strict=True
            ):
                modulation = Modulation.of(whole)
                wide = widened(part.out, attended)
                middle = gated_residual(stream, modulation.gate, part.out.forward(wide).view(stream.shape))
                lifts.append(lifted_alone(part.out, wide, learns and keep != "inputs"))
                wide = block.widened(part.up, middle, modulation.mlp_scale, modulation.mlp_shift)
                hidden = part.up.forward(wide)
                lifts.append(lifted_alone(part.up, wide, learns and keep == "everything"))
                wide = gelu_input(part.down, hidden)
                update = part.down.forward(wide).view(stream.shape)
                lifts.append(lifted_alone(part.down, wide, learns))
                results.append(gated_residual(middle, modulation.mlp_gate, update, clip=part.clip))
                middles.append(middle)
                if keep == "everything":
                    hiddens.append(hidden)
                del wide, update, hidden
        kept: tuple[Tensor | None, ...] = tuple(lifts)
        if keep != "inputs":
            kept = (*kept, out, statistics, *middles, *projected, *hiddens)
        save(ctx, inputs, (*modulations, *kept), block.store)
        ctx.block = block
        return results[0], results[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (first, second), (first_modulation, second_modulation, *kept) = saved(ctx)
        with without_autocast(first.device.type):
            backward = _DualBackward(
                ctx.block,
                (first, second),
                (Modulation.of(first_modulation), Modulation.of(second_modulation)),
                wants_modulation=any(ctx.needs_input_grad[2:4]),
                wants_inputs=any(ctx.needs_input_grad[:2]),
            )
            backward.restore(kept)
            return backward.run(grads)


def _project(
    block: DualBlock, group: LinearGroup, stream: Tensor, modulation: Modulation
) -> tuple[Tensor, Tensor]:
    """The modulated stream (M, D + extra) and its queries, keys and values (M, 3 D)."""
    wide = block.widened(group, stream, modulation.scale, modulation.shift)
    return wide, group.forward(wide)


def _apart(joint: Tensor, streams: Sequence[Tensor]) -> list[Tensor]:
    """(B, T + S, H, D_h) -> (B, T, D) and (B, S, D), views."""
    return list(joint.flatten(2).split([stream.shape[1] for stream in streams], dim=1))


class _DualBackward:
    """The backward of a dual block, from the outputs to the inputs."""

    def __init__(
        self,
        block: DualBlock,
        inputs: Sequence[Tensor],
        modulations: Sequence[Modulation],
        *,
        wants_modulation: bool,
        wants_inputs: bool,
    ) -> None:
        self.block = block
        self.inputs = inputs
        self.modulations = modulations
        self.wants_modulation = wants_modulation
        self.wants_inputs = wants_inputs
        self.collected = AdapterGradients(block.groups)

    def restore(self, kept: Sequence[Tensor | None]) -> None:
        """Makes anew what was not kept: the projections, attention's output and the streams behind it."""
        block = self.block
        heads, (first, second) = kept[:2], (kept[2:5], kept[5:8])
        self.lifts = [[heads[0], *first], [heads[1], *second]]
        whole: list[Any] = list(kept[8:])
        self.hiddens: list[Tensor | None] = whole[6:8] or [None, None]
        self.normed, self.projected = [], whole[4:6]
        for index, part in enumerate(block.streams):
            stream, modulation = self.inputs[index], self.modulations[index]
            if len(whole) > 4:
                normed = block.normed(stream, modulation.scale, modulation.shift)
            else:
                wide, projected = _project(block, part.heads, stream, modulation)
                normed, self.lifts[index][0] = wide[:, : part.heads.width], part.heads.xa(wide)
                self.projected.append(projected)
            self.normed.append(normed)
        self.streams = block.attention.streams(self.projected, len(self.inputs[0]))
        if whole:
            self.out, self.statistics, *self.middles = whole[:4]
            return
        self.out, self.statistics = block.attention.attend(self.streams)
        self.middles = []
        for index, attended in enumerate(_apart(self.out, self.inputs)):
            part, stream = block.streams[index], self.inputs[index]
            wide = widened(part.out, attended)
            update = part.out.forward(wide).view(stream.shape)
            self.lifts[index][1] = lifted_alone(part.out, wide, True)
            del wide
            self.middles.append(gated_residual(stream, self.modulations[index].gate, update))

    def lift(self, index: int, group: int) -> Tensor:
        """u of one of a stream's groups, in the order of `StreamPart.groups`."""
        lift = self.lifts[index][group]
        assert lift is not None
        return lift

    def run(self, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradients of streams, modulations and adapters, as `DualBlockFunction.forward` takes them."""
        attended = _apart(self.out, self.inputs)
        middle_grads, attended_grads, gate_grads, mlp_grads = [], [], [], []
        for index in range(2):
            middle_grad, mlp_grad = self._mlp(index, grads[index])
            attended_grad, gate_grad = self._out(index, middle_grad, attended[index])
            middle_grads.append(middle_grad)
            attended_grads.append(attended_grad)
            gate_grads.append(gate_grad)
            mlp_grads.append(mlp_grad)
        rooms = [
            gradient_room(part.heads, stream)
            for part, stream in zip(self.block.streams, self.inputs, strict=True)
        ]
        self.block.attention.backward(
            torch.cat(attended_grads, dim=1),
            self.streams,
            self.out,
            self.statistics,
            [room for _, room in rooms],
        )
        del attended_grads, self.streams, self.projected
        results: list[Tensor | None] = []
        modulation_grads: list[Tensor | None] = []
        for index in range(2):
            stream_grad, norm_grads = self._heads(index, rooms[index][0], middle_grads[index])
            results.append(stream_grad)
            gate_grad, mlp_grad = gate_grads[index], mlp_grads[index]
            if norm_grads is None or gate_grad is None or mlp_grad is None:
                modulation_grads.append(None)
            else:
                modulation_grads.append(torch.cat((*norm_grads, gate_grad, *mlp_grad), dim=-1))
        return (*results, *modulation_grads, None, *self.collected.in_order())

    def _mlp(self, index: int, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The gradient of the stream behind attention, and of the MLP's shift, scale and gate."""
        part, modulation, middle = self.block.streams[index], self.modulations[index], self.middles[index]
        hidden = self.hiddens[index]
        if hidden is None:
            wide = self.block.widened(part.up, middle, modulation.mlp_scale, modulation.mlp_shift)
            hidden = part.up.forward(wide)
            normed, lift = wide[:, : part.up.width], part.up.xa(wide)
            del wide
        else:
            normed = self.block.normed(middle, modulation.mlp_scale, modulation.mlp_shift)
            lift = self.lift(index, 2)
        gate_grad = None
        update_grad, room = gradient_room(part.down, grad)
        if self.wants_modulation:
            update = part.down.forward(gelu_input(part.down, hidden)).view(grad.shape)
            _, gate_grad = gated_residual_grads(grad, modulation.mlp_gate, update, out=room)
        else:
            gated_residual_backward(grad, modulation.mlp_gate, out=room)
        acted_grad, gb = self.collected.before(part.down, update_grad, self.lift(index, 3))
        hidden_grad, _ = gradient_room(part.up, grad)
        self.collected.gelu(
            part.down, gb, acted_grad, part.up, lift, hidden, hidden_grad[:, : part.up.outputs]
        )
        del acted_grad, gb, update_grad, room
        normed_grad = self.collected.through(part.up, hidden_grad, normed, lift).view(grad.shape)
        eps = self.block.norm_eps
        if gate_grad is None:
            return layer_norm_modulate_backward(
                normed_grad, middle, modulation.mlp_scale, grad, eps=eps
            ), None
        middle_grad, scale_grad, shift_grad = layer_norm_modulate_grads(
            normed_grad, middle, modulation.mlp_scale, grad, eps=eps
        )
        return middle_grad, (shift_grad, scale_grad, gate_grad)

    def _out(self, index: int, middle_grad: Tensor, attended: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient of the attention's output (B, S, D) in this stream, and of its gate."""
        part, modulation = self.block.streams[index], self.modulations[index]
        gate_grad = None
        update_grad, room = gradient_room(part.out, middle_grad)
        if self.wants_modulation:
            update = part.out.forward(widened(part.out, attended)).view(attended.shape)
            _, gate_grad = gated_residual_grads(middle_grad, modulation.gate, update, out=room)
        else:
            gated_residual_backward(middle_grad, modulation.gate, out=room)
        seen = attended.reshape(-1, part.out.width)
        grad = self.collected.through(part.out, update_grad, seen, self.lift(index, 1))
        return grad.view(attended.shape), gate_grad

    def _heads(
        self, index: int, heads_grad: Tensor, middle_grad: Tensor
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """The gradients of the block's input and of the attention's shift and scale, from the product's (M, 3 D)."""
        part, modulation, stream = self.block.streams[index], self.modulations[index], self.inputs[index]
        wants = self.wants_inputs or self.wants_modulation
        normed_grad = self.collected.through(
            part.heads, heads_grad, self.normed[index], self.lift(index, 0), wants_input=wants
        )
        if not wants:
            return None, None
        normed_grad, eps = normed_grad.view(stream.shape), self.block.norm_eps
        if not self.wants_modulation:
            return (
                layer_norm_modulate_backward(normed_grad, stream, modulation.scale, middle_grad, eps=eps),
                None,
            )
        stream_grad, scale_grad, shift_grad = layer_norm_modulate_grads(
            normed_grad, stream, modulation.scale, middle_grad, eps=eps
        )
        return stream_grad, (shift_grad, scale_grad)
