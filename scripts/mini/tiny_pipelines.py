"""Complete FLUX and SD3 pipelines of about a million random parameters, for machines without an accelerator.

Every class is that of the full models, and every linear layer is at least 64 wide and a multiple of 64 (one
block of the 4-bit formats). Every tensor is random, norms and biases included, so a weight loaded into the
wrong place changes the output. No gate is zero: a forward on noise gives numbers of order one, and an adapter
on any layer has a gradient from the first step.
"""

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from halfbyte.trainer.randomness import generator
from scripts.mini.tokenizer_files import clip_tokenizer, t5_tokenizer

# T5's width, into which SD3's two CLIP states (64 + 64 features) fit, as in the full model.
_SD3_TEXT_WIDTH = 128


def build_flux_pipeline(seed: int = 0, *, dual: int = 2, single: int = 4) -> FluxPipeline:
    """Returns a small FLUX.1-dev in bf16, with guidance embedding and dynamic shifting.

    dual, single: numbers of blocks.
    """
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=dual,
        num_single_layers=single,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    clip = clip_tokenizer()
    t5 = t5_tokenizer()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(_clip_config(clip)),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(_t5_config(t5, width=64)),
        tokenizer_2=t5,
        transformer=transformer,
    )
    _draw_pipeline(pipeline, seed)
    return pipeline


def build_sd3_pipeline(seed: int = 0) -> StableDiffusion3Pipeline:
    """Returns a small SD3.5 in bf16: three joint blocks, the first with a second attention, rms_norm on q and k."""
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=_SD3_TEXT_WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=128,
        out_channels=16,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    clip_l = clip_tokenizer()
    # The full model pads its second CLIP's captions with "!", token 0.
    clip_g = clip_tokenizer(pad_token="!")
    t5 = t5_tokenizer()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(_clip_config(clip_l)),
        tokenizer=clip_l,
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(clip_g)),
        tokenizer_2=clip_g,
        text_encoder_3=T5EncoderModel(_t5_config(t5, width=_SD3_TEXT_WIDTH)),
        tokenizer_3=t5,
    )
    _draw_pipeline(pipeline, seed)
    return pipeline


def _vae(*, scaling_factor: float, shift_factor: float) -> AutoencoderKL:
    """Returns a VAE with 16 latent channels at an eighth of the side; middle attention, no quant convolutions."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def _clip_config(tokenizer: PreTrainedTokenizerBase) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        # CLIP reads its pooled state at the token with this id.
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_config(tokenizer: PreTrainedTokenizerBase, *, width: int) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )


def _draw_pipeline(pipeline: DiffusionPipeline, seed: int) -> None:
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, nn.Module):
            _draw(component, generator(seed, f"mini/{name}"))
            # nn.Module's cast, because diffusers' own warns of layers to keep in fp32, and there are none.
            nn.Module.to(component.eval().requires_grad_(False), torch.bfloat16)


@torch.no_grad()
def _draw(model: nn.Module, draws: torch.Generator) -> None:
    """Fills weights that preserve the scale of activations: 1/sqrt(fan in), norms near one, small biases."""

    def normal(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.empty_like(tensor).normal_(mean, std, generator=draws))

    for name, parameter in sorted(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim <= 1:
            is_scale = name.endswith("weight")
            normal(parameter, std=0.05, mean=1.0 if is_scale else 0.0)
        elif isinstance(owner, nn.Embedding):
            normal(parameter, std=1.0 if isinstance(model, PreTrainedModel) else 0.02)
        else:
            normal(parameter, std=parameter[0].numel() ** -0.5)
    if isinstance(model, AutoencoderKL):
        _quieten_posterior(model)


def _quieten_posterior(vae: AutoencoderKL) -> None:
    """Scales the encoder's last layer so that log variances start near -4, a standard deviation of 0.14."""
    last = vae.encoder.conv_out
    channels = vae.config.latent_channels
    last.weight[channels:] *= 0.1
    last.bias[channels:] -= 4.0
