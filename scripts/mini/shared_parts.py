"""The parts that both mini pipelines share: the VAE, the sizes of the text encoders, initialization and saving.

Linear layers are multiples of 64 wide, one block of the 4-bit formats.
"""

import copy

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn
from transformers import CLIPTextConfig, PreTrainedTokenizerBase, T5Config

from scripts.mini.images.corpus import SIDE

TEXT_WIDTH = 128
POOLED_WIDTH = 64
LATENT_CHANNELS = 16


def build_vae() -> AutoencoderKL:
    """Returns a VAE with 16 latent channels at a quarter of the side, a third of the image's numbers."""
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


def clip_config(tokenizer: PreTrainedTokenizerBase) -> CLIPTextConfig:
    """Returns two layers; their pooled state gives the transformer's modulation the subject of the caption."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=POOLED_WIDTH,
        intermediate_size=2 * POOLED_WIDTH,
        projection_dim=POOLED_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_config(tokenizer: PreTrainedTokenizerBase) -> T5Config:
    """Returns two layers over an embedding for each word of the corpus."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )


def initialize(transformer: nn.Module) -> None:
    """Applies Xavier's initialization, and zero for the modulations and the last layer.

    Every block starts as the identity, as in DiT (Peebles and Xie 2022, arXiv 2212.09748).
    """
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            gate = "norm" in name or name == "proj_out"
            nn.init.zeros_(module.weight) if gate else nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def bf16_copy(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Returns a copy to save and sample with: every weight in bf16, no memory shared with the original."""
    modules = {
        name: nn.Module.to(copy.deepcopy(module).eval().requires_grad_(False), torch.bfloat16)
        for name, module in pipeline.components.items()
        if isinstance(module, nn.Module)
    }
    rest = {name: part for name, part in pipeline.components.items() if name not in modules}
    for name in ("vae", "transformer"):
        modules[name].register_to_config(_name_or_path="")  # otherwise the folder it was loaded from is saved
    parts = {**modules, **rest}
    return type(pipeline)(**{name: part for name, part in parts.items() if part is not None})
