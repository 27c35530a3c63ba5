"""Device memory of a pipeline's frozen encoders and its VAE decoder, computed from their configurations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import T5EncoderModel

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.load.on_meta import model_on_meta, weight_tensors
from halfbyte.quant.load.text_encoder import text_config, text_encoder_on_meta
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.offload.block_stream import Visitors
from halfbyte.trainer.families.t5 import T5Setting, bf16_bytes, resolve_quant, t5_block_names
from halfbyte.trainer.plan.memory_tracker import LiveBytes
from halfbyte.trainer.pretrained.component import PIPELINE

_DTYPE = torch.bfloat16  # the dtype that `data.prepare` loads text encoders in


def text_encoder_bytes(family: Family, t5_quant: T5Setting, stream_t5: bool) -> tuple[dict[str, int], int]:
    """Returns the device bytes of each text encoder, and the bytes of T5 that stay in host memory.

    Raises:
        RecipeError: a configuration does not describe a text encoder.
    """
    listed = family.source.pipeline_index()
    sizes, on_host = {}, 0
    for component in family.text_components:
        if component.startswith("tokenizer"):
            continue
        is_t5 = component == family.t5_component
        if is_t5:
            encoder: nn.Module = _t5(family, t5_quant)
        else:
            model_cls: Any = getattr(transformers, listed[component][1])
            encoder = _encoder(model_cls, family.source.folder / component, None, PIPELINE)
        visitors = Visitors(encoder, t5_block_names(encoder) if is_t5 and stream_t5 else ())
        sizes[component] = _weights(encoder, visitors)
        on_host += visitors.host_bytes
    return sizes, on_host


def auto_in_bf16(family: Family, t5_quant: T5Setting, stream_t5: bool) -> int | None:
    """Returns the free device memory from which `auto` loads T5 in bf16; None if that is no choice of the recipe.

    Raises:
        RecipeError: the configuration does not describe a T5.
    """
    path, named_by = family.t5.path, family.t5.setting
    if t5_quant != "auto" or stream_t5 or resolve_quant("auto", path, named_by=named_by) == "none":
        return None
    return bf16_bytes(path)


def text_working_bytes(family: Family) -> int:
    """Returns the bytes of T5's activations at their peak, for one caption, in fp32.

    At the peak three (heads, tokens, tokens) score matrices and the MLP's two inner activations are alive.
    """
    try:
        config: Any = text_config(T5EncoderModel, family.t5.path)
    except ValueError as error:
        raise RecipeError(f"{family.t5.setting}: {error}") from error
    tokens = family.max_sequence_length
    return 4 * (3 * config.num_heads * tokens**2 + tokens * (2 * config.d_ff + 4 * config.d_model))


def picture_encoder_bytes(family: Family, dtype: torch.dtype, width: int, height: int) -> tuple[int, int]:
    """Returns the bytes of (weights, activations) of the VAE's encoder, for one image. width, height: pixels."""
    vae: Any = model_on_meta(AutoencoderKL, family.vae_config, None, dtype)
    pixels = torch.empty(1, 3, height, width, dtype=dtype, device="meta")
    return _weights(vae), _working(lambda: vae.encode(pixels), channels_last=True)


def decoder_bytes(family: Family, dtype: torch.dtype, width: int, height: int) -> tuple[int, int]:
    """Returns the bytes of (weights, activations) of the VAE's decoder, which sampling uses in `dtype`.

    width, height: pixels.
    """
    vae: Any = model_on_meta(AutoencoderKL, family.vae_config, None, dtype)
    scale, channels = family.vae_scale, family.vae_config["latent_channels"]
    latents = torch.empty(1, channels, height // scale, width // scale, dtype=dtype, device="meta")
    return _weights(vae), _working(lambda: vae.decode(latents))


def _t5(family: Family, asked: T5Setting) -> nn.Module:
    """Builds T5 on meta, in its stored format if that is already quantized, else in the `asked` format."""
    t5 = family.t5
    quant = resolve_quant(asked, t5.path, named_by=t5.setting)
    recipe = None if quant == "none" else QuantRecipe(quant, compute_dtype=_DTYPE)
    return _encoder(T5EncoderModel, t5.path, recipe, t5.setting)


def _encoder(model_cls: Any, folder: Path, recipe: QuantRecipe | None, named_by: str) -> nn.Module:
    try:
        encoder: nn.Module = text_encoder_on_meta(model_cls, folder, recipe, _DTYPE)
    except ValueError as error:
        raise RecipeError(f"{named_by}: {error}") from error
    return encoder


def _weights(model: nn.Module, visitors: Visitors | None = None) -> int:
    visitors = visitors or Visitors(model, ())
    tensors = [tensor for module in model.modules() for tensor in weight_tensors(module)]
    held = [tensor for tensor in tensors if tensor.is_meta and id(tensor) not in visitors.tensors]
    return LiveBytes().hold([*held, *visitors.rooms], "weights")


def _working(run: Callable[[], object], *, channels_last: bool = False) -> int:
    live = LiveBytes()
    with live, _AsOnCuda(channels_last), torch.no_grad():
        run()
    return live.peak.nbytes


class _AsOnCuda(TorchFunctionMode):
    """Makes meta tensors use memory as CUDA does.

    Attention allocates no matrix of scores. A convolution in cuDNN copies its input and its output unless
    they are channels-last (measured, torch 2.11 on an H200).
    """

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self._channels_last = channels_last

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces attention and adds the copies of convolutions; torch calls it for every function."""
        if func is nn.functional.scaled_dot_product_attention:
            query: Tensor = args[0]
            return torch.empty_like(query)
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.conv2d and not self._channels_last:
            copies = torch.empty_like(args[0]), torch.empty_like(result)
            del copies
        return result
