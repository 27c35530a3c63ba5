"""Tests that compiled blocks compute the same as eager ones, with one graph per kind of block at any strength."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight
from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.lora import linear_group
from halfbyte.trainer.adapters.lora import add_lora, trained_parameters
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.sample.draw import compile_blocks
from halfbyte.trainer.sample.strength import AdapterStrength

from probe import inputs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def adapted(kind, model, *, compiled, whole=True):
    family = FAMILIES[kind].open(str(model), None, None)
    recipe = QuantRecipe("nf4", compute_dtype=torch.float32)
    denoiser = load_base(family, recipe, device=CPU, dtype=torch.float32)
    add_lora(
        denoiser,
        rank=4,
        alpha=8,
        dropout=0.0,
        targets=family.lora_targets("all-linear"),
        init="gaussian",
        seed=0,
    )
    draws = torch.Generator().manual_seed(1)
    for name, parameter in trained_parameters(denoiser).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=draws)
    family.fuse_blocks(denoiser, BlockSettings("inputs", whole=whole, backend="cpu"))
    if compiled:
        compile_blocks(denoiser, family)
    return denoiser.eval()


def forward(denoiser):
    with torch.no_grad():
        return denoiser(**inputs(denoiser, torch.float32))[0]


def apart(one, other):
    return (one - other).norm() / other.norm()


def stack_weight(out, *fields):
    """Computes the kernel's result in plain torch."""
    *weight, up, scale, first, columns = fields
    packed = PackedWeight.of(tuple(weight))
    width = packed.shape[1]
    assert out.shape == (packed.shape[0], width + columns)
    out[:, :width] = packed.dequantize(out.dtype)
    out[:, width:] = 0
    if up is not None:
        out[:, width + first : width + first + up.shape[1]] = up * scale


@pytest.mark.usefixtures("traced")
def test_stacked_weights_compile_and_strengths_share_a_graph(mini_sd3, monkeypatch):
    """Stacks weights as on a GPU, where an op dequantizes each weight of a product into its part of one matrix."""
    eager, compiled = (adapted("sd3", mini_sd3, compiled=flag) for flag in (False, True))
    strengths = [AdapterStrength(denoiser) for denoiser in (eager, compiled)]
    expected = []
    for strength in (1, 0.5, 0):
        strengths[0].set(strength)
        expected.append(forward(eager))
    assert apart(expected[1], expected[0]) > 1e-2
    monkeypatch.setattr(linear_group, "stackable", lambda weight: True)
    with torch.library._scoped_library("halfbyte", "IMPL") as library:
        library.impl("stack_weight_", stack_weight, "CPU")
        strengths[1].set(1)
        assert apart(forward(compiled), expected[0]) < 1e-5
        # One graph for each kind of block: with two attentions, plain, and the last. One of them stacks its products.
        graphs = counters["stats"]["unique_graphs"]
        assert graphs == 3
        strengths[1].set(0.5)
        assert apart(forward(compiled), expected[1]) < 1e-5
        assert counters["stats"]["unique_graphs"] == graphs, "scaling in place compiles nothing again"
        strengths[1].set(0)
        assert apart(forward(compiled), expected[2]) < 1e-5


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("whole", [True, False])
def test_each_kind_of_flux_block_is_one_graph(mini_flux, whole):
    expected = forward(adapted("flux", mini_flux, compiled=False))
    assert apart(forward(adapted("flux", mini_flux, compiled=True, whole=whole)), expected) < 1e-5
    assert not counters["graph_break"]
    assert 2 <= counters["stats"]["unique_graphs"] <= 4
