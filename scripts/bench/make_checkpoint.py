"""Writes a pipeline with a published model's shapes and random weights, to try a full-size run without the Hub.

    python -m scripts.bench.make_checkpoint FOLDER [--model flux|sd35_large] [--size full|toy]
        [--parts transformer,vae,...]

The files are bf16 safetensors in shards, as on the Hub. The tokenizers are those of the mini pipelines.
Weights are generated on the GPU if there is one, in seconds; most of the time goes to the disk. `--size toy`
writes the same files with a few million parameters. Sizes on the disk at full size, in GB:

    model                                   transformer  T5-XXL  CLIP-L  CLIP-G   VAE   total
    flux: FLUX.1-dev                               23.8     9.5     0.2             0.2    33.7
    sd35_large: Stable Diffusion 3.5 large         16.3     9.5     0.2     1.4     0.2    27.6
"""

import argparse
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from halfbyte.quant.files.shards import TEXT_WEIGHTS_FILE, WEIGHTS_FILE, write_weights
from halfbyte.trainer.plan.published_configs import PUBLISHED, Config, Pipeline
from scripts.mini.tiny_pipelines import build_flux_pipeline, build_sd3_pipeline


@dataclass(frozen=True)
class Model:
    """A published model, and the smaller sizes of its toy version."""

    published: str  # its name on the Hub
    miniature: Callable[[], Any]  # a pipeline of the same class, whose tokenizers are taken
    toy: Mapping[str, Config]  # by component


