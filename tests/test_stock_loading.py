"""Stock `from_pretrained` with our layers behind it, against what bitsandbytes makes of the same files."""

import pytest
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
from diffusers.quantizers import auto as diffusers_auto
from judge import stock_bitsandbytes_on_cpu
from probe import prediction
from transformers import BitsAndBytesConfig as TransformersBitsAndBytesConfig
from transformers import T5EncoderModel
from transformers.quantizers import auto as transformers_auto

from halfbyte.quant import stock_diffusers, stock_transformers
from halfbyte.quant.linear import Linear4bit


@pytest.fixture
def ours(monkeypatch):
    """Registers our quantizers; the stock ones are back afterwards."""
    for module in (diffusers_auto, transformers_auto):
        for mapping in ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"):
            stock = getattr(module, mapping)
            monkeypatch.setitem(stock, "bitsandbytes_4bit", stock["bitsandbytes_4bit"])
    stock_diffusers.register()
    stock_transformers.register()


def settings(config, double=True):
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )


@pytest.fixture(scope="module")
def stock_flux(tmp_path_factory, mini_flux):
    """A transformer that stock diffusers and bitsandbytes quantized and saved."""
    folder = tmp_path_factory.mktemp("stock") / "transformer"
    with stock_bitsandbytes_on_cpu():
        model = FluxTransformer2DModel.from_pretrained(
            mini_flux,
            subfolder="transformer",
            quantization_config=settings(BitsAndBytesConfig),
            dtype=torch.float32,
        )
        model.save_pretrained(folder)
    return folder, prediction(model)


@pytest.fixture(scope="module")
def stock_t5(tmp_path_factory, mini_flux):
    folder = tmp_path_factory.mktemp("stock") / "t5"
    config = settings(TransformersBitsAndBytesConfig)
    model = T5EncoderModel.from_pretrained(
        mini_flux / "text_encoder_2", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    return folder, encoded(model)


def encoded(model):
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()  # bitsandbytes' eval forward repacks weights on some CPUs
    with torch.no_grad():
        return model(torch.arange(12)[None])[0]


def layers(model):
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def test_a_stock_flux_checkpoint_loads_into_our_layers(ours, stock_flux, tmp_path):
    folder, expected = stock_flux
    model = FluxTransformer2DModel.from_pretrained(folder, dtype=torch.float32)
    assert len(layers(model)) > 50
    assert torch.allclose(prediction(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(prediction(again), prediction(model))


def test_flux_is_quantized_on_the_way_in(ours, stock_flux, mini_flux):
    _, expected = stock_flux
    config = settings(BitsAndBytesConfig)
    model = FluxTransformer2DModel.from_pretrained(
        mini_flux, subfolder="transformer", quantization_config=config, dtype=torch.float32
    )
    assert layers(model)
    difference = (prediction(model) - expected).norm() / expected.norm()
    assert difference < 0.02, "double-quantized scales may differ by a step"


def test_a_stock_t5_checkpoint_loads_into_our_layers(ours, stock_t5, tmp_path):
    folder, expected = stock_t5
    model = T5EncoderModel.from_pretrained(folder, dtype=torch.float32)
    assert layers(model)
    assert torch.allclose(encoded(model), expected, rtol=1e-4, atol=1e-4)
    assert type(model.encoder.block[0].layer[-1].DenseReluDense.wo) is torch.nn.Linear, "T5 keeps wo in fp32"
    model.save_pretrained(tmp_path / "again")
    again = T5EncoderModel.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(encoded(again), encoded(model))


def test_t5_is_quantized_on_the_way_in(ours, stock_t5, mini_flux):
    _, expected = stock_t5
    config = settings(TransformersBitsAndBytesConfig)
    model = T5EncoderModel.from_pretrained(
        mini_flux / "text_encoder_2", quantization_config=config, dtype=torch.float32
    )
    assert layers(model)
    assert (encoded(model) - expected).norm() / expected.norm() < 0.02


def test_a_missing_statistic_is_named(ours, stock_flux, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder, _ = stock_flux
    shutil.copytree(folder, tmp_path / "damaged")
    file = tmp_path / "damaged" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["x_embedder.weight.nested_absmax"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"x_embedder\.weight"):
        FluxTransformer2DModel.from_pretrained(tmp_path / "damaged", dtype=torch.float32)
