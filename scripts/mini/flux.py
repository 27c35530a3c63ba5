"""The mini FLUX: FLUX.1-dev's classes, two dual and five single blocks, 7.6 million parameters in all."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from halfbyte.trainer.families.flux.family import image_ids, pack, unpack
from scripts.mini.images.captions import vocabulary
from scripts.mini.images.corpus import Emoji
from scripts.mini.shared_parts import (
    LATENT_CHANNELS,
    POOLED_WIDTH,
    TEXT_WIDTH,
    clip_config,
    initialize,
    t5_config,
)
from scripts.mini.tokenizer_files import clip_tokenizer, t5_tokenizer


def build_flux(emoji: tuple[Emoji, ...], vae: AutoencoderKL) -> FluxPipeline:
    """Returns a pipeline around a VAE; PyTorch's generator initializes everything else; fp32."""
    words = vocabulary(emoji)
    clip = clip_tokenizer(words=words)
    t5 = t5_tokenizer(words)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    initialize(transformer)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=vae,
        text_encoder=CLIPTextModel(clip_config(clip)),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(t5_config(t5)),
        tokenizer_2=t5,
        transformer=transformer,
    )


class FluxDenoiser(nn.Module):
    """The trained model from text tokens and noisy latents to velocity, under the pipeline's names."""

    def __init__(self, pipeline: FluxPipeline) -> None:
        super().__init__()
        self.transformer = pipeline.transformer
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = pipeline.text_encoder_2

    def forward(self, noisy: Tensor, sigma: Tensor, t5: Tensor, clip: Tensor, guidance: Tensor) -> Tensor:
        """Returns the velocity, shaped like noisy (B, 16, 16, 16); sigma and guidance are (B,) fp32, tokens (B, T)."""
        _, _, height, width = noisy.shape
        device = noisy.device
        prompt = self.text_encoder_2(t5).last_hidden_state
        velocity = self.transformer(
            hidden_states=pack(noisy),
            encoder_hidden_states=prompt,
            pooled_projections=self.text_encoder(clip).pooler_output,
            timestep=sigma,
            img_ids=image_ids(height, width, device),
            txt_ids=torch.zeros(prompt.shape[1], 3, device=device),
            guidance=guidance,
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)
