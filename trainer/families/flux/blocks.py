"""FLUX's transformer blocks, which replace diffusers' and run as one autograd function each where possible.

A block runs as one function if each of its layers is a frozen linear layer of a kind that `LinearGroup`
knows, with one plain adapter or none. Otherwise (dropout on adapters, DoRA, int8 bases, hooks, another
attention processor) it runs layer by layer, with torch's checkpointing.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from halfbyte.quant.layers.autocast import without_autocast
from halfbyte.quant.lora.layers import lora_linears
from halfbyte.trainer.families.blocks.attention import JointAttention, Rotary
from halfbyte.trainer.families.blocks.dual_block import DualBlock, DualBlockFunction, StreamPart
from halfbyte.trainer.families.blocks.fused_block import BlockSettings, WholeBlock
from halfbyte.trainer.families.blocks.parts import adapters, linear_group, plain
from halfbyte.trainer.families.flux.attention import FluxSharedInputAttention
from halfbyte.trainer.families.flux.single_block import SingleBlock, SingleBlockFunction


class _FluxBlock(WholeBlock):
    """Methods that dual and single blocks share."""

    def _attention(self, module: Any, rotary: Rotary | None, x: Tensor, *, joint: bool) -> JointAttention:
        # One pair of RMSNorm weights per stream. `joint`: the text stream comes first and has weights of its
        # own.
        own = (module.norm_q.weight, module.norm_k.weight)
        added = (module.norm_added_q.weight, module.norm_added_k.weight) if joint else own
        return JointAttention(
            heads=module.heads,
            head_dim=module.head_dim,
            norms=[added, own] if joint else [own],
            norm_eps=module.norm_q.eps,
            rotary=None if rotary is None else (rotary[0].float(), rotary[1].float()),
            backend=self.attention_backend(x),
        )


# The class names are diffusers': compile_repeated_blocks and device maps find blocks by their class's name.
class FluxTransformerBlock(_FluxBlock, transformer_flux.FluxTransformerBlock):
    """The dual block: text and image have their own weights. `blocks.dual_block` has its equations."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Takes the image's tokens (B, S, D) and the text's (B, T, D); returns (text, image)."""
        if self.runs_whole(self.attn.processor, FluxSharedInputAttention, joint_attention_kwargs):
            dtype = self.computed_in(hidden_states)
            text, image = encoder_hidden_states.to(dtype), hidden_states.to(dtype)
            with without_autocast(text.device.type):
                block = self._whole(image, image_rotary_emb)
            if block is not None:
                # Computed outside the function, so that autograd trains adapters on these layers too.
                modulations = [
                    norm.linear(norm.silu(temb)).to(dtype) for norm in (self.norm1_context, self.norm1)
                ]
                return DualBlockFunction.apply(text, image, *modulations, block, *adapters(block.groups))
        return self.by_layer(
            super().forward,
            hidden_states,
            encoder_hidden_states,
            temb,
            image_rotary_emb,
            joint_attention_kwargs,
        )

    def _whole(self, x: Tensor, rotary: Rotary | None) -> DualBlock | None:
        """Returns the block for its autograd function, or None if it must run layer by layer."""
        attention, text_mlp, mlp = self.attn, self.ff_context.net, self.ff.net
        heads = (attention.to_q, attention.to_k, attention.to_v)
        text_heads = (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
        named = [
            linear_group(layers, x)
            for layers in (
                text_heads,
                (attention.to_add_out,),
                (text_mlp[0].proj,),
                (text_mlp[2],),
                heads,
                (attention.to_out[0],),
                (mlp[0].proj,),
                (mlp[2],),
            )
        ]
        groups = [group for group in named if group is not None]
        if len(groups) < len(named) or not all(map(plain, (attention, self.ff, self.ff_context))):
            return None
        return DualBlock(
            self._attention(attention, rotary, x, joint=True),
            # Text first. diffusers clamps the text stream's fp16 output, not the image's.
            (StreamPart.of(groups[:4], clip=True), StreamPart.of(groups[4:], clip=False)),
            norm_eps=self.norm1.norm.eps,
            keep=self.kept,
            store=self.store,
        )


class FluxSingleTransformerBlock(_FluxBlock, transformer_flux.FluxSingleTransformerBlock):
    """The single block, whose MLP reads the same input as its attention; see `flux.single_block`."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Takes the image's tokens (B, S, D) and the text's (B, T, D); returns (text, image)."""
        if self.runs_whole(self.attn.processor, FluxSharedInputAttention, joint_attention_kwargs):
            dtype = self.computed_in(hidden_states)
            text, image = encoder_hidden_states.to(dtype), hidden_states.to(dtype)
            with without_autocast(text.device.type):
                block = self._whole(image, image_rotary_emb)
            if block is not None:
                modulation = self.norm.linear(self.norm.silu(temb)).to(dtype)
                return SingleBlockFunction.apply(text, image, modulation, block, *adapters(block.groups))
        ours = isinstance(self.attn.processor, FluxSharedInputAttention)
        if joint_attention_kwargs or not ours or not plain(self.attn):
            # Another processor, such as an IP adapter's, computes its own queries and keys; hooks need the
            # module call.
            forward: Callable[..., Any] = super().forward
        else:
            forward = self._shared
        return self.by_layer(
            forward, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
        )

    def _whole(self, x: Tensor, rotary: Rotary | None) -> SingleBlock | None:
        """Returns the block for its autograd function, or None if it must run layer by layer."""
        attention = self.attn
        into = linear_group((attention.to_q, attention.to_k, attention.to_v, self.proj_mlp), x)
        out = linear_group((self.proj_out,), x)
        if into is None or out is None or not plain(attention):
            return None
        return SingleBlock(
            self._attention(attention, rotary, x, joint=False),
            into,
            out,
            norm_eps=self.norm.norm.eps,
            keep=self.kept,
            store=self.store,
        )

    # The same computation as diffusers' forward, but queries, keys, values and MLP come from one pass over
    # `normed`.
    def _shared(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None,
        _: None,
    ) -> tuple[Tensor, Tensor]:
        attention, processor = self.attn, self.attn.processor
        texts = encoder_hidden_states.shape[1]
        tokens = torch.cat((encoder_hidden_states, hidden_states), dim=1)
        normed, gate = self.norm(tokens, emb=temb)
        *projected, hidden = lora_linears(
            normed, (attention.to_q, attention.to_k, attention.to_v, self.proj_mlp)
        )
        mixed = processor.attend(attention, tuple(projected), None, None, image_rotary_emb)
        update = self.proj_out(torch.cat((mixed, self.act_mlp(hidden)), dim=2))
        tokens = tokens + gate.unsqueeze(1) * update
        if tokens.dtype == torch.float16:
            largest = torch.finfo(torch.float16).max
            tokens = tokens.clip(-largest, largest)
        return tokens[:, :texts], tokens[:, texts:]


def fuse_flux_blocks(denoiser: nn.Module, settings: BlockSettings) -> None:
    """Replaces a FluxTransformer2DModel's blocks with those of this module; parameters stay unchanged."""
    model: Any = denoiser
    model.set_attn_processor(FluxSharedInputAttention(settings.backend))
    for blocks, ours in (
        (model.transformer_blocks, FluxTransformerBlock),
        (model.single_transformer_blocks, FluxSingleTransformerBlock),
    ):
        for block in blocks:
            # Our classes add no parameters, so changing the class keeps the block's parameters, hooks and
            # adapters.
            block.__class__ = ours
            block.settings = settings
