"""Stock `from_pretrained` with our layers behind it, against what bitsandbytes makes of the same files."""

import json
import shutil

import pytest
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
from diffusers.quantizers import auto as diffusers_auto
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig as TransformersBitsAndBytesConfig
from transformers import CLIPTextModel, T5EncoderModel
from transformers.quantizers import auto as transformers_auto

from halfbyte.quant import stock, stock_diffusers, stock_transformers
from halfbyte.quant.convert import QuantizedLinear

from judge import stock_bitsandbytes_on_cpu
from probe import prediction

KINDS = ("bitsandbytes_4bit", "bitsandbytes_8bit")
SETTINGS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}
STATISTIC = {
    "nf4": "x_embedder.weight.nested_absmax",
    "fp4": "x_embedder.weight.absmax",
    "int8": "x_embedder.SCB",
}

# Double-quantized scales may differ by a step; bitsandbytes on the CPU puts small weights elsewhere in FP4.
ON_THE_WAY_IN = {"nf4": 0.02, "fp4": 0.1, "int8": 0.05}


@pytest.fixture
def ours(monkeypatch):
    """Registers our quantizers; the stock ones are back afterwards."""
    for module in (diffusers_auto, transformers_auto):
        for name in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
            mapping = getattr(module, name)
            for kind in KINDS:
                monkeypatch.setitem(mapping, kind, mapping[kind])
    for module in (stock_diffusers, stock_transformers):
        monkeypatch.setattr(module, "default_device", lambda: torch.device("cpu"))
    stock.register()


@pytest.fixture(scope="module", params=SETTINGS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def stock_flux(kind, tmp_path_factory, mini_flux):
    """A transformer that stock diffusers and bitsandbytes quantized and saved."""
    folder = tmp_path_factory.mktemp("stock") / "transformer"
    with stock_bitsandbytes_on_cpu():
        model = FluxTransformer2DModel.from_pretrained(
            mini_flux,
            subfolder="transformer",
            quantization_config=BitsAndBytesConfig(**SETTINGS[kind]),
            dtype=torch.float32,
        )
        model.save_pretrained(folder)
    return folder, prediction(model)


@pytest.fixture(scope="module")
def stock_t5(kind, tmp_path_factory, mini_flux):
    folder = tmp_path_factory.mktemp("stock") / "t5"
    config = TransformersBitsAndBytesConfig(**SETTINGS[kind])
    model = T5EncoderModel.from_pretrained(
        mini_flux / "text_encoder_2", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    return folder, encoded(model)


@pytest.fixture(scope="module")
def stock_clip(kind, tmp_path_factory, mini_flux):
    folder = tmp_path_factory.mktemp("stock") / "clip"
    config = TransformersBitsAndBytesConfig(**SETTINGS[kind])
    CLIPTextModel.from_pretrained(
        mini_flux / "text_encoder", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    ).save_pretrained(folder)
    return folder


def encoded(model):
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()  # bitsandbytes' eval forward repacks weights on some CPUs
    with torch.no_grad():
        return model(torch.arange(12)[None])[0]


def assert_close(one, other, kind):
    """4 bits: up to the order of sums. int8: bitsandbytes takes activations and outliers through fp16."""
    assert (one - other).float().norm() / other.float().norm() < (0.05 if kind == "int8" else 0.01)


def assert_same_tensors(folder, name, other):
    first, second = load_file(folder / name), load_file(other / name)
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)


def layers(model):
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def test_a_stock_flux_checkpoint_loads_into_our_layers(ours, kind, stock_flux, tmp_path):
    folder, expected = stock_flux
    model = FluxTransformer2DModel.from_pretrained(folder, dtype=torch.float32)
    assert len(layers(model)) > 50
    assert_close(prediction(model), expected, kind)
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(folder, "diffusion_pytorch_model.safetensors", tmp_path / "again")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(prediction(again), prediction(model))


def test_flux_is_quantized_on_the_way_in(ours, kind, stock_flux, mini_flux):
    _, expected = stock_flux
    model = FluxTransformer2DModel.from_pretrained(
        mini_flux,
        subfolder="transformer",
        quantization_config=BitsAndBytesConfig(**SETTINGS[kind]),
        dtype=torch.float32,
    )
    assert layers(model)
    difference = (prediction(model) - expected).float().norm() / expected.float().norm()
    assert difference < ON_THE_WAY_IN[kind]


def test_a_stock_t5_checkpoint_loads_into_our_layers(ours, kind, stock_t5, tmp_path):
    folder, expected = stock_t5
    model = T5EncoderModel.from_pretrained(folder, dtype=torch.float32)
    assert layers(model)
    assert_close(encoded(model), expected, kind)
    assert type(model.encoder.block[0].layer[-1].DenseReluDense.wo) is nn.Linear, "T5 keeps wo in fp32"
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(folder, "model.safetensors", tmp_path / "again")
    again = T5EncoderModel.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(encoded(again), encoded(model))


def test_t5_is_quantized_on_the_way_in(ours, kind, stock_t5, mini_flux):
    _, expected = stock_t5
    config = TransformersBitsAndBytesConfig(**SETTINGS[kind])
    model = T5EncoderModel.from_pretrained(
        mini_flux / "text_encoder_2", quantization_config=config, dtype=torch.float32
    )
    assert layers(model)
    assert (encoded(model) - expected).norm() / expected.norm() < ON_THE_WAY_IN[kind]


def test_a_missing_statistic_is_named(ours, kind, stock_flux, tmp_path):
    folder, _ = stock_flux
    shutil.copytree(folder, tmp_path / "damaged")
    file = tmp_path / "damaged" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors[STATISTIC[kind]]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"x_embedder\.weight"):
        FluxTransformer2DModel.from_pretrained(tmp_path / "damaged", dtype=torch.float32)


def assert_dequantizes(model, folder, output, dtype):
    before = output(model)
    assert model.dequantize() is model
    assert not layers(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    # LLM.int8() rounds its input as well, which plain layers do not.
    after = output(model)
    assert (after - before).float().norm() / before.float().norm() < 0.05
    model.save_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    plain, info = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(output(plain), after)


def test_flux_dequantizes_and_loads_as_any_other(ours, stock_flux, tmp_path):
    model = FluxTransformer2DModel.from_pretrained(stock_flux[0], dtype=torch.bfloat16)
    assert_dequantizes(model, tmp_path, prediction, torch.bfloat16)


def test_text_encoders_dequantize_and_load_as_any_other(ours, stock_t5, stock_clip, tmp_path):
    for name, model_cls, folder in (
        ("t5", T5EncoderModel, stock_t5[0]),
        ("clip", CLIPTextModel, stock_clip),
    ):
        model = model_cls.from_pretrained(folder, dtype=torch.float32)
        assert_dequantizes(model, tmp_path / name, encoded, torch.float32)
    model = CLIPTextModel.from_pretrained(stock_clip, dtype=torch.float32)
    assert model.dequantize(torch.bfloat16).dtype == torch.bfloat16
