"""What the miniature FLUX consists of: FLUX.1-dev's classes in the sizes that the pretraining fills with sense.

Some 7.5 million parameters in all, 15 MB as bf16. Linear layers are multiples of 64 wide, one block of the 4-bit
formats.
"""

import copy

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from pretrain_captions import vocabulary
from pretrain_corpus import SIDE, Emoji
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from halfbyte.trainer.mini_tokenizers import clip_tokenizer, t5_tokenizer

TEXT_WIDTH = 128
POOLED_WIDTH = 64
LATENT_CHANNELS = 16


def build_vae() -> AutoencoderKL:
    """16 latent channels at a quarter of the side, a third of the picture's numbers."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=SIDE,
        scaling_factor=1.0,  # measured after training
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def build_flux(emoji: tuple[Emoji, ...], vae: AutoencoderKL) -> FluxPipeline:
    """A pipeline around a VAE, everything else as PyTorch's generator initializes it; fp32.

    The modulations and the last layer start at zero, as in DiT (Peebles and Xie 2022, arXiv 2212.09748): every
    block starts as the identity.
    """
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
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            gate = "norm" in name or name == "proj_out"
            nn.init.zeros_(module.weight) if gate else nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=POOLED_WIDTH,
            intermediate_size=2 * POOLED_WIDTH,
            projection_dim=POOLED_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
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
        text_encoder=text_encoder,
        tokenizer=clip,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5,
        transformer=transformer,
    )


def bf16_copy(pipeline: FluxPipeline) -> FluxPipeline:
    """A copy to save and to sample with: every weight in bf16, nothing tied to the original."""
    modules = {
        name: nn.Module.to(copy.deepcopy(module).eval().requires_grad_(False), torch.bfloat16)
        for name, module in pipeline.components.items()
        if isinstance(module, nn.Module)
    }
    rest = {name: part for name, part in pipeline.components.items() if name not in modules}
    for name in ("vae", "transformer"):
        modules[name].register_to_config(_name_or_path="")  # else the folder it was loaded from is saved
    return FluxPipeline(**{name: part for name, part in {**modules, **rest}.items() if part is not None})
