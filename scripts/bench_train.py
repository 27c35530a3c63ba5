"""Seconds and memory of one training step at full size, ours beside what a user would pick instead.

    python scripts/bench_train.py --rows ours,bf16,peer --px 1024 --compile --json step.json

Random weights of the real shapes, batch 1, LoRA on every linear of the blocks, AdamW. `ours` is the NF4 base with
double quantization in our layers, `bf16` the same adapters over an unquantized base, `peer` diffusers with
bitsandbytes' layers and stock PEFT. Each step is forward, backward and optimizer; medians after warm-up. The mini
model (`--model flux_mini`) runs on the CPU as well. Where halfbyte is not installed, put a folder on PYTHONPATH that
holds it as `.typing` does (scripts/typecheck makes it).
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfbyte.kernels.attention import BACKENDS
from halfbyte.quant.convert import QuantRecipe, convert
from halfbyte.quant.linear import Linear4bit
from halfbyte.trainer.adapters import add_lora, trained_parameters
from halfbyte.trainer.families.base import Family
from halfbyte.trainer.families.block_parts import BlockSettings, Keep
from halfbyte.trainer.families.flux import Flux
from halfbyte.trainer.families.host_store import HostStore
from halfbyte.trainer.families.sd3 import SD3
from halfbyte.trainer.losses import MSE
from halfbyte.trainer.mini import build_flux_pipeline
from halfbyte.trainer.module import DiffusionModule, Objective
from halfbyte.trainer.samples import Batch
from halfbyte.trainer.shift import ResolutionShift
from halfbyte.trainer.source import ModelSource
from halfbyte.trainer.timesteps import LogitNormal
from halfbyte.trainer.weighting import NoWeighting

_VAE = {
    "latent_channels": 16,
    "block_out_channels": [1, 1, 1, 1],
    "shift_factor": 0.1,
    "scaling_factor": 0.36,
}
_FLUX = {
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
_SD35_LARGE = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 38,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
_KEEP: dict[str, Keep] = {
    "none": "everything",
    "selective": "attention",
    "full": "inputs",
    "offload": "inputs",
}
# Family, transformer, skip list, text tokens.
_MODELS: dict[str, tuple[type[Family], dict[str, Any], tuple[str, ...], int]] = {
    "flux": (Flux, _FLUX, (), 512),
    "sd35_large": (SD3, _SD35_LARGE, ("proj_out",), 333),
    "flux_mini": (Flux, dict(build_flux_pipeline().transformer.config), (), 64),
}


def family_of(model: str) -> Family:
    """The family over a folder that holds configurations alone."""
    family, config, _, tokens = _MODELS[model]
    folder = Path(tempfile.mkdtemp())
    for part, name, content in (
        ("transformer", "config.json", config),
        ("vae", "config.json", _VAE),
        ("scheduler", "scheduler_config.json", {"use_dynamic_shifting": True}),
    ):
        (folder / part).mkdir()
        (folder / part / name).write_text(json.dumps(content, default=list))
    return family(ModelSource(model, folder, None), tokens)


def random_denoiser(model: str, family: Family, row: str, device: torch.device) -> nn.Module:
    """A transformer of the real shapes, filled layer by layer on the device: the whole never exists in bf16."""
    with torch.device("meta"):
        denoiser = family.denoiser_class.from_config(family.denoiser_config).to(torch.bfloat16)
    skip = _MODELS[model][2]
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


def measure(arguments: argparse.Namespace, row: str, device: torch.device) -> dict[str, Any]:
    """Builds the model, takes the steps, and gives what they cost."""
    family = family_of(arguments.model)
    denoiser: Any = random_denoiser(arguments.model, family, row, device)
    base = _gib(torch.cuda.memory_allocated() if device.type == "cuda" else 0)
    add_lora(
        denoiser,
        rank=arguments.rank,
        alpha=arguments.rank,
        dropout=0.0,
        targets=family.lora_targets("all-linear"),
        init="gaussian",
        seed=0,
        fused=row != "peer",
    )
    denoiser.to(device)
    if row != "peer":
        # torch compiles what runs layer by layer; a block that runs whole is compiled already.
        settings = BlockSettings(
            "everything" if arguments.compile else _KEEP[arguments.checkpoint],
            store=HostStore() if arguments.checkpoint == "offload" else None,
            whole=arguments.whole and not arguments.compile,
            backend=arguments.attention,
        )
        family.fuse_blocks(denoiser, settings)
    if arguments.checkpoint != "none" and (row == "peer" or arguments.compile):
        denoiser.enable_gradient_checkpointing()
    denoiser.train()
    if arguments.compile:
        denoiser.compile_repeated_blocks(fullgraph=row != "peer")
    module = DiffusionModule(
        family,
        denoiser,
        Objective(
            LogitNormal(name="logit_normal"),
            ResolutionShift(name="resolution"),
            NoWeighting(name="none"),
            MSE(name="mse"),
            1.0,
        ),
        build_optimizer=torch.optim.AdamW,
        lr_factor=lambda step: 1.0,
        compute_dtype=torch.bfloat16,
        max_grad_norm=None,
        seed=0,
    )
    parameters = list(trained_parameters(denoiser).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")
    config, side, tokens = (
        family.denoiser_config,
        arguments.px // family.vae_scale,
        _MODELS[arguments.model][3],
    )

    def step(number: int) -> float:
        batch = Batch(
            (number,),
            torch.zeros(1, 16, side, side),
            torch.ones(1, 16, side, side),
            torch.ones(1, tokens, config["joint_attention_dim"], dtype=torch.bfloat16),
            torch.ones(1, config["pooled_projection_dim"], dtype=torch.bfloat16),
        ).to(device)
        _wait(device)
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = module.loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        assert torch.isfinite(loss), f"{row}: the loss is {loss.item()}"
        return time.perf_counter() - began

    first = step(0)
    for number in range(1, 3):
        step(number)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [step(number) for number in range(3, 3 + arguments.steps)]
    peak = _gib(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)
    return {
        "model": arguments.model,
        "row": row,
        "px": arguments.px,
        "checkpoint": arguments.checkpoint,
        "whole": arguments.whole and not arguments.compile,
        "attention": arguments.attention,
        "compile": arguments.compile,
        "median_s": statistics.median(times),
        "min_s": min(times),
        "first_s": first,
        "base_gib": base,
        "peak_gib": peak,
        "adapter_parameters": sum(parameter.numel() for parameter in parameters),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _gib(count: int) -> float:
    return count / 2**30


def main() -> None:
    """Measures the rows asked for, one after the other, and prints each as it comes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=_MODELS, default="flux")
    parser.add_argument("--rows", default="ours,bf16,peer", help="which of ours, bf16 and peer")
    parser.add_argument("--px", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--checkpoint", choices=_KEEP, default="full", help="train.gradient_checkpointing")
    parser.add_argument("--whole", action=argparse.BooleanOptionalAction, default=True, help="fused blocks")
    parser.add_argument("--attention", choices=BACKENDS, help="without: what needs no probe")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--json", type=Path, help="append each row to this file, one JSON object a line")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # cuDNN's attention faults in FLUX's backward.
    torch.backends.cuda.enable_cudnn_sdp(False)
    for row in arguments.rows.split(","):
        result = measure(arguments, row, device)
        print(
            f"{result['row']:5} {result['px']} px checkpoint={result['checkpoint']} compile={result['compile']}"
            f" whole={result['whole']} attention={result['attention']}:"
            f" {result['median_s']:.3f} s (min {result['min_s']:.3f}, first {result['first_s']:.1f}),"
            f" base {result['base_gib']:.2f} peak {result['peak_gib']:.2f} GiB",
            flush=True,
        )
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(result) + "\n")
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
