"""FLUX's single block as one autograd function: forward, and a backward that makes anew what was not kept.

What is made anew is only what gradients depend on: of the products the one into queries, keys, values and MLP (58 %
of the block's work in them), and attention where its output was not kept. What the adapters' A make of the layers'
inputs is small and always kept where the input is not made anew with it. Adapters, modulation and both streams get
their gradients; the frozen weights and the RMSNorm weights have none.
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
    gelu_input,
    gradient_room,
    input_room,
    joined,
    lifted_alone,
)
from halfbyte.trainer.families.offload.activations import HostStore, save, saved


@dataclass(frozen=True, eq=False)
class SingleBlock:
    """A single block without its parameters' names: text and image as one stream, MLP beside attention."""

    attention: JointAttention
    into: LinearGroup  # queries, keys, values, MLP
    out: LinearGroup  # of [attention, gelu(MLP)]
    norm_eps: float
    keep: Keep
    store: HostStore | None  # where the input waits; None: on the device

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.into, self.out

    def project(self, tokens: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """The modulated stream (M, D + extra) and the product of it (M, 3 D + H)."""
        wide, room = input_room(self.into, tokens)
        self.normed(tokens, modulation, out=room)
        return wide, self.into.forward(wide)

    def normed(self, tokens: Tensor, modulation: Tensor, out: Tensor | None = None) -> Tensor:
        """The modulated stream (B, S, D)."""
        shift, scale, _ = modulation.chunk(3, dim=-1)
        return layer_norm_modulate(tokens, scale, shift, eps=self.norm_eps, out=out)

    def mixed(self, out: Tensor, projected: Tensor) -> Tensor:
        """[attention, gelu(MLP)] (M, D + H + extra); the last columns are not filled."""
        mlp = self.out.width - out.shape[2] * out.shape[3]
        wide = gelu_input(self.out, projected[:, -mlp:], first=self.out.width - mlp)
        copy_rows(out.view(1, len(wide), -1), out=wide[None, :, : self.out.width - mlp])
        return wide


class SingleBlockFunction(torch.autograd.Function):
    """(text, image, modulation (B, 3 D)) -> (text, image)."""

    @staticmethod
    def forward(
        ctx: Any, text: Tensor, image: Tensor, modulation: Tensor, block: SingleBlock, *_: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(text.device.type):
            tokens = joined(text, image)
            learns, keep = any(ctx.needs_input_grad), block.keep
            wide, product = block.project(tokens, modulation)
            into_lift = lifted_alone(block.into, wide, learns and keep == "everything")
            del wide
            out, statistics = block.attention.attend(block.attention.streams([product], len(tokens)))
            wide = block.mixed(out, product)
            projected = (product,) if keep == "everything" else ()
            del product
            update = block.out.forward(wide).view(tokens.shape)
            out_lift = lifted_alone(block.out, wide, learns)
            del wide
            result = gated_residual(tokens, modulation.chunk(3, dim=-1)[2], update, clip=True)
        kept: tuple[Tensor | None, ...] = (out_lift, into_lift)
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
    block: SingleBlock = ctx.block
    batch, wants_modulation = len(tokens), ctx.needs_input_grad[2]
    _, scale, gate = modulation.chunk(3, dim=-1)
    out_lift, into_lift, *kept = kept
    normed = None
    if len(kept) == 3:
        projected = kept[2]
    else:
        wide, projected = block.project(tokens, modulation)
        normed, into_lift = wide[:, : block.into.width], block.into.xa(wide)
        del wide
    streams = block.attention.streams([projected], batch)
    out, statistics = kept[:2] if kept else block.attention.attend(streams)
    collected = AdapterGradients(block.groups)

    gate_grad = None
    update_grad, room = gradient_room(block.out, grad)
    if wants_modulation:
        update = block.out.forward(block.mixed(out, projected)).view(tokens.shape)
        _, gate_grad = gated_residual_grads(grad, gate, update, out=room)
    else:
        gated_residual_backward(grad, gate, out=room)
    mixed_grad, gb = collected.before(block.out, update_grad, out_lift)

    width = tokens.shape[-1]
    attended = copy_rows(mixed_grad[None, :, :width]).view(tokens.shape)
    into_grad, room = gradient_room(block.into, tokens)
    block.attention.backward(attended, streams, out, statistics, [room])
    collected.gelu(
        block.out,
        gb,
        mixed_grad[:, width:],
        block.into,
        into_lift,
        projected[:, 3 * width :],
        into_grad[:, 3 * width : block.into.outputs],
        beside=out.view(len(mixed_grad), width),
    )
    del mixed_grad, update_grad, gb, attended, projected, streams, room

    if normed is None:
        normed = block.normed(tokens, modulation).flatten(0, 1)
    normed_grad = collected.through(block.into, into_grad, normed, into_lift).view(tokens.shape)
    modulation_grad = None
    if gate_grad is None:
        result = layer_norm_modulate_backward(normed_grad, tokens, scale, grad, eps=block.norm_eps)
    else:
        result, scale_grad, shift_grad = layer_norm_modulate_grads(
            normed_grad, tokens, scale, grad, eps=block.norm_eps
        )
        modulation_grad = torch.cat((shift_grad, scale_grad, gate_grad), dim=-1)
    text_grad, image_grad = result[:, : ctx.texts], result[:, ctx.texts :]
    return text_grad, image_grad, modulation_grad, None, *collected.in_order()
