"""SD3's blocks as one autograd function each, compared with the same blocks run layer by layer."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.convert.replace_linears import convert
from halfbyte.trainer.adapters.lora import add_lora, trained_parameters
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.sd3.blocks import fuse_sd3_blocks
from halfbyte.trainer.families.sd3.family import SD3


def denoiser(settings, *, qk_norm="rms_norm", dual_layers=(), targets=None):
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=64,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=8,
        qk_norm=qk_norm,
        dual_attention_layers=dual_layers,
    )
    for name, parameter in model.named_parameters():
        if "norm_" in name and name.endswith("weight") and parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.requires_grad_(False)
    convert(model, QuantRecipe(compute_dtype=torch.float32, skip=("proj_out",)))
    targets = targets or SD3.target_presets["all-linear"]
    add_lora(model, rank=3, alpha=6, dropout=0.0, targets=targets, init="gaussian", seed=1)
    draws = torch.Generator().manual_seed(7)
    for name, parameter in trained_parameters(model).items():
        if ".lora_B." in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=draws))
    fuse_sd3_blocks(model, settings)
    return model.train()


def step(model):
    draws = torch.Generator().manual_seed(0)
    output = model(
        hidden_states=torch.randn(2, 4, 8, 8, generator=draws),
        encoder_hidden_states=torch.randn(2, 5, 48, generator=draws),
        pooled_projections=torch.randn(2, 24, generator=draws),
        timestep=torch.full((2,), 500.0),
        return_dict=False,
    )[0]
    # Walk autograd's graph to count the blocks that ran as one function.
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    whole = sum(node.name() == "DualBlockFunctionBackward" for node in seen)
    parameters = trained_parameters(model)
    grads = torch.autograd.grad(output.square().sum(), list(parameters.values()))
    return output, dict(zip(parameters, grads, strict=True)), whole


@pytest.mark.parametrize("keep", ["inputs", "attention", "everything"])
@pytest.mark.parametrize(
    ("qk_norm", "dual_layers", "whole_blocks"), [("rms_norm", (), 3), (None, (), 3), ("rms_norm", (0, 1), 1)]
)
def test_fused_blocks_equal_the_layers_one_by_one(keep, qk_norm, dual_layers, whole_blocks):
    options = {"qk_norm": qk_norm, "dual_layers": dual_layers}
    expected, expected_grads, none = step(denoiser(BlockSettings(whole=False), **options))
    output, grads, whole = step(denoiser(BlockSettings(keep), **options))
    assert (none, whole) == (0, whole_blocks)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for name, wanted in expected_grads.items():
        assert (grads[name] - wanted).norm() <= 1e-4 * wanted.norm(), name


def test_a_trained_modulation_gets_its_gradients():
    targets = r"transformer_blocks\.\d+\.(norm1(_context)?\.linear|attn\.to_q)"
    expected, expected_grads, _ = step(denoiser(BlockSettings(whole=False), targets=targets))
    output, grads, whole = step(denoiser(BlockSettings("inputs"), targets=targets))
    assert whole == 3
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for name, wanted in expected_grads.items():
        assert (grads[name] - wanted).norm() <= 1e-4 * wanted.norm(), name
