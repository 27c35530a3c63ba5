"""Tests `from_pretrained` of diffusers and transformers with our layers, against bitsandbytes on the same files."""

import copy
import json
import re
import sys

import pytest
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig as TransformersBitsAndBytesConfig
from transformers import CLIPTextModel, T5EncoderModel

from halfbyte.quant.files.shards import INDEX_FILE
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.serialize import split_statistic
from halfbyte.quant.load.text_encoder import load_text_encoder
from halfbyte.quant.load.transformer import load_quantized

from judge import our_layers_on_cpu, stock_bitsandbytes_on_cpu
from probe import prediction

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
# Double-quantized scales may differ by one step; bitsandbytes on the CPU uses other boundaries for FP4.
QUANTIZING_ERROR = {"nf4": 0.02, "fp4": 0.1, "int8": 0.05}


@pytest.fixture
def ours():
    with our_layers_on_cpu():
        yield


@pytest.fixture(scope="module", params=SETTINGS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def stock_flux(kind, tmp_path_factory, mini_flux):
    """Returns a transformer's folder, quantized and saved by diffusers with bitsandbytes, and its output."""
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
    """Compares outputs. In 4 bits only the order of sums differs; bitsandbytes' int8 uses fp16 for activations."""
    assert (one - other).float().norm() / other.float().norm() < (0.05 if kind == "int8" else 0.01)


def assert_same_tensors(folder, name, other):
    first, second = load_file(folder / name), load_file(other / name)
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)


def layers(model):
    return [module for module in model.modules() if isinstance(module, QuantizedLayer)]


def test_flux_checkpoint_of_bitsandbytes_loads_into_our_layers(ours, kind, stock_flux, tmp_path):
    folder, expected = stock_flux
    model = FluxTransformer2DModel.from_pretrained(folder, dtype=torch.float32)
    assert len(layers(model)) > 30
    assert_close(prediction(model), expected, kind)
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(folder, "diffusion_pytorch_model.safetensors", tmp_path / "again")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(prediction(again), prediction(model))


def test_flux_is_quantized_while_loading(ours, kind, stock_flux, mini_flux):
    _, expected = stock_flux
    model = FluxTransformer2DModel.from_pretrained(
        mini_flux,
        subfolder="transformer",
        quantization_config=BitsAndBytesConfig(**SETTINGS[kind]),
        dtype=torch.float32,
    )
    assert layers(model)
    difference = (prediction(model) - expected).float().norm() / expected.float().norm()
    assert difference < QUANTIZING_ERROR[kind]


def test_t5_checkpoint_of_bitsandbytes_loads_into_our_layers(ours, kind, stock_t5, tmp_path):
    folder, expected = stock_t5
    model = T5EncoderModel.from_pretrained(folder, dtype=torch.float32)
    assert layers(model)
    assert_close(encoded(model), expected, kind)
    assert type(model.encoder.block[0].layer[-1].DenseReluDense.wo) is nn.Linear, "T5 keeps wo in fp32"
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(folder, "model.safetensors", tmp_path / "again")
    again = T5EncoderModel.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(encoded(again), encoded(model))


def test_t5_is_quantized_while_loading(ours, kind, stock_t5, mini_flux):
    _, expected = stock_t5
    config = TransformersBitsAndBytesConfig(**SETTINGS[kind])
    model = T5EncoderModel.from_pretrained(
        mini_flux / "text_encoder_2", quantization_config=config, dtype=torch.float32
    )
    assert layers(model)
    assert (encoded(model) - expected).norm() / expected.norm() < QUANTIZING_ERROR[kind]


