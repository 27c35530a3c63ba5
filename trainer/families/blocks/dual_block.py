"""The two-stream transformer block of FLUX and SD3 as one autograd function with a hand-written backward.

The text and the image stream each have their own weights; they meet only in attention. Per stream, with its
input `stream` (B, S_i, D), the six modulation vectors (B, D) and the four `LinearGroup`s of its `StreamPart`
(heads, out, up, down), the forward is

    normed    = LN(stream) * (1 + scale) + shift                    layer_norm_modulate
    projected = heads(normed)                                       queries, keys and values, 3 D wide
    attended  = this stream's rows of attention(projected of both streams)
    middle    = stream + gate * out(attended)                       gated_residual
    hidden    = up(LN(middle) * (1 + mlp_scale) + mlp_shift)        H = 4 D wide
    result    = middle + mlp_gate * down(gelu(hidden))              gated_residual

A group with LoRA factors A and B computes y = x W^T + b + s xa B^T with xa = x A^T; its backward uses
gb = s dy B (see `parts`). Shapes are written with M = B * S_i tokens.

With g = dL/dresult, `_DualBackward` goes through these steps from the last to the first:

    _mlp      d(down's output) = mlp_gate * g
              dmlp_gate        = sum over tokens of g * (down's output)
              d(gelu(hidden))  = backward of down
              dhidden          = d(gelu(hidden)) * gelu'(hidden)
              d(up's input)    = backward of up
              dmiddle          = backward of LN + g                 with dmlp_scale, dmlp_shift
    _out      d(out's output)  = gate * dmiddle
              dgate            = sum over tokens of dmiddle * (out's output)
              dattended        = backward of out
    run       dprojected       = backward of attention, both streams together
    _heads    dnormed          = backward of heads
              dstream          = backward of LN + dmiddle           with dscale, dshift

The `+ g` and `+ dmiddle` are the residual connections; `layer_norm_modulate_backward` adds them before it
rounds. Each "backward of" a group also gives dA and dB of its adapters. The frozen weights and the RMSNorm
weights get no gradient. The fp16 clamp of `StreamPart.clip` counts as the identity.

`Keep` decides what stays in memory between the passes:

    always        stream, the modulation, xa of down
    attention     + attention's output and statistics, middle, xa of out
    everything    + projected, hidden, xa of heads and of up

The backward recomputes the rest: with "attention" the products heads and up, with "inputs" also attention and
the product out. LN and GELU outputs are never kept. The gates' gradients need the outputs of `out` and
`down`; the backward runs these products again only if the modulation is trained.
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
    copied_xa,
    gelu_input,
    gradient_room,
    input_room,
    widened,
)
from halfbyte.trainer.families.offload.activations import HostStore, save, saved


@dataclass(frozen=True, eq=False)
class StreamPart:
    """The layers of one stream."""

    heads: LinearGroup  # D -> 3 D: queries, keys, values
    out: LinearGroup  # D -> D: attention's output projection
    up: LinearGroup  # D -> H: into the MLP
    down: LinearGroup  # H -> D: out of the MLP
    clip: bool  # clamp the block's fp16 output to the finite range, as diffusers does with FLUX's text stream

    @classmethod
    def of(cls, groups: Sequence[LinearGroup], *, clip: bool) -> "StreamPart":
        """Builds the part from its four groups, in the order of the fields."""
        heads, out, up, down = groups
        return cls(heads, out, up, down, clip)

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.heads, self.out, self.up, self.down


@dataclass(frozen=True, eq=False)
class DualBlock:
    """Everything the function needs to know about a block besides its inputs.

    The streams are in the order in which attention joins their tokens (FLUX: text first, SD3: image first).
    """

    attention: JointAttention
    streams: tuple[StreamPart, StreamPart]
    norm_eps: float
    keep: Keep
    store: HostStore | None  # keeps the inputs in host memory until the backward; None: on the device

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return tuple(group for stream in self.streams for group in stream.groups)

    def widened(self, group: LinearGroup, stream: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Returns the group's input buffer (M, D + extra) with LN(stream) * (1 + scale) + shift in it.

        The last `extra` columns are uninitialized; `group.forward` fills them with xa.
        """
        wide, room = input_room(group, stream)
        layer_norm_modulate(stream, scale, shift, eps=self.norm_eps, out=room)
        return wide

    def normed(self, stream: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Returns LN(stream) * (1 + scale) + shift as (M, D), without room for xa."""
        return layer_norm_modulate(stream, scale, shift, eps=self.norm_eps).flatten(0, 1)


@dataclass(frozen=True)
class Modulation:
    """One stream's modulation (B, 6 D) in its six parts (B, D), in diffusers' order."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    mlp_shift: Tensor
    mlp_scale: Tensor
    mlp_gate: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> "Modulation":
        return cls(*vectors.chunk(6, dim=-1))


class DualBlockFunction(torch.autograd.Function):
    """(two streams, the modulation (B, 6 D) of each, block, *adapters) -> the streams, (B, S_i, D) each."""

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
        # The adapters are arguments so that autograd routes their gradients; the groups hold their values.
        inputs, modulations = (first, second), (first_modulation, second_modulation)
        with without_autocast(first.device.type):
            learns, keep = any(ctx.needs_input_grad), block.keep
            # xa of the groups whose forward the backward will not repeat: [heads of both streams, then out,
            # up and down of the first stream and of the second]. None stands for an xa that the backward
            # recomputes.
            projected, kept_xa = [], []
            for part, stream, vectors in zip(block.streams, inputs, modulations, strict=True):
                # normed = LN(stream) * (1 + scale) + shift, then [q, k, v] = heads(normed).
                wide, product = _project(block, part.heads, stream, Modulation.of(vectors))
                projected.append(product)
                kept_xa.append(copied_xa(part.heads, wide, learns and keep == "everything"))
                # `wide` (M, D + extra) is freed here; `projected` keeps the product alive for attention.
                del wide, product
            # The streams meet here and nowhere else.
            out, statistics = block.attention.attend(block.attention.streams(projected, len(first)))
            if keep != "everything":
                projected = []  # frees 3 D per token before the MLPs need memory
            middles, hiddens, results = [], [], []
            for part, stream, vectors, attended in zip(
                block.streams, inputs, modulations, _apart(out, inputs), strict=True
            ):
                modulation = Modulation.of(vectors)
                # middle = stream + gate * out(attended)
                wide = widened(part.out, attended)
                middle = gated_residual(stream, modulation.gate, part.out.forward(wide).view(stream.shape))
                kept_xa.append(copied_xa(part.out, wide, learns and keep != "inputs"))
                # hidden = up(LN(middle) * (1 + mlp_scale) + mlp_shift)
                wide = block.widened(part.up, middle, modulation.mlp_scale, modulation.mlp_shift)
                hidden = part.up.forward(wide)
                kept_xa.append(copied_xa(part.up, wide, learns and keep == "everything"))
                # result = middle + mlp_gate * down(gelu(hidden)). The backward has no reason to run `down`
                # again (unless the modulation is trained), so its xa is kept whatever `keep` says.
                wide = gelu_input(part.down, hidden)
                update = part.down.forward(wide).view(stream.shape)
                kept_xa.append(copied_xa(part.down, wide, learns))
                results.append(gated_residual(middle, modulation.mlp_gate, update, clip=part.clip))
                middles.append(middle)
                if keep == "everything":
                    hiddens.append(hidden)
                del wide, update, hidden  # before the second stream allocates its own
        # The order in which `_DualBackward.restore` reads them: 8 xa, then as much as `keep` allows.
        kept: tuple[Tensor | None, ...] = tuple(kept_xa)
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
    """Returns the input buffer of heads (M, D + extra), holding normed and xa, and projected (M, 3 D)."""
    wide = block.widened(group, stream, modulation.scale, modulation.shift)
    return wide, group.forward(wide)


def _apart(joint: Tensor, streams: Sequence[Tensor]) -> list[Tensor]:
    """Splits attention's output (B, S_0 + S_1, H, D_h) into views of each stream, (B, S_i, D)."""
    return list(joint.flatten(2).split([stream.shape[1] for stream in streams], dim=1))


class _DualBackward:
    """One backward pass of a dual block; see the equations at the top of the module."""

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
        """Unpacks what the forward kept and recomputes projections, attention and middles where it did not.

        The MLP's `hidden` is not recomputed here but in `_mlp`, so that only one stream's is alive at a time.
        """
        block = self.block
        # kept = [xa of heads (2), xa of out, up, down (first stream), xa of out, up, down (second stream)] ...
        heads, (first, second) = kept[:2], (kept[2:5], kept[5:8])
        self.xas = [[heads[0], *first], [heads[1], *second]]
        # rest = []                                                        keep == "inputs"
        #        [out, statistics, middles (2)]                            keep == "attention"
        #        [out, statistics, middles (2), projected (2), hiddens (2)] keep == "everything"
        rest: list[Any] = list(kept[8:])
        self.hiddens: list[Tensor | None] = rest[6:8] or [None, None]
        self.normed, self.projected = [], rest[4:6]
        for index, part in enumerate(block.streams):
            stream, modulation = self.inputs[index], self.modulations[index]
            # `normed` is needed for dA of heads. It is cheap, so it is recomputed in every case.
            if len(rest) > 4:
                normed = block.normed(stream, modulation.scale, modulation.shift)
            else:
                wide, projected = _project(block, part.heads, stream, modulation)
                # Both are views of `wide`, which therefore lives until `_heads`.
                normed, self.xas[index][0] = wide[:, : part.heads.width], part.heads.xa(wide)
                self.projected.append(projected)
            self.normed.append(normed)
        self.streams = block.attention.streams(self.projected, len(self.inputs[0]))
        if rest:
            self.out, self.statistics, *self.middles = rest[:4]
            return
        # keep == "inputs": run attention again, and middle = stream + gate * out(attended).
        self.out, self.statistics = block.attention.attend(self.streams)
        self.middles = []
        for index, attended in enumerate(_apart(self.out, self.inputs)):
            part, stream = block.streams[index], self.inputs[index]
            wide = widened(part.out, attended)
            update = part.out.forward(wide).view(stream.shape)
            # Copied rather than viewed: `attended` exists already, so nothing else needs `wide`.
            self.xas[index][1] = copied_xa(part.out, wide, True)
            del wide
            self.middles.append(gated_residual(stream, self.modulations[index].gate, update))

    def xa(self, index: int, group: int) -> Tensor:
        """Returns xa (M, extra) of one group of a stream; group: its place in `StreamPart.groups`."""
        xa = self.xas[index][group]
        assert xa is not None
        return xa

    def run(self, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Returns the gradients of every argument of `DualBlockFunction.forward`, in that order."""
        attended = _apart(self.out, self.inputs)
        middle_grads, attended_grads, gate_grads, mlp_grads = [], [], [], []
        # Each stream alone, from its output back to attention's output.
        for index in range(2):
            middle_grad, mlp_grad = self._mlp(index, grads[index])
            attended_grad, gate_grad = self._out(index, middle_grad, attended[index])
            middle_grads.append(middle_grad)
            attended_grads.append(attended_grad)
            gate_grads.append(gate_grad)
            mlp_grads.append(mlp_grad)
        # dattended of both streams -> dprojected = d[q, k, v], written into the gradient buffers
        # (M, 3 D + extra) that the backward of heads reads.
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
        # Nothing below reads q, k and v (3 D per token) again. `self.streams` holds views of
        # `self.projected`, so both must go to free the memory.
        del attended_grads, self.streams, self.projected
        # Each stream alone again, from the projections back to the block's inputs.
        results: list[Tensor | None] = []
        modulation_grads: list[Tensor | None] = []
        for index in range(2):
            stream_grad, norm_grads = self._heads(index, rooms[index][0], middle_grads[index])
            results.append(stream_grad)
            gate_grad, mlp_grad = gate_grads[index], mlp_grads[index]
            if norm_grads is None or gate_grad is None or mlp_grad is None:
                modulation_grads.append(None)
            else:
                # (B, 6 D) in the order of `Modulation`: shift, scale, gate, mlp_shift, mlp_scale, mlp_gate.
                modulation_grads.append(torch.cat((*norm_grads, gate_grad, *mlp_grad), dim=-1))
        # None stands for the argument `block`.
        return (*results, *modulation_grads, None, *self.collected.in_order())

    def _mlp(self, index: int, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Goes back through result = middle + mlp_gate * down(gelu(up(LN(middle)))).

        grad: dL/dresult (B, S, D). Returns dmiddle (B, S, D), and (dmlp_shift, dmlp_scale, dmlp_gate), each
        (B, D), or None if the modulation is not trained.
        """
        part, modulation, middle = self.block.streams[index], self.modulations[index], self.middles[index]
        hidden = self.hiddens[index]
        # up's input `normed` (for dA), xa (for dB) and output `hidden` (for gelu'), recomputed unless kept.
        if hidden is None:
            wide = self.block.widened(part.up, middle, modulation.mlp_scale, modulation.mlp_shift)
            hidden = part.up.forward(wide)
            normed, up_xa = wide[:, : part.up.width], part.up.xa(wide)  # views, which keep the buffer alive
            del wide
        else:
            normed = self.block.normed(middle, modulation.mlp_scale, modulation.mlp_shift)
            up_xa = self.xa(index, 2)
        gate_grad = None
        # d(down's output) = mlp_gate * g, written next to the columns for gb; dmlp_gate needs that output.
        update_grad, room = gradient_room(part.down, grad)
        if self.wants_modulation:
            update = part.down.forward(gelu_input(part.down, hidden)).view(grad.shape)
            _, gate_grad = gated_residual_grads(grad, modulation.mlp_gate, update, out=room)
        else:
            gated_residual_backward(grad, modulation.mlp_gate, out=room)
        # d(gelu(hidden)) (M, H), and dB of down. dA of down needs gelu(hidden), which the next call computes.
        acted_grad, gb = self.collected.reader_backward(part.down, update_grad, self.xa(index, 3))
        # dhidden = d(gelu(hidden)) * gelu'(hidden), with dA of down = gb^T gelu(hidden) and
        # dB of up = s dhidden^T xa.
        hidden_grad, _ = gradient_room(part.up, grad)
        self.collected.gelu_backward(
            part.down, gb, acted_grad, part.up, up_xa, hidden, hidden_grad[:, : part.up.outputs]
        )
        # H per token freed before the next product. `gb` and `room` are views of `update_grad`.
        del acted_grad, gb, update_grad, room
        # d(up's input), and dA of up.
        normed_grad = self.collected.linear_backward(part.up, hidden_grad, normed, up_xa).view(grad.shape)
        # dmiddle = backward of LN + g: the residual connection around the MLP.
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
        """Goes back through middle = stream + gate * out(attended), without the residual connection.

        Returns dattended (B, S, D), and dgate (B, D) or None if the modulation is not trained.
        """
        part, modulation = self.block.streams[index], self.modulations[index]
        gate_grad = None
        # d(out's output) = gate * dmiddle; dgate needs out's output itself.
        update_grad, room = gradient_room(part.out, middle_grad)
        if self.wants_modulation:
            update = part.out.forward(widened(part.out, attended)).view(attended.shape)
            _, gate_grad = gated_residual_grads(middle_grad, modulation.gate, update, out=room)
        else:
            gated_residual_backward(middle_grad, modulation.gate, out=room)
        # dattended, with dA = gb^T attended and dB = s d(out's output)^T xa.
        seen = attended.reshape(-1, part.out.width)
        grad = self.collected.linear_backward(part.out, update_grad, seen, self.xa(index, 1))
        return grad.view(attended.shape), gate_grad

    def _heads(
        self, index: int, heads_grad: Tensor, middle_grad: Tensor
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Goes back through projected = heads(LN(stream) * (1 + scale) + shift).

        heads_grad: dprojected in its gradient buffer (M, 3 D + extra). Returns dstream (B, S, D), which
        includes the residual connection around attention, and (dshift, dscale), each (B, D); None for what
        nobody needs.
        """
        part, modulation, stream = self.block.streams[index], self.modulations[index], self.inputs[index]
        wants = self.wants_inputs or self.wants_modulation
        # dnormed, with dA = gb^T normed and dB = s dprojected^T xa. In the model's first block nothing before
        # the adapters may need a gradient: then the product for dnormed is skipped.
        normed_grad = self.collected.linear_backward(
            part.heads, heads_grad, self.normed[index], self.xa(index, 0), wants_input=wants
        )
        if not wants:
            return None, None
        # dstream = backward of LN + dmiddle.
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
