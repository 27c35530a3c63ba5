"""Checks the scale search: no block has a larger error, and files look like those of plain quantization."""

import bitsandbytes as bnb
import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.kernels.quantize_4bit import ops, reference, scale_search
from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.formats.nf4 import QuantSpec, dequantize, quantize
from halfbyte.quant.formats.packing import pack_state, unpack_state
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.load.serialize import save_quantized
from halfbyte.quant.load.transformer import load_quantized
from halfbyte.trainer.denoiser.settings import quant_recipe
from halfbyte.trainer.recipe.load import load_recipe

from judge import stock_bitsandbytes_on_cpu
from probe import prediction
from repository import RECIPES
from tensors import noise

both_types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
single_and_double = pytest.mark.parametrize("double_quant", [True, False])


def restored(weight, **spec):
    packed, state = quantize(weight, QuantSpec(**spec))
    return dequantize(packed, state, torch.float32)


def block_errors(weight, values, blocksize=64):
    """Returns the squared error of each block, in float64."""
    squares = (values.double() - weight.double()).square().view(-1)
    return torch.nn.functional.pad(squares, (0, -squares.numel() % blocksize)).view(-1, blocksize).sum(1)


@pytest.mark.parametrize(
    ("quant_type", "plain", "searched"), [("nf4", 0.0920, 0.0850), ("fp4", 0.1219, 0.1127)]
)
@single_and_double
def test_error_on_gaussian_weights(quant_type, plain, searched, double_quant):
    weight = noise(512, 512).bfloat16().float()
    errors = [
        ((restored(weight, quant_type=quant_type, double_quant=double_quant, scale_search=search) - weight).norm()
         / weight.norm()).item()
        for search in (None, "mse")
    ]  # fmt: skip
    assert errors[0] == pytest.approx(plain, abs=4e-4)
    assert errors[1] == pytest.approx(searched, abs=3e-4)


@both_types
def test_scales_are_close_to_an_exhaustive_search(quant_type):
    weight = noise(256, 64)
    largest = weight.abs().amax(dim=1, keepdim=True)
    values = reference.CODES[quant_type].sort().values
    best = torch.full((256,), float("inf"))
    for factor in torch.linspace(0.6, 1.6, 300):
        scaled = weight / (largest * factor)
        nearest = (scaled.unsqueeze(-1) - values).abs().amin(dim=-1)
        best = torch.minimum(best, (nearest * largest * factor).square().sum(dim=1))
    found = block_errors(
        weight, restored(weight, quant_type=quant_type, double_quant=False, scale_search="mse")
    )
    assert found.sum() < best.sum() * 1.005
    assert (found < best * 1.02).float().mean() > 0.9


@settings(max_examples=40, deadline=None)
@given(
    quant_type=st.sampled_from(("nf4", "fp4")),
    double_quant=st.booleans(),
    blocksize=st.sampled_from((32, 64, 256)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    shape=st.sampled_from(((1, 1), (3, 5), (1, 65), (7, 64), (33, 129), (40, 512))),
    tails=st.floats(0.0, 3.0),
    exponent=st.integers(-8, 3),
    seed=st.integers(0, 1000),
)
def test_no_block_gets_worse(quant_type, double_quant, blocksize, dtype, shape, tails, exponent, seed):
    weight = noise(*shape, seed=seed)
    weight = (weight.sign() * weight.abs() ** (1 + tails) * 4.0**exponent).to(dtype)
    plain, searched = (
        block_errors(
            weight,
            restored(
                weight,
                quant_type=quant_type,
                double_quant=double_quant,
                blocksize=blocksize,
                scale_search=search,
            ),
            blocksize,
        )
        for search in (None, "mse")
    )
    assert (searched <= plain).all()


@both_types
@single_and_double
@pytest.mark.parametrize("shape", [(3, 64), (5, 13), (1, 129)])
def test_zero_blocks_and_tails(quant_type, double_quant, shape):
    weight = noise(*shape)
    weight.view(-1)[:64] = 0.0
    values = restored(weight, quant_type=quant_type, double_quant=double_quant, scale_search="mse")
    assert values.shape == shape
    assert (values.view(-1)[:64] == 0).all()
    assert values.isfinite().all()
    zeros = restored(torch.zeros(shape), quant_type=quant_type, double_quant=double_quant, scale_search="mse")
    assert torch.equal(zeros, torch.zeros(shape))


@both_types
def test_blocks_that_gain_nothing_keep_the_plain_codes(quant_type):
    # Every value is a table entry times the scale, so absmax gives no error.
    weight = reference.CODES[quant_type].repeat(8).view(2, 64) * torch.tensor([[2.0], [0.5]])
    plain, absmax = ops.quantize_4bit(weight, quant_type, 64)
    packed, scales = scale_search.quantize_4bit(weight, quant_type, 64)
    assert torch.equal(scales, absmax)
    assert torch.equal(packed, plain)


@both_types
def test_offset_and_nested_scales_equal_plain_quantization(quant_type):
    weight = noise(300, 70)
    plain = ops.quantize_4bit_double(weight, quant_type, 64, 256)
    searched = scale_search.quantize_4bit_double(weight, quant_type, 64, 256)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(searched[2:], plain[2:], strict=True))
    assert (searched[1] != plain[1]).float().mean() > 0.5


