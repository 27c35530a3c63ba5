"""Tests base_error, which compares quantized layers with the file they were quantized from."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.formats.weight_error import SCHEMES
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.base_error import base_error
from halfbyte.quant.load.transformer import load_quantized


def load(folder, recipe):
    return load_quantized(
        FluxTransformer2DModel, folder / "transformer", recipe, dtype=torch.float32, device="cpu"
    )


def measured(model, folder, **options):
    with ShardedWeights(folder) as weights:
        return base_error(model, weights, **options)


@pytest.mark.parametrize(
    ("kind", "search", "scheme"), [("nf4", None, "nf4"), ("nf4", "mse", "nf4 mse"), ("int8", None, "int8")]
)
def test_base_error_is_the_sum_of_the_layers_quantization_errors(mini_flux, kind, search, scheme):
    model = load(mini_flux, QuantRecipe(kind, double_quant=True, scale_search=search))
    found = measured(model, mini_flux / "transformer")
    weights = load_file(mini_flux / "transformer" / "diffusion_pytorch_model.safetensors")
    (restore,) = [candidate.restore for candidate in SCHEMES if candidate.name == scheme]
    layers = [name for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)]
    originals = [weights[f"{name}.weight"].float() for name in layers]
    errors = sum(float((restore(weight, "x") - weight).square().sum()) for weight in originals)
    squares = sum(float(weight.square().sum()) for weight in originals)
    assert found.relative == pytest.approx((errors / squares) ** 0.5, rel=1e-3)
    assert (found.layers, found.measured) == (len(layers), sum(weight.numel() for weight in originals))


def test_sampled_rows_give_about_the_same_error(mini_flux):
    model = load(mini_flux, QuantRecipe("nf4"))
    whole, part = (measured(model, mini_flux / "transformer", sample=n) for n in (10**9, 2000))
    assert part.measured < whole.measured / 2
    assert part.weights == whole.weights == whole.measured
    assert part.relative == pytest.approx(whole.relative, rel=0.02)


def test_folder_of_another_model_is_rejected(mini_flux, mini_sd3, tmp_path):
    model = load(mini_flux, QuantRecipe("nf4"))
    with pytest.raises(ValueError, match=r"/transformer: .*\.weight of shape"):
        measured(model, mini_sd3 / "transformer")
    name = "proj_out.weight"
    tensors = load_file(mini_flux / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"proj_out\.weight of shape"):
        measured(model, tmp_path)
