"""Stable Diffusion 3 and 3.5."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.sd3.blocks import fuse_sd3_blocks
from halfbyte.trainer.families.sd3.names import sd3_names
from halfbyte.trainer.pretrained.layer_names import OriginalName

_BLOCKS = r"transformer_blocks\.\d+\."
# attn2 is the second, image-only attention of SD3.5 medium's first blocks.
_ATTENTION = r"attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"


class SD3(Family):
    """Unpacked latents, two CLIPs and T5 on one sequence, timesteps from 0 to 1000."""

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
    target_presets = {  # noqa: RUF012 - a class constant
        "attention": _BLOCKS + _ATTENTION,
        "all-linear": _BLOCKS + rf"({_ATTENTION}|ff(_context)?\.net\.(0\.proj|2))",
    }

    def default_sequence_length(self) -> int:
        """256, as the stock pipeline pads T5; CLIP's 77 tokens come before them."""
        return 256

    @property
    def largest_side(self) -> int | None:
        """That of its table of positions, of which a smaller picture has the middle."""
        # A configuration may leave out what is diffusers' default.
        patches: int | None = self.denoiser_config.get("pos_embed_max_size", 96)
        return None if patches is None else patches * self.size_multiple

    @property
    def text_tokens(self) -> int:
        """T5's, behind the 77 of the CLIPs."""
        return 77 + self.max_sequence_length

    def embed(self, pipeline: Any, captions: list[str], device: torch.device) -> TextEmbedding:
        """CLIP-L and CLIP-G beside T5 on the sequence, their pooled outputs side by side."""
        prompt_embeds, _, pooled, _ = pipeline.encode_prompt(
            captions,
            captions,
            captions,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return TextEmbedding(prompt_embeds, pooled)

    def fuse_sd3_blocks(self, denoiser: nn.Module, settings: BlockSettings) -> None:
        """Each block as one function where it can be; else queries, keys and values from one product."""
        fuse_sd3_blocks(denoiser, settings)

    def predict(
        self,
        denoiser: Callable[..., Any],
        noisy: Tensor,
        sigma: Tensor,
        text: TextEmbedding,
        guidance_scale: float,
    ) -> Tensor:
        """The predicted velocity; see `Family.predict`. SD3 has no guidance input."""
        velocity: Tensor = denoiser(
            hidden_states=noisy,
            encoder_hidden_states=text.prompt_embeds,
            pooled_projections=text.pooled_prompt_embeds,
            timestep=sigma * 1000,
            return_dict=False,
        )[0]
        return velocity

    def original_names(self) -> tuple[OriginalName, ...]:
        """See `sd3_names`."""
        return tuple(sd3_names(self.denoiser_config))

    def block_kinds(self) -> tuple[tuple[str, ...], ...]:
        """Blocks with a second attention, plain ones, and the last, which leaves the text as it is."""
        dual, count = self._dual_attention(), self.denoiser_config["num_layers"]
        first = [number for number in range(count - 1) if number in dual]
        plain = [number for number in range(count - 1) if number not in dual]
        kinds = (sorted(first), plain, [count - 1])
        return tuple(tuple(f"transformer_blocks.{number}" for number in kind) for kind in kinds if kind)

    def config_of_blocks(self, blocks: Sequence[str]) -> dict[str, Any]:
        """See `Family.config_of_blocks`; the last block must come last."""
        numbers = [int(block.rpartition(".")[2]) for block in blocks]
        dual = [place for place, number in enumerate(numbers) if number in self._dual_attention()]
        config = {k: v for k, v in self.denoiser_config.items() if k != "quantization_config"}
        return config | {"num_layers": len(numbers), "dual_attention_layers": dual}

    def _dual_attention(self) -> tuple[int, ...]:
        return tuple(self.denoiser_config.get("dual_attention_layers") or ())

    def sampling_inputs(self, text: TextEmbedding, empty: TextEmbedding) -> dict[str, Tensor]:
        """Classifier-free guidance is against the empty caption."""
        return super().sampling_inputs(text, empty) | {
            "negative_prompt_embeds": empty.prompt_embeds,
            "negative_pooled_prompt_embeds": empty.pooled_prompt_embeds,
        }
