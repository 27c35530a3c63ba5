"""Tests loading text encoders: plain ones equal the stock encoder, and quantized ones are close to it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig, T5EncoderModel

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.files.shards import TEXT_WEIGHTS_FILE
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.layers.linear8bit import Linear8bit
from halfbyte.quant.load.text_encoder import count_parameters, load_text_encoder
from halfbyte.quant.stock import transformers_quantizer as stock_transformers

IDS = torch.tensor([[20, 31, 100, 7, 250, 1, 0, 0], [5, 6, 400, 401, 33, 2, 9, 1]])
# Bounds on the relative error of the embeddings of a T5 with random weights. The measured errors are 0.039 and 0.38;
# bf16 itself differs from fp32 by 0.013. T5's attention is not scaled, so it amplifies every difference.
LARGEST_ERROR = {"int8": 0.05, "nf4": 0.5}


@pytest.fixture(scope="module")
def folder(mini_flux):
    return mini_flux / "text_encoder_2"


@pytest.fixture(scope="module")
def stock(folder):
    return T5EncoderModel.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.fixture
def damaged(folder, tmp_path):
    """Returns a copy of the folder, which a test can change."""
    return shutil.copytree(folder, tmp_path / "text_encoder")


def load(folder, quant_type=None, dtype=torch.bfloat16):
    recipe = None if quant_type is None else QuantRecipe(quant_type, compute_dtype=dtype)
    return load_text_encoder(T5EncoderModel, folder, recipe, dtype=dtype, device="cpu")


@torch.no_grad()
def embedding(model):
    return model(IDS).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unquantized_encoder_equals_the_stock_encoder(folder, dtype):
    ours, theirs = load(folder, dtype=dtype), T5EncoderModel.from_pretrained(folder, dtype=dtype)
    assert torch.equal(embedding(ours), embedding(theirs))
    assert {n: p.dtype for n, p in ours.named_parameters()} == {
        n: p.dtype for n, p in theirs.named_parameters()
    }
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("quant_type", ["int8", "nf4"])
def test_embeddings_of_a_quantized_encoder_are_close_to_bf16(folder, stock, quant_type, record_property):
    expected, packed = embedding(stock).float(), embedding(load(folder, quant_type)).float()
    error = ((packed - expected).norm() / expected.norm()).item()
    record_property("relative_error", error)
    print(f"{quant_type}: relative error of the embeddings {error:.4f}")
    assert 0 < error < LARGEST_ERROR[quant_type]


@pytest.mark.parametrize("quant_type", ["int8", "nf4"])
def test_all_linear_layers_are_quantized_except_wo_in_4_bits(folder, quant_type):
    kinds = {
        path: type(module)
        for path, module in load(folder, quant_type).named_modules()
        if isinstance(module, nn.Linear)
    }
    assert len(kinds) == 14
    plain = {path for path, kind in kinds.items() if kind is nn.Linear}
    if quant_type == "nf4":
        assert set(kinds.values()) == {Linear4bit, nn.Linear}
        assert plain == {path for path in kinds if path.endswith(".wo")}
    else:
        assert set(kinds.values()) == {Linear8bit}


@pytest.mark.parametrize("stored_names", [("shared.weight",), ("encoder.embed_tokens.weight",), ("both",)])
def test_embedding_is_shared_under_either_name_in_the_file(damaged, stock, stored_names):
    tensors = load_file(damaged / TEXT_WEIGHTS_FILE)
    weight = tensors.pop("shared.weight")
    tensors.pop("encoder.embed_tokens.weight", None)
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        if name in stored_names or "both" in stored_names:
            tensors[name] = weight.clone()
    save_file(tensors, damaged / TEXT_WEIGHTS_FILE, {"format": "pt"})
    model = load(damaged)
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert torch.equal(embedding(model), embedding(stock))


def test_decoder_in_the_file_is_ignored(damaged, stock):
    tensors = load_file(damaged / TEXT_WEIGHTS_FILE) | {"decoder.final_layer_norm.weight": torch.ones(64)}
    save_file(tensors, damaged / TEXT_WEIGHTS_FILE, {"format": "pt"})
    assert torch.equal(embedding(load(damaged)), embedding(stock))


@pytest.mark.parametrize("load_in", ["load_in_4bit", "load_in_8bit"])
def test_quantized_encoder_keeps_its_settings_and_warns(folder, load_in, tmp_path, monkeypatch, caplog):
    for kind in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
        monkeypatch.setitem(
            stock_transformers.AUTO_QUANTIZER_MAPPING, kind, stock_transformers.HalfbyteHfQuantizer
        )
    options = (
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16} if "4" in load_in else {}
    )
    theirs = T5EncoderModel.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**{load_in: True}, **options)
    )
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path, "int8" if "4" in load_in else "nf4")
    (record,) = [record for record in caplog.records if record.args and record.args[0] == tmp_path]
    assert "nf4" in record.getMessage()
    assert "int8" in record.getMessage()
    assert torch.equal(embedding(ours), embedding(theirs))


def test_parameters_are_counted_without_reading_weights(damaged, stock):
    (damaged / TEXT_WEIGHTS_FILE).unlink()
    assert count_parameters(T5EncoderModel, damaged) == sum(p.numel() for p in stock.parameters())


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            lambda t: t.pop("encoder.final_layer_norm.weight"),
            r"1 missing \(encoder.final_layer_norm.weight\)",
        ),
        (lambda t: t.update(surplus=torch.ones(1)), r"1 unexpected \(surplus\)"),
        (
            lambda t: t.update({"shared.weight": torch.ones(3, 64)}),
            r"model.safetensors: shared.weight: .*shape",
        ),
        (
            lambda t: t.update({"shared.weight": t["shared.weight"].to(torch.int8)}),
            r"model.safetensors: shared.weight: .*torch\.int8",
        ),
    ],
)
def test_tensors_that_do_not_match_are_rejected_by_name(damaged, change, pattern):
    tensors = load_file(damaged / TEXT_WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, damaged / TEXT_WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(ValueError, match=pattern):
        load(damaged, "int8")


@pytest.mark.parametrize(("text", "pattern"), [("{", "JSON"), ('{"num_layers": "many"}', "T5EncoderModel")])
def test_invalid_config_is_rejected_with_the_file(damaged, text, pattern):
    (damaged / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: .*" + pattern):
        load(damaged)
