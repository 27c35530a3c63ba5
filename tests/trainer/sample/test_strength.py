"""Tests of adapters at different strengths, scaled in place."""

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer as PeftLayer

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.trainer.adapters.saved import LoraLayer
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.sample.source import Adapter
from halfbyte.trainer.sample.strength import AdapterStrength, put_on

from probe import prediction

CPU = torch.device("cpu")
NAMES = ("proj_out", "single_transformer_blocks.1.proj_out", "transformer_blocks.0.attn.to_q", "x_embedder")


@pytest.fixture(scope="module")
def family(mini_flux):
    return FAMILIES["flux"].open(str(mini_flux), None, None)


def base_of(family):
    return load_base(family, QuantRecipe("nf4", compute_dtype=torch.float32), device=CPU, dtype=torch.float32)


def adapter_of(family, *, dora=False):
    """Makes an adapter with a different rank on each layer, and scales that are not powers of two."""
    draws = torch.Generator().manual_seed(0)
    layers = {}
    for rank, name in enumerate(NAMES, start=2):
        layer = base_of(family).get_submodule(name)
        down = torch.randn(rank, layer.in_features, generator=draws) / layer.in_features**0.5
        up = torch.randn(layer.out_features, rank, generator=draws) / 2
        magnitude = None
        if dora:
            magnitude = layer.dequantize(torch.float32).norm(dim=1) * (
                1 + torch.rand(layer.out_features, generator=draws)
            )
        layers[name] = LoraLayer(down, up, 0.3 * rank, magnitude)
    return Adapter("test", layers, "0" * 64)


def merged(family, adapter, strength):
    """Predicts with merged weights: W + s B A; for DoRA, rows are rescaled to the interpolated magnitude."""
    model = base_of(family)
    for name, layer in adapter.layers.items():
        linear = model.get_submodule(name)
        weight = linear.dequantize(torch.float32)
        sum_ = weight + strength * layer.scale * layer.up @ layer.down
        if layer.magnitude is not None:
            base = weight.norm(dim=1)
            magnitude = base + strength * (layer.magnitude - base)
            sum_ = sum_ * (magnitude / sum_.norm(dim=1))[:, None]
        plain = torch.nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        plain.weight.data = sum_
        if linear.bias is not None:
            plain.bias.data = linear.bias.data
        model.set_submodule(name, plain)
    return prediction(model, torch.float32)


@pytest.mark.parametrize("dora", [False, True])
def test_every_strength_matches_merged_weights_in_any_order(family, dora):
    adapter = adapter_of(family, dora=dora)
    denoiser = base_of(family)
    bare = prediction(denoiser, torch.float32)
    put_on(denoiser, adapter, "test")
    strength = AdapterStrength(denoiser)
    for value in (1, 0.3, 0, -0.5, 1):
        strength.set(value)
        found, expected = prediction(denoiser, torch.float32), merged(family, adapter, value)
        assert (found - expected).norm() / expected.norm() < 1e-4, value
        if value == 0:
            assert found.equal(bare), "bitwise identical"
        else:
            assert (found - bare).norm() / bare.norm() > 1e-2


def test_only_the_adapters_layers_get_it_at_their_own_ranks(family):
    """Some names are the end of others: proj_out is also the last layer of each single block."""
    denoiser = base_of(family)
    adapter = adapter_of(family)
    put_on(denoiser, adapter, "test")
    found = {
        name: module.r["default"]
        for name, module in denoiser.named_modules()
        if isinstance(module, PeftLayer)
    }
    assert found == {name: layer.rank for name, layer in adapter.layers.items()}
