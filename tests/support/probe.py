"""One forward of a tiny denoiser on fixed noise, to compare two models that should agree."""

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn


def inputs(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor | bool]:
    config = model.config
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tokens, texts = 16, 6
    timestep = torch.tensor([0.5], dtype=dtype)
    if isinstance(model, FluxTransformer2DModel):
        return {
            "hidden_states": noise(1, tokens, config.in_channels),
            "encoder_hidden_states": noise(1, texts, config.joint_attention_dim),
            "pooled_projections": noise(1, config.pooled_projection_dim),
            "timestep": timestep,
            "guidance": torch.ones(1, dtype=dtype) if config.guidance_embeds else None,
            "img_ids": torch.zeros(tokens, 3),
            "txt_ids": torch.zeros(texts, 3),
            "return_dict": False,
        }
    return {
        "hidden_states": noise(1, config.in_channels, 8, 8),
        "encoder_hidden_states": noise(1, texts, config.joint_attention_dim),
        "pooled_projections": noise(1, config.pooled_projection_dim),
        "timestep": timestep * 1000,
        "return_dict": False,
    }


def prediction(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Returns the prediction in train mode, in which bitsandbytes multiplies by the weight that it stores."""
    model.train()
    with torch.no_grad():
        output: Tensor = model(**inputs(model, dtype))[0]
    return output
