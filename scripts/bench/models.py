"""Models of the real shapes with random weights, for benchmarks without a checkpoint."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.convert.replace_linears import convert
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.load.fill import OnLayerLoaded
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3
from halfbyte.trainer.plan.published_configs import FLUX_DEV, SD35_LARGE, SD35_MEDIUM
from halfbyte.trainer.pretrained.pipeline import ModelSource
from scripts.mini.tiny_pipelines import build_flux_pipeline

_VAE = {
    "latent_channels": 16,
    "block_out_channels": [1, 1, 1, 1],
    "shift_factor": 0.1,
    "scaling_factor": 0.36,
}
# Name: family, transformer, skip list, text tokens.
MODELS: dict[str, tuple[type[Family], dict[str, Any], tuple[str, ...], int]] = {
    "flux": (Flux, dict(FLUX_DEV), (), 512),
    "sd35_large": (SD3, dict(SD35_LARGE), ("proj_out",), 333),
    "sd35_medium": (SD3, dict(SD35_MEDIUM), ("proj_out",), 333),
    "flux_mini": (Flux, dict(build_flux_pipeline().transformer.config), (), 64),
}


def family_of(model: str) -> Family:
    """Returns the family over a folder that contains only configurations."""
    family, config, _, tokens = MODELS[model]
    folder = Path(tempfile.mkdtemp())
    for part, name, content in (
        ("transformer", "config.json", config),
        ("vae", "config.json", _VAE),
        ("scheduler", "scheduler_config.json", {"use_dynamic_shifting": True}),
    ):
        (folder / part).mkdir()
        (folder / part / name).write_text(json.dumps(content, default=list))
    return family(ModelSource(model, folder, None), tokens)


def random_denoiser(
    model: str, family: Family, row: str, device: torch.device, place: OnLayerLoaded | None = None
) -> nn.Module:
    """Returns a transformer of the real shapes, filled layer by layer; it never exists in bf16 as a whole.

    row: how the linears are stored: `ours` in 4 bits, `bf16`, or `peer` by bitsandbytes.
    place: called with each quantized layer, see `quant.load.fill`.
    """
    with torch.device("meta"):
        denoiser = family.denoiser_class.from_config(family.denoiser_config).to(torch.bfloat16)
    skip = MODELS[model][2]
    if row == "ours":
        convert(denoiser, QuantRecipe(skip=skip))
    draws = torch.Generator(device).manual_seed(0)

    def drawn(shape: torch.Size, std: float = 0.02) -> torch.Tensor:
        return (torch.randn(shape, device=device, generator=draws) * std).bfloat16()

    for path, module in list(denoiser.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            shape = parameter.shape
            if isinstance(module, Linear4bit) and name == "weight":
                module.quantize(drawn(torch.Size((module.out_features, module.in_features))), path)
                if place is not None:
                    place(path, module)
            elif (
                row == "peer"
                and isinstance(module, nn.Linear)
                and name == "weight"
                and not _skipped(path, skip)
            ):
                continue
            else:
                value = torch.ones(shape, device=device).bfloat16() if len(shape) < 2 else drawn(shape)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(name, drawn(buffer.shape), persistent=False)
        if row == "peer" and isinstance(module, nn.Linear) and not _skipped(path, skip):
            denoiser.set_submodule(path, _bitsandbytes_layer(module, drawn(module.weight.shape)))
    return denoiser.requires_grad_(False)


def _skipped(path: str, skip: tuple[str, ...]) -> bool:
    return path.rpartition(".")[2] in skip


def _bitsandbytes_layer(linear: nn.Linear, weight: torch.Tensor) -> nn.Module:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    if linear.bias is not None:
        layer.bias = nn.Parameter(torch.ones(linear.out_features, dtype=torch.bfloat16), requires_grad=False)
    return layer.to(weight.device)


def graphs_note(recorded: int | None) -> str:
    """Returns a row's note on its CUDA graphs: how many were recorded; None where none were asked for."""
    if recorded is None:
        return ""
    return "CUDA graphs" if recorded else "CUDA graphs NOT recorded"
