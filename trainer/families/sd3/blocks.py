"""SD3's transformer blocks, which replace diffusers' and run as one autograd function each where possible.

Three kinds of blocks run layer by layer: the last one, whose text output nobody reads; SD3.5 medium's blocks
with a second attention over the image only; and any block that `LinearGroup` cannot take (see `flux.blocks`).
"""

from typing import Any

from diffusers.models import attention as diffusers_attention
from torch import Tensor, nn

from halfbyte.quant.layers.autocast import without_autocast
from halfbyte.trainer.families.blocks.attention import JointAttention
from halfbyte.trainer.families.blocks.dual_block import DualBlock, DualBlockFunction, StreamPart
from halfbyte.trainer.families.blocks.fused_block import BlockSettings, WholeBlock
from halfbyte.trainer.families.blocks.parts import adapters, linear_group, plain
from halfbyte.trainer.families.sd3.attention import SD3SharedInputAttention


# The class name is diffusers': device maps find blocks by their class's name.
class JointTransformerBlock(WholeBlock, diffusers_attention.JointTransformerBlock):
    """The joint block, with the image first in attention; see `blocks.dual_block` for its equations."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Takes the image's tokens (B, S, D) and the text's (B, T, D); returns (text, image).

        The last block returns None for the text.
        """
        two_streams = not (self.context_pre_only or self.use_dual_attention or self._chunk_size)
        if two_streams and self.runs_whole(
            self.attn.processor, SD3SharedInputAttention, joint_attention_kwargs
        ):
            dtype = self.computed_in(hidden_states)
            image, text = hidden_states.to(dtype), encoder_hidden_states.to(dtype)
            with without_autocast(image.device.type):
                block = self._whole(image)
            if block is not None:
                # Computed outside the function, so that autograd trains adapters on these layers too.
                modulations = [
                    norm.linear(norm.silu(temb)).to(dtype) for norm in (self.norm1, self.norm1_context)
                ]
                image, text = DualBlockFunction.apply(
                    image, text, *modulations, block, *adapters(block.groups)
                )
                return text, image
        return self.by_layer(
            super().forward, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
        )

    def _whole(self, x: Tensor) -> DualBlock | None:
        """Returns the block for its autograd function, or None if it must run layer by layer."""
        attention, mlp, text_mlp = self.attn, self.ff.net, self.ff_context.net
        named = [
            linear_group(layers, x)
            for layers in (
                (attention.to_q, attention.to_k, attention.to_v),
                (attention.to_out[0],),
                (mlp[0].proj,),
                (mlp[2],),
                (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj),
                (attention.to_add_out,),
                (text_mlp[0].proj,),
                (text_mlp[2],),
            )
        ]
        groups = [group for group in named if group is not None]
        if len(groups) < len(named) or not all(map(plain, (attention, self.ff, self.ff_context))):
            return None
        return DualBlock(
            self._attention(attention, x),
            (StreamPart.of(groups[:4], clip=False), StreamPart.of(groups[4:], clip=False)),
            norm_eps=self.norm1.norm.eps,
            keep=self.kept,
            store=self.store,
        )

    def _attention(self, module: Any, x: Tensor) -> JointAttention:
        norms = [(module.norm_q, module.norm_k), (module.norm_added_q, module.norm_added_k)]
        return JointAttention(
            heads=module.heads,
            head_dim=module.inner_dim // module.heads,
            norms=[
                (None, None) if query is None or key is None else (query.weight, key.weight)
                for query, key in norms
            ],
            norm_eps=1e-6 if module.norm_q is None else module.norm_q.eps,
            rotary=None,
            backend=self.attention_backend(x),
        )


def fuse_sd3_blocks(denoiser: nn.Module, settings: BlockSettings) -> None:
    """Replaces an SD3Transformer2DModel's blocks with those of this module; parameters stay unchanged."""
    model: Any = denoiser
    model.set_attn_processor(SD3SharedInputAttention(settings.backend))
    for block in model.transformer_blocks:
        # Our class adds no parameters, so changing the class keeps the block's parameters, hooks and
        # adapters.
        block.__class__ = JointTransformerBlock
        block.settings = settings
