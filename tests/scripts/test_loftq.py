"""The start of an adapter at the quantization's error: near the best of its rank, and nearer to the full weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.trainer.adapters.lora import ADAPTER, LoraVariant, add_lora
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.randomness import generator
from scripts.bench.quality.loftq import factors_of, start_from_error

from probe import inputs

CPU = torch.device("cpu")


def source(path="x"):
    return generator(0, path)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(64, 64, 8), (96, 200, 4), (200, 96, 16), (33, 7, 3)])
def test_factors_are_near_the_best_of_their_rank(rows, columns, rank):
    """A flat spectrum, as rounding errors have, is the hard case of a randomized decomposition."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    down, up = factors_of(matrix, rank, source())
    assert (down.shape, up.shape) == ((rank, columns), (rows, rank))
    left = (matrix.double() - up.double() @ down.double()).norm()
    best = torch.linalg.svdvals(matrix.double())[rank:].norm()
    assert best <= left * (1 + 1e-6)
    assert left < 1.01 * best
    assert torch.allclose(down.norm(dim=1), up.norm(dim=0), rtol=1e-3), "both factors carry the same"


def test_a_rank_beyond_the_matrix_is_filled_with_zeros():
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    down, up = factors_of(matrix, 8, source())
    assert (down.shape, up.shape) == ((8, 3), (5, 8))
    assert torch.allclose(up @ down, matrix, atol=1e-5)
    assert not down[3:].any()
    assert not up[:, 3:].any()


def test_an_error_of_zero_gives_finite_factors():
    down, up = factors_of(torch.zeros(6, 4), 2, source())
    assert torch.equal(up @ down, torch.zeros(6, 4))


# Layers without an adapter, whose error stays.
UNADAPTED = ("linear", "linear_1", "linear_2", "x_embedder", "context_embedder")


def adapted(mini_flux, quant_type, **variant):
    """The mini FLUX with its adapted layers in 4 bits, and an adapter that starts at zero."""
    family = Flux.open(str(mini_flux), None, 24)
    recipe = None
    if quant_type is not None:
        recipe = QuantRecipe(quant_type=quant_type, compute_dtype=torch.float32, skip=UNADAPTED)
    model = load_base(family, recipe, device=CPU, dtype=torch.float32)
    targets = family.lora_targets("all-linear")
    add_lora(
        model,
        rank=16,
        alpha=24,
        dropout=0.0,
        targets=targets,
        init="gaussian",
        seed=0,
        variant=LoraVariant(**variant),
    )
    return family, model


def exact_output(model, x, path):
    """What the adapted layer at `path` makes of x, in float64."""
    layer = model.get_submodule(path)
    base = layer.get_base_layer()
    weight = base.dequantize(torch.float32) if isinstance(base, Linear4bit) else base.weight
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return x @ (weight.double() + layer.scaling[ADAPTER] * up.double() @ down.double()).t()


@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"rank_pattern": {"proj_mlp": 4}}])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_layers_start_nearer_to_the_full_weights(mini_flux, quant_type, variant):
    family, model = adapted(mini_flux, quant_type, **variant)
    folder = family.source.folder / "transformer"
    full = load_file(folder / "diffusion_pytorch_model.safetensors")
    layers = [path for path, module in model.named_modules() if hasattr(module, "lora_A")]
    draws = torch.Generator().manual_seed(0)
    probes = {}
    for path in layers:
        weight = full[f"{path}.weight"].double()
        x = torch.randn(50, weight.shape[1], generator=draws, dtype=torch.float64)
        probes[path] = (x, x @ weight.t())

    def errors():
        return {
            path: (exact_output(model, x, path) - exact).norm().item() for path, (x, exact) in probes.items()
        }

    before = errors()
    repair = start_from_error(model, folder, ADAPTER, source)
    after = errors()
    assert repair.layers == len(layers)
    assert all(after[path] < before[path] for path in layers)
    squares = [sum(value**2 for value in values.values()) for values in (before, after)]
    # Inputs of unit variance: the outputs' squared errors are the weights', up to the draw.
    assert 1 - squares[1] / squares[0] == pytest.approx(repair.share, abs=0.05)


def test_the_model_starts_nearer_to_the_one_in_full_precision(mini_flux):
    _, exact = adapted(mini_flux, None)
    family, model = adapted(mini_flux, "nf4")
    with torch.no_grad():
        wanted = exact(**inputs(exact, torch.float32))[0]
        before = (model(**inputs(model, torch.float32))[0] - wanted).norm()
        start_from_error(model, family.source.folder / "transformer", ADAPTER, source)
        after = (model(**inputs(model, torch.float32))[0] - wanted).norm()
    assert after < 0.95 * before


def test_layers_that_are_not_quantized_keep_their_start(mini_flux):
    family = Flux.open(str(mini_flux), None, 24)
    recipe = QuantRecipe(compute_dtype=torch.float32, skip=("proj_mlp",))
    model = load_base(family, recipe, device=CPU, dtype=torch.float32)
    add_lora(model, rank=4, alpha=4, dropout=0.0, targets=["proj_mlp", "to_q"], init="gaussian", seed=0)
    kept = model.single_transformer_blocks[0].proj_mlp.lora_A[ADAPTER].weight.clone()
    repair = start_from_error(model, family.source.folder / "transformer", ADAPTER, source)
    layer = model.single_transformer_blocks[0]
    assert layer.proj_mlp.lora_A[ADAPTER].weight.equal(kept)
    assert not layer.proj_mlp.lora_B[ADAPTER].weight.any()
    assert layer.attn.to_q.lora_B[ADAPTER].weight.any()
    assert repair.layers == sum(
        isinstance(module, nn.Linear) and name.endswith("to_q.base_layer")
        for name, module in model.named_modules()
    )


def test_a_base_without_full_weights_is_refused(mini_flux, tmp_path):
    _, model = adapted(mini_flux, "nf4")
    save_file({"x_embedder.weight": torch.zeros(4, 4)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="full precision"):
        start_from_error(model, tmp_path, ADAPTER, source)
