"""Describes FLUX.1: dev, schnell and all models with their transformer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.flux.blocks import fuse_flux_blocks
from halfbyte.trainer.families.flux.names import flux_names
from halfbyte.trainer.pretrained.fields import COUNT, FLAG, OPTIONAL_WIDTHS
from halfbyte.trainer.pretrained.layer_names import OriginalName
from halfbyte.trainer.pretrained.pipeline import ModelSource
from halfbyte.trainer.pretrained.single_file import check_single_file

_COUNTS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
_BLOCKS = r"(transformer_blocks|single_transformer_blocks)\.\d+\."


class Flux(Family):
    """Latents packed in 2x2 patches with rope ids; T5 and a pooled CLIP; sigma in [0, 1] as the timestep.

    The dev model takes the guidance scale as an input.
    """

    pipeline_class = FluxPipeline
    denoiser_class = FluxTransformer2DModel
    text_components = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    t5_component = "text_encoder_2"
    clip_class = CLIPTextModel
    clip_advice = (
        "The rest reaches the model through T5 only; CLIP adds a summary, so start with what matters most"
    )
    denoiser_fields = {  # noqa: RUF012 - a class constant
        "num_single_layers": COUNT,
        "guidance_embeds": FLAG,
        "axes_dims_rope": OPTIONAL_WIDTHS,
    }
    target_presets = {  # noqa: RUF012 - a class constant
        "attention": _BLOCKS + r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        # Every linear layer in the blocks that sees all tokens. diffusers' training script leaves out
        # proj_mlp and proj_out of the single blocks, which are half of the model.
        "all-linear": _BLOCKS
        + r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)",
    }

    def __init__(self, source: ModelSource, max_sequence_length: int | None) -> None:
        super().__init__(source, max_sequence_length)
        expected = 4 * self.vae_config["latent_channels"]
        if self.denoiser_config["in_channels"] != expected:
            raise RecipeError(
                f"model.path: the transformer of {source.name} takes {self.denoiser_config['in_channels']}"
                f" channels, expected {expected}, as a latent has. FLUX.1 Fill and control models, which take"
                " more inputs, cannot be trained; name FLUX.1-dev, FLUX.1-schnell or a model based on them"
            )

        axes, head = self.denoiser_config.get("axes_dims_rope"), self.denoiser_config["attention_head_dim"]
        if axes is not None and sum(axes) != head:
            raise RecipeError(
                f"model.path: {source.config_file('transformer')}: axes_dims_rope is {axes}, but the sum must be"
                f" attention_head_dim, {head}; download the model again"
            )

    def default_sequence_length(self) -> int:
        """Returns 512 for dev and 256 for schnell, which is recognized by its missing guidance embedding."""
        return 512 if self.denoiser_config["guidance_embeds"] else 256

    def embed(self, pipeline: Any, captions: list[str], device: torch.device) -> TextEmbedding:
        """Returns T5's last hidden state and CLIP's pooled output."""
        prompt_embeds, pooled, _ = pipeline.encode_prompt(
            captions, captions, device=device, max_sequence_length=self.max_sequence_length
        )
        return TextEmbedding(prompt_embeds, pooled)

    def fuse_blocks(self, denoiser: nn.Module, settings: BlockSettings) -> None:
        """Replaces the blocks with those of `flux.blocks`; see `Family.fuse_blocks`."""
        fuse_flux_blocks(denoiser, settings)

    def representable(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns sigma rounded to `dtype`, because the transformer casts it to its hidden states' dtype."""
        return sigma.to(dtype).float()

    def predict(
        self,
        denoiser: Callable[..., Any],
        noisy: Tensor,
        sigma: Tensor,
        text: TextEmbedding,
        guidance_scale: float,
    ) -> Tensor:
        """Returns the predicted velocity; see `Family.predict`."""
        batch, _, height, width = noisy.shape
        guidance = None
        if self.denoiser_config["guidance_embeds"]:
            guidance = torch.full((batch,), guidance_scale, device=noisy.device, dtype=torch.float32)
        velocity = denoiser(
            hidden_states=pack(noisy),
            encoder_hidden_states=text.prompt_embeds,
            pooled_projections=text.pooled_prompt_embeds,
            timestep=sigma,
            img_ids=image_ids(height, width, noisy.device),
            txt_ids=torch.zeros(text.prompt_embeds.shape[1], 3, device=noisy.device),
            guidance=guidance,
            return_dict=False,
        )[0]
        return unpack(velocity, height, width)

    def original_names(self) -> tuple[OriginalName, ...]:
        """Returns the names from `flux.names`."""
        return tuple(flux_names(self.denoiser_config))

    def check_file(self, file: Path) -> None:
        """Raises ValueError if the file is damaged or of another model. FLUX can be read from a single file."""
        check_single_file(self.denoiser_class, file, self.denoiser_config, self.original_names())

    def block_kinds(self) -> tuple[tuple[str, ...], ...]:
        """Returns the dual blocks and the single blocks."""
        return tuple(
            tuple(f"{stem}.{number}" for number in range(self.denoiser_config[count]))
            for stem, count in _COUNTS.items()
        )

    def config_of_blocks(self, blocks: Sequence[str]) -> dict[str, Any]:
        """Returns the configuration of a model with these blocks; see `Family.config_of_blocks`."""
        counts = {
            count: sum(block.startswith(f"{stem}.") for block in blocks) for stem, count in _COUNTS.items()
        }
        return {k: v for k, v in self.denoiser_config.items() if k != "quantization_config"} | counts

    def decodable(self, latents: Tensor, *, height: int, width: int) -> Tensor:
        """Unpacks the pipeline's latents and undoes the VAE's scaling; see `Family.decodable`."""
        unpacked = unpack(latents, height // self.vae_scale, width // self.vae_scale)
        return super().decodable(unpacked, height=height, width=width)

    def describe_guidance(self, guidance_scale: float) -> str:
        """Describes how the guidance scale is used; see `Family.describe_guidance`."""
        if self.denoiser_config["guidance_embeds"]:
            return f"{guidance_scale:g}, as an input of the model"
        return super().describe_guidance(guidance_scale)


def pack(latents: Tensor) -> Tensor:
    """Packs latents (B, C, H, W) into tokens (B, H/2 * W/2, 4C), one per 2x2 patch, channel-major."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpacks tokens (B, H/2 * W/2, 4C) to (B, C, H, W), as the inverse of `pack`; sizes in latent pixels."""
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, features // 4, height, width)


def image_ids(height: int, width: int, device: torch.device) -> Tensor:
    """Returns the tokens' rope positions [0, row, column], (H/2 * W/2, 3) fp32; sizes in latent pixels."""
    rows, columns = torch.meshgrid(
        torch.arange(height // 2, device=device), torch.arange(width // 2, device=device), indexing="ij"
    )
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3).float()
