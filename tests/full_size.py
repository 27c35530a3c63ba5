"""Folders with the configurations of the full models, and no weights: all that a plan reads."""

import json
from pathlib import Path
from typing import Any

import bench_models

_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.1159,
    "scaling_factor": 0.3611,
}
_T5 = {
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


def _clip(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "projection_dim": width,
    }


def _joint(layers: int, heads: int, positions: int, *, dual: int) -> dict[str, Any]:
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 64 * heads,
        "pooled_projection_dim": 2048,
        "out_channels": 16,
        "pos_embed_max_size": positions,
        "qk_norm": "rms_norm",
        "dual_attention_layers": list(range(dual)),
    }


_FLUX = {"_class_name": "FluxTransformer2DModel", **bench_models.FLUX}
_FLUX_TEXTS = {
    "text_encoder": ("CLIPTextModel", _clip(768, 12, 12)),
    "text_encoder_2": ("T5EncoderModel", _T5),
}
_SD3_TEXTS = {
    "text_encoder": ("CLIPTextModelWithProjection", _clip(768, 12, 12)),
    "text_encoder_2": ("CLIPTextModelWithProjection", _clip(1280, 32, 20)),
    "text_encoder_3": ("T5EncoderModel", _T5),
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, tuple[str, dict[str, Any]]]]] = {
    "flux": (_FLUX, _FLUX_TEXTS),
    "sd35_medium": (_joint(24, 24, 384, dual=13), _SD3_TEXTS),
    "sd35_large": (_joint(38, 38, 192, dual=0), _SD3_TEXTS),
}


def write_configurations(folder: Path, model: str) -> Path:
    """A pipeline folder of `model` without weights."""
    transformer, texts = MODELS[model]
    index: dict[str, Any] = {"transformer": ["diffusers", transformer["_class_name"]]}
    parts = {"transformer": transformer, "vae": _VAE}
    for name, (class_name, config) in texts.items():
        index[name] = ["transformers", class_name]
        parts[name] = config
    for name, config in parts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"use_dynamic_shifting": True}))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