@single_and_double
def test_the_result_does_not_depend_on_the_chunk_size(double_quant, monkeypatch):
    weight = noise(37, 129)
    spec = QuantSpec(double_quant=double_quant, scale_search="mse")
    packed, state = quantize(weight, spec)
    sizes, best_scale = [], scale_search._best_scale

    def record(u, levels):
        sizes.append(u.numel())
        return best_scale(u, levels)

    monkeypatch.setattr(scale_search, "_best_scale", record)
    monkeypatch.setitem(scale_search._CHUNK, "cpu", 256)
    again, repeated = quantize(weight, spec)
    assert len(sizes) == 19
    assert max(sizes) == 256
    assert torch.equal(again, packed)
    assert torch.equal(repeated.absmax, state.absmax)


@both_types
@single_and_double
def test_bitsandbytes_dequantizes_to_the_same_numbers(quant_type, double_quant):
    packed, state = quantize(
        noise(64, 128, dtype=torch.bfloat16), QuantSpec(quant_type, double_quant, scale_search="mse")
    )
    again = unpack_state("w", packed, pack_state(state))
    assert torch.equal(bnb.functional.dequantize_4bit(packed, state), dequantize(packed, again))


def load(folder, recipe=None):
    return load_quantized(SD3Transformer2DModel, folder, recipe, dtype=torch.bfloat16, device="cpu")


def test_the_file_loads_in_stock_diffusers_and_in_halfbyte(mini_sd3, tmp_path):
    plain, searched = (
        load(mini_sd3 / "transformer", QuantRecipe(skip=("proj_out",), scale_search=search))
        for search in (None, "mse")
    )
    source = load(mini_sd3 / "transformer")
    for path, layer in searched.named_modules():
        if isinstance(layer, Linear4bit):
            weight = source.get_submodule(path).weight
            errors = [
                (side.dequantize().float() - weight.float()).norm()
                for side in (layer, plain.get_submodule(path))
            ]
            assert errors[0] < 0.95 * errors[1], path
    save_quantized(searched, tmp_path / "q", QuantRecipe(skip=("proj_out",), scale_search="mse"))
    save_quantized(plain, tmp_path / "plain")
    configs = [(tmp_path / name / "config.json").read_text() for name in ("q", "plain")]
    assert configs[0] == configs[1]
    with stock_bitsandbytes_on_cpu():
        stock = SD3Transformer2DModel.from_pretrained(tmp_path / "q", torch_dtype=torch.bfloat16)
    expected = prediction(searched)
    assert torch.equal(prediction(stock), expected)
    assert torch.equal(prediction(load(tmp_path / "q")), expected)


def test_unknown_searches_are_refused_and_recipes_set_the_search():
    with pytest.raises(ValueError, match=r"scale_search: got 'max', .*mse"):
        QuantSpec(scale_search="max")
    with pytest.raises(ValueError, match=r"scale_search: got 'max', .*mse"):
        QuantRecipe(scale_search="max")
    assert quant_recipe(load_recipe(RECIPES / "flux_mini.yaml")).scale_search is None
    searched = quant_recipe(load_recipe(RECIPES / "flux_mini.yaml", ["quant.scale_search=mse"]))
    assert searched.spec == QuantSpec(scale_search="mse")


@pytest.mark.gpu
@both_types
@single_and_double
def test_gpu_scales_are_repeatable_and_as_good_as_on_cpu(quant_type, double_quant):
    weight = noise(512, 1000).cuda()
    spec = QuantSpec(quant_type, double_quant, scale_search="mse")
    (packed, state), (again, repeated) = quantize(weight, spec), quantize(weight, spec)
    assert torch.equal(packed, again)
    assert torch.equal(state.absmax, repeated.absmax)
    errors = block_errors(weight, dequantize(packed, state, torch.float32)).cpu()
    plain = block_errors(weight, restored(weight, quant_type=quant_type, double_quant=double_quant)).cpu()
    assert (errors <= plain).all()
    cpu = restored(weight.cpu(), quant_type=quant_type, double_quant=double_quant, scale_search="mse")
    assert errors.sum().item() == pytest.approx(block_errors(weight.cpu(), cpu).sum().item(), rel=1e-3)