_TOY_VAE = {"block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8}
_TOY_T5 = {"d_ff": 256, "num_layers": 2, "num_heads": 4}


def _toy_clip(width: int, layers: int) -> Config:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    return {**sizes, "num_hidden_layers": layers, "num_attention_heads": width // 64}


MODELS = {
    "flux": Model(
        "black-forest-labs/FLUX.1-dev",
        build_flux_pipeline,
        {
            "transformer": {
                "num_layers": 2,
                "num_single_layers": 3,
                "attention_head_dim": 32,
                "num_attention_heads": 4,
                "joint_attention_dim": 128,
                "pooled_projection_dim": 64,
                "axes_dims_rope": (8, 12, 12),
            },
            "text_encoder": _toy_clip(64, layers=2),
            "text_encoder_2": {**_TOY_T5, "d_model": 128},
            "vae": _TOY_VAE,
        },
    ),
    "sd35_large": Model(
        "stabilityai/stable-diffusion-3.5-large",
        build_sd3_pipeline,
        {
            "transformer": {
                "num_layers": 3,
                "num_attention_heads": 3,
                "caption_projection_dim": 192,
                "joint_attention_dim": 256,  # wider than both CLIPs concatenated, as in the full model
                "pooled_projection_dim": 192,
                "pos_embed_max_size": 32,
            },
            "text_encoder": _toy_clip(64, layers=2),
            "text_encoder_2": _toy_clip(128, layers=3),
            "text_encoder_3": {**_TOY_T5, "d_model": 256},
            "vae": _TOY_VAE,
        },
    ),
}
SHARD_BYTES = {"full": 9_990_000_000, "toy": 1_000_000}
"""Of the transformer, by size; text encoders are in files of half as much."""


def make_checkpoint(
    folder: Path, model: str, size: str, device: torch.device, parts: Collection[str] | None = None
) -> None:
    """Writes the pipeline, or some of its parts' weights; prints how long each took.

    model: of MODELS. size: of SHARD_BYTES. parts: of `parts_of`; None: all.
    """
    pipeline = empty_pipeline(model, size)
    for part in parts_of(model) if parts is None else parts:
        began = time.perf_counter()
        _write(getattr(pipeline, part), folder / part, SHARD_BYTES[size], device)
        written = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        print(
            f"{part}: {time.perf_counter() - began:.1f} s, {written / 1e9:.1f} GB in all so far", flush=True
        )
    for name, component in pipeline.components.items():
        if component is not None and not isinstance(component, nn.Module):
            component.save_pretrained(folder / name)
    pipeline.save_config(folder)


def shapes_of(model: str, size: str) -> Pipeline:
    """Returns the configurations of a model's components, or those of its toy version."""
    published, toy = PUBLISHED[MODELS[model].published], MODELS[model].toy
    if size == "full":
        return published
    return replace(
        published,
        transformer={**published.transformer, **toy["transformer"]},
        vae={**published.vae, **toy["vae"]},
        texts={part: (name, {**config, **toy[part]}) for part, (name, config) in published.texts.items()},
    )


def parts_of(model: str) -> tuple[str, ...]:
    """Returns the names of the components that have weights."""
    return ("transformer", *PUBLISHED[MODELS[model].published].texts, "vae")


def empty_pipeline(model: str, size: str) -> DiffusionPipeline:
    """Returns the pipeline with its parameters on meta; only the tables of positions have values."""
    shapes, miniature = shapes_of(model, size), MODELS[model].miniature()
    components = {
        **miniature.components,
        "scheduler": FlowMatchEulerDiscreteScheduler.from_config(shapes.scheduler),
    }
    with init_empty_weights():
        denoiser = getattr(diffusers, shapes.transformer["_class_name"])
        components["transformer"] = denoiser.from_config(shapes.transformer)
        components["vae"] = AutoencoderKL.from_config(shapes.vae)
        for part, (name, config) in shapes.texts.items():
            encoder = getattr(transformers, name)
            tokenizer = components[part.replace("text_encoder", "tokenizer")]
            tokens = {
                id_: getattr(tokenizer, id_) for id_ in ("bos_token_id", "eos_token_id", "pad_token_id")
            }
            components[part] = encoder(encoder.config_class.from_dict({**config, **tokens}))
    pipeline: DiffusionPipeline = type(miniature)(**components)
    return pipeline


def _write(model: Any, folder: Path, shard_bytes: int, device: torch.device) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draws = torch.Generator(device).manual_seed(0)
    # T5's shared embedding is saved once, as on the Hub.
    tied = getattr(model, "_tied_weights_keys", None) or ()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    groups = (
        {name: _drawn(name, tensor.shape, draws) if tensor.is_meta else tensor.bfloat16()}
        for name, tensor in tensors.items()
    )
    if isinstance(model, diffusers.ModelMixin):
        write_weights(groups, folder, max_shard_bytes=shard_bytes, weights_file=WEIGHTS_FILE)
        model.save_config(folder)
    else:
        write_weights(groups, folder, max_shard_bytes=shard_bytes // 2, weights_file=TEXT_WEIGHTS_FILE)
        model.config.save_pretrained(folder)


def _drawn(name: str, shape: torch.Size, draws: torch.Generator) -> Tensor:
    """Returns random weights that preserve the scale of activations; norms are one and biases zero."""
    tensor = torch.empty(shape, dtype=torch.bfloat16, device=draws.device)
    if len(shape) <= 1:
        return tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    if name.endswith(("shared.weight", "relative_attention_bias.weight")):
        return tensor.normal_(generator=draws)
    fan_in = shape[1:].numel()
    # T5 does not scale its attention; the weights of its queries contain the scale.
    scale = 1 / 8 if name.endswith("SelfAttention.q.weight") else 1.0
    return tensor.normal_(std=scale * fan_in**-0.5, generator=draws)


def main() -> None:
    """Reads the command line and writes the pipeline."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--size", choices=SHARD_BYTES, default="full")
    parser.add_argument(
        "--parts", help="components whose weights to write, separated by commas; default: all"
    )
    arguments = parser.parse_args()
    parts = known = parts_of(arguments.model)
    if arguments.parts is not None:
        parts = tuple(arguments.parts.split(","))
    if unknown := set(parts) - set(known):
        parser.error(f"--parts: got {', '.join(sorted(unknown))}, accepted: {', '.join(known)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_checkpoint(arguments.folder, arguments.model, arguments.size, device, parts)


if __name__ == "__main__":
    main()
