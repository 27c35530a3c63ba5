"""Configurations of published models, so that a plan works without access to the Hub."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]

FLUX_DEV: Config = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
_FLUX_SCHNELL = {**FLUX_DEV, "guidance_embeds": False}


def _joint(blocks: int, positions: int, *, qk_norm: str | None, dual: int = 0) -> Config:
    """Returns the configuration of an SD3 transformer, which has as many attention heads as blocks."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": blocks,
        "attention_head_dim": 64,
        "num_attention_heads": blocks,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 64 * blocks,
        "pooled_projection_dim": 2048,
        "out_channels": 16,
        "pos_embed_max_size": positions,
        "qk_norm": qk_norm,
        "dual_attention_layers": list(range(dual)),
    }


SD3_MEDIUM = _joint(24, 192, qk_norm=None)
SD35_MEDIUM = _joint(24, 384, qk_norm="rms_norm", dual=13)
SD35_LARGE = _joint(38, 192, qk_norm="rms_norm")


def _vae(*, shift_factor: float, scaling_factor: float) -> Config:
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": shift_factor,
        "scaling_factor": scaling_factor,
    }


def _clip(width: int, layers: int, heads: int, activation: str) -> Config:
    return {
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "hidden_act": activation,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "projection_dim": width,
    }


_CLIP_L = _clip(768, 12, 12, "quick_gelu")
_CLIP_G = _clip(1280, 32, 20, "gelu")
_T5: Config = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Pipeline:
    """The configurations of a pipeline that decide its memory and time."""

    transformer: Config
    vae: Config
    texts: Mapping[str, tuple[str, Config]]  # component -> (class name in transformers, configuration)
    scheduler: Config


def _flux(transformer: Config, *, dynamic: bool) -> Pipeline:
    texts = {"text_encoder": ("CLIPTextModel", _CLIP_L), "text_encoder_2": ("T5EncoderModel", _T5)}
    vae = _vae(shift_factor=0.1159, scaling_factor=0.3611)
    scheduler = {"shift": 3.0 if dynamic else 1.0, "use_dynamic_shifting": dynamic}
    return Pipeline(transformer, vae, texts, scheduler)


def _sd3(transformer: Config) -> Pipeline:
    texts = {
        "text_encoder": ("CLIPTextModelWithProjection", _CLIP_L),
        "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
        "text_encoder_3": ("T5EncoderModel", _T5),
    }
    return Pipeline(transformer, _vae(shift_factor=0.0609, scaling_factor=1.5305), texts, {"shift": 3.0})


PUBLISHED: Mapping[str, Pipeline] = {
    "black-forest-labs/FLUX.1-dev": _flux(FLUX_DEV, dynamic=True),
    "black-forest-labs/FLUX.1-schnell": _flux(_FLUX_SCHNELL, dynamic=False),
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(SD3_MEDIUM),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(SD35_MEDIUM),
    "stabilityai/stable-diffusion-3.5-large": _sd3(SD35_LARGE),
}
"""Repository on the Hub, in diffusers' layout -> its configurations."""


def write_configurations(folder: Path, name: str) -> Path:
    """Writes the configurations of the published model `name` into `folder`, and returns it."""
    pipeline = PUBLISHED[name]
    index = {"transformer": ("diffusers", pipeline.transformer["_class_name"])}
    parts = {"transformer": pipeline.transformer, "vae": pipeline.vae}
    for component, (class_name, config) in pipeline.texts.items():
        index[component] = ("transformers", class_name)
        parts[component] = config
    for component, config in parts.items():
        _write_json(folder / component / "config.json", config)
    _write_json(folder / "scheduler" / "scheduler_config.json", pipeline.scheduler)
    _write_json(folder / "model_index.json", index)
    return folder


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
