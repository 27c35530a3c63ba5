"""The mini SD3: SD3.5's classes, four joint blocks, 7 million parameters in all."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from scripts.mini.images.captions import vocabulary
from scripts.mini.images.corpus import SIDE, Emoji
from scripts.mini.shared_parts import (
    LATENT_CHANNELS,
    POOLED_WIDTH,
    TEXT_WIDTH,
    clip_config,
    initialize,
    t5_config,
)
from scripts.mini.tokenizer_files import clip_tokenizer, t5_tokenizer

_CLIP_G_PADDING = 0  # "!", as the full model pads its second CLIP's captions


def build_sd3(emoji: tuple[Emoji, ...], vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Returns a pipeline around a VAE; PyTorch's generator initializes everything else; fp32."""
    words = vocabulary(emoji)
    clip_l, clip_g = clip_tokenizer(words=words), clip_tokenizer(words=words, pad_token="!")
    assert clip_g.pad_token_id == _CLIP_G_PADDING
    t5 = t5_tokenizer(words)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 4,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=TEXT_WIDTH,  # the width of T5, and of the two CLIPs concatenated
        caption_projection_dim=192,
        pooled_projection_dim=2 * POOLED_WIDTH,
        out_channels=LATENT_CHANNELS,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )
    initialize(transformer)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(clip_config(clip_l)),
        tokenizer=clip_l,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(clip_g)),
        tokenizer_2=clip_g,
        text_encoder_3=T5EncoderModel(t5_config(t5)),
        tokenizer_3=t5,
    )


class SD3Denoiser(nn.Module):
    """The trained model from text tokens and noisy latents to velocity, under the pipeline's names."""

    def __init__(self, pipeline: StableDiffusion3Pipeline) -> None:
        super().__init__()
        self.transformer = pipeline.transformer
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = pipeline.text_encoder_2
        self.text_encoder_3 = pipeline.text_encoder_3

    def forward(self, noisy: Tensor, sigma: Tensor, t5: Tensor, clip: Tensor, guidance: Tensor) -> Tensor:
        """Returns the velocity, shaped like noisy (B, 16, 16, 16); sigma is (B,) fp32, tokens (B, T); no guidance."""
        end = self.text_encoder.config.eos_token_id
        after_end = (clip == end).cumsum(dim=1) > 1
        states: list[Tensor] = []
        pooled: list[Tensor] = []
        for encoder, ids in (
            (self.text_encoder, clip),
            (self.text_encoder_2, clip.masked_fill(after_end, _CLIP_G_PADDING)),
        ):
            encoded = encoder(ids, output_hidden_states=True)
            states.append(encoded.hidden_states[-2])
            pooled.append(encoded.text_embeds)
        prompt = self.text_encoder_3(t5).last_hidden_state
        clips = torch.cat(states, dim=-1)
        clips = functional.pad(clips, (0, prompt.shape[-1] - clips.shape[-1]))
        return self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=torch.cat((clips, prompt), dim=1),
            pooled_projections=torch.cat(pooled, dim=-1),
            timestep=sigma * 1000,
            return_dict=False,
        )[0]
