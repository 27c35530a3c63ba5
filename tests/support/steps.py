"""Builds training steps of a miniature: module, transformer with adapters, and batches."""

import torch

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.trainer.adapters.lora import add_lora, trained_parameters
from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.objective.losses import MSE
from halfbyte.trainer.objective.shift import ResolutionShift
from halfbyte.trainer.objective.timesteps import LogitNormal
from halfbyte.trainer.objective.weighting import CosMapWeighting
from halfbyte.trainer.training.module import DiffusionModule, Objective


def family_at(folder, family_class):
    """Opens a miniature with captions of 24 tokens."""
    return family_class.open(str(folder), None, 24)


def module_of(family, denoiser, dtype, seed=3):
    return DiffusionModule(
        family,
        denoiser,
        Objective(
            LogitNormal(name="logit_normal"),
            ResolutionShift(name="resolution"),
            CosMapWeighting(name="cosmap"),
            MSE(name="mse"),
            guidance_scale=2.0,
        ),
        build_optimizer=torch.optim.AdamW,
        lr_factor=lambda step: 1.0,
        compute_dtype=dtype,
        max_grad_norm=None,
        seed=seed,
    )


def adapted(family, *, dtype, fused=True, settings=None):
    """Returns the NF4 transformer on the CPU with adapters whose A and B are both random."""
    recipe = QuantRecipe(quant_type="nf4", double_quant=True, compute_dtype=dtype)
    denoiser = load_base(family, recipe, device=torch.device("cpu"), dtype=dtype)
    targets = family.lora_targets("all-linear")
    add_lora(denoiser, rank=4, alpha=8, dropout=0.0, targets=targets, init="gaussian", seed=1, fused=fused)
    if fused:
        family.fuse_blocks(denoiser, settings or BlockSettings())
    draws = torch.Generator().manual_seed(7)
    for name, parameter in trained_parameters(denoiser).items():
        if ".lora_B." in name:  # with B = 0, A would have no gradient
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=draws))
    return denoiser


def batch_for(family, positions=(0, 5)):
    """Returns a random batch of images of 8 x 8 latent pixels; the positions do not change its values."""
    draws = torch.Generator().manual_seed(11)
    config = family.denoiser_config
    text = torch.randn(len(positions), 24, config["joint_attention_dim"], generator=draws)
    pooled = torch.randn(len(positions), config["pooled_projection_dim"], generator=draws)
    shape = (len(positions), 16, 8, 8)
    return Batch(
        positions,
        torch.randn(shape, generator=draws),
        torch.rand(shape, generator=draws) * 0.1,
        text.bfloat16(),
        pooled.bfloat16(),
    )


def text_of(family: Family, seed: int) -> TextEmbedding:
    """Returns random embeddings of one caption."""
    draws, config = torch.Generator().manual_seed(seed), family.denoiser_config
    return TextEmbedding(
        torch.randn(1, 24, config["joint_attention_dim"], generator=draws),
        torch.randn(1, config["pooled_projection_dim"], generator=draws),
    )
