"""rsLoRA, DoRA, ranks and alphas by pattern: gradients match float64, and the loss falls."""

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.lora.dora import RowMagnitudes, reset_magnitudes
from halfbyte.trainer.adapters.lora import (
    ADAPTER,
    LoraVariant,
    adapter_state,
    add_lora,
    load_adapter_state,
    save_adapter,
    trained_parameters,
)
from halfbyte.trainer.adapters.saved import ADAPTER_FILE, read_saved
from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.objective.losses import MSE
from halfbyte.trainer.objective.shift import ResolutionShift
from halfbyte.trainer.objective.timesteps import LogitNormal
from halfbyte.trainer.objective.weighting import NoWeighting
from halfbyte.trainer.training.module import DiffusionModule, Objective

PATTERNS = {"rank_pattern": {"proj_mlp": 2, r"0\.attn\.to_q": 6}, "alpha_pattern": {r"attn\.to_(q|k)": 2.0}}
VARIANTS = {
    "rslora": ("nf4", LoraVariant(rslora=True, **PATTERNS)),
    "dora": ("nf4", LoraVariant(dora=True)),
    "dora over int8": ("int8", LoraVariant(dora=True)),
    "all at once": ("nf4", LoraVariant(rslora=True, dora=True, **PATTERNS)),
}


@pytest.fixture(scope="module")
def family(mini_flux):
    return Flux.open(str(mini_flux), None, 24)


def base(family, quant_type="nf4"):
    # int8 layers round activations to 8 bits, except outliers. With a low threshold all values are outliers.
    recipe = QuantRecipe(
        quant_type=quant_type, double_quant=True, compute_dtype=torch.float32, llm_int8_threshold=1e-6
    )
    return load_base(family, recipe, device=torch.device("cpu"), dtype=torch.float32)


def adapt(family, denoiser, variant, *, fused=True, targets=None):
    add_lora(
        denoiser,
        rank=4,
        alpha=8,
        dropout=0.0,
        targets=family.lora_targets("all-linear") if targets is None else targets,
        init="gaussian",
        seed=1,
        fused=fused,
        variant=variant,
    )
    if fused:
        family.fuse_blocks(denoiser, BlockSettings())
    return denoiser


def module_of(family, denoiser, dtype=torch.float32):
    objective = Objective(
        LogitNormal(name="logit_normal"),
        ResolutionShift(name="resolution"),
        NoWeighting(name="none"),
        MSE(name="mse"),
        guidance_scale=2.0,
    )
    module = DiffusionModule(
        family,
        denoiser,
        objective,
        build_optimizer=torch.optim.AdamW,
        lr_factor=lambda step: 1.0,
        compute_dtype=torch.float32,  # what sigma is rounded to
        max_grad_norm=None,
        seed=3,
    )
    module.compute_dtype = dtype
    return module


def batch_for(family):
    draws = torch.Generator().manual_seed(11)
    config = family.denoiser_config
    return Batch(
        (0, 5),
        torch.randn(2, 16, 8, 8, generator=draws),
        torch.rand(2, 16, 8, 8, generator=draws) * 0.1,
        torch.randn(2, 24, config["joint_attention_dim"], generator=draws).bfloat16(),
        torch.randn(2, config["pooled_projection_dim"], generator=draws).bfloat16(),
    )


def in_float64(family, quant_type, variant, state):
    """Returns the same weights in float64, dequantized into plain linear layers with PEFT's own adapters."""
    denoiser = base(family, quant_type)
    for name, layer in list(denoiser.named_modules()):
        if isinstance(layer, QuantizedLayer):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight = nn.Parameter(layer.dequantize(torch.float32), requires_grad=False)
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), leaf, plain)
    adapt(family, denoiser, variant, fused=False)
    load_adapter_state(denoiser, state)
    return denoiser.double()


@pytest.fixture(scope="module", params=list(VARIANTS))
def started(request, family):
    """A model whose adapter is no longer at its start, so that A has a gradient."""
    quant_type, variant = VARIANTS[request.param]
    denoiser = adapt(family, base(family, quant_type), variant)
    draws = torch.Generator().manual_seed(7)
    for name, parameter in trained_parameters(denoiser).items():
        noise = 0.05 * torch.randn(parameter.shape, generator=draws)
        if ".lora_B." in name:
            parameter.data.copy_(noise)
        elif "magnitude" in name:
            parameter.data.mul_(1 + noise)
    return quant_type, variant, denoiser


def test_gradients_match_those_of_peft_in_float64(family, started):
    quant_type, variant, denoiser = started
    batch = batch_for(family)
    loss = module_of(family, denoiser).loss(batch)
    loss.backward()
    reference = in_float64(family, quant_type, variant, adapter_state(denoiser))
    expected = module_of(family, reference, torch.float64).loss(batch)
    expected.backward()
    assert torch.allclose(loss.double(), expected.double(), rtol=1e-5)
    wanted = trained_parameters(reference)
    trained = trained_parameters(denoiser)
    assert trained.keys() == wanted.keys()
    for name, parameter in trained.items():
        difference = (parameter.grad - wanted[name].grad).norm()
        assert difference <= 5e-4 * wanted[name].grad.norm(), name


def test_the_loss_of_a_fixed_batch_falls(family, started):
    _, variant, denoiser = started
    module, batch = module_of(family, denoiser), batch_for(family)
    optimizer = torch.optim.AdamW(trained_parameters(denoiser).values(), lr=3e-3)
    before = {name: parameter.detach().clone() for name, parameter in trained_parameters(denoiser).items()}
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = module.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    for name, parameter in trained_parameters(denoiser).items():
        assert not parameter.equal(before[name]), f"{name} did not move"
    assert variant.dora == any("magnitude" in name for name in before)


