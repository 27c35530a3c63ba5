"""Loads the VAE, the CLIPs and the tokenizers of a pipeline with all checks, and puts stock pipelines together.

`from_pretrained` of the stock pipeline does not check what it loads: it fills missing weights with random
numbers, reads pickled files, and can run code from a model's repository. The models here hold bitwise the same
weights.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import PreTrainedModel, T5EncoderModel

from halfbyte.quant.load.text_encoder import load_text_encoder, text_config
from halfbyte.quant.load.transformer import load_quantized
from halfbyte.trainer.families.family import Family, blame
from halfbyte.trainer.families.requirements import build_scheduler, tokenizer_classes, tokenizer_of
from halfbyte.trainer.families.tokenizing import load_tokenizer
from halfbyte.trainer.pretrained.component import Component


def load_vae(family: Family, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Loads the VAE.

    Raises:
        RecipeError: A tensor is missing, unexpected, of another shape or not finite.
    """
    with blame(family.vae):
        vae: nn.Module = load_quantized(AutoencoderKL, family.vae.path, None, dtype=dtype, device=device)
    return vae.requires_grad_(False)


def load_clips(family: Family, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """Loads all text encoders except T5, by component; raises as `load_vae` does."""
    clips: dict[str, nn.Module] = {}
    for name, clip in family.clips.items():
        with blame(clip):
            clips[name] = load_text_encoder(family.clip_class, clip.path, None, dtype=dtype, device=device)
    return clips


def load_tokenizers(family: Family) -> dict[str, Any]:
    """Loads the tokenizers by component.

    Raises:
        RecipeError: A file is missing or damaged, or a tokenizer does not fit its text encoder.
    """
    clips = {
        tokenizer_of(name): _tokenizer(family, tokenizer_of(name), clip, family.clip_class)
        for name, clip in family.clips.items()
    }
    return clips | {tokenizer_of(family.t5_component): load_t5_tokenizer(family)}


def load_t5_tokenizer(family: Family) -> Any:
    """Loads T5's tokenizer. Raises RecipeError, see `load_tokenizers`."""
    return _tokenizer(family, tokenizer_of(family.t5_component), family.t5, T5EncoderModel)


def _tokenizer(family: Family, name: str, encoder: Component, encoder_cls: type[PreTrainedModel]) -> Any:
    with blame(encoder):
        config = text_config(encoder_cls, encoder.path)
    return load_tokenizer(
        tokenizer_classes(family.text_components, family.t5_component)[name],
        family.source.folder / name,
        vocabulary=config.vocab_size,
        longest=getattr(config, "max_position_embeddings", None),
    )


def stock_pipeline(family: Family, **parts: Any) -> Any:
    """Returns the family's stock pipeline with these components and the scheduler, and without any others."""
    absent = dict.fromkeys(family.components())
    return family.pipeline_class(**{**absent, "scheduler": build_scheduler(family.source), **parts})