def test_weight_and_statistics_may_be_in_different_files(ours, kind, stock_flux, tmp_path, monkeypatch):
    model = FluxTransformer2DModel.from_pretrained(stock_flux[0], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    file_of = index["weight_map"]
    separated = [
        key
        for key in file_of
        if (statistic := split_statistic(key)) is not None and file_of[key] != file_of[statistic[0]]
    ]
    assert separated
    for parallel in ("NO", "YES"):
        monkeypatch.setenv("HF_ENABLE_PARALLEL_LOADING", parallel)
        again = FluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert torch.equal(prediction(again), prediction(model))
    file = tmp_path / file_of[separated[0]]
    save_file(
        {key: tensor for key, tensor in load_file(file).items() if key != separated[0]},
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match=f"^{re.escape(separated[0])}: .*files"):
        FluxTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_computes_in_the_models_dtype(ours, mini_flux, tmp_path, dtype):
    for model_cls, name, config in (
        (FluxTransformer2DModel, "transformer", BitsAndBytesConfig(load_in_8bit=True)),
        (T5EncoderModel, "text_encoder_2", TransformersBitsAndBytesConfig(load_in_8bit=True)),
    ):
        model = model_cls.from_pretrained(mini_flux / name, quantization_config=config, dtype=dtype)
        assert {layer.compute_dtype for layer in layers(model)} == {dtype}
        model.save_pretrained(tmp_path / name)
        load = load_text_encoder if model_cls is T5EncoderModel else load_quantized
        model = load(model_cls, tmp_path / name, None, dtype=dtype, device="cpu")
        assert {layer.compute_dtype for layer in layers(model)} == {dtype}


def test_skip_entry_that_matches_no_layer_warns(ours, mini_flux, caplog):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "proj_out"])
    with caplog.at_level("WARNING", logger="halfbyte"):
        model = FluxTransformer2DModel.from_pretrained(
            mini_flux, subfolder="transformer", quantization_config=config
        )
    (record,) = [record for record in caplog.records if "lm_head" in record.getMessage()]
    assert record.getMessage().startswith("skip: got 'lm_head'")
    assert "FluxTransformer2DModel" in record.getMessage()
    assert type(model.proj_out) is nn.Linear
    assert layers(model)


def test_parameter_count_equals_that_of_the_plain_model(
    ours, kind, stock_flux, stock_t5, mini_flux, monkeypatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    for model_cls, folder, plain in (
        (FluxTransformer2DModel, stock_flux[0], mini_flux / "transformer"),
        (T5EncoderModel, stock_t5[0], mini_flux / "text_encoder_2"),
    ):
        model = model_cls.from_pretrained(folder, dtype=torch.float32)
        expected = model_cls.from_pretrained(plain, dtype=torch.float32)
        for options in ({}, {"exclude_embeddings": True}):
            assert copy.deepcopy(model).num_parameters(**options) == expected.num_parameters(**options)
        assert model.num_parameters(only_trainable=True) < expected.num_parameters()
        assert model.dequantize().num_parameters() == expected.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_text_encoder_has_the_requested_dtype(ours, stock_t5, stock_clip, tmp_path, dtype):
    clip = CLIPTextModel.from_pretrained(stock_clip, dtype=torch.bfloat16)
    clip.save_pretrained(tmp_path)
    clip = CLIPTextModel.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in clip.parameters() if p.is_floating_point()} == {dtype}
    assert encoded(clip).dtype == dtype
    t5 = T5EncoderModel.from_pretrained(stock_t5[0], dtype=dtype)
    assert t5.shared.weight.dtype == dtype
    assert encoded(t5).isfinite().all()


def assert_dequantizes(model, folder, output, dtype):
    before = output(model)
    assert model.dequantize() is model
    assert not layers(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    # LLM.int8() also rounds its input; plain layers do not.
    after = output(model)
    assert (after - before).float().norm() / before.float().norm() < 0.05
    model.save_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    plain, info = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(output(plain), after)


def test_dequantized_flux_saves_and_loads_as_a_plain_model(ours, stock_flux, tmp_path):
    model = FluxTransformer2DModel.from_pretrained(stock_flux[0], dtype=torch.bfloat16)
    assert_dequantizes(model, tmp_path, prediction, torch.bfloat16)


def test_dequantized_text_encoders_save_and_load_as_plain_models(ours, stock_t5, stock_clip, tmp_path):
    for name, model_cls, folder in (
        ("t5", T5EncoderModel, stock_t5[0]),
        ("clip", CLIPTextModel, stock_clip),
    ):
        model = model_cls.from_pretrained(folder, dtype=torch.float32)
        assert_dequantizes(model, tmp_path / name, encoded, torch.float32)
    model = CLIPTextModel.from_pretrained(stock_clip, dtype=torch.float32)
    assert model.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.gpu
def test_models_on_the_gpu_are_dequantized_there(ours, stock_flux, stock_t5):
    for model_cls, folder in ((FluxTransformer2DModel, stock_flux[0]), (T5EncoderModel, stock_t5[0])):
        model = model_cls.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cuda:0"})
        expected = {
            path: layer.dequantize(torch.bfloat16)
            for path, layer in model.named_modules()
            if isinstance(layer, QuantizedLayer)
        }
        model.dequantize()
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
        assert all(torch.equal(model.get_submodule(path).weight, weight) for path, weight in expected.items())
