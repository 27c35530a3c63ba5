"""FLUX's single block as one autograd function with a hand-written backward.

Text and image tokens form one stream, and the MLP reads the same input as attention. The inputs are the text
(B, T, D), the image (B, S, D) and the modulation vectors shift, scale and gate (B, D). With the two
`LinearGroup`s `into` and `out`, the forward is

    tokens    = [text, image]                                   along the sequence
    normed    = LN(tokens) * (1 + scale) + shift                layer_norm_modulate
    projected = into(normed) = [q, k, v, hidden]                3 D + H wide, H = 4 D
    attended  = attention(q, k, v)                              D wide; the code's `out` with its `statistics`
    mixed     = [attended, gelu(hidden)]                        D + H wide
    update    = out(mixed)
    result    = tokens + gate * update                          gated_residual

A group with LoRA factors A and B computes y = x W^T + b + s xa B^T with xa = x A^T; its backward uses
gb = s dy B (see `blocks.parts`). Shapes are written with M = B * (T + S) tokens.

With g = dL/dresult, `_single_backward` goes through these steps from the last to the first:

    dupdate    = gate * g
    dgate      = sum over tokens of g * update
    dmixed     = backward of out = [dattended, d(gelu(hidden))]
    d[q, k, v] = backward of attention
    dhidden    = d(gelu(hidden)) * gelu'(hidden)
    dnormed    = backward of into, from [d[q, k, v], dhidden]
    dtokens    = backward of LN + g                             with dscale, dshift

The `+ g` is the residual connection; `layer_norm_modulate_backward` adds it before it rounds. Each
"backward of" a group also gives dA and dB of its adapters. The adapters, the modulation and both streams get
gradients; the frozen weights and the RMSNorm weights do not. The fp16 clamp counts as the identity.

`Keep` decides what stays in memory between the passes: "inputs" keeps `tokens` and xa of out; "attention"
adds attention's output and statistics; "everything" adds `projected` and xa of into. The backward recomputes
only what a gradient depends on: the product `into` (58 % of the work in the block's products) and, with
"inputs", attention. The product `out` is repeated only if the modulation is trained, because only dgate needs
`update`. Each xa is small, so it is kept whenever the backward does not recompute it together with its input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.copy_rows.ops import copy_rows
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
    joined,
)
from halfbyte.trainer.families.offload.activations import HostStore, save, saved


@dataclass(frozen=True, eq=False)
class SingleBlock:
    """Everything the function needs to know about a block besides its inputs."""

    attention: JointAttention
    into: LinearGroup  # D -> 3 D + H: queries, keys, values and the MLP's hidden units
    out: LinearGroup  # D + H -> D: from [attention, gelu(hidden)]
    norm_eps: float
    keep: Keep
    store: HostStore | None  # keeps the input in host memory until the backward; None: on the device

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.into, self.out

    def project(self, tokens: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """Returns into's input buffer (M, D + extra), holding normed and xa, and projected (M, 3 D + H)."""
        wide, room = input_room(self.into, tokens)
        self.normed(tokens, modulation, out=room)
        return wide, self.into.forward(wide)

    def normed(self, tokens: Tensor, modulation: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns LN(tokens) * (1 + scale) + shift (B, S, D), written into `out` if given."""
        shift, scale, _ = modulation.chunk(3, dim=-1)
        return layer_norm_modulate(tokens, scale, shift, eps=self.norm_eps, out=out)

    def mixed(self, out: Tensor, projected: Tensor) -> Tensor:
        """Returns the input buffer of out (M, D + H + extra) with [attention, gelu(hidden)] in it.

        The last `extra` columns are uninitialized; `LinearGroup.forward` fills them with xa.
        """
        mlp = self.out.width - out.shape[2] * out.shape[3]
        wide = gelu_input(self.out, projected[:, -mlp:], first=self.out.width - mlp)
        copy_rows(out.view(1, len(wide), -1), out=wide[None, :, : self.out.width - mlp])
        return wide


class SingleBlockFunction(torch.autograd.Function):
    """(text (B, T, D), image (B, S, D), modulation (B, 3 D), block, *adapters) -> (text, image)."""

    @staticmethod
    def forward(
        ctx: Any, text: Tensor, image: Tensor, modulation: Tensor, block: SingleBlock, *_: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(text.device.type):
            # A view, not a copy, if the previous single block made both: they are two slices of its result.
            tokens = joined(text, image)
            learns, keep = any(ctx.needs_input_grad), block.keep
            # [q, k, v, hidden] = into(LN(tokens) * (1 + scale) + shift)
            wide, product = block.project(tokens, modulation)
            into_xa = copied_xa(block.into, wide, learns and keep == "everything")
            del wide
            # `out` is attention's output here; `block.out` is the group that reads it.
            out, statistics = block.attention.attend(block.attention.streams([product], len(tokens)))
            # mixed = [attended, gelu(hidden)]
            wide = block.mixed(out, product)
            projected = (product,) if keep == "everything" else ()
            del product  # unless it is kept: 7 D per token freed before the next product allocates its output
            # result = tokens + gate * out(mixed)
            update = block.out.forward(wide).view(tokens.shape)
            out_xa = copied_xa(block.out, wide, learns)
            del wide
            result = gated_residual(tokens, modulation.chunk(3, dim=-1)[2], update, clip=True)
        # The order in which `_single_backward` reads them.
        kept: tuple[Tensor | None, ...] = (out_xa, into_xa)
        if keep != "inputs":
            kept = (*kept, out, statistics, *projected)
        save(ctx, (tokens,), (modulation, *kept), block.store)
        ctx.block = block
        ctx.texts = text.shape[1]
        return result[:, : ctx.texts], result[:, ctx.texts :]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,), (modulation, *kept) = saved(ctx)
        with without_autocast(tokens.device.type):
            return _single_backward(ctx, joined(*grads), tokens, modulation, kept)


def _single_backward(
    ctx: Any, grad: Tensor, tokens: Tensor, modulation: Tensor, kept: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of every argument of `SingleBlockFunction.forward`.

    grad: dL/dresult (B, T + S, D). kept: what `forward` saved after the modulation.
    """
    block: SingleBlock = ctx.block
    batch, wants_modulation = len(tokens), ctx.needs_input_grad[2]
    _, scale, gate = modulation.chunk(3, dim=-1)

    # Recompute what the forward did not keep. After the two xa, `kept` holds nothing, [out, statistics], or
    # [out, statistics, projected].
    out_xa, into_xa, *kept = kept
    normed = None
    if len(kept) == 3:
        projected = kept[2]
    else:
        wide, projected = block.project(tokens, modulation)
        # Views of `wide`, which therefore lives until the backward of into has read them.
        normed, into_xa = wide[:, : block.into.width], block.into.xa(wide)
        del wide
    streams = block.attention.streams([projected], batch)
    out, statistics = kept[:2] if kept else block.attention.attend(streams)
    collected = AdapterGradients(block.groups)

    # dupdate = gate * g, written next to the columns for gb; dgate needs `update` itself.
    gate_grad = None
    update_grad, room = gradient_room(block.out, grad)
    if wants_modulation:
        update = block.out.forward(block.mixed(out, projected)).view(tokens.shape)
        _, gate_grad = gated_residual_grads(grad, gate, update, out=room)
    else:
        gated_residual_backward(grad, gate, out=room)
    # dmixed = [dattended, d(gelu(hidden))] (M, D + H), and dB of out. dA of out follows with the GELU below.
    mixed_grad, gb = collected.reader_backward(block.out, update_grad, out_xa)

    # dattended is copied out of dmixed's rows because attention's kernels want it laid out as `out` is.
    width = tokens.shape[-1]
    attended_grad = copy_rows(mixed_grad[None, :, :width]).view(tokens.shape)
    # The gradient buffer of into, (M, 3 D + H + extra), is filled in three steps: d[q, k, v], dhidden, gb.
    into_grad, room = gradient_room(block.into, tokens)
    block.attention.backward(attended_grad, streams, out, statistics, [room])
    # dhidden = d(gelu(hidden)) * gelu'(hidden), with dA of out = gb^T [attended, gelu(hidden)] and dB of
    # proj_mlp, the last layer of into: s dhidden^T xa.
    collected.gelu_backward(
        block.out,
        gb,
        mixed_grad[:, width:],
        block.into,
        into_xa,
        projected[:, 3 * width :],
        into_grad[:, 3 * width : block.into.outputs],
        beside=out.view(len(mixed_grad), width),
    )
    # Only `into_grad` is read from here on. `gb` and `streams` are views of `update_grad` and `projected`.
    del mixed_grad, update_grad, gb, attended_grad, projected, streams, room

    # dnormed, with dA = gb^T normed and dB of queries, keys and values = s d[q, k, v]^T xa.
    if normed is None:
        normed = block.normed(tokens, modulation).flatten(0, 1)
    normed_grad = collected.linear_backward(block.into, into_grad, normed, into_xa).view(tokens.shape)
    # dtokens = backward of LN + g.
    modulation_grad = None
    if gate_grad is None:
        result = layer_norm_modulate_backward(normed_grad, tokens, scale, grad, eps=block.norm_eps)
    else:
        result, scale_grad, shift_grad = layer_norm_modulate_grads(
            normed_grad, tokens, scale, grad, eps=block.norm_eps
        )
        modulation_grad = torch.cat((shift_grad, scale_grad, gate_grad), dim=-1)
    # Views of one buffer, so the previous single block's `joined(*grads)` needs no copy.
    text_grad, image_grad = result[:, : ctx.texts], result[:, ctx.texts :]
    return text_grad, image_grad, modulation_grad, None, *collected.in_order()