def test_patterns_set_rank_alpha_and_scale(family):
    denoiser = adapt(family, base(family), LoraVariant(rslora=True, **PATTERNS))
    layers = {
        name.removesuffix(".lora_A.default.weight"): parameter
        for name, parameter in trained_parameters(denoiser).items()
        if ".lora_A." in name
    }
    scales = {name: denoiser.get_submodule(name).scaling["default"] for name in layers}
    for name, down in layers.items():
        rank = 2 if name.endswith("proj_mlp") else 6 if name.endswith("0.attn.to_q") else 4
        alpha = 2 if name.endswith(("attn.to_q", "attn.to_k")) else 8
        assert down.shape[0] == rank, name
        assert scales[name] == pytest.approx(alpha / rank**0.5), name
        # diffusers' gaussian initialization: a standard deviation of 1 / rank, with the layer's own rank.
        assert float(down.detach().std()) == pytest.approx(1 / rank, rel=0.25), name
    assert {down.shape[0] for down in layers.values()} == {2, 4, 6}


@pytest.mark.parametrize(
    ("patterns", "kept"), [({"to_q": 2, "attn.to_q": 8}, False), ({"attn.to_q": 2, "to_k": 8}, True)]
)
def test_files_keep_the_order_of_patterns(family, tmp_path, patterns, kept):
    """diffusers sorts the patterns when it writes a file."""
    trained = adapt(family, base(family), LoraVariant(rank_pattern=patterns, alpha_pattern=patterns))
    save_adapter(trained, family.pipeline_class, str(tmp_path))
    config = read_saved(tmp_path / ADAPTER_FILE).config
    assert (config["rank_pattern"] == config["alpha_pattern"] == patterns) == kept
    stock = family.denoiser_class.from_config(family.denoiser_config)
    stock.load_lora_adapter(
        str(tmp_path), prefix="transformer", adapter_name=ADAPTER, weight_name=ADAPTER_FILE
    )
    layers = {name: module for name, module in trained.named_modules() if isinstance(module, LoraLayer)}
    assert {module.r[ADAPTER] for module in layers.values()} == ({2, 4, 8} if kept else {2, 4})
    for name, module in layers.items():
        loaded = stock.get_submodule(name)
        assert (loaded.r, loaded.lora_alpha, loaded.scaling) == (
            module.r,
            module.lora_alpha,
            module.scaling,
        ), name


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_nothing_is_named(family, setting):
    denoiser = base(family)
    # The embedder is a linear layer, but has no adapter.
    with pytest.raises(RecipeError, match=rf"lora\.{setting}: 'x_embedder' .*attn"):
        adapt(family, denoiser, LoraVariant(**{setting: {"x_embedder": 2}}))


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["to_q", "to_kk"], "'to_kk' .*no layer"),
        (["attn.to_out"], r"'attn\.to_out' .*transformer_blocks\.0\.attn\.to_out, a ModuleList"),
        (r".*\.to_kk", r"to_kk' .*no layer"),
        (".*", r"'\.\*' .*pos_embed, a FluxPosEmbed"),
    ],
)
def test_a_target_that_is_not_a_linear_layer_is_named(family, targets, found):
    """PEFT ignores a target that matches nothing if another one of the list matches."""
    with pytest.raises(RecipeError, match=rf"lora\.targets: .*{found}.*accepted: all-linear.*attn"):
        adapt(family, base(family), LoraVariant(), targets=targets)


def test_dora_can_be_added_on_meta(family):
    """A plan needs this, because it has only shapes."""
    with torch.device("meta"):
        denoiser = family.denoiser_class.from_config(family.denoiser_config)
    trained = add_lora(
        denoiser.requires_grad_(False),
        rank=4,
        alpha=8,
        dropout=0.0,
        targets=family.lora_targets("all-linear"),
        init="gaussian",
        seed=1,
        variant=LoraVariant(dora=True),
    )
    magnitudes = [module for module in denoiser.modules() if isinstance(module, RowMagnitudes)]
    assert len(magnitudes) == trained.layers
    assert all(one.weight.is_meta for one in magnitudes)


def test_dora_starts_as_the_base_and_refuses_rows_of_zeros(family):
    bare, denoiser = base(family), adapt(family, base(family), LoraVariant(dora=True))
    batch = batch_for(family)
    with torch.no_grad():
        before, after = (module_of(family, model).loss(batch) for model in (bare, denoiser))
    assert torch.allclose(before, after, rtol=1e-5)
    magnitudes = [module for module in denoiser.modules() if isinstance(module, RowMagnitudes)]
    assert all(torch.allclose(one.weight**2, one.base_squares) for one in magnitudes)
    layer = denoiser.transformer_blocks[0].attn.to_q
    nn.init.normal_(layer.lora_B["default"].weight)  # an adapter that changes the weight from the start
    reset_magnitudes(denoiser, "default")
    adapted = layer.base_layer.dequantize(torch.float32) + layer.get_delta_weight("default")
    assert torch.allclose(layer.lora_magnitude_vector["default"].weight, adapted.norm(dim=1), rtol=1e-4)
    broken = base(family)
    layer = broken.transformer_blocks[0].attn.to_q
    weight = layer.dequantize(torch.float32)
    weight[3] = 0
    layer.quantize(weight)
    with pytest.raises(RecipeError, match=r"lora\.dora: transformer_blocks\.0\.attn\.to_q .*zeros"):
        adapt(family, broken, LoraVariant(dora=True))
