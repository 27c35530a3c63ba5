"""Describes Stable Diffusion 3 and 3.5."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.sd3.blocks import fuse_sd3_blocks
from halfbyte.trainer.families.sd3.names import sd3_names
from halfbyte.trainer.pretrained.fields import OPTIONAL_COUNT, OPTIONAL_NUMBERS
from halfbyte.trainer.pretrained.layer_names import OriginalName

_BLOCKS = r"transformer_blocks\.\d+\."
# attn2: the second attention of SD3.5 medium's first blocks, over the image only.
_ATTENTION = r"attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"


class SD3(Family):
    """Unpacked latents; two CLIPs and T5 joined in one text sequence; timesteps from 0 to 1000."""

    pipeline_class = StableDiffusion3Pipeline
    denoiser_class = SD3Transformer2DModel
    text_components = (
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    )
    t5_component = "text_encoder_3"
    clip_class = CLIPTextModelWithProjection
    clip_advice = "The rest reaches the model through T5 only, so start with what matters most"
    denoiser_fields = {  # noqa: RUF012 - a class constant
        "pos_embed_max_size": OPTIONAL_COUNT,
        "dual_attention_layers": OPTIONAL_NUMBERS,
    }
    target_presets = {  # noqa: RUF012 - a class constant
        "attention": _BLOCKS + _ATTENTION,
        "all-linear": _BLOCKS + rf"({_ATTENTION}|ff(_context)?\.net\.(0\.proj|2))",
    }

    def default_sequence_length(self) -> int:
        """Returns 256, the stock pipeline's padding of T5. CLIP's 77 tokens come before these."""
        return 256

    @property
    def largest_side(self) -> int | None:
        """The side of its table of positions, in pixels. A smaller image uses the table's middle."""
        # A configuration may leave out the setting if it has diffusers' default.
        patches: int | None = self.denoiser_config.get("pos_embed_max_size", 96)
        return None if patches is None else patches * self.size_multiple

    @property
    def text_tokens(self) -> int:
        """The CLIPs' 77 tokens and T5's after them."""
        return 77 + self.max_sequence_length

    def embed(self, pipeline: Any, captions: list[str], device: torch.device) -> TextEmbedding:
        """Returns the CLIPs' and T5's outputs joined along the sequence, and the CLIPs' pooled outputs."""
        prompt_embeds, _, pooled, _ = pipeline.encode_prompt(
            captions,
            captions,
            captions,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return TextEmbedding(prompt_embeds, pooled)

    def fuse_blocks(self, denoiser: nn.Module, settings: BlockSettings) -> None:
        """Replaces the blocks with those of `sd3.blocks`; see `Family.fuse_blocks`."""
        fuse_sd3_blocks(denoiser, settings)

    def predict(
        self,
        denoiser: Callable[..., Any],
        noisy: Tensor,
        sigma: Tensor,
        text: TextEmbedding,
        guidance_scale: float,
    ) -> Tensor:
        """Returns the predicted velocity; see `Family.predict`. SD3 has no guidance input."""
        velocity: Tensor = denoiser(
            hidden_states=noisy,
            encoder_hidden_states=text.prompt_embeds,
            pooled_projections=text.pooled_prompt_embeds,
            timestep=sigma * 1000,
            return_dict=False,
        )[0]
        return velocity

    def original_names(self) -> tuple[OriginalName, ...]:
        """Returns the names from `sd3.names`."""
        return tuple(sd3_names(self.denoiser_config))

    def block_kinds(self) -> tuple[tuple[str, ...], ...]:
        """Returns blocks with a second attention, plain blocks, and the last, which ignores the text."""
        dual, count = self._dual_attention(), self.denoiser_config["num_layers"]
        first = [number for number in range(count - 1) if number in dual]
        plain = [number for number in range(count - 1) if number not in dual]
        kinds = (sorted(first), plain, [count - 1])
        return tuple(tuple(f"transformer_blocks.{number}" for number in kind) for kind in kinds if kind)

    def config_of_blocks(self, blocks: Sequence[str]) -> dict[str, Any]:
        """Returns a model's configuration, see `Family.config_of_blocks`; the last block must come last."""
        numbers = [int(block.rpartition(".")[2]) for block in blocks]
        dual = [place for place, number in enumerate(numbers) if number in self._dual_attention()]
        config = {k: v for k, v in self.denoiser_config.items() if k != "quantization_config"}
        return config | {"num_layers": len(numbers), "dual_attention_layers": dual}

    def _dual_attention(self) -> tuple[int, ...]:
        return tuple(self.denoiser_config.get("dual_attention_layers") or ())

    def sampling_inputs(self, text: TextEmbedding, empty: TextEmbedding) -> dict[str, Tensor]:
        """Adds the empty caption as the negative prompt of classifier-free guidance."""
        return super().sampling_inputs(text, empty) | {
            "negative_prompt_embeds": empty.prompt_embeds,
            "negative_pooled_prompt_embeds": empty.pooled_prompt_embeds,
        }
